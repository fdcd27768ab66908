"""Recipes as files: read, written, found, copied, and what their headers say."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from sdzoo.errors import InputError, nearest
from sdzoo.files import atomic_path
from sdzoo.training.recipe import Recipe, recipe_from
from sdzoo.training.recipe_yaml import load_yaml


def load_recipe(path: str | Path) -> Recipe:
    """Return the recipe in a YAML file.

    Raises:
        InputError: if it cannot be read, or with every fault at once, as :func:`sdzoo.training.recipe.recipe_from`.
    """
    text = _read(path)
    try:
        values = load_yaml(text)
    except InputError as error:
        raise InputError(f"{path} is {error}") from None
    if not isinstance(values, dict) or not values:
        got = "empty" if values is None or values == {} else f"a {type(values).__name__}"
        raise InputError(f"{path} is {got}; a recipe is a mapping of keys to values")
    try:
        return recipe_from(values)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def recipes_folder() -> Path:
    """Return the folder of the recipes that ship: in the wheel ``sdzoo/recipes``, in a checkout ``recipes``."""
    package = Path(__file__).parents[1]
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def shipped_recipes() -> dict[str, Path]:
    """Return the recipes that ship, name to file, sorted by name."""
    return {file.stem: file for file in sorted(recipes_folder().glob("*.yaml"))}


def find_recipe(name: str | Path) -> Path:
    """Return the file of a recipe: a path, or the name of one that ships with sdzoo.

    Raises:
        InputError: with the nearest name and all that ship, if there is neither such a file nor such a name.
    """
    path = Path(name)
    if path.is_file():
        return path
    shipped = shipped_recipes()
    if str(name) in shipped:
        return shipped[str(name)]
    close = nearest(str(name), shipped)
    raise InputError(f'"{name}" is neither a file nor a recipe that ships{close}; those are: {", ".join(shipped)}')


def copy_recipe(name: str | Path, folder: str | Path) -> Path:
    """Copy a recipe, as :func:`find_recipe` finds it, into ``folder`` to be edited, and return the copy.

    Raises:
        InputError: if there is no such recipe or folder, or the folder already holds a file of that name.
    """
    source = find_recipe(name)
    target = Path(folder) / source.name
    if target.exists() or target.is_symlink():
        raise InputError(f"{target} already exists; it is left as it is")
    text = _read(source)
    with atomic_path(target) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return target


@dataclass(frozen=True)
class RecipeHeader:
    """What the comment at the head of a recipe says."""

    what: str
    paper: str
    command: str
    hardware: str
    expected: str
    measured: str


def recipe_header(path: str | Path) -> RecipeHeader:
    """Return the header of the recipe at ``path``.

    Raises:
        InputError: naming the fields that it lacks, or if the file cannot be read.
    """
    names = [f.name for f in dataclasses.fields(RecipeHeader)]
    found, current = {"what": ""}, "what"
    for line in _read(path).splitlines():
        if not line.startswith("#"):
            break
        label, colon, rest = line.removeprefix("#").strip().partition(":")
        if colon and label.lower() in names[1:]:
            current, found[label.lower()] = label.lower(), rest.strip()
        else:
            found[current] = f"{found[current]} {line.removeprefix('#').strip()}".strip()
    if missing := [name for name in names if not found.get(name)]:
        raise InputError(f"the header of {path} lacks: {', '.join(missing)}")
    return RecipeHeader(**found)


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not YAML: {error}") from None
