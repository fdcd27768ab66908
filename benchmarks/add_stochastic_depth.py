"""One training step of timm's models: their own drop path against sdzoo's skipping, at the same rate.

    python benchmarks/add_stochastic_depth.py

Both have linear decay to 1 - rate. A sample is one step; the ratio is that of the sums over interleaved rounds, since
what is skipped differs from step to step. So that no lucky draw flatters it, each gate is open in exactly its share of
the rounds, in shuffled order. The floor is the mean survival probability.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import timm
import torch
import torch.nn.functional as F
from interleaved import hardware, interleave
from torch import Tensor, nn

import sdzoo

MODELS = ("resnet50", "convnext_tiny", "vit_small_patch16_224")
RATES = (0.1, 0.3, 0.5)


def step(model: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], None]:
    """Return a function that does one optimizer step."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def run() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return run


def with_planned_gates(model: nn.Module, run: Callable[[], None], rounds: int) -> Callable[[], None]:
    """Return ``run`` under gates of which each is open in ``p * rounds`` rounds, rounded, after one with all open."""
    columns = []
    for p in sdzoo.survival_probs(model):
        order = torch.randperm(rounds).tolist()
        columns.append([1, *(int(place < round(p * rounds)) for place in order)])
    plan = iter(zip(*columns, strict=True))

    def planned() -> None:
        with sdzoo.fixed_gates(model, next(plan)):
            run()

    return planned


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--rates", nargs="+", type=float, default=RATES)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=25)
    arguments = parser.parse_args()

    size = arguments.image_size
    images = torch.randn(arguments.batch_size, 3, size, size)
    labels = torch.randint(0, 1000, (arguments.batch_size,))
    print(f"batch {arguments.batch_size}, {size} pixels, {arguments.rounds} rounds of one step")
    print(f"{hardware()}, {torch.get_num_threads()} threads, torch {torch.__version__}, timm {timm.__version__}")
    print(f"{'model':<24}{'rate':>6}{'floor':>8}{'sdzoo / timm':>14}")
    for name in arguments.models:
        fixed = {"img_size": size} if name.startswith("vit") else {}
        for rate in arguments.rates:
            torch.manual_seed(0)
            stock = timm.create_model(name, drop_path_rate=rate, **fixed)
            gated = sdzoo.add_stochastic_depth(timm.create_model(name, **fixed), 1 - rate)
            probs = sdzoo.survival_probs(gated)
            ours = with_planned_gates(gated, step(gated, images, labels), arguments.rounds)
            seconds = interleave({"timm": step(stock, images, labels), "sdzoo": ours}, arguments.rounds)
            ratio = sum(seconds["sdzoo"]) / sum(seconds["timm"])
            print(f"{name:<24}{rate:>6}{sum(probs) / len(probs):>8.2f}{ratio:>14.2f}", flush=True)


if __name__ == "__main__":
    main()
