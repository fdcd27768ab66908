"""The card of an exported folder: how to feed the model, what proved it, and the sha256 of everything beside it."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sdzoo.deploy.precision import MAX_DROP_POINTS
from sdzoo.description import check_description
from sdzoo.digest import BLANK, file_sha256, seal_holds, sealed
from sdzoo.errors import InputError
from sdzoo.files import atomic_path

CARD, README, LABELS = "card.json", "README.md", "labels.json"
FORMAT = "sdzoo-2"
NOT_RUN = "not run"
# With what a proof compared.
MODEL, FLOAT32_FILE = "the model that was trained", "the fp32 ONNX file of the model that was trained"
TARGETS = ("onnx", "tensorrt", "triton")
ENGINE_SUFFIX, UNVERIFIED_SUFFIX = ".engine", ".unverified.engine"
# What is read of the entries that are mappings.
ENTRIES = {
    "input": ("name", "dtype", "shape"),
    "output": ("name", "dtype", "shape"),
    "preprocessing": ("where", "input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode"),
    "versions": ("sdzoo",),
}
ACCURACY = ("images", "top1_percent_before", "top1_percent_after")
DIFFERENCE = ("images", "max_abs_diff", "allowed")
TEXT = """# {name}, {precision}, for {target}

Made by sdzoo {version}. `{file}` takes {takes}
and gives {gives}.
{normalises}
Compared with {reference}: {compared}.{served_by}

    {serve}

`card.json` says all this for programs, with the sha256 of each file; `labels.json` holds the names of the classes.
"""


@dataclass(frozen=True)
class Card:
    """What ``card.json`` holds.

    Attributes:
        model: Name of the architecture, with ``tag`` that of the bundled weights if it has those.
        target: ``onnx``, ``tensorrt`` or ``triton``.
        precision: ``fp32``, ``fp16`` or ``int8``.
        file: What computes, relative to the folder.
        files: The sha256 of each file, relative to the folder.
        input: Name, dtype, layout, shape and largest batch.
        output: Name, dtype and shape.
        preprocessing: Input size, mean, std, interpolation, crop, and where it is done.
        survival_probs: p of every block, which are folded into the weights.
        weights_sha256: Of the state dict that was exported.
        parity: The figures of the comparison, or ``not run``; of int8 also ``calibration``, the first 16 digits of the
            sha256 of each picture that calibrated it.
        provider: What computed them.
        versions: Of what took part.
        serve: The command that serves the folder.
        engine: What a TensorRT engine is tied to.
        backend: What computes at the target, where there is a choice.
        served_by: What computes where it is served, and that this was not compared; None if it is what was compared.
        seal: The sha256 of the card itself, with zeros in this place.
    """

    model: str
    tag: str | None
    target: str
    precision: str
    file: str
    input: dict[str, Any]
    output: dict[str, Any]
    preprocessing: dict[str, Any]
    survival_probs: list[float]
    weights_sha256: str
    parity: dict[str, Any] | str
    provider: str
    versions: dict[str, str]
    serve: str
    files: dict[str, str] = field(default_factory=dict)
    engine: dict[str, Any] | None = None
    backend: str | None = None
    served_by: str | None = None
    format: str = FORMAT
    seal: str = field(default=BLANK, compare=False)

    @property
    def compared(self) -> str:
        """Return the result of the comparison in a sentence."""
        if isinstance(self.parity, str):
            return self.parity
        p = self.parity
        if "top1_percent_after" in p:
            said = (
                f"top-1 {p['top1_percent_before']:.2f} % before, {p['top1_percent_after']:.2f} % after on "
                f"{p['images']} images"
            )
        else:
            allowed = f"{p['allowed']:.2g} allowed in the batch nearest its limit"
            said = f"|difference| {p['max_abs_diff']:.2g} of {allowed}, on {p['images']} images"
        return f"{said} ({p['inputs']}), {self.provider}"

    @property
    def rebuild(self) -> str:
        """Return the command that makes such a folder anew, from what only its user knows."""
        options = [f"--to {self.target}", f"--precision {self.precision}"]
        options += ["--preprocess in-graph"] * (self.preprocessing["where"] == "in-graph")
        options += ["--images DIR"] * (self.precision != "fp32") + ["--calibration DIR"] * (self.precision == "int8")
        options += [f"--backend {shlex.quote(self.backend)}"] if self.backend is not None else []
        return f"sdzoo export {self._source} {' '.join([*options, *self._max_drop])} -o DIR"

    def prove(self, folder: Path) -> str:
        """Return the command that compares the engine in ``folder`` with the model that was trained.

        In place of the model stands the float32 file beside the engine, which was compared with it; a file of lower
        precision has lost something itself.
        """
        reference = shlex.quote(str(folder / "model.onnx")) if self.precision == "fp32" else self._source
        command = ["sdzoo verify", reference, shlex.quote(str(folder / self.file)), "--images DIR", *self._max_drop]
        return " ".join(command)

    @property
    def _source(self) -> str:
        return f"{self.model}.{self.tag}" if self.tag else "CHECKPOINT"

    @property
    def _max_drop(self) -> list[str]:
        figures = self.engine.get("onnx_parity") if self.engine and not self.verified else self.parity
        points = figures.get("max_drop_points", MAX_DROP_POINTS) if isinstance(figures, dict) else MAX_DROP_POINTS
        return [f"--max-drop {points}"] * (points != MAX_DROP_POINTS)

    @property
    def verified(self) -> bool:
        """Return whether what is in the folder was compared with the model that was trained."""
        return self.parity != NOT_RUN

    def write(self, folder: Path) -> None:
        """Write the card into ``folder``: for programs as ``card.json``, for people as ``README.md``."""
        optional = ("engine", "backend", "served_by")
        entries = {name: value for name, value in asdict(self).items() if name not in optional or value is not None}
        card = sealed((json.dumps(entries | {"seal": BLANK}, indent=1) + "\n").encode())
        for name, content in ((README, self._readme().encode()), (CARD, card)):
            with atomic_path(folder / name) as temporary:
                temporary.write_bytes(content)

    @property
    def _reference(self) -> str:
        proof = self.parity.get("reference", MODEL) if isinstance(self.parity, dict) else MODEL
        return str(proof)

    def _readme(self) -> str:
        normalises = "The graph normalises; resizing and cropping stay with the client."
        if self.preprocessing["where"] == "client":
            mean, std = (", ".join(f"{value:.4g}" for value in self.preprocessing[name]) for name in ("mean", "std"))
            normalises = (
                f"The client resizes, crops and normalises: (pixel / 255 - mean) / std, mean {mean}, std {std}."
            )
        takes, gives = (f"`{e['name']}`, {e['dtype']} ({_shape(e)})" for e in (self.input, self.output))
        return TEXT.format(
            name=f"{self.model}.{self.tag}" if self.tag else self.model,
            precision=self.precision,
            target=self.target,
            version=self.versions["sdzoo"],
            file=self.file,
            takes=takes,
            gives=gives,
            normalises=normalises,
            reference=self._reference,
            compared=self.compared,
            served_by=f"\nServed by {self.served_by}." if self.served_by else "",
            serve=self.serve,
        )


def read_card(folder: str | Path) -> Card:
    """Return the card of an exported folder, whose files are what it says.

    Raises:
        InputError: if there is none, it is not sdzoo's, or it or a file is missing, damaged, or outside the folder.
    """
    folder = Path(folder)
    path = folder / CARD
    try:
        content = path.read_bytes()
        card = Card(**json.loads(content.decode()))
        if card.format == FORMAT and not seal_holds(content, str(card.seal)):
            raise InputError("its sha256 is not the seal in it")
    except FileNotFoundError:
        raise InputError(f"{folder} is no exported folder: it has no {CARD}") from None
    except (OSError, ValueError, TypeError, RecursionError) as error:  # InputError is a ValueError
        raise InputError(f"{path} is damaged or of another version of sdzoo: {error}") from None
    _check(card, path)
    for name, digest in card.files.items():
        file = folder / name
        try:
            if not file.is_file():
                raise InputError(f"{folder} is not whole: {name} is missing")
            if file_sha256(file) != digest:
                raise InputError(f"{file} is damaged: its sha256 is not the one in {CARD}")
        except OSError as error:
            raise InputError(f"{folder} is not whole: {name} cannot be read: {error.strerror}") from None
    return card


def read_labels(folder: Path, card: Card) -> list[str] | None:
    """Return the names of the classes of a folder whose card was read; None where they are only numbers.

    Raises:
        InputError: if they are missing, damaged, or not as many as the classes.
    """
    path = folder / LABELS
    if LABELS not in card.files:
        raise InputError(f"{folder} is not whole: {CARD} does not list {LABELS}")
    try:
        labels = json.loads(path.read_text(encoding="utf-8"))
        check_description({"labels": labels, "num_classes": card.output["shape"][-1]})
    except (OSError, ValueError, RecursionError) as error:  # InputError is a ValueError
        raise InputError(f"{path} is damaged: {error}") from None
    return names(labels)


def names(labels: list[str] | None) -> list[str] | None:
    """Return the names of classes, None where they are only numbers."""
    return None if not labels or labels == [str(index) for index in range(len(labels))] else labels


def _check(card: Card, path: Path) -> None:
    if card.format != FORMAT:
        raise InputError(f"{path} is of another version of sdzoo: its format is {str(card.format)[:80]!r}")
    texts = (card.model, card.target, card.precision, card.file, card.provider, card.serve, card.weights_sha256)
    texts += tuple(text for text in (card.tag, card.backend, card.served_by) if text is not None)
    if not all(isinstance(text, str) for text in texts) or not isinstance(card.files, dict):
        raise InputError(f"{path} is damaged: an entry is of another type")
    for name, needed in ENTRIES.items():
        entry = getattr(card, name)
        if not isinstance(entry, dict) or not all(key in entry for key in needed):
            raise InputError(f"{path} is damaged: {name} needs {', '.join(needed)}")
        if "shape" in needed and not (isinstance(entry["shape"], list) and entry["shape"]):
            raise InputError(f"{path} is damaged: the shape of its {name} is no list")
    if card.parity != NOT_RUN and not (_has_numbers(card.parity, ACCURACY) or _has_numbers(card.parity, DIFFERENCE)):
        raise InputError(f'{path} is damaged: its parity is neither "{NOT_RUN}" nor figures')
    if card.target not in TARGETS:
        raise InputError(f'{path} is damaged: target "{card.target[:80]}" is unknown; known: {", ".join(TARGETS)}')
    if isinstance(card.engine, dict) != card.file.endswith(ENGINE_SUFFIX):
        raise InputError(f"{path} is damaged: {card.file[:80]} and what it says of an engine do not fit")
    if card.engine is not None and card.verified == card.file.endswith(UNVERIFIED_SUFFIX):
        raise InputError(
            f"{path} is damaged: {card.file[:80]} and its parity do not fit: *{UNVERIFIED_SUFFIX} is {NOT_RUN}"
        )
    if card.file not in card.files:
        raise InputError(f"{path} names {card.file} but not its sha256")
    for name in card.files:
        if Path(name).is_absolute() or ".." in Path(name).parts or "\\" in name:
            raise InputError(f"{path} names {name}, which is outside the folder")
    said = {"arch": card.model, "survival_probs": card.survival_probs, "precision": card.precision}
    try:
        check_description(card.preprocessing | said | {"preprocess": card.preprocessing["where"]})
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _has_numbers(entry: Any, names: tuple[str, ...]) -> bool:
    return isinstance(entry, dict) and "inputs" in entry and all(type(entry.get(n)) in (int, float) for n in names)


def digests(folder: Path) -> dict[str, str]:
    """Return the sha256 of each file in ``folder`` but the card, which is written after it."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name not in (CARD, README))
    return {file.relative_to(folder).as_posix(): file_sha256(file) for file in files}


def _shape(entry: dict[str, Any]) -> str:
    return ", ".join(map(str, entry["shape"]))
