"""What of this machine stays on it when a model leaves: paths, secrets, and the names of host and user.

Of what a recipe says, short words and numbers are published, of a path its last part, and nothing else: no list of what
is private is whole. (A secret that looks like short words, as ``abcd-efgh`` does, is not told from them.)
"""

from __future__ import annotations

import dataclasses
import getpass
import html
import re
import socket
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import timm

from sdzoo.errors import InputError
from sdzoo.hub.layout import CARD, CURVE, MODEL, ONNX
from sdzoo.training.recipe import Recipe

SHORTEST = 4  # a shorter name is likely to be a word too; as part of a path it is none
COMMON = {"localhost", "root", "user", "admin", "ubuntu", "runner", "train", "test", "data", "model", "image", "sdzoo"}
BINARY = (MODEL, ONNX, CURVE)  # chance alone writes a short path there
PRIVATE = "<private>"
_WORD = r"(?:[^\W_]{0,8}|[^\W\d_]*\d*[^\W\d_]*)(?:\.\d{1,6})?[^\W\d_]*"  # sgd, cifar10, 32x4d, mstd0.5
_PART = rf"(?:\{{\d+\.\.\d+\}}|\d+\.\.\d+|{_WORD})"  # or the numbers of shards
# Words and numbers, as train[:90%], rand-m9-mstd0.5, wds/ring, ring-{000..004}.tar|1200 and ring_v2.safetensors are.
_PLAIN = re.compile(
    r"(?!.{101})(?!.*[^\W_]{16})"  # a key is longer than a word
    r"(?![^.\[]*:)"  # before a colon: a host, a scheme; but after shards their number of images
    rf"(?:(?:torch|wds)/)?{_PART}(?:[-_+,]{_PART})*(?:\[\d*%?:\d*%?\])?"
    r"(?:\.(?:safetensors|pth|pt|th|bin|ckpt|tar|tgz|gz|zip|yaml|json))*(?:[|:]\d+)?"
)
_PATH = re.compile(r"(?:[A-Za-z]:)?[^\s:@?#&;=|<>\"'`]*[/\\]([^/\\]+)[/\\]*")
_LEFT = re.compile(
    r"\bpipe:|://[^\s/]*@|[?&;]\s*[\w-]*(?:token|key|secret|signature|password)=|"
    r"\b(?-i:(?:AKIA|ASIA)[A-Z0-9]{16}|(?:hf|gh[a-z])_[A-Za-z0-9]{30,}|github_pat_\w{22,}|glpat-[\w-]{20,}|sk-[\w-]{32,})",
    re.IGNORECASE,
)

# Our own keys, of JSON and outermost in a recipe; those within are the user's, as of opt_kwargs.
_KEY = re.compile(r'^(?:[ -]*"\w+"|\w+):', re.MULTILINE)


def public_recipe(recipe: Recipe) -> Recipe:
    """Return ``recipe`` with every text, keys of mappings too, as :func:`public_text`, and without its ``data_dir``."""
    return dataclasses.replace(_public(recipe), data_dir=None)


def private_texts(recipe: Recipe) -> frozenset[tuple[str, str]]:
    """Return every text that :func:`public_recipe` changes, with the recipe's key under which it stands."""
    return frozenset((text, key) for text, key in _texts(recipe) if public_text(text) != text)


def public_text(text: str) -> str:
    """Return ``text`` if it is words and numbers, of a path its last part if that is, and else ``<private>``."""
    if _is_plain(text):
        return text
    path = _PATH.fullmatch(text)
    return path[1] if path and _is_plain(path[1]) else PRIVATE


def _is_plain(text: str) -> bool:
    return bool(_PLAIN.fullmatch(text)) or timm.is_model_pretrained(text)


def _public(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(value, **{name: _public(item) for name, item in vars(value).items()})
    if isinstance(value, dict):
        return {_public(key): _public(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(_public, value))
    return value if value is None or isinstance(value, (int, float)) else public_text(str(value))


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    if dataclasses.is_dataclass(value):
        for name, item in vars(value).items():
            yield from _texts(item, f"{key}.{name}".lstrip("."))
    elif isinstance(value, (dict, list, tuple)):
        for item in (*value, *value.values()) if isinstance(value, dict) else value:
            yield from _texts(item, key)
    elif value is not None and not isinstance(value, (int, float)):
        yield str(value), key


def private_names_in(text: str, ours: Collection[str] = ()) -> list[str]:
    """Return those of the names of this host and this user that are words of ``text``, or of a path in it.

    A name that is a word of ``ours`` too, which stand there anyhow, tells nothing but in a path.
    """
    found = []
    for name in sorted(_names()):
        word = _word(name)
        if len(name) < SHORTEST or name in COMMON or name in ours:
            word = rf"(?<=[/\\]){word}|{word}(?=[/\\])"
        if re.search(word, text, re.IGNORECASE):
            found.append(name)
    return found


def check_private(
    folder: Path, private: Collection[str], typed: Collection[str] = (), ours: Collection[str] = ()
) -> None:
    """Check that nothing in ``folder`` names this host, this user, their home, one of ``private``, or a secret.

    Args:
        folder: What will be published.
        private: Where things lie on this machine, and what was cut: of that, the words are searched for too, and those
            alone that are not harmless by themselves.
        typed: What the publisher gave in so many words, which may be named like host or user.
        ours: Words of every card. (What a card says of a run stands in another file too, where they do not count.)

    Raises:
        InputError: naming the file and what it holds.
    """
    telling = {text for text in private if any(public_text(word) != word for word in text.split())}
    words = {word.strip("'\"") for text in telling for word in text.split()}
    said = {*telling, *(word for word in words if len(word) > SHORTEST and public_text(word) != word)}
    places = sorted(place for place in {*said, str(Path.home())} if re.search(r"\w", place))
    for file in sorted(folder.iterdir()):
        content = file.read_bytes()
        if file.name in BINARY:
            found = [place for place in places if len(place) > 7 and place.encode() in content]
        else:
            text = html.unescape(content.decode()) if file.name == CARD else content.decode()
            found = [place for place in places if re.search(rf"(?<![\w.-]){re.escape(place)}(?![\w-])", text)]
            found += sorted({left[0] for left in _LEFT.finditer(text)})
            for given in sorted(typed, key=len, reverse=True):
                text = re.sub(_word(given), " ", text)
            found += private_names_in(text, ours) if file.name == CARD else private_names_in(_KEY.sub(" ", text))
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
