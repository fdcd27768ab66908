"""The table of the recipes that ship: ``python -m sdzoo.training.recipe_table`` writes ``recipes/README.md``."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

from sdzoo.files import atomic_path
from sdzoo.training.recipe import Recipe, SdzooSettings
from sdzoo.training.recipe_file import load_recipe, recipe_header, recipes_folder, shipped_recipes

COLUMNS = ("recipe", "model", "data", "p_L", "epochs", "expected", "measured", "upstream", "command")
INTRODUCTION = """\
# Recipes

How each model is trained, in the keys of timm's `train.py`; the header of each file says what it is, what was measured
and on what. `sdzoo recipe copy NAME .` copies one to be edited.

*upstream* says what timm's own `train.py --config RECIPE --data-dir DIR` makes of it, sdzoo being installed: it
**runs**, to the same meaning; it is **refused**, by the value that is named; or it is for **sdzoo only**: `train.py`
would take it and ignore the settings that are named.

Made by `python -m sdzoo.training.recipe_table`; do not edit.
"""
# What timm's train.py refuses of what a recipe may hold.
REFUSED_UPSTREAM = {"train_crop_mode": "pad4", "dataset": "torch/svhn"}


def upstream(recipe: Recipe) -> str:
    """Return what timm's ``train.py`` makes of ``recipe``: "runs", "refused: ..." or "sdzoo only: ..."."""
    if refused := [value for key, value in REFUSED_UPSTREAM.items() if getattr(recipe, key) == value]:
        return f"refused: {', '.join(refused)}"
    names = [field.name for field in dataclasses.fields(SdzooSettings)]
    own = [name for name in names if getattr(recipe.sdzoo, name) != getattr(SdzooSettings(), name)]
    return f"sdzoo only: {', '.join(own)}" if own else "runs"


def recipe_table() -> str:
    """Return ``recipes/README.md`` as the recipes that ship say it is."""
    lines = [COLUMNS, ("---",) * len(COLUMNS)]
    for name, path in shipped_recipes().items():
        recipe, header = load_recipe(path), recipe_header(path)
        lines.append(
            (
                f"[{name}]({path.name})",
                recipe.model,
                recipe.dataset or "folder",
                "of the weights" if recipe.drop_path is None else f"{1 - recipe.drop_path:g}",
                str(recipe.epochs),
                header.expected,
                header.measured,
                upstream(recipe),
                f"`{header.command}`",
            )
        )
    return INTRODUCTION + "\n" + "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def main(arguments: list[str] | None = None) -> int:
    """Write the table, or with ``--check`` compare it; return 1 if it is stale."""
    parser = argparse.ArgumentParser(prog="python -m sdzoo.training.recipe_table", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if recipes/README.md is stale")
    check: bool = parser.parse_args(arguments).check
    path: Path = recipes_folder() / "README.md"
    table = recipe_table()
    if check:
        fresh = path.is_file() and path.read_text(encoding="utf-8") == table
        if not fresh:
            print(f"{path} is stale; python -m sdzoo.training.recipe_table", file=sys.stderr)
        return 0 if fresh else 1
    with atomic_path(path) as temporary:
        temporary.write_text(table, encoding="utf-8")
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
