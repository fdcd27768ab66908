"""Export to ONNX: folded, converted, verified in ONNX Runtime against the model that was trained, and only then given
its name."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sdzoo import __version__, weights
from sdzoo.deploy.card import FORMAT
from sdzoo.deploy.precision import MAX_DROP_POINTS, check_images, check_max_drop, check_precision, judge
from sdzoo.deploy.verification import DIGITS, Images, check_apart, default_images, images_of, normalised
from sdzoo.digest import BLANK, sealed, state_sha256
from sdzoo.errors import InputError, ParityError, nearest
from sdzoo.extras import require
from sdzoo.files import atomic_path
from sdzoo.fold import check_evaluation, fold
from sdzoo.images import input_config
from sdzoo.parity import Accuracy, Parity
from sdzoo.survival import survival_probs

PREPROCESSING = ("client", "in-graph")
CALIBRATION_IMAGES = 512  # of those given, evenly spread over them
RUNTIME = "onnxruntime, CPUExecutionProvider"


@dataclass(frozen=True)
class Settings:
    """How a model is to be exported.

    Attributes:
        precision: ``fp32``, ``fp16`` or ``int8``.
        preprocess: Who normalises: the ``client`` gives float32 ``(batch, C, H, W)``, normalised; ``in-graph`` takes
            uint8 ``(batch, H, W, C)`` at the model's input size.
        images: A folder of real pictures to verify on, by class for ``int8``; None: those that ship with sdzoo.
        calibration: A folder of at least 256 pictures that are not among ``images``, for ``int8``.
        max_drop: Top-1 that ``int8`` may lose, in points.
        preset: What ``int8`` is for: ``cpu`` or ``tensorrt``.
    """

    precision: str = "fp32"
    preprocess: str = "client"
    images: str | Path | None = None
    calibration: str | Path | None = None
    max_drop: float = MAX_DROP_POINTS
    preset: str = "cpu"

    def __post_init__(self) -> None:
        check_precision(self.precision)
        if self.preprocess not in PREPROCESSING:
            raise InputError(
                f'preprocess "{self.preprocess}" is unknown; known: {", ".join(PREPROCESSING)}'
                f"{nearest(str(self.preprocess), PREPROCESSING)}"
            )
        if self.precision == "int8" and None in (self.images, self.calibration):
            raise InputError(
                "int8 needs pictures in class folders to be judged on (--images DIR), and at least 256 others to "
                "calibrate on (--calibration DIR)"
            )
        if self.precision != "int8" and self.calibration is not None:
            raise InputError(f"calibration images are for int8; precision is {self.precision}")
        check_max_drop(self.max_drop)


@dataclass(frozen=True)
class OnnxFile:
    """A verified ONNX file before it has a name: its bytes, what its metadata say, and what proved it."""

    content: bytes
    metadata: dict[str, Any]
    output_shape: list[str | int]
    proof: Parity | Accuracy


def export_onnx(
    model: nn.Module,
    path: str | Path,
    *,
    precision: str = "fp32",
    preprocess: str = "client",
    images: str | Path | None = None,
    calibration: str | Path | None = None,
    max_drop: float = MAX_DROP_POINTS,
    progress: Callable[[str], None] = lambda _: None,
) -> Parity | Accuracy:
    """Write ``model`` as one verified ONNX file and return how close it came.

    The file computes ``images``, float32 ``(batch, C, H, W)``, normalised, to ``logits`` ``(batch, num_classes)``
    (``features`` for a model without classifier). Its metadata say how to feed it, what it was compared with, and
    the sha256 of the file with zeros in that place. It is compared with ``model`` itself, not with the folded model, in
    ONNX Runtime on batches of 1, 2, 17 and 64.

    Args:
        model: A stochastic-depth model in evaluation mode, float32; left alone.
        path: The file to write; one that is there is replaced only by a verified one.
        precision: ``fp32``, ``fp16`` or ``int8``.
        preprocess: ``client``, as above; or ``in-graph``: uint8 ``(batch, H, W, C)`` at the model's input size.
        images: A folder of real pictures to compare on, by class for int8; default: those that ship with sdzoo.
        calibration: A folder of at least 256 pictures that are not among ``images``, for int8.
        max_drop: Top-1 that int8 may lose, in points.
        progress: Called with what is being done.

    Raises:
        InputError: if the model is in training mode, folded already, not float32, or has a part without ONNX
            counterpart; there are too few images, or of other classes; or ``path`` cannot be written.
        ParityError: if ONNX Runtime's outputs are not the model's; there is no file then.
        ImportError: without the extra ``onnx``.
    """
    settings = Settings(precision, preprocess, images, calibration, max_drop)
    require("onnx", "onnxruntime")
    import onnx

    with atomic_path(path) as temporary:
        built = build_onnx(model, settings, progress)
        temporary.write_bytes(built.content)
        try:
            intact = (
                onnx.load(temporary).SerializeToString() == onnx.load_from_string(built.content).SerializeToString()
            )
        except Exception:  # whatever the parser makes of damaged bytes
            intact = False
        if not intact or temporary.read_bytes() != built.content:
            raise ParityError(f"what was written to {path} is not what was verified")
    return built.proof


def build_onnx(model: nn.Module, settings: Settings, progress: Callable[[str], None] = lambda _: None) -> OnnxFile:
    """Return ``model`` as the bytes of a verified ONNX file; arguments and errors are those of :func:`export_onnx`."""
    require("onnx", "onnxruntime")
    import onnx

    from sdzoo.deploy.onnx_graph import OPSET, onnx_graph
    from sdzoo.deploy.preprocess import with_preprocessing

    _check_exportable(model)
    probs, config, labels = survival_probs(model), input_config(model), labels_of(model)
    if settings.preprocess == "in-graph" and config["input_size"][0] not in (1, 3):
        raise InputError(f"pictures have 1 or 3 channels; the model takes {config['input_size'][0]}")
    if settings.precision != "fp32" and not model.num_classes:
        raise InputError(f"{settings.precision} is judged by top-1; the model has no classifier")
    images = verification_images(settings, model)
    calibration = _calibration(settings.calibration, config, images) if settings.calibration is not None else None
    source = copy.deepcopy(model).cpu()
    progress("folding and writing the graph")
    proto = onnx_graph(fold(source), config["input_size"], "logits" if model.num_classes else "features")
    opset = {entry.domain: entry.version for entry in proto.opset_import}.get("")
    if opset != OPSET:
        raise ParityError(f"asked for opset {OPSET}, got {opset}")
    notes: dict[str, Any] = {}
    if settings.precision == "fp16":
        from sdzoo.deploy.half import check_range, to_half

        progress(f"looking for overflow on {images.origin}")
        try:
            node, value = check_range(proto, (normalised(batch, config).numpy() for batch in images.batches()))
        except ParityError as error:
            raise ParityError(f"not exported, {images.origin}: {error}") from None
        notes = {"largest_intermediate": {"node": node, "value": value}, "computed_in": "float32, as CPUs do"}
        proto = to_half(proto)
    elif settings.precision == "int8":
        from sdzoo.deploy.quantize import quantize

        assert calibration is not None
        progress(f"calibrating on {settings.calibration}")
        pictures, chosen = calibration
        batches = (chosen[start : start + 32] for start in range(0, len(chosen), 32))
        inputs = (normalised(pictures.read(batch), config).numpy() for batch in batches)
        proto = quantize(proto, settings.preset, inputs)
        digests = sorted(pictures.digests[index][:DIGITS] for index in chosen)
        notes = {"preset": settings.preset, "calibration": digests}
    if settings.preprocess == "in-graph":  # last, so that it stays in float32 at any precision
        proto = with_preprocessing(proto, config)
    proto.producer_name = "sdzoo"  # the quantiser puts its own
    graph = proto.SerializeToString()
    progress(f"comparing on {images.origin}")
    proof = _verify(source, graph, images, settings, config)
    digest = state_sha256(model.state_dict())
    metadata = {
        "format": FORMAT,
        "model": model.pretrained_cfg.get("architecture"),  # type: ignore[union-attr]
        "tag": weights.tag_of(digest),
        "labels": labels,
        **{name: config[name] for name in ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")},
        "precision": settings.precision,
        "preprocess": settings.preprocess,
        "survival_probs": probs,
        "weights_sha256": digest,
        "versions": _versions(),
        "file_sha256": BLANK,
        "parity": proof.as_dict() | {"inputs": images.origin, "runtime": RUNTIME} | notes,
    }
    onnx.helper.set_model_props(proto, {name: json.dumps(value) for name, value in metadata.items()})
    onnx.checker.check_model(proto, full_check=True)
    content = sealed(proto.SerializeToString())
    shape = [dim.dim_param or dim.dim_value for dim in proto.graph.output[0].type.tensor_type.shape.dim]
    return OnnxFile(content, metadata, shape, proof)


def labels_of(model: nn.Module) -> list[str] | None:
    """Return the class names of ``model`` from its timm configuration, None where it has none for its classes."""
    names = model.pretrained_cfg.get("label_names")  # type: ignore[union-attr]
    return list(names) if names and len(names) == model.num_classes else None


def check_described(model: nn.Module) -> None:
    """Raise InputError unless ``model`` says its classes and input, as timm's models do."""
    if not hasattr(model, "pretrained_cfg") or not hasattr(model, "num_classes"):
        raise InputError(f"{type(model).__name__} does not say its classes and input: create it with timm.create_model")


def _check_exportable(model: nn.Module) -> None:
    if hasattr(model, "_orig_mod"):
        raise InputError("cannot export a compiled model: export the one that was compiled")
    check_evaluation(model)
    if kinds := {p.dtype for p in model.parameters()} - {torch.float32}:
        raise InputError(f"cannot export {', '.join(map(str, kinds))} weights: call model.float() first")
    check_described(model)


def verification_images(settings: Settings, model: nn.Module) -> Images:
    """Return what an export by ``settings`` is compared on.

    Raises:
        InputError: if the pictures are too few for the precision, or of other classes.
    """
    config = input_config(model)
    images = default_images(config) if settings.images is None else images_of(settings.images, config)
    images.check_classes(labels_of(model), int(model.num_classes))  # type: ignore[arg-type]
    check_images(settings.precision, images)
    return images


def _calibration(folder: str | Path, config: dict[str, Any], judging: Images) -> tuple[Images, list[int]]:
    """Return the pictures of ``folder``, and which calibrate: evenly spread over it; none of them is ``judging``."""
    from sdzoo.deploy.quantize import LEAST_IMAGES

    images = images_of(folder, config)
    if len(images) < LEAST_IMAGES:
        raise InputError(f"{folder}: {images.origin}; int8 is calibrated on at least {LEAST_IMAGES}")
    check_apart(images, judging)
    return images, np.linspace(0, len(images) - 1, min(CALIBRATION_IMAGES, len(images))).round().astype(int).tolist()


def _feed(settings: Settings, config: dict[str, Any]) -> Callable[[Tensor], NDArray[np.generic]]:
    """Return what makes the graph's input of uint8 ``(B, C, H, W)``."""
    if settings.preprocess == "in-graph":
        return lambda images: np.ascontiguousarray(images.permute(0, 2, 3, 1).numpy())
    return lambda images: normalised(images, config).numpy()


def _verify(
    model: nn.Module, graph: bytes, images: Images, settings: Settings, config: dict[str, Any]
) -> Parity | Accuracy:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    feed = _feed(settings, config)

    def reference(batch: Tensor) -> Tensor:
        return model(normalised(batch, config))

    def candidate(batch: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"images": feed(batch)})[0])

    try:
        return judge(reference, candidate, images, settings.precision, settings.max_drop)
    except ParityError as error:
        raise ParityError(f"not exported, {images.origin}: {error}") from None


def _versions() -> dict[str, str]:
    import onnx
    import onnxruntime
    import timm

    modules = {"torch": torch, "timm": timm, "onnx": onnx, "onnxruntime": onnxruntime}
    return {"sdzoo": __version__} | {name: str(module.__version__) for name, module in modules.items()}
