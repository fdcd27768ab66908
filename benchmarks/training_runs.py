"""Runs of ``sdzoo train`` to be timed: each in processes of its own, on pictures of noise, by a recipe made for it."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CLASSES = 10
SIZE = 32
EPOCHS = 3  # of which the first does not count: in it, PyTorch starts up
RECIPE = {
    "num_classes": CLASSES,
    "device_modules": ["sdzoo"],
    "dataset": "",
    "train_split": "train",
    "val_split": "val",
    "interpolation": "bilinear",
    "crop_pct": 1.0,
    "channels_last": True,
    "workers": 1,
    "epochs": EPOCHS,
    "warmup_epochs": 0,
    "sched": "cosine",
    "opt": "sgd",
    "lr": 0.01,
    "momentum": 0.9,
    "weight_decay": 0.0001,
    "color_jitter": 0.0,
    "smoothing": 0.0,
}


@dataclass(frozen=True)
class TrainingTime:
    """What the epochs of a run took that count.

    ``training_s`` are the seconds of waiting for data, steps, logs and checkpoints; ``data_share`` and ``log_share``,
    which is of logs and checkpoints, are what of them are no steps; ``live_blocks`` is the mean over the steps.
    """

    training_s: float
    data_share: float
    log_share: float
    live_blocks: float


def steps_an_epoch(steps: int) -> int:
    """Return how many steps an epoch must have for ``steps`` to count; exit if no number fits."""
    counted = EPOCHS - 1
    if steps < 1 or steps % counted:
        sys.exit(f"{steps} steps cannot be had: give a multiple of {counted}, the number of epochs that count")
    return steps // counted


def noise_pictures(folder: Path, images: int) -> Path:
    """Write ``images`` pictures of noise to train on, and one a class to validate on; return their folder."""
    random = np.random.default_rng(0)
    for split, count in (("train", images), ("val", CLASSES)):
        for label in range(CLASSES):
            (folder / split / str(label)).mkdir(parents=True)
        for index in range(count):
            pixels = random.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / split / str(index % CLASSES) / f"{index}.png")
    return folder


def write_recipe(file: Path, **keys: Any) -> Path:
    """Write a recipe of ``RECIPE`` and ``keys``, which sdzoo and timm's ``train.py`` read alike; return its file."""
    file.write_text(json.dumps(RECIPE | keys, indent=1))  # which is YAML too
    return file


def run(command: Sequence[str | Path], threads: int, folder: Path | None = None) -> str:
    """Run ``command``, its processes with so many threads each, and return all that it printed; exit if it fails."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    done = subprocess.run(
        command, env=environment, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\nfailed with {done.returncode}:\n{done.stdout[-4000:]}")
    return done.stdout


def sdzoo_train(
    recipe: Path, data: Path, output: Path, threads: int, processes: int = 1, device: str = "cpu"
) -> TrainingTime:
    """Train by ``recipe`` into ``output`` and return what the run says that it took."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    train = ["-m", "sdzoo", "train", recipe, "--data-dir", data, "-o", output, "--device", device]
    run([sys.executable, *torchrun, *train], threads)
    return read_time(output)


def read_time(output: Path) -> TrainingTime:
    """Return what the run in ``output`` took, by its ``log.csv`` and ``result.json``."""
    with open(output / "log.csv", newline="") as file:
        first, *rows = ({name: float(cell) for name, cell in row.items()} for row in csv.DictReader(file))
    parts = json.loads((output / "result.json").read_text())["seconds"]
    # The log's seconds are of all since the start, validation too; its few images take a few hundredths of a second.
    validation_s = parts["validation"] / EPOCHS * len(rows)
    training_s = rows[-1]["seconds"] - first["seconds"] - validation_s
    data_s, log_s = (parts[part] / EPOCHS * len(rows) for part in ("data", "log"))
    live_blocks = sum(row["live_blocks"] for row in rows) / len(rows)
    return TrainingTime(training_s, data_s / training_s, log_s / training_s, live_blocks)


def in_turn(
    candidates: Mapping[str, Callable[[int], float]], rounds: int, report: Callable[[str], None]
) -> dict[str, list[float]]:
    """Return the seconds of each candidate in each round; they take turns, and every other round backwards."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for index in range(rounds):
        names = list(candidates)[:: -1 if index % 2 else 1]
        for name in names:
            seconds[name].append(candidates[name](index))
            report(f"round {index + 1} of {rounds}: {name} {seconds[name][-1]:.1f} s")
    return seconds
