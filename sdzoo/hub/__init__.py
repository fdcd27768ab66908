"""To the Hub and back: publishing what was measured, loading what may be hostile."""
