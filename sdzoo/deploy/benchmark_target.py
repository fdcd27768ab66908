"""What a benchmark can time: which targets there are, which can run here, and how each is made and opened."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from sdzoo.deploy.precision import check_images
from sdzoo.deploy.predictor import Predictor, model_predictor
from sdzoo.deploy.runtime import load_predictor
from sdzoo.deploy.session import PROVIDERS
from sdzoo.deploy.tensorrt_builder import RTX_TARGETS, find_flavour, find_gpu
from sdzoo.deploy.verification import Images
from sdzoo.errors import InputError, nearest
from sdzoo.extras import MissingExtra, missing
from sdzoo.fold import fold
from sdzoo.hardware import processor

# Each with the rule by which it is compared with the model.
PRECISIONS = {
    "eager": "fp32",
    "folded": "fp32",
    "folded-channels-last": "fp32",
    "onnx": "fp32",
    "onnx-fp16": "fp16",
    "onnx-int8": "int8",
    "openvino": "fp32",
    "tensorrt": "fp32",
}
TARGETS = tuple(PRECISIONS)


@dataclass(frozen=True)
class Opening:
    """All that a process needs in order to open its target.

    Attributes:
        name: What errors and rows call it.
        kind: ``eager`` (what ``torch.save`` made of a model), ``onnx``, ``openvino`` (an ONNX file) or ``tensorrt``.
        file: What is opened, and shipped.
        threads: Within one operator.
        provider: Of ONNX Runtime.
        config: timm's data config of the model.
    """

    name: str
    kind: str
    file: Path
    threads: int
    provider: str
    config: dict[str, Any]


def opening(target: str, file: Path, threads: int, provider: str, config: dict[str, Any]) -> Opening:
    """Return how ``target`` is opened."""
    kinds = {"openvino": "openvino", "tensorrt": "tensorrt"}
    kind = kinds.get(target, "onnx" if target.startswith("onnx") else "eager")
    return Opening(target, kind, file, threads, provider, config)


@dataclass(frozen=True)
class Given:
    """What there is to make targets from.

    Attributes:
        images: What they are compared on; ``folder`` is where it lies, None for the pictures that ship.
        folder: See ``images``.
        calibration: A folder of other pictures, for int8.
        onnx: The model's fp32 ONNX file, if there is one already.
        max_drop: Top-1 that int8 may lose, in points.
        provider: Where the model is, and all targets compute: ``cpu`` or ``cuda``.
    """

    images: Images
    folder: str | Path | None
    calibration: str | Path | None
    onnx: str | Path | None
    max_drop: float
    provider: str = "cpu"


def choose(targets: Sequence[str] | None, given: Given, note: Callable[[str], None] = lambda _: None) -> list[str]:
    """Return ``targets`` in the order of ``TARGETS``; default: all that can run here, the others being noted.

    Raises:
        InputError: if one is unknown or cannot run, with those that can, and what the others lack.
    """
    lacks = {target: why_not(target, given) for target in TARGETS}
    able = [target for target, reason in lacks.items() if reason is None]
    if targets is None:
        for target, reason in lacks.items():
            if reason is not None:
                note(f"left out: {target} {reason}")
        return able
    if not targets:
        raise InputError(f"no targets given; possible here: {', '.join(able)}")
    rest = "".join(f"; {target} {reason}" for target, reason in lacks.items() if reason)
    for target in targets:
        if target not in lacks:
            raise InputError(
                f'target "{target}" is unknown; possible here: {", ".join(able)}{rest}{nearest(target, TARGETS)}'
            )
        if lacks[target]:
            raise InputError(f"target {target} {lacks[target]}; possible here: {', '.join(able)}")
    return [target for target in TARGETS if target in targets]


def why_not(target: str, given: Given) -> str | None:
    """Return what ``target`` lacks here, None if it can run."""
    if target == "tensorrt":
        elsewhere = None if given.provider == "cuda" else "computes on a GPU, the model on the CPU (--provider cuda)"
        return _why_no_tensorrt() or elsewhere
    if target.startswith(("onnx", "openvino")) and missing("onnx"):
        return 'needs pip install "sdzoo[onnx]"'
    if target == "openvino" and importlib.util.find_spec("openvino") is None:
        return 'needs pip install "sdzoo[openvino]"'
    if given.provider == "cuda" and target == "openvino":
        return "computes on the CPU, the model on a GPU (--provider cpu)"
    if given.provider == "cuda" and target.startswith("onnx") and not _has_cuda_provider():
        return 'needs the CUDA provider (pip uninstall onnxruntime; pip install "sdzoo[onnx-gpu]"), or --provider cpu'
    if target == "onnx-int8" and given.calibration is None:
        return "needs at least 256 pictures to calibrate on, other ones than the images (--calibration DIR)"
    try:
        check_images(PRECISIONS[target], given.images)
    except InputError as error:
        return f"cannot be judged: {error}"
    return None


def _has_cuda_provider() -> bool:
    return PROVIDERS["cuda"] in importlib.import_module("onnxruntime").get_available_providers()


def _why_no_tensorrt() -> str | None:
    if missing("onnx"):
        return 'needs pip install "sdzoo[onnx]"'
    try:
        flavour = find_flavour()
    except MissingExtra as error:
        return f"cannot run: {error}"
    gpu = find_gpu()
    if gpu is None or not torch.cuda.is_available():
        return "needs an NVIDIA GPU, and a PyTorch with CUDA"
    if flavour.name == "tensorrt-rtx" and gpu.compute_capability not in RTX_TARGETS:
        return f"needs TensorRT itself for {gpu}: {flavour} has no such target"
    return None


def make(
    model: nn.Module, targets: Sequence[str], folder: Path, given: Given, progress: Callable[[str], None]
) -> dict[str, Path]:
    """Write the file of each of ``targets`` into ``folder`` and return them; what is exported is verified by that.

    Raises:
        InputError, ParityError: as :func:`sdzoo.export_onnx` and :func:`sdzoo.export`.
    """
    files: dict[str, Path] = {}
    for target in targets:
        progress(f"making {target}")
        if target == "tensorrt":
            from sdzoo.deploy.export import export

            card = export(model, "tensorrt", folder / target, images=given.folder, progress=progress)
            files[target] = folder / target / card.file
        elif target.startswith(("onnx", "openvino")):
            files[target] = _onnx(model, PRECISIONS[target], folder, given, progress)
        else:
            files[target] = folder / f"{target}.pt"
            _save(model if target == "eager" else fold(model), files[target])
    return files


def _onnx(model: nn.Module, precision: str, folder: Path, given: Given, progress: Callable[[str], None]) -> Path:
    from sdzoo.deploy.onnx_export import export_onnx

    if precision == "fp32" and given.onnx is not None:
        if load_predictor(given.onnx, "cpu").in_graph:
            raise InputError(f"{given.onnx} normalises in its graph; time one that takes normalised images")
        return Path(given.onnx)
    file = folder / f"{precision}.onnx"
    if not file.exists():  # what OpenVINO opens is the same file
        calibration = given.calibration if precision == "int8" else None
        export_onnx(
            model,
            file,
            precision=precision,
            images=given.folder,
            calibration=calibration,
            max_drop=given.max_drop,
            progress=progress,
        )
    return file


def _save(model: nn.Module, file: Path) -> None:
    try:
        torch.save(model, file)
    except Exception as error:  # whatever pickle makes of what hangs on the model
        raise InputError(f"the model cannot be sent to a process of its own: {error}") from None


def import_runtime(kind: str) -> str:
    """Import what computes targets of ``kind`` and return its name and version."""
    if kind == "tensorrt":
        return str(find_flavour())
    name = {"eager": "torch", "onnx": "onnxruntime", "openvino": "openvino"}[kind]
    version = str(importlib.import_module(name).__version__)
    return f"{name} {version.partition('-')[0]}"  # OpenVINO's goes on with a build, a commit and a branch


def open_target(opening: Opening) -> Predictor:
    """Return the predictor of a target, in the process that is its own."""
    if opening.kind == "onnx":
        return load_predictor(opening.file, opening.provider, threads=opening.threads)
    if opening.kind == "openvino":
        return _openvino(opening)
    if opening.kind == "tensorrt":
        return load_predictor(opening.file)
    torch.set_num_threads(opening.threads)
    torch.backends.cudnn.allow_tf32 = False  # what is timed is what is compared: float32, as for the other targets
    model: nn.Module = torch.load(opening.file, weights_only=False)  # of our own making
    if opening.name == "folded-channels-last":
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model_predictor(model)


def _openvino(opening: Opening) -> Predictor:
    openvino: Any = importlib.import_module("openvino")
    # Where there are bfloat16 instructions, OpenVINO would use them and miss the limit of float32.
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": opening.threads}
    compiled = openvino.Core().compile_model(str(opening.file), "CPU", settings | {"PERFORMANCE_HINT": "LATENCY"})

    def run(batch: NDArray[Any]) -> NDArray[np.float32]:
        return np.array(compiled(batch)[0])  # a copy: the runtime writes into its own memory again

    return Predictor(run, opening.file.name, "OpenVINO CPU", None, opening.config)


def is_on_gpu(provider: str) -> bool:
    """Return whether ``provider`` computes on a GPU."""
    return "cuda" in provider.lower() or "tensorrt" in provider.lower()


def device_name(provider: str) -> str:
    """Return the GPU's name if ``provider`` computes on one, else the processor's and its number of cores."""
    if is_on_gpu(provider):
        gpu = find_gpu()
        return gpu.name if gpu else "GPU"
    return f"{processor()}, {os.cpu_count()} cores"
