"""What the tests of runs share: reading a run's folder, comparing two, and disturbing one at a given step."""

from __future__ import annotations

import csv
import hashlib
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from sdzoo.training.checkpoint import read_checkpoint
from sdzoo.training.step import Step, Trainer

FILES = {"best.safetensors", "last.pth", "log.csv", "steps.csv", "recipe.yaml", "result.json", ".lock"}


def named_seed(*name: str | int) -> int:
    """Return the seed that a stream's name stands for, in the words of the design: 63 bits of a hash."""
    return int(hashlib.sha256(repr(name).encode()).hexdigest()[:16], 16) // 2


def plan(seed: int, step: int, probs: list[float]) -> list[bool]:
    """Return which blocks step ``step`` computes: draws of a generator of that step below p."""
    generator = torch.Generator().manual_seed(named_seed(seed, "gates", step))
    return [draw < p for draw, p in zip(torch.rand(len(probs), generator=generator).tolist(), probs, strict=True)]


@contextmanager
def after_step(number: int, action: Callable[[Optimizer], None]) -> Iterator[None]:
    """Call ``action`` at the end of the optimizer step ``number``, counted from 1 inside the ``with``."""
    original, taken = Trainer.step, 0

    def step(trainer: Trainer, *args: Any) -> Step:
        nonlocal taken
        result = original(trainer, *args)
        taken += 1
        if taken == number:
            action(trainer.optimizer)
        return result

    setattr(Trainer, "step", step)  # noqa: B010  of the same arguments, which a type checker cannot see
    try:
        yield
    finally:
        setattr(Trainer, "step", original)  # noqa: B010


def interrupt(number: int = signal.SIGINT) -> Callable[[Optimizer], None]:
    return lambda _: signal.raise_signal(number)


def table(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def epochs(output: Path) -> list[dict[str, str]]:
    return table(output / "log.csv")


def steps(output: Path) -> list[dict[str, str]]:
    return table(output / "steps.csv")


def files(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in output.iterdir()}


def same(one: Any, other: Any) -> bool:
    """Return whether two values of a checkpoint are equal, tensors to the bit."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)


def timeless(value: Any) -> Any:
    """Return ``value`` without the times in it, which alone may differ between two runs."""
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if k != "seconds" and not str(k).endswith("_s")}
    return [timeless(item) for item in value] if isinstance(value, list) else value


def assert_same_run(output: Path, expected: Path) -> None:
    """Compare two finished runs to the bit: weights, averages, optimizer, schedules, logs; times alone may differ."""
    assert {path.name for path in output.iterdir()} == {path.name for path in expected.iterdir()}
    for name in ("last.pth", "best.safetensors"):
        (state, rest), (expected_state, expected_rest) = (read_checkpoint(run / name) for run in (output, expected))
        different = [key for key in expected_state if not same(state.get(key), expected_state[key])]
        assert state.keys() == expected_state.keys() and not different, f"{name}: {different[:5]}"
        rest, expected_rest = timeless(rest), timeless(expected_rest)
        different = [key for key in expected_rest if not same(rest.get(key), expected_rest[key])]
        assert rest.keys() == expected_rest.keys() and not different, f"{name}: {different[:5]}"
    assert timeless(epochs(output)) == timeless(epochs(expected))
    assert (output / "steps.csv").read_bytes() == (expected / "steps.csv").read_bytes()
    assert (output / "recipe.yaml").read_bytes() == (expected / "recipe.yaml").read_bytes()
