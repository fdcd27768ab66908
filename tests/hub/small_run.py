"""A run of two epochs on pictures of three colours, and its folder taken apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import sdzoo
from sdzoo.digest import file_sha256
from sdzoo.training.recipe import Recipe, SdzooSettings
from sdzoo.training.recipe_yaml import dump_yaml, load_yaml
from sdzoo.training.run_folder import RunFolder

COLOURS = {"blue": (40, 60, 190), "green": (50, 180, 70), "red": (200, 50, 40)}
COUNTS = {"train": 12, "val": 4, "test": 3}
DATA = "three_colours"


def train_small(root: Path) -> Path:
    """Return the folder of a finished run in ``root``, whose recipe says where its data lie."""
    rng = np.random.default_rng(0)
    for split, count in COUNTS.items():
        for name, colour in COLOURS.items():
            folder = root / DATA / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                noise = rng.integers(-40, 41, (32, 32, 3))
                Image.fromarray(np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)).save(
                    folder / f"{index}.png"
                )
    recipe = Recipe(
        model="sd_resnet20",
        num_classes=3,
        drop_path=0.4,
        epochs=2,
        batch_size=12,
        lr=0.05,
        warmup_epochs=0,
        train_crop_mode="pad4",
        color_jitter=0.0,
        smoothing=0.0,
        interpolation="bilinear",
        crop_pct=1.0,
        val_split="val",
        workers=0,
        data_dir=str(root / DATA),
        sdzoo=SdzooSettings(test_split="test"),
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    sdzoo.train(recipe, None, root / "run", device="cpu")
    torch.set_num_threads(threads)
    return root / "run"


def edit_result(run: Path, **changes: Any) -> None:
    """Let a run have written other entries in its result; None removes one."""
    folder = RunFolder(run)
    result = json.loads(folder.result.read_text()) | changes
    folder.write_result({name: value for name, value in result.items() if value is not None})


def edit_recipe(run: Path, **changes: Any) -> None:
    """Let a run have been of another recipe."""
    folder = RunFolder(run)
    values = load_yaml(folder.recipe.read_text())
    folder.write_recipe(dump_yaml(values | changes))
    sums = json.loads(folder.result.read_text())["sha256"]
    edit_result(run, sha256=sums | {"recipe.yaml": file_sha256(folder.recipe)})
