"""What of this machine stays on it when a model leaves: paths, and the names of host and user."""

from __future__ import annotations

import dataclasses
import getpass
import re
import socket
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from sdzoo.errors import InputError
from sdzoo.hub.layout import CURVE, MODEL, ONNX
from sdzoo.training.recipe import Recipe

SHORTEST = 4  # a shorter name is likely to be a word too; as part of a path it is none
COMMON = {"localhost", "root", "user", "admin", "ubuntu", "runner", "train", "test", "data", "model", "image", "sdzoo"}
BINARY = (MODEL, ONNX, CURVE)  # chance alone writes a short path there
PRIVATE = "<private>"
# A slash that nothing stands before, as in /x, ~/x and C:\x; or a step upwards.
_LEADS_OUT = re.compile(r"(?<![\w.*)}\]-])[/\\~]|(?:^|[/\\])\.\.(?:[/\\]|$)")
# A command, an address, a host, what follows it: any part may be a secret. A letter and a colon are a drive.
_ADDRESS = re.compile(r"^\s*[\w+.@-]{2,}:|pipe:|://|@[\w.-]+[:/]|\w@\w|[?&;#]\s*[\w-]+=")
_ON_THE_HUB = re.compile(r"(?:hf-)?hub:[\w.-]+/[\w.-]+(?:@[\w.-]+)?")
_LEFT = re.compile(r"\bpipe:|://[^\s/]*@|[?&;]\s*[\w-]*(?:token|key|secret|signature|password)=", re.IGNORECASE)


def public_recipe(recipe: Recipe) -> Recipe:
    """Return ``recipe`` without where its data lie, of paths that lead out the last part, of addresses nothing."""
    fields = {field.name: _without_paths(getattr(recipe, field.name)) for field in dataclasses.fields(recipe)}
    return dataclasses.replace(recipe, **fields | {"data_dir": None})


def private_paths(recipe: Recipe) -> frozenset[str]:
    """Return the values that :func:`public_recipe` cuts, and the words of those that it leaves out."""
    cut = [text for text in _texts(dataclasses.asdict(recipe)) if without_path(text) != text]
    words = (word.strip("'\"") for text in cut if _is_address(text) for word in text.split())
    return frozenset(cut) | {word for word in words if len(word) > SHORTEST and re.search(r"[/\\@:=]", word)}


def without_path(text: str) -> str:
    """Return ``text``, its last part if it is a path that leads out, ``<private>`` if it is an address or a command."""
    if _is_address(text):
        return PRIVATE
    if not _LEADS_OUT.search(text):
        return text
    path = re.split(r"[?#]", text)[0].rstrip("/\\")
    last = re.split(r"[/\\]", path)[-1] if re.search(r"[/\\]", path) else ""
    return last if last.strip(".~ ") else "unnamed"


def _is_address(text: str) -> bool:
    return bool(_ADDRESS.search(text)) and not _ON_THE_HUB.fullmatch(text)


def _without_paths(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(value, **{name: _without_paths(item) for name, item in vars(value).items()})
    if isinstance(value, dict):
        return {key: _without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_paths(item) for item in value]
    return without_path(value) if isinstance(value, str) else value


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)


def private_names_in(text: str) -> list[str]:
    """Return those of the names of this host and this user that are words of ``text``, or of a path in it."""
    found = []
    for name in sorted(_names()):
        word = _word(name)
        if len(name) < SHORTEST or name in COMMON:
            word = rf"(?<=[/\\]){word}|{word}(?=[/\\])"
        if re.search(word, text, re.IGNORECASE):
            found.append(name)
    return found


def check_private(folder: Path, paths: Iterable[str], typed: Collection[str] = ()) -> None:
    """Check that nothing in ``folder`` names this host, this user, their home, one of ``paths``, or a secret.

    Args:
        folder: What will be published.
        paths: Where things lie on this machine.
        typed: What the publisher gave in so many words, which may be named like host or user.

    Raises:
        InputError: naming the file and what it holds.
    """
    places = sorted({*paths, str(Path.home())} - {"/", "..", "~"})
    for file in sorted(folder.iterdir()):
        content = file.read_bytes()
        if file.name in BINARY:
            found = [place for place in places if len(place) > 7 and place.encode() in content]
        else:
            text = content.decode()
            found = [place for place in places if re.search(rf"(?<![\w.-]){re.escape(place)}(?![\w-])", text)]
            found += sorted({left[0] for left in _LEFT.finditer(text)})
            for words in sorted(typed, key=len, reverse=True):
                text = re.sub(_word(words), " ", text)
            found += private_names_in(text)
        if found:
            raise InputError(f"not published: {file.name} would hold {', '.join(found)}, which belongs to this machine")


def _word(text: str) -> str:
    return rf"(?<![^\W_]){re.escape(text)}(?![^\W_])"


def _names() -> set[str]:
    try:
        user = getpass.getuser()
    except (OSError, KeyError, ImportError):  # a user without a name, as in some containers
        user = ""
    host = socket.gethostname()
    return {name.casefold() for name in (host, host.partition(".")[0], user)} - {""}
