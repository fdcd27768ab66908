"""Export to ONNX: folded, verified in ONNX Runtime against the model that was trained, and only then given its name."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sdzoo import __version__, weights
from sdzoo.assets import pictures
from sdzoo.digest import BLANK, sealed, state_sha256
from sdzoo.errors import InputError, ParityError
from sdzoo.extras import require
from sdzoo.files import atomic_path
from sdzoo.fold import check_evaluation, fold
from sdzoo.images import input_config, normalise, open_image, resizer
from sdzoo.parity import Parity, compare
from sdzoo.survival import survival_probs

BATCH_SIZES = (1, 2, 17)


def export_onnx(model: nn.Module, path: str | Path) -> Parity:
    """Write ``model`` as one verified ONNX file and return how close it came.

    The file computes ``images`` float32 ``(batch, C, H, W)``, normalised, to ``logits`` ``(batch, num_classes)``
    (``features`` for a model without classifier). Its metadata say how to feed it, what it was compared with, and
    the sha256 of the file with zeros in that place. It is compared with ``model`` itself, not with the folded model, in
    ONNX Runtime on batches of 1, 2 and 17.

    Args:
        model: A stochastic-depth model in evaluation mode, float32; left alone.
        path: The file to write; one that is there is replaced only by a verified one.

    Raises:
        InputError: if the model is in training mode, folded already, not float32, or has a part without ONNX
            counterpart; or ``path`` cannot be written.
        ParityError: if ONNX Runtime's outputs are not the model's; there is no file then.
        ImportError: without the extra ``onnx``.
    """
    require("onnx", "onnxruntime")
    import onnx

    from sdzoo.deploy.onnx_graph import OPSET, onnx_graph

    _check_exportable(model)
    probs = survival_probs(model)
    config = input_config(model)
    output = "logits" if model.num_classes else "features"
    with atomic_path(path) as temporary:
        source = copy.deepcopy(model).cpu()
        proto = onnx_graph(fold(source), config["input_size"], output)
        opset = {entry.domain: entry.version for entry in proto.opset_import}.get("")
        if opset != OPSET:
            raise ParityError(f"asked for opset {OPSET}, got {opset}")
        graph = proto.SerializeToString()
        parity, origin = _verify(source, graph, config)
        digest = state_sha256(model.state_dict())
        metadata = {
            "format": "sdzoo-1",
            "model": model.pretrained_cfg.get("architecture"),  # type: ignore[union-attr]
            "tag": weights.tag_of(digest),
            "labels": labels_of(model),
            **{name: config[name] for name in ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")},
            "survival_probs": probs,
            "weights_sha256": digest,
            "versions": _versions(),
            "file_sha256": BLANK,
            "parity": parity.as_dict() | {"inputs": origin, "runtime": "onnxruntime, CPUExecutionProvider"},
        }
        onnx.helper.set_model_props(proto, {name: json.dumps(value) for name, value in metadata.items()})
        onnx.checker.check_model(proto, full_check=True)
        temporary.write_bytes(sealed(proto.SerializeToString()))
        written = onnx.load(temporary)
        del written.metadata_props[:]
        if written.SerializeToString() != graph:
            raise ParityError(f"what was written to {path} is not what was verified")
    return parity


def labels_of(model: nn.Module) -> list[str] | None:
    """Return the class names of ``model`` from its timm configuration, None where it has none for its classes."""
    names = model.pretrained_cfg.get("label_names")  # type: ignore[union-attr]
    return list(names) if names and len(names) == model.num_classes else None


def verification_batches(
    config: dict[str, Any], batch_sizes: tuple[int, ...] = BATCH_SIZES
) -> tuple[list[Tensor], str]:
    """Return normalised batches of the given sizes, and what they hold.

    Distinct real pictures, each also mirrored, where the model takes pictures and there are enough; else seeded noise.
    """
    in_chans, height, width = config["input_size"]
    if in_chans == 3 and sum(batch_sizes) <= 2 * len(pictures()):
        resize = resizer(config)
        images = torch.stack([torch.from_numpy(resize(open_image(file))) for file in pictures().values()])
        images = torch.from_numpy(normalise(torch.cat([images, images.flip(-1)]).numpy(), config))
        return list(images.split(batch_sizes)), "real pictures"
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(sum(batch_sizes), in_chans, height, width, generator=generator)
    return list(noise.split(batch_sizes)), "seeded noise"


def _check_exportable(model: nn.Module) -> None:
    if hasattr(model, "_orig_mod"):
        raise InputError("cannot export a compiled model: export the one that was compiled")
    check_evaluation(model)
    if kinds := {p.dtype for p in model.parameters()} - {torch.float32}:
        raise InputError(f"cannot export {', '.join(map(str, kinds))} weights: call model.float() first")
    if not hasattr(model, "pretrained_cfg") or not hasattr(model, "num_classes"):
        raise InputError(f"{type(model).__name__} does not say its classes and input: create it with timm.create_model")


def _verify(model: nn.Module, graph: bytes, config: dict[str, Any]) -> tuple[Parity, str]:
    import onnxruntime

    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    batches, origin = verification_batches(config)

    def run(batch: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"images": batch.numpy()})[0])

    try:
        return compare(model, run, batches), origin
    except ParityError as error:
        raise ParityError(f"not exported, {origin}: {error}") from None


def _versions() -> dict[str, str]:
    import onnx
    import onnxruntime
    import timm

    modules = {"torch": torch, "timm": timm, "onnx": onnx, "onnxruntime": onnxruntime}
    return {"sdzoo": __version__} | {name: str(module.__version__) for name, module in modules.items()}
