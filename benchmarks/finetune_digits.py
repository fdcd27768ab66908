"""Fine-tune the bundled CIFAR-10 weights to seven classes, and train the same network from scratch, on real digits.

The data are scikit-learn's handwritten digits 0 to 6 (8 x 8 pixels, from the UCI repository, in the package), written
as pictures of 32 x 32 into train, val and test folders. Every run is ``sdzoo train`` with a recipe that ships, on the
threads that PyTorch takes by itself; the test split is measured once a run, with the weights best on val.

    python benchmarks/finetune_digits.py --runs 3
    python benchmarks/finetune_digits.py --only-data digits
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits

import sdzoo
from sdzoo.deploy.predictor import model_predictor
from sdzoo.training.checkpoint import load_model
from sdzoo.training.evaluate import DataSplit, evaluate_predictor
from sdzoo.training.recipe import Recipe, SdzooSettings
from sdzoo.training.recipe_file import find_recipe, load_recipe

CLASSES = 7
SHARES = {"train": 0.6, "val": 0.2, "test": 0.2}


def write_digits(root: Path, seed: int = 0) -> dict[str, int]:
    """Write ``root/<split>/<digit>/<index>.png`` and return the number of pictures of each split."""
    digits: Any = load_digits()
    counts = dict.fromkeys(SHARES, 0)
    generator = np.random.default_rng(seed)
    for digit in range(CLASSES):
        indices = generator.permutation(np.flatnonzero(digits.target == digit))
        ends = np.cumsum([round(share * len(indices)) for share in SHARES.values()])
        for split, chosen in zip(SHARES, np.split(indices, ends[:-1]), strict=True):
            folder = root / split / str(digit)
            folder.mkdir(parents=True, exist_ok=True)
            counts[split] += len(chosen)
            for index in chosen:
                grey = Image.fromarray((digits.images[index] * 255 / 16).round().astype(np.uint8))
                grey.resize((32, 32), Image.Resampling.BICUBIC).convert("RGB").save(folder / f"{index:04d}.png")
    return counts


def from_scratch(recipe: Recipe, lr: float) -> Recipe:
    """Return ``recipe`` without its weights; with their survival probabilities, which it had from them."""
    return dataclasses.replace(
        recipe, model=recipe.model.partition(".")[0], pretrained=False, drop_path=0.2, lr=lr, sdzoo=SdzooSettings()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3, help="of each, with seeds of their own (default: 3)")
    parser.add_argument("--only-data", type=Path, metavar="DIR", help="write the pictures there, and train nothing")
    arguments = parser.parse_args()
    if arguments.only_data:
        print(", ".join(f"{count} {split}" for split, count in write_digits(arguments.only_data).items()))
        return
    tuned = {name: load_recipe(find_recipe(name)) for name in ("finetune_all", "finetune_layer_decay", "finetune_head")}
    scratch = {f"from scratch, lr {lr}": from_scratch(tuned["finetune_all"], lr) for lr in (0.02, 0.1)}
    recipes = tuned | scratch
    results: dict[str, list[tuple[float, float]]] = {name: [] for name in recipes}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "digits")
        print(write_digits(data), f"{torch.get_num_threads()} threads")
        for run in range(arguments.runs):
            for name, recipe in recipes.items():
                started = time.perf_counter()
                output = Path(folder, f"{name} {run}")
                best = sdzoo.train(dataclasses.replace(recipe, seed=run), data, output, device="cpu")
                seconds = time.perf_counter() - started
                predictor = model_predictor(load_model(best))
                measured = evaluate_predictor(predictor, None, predictor.config, DataSplit(data, "test"))
                results[name].append((measured.top1_percent, seconds))
    print(f"\n{'recipe':<24}{'test top-1 %':>14}{'all runs':>28}{'seconds':>10}")
    for name, values in results.items():
        accuracies = [accuracy for accuracy, _ in values]
        every = ", ".join(f"{accuracy:.2f}" for accuracy in accuracies)
        seconds = statistics.median(seconds for _, seconds in values)
        print(f"{name:<24}{statistics.median(accuracies):>14.2f}{every:>28}{seconds:>10.0f}")


if __name__ == "__main__":
    main()
