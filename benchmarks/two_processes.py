"""Training in two processes of one thread against one process of two threads, at the same global batch.

    python benchmarks/two_processes.py

Images a second of the training phase of ``sdzoo train``, under ``torchrun`` with gloo and without, by its own log.
Start-up, with the first of three epochs, and validation are not in it. The two take turns, a pair a round.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from interleaved import hardware, ratio
from training_runs import in_turn, noise_pictures, sdzoo_train, steps_an_epoch, write_recipe

ONE, TWO = "one process, two threads", "two processes, one thread each"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sd_resnet110")
    parser.add_argument("--final-survival-prob", type=float, default=0.5)
    parser.add_argument("--batch-size", type=int, default=128, help="the global batch: of both processes together")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps a run that count")
    parser.add_argument("--rounds", type=int, default=3, help="pairs of runs")
    arguments = parser.parse_args()
    if arguments.batch_size % 2:
        parser.error(f"--batch-size is {arguments.batch_size}; two processes need an even one")

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = noise_pictures(folder / "data", steps_an_epoch(arguments.steps) * arguments.batch_size)

        def seconds(processes: int, index: int) -> float:
            recipe = write_recipe(
                folder / "recipe.yaml",
                model=arguments.model,
                drop_path=1 - arguments.final_survival_prob,
                batch_size=arguments.batch_size // processes,
                seed=42 + index,  # in both: the gates of each step are the same
                train_crop_mode="pad4",
                hflip=0.5,
            )
            output = folder / f"{processes} {index}"
            return sdzoo_train(recipe, data, output, threads=2 // processes, processes=processes).training_s

        print(f"{arguments.model}, global batch {arguments.batch_size}, {arguments.steps} steps a run, {hardware()}")
        taken = in_turn(
            {ONE: lambda index: seconds(1, index), TWO: lambda index: seconds(2, index)},
            arguments.rounds,
            lambda text: print(text, flush=True),
        )
    # as many images in both, so that images a second are as the inverse of the seconds
    print(f"images/s, {TWO} against {ONE}: {ratio(taken, ONE, TWO)}")


if __name__ == "__main__":
    main()
