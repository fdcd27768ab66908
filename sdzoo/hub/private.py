"""What of this machine stays on it when a model leaves: paths, and the names of host and user."""

from __future__ import annotations

import dataclasses
import getpass
import re
import socket
from collections.abc import Iterable
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from sdzoo.errors import InputError
from sdzoo.hub.layout import RECIPE, RESOLVED_RECIPE, RESULTS
from sdzoo.training.recipe import Recipe

SHORTEST = 4  # a shorter name is likely to be a word too
COMMON = {"localhost", "root", "user", "admin", "ubuntu", "runner"}


def public_recipe(recipe: Recipe) -> Recipe:
    """Return ``recipe`` without where its data lie, and of other paths only the last part."""
    fields = {field.name: _without_paths(getattr(recipe, field.name)) for field in dataclasses.fields(recipe)}
    return dataclasses.replace(recipe, **fields | {"data_dir": None})


def _without_paths(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_paths(item) for item in value]
    if not isinstance(value, str):
        return value
    path = PureWindowsPath(value) if PureWindowsPath(value).drive else PurePosixPath(value)
    return path.name if path.is_absolute() or value.startswith("~") else value


def is_private_name(name: str) -> bool:
    """Return whether ``name`` is that of this host or this user."""
    return name in _names()


def check_private(folder: Path, paths: Iterable[Path]) -> None:
    """Check that nothing in ``folder`` that came from a run names this host, this user's home, or one of ``paths``.

    Raises:
        InputError: naming the file and what it holds.
    """
    places = {str(path.absolute()) for path in (*paths, Path.home())} - {"/"}
    names = [name for name in _names() if len(name) >= SHORTEST and name not in COMMON]
    for file in sorted(folder.iterdir()):
        content = file.read_bytes()
        found = [place for place in places if place.encode() in content]
        if file.name in (RECIPE, RESOLVED_RECIPE, RESULTS):
            text = content.decode()
            found += [name for name in names if re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", text)]
        if found:
            raise InputError(f"not published: {file.name} would hold {', '.join(found)}, which belongs to this machine")


def _names() -> set[str]:
    try:
        user = getpass.getuser()
    except (OSError, KeyError, ImportError):  # a user without a name, as in some containers
        user = ""
    host = socket.gethostname()
    return {host, host.partition(".")[0], user} - {""}
