"""A tiny data set of pictures that can be learnt, a recipe for it, and one undisturbed run of that recipe."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

import sdzoo  # noqa: F401  registers the models
from sdzoo.training.engine import train
from sdzoo.training.recipe import Recipe

COLOURS = {"blue": (40, 60, 190), "green": (50, 180, 70), "red": (200, 50, 40)}
COUNTS = {"train": 22, "val": 4, "test": 3}

MakeImageFolder = Callable[..., Path]
MakeRecipe = Callable[..., Recipe]


def write_image_folder(
    root: Path, counts: Mapping[str, int] = COUNTS, classes: tuple[str, ...] = tuple(COLOURS), seed: int = 0
) -> Path:
    """Write ``root/split/class/*``: noise around the class's colour; every other one JPEG, every third larger."""
    rng = np.random.default_rng(seed)
    for split, count in counts.items():
        for name in classes:
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                height, width = (48, 40) if index % 3 == 2 else (32, 32)
                noise = rng.integers(-40, 41, (height, width, 3))
                pixels = np.clip(np.array(COLOURS.get(name, (128, 128, 128))) + noise, 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{index:03d}.{'jpg' if index % 2 else 'png'}")
    return root


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute in one thread: the runs are this small, and their bits do not depend on who else uses the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """66 training images (4 batches of 16, 2 left over), 12 for validation and 9 for test, in 3 classes. Read only."""
    return write_image_folder(tmp_path_factory.mktemp("data"))


@pytest.fixture
def make_image_folder(tmp_path: Path) -> MakeImageFolder:
    """Return the writer of an image folder of the test's own: ``make_image_folder(counts, classes, seed)``."""
    return lambda *args, **kwargs: write_image_folder(tmp_path / "own_data", *args, **kwargs)


def _recipe(**changes: Any) -> Recipe:
    base = Recipe(
        model="sd_resnet20",
        num_classes=3,
        drop_path=0.5,
        drop=0.2,
        epochs=2,
        batch_size=16,
        validation_batch_size=5,
        channels_last=True,
        seed=7,
        lr=0.1,
        weight_decay=1e-4,
        sched_on_updates=True,
        warmup_epochs=0,
        train_crop_mode="pad4",
        color_jitter=0.0,
        smoothing=0.0,
        interpolation="bilinear",
        crop_pct=1.0,
        val_split="val",
        workers=0,
    )
    return dataclasses.replace(base, **changes)


@pytest.fixture(scope="session")
def make_recipe() -> MakeRecipe:
    """Return the maker of recipes for ``image_folder``: 2 epochs of 4 steps, with dropout; keywords change it."""
    return _recipe


class FinishedRun(NamedTuple):
    """A run nothing has disturbed."""

    recipe: Recipe
    output: Path
    best: Path


@pytest.fixture(scope="session")
def finished_run(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """Return a run of ``make_recipe()`` on ``image_folder``. Read only."""
    output = tmp_path_factory.mktemp("finished") / "run"
    recipe = _recipe()
    with one_thread():
        return FinishedRun(recipe, output, train(recipe, image_folder, output, device="cpu"))
