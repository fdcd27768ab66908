"""What a finished run measured: read from its own files, and believed only while they are the ones it ended with."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sdzoo.digest import file_sha256, seal_holds
from sdzoo.errors import InputError
from sdzoo.hub.private import private_texts, public_recipe, public_text
from sdzoo.training.recipe import Recipe, SdzooSettings
from sdzoo.training.recipe_yaml import load_yaml
from sdzoo.training.run_folder import RunFolder

WANTED = {
    "data": str,
    "seal": str,
    **dict.fromkeys(("corrupt_training_images", "environment", "forced"), list),
    **dict.fromkeys(("images", "seconds", "sha256"), dict),
}
RAN = ("sdzoo", "torch", "timm", "machine", "device", "threads", "world")
ANEW = "remove it and run sdzoo train --resume: nothing is trained again, test is measured again"
ROUNDING = 5.1e-4  # of the log
FORCED = re.compile(r"^from epoch (\d+) on: ")  # and then which keys: paths may be among their values


@dataclass(frozen=True)
class Top1:
    """Top-1 in percent, on how many images of which split."""

    split: str
    percent: float
    images: int


@dataclass(frozen=True)
class Figures:
    """Top-1 of the weights that did best on val, at which epoch; on test if the recipe names one."""

    best_epoch: int
    val: Top1
    test: Top1 | None


@dataclass(frozen=True)
class Measured:
    """A finished run.

    Attributes:
        folder: Where it lies.
        recipe: All keys with their values, as others may see them.
        cut: Every text that was cut from it, with the key under which it stood.
        data: The data set's name in recipes, or that of its folder.
        training_images: How many it trained on.
        corrupt_images: How many of them could not be read.
        figures: None if they are not to be used.
        training_s: Seconds of training and validation.
        environment: Versions, machine, device, threads, processes of all sessions that trained, in order.
        forced: In which epochs it was resumed by force: then its recipe is only the last of those that made it.
    """

    folder: RunFolder = field(compare=False)
    recipe: Recipe
    cut: frozenset[tuple[str, str]]
    data: str
    training_images: int
    corrupt_images: int
    figures: Figures | None
    training_s: float
    environment: list[dict[str, Any]]
    forced: tuple[int, ...]


def read_measured(folder: str | Path, no_metrics: bool = False) -> Measured:
    """Return what the run in ``folder`` measured; with ``no_metrics`` without its figures, whether it has any or not.

    Raises:
        InputError: if it is no run, not finished, still in use, its files are not those that it ended with, or its
            figures are missing.
    """
    run = RunFolder(Path(folder))
    if not run.recipe.is_file():
        raise InputError(f"{folder} is not the folder of a run: it has no {run.recipe.name}")
    run.refuse_if_in_use()
    given = _recipe(run.recipe)
    recipe = public_recipe(given)
    if not run.result.is_file():
        raise InputError(
            f"{folder} is not finished, {run.epochs_logged()} of {recipe.epochs} epochs: sdzoo train --resume goes on"
        )
    result = _read(run.result)
    _check_unchanged(run, result)
    figures = None if no_metrics else _figures(run, recipe, result)
    return Measured(
        folder=run,
        recipe=recipe,
        cut=private_texts(given),
        data=public_text(result["data"]),
        training_images=result["images"]["train"],
        corrupt_images=len(result["corrupt_training_images"]),
        figures=figures,
        training_s=sum(result["seconds"].values()),
        environment=result["environment"],
        forced=tuple(int(epoch) for said in result["forced"] for epoch in FORCED.findall(said)),
    )


def _recipe(file: Path) -> Recipe:
    """Return the recipe that a run wrote: what it names, as a checkpoint to begin with, may be gone by now."""
    try:
        values = load_yaml(file.read_text(encoding="utf-8"))
        return Recipe(**values | {"sdzoo": SdzooSettings(**values["sdzoo"])})
    except (OSError, ValueError, TypeError, KeyError) as error:  # InputError is a ValueError
        raise InputError(f"{file} is damaged, or of another version of sdzoo: {error}") from None


def _read(file: Path) -> dict[str, Any]:
    try:
        content = file.read_bytes()
        result = json.loads(content.decode())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file} is damaged: {error}; {ANEW}") from None
    result = result if isinstance(result, dict) else {}
    if lacking := [name for name, kind in WANTED.items() if not isinstance(result.get(name), kind)]:
        raise InputError(f"{file} lacks {', '.join(lacking)}: it is damaged, or of an older sdzoo; {ANEW}")
    images, seconds, ran = result["images"], list(result["seconds"].values()), result["environment"]
    numbers = type(images.get("train")) is int and all(type(value) in (int, float) for value in seconds)
    if not numbers or not ran or not all(_told(one.get(name)) for one in ran for name in RAN):
        raise InputError(f"{file} is damaged: its images, seconds or environment; {ANEW}")
    if not all(isinstance(said, str) and FORCED.match(said) for said in result["forced"]):
        raise InputError(f"{file} is damaged: when it was forced; {ANEW}")
    if not seal_holds(content, result["seal"]):
        raise InputError(f"{file} was changed after its run had written it; {ANEW}")
    return result


def _told(value: Any) -> bool:
    """Return whether ``value`` is one of all processes, or a list of each one's."""
    return all(type(one) in (int, str) for one in (value if value and isinstance(value, list) else [value]))


def _check_unchanged(run: RunFolder, result: dict[str, Any]) -> None:
    """Check that the run's files are those of its result; ``last.pth``, which only goes on, may be gone."""
    changed = []
    for file in (run.best, run.last, run.log, run.steps, run.recipe):
        if not file.is_file():
            changed += [f"{file.name} is missing"] * (file != run.last)
        elif file_sha256(file) != result["sha256"].get(file.name):
            changed.append(f"{file.name} has changed")
    if changed:
        raise InputError(
            f"{run.path} is not as its run left it, so its figures may be of other weights: {', '.join(changed)} since "
            f"{run.result.name} was written"
        )


def _figures(run: RunFolder, recipe: Recipe, result: dict[str, Any]) -> Figures:
    epoch, images = result.get("best_epoch"), result["images"]
    held_out = recipe.sdzoo.held_out
    split = recipe.val_split + (f", {held_out:,} held out by seed" if held_out else "")
    val = _top1(split, result.get("val_top1_percent"), images.get("val"))
    if val is None or type(epoch) is not int:
        raise InputError(
            f"{run.result} holds no top-1 and its epoch: a card without figures is published only with --no-metrics, "
            "and says so"
        )
    with open(run.log, encoding="utf-8", newline="") as file:
        logged = {row["epoch"]: row["val_top1_percent"] for row in csv.DictReader(file)}
    if abs(float(logged.get(str(epoch)) or "inf") - val.percent) > ROUNDING:
        raise InputError(
            f"{run.result} says top-1 {val.percent:.3f} % on val at epoch {epoch}, {run.log.name} "
            f"{logged.get(str(epoch)) or 'nothing'}; {ANEW}"
        )
    return Figures(epoch, val, _top1(recipe.sdzoo.test_split, result.get("test_top1_percent"), images.get("test")))


def _top1(split: str, percent: Any, images: Any) -> Top1 | None:
    good = type(percent) in (int, float) and 0 <= percent <= 100 and type(images) is int
    return Top1(split, float(percent), images) if good else None
