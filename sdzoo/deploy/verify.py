"""Whether any two of what sdzoo makes compute the same function, on real pictures."""

from __future__ import annotations

import copy
import shlex
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from sdzoo.deploy.card import CARD, FLOAT32_FILE, MODEL, Card, digests, read_card
from sdzoo.deploy.precision import MAX_DROP_POINTS, PRECISIONS, judge
from sdzoo.deploy.predictor import Predictor, model_predictor
from sdzoo.deploy.runtime import load_predictor
from sdzoo.deploy.verification import Images, check_unseen, default_images, images_of
from sdzoo.digest import state_sha256
from sdzoo.errors import InputError
from sdzoo.files import atomic_path
from sdzoo.parity import Accuracy, Parity

Operand: TypeAlias = nn.Module | Predictor | str | Path


def verify(
    a: Operand, b: Operand, images: str | Path | None = None, max_drop: float = MAX_DROP_POINTS
) -> Parity | Accuracy:
    """Return what shows that ``b`` computes what ``a`` does, by the rule of the lower precision of the two.

    An unverified TensorRT engine ``b`` that passes is given its name, and its card the result: from then on it is
    loaded. It stays unverified, with a warning, unless ``a`` proves it: the model that was trained, or its fp32 ONNX
    file or folder. A file of lower precision has lost something itself, to which the engine's loss would be added.

    Args:
        a: The reference: a model (folded or not), a predictor, or an exported file or folder.
        b: What shall be as it.
        images: A folder of real pictures; for fp16 at least 1000, for int8 in class folders. Default: those that ship
            with sdzoo, which are enough for float32 alone. None of them may have calibrated what is int8.
        max_drop: Top-1 that int8 may lose, in points.

    Raises:
        InputError: if one cannot be opened, both take other images or classes, or the pictures do not suffice.
        ParityError: with the image, the output and the figures.
    """
    reference, candidate = _opened(a), _opened(b)
    config = reference.config if "mean" in reference.config else candidate.config
    if "mean" not in config:
        raise InputError(f"neither {reference.name} nor {candidate.name} says how pictures are normalised")
    _check_alike(reference, candidate)
    chosen = default_images(config) if images is None else images_of(images, config)
    precision = max(reference.precision, candidate.precision, key=PRECISIONS.index)
    if chosen.classes and reference.has_classes:
        outputs = reference.pixels(chosen.read([0]).numpy(), config).shape[1]
        chosen.check_classes(reference.labels or candidate.labels, outputs)
    for operand, opened in ((a, reference), (b, candidate)):
        what = operand if isinstance(operand, (str, Path)) else opened.name
        if opened.precision == "int8" and opened.calibrated_on is None:
            raise InputError(f"{what} does not say what calibrated it, so that it cannot be judged: export it anew")
        check_unseen(chosen, opened.calibrated_on or (), what)
    proof = judge(_compute(reference, config), _compute(candidate, config), chosen, precision, max_drop)
    if (found := _engine_folder(b)) is not None and not found[1].verified:
        if reason := _why_no_proof(a, reference, candidate):
            warnings.warn(f"{b} stays unverified: {reference.name} {reason}", stacklevel=2)
        else:
            of = MODEL if isinstance(a, nn.Module) else FLOAT32_FILE
            _promote(found[0], proof, chosen, candidate.provider, of)
    return proof


def verify_engine(model: nn.Module, folder: Path, images: Images, max_drop: float) -> Card:
    """Compare the unverified engine in ``folder`` with ``model``, give it its name, and return the new card.

    Raises:
        InputError, ParityError: as :func:`verify`.
    """
    reference, candidate = model_predictor(copy.deepcopy(model).cpu()), load_predictor(folder, unverified=True)
    config = reference.config
    proof = judge(_compute(reference, config), _compute(candidate, config), images, candidate.precision, max_drop)
    return _promote(folder, proof, images, candidate.provider, MODEL)


def _opened(operand: Operand) -> Predictor:
    if isinstance(operand, Predictor):
        return operand
    if isinstance(operand, nn.Module):
        return model_predictor(operand)
    return load_predictor(operand, unverified=True)


def _check_alike(reference: Predictor, candidate: Predictor) -> None:
    for what in ("input_size", "mean", "std"):
        ours, theirs = reference.config.get(what), candidate.config.get(what)
        if ours is None or theirs is None:
            continue
        if any(None not in pair and pair[0] != pair[1] for pair in zip(ours, theirs, strict=False)):
            raise InputError(f"{what} of {reference.name} is {ours}, of {candidate.name} {theirs}")
    if reference.labels and candidate.labels and reference.labels != candidate.labels:
        raise InputError(f"{reference.name} and {candidate.name} name their classes differently")


def _compute(predictor: Predictor, config: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    """Return what computes logits of uint8 ``(B, C, H, W)``; a file that says nothing is fed as the other one."""
    return lambda images: torch.from_numpy(predictor.pixels(images.numpy(), config))


def _engine_folder(operand: Operand) -> tuple[Path, Card] | None:
    """Return the exported folder whose engine ``operand`` names, and its card, if it names one."""
    if not isinstance(operand, (str, Path)):
        return None
    folder = Path(operand) if Path(operand).is_dir() else Path(operand).parent
    if not (folder / CARD).is_file():
        return None
    card = read_card(folder)
    names_it = Path(operand).is_dir() or Path(operand).name == card.file
    return (folder, card) if names_it and card.engine else None


def _why_no_proof(a: Operand, reference: Predictor, engine: Predictor) -> str | None:
    """Return why agreeing with ``a`` does not show that ``engine`` computes the model it was built from."""
    if _engine_folder(a) is not None:
        return "is an engine itself"
    weights = state_sha256(a.state_dict()) if isinstance(a, nn.Module) else reference.weights_sha256
    weights = None if isinstance(a, Predictor) else weights  # it does not say what computes
    if weights != engine.weights_sha256:
        return "is not the model that it was built from, or does not say so"
    if reference.precision != "fp32":
        return f"is {reference.precision}, which has lost something itself: the model or its fp32 file proves an engine"
    return None


def _promote(folder: Path, proof: Parity | Accuracy, images: Images, provider: str, reference: str) -> Card:
    """Give a verified engine its name; at any moment the folder holds the file that its card names."""
    from sdzoo.deploy.tensorrt_engine import ENGINE

    card = read_card(folder)
    unverified, verified = folder / card.file, folder / ENGINE
    with atomic_path(verified) as temporary:
        temporary.write_bytes(unverified.read_bytes())
    files = {name: digest for name, digest in digests(folder).items() if name in {*card.files, ENGINE} - {card.file}}
    card = replace(
        card,
        file=ENGINE,
        files=files,
        parity=proof.as_dict() | {"reference": reference, "inputs": images.origin, "runtime": provider},
        provider=provider,
        serve=f"sdzoo predict IMAGE --model {shlex.quote(str(folder))}",
    )
    card.write(folder)
    unverified.unlink()
    return card
