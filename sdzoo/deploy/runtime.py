"""From an exported file or folder to its predictor: checked for damage, on the provider that was asked for."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdzoo.deploy.card import CARD, ENGINE_SUFFIX, FORMAT, LABELS, Card, names, read_card, read_labels
from sdzoo.deploy.predictor import Predictor
from sdzoo.deploy.session import check_threads, open_session
from sdzoo.description import check_description
from sdzoo.digest import seal_holds
from sdzoo.errors import InputError
from sdzoo.extras import require

METADATA = (
    *("model", "input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode", "labels", "survival_probs"),
    *("precision", "preprocess", "weights_sha256", "file_sha256", "format", "parity", "tag"),
)


def load_predictor(
    path: str | Path,
    provider: str = "auto",
    threads: int | None = None,
    convert: bool = False,
    unverified: bool = False,
) -> Predictor:
    """Return a predictor for what sdzoo exported: a folder of any target, an ONNX file, or a TensorRT engine.

    Args:
        path: The folder or the file. An ONNX file that is not sdzoo's computes arrays; a warning says what is unknown.
        provider: For ONNX files ``cpu``, ``cuda``, ``tensorrt`` or ONNX Runtime's own name: that one or an error.
            ``auto``: CUDA if it really runs, else the CPU, with a warning if CUDA was installed but could not be had.
        threads: Threads within one operator; default: ONNX Runtime's choice.
        convert: Convert pictures of another colour mode instead of refusing them.
        unverified: Load an engine that was never compared with its model, in order to compare it.

    Raises:
        InputError: if there is nothing, or what is there is damaged, unverified, for another machine, or of an unknown
            kind; or the provider cannot be had.
        ImportError: without the extra that the target needs.
    """
    path = Path(path)
    if threads is not None:
        check_threads(threads)
    card = labels = None
    if path.is_dir():
        card = read_card(path)
        labels = read_labels(path, card)
        path = path / card.file
    elif not path.is_file():
        raise InputError(f"{path} does not exist")
    if path.suffix != ENGINE_SUFFIX:
        return _onnx(path, card, labels, provider, threads, convert)
    if card is None:
        if not (path.parent / CARD).is_file():
            raise InputError(f"{path} has no {CARD} beside it, which says how to feed it and what it was built for")
        card = read_card(path.parent)
        if card.file != path.name:
            raise InputError(f"{path} is not what {path.parent / CARD} is about: that is {card.file}")
    return _engine(path, card, provider, threads, convert, unverified)


def _engine(path: Path, card: Card, provider: str, threads: int | None, convert: bool, unverified: bool) -> Predictor:
    from sdzoo.deploy.tensorrt_builder import find_gpu
    from sdzoo.deploy.tensorrt_engine import load_engine

    if provider not in ("auto", "tensorrt"):
        raise InputError(f"provider is {provider}; {path} is a TensorRT engine")
    if threads is not None:
        raise InputError(f"threads are for the CPU; {path} is a TensorRT engine")
    assert card.engine is not None
    run = load_engine(path, card.engine, card.rebuild, None if unverified else card.prove(path.parent))
    where = card.preprocessing["where"]
    config = {name: _tuple(value) for name, value in card.preprocessing.items() if name != "where"}
    return Predictor(
        run,
        card.model,
        f"{card.engine['flavour']} {card.engine['version']}, {find_gpu()}",
        read_labels(path.parent, card),
        config,
        has_classes=card.output["name"] == "logits",
        convert=convert,
        precision=card.precision,
        in_graph=where == "in-graph",
        weights_sha256=card.weights_sha256,
        calibrated_on=_calibration(card.engine.get("onnx_parity")),
    )


def _calibration(parity: Any) -> frozenset[str] | None:
    """Return which pictures calibrated a file, as its figures of parity name them."""
    named = parity.get("calibration") if isinstance(parity, dict) else None
    return frozenset(map(str, named)) if isinstance(named, list) else None


def _onnx(
    path: Path, card: Card | None, labels: list[str] | None, provider: str, threads: int | None, convert: bool
) -> Predictor:
    require("onnxruntime")
    session = open_session(path, provider, threads)
    about = session.get_modelmeta()
    is_ours = about.producer_name == "sdzoo" or about.custom_metadata_map.get("format", "").startswith('"sdzoo')
    if not is_ours:
        return _foreign(session, path)
    metadata = _metadata(session, path)
    if card is not None:
        _check_alike(card, metadata, path)
        if labels != names(metadata["labels"]):
            raise InputError(f"{path}: its labels are not those in {LABELS}")
    inputs, outputs = session.get_inputs(), session.get_outputs()
    size, in_graph = metadata["input_size"], metadata["preprocess"] == "in-graph"
    shape = [*size[1:], size[0]] if in_graph else size
    fed = [(i.type, isinstance(i.shape[0], str), i.shape[1:]) for i in inputs if i.shape]
    kind = "uint8" if in_graph else "float"
    if fed != [(f"tensor({kind})", True, shape)]:
        got = ", ".join(f"{i.type} {i.shape}" for i in inputs) or "nothing"
        raise InputError(f"{path} takes {got}; its metadata say {kind} (batch, {shape})")
    output = outputs[0].name
    if card is not None:
        dtype, layout = ("uint8", "NHWC") if in_graph else ("float32", "NCHW")
        takes = {"name": inputs[0].name, "dtype": dtype, "layout": layout, "shape": inputs[0].shape}
        gives = {"name": output, "dtype": "float32", "shape": outputs[0].shape}
        if {name: card.input.get(name) for name in takes} != takes or card.output != gives:
            raise InputError(f"{path} makes {gives} of {takes}; its {CARD} says otherwise")

    def run(batch: NDArray[Any]) -> NDArray[np.float32]:
        return session.run([output], {inputs[0].name: batch})[0]

    config = {name: _tuple(value) for name, value in metadata.items()}
    computes = session.get_providers()[0]
    return Predictor(
        run,
        metadata["model"],
        computes,
        metadata["labels"],
        config,
        has_classes=output == "logits",
        convert=convert,
        precision=metadata["precision"],
        in_graph=in_graph,
        weights_sha256=str(metadata["weights_sha256"]),
        calibrated_on=_calibration(metadata["parity"]),
    )


def _check_alike(card: Card, metadata: dict[str, Any], path: Path) -> None:
    """Check that the card beside a file, by which others feed it, says what the file itself says."""
    same = ("model", "tag", "precision", "weights_sha256", "survival_probs", "parity")
    said = (
        card.preprocessing | {"preprocess": card.preprocessing["where"]} | {name: getattr(card, name) for name in same}
    )
    for name, value in said.items():
        if name in metadata and metadata[name] != value:
            raise InputError(f"{path}: its {name} is {str(metadata[name])[:80]}, its {CARD} says {str(value)[:80]}")


def _foreign(session: Any, path: Path) -> Predictor:
    """Return a predictor for a file without sdzoo's metadata, of which only its shapes are known."""
    inputs, (output, *_) = session.get_inputs(), session.get_outputs()
    if len(inputs) != 1 or inputs[0].type != "tensor(float)" or len(inputs[0].shape) != 4:
        got = ", ".join(f"{i.type} {i.shape}" for i in inputs) or "nothing"
        raise InputError(f"{path} takes {got}; a classifier of images takes one float (batch, channels, height, width)")
    if output.type != "tensor(float)":
        raise InputError(f"{path} gives {output.type}; a classifier of images gives tensor(float)")
    size = tuple(size if isinstance(size, int) else None for size in inputs[0].shape[1:])
    warnings.warn(
        f"{path} has no metadata of sdzoo's: its labels, how pictures are resized and normalised, its survival "
        "probabilities and what it was compared with are unknown; it computes arrays",
        stacklevel=4,
    )

    def run(batch: NDArray[Any]) -> NDArray[np.float32]:
        try:
            return session.run([output.name], {inputs[0].name: batch})[0]
        except Exception as error:  # a fixed size of batch, or whatever else a stranger's file may hold
            reason = " ".join(str(error).split())
            raise InputError(f"{path} cannot compute an array of {batch.shape}: {reason}") from None

    provider, has_classes = session.get_providers()[0], len(output.shape) == 2
    return Predictor(run, path.name, provider, None, {"input_size": size}, has_classes=has_classes)


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _metadata(session: Any, path: str | Path) -> dict[str, Any]:
    try:
        stored = session.get_modelmeta().custom_metadata_map
        if missing := [name for name in METADATA if name not in stored]:
            raise InputError(f"is damaged, or of another version of sdzoo: its metadata lack {', '.join(missing)}")
        metadata = {name: json.loads(stored[name]) for name in METADATA}
        if metadata["format"] != FORMAT:
            raise InputError(f"is of another version of sdzoo: its format is {str(metadata['format'])[:80]!r}")
        shape = session.get_outputs()[0].shape
        check_description(metadata | {"arch": metadata["model"], "num_classes": shape[1] if len(shape) == 2 else 0})
        if not seal_holds(Path(path).read_bytes(), str(metadata["file_sha256"])):
            raise InputError("is damaged: its sha256 is not the one in its metadata")
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except (ValueError, RecursionError):  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise InputError(f"{path} is damaged: its metadata cannot be read") from None
    return metadata
