"""ONNX Runtime sessions on the provider that was asked for, or none."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

from sdzoo.errors import InputError, nearest

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}


def check_threads(threads: int) -> None:
    """Check a number of threads: more than a few a core only wait for each other, very many bring the process down.

    Raises:
        InputError: if it is below 1 or above four a core.
    """
    most = 4 * (os.cpu_count() or 1)
    if not 1 <= threads <= most:
        raise InputError(f"threads is {threads}; on this machine 1 to {most}")


def open_session(path: str | Path, provider: str, threads: int | None) -> Any:
    """Return ONNX Runtime's session of the file at ``path``; see :func:`sdzoo.load_predictor` for the arguments.

    Raises:
        InputError: if the file is no ONNX file, or the provider is unknown, not installed, or does not run here.
    """
    import onnxruntime

    compiled = onnxruntime.get_available_providers()
    known = {**PROVIDERS, **{name: name for name in onnxruntime.get_all_providers()}}
    if provider != "auto" and provider not in known:
        raise InputError(
            f'provider "{provider}" is unknown; known: auto, {", ".join(PROVIDERS)}{nearest(provider, known)}'
        )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what went wrong is raised; ONNX Runtime would also print it
    if threads:
        options.intra_op_num_threads = threads
    exact = {PROVIDERS["cuda"]: {"use_tf32": "0"}}  # its ten bits of mantissa do not hold the limit of float32
    wanted = [name for name in (PROVIDERS["cuda"], PROVIDERS["cpu"]) if name in compiled]
    if provider != "auto":
        wanted = [known[provider]]
        if wanted[0] not in compiled:
            raise InputError(f"{wanted[0]} is not in the installed onnxruntime; it has {', '.join(compiled)}")
        if wanted[0] != PROVIDERS["cpu"]:
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    if wanted[0] != PROVIDERS["cpu"]:
        onnxruntime.preload_dlls()
    given = [(name, exact[name]) if name in exact else name for name in wanted]
    try:
        session = onnxruntime.InferenceSession(str(path), options, enable_fallback=0, providers=given)
    except Exception as error:  # onnxruntime's own classes derive from Exception alone
        reason = " ".join(str(error).split())
        raise InputError(f"{path} is no whole ONNX file, or {wanted[0]} cannot run it: {reason}") from None
    got = session.get_providers()[0]
    if got != wanted[0]:
        if provider != "auto":
            raise InputError(f"asked for {wanted[0]}, but this machine can only run {got}")
        warnings.warn(f"{wanted[0]} is installed but does not run here; using {got}", stacklevel=4)
    return session
