"""From a model to a file that was proved equal to it, and back to predictions."""

import os

# Read when onnxruntime is imported: from 1.32 on it reports its use to its maker unless told not to.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
