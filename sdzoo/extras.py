"""Optional dependencies: their absence is said with the extra that brings them."""

from __future__ import annotations

import importlib.util

from sdzoo.errors import InputError

EXTRAS = {
    "onnx": "onnx",
    "onnxruntime": "onnx",
    "matplotlib": "plots",
    "tensorboard": "tensorboard",
    "scipy": "svhn",
    "webdataset": "webdataset",
    "tritonclient": "triton",
    "grpc": "triton",
    "tensorrt": "tensorrt",
    "tensorrt_rtx": "tensorrt-rtx",
    "openvino": "openvino",
}


class MissingExtra(InputError, ImportError):
    """An optional dependency is not installed."""


def missing(extra: str) -> list[str]:
    """Return the modules that ``extra`` would bring and that are not installed."""
    return [name for name, brings in EXTRAS.items() if brings == extra and importlib.util.find_spec(name) is None]


def require(*modules: str) -> None:
    """Check that optional modules can be imported; call it before importing them where they are used.

    Raises:
        MissingExtra: an ImportError naming the extra of sdzoo to install.
    """
    if absent := [name for name in modules if importlib.util.find_spec(name) is None]:
        extras = ",".join(sorted({EXTRAS[name] for name in absent}))
        raise MissingExtra(f'{", ".join(absent)} not installed; install with: pip install "sdzoo[{extras}]"')
