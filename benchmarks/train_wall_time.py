"""Wall time of training with stochastic depth against constant depth, and the share of data and logging in it.

    python benchmarks/train_wall_time.py

The training phase of ``sdzoo train``, by its own log: waiting for data, steps, logs and checkpoints. Start-up, with
the first of three epochs, and validation are not in it. The two take turns, a pair a round, each with another seed.
The data lies in memory and is augmented as in the paper. The live share is what the gates of these very steps came to;
on average it is the mean survival probability, the floor of the ratio.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

from interleaved import hardware, ratio
from training_runs import TrainingTime, in_turn, noise_pictures, sdzoo_train, steps_an_epoch, write_recipe

CONSTANT = "constant depth"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sd_resnet56")
    parser.add_argument("--final-survival-prob", type=float, default=0.5)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps a run that count")
    parser.add_argument("--rounds", type=int, default=3, help="pairs of runs")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()

    dropping = f"p_L = {arguments.final_survival_prob}"
    rates = {CONSTANT: 0.0, dropping: 1 - arguments.final_survival_prob}
    runs: dict[str, list[TrainingTime]] = {name: [] for name in rates}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = noise_pictures(folder / "data", steps_an_epoch(arguments.steps) * arguments.batch_size)

        def seconds(candidate: str, index: int) -> float:
            recipe = write_recipe(
                folder / "recipe.yaml",
                model=arguments.model,
                drop_path=rates[candidate],
                batch_size=arguments.batch_size,
                seed=42 + index,
                train_crop_mode="pad4",
                hflip=0.5,
            )
            output = folder / f"{candidate} {index}"
            runs[candidate].append(sdzoo_train(recipe, data, output, arguments.threads, device=arguments.device))
            return runs[candidate][-1].training_s

        print(f"{arguments.model}, batch {arguments.batch_size}, {arguments.steps} steps a run, on {arguments.device}")
        print(f"{hardware(arguments.device)}, {arguments.threads} threads", flush=True)
        taken = in_turn(
            {name: lambda index, name=name: seconds(name, index) for name in rates},
            arguments.rounds,
            lambda text: print(text, flush=True),
        )
    print(f"wall time, {dropping} against {CONSTANT}: {ratio(taken, dropping, CONSTANT)}")
    live = [a.live_blocks / b.live_blocks for a, b in zip(runs[dropping], runs[CONSTANT], strict=True)]
    print(f"live share of the blocks: {statistics.mean(live):.3f}")
    for name, done in runs.items():
        speed = arguments.steps * arguments.batch_size / statistics.median(taken[name])
        data_share, log_share = (
            statistics.median(getattr(run, share) for run in done) for share in ("data_share", "log_share")
        )
        print(
            f"{name:<16}{speed:6.0f} images/s; waiting for data {data_share:.1%}, logs and checkpoints {log_share:.1%}"
        )


if __name__ == "__main__":
    main()
