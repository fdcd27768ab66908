"""Training under upstream timm's ``train.py`` against ``sdzoo train``: the same recipe, model, augmentation and data.

    python benchmarks/against_timm_train.py --timm-dir pytorch-image-models

Images a second: of timm as its ``train.py`` prints them for each step; of sdzoo by its own log, what it writes at the
end of an epoch included. Start-up, with the first of three epochs, and validation are in neither. The recipe asks for
one worker. The two take turns, a pair a round.

timm refuses the paper's shift by 4 pixels (``train_crop_mode: pad4``), so that nothing is cropped here. Augmentation
``none``, the default, is ``no_aug``. ``flip`` is timm's random resized crop of the whole image, scale and ratio 1, with
a flip, which sdzoo does to whole batches. Each draws its own gates, which are alike only on average.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from interleaved import hardware, ratio
from training_runs import in_turn, noise_pictures, run, sdzoo_train, steps_an_epoch, write_recipe

TIMM, SDZOO = "timm's train.py", "sdzoo train"
AUGMENTATIONS: dict[str, dict[str, Any]] = {
    "none": {"no_aug": True},
    "flip": {
        "train_crop_mode": "rrc",
        "scale": [1.0, 1.0],
        "ratio": [1.0, 1.0],
        "train_interpolation": "bilinear",
        "hflip": 0.5,
    },
}
UPDATE = re.compile(r"Train: (\d+) \[ *\d+/\d+ .*?Time: (\d+\.\d+)s")


def printed_seconds(text: str, steps: int) -> float:
    """Return the sum of what timm's ``train.py`` printed for its ``steps`` updates after the first epoch, or exit."""
    seconds = [float(seconds) for epoch, seconds in UPDATE.findall(text) if int(epoch) > 0]
    if len(seconds) != steps:
        sys.exit(f"train.py printed {len(seconds)} updates after the first epoch, not {steps}:\n{text[-4000:]}")
    return sum(seconds)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--timm-dir", type=Path, required=True, help="a checkout of pytorch-image-models")
    parser.add_argument("--models", nargs="+", default=["sd_resnet20", "sd_resnet110"])
    parser.add_argument("--augmentation", choices=AUGMENTATIONS, default="none")
    parser.add_argument("--final-survival-prob", type=float, default=0.5)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps a run that count")
    parser.add_argument("--rounds", type=int, default=3, help="pairs of runs")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    script = arguments.timm_dir.resolve() / "train.py"
    if not script.is_file():
        parser.error(f"--timm-dir: {script} does not exist")

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = noise_pictures(folder / "data", steps_an_epoch(arguments.steps) * arguments.batch_size)

        def recipe(model: str, index: int) -> Path:
            return write_recipe(
                folder / "recipe.yaml",
                model=model,
                drop_path=1 - arguments.final_survival_prob,
                batch_size=arguments.batch_size,
                seed=42 + index,
                **AUGMENTATIONS[arguments.augmentation],
            )

        def timm_seconds(model: str, index: int) -> float:
            output = ["--output", folder / "timm", "--experiment", f"{model} {index}"]
            options = ["--data-dir", data, "--device", "cpu", "--log-interval", "1", *output]
            command = [sys.executable, script, "--config", recipe(model, index), *options]
            text = run(command, arguments.threads, script.parent)
            return printed_seconds(text, arguments.steps)

        def sdzoo_seconds(model: str, index: int) -> float:
            output = folder / f"{model} {index}"
            return sdzoo_train(recipe(model, index), data, output, arguments.threads).training_s

        print(
            f"batch {arguments.batch_size}, augmentation: {arguments.augmentation}, p_L = "
            f"{arguments.final_survival_prob}, {arguments.steps} steps a run, {hardware()}, {arguments.threads} threads"
        )
        for model in arguments.models:
            taken = in_turn(
                {
                    TIMM: lambda index, model=model: timm_seconds(model, index),
                    SDZOO: lambda index, model=model: sdzoo_seconds(model, index),
                },
                arguments.rounds,
                lambda text: print(text, flush=True),
            )
            for name, seconds in taken.items():
                speed = arguments.steps * arguments.batch_size / statistics.median(seconds)
                print(f"{model:<14}{name:<16}{speed:6.0f} images/s")
            print(f"{model:<14}images/s, sdzoo against timm: {ratio(taken, TIMM, SDZOO)}", flush=True)


if __name__ == "__main__":
    main()
