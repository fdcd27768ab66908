"""The checkpoints that ship with sdzoo, each a safetensors file with its card beside it.

The card is Markdown for people; its front matter holds the figures and the sha256 for programs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from sdzoo.digest import file_sha256
from sdzoo.errors import InputError

FOLDER = Path(__file__).parent


def path(name: str) -> Path:
    """Return where the weights ``name`` (``model.tag``) lie."""
    return FOLDER / f"{name}.safetensors"


def card(name: str) -> dict[str, Any]:
    """Return the front matter of the card of the weights ``name``: sha256, data, metrics."""
    text = (FOLDER / f"{name}.md").read_text(encoding="utf-8")
    return yaml.safe_load(text.split("---\n")[1])


def tag_of(state_sha256: str) -> str | None:
    """Return the tag of the bundled weights whose state dict has this digest, None if they are not bundled."""
    for file in sorted(FOLDER.glob("*.safetensors")):
        name = file.name.removesuffix(".safetensors")
        if card(name)["state_sha256"] == state_sha256:
            return name.partition(".")[2]
    return None


def ship_at(file: str | Path | None) -> bool:
    """Return whether ``file`` is one of the checkpoints that ship."""
    return file is not None and Path(file).parent == FOLDER


def check(file: str | Path | None) -> None:
    """Compare a bundled file with the sha256 of its card, before anything reads it; leave other files alone.

    Raises:
        InputError: if the file is damaged.
    """
    if not file or not ship_at(file):
        return
    name = Path(file).name.removesuffix(".safetensors")
    expected, got = card(name)["sha256"], file_sha256(file)
    if got != expected:
        raise InputError(f"{file} is damaged: sha256 {got}, its card says {expected}; install sdzoo again")
