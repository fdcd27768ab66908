"""From a model to a file that was proved equal to it, and back to predictions."""
