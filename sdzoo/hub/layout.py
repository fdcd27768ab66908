"""What lies in a published folder, on the Hub or on a disk, and the sums that hold it together.

The folder is flat. Every file but the list itself stands in ``SHA256SUMS``, in the format of ``sha256sum``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from sdzoo.digest import file_sha256
from sdzoo.errors import InputError, shown_names

MODEL = "model.safetensors"
CONFIG = "config.json"
CARD = "README.md"
RESULTS = "eval_results.json"
RECIPE = "recipe.yaml"
RESOLVED_RECIPE = "recipe_resolved.yaml"
CURVE = "training_curve.png"
ONNX = "model.onnx"
LABELS = "labels.json"
PARITY = "parity.json"
SUMS = "SHA256SUMS"
OURS = {MODEL, CONFIG, CARD, RESULTS, RECIPE, RESOLVED_RECIPE, CURVE, ONNX, LABELS, PARITY, SUMS}
OF_THE_HUB = ".gitattributes"  # which it adds

MAX_FILES = 100
MAX_SUMS_BYTES = 32_768
_LINE = re.compile(r"(?P<sha256>[0-9a-f]{64})  (?P<name>[A-Za-z0-9_][A-Za-z0-9._-]{0,127})", re.ASCII)


class Damaged(InputError):
    """Files and sums do not agree; if they came over a network, they may when they come again."""


def write_sums(folder: str | Path) -> Path:
    """Write ``SHA256SUMS`` over all else in ``folder``, sorted by name, and return its path.

    Raises:
        InputError: if ``folder`` holds what cannot be published: a folder, a link, a name that is not plain.
    """
    sums = {file.name: file_sha256(file) for file in _files(Path(folder)) if file.name != SUMS}
    text = "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items()))
    read_sums(text)
    path = Path(folder, SUMS)
    path.write_bytes(text.encode())
    return path


def read_sums(text: str) -> dict[str, str]:
    """Return the sha256 of every file by name, as ``text``, the content of a ``SHA256SUMS``, says.

    Raises:
        Damaged: an InputError, if a line is not of the format, a name is not plain or stands twice, or there are too
            many.
    """
    if len(text) > MAX_SUMS_BYTES:
        raise Damaged(f"{SUMS} is longer than {MAX_SUMS_BYTES:,} bytes")
    lines = text.split("\n")
    if lines[-1]:
        raise Damaged(f"{SUMS} is cut off: its last line does not end")
    sums: dict[str, str] = {}
    for number, line in enumerate(lines[:-1], 1):
        found = _LINE.fullmatch(line)
        if not found or found["name"] == SUMS:
            raise Damaged(f"{SUMS}, line {number}: {line[:100]!r} is not a sha256, two spaces, a plain name")
        if found["name"] in sums:
            raise Damaged(f"{SUMS}, line {number}: {found['name']} stands there twice")
        sums[found["name"]] = found["sha256"]
    if not 0 < len(sums) <= MAX_FILES:
        raise Damaged(f"{SUMS} lists {len(sums)} files; 1 to {MAX_FILES}")
    return sums


def published_files(folder: Path) -> set[str]:
    """Return the names of what was published into ``folder``, which its like may replace.

    Raises:
        InputError: if it was not published, as a folder of downloads with their ``SHA256SUMS`` was not.
    """
    try:
        with open(plain_file(folder, SUMS), encoding="utf-8", errors="replace") as file:
            names = {*read_sums(file.read(MAX_SUMS_BYTES + 1)), SUMS}
    except InputError as error:
        raise InputError(f"{folder} holds other things than a published model ({error})") from None
    if not {MODEL, CONFIG} <= names <= OURS:
        raise InputError(f"{folder} holds other things than a published model (see its {SUMS})")
    return names


def compare(sums: dict[str, str], names: Iterable[str], differing: Iterable[str], source: str) -> None:
    """Check that ``names`` are those of ``sums`` and that none is ``differing``; ``source`` is what an error names.

    Raises:
        Damaged: an InputError, naming the files that are changed, missing or not listed.
    """
    names = set(names)
    kinds = {"changed": set(differing), "missing": sums.keys() - names, f"not in {SUMS}": names - sums.keys()}
    if faults := [f"{kind}: {shown_names(found)}" for kind, found in kinds.items() if found]:
        raise Damaged(f"{source} is not what its {SUMS} says: {'; '.join(faults)}")


def plain_file(folder: Path, name: str) -> Path:
    """Return the file ``name`` of a stranger's ``folder``.

    Raises:
        InputError: if it is missing, a link, which could lead anywhere, or no regular file.
    """
    path = folder / name
    if path.is_symlink():
        raise InputError(f"{path} is a symbolic link; a published folder holds files only")
    if not path.exists():
        raise InputError(f"{folder} holds no {name}")
    if not path.is_file():
        raise InputError(f"{path} is not a file")
    return path


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder")
    return [plain_file(folder, path.name) for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
