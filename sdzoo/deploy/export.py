"""From a model to the folder that is shipped: the file of its target, its labels, its card, and how to serve it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from torch import nn

from sdzoo.deploy.card import CARD, NOT_RUN, README, Card, digests, read_card
from sdzoo.deploy.onnx_export import RUNTIME, OnnxFile, Settings, build_onnx, verification_images
from sdzoo.deploy.precision import MAX_DROP_POINTS
from sdzoo.deploy.tensorrt_builder import find_builder
from sdzoo.deploy.tensorrt_engine import UNVERIFIED, why_not_here
from sdzoo.deploy.verification import LARGEST_BATCH
from sdzoo.deploy.verify import verify_engine
from sdzoo.errors import InputError, nearest
from sdzoo.extras import missing, require
from sdzoo.files import atomic_folder

# What computes at each target, the default first, and the extra that building for it takes.
BACKENDS: dict[str, dict[str, str]] = {
    "onnx": {"onnxruntime": "onnx"},
    "tensorrt": {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt-rtx"},
    "triton": {"onnxruntime": "triton", "onnxruntime-tensorrt": "triton", "python": "triton"},
}
# Where Triton computes by something else than what the export was compared in.
TRITON_SERVES_BY = {
    "onnxruntime": "ONNX Runtime in Triton, by its CUDA provider where there is a GPU: not compared there",
    "onnxruntime-tensorrt": "ONNX Runtime in Triton, by its TensorRT provider on a GPU: not compared there",
}


def export(
    model: nn.Module,
    target: str,
    out: str | Path,
    *,
    precision: str = "fp32",
    preprocess: str = "client",
    images: str | Path | None = None,
    calibration: str | Path | None = None,
    max_drop: float = MAX_DROP_POINTS,
    backend: str | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Card:
    """Write ``model`` as a folder for ``target``, compared with ``model`` first, and return the folder's card.

    What could not be run here (a TensorRT engine without a GPU) is named ``*.unverified.engine``, its card says
    ``parity: not run``, and it is not loaded until it has been verified.

    Args:
        model: A stochastic-depth model in evaluation mode, float32; left alone.
        target: ``onnx``, ``tensorrt`` or ``triton``.
        out: The folder to make; one that sdzoo exported before is replaced once the new one is verified.
        precision: ``fp32``, ``fp16`` or ``int8``.
        preprocess: ``client``: float32 ``(batch, C, H, W)``, normalised; ``in-graph``: uint8 ``(batch, H, W, C)``.
        images: A folder of real pictures to compare on; fp16 takes at least 1000, int8 class folders.
        calibration: A folder of at least 256 other pictures, for int8.
        max_drop: Top-1 that int8 may lose, in points.
        backend: What computes at the target; default: the first of ``BACKENDS``, or the TensorRT that compiles here.
        progress: Called with what is being done.

    Raises:
        InputError: listing what is possible, if the target, the precision or the pair with the backend is not; and as
            :func:`sdzoo.export_onnx`.
        ParityError: with the image, the output and the figures; there is no folder then.
        MissingExtra: an ImportError naming the extra that the target needs.
    """
    backend = _backend(target, backend)
    preset = "tensorrt" if "tensorrt" in backend else "cpu"
    settings = Settings(precision, preprocess, images, calibration, max_drop, preset)
    with atomic_folder(out, lambda old: {CARD, README, *read_card(old).files}) as folder:
        built = build_onnx(model, settings, progress)
        card = _card(built, target, settings, model, Path(out))
        labels = built.metadata["labels"] or [str(index) for index in range(model.num_classes)]  # type: ignore[arg-type]
        (folder / "labels.json").write_text(json.dumps(labels, ensure_ascii=False) + "\n", encoding="utf-8")
        if target == "triton":
            card = _write_triton(card, built, folder, Path(out), backend)
        else:
            (folder / card.file).write_bytes(built.content)
        if target == "tensorrt":
            progress("building the engine")
            card = _write_engine(card, built, folder, Path(out), backend)
        card = replace(card, files=digests(folder))
        card.write(folder)
        if card.engine is not None:
            if reason := why_not_here(card.engine):
                progress(f"the engine stays unverified: it {reason}")
            else:
                progress("comparing the engine")
                card = verify_engine(model, folder, verification_images(settings, model), max_drop)
                card = replace(card, serve=_predict(out))
                card.write(folder)
    return card


def possible() -> str:
    """Return which targets there are, what computes at each, and what is missing here to build for it."""
    lines = []
    for target, backends in BACKENDS.items():
        words = [f"{name} (needs sdzoo[{extra}])" if missing(extra) else name for name, extra in backends.items()]
        lines.append(f"{target} with {' or '.join(words)}")
    return "; ".join(lines)


def _backend(target: str, backend: str | None) -> str:
    if target not in BACKENDS:
        raise InputError(f'target "{target}" is unknown; possible: {possible()}{nearest(str(target), BACKENDS)}')
    if backend is not None and backend not in BACKENDS[target]:
        raise InputError(f'{target} with "{backend}" is not possible; possible: {possible()}')
    require("onnx", "onnxruntime")
    if target == "triton":
        require("tritonclient", "grpc")
    if target == "tensorrt":
        return find_builder(backend or "auto").name
    return backend or next(iter(BACKENDS[target]))


def _card(built: OnnxFile, target: str, settings: Settings, model: nn.Module, out: Path) -> Card:
    said = built.metadata
    channels, height, width = said["input_size"]
    in_graph = settings.preprocess == "in-graph"
    return Card(
        model=said["model"],
        tag=said["tag"],
        target=target,
        precision=settings.precision,
        file="model.onnx",
        input={
            "name": "images",
            "dtype": "uint8" if in_graph else "float32",
            "layout": "NHWC" if in_graph else "NCHW",
            "shape": ["batch", height, width, channels] if in_graph else ["batch", channels, height, width],
            "largest_batch": LARGEST_BATCH,
        },
        output={
            "name": "logits" if model.num_classes else "features",
            "dtype": "float32",
            "shape": built.output_shape,
        },
        preprocessing={"where": settings.preprocess}
        | {name: list(said[name]) for name in ("input_size", "mean", "std")}
        | {name: said[name] for name in ("interpolation", "crop_pct", "crop_mode")},
        survival_probs=said["survival_probs"],
        weights_sha256=said["weights_sha256"],
        parity=said["parity"],
        provider=RUNTIME,
        versions=said["versions"],
        serve=_predict(out),
    )


def _predict(out: str | Path) -> str:
    return f"sdzoo predict IMAGE --model {shlex.quote(str(out))}"


def _write_triton(card: Card, built: OnnxFile, folder: Path, out: Path, backend: str) -> Card:
    from sdzoo.deploy.triton import write_repository

    repository = "model_repository"
    write_repository(
        folder / repository,
        card.model,
        built.content,
        asdict(card),
        labels=built.metadata["labels"],
        backend="python" if backend == "python" else "onnxruntime",
        tensorrt=backend == "onnxruntime-tensorrt",
    )
    return replace(
        card,
        file=f"{repository}/{card.model}/1/model.onnx",
        backend=backend,
        served_by=TRITON_SERVES_BY.get(backend),
        serve=f"python serve.py {shlex.quote(str(out))}    # serve.py is in the kit export/triton"
        if backend == "python"
        else f"tritonserver --model-repository={shlex.quote(str(out / repository))}",
    )


def _write_engine(card: Card, built: OnnxFile, folder: Path, out: Path, flavour: str) -> Card:
    from sdzoo.deploy.tensorrt_builder import build_engine

    facts = build_engine(built.content, folder / UNVERIFIED, flavour=flavour)
    card = replace(
        card,
        file=UNVERIFIED,
        parity=NOT_RUN,
        provider=f"{facts.flavour} {facts.version}",
        engine=facts.as_dict() | {"onnx_parity": card.parity},
        backend=facts.flavour,
    )
    return replace(card, serve=f"{card.prove(out)}    # on the target, before anything else")
