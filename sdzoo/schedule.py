"""Survival schedules: the probability p_l that residual block l is computed in a training step.

Huang et al., "Deep Networks with Stochastic Depth", ECCV 2016, section 3. Blocks are counted from 1 to L, from the
input to the output. Pure functions on floats; nothing here knows about tensors.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from typing import Any

from sdzoo.errors import InputError, nearest

DEFAULT_FINAL_SURVIVAL_PROB = 0.5
SMALLEST_FLOAT32 = 2.0**-126  # what is below is 0, or nearly, where probabilities are stored


def linear_decay(num_blocks: int, final_survival_prob: float = DEFAULT_FINAL_SURVIVAL_PROB) -> list[float]:
    """Return ``p_l = 1 - (l / L) * (1 - p_L)`` for l = 1..L: the paper's schedule.

    Raises:
        InputError: if ``final_survival_prob`` is not in (0, 1].
    """
    _check_arguments(num_blocks, final_survival_prob)
    probs = [1 - block / num_blocks * (1 - final_survival_prob) for block in range(1, num_blocks + 1)]
    return check_survival_probs(probs, num_blocks, f"linear_decay to {final_survival_prob}")


def uniform(num_blocks: int, final_survival_prob: float = DEFAULT_FINAL_SURVIVAL_PROB) -> list[float]:
    """Return ``p_l = p_L`` for every block.

    Raises:
        InputError: if ``final_survival_prob`` is not in (0, 1].
    """
    _check_arguments(num_blocks, final_survival_prob)
    return check_survival_probs([final_survival_prob] * num_blocks, num_blocks, f"uniform {final_survival_prob}")


def constant_depth(num_blocks: int) -> list[float]:
    """Return ``p_l = 1`` for every block: no stochastic depth."""
    _check_arguments(num_blocks)
    return [1.0] * num_blocks


def stagewise(stage_probs: Sequence[float], blocks_per_stage: Sequence[int]) -> list[float]:
    """Return each stage's probability for each of its blocks.

    Raises:
        InputError: if there is not one number in (0, 1] per stage, or a stage has no block.
    """
    lengths = list(blocks_per_stage)
    if not lengths or not all(_whole(length) and length >= 1 for length in lengths):
        raise InputError(f"blocks_per_stage is {lengths}; each stage must have a whole number of blocks, at least 1")
    source = f"stagewise, of {_listed(lengths)} blocks"
    probs = check_survival_probs(stage_probs, len(lengths), source, "stages")
    return [prob for prob, length in zip(probs, lengths, strict=True) for _ in range(length)]


def budget(schedule: Sequence[float], mean: float, p_min: float = 0.05) -> list[float]:
    """Return ``p'_l = max(p_min, 1 - k (1 - p_l))`` with the k >= 0 for which the mean is ``mean``.

    The schedule keeps its shape and costs what is asked for: ``mean`` is the share of blocks that training computes.
    The sum is piecewise linear in k, so k is solved for, not searched for: with the j largest of the n drop rates
    ``d_l = 1 - p_l`` at their limit, ``k = (n (1 - mean) - j (1 - p_min)) / (the sum of the other d_l)``.

    Raises:
        InputError: if a number leaves (0, 1], or ``mean`` is below what ``p_min`` and the blocks with p_l = 1 allow.
    """
    probs = check_survival_probs(schedule, source="the schedule of a budget")
    for name, value in (("mean", mean), ("p_min", p_min)):
        if not is_probability(value):
            raise InputError(f"{name} is {value!r}; it must lie in (0, 1]")
    mean, p_min = float(mean), float(p_min)
    most = 1 - p_min
    drops = sorted(1 - prob for prob in probs if prob < 1)  # what drops nothing stays at 1, whatever k
    lowest = 1 - most * len(drops) / len(probs)
    if mean < lowest - 1e-10:  # half of the last digit that is shown
        raise InputError(
            f"mean is {mean}; the lowest that can be reached is {lowest:.10g}: "
            f"{len(drops)} of {len(probs)} blocks drop, down to p_min = {p_min}"
        )
    k, to_drop = math.inf, len(probs) * (1 - mean)
    for at_limit, (largest, total) in enumerate(zip(drops[::-1], [*accumulate(drops)][::-1], strict=True)):
        k = (to_drop - at_limit * most) / total
        if k * largest <= most:
            break
    return [max(p_min, 1 - k * (1 - prob)) if prob < 1 else 1.0 for prob in probs]


def warm_up(probs: Sequence[float], epoch: float, warmup_epochs: float) -> list[float]:
    """Return the probabilities of the draw at ``epoch``: ``1 - (1 - p_l) * min(1, epoch / warmup_epochs)``.

    Training starts at constant depth and reaches ``probs`` after ``warmup_epochs``; 0 is no warm-up. Only the draw
    changes: the p by which evaluation weights the branch, and which the state dict holds, is ``probs`` throughout.

    Args:
        probs: p_l of every block.
        epoch: Epochs done, fractions too.
        warmup_epochs: Epochs until ``probs`` is reached.

    Raises:
        InputError: if a probability leaves (0, 1], or a number of epochs is below 0.
    """
    probs = check_survival_probs(probs, source="warm_up")
    for name, value in (("epoch", epoch), ("warmup_epochs", warmup_epochs)):
        if not is_number(value) or not 0 <= value < math.inf:
            raise InputError(f"{name} is {value!r}; it must be a number of at least 0")
    left = max(0.0, 1 - float(epoch) / float(warmup_epochs)) if warmup_epochs else 0.0
    return [prob + (1 - prob) * left for prob in probs]


SCHEDULES: dict[str, Callable[..., list[float]]] = {
    "linear_decay": linear_decay,
    "linear": linear_decay,
    "uniform": uniform,
    "constant_depth": constant_depth,
    "stagewise": stagewise,
}


def check_survival_probs(
    probs: Sequence[float], count: int | None = None, source: str = "survival_probs", unit: str = "blocks"
) -> list[float]:
    """Return ``probs`` as a list of floats, one in (0, 1] for each of ``count`` blocks (default: as many as there are).

    Raises:
        InputError: naming the first entry out of range, or both lengths; ``source`` says where they came from.
    """
    if isinstance(probs, str) or not isinstance(probs, Iterable):
        raise InputError(f"survival_probs is {probs!r}; it must be a list of numbers ({source})")
    probs = list(probs)
    if count is None and not probs:
        raise InputError(f"survival_probs is empty ({source})")
    count = len(probs) if count is None else count
    if len(probs) != count:
        raise InputError(f"survival_probs has {len(probs)} entries; the model has {count} {unit} ({source})")
    for index, prob in enumerate(probs):
        if not is_probability(prob):
            raise InputError(f"survival_probs[{index}] is {prob!r}; each must lie in (0, 1] ({count} {unit}, {source})")
    return [float(prob) for prob in probs]


def resolve_survival_probs(
    num_blocks: int,
    drop_path_rate: float | None = None,
    schedule: str | Sequence[float] | None = None,
    survival_probs: Sequence[float] | None = None,
    blocks_per_stage: Sequence[int] | None = None,
) -> tuple[list[float], bool]:
    """Return the survival probabilities that a model's keyword arguments ask for, and whether they ask for any.

    ``drop_path_rate`` is timm's word for 1 - p_L and ends here. With nothing asked for, the paper's default: linear
    decay to 0.5, which a checkpoint's own probabilities replace. A ``schedule`` of numbers is another way to give
    ``survival_probs``, one per block; with ``schedule="stagewise"`` there is one per stage of ``blocks_per_stage``.

    Raises:
        InputError: if the arguments contradict each other, name no schedule, or leave (0, 1].
    """
    explicit = any(argument is not None for argument in (drop_path_rate, schedule, survival_probs))
    if isinstance(schedule, Iterable) and not isinstance(schedule, str):
        if survival_probs is not None:
            raise InputError("schedule and survival_probs are both lists of probabilities: give one of the two")
        schedule, survival_probs = None, schedule
    if schedule is not None and schedule not in SCHEDULES:
        raise InputError(f'schedule is "{schedule}"; known: {", ".join(SCHEDULES)}{nearest(str(schedule), SCHEDULES)}')
    if schedule == "stagewise":
        return _resolve_stagewise(num_blocks, drop_path_rate, survival_probs, blocks_per_stage), explicit
    if survival_probs is not None:
        if drop_path_rate is not None or schedule is not None:
            raise InputError("survival_probs already says everything: give it without drop_path_rate and schedule")
        return check_survival_probs(survival_probs, num_blocks), explicit
    if schedule == "constant_depth":
        if drop_path_rate:
            raise InputError(f"constant_depth drops nothing, but drop_path_rate is {drop_path_rate}")
        return constant_depth(num_blocks), explicit
    if drop_path_rate is None:
        final = DEFAULT_FINAL_SURVIVAL_PROB
    elif is_number(drop_path_rate) and 0 <= drop_path_rate < 1:
        final = 1.0 - drop_path_rate
    else:
        raise InputError(f"drop_path_rate is {drop_path_rate!r}; it must lie in [0, 1), being 1 - p_L")
    return SCHEDULES[schedule or "linear_decay"](num_blocks, final), explicit


def _resolve_stagewise(
    num_blocks: int,
    drop_path_rate: float | None,
    survival_probs: Sequence[float] | None,
    blocks_per_stage: Sequence[int] | None,
) -> list[float]:
    if blocks_per_stage is None:
        raise InputError(f"stagewise needs a model that says its blocks_per_stage; this one has {num_blocks} blocks")
    stages = f"one for each of {len(blocks_per_stage)} stages, of {_listed(blocks_per_stage)} blocks"
    if drop_path_rate is not None:
        raise InputError(f"stagewise takes survival_probs, {stages}: give it without drop_path_rate")
    if survival_probs is None:
        raise InputError(f"stagewise needs survival_probs, {stages}")
    return check_survival_probs(stagewise(survival_probs, blocks_per_stage), num_blocks, "stagewise")


def _check_arguments(num_blocks: int, final_survival_prob: float = 1.0) -> None:
    if not _whole(num_blocks) or num_blocks < 1:
        raise InputError(f"num_blocks is {num_blocks!r}; it must be a whole number, at least 1")
    if not is_number(final_survival_prob):
        raise InputError(f"final_survival_prob is {final_survival_prob!r}; it must lie in (0, 1]")


def is_number(value: object) -> bool:
    """Return whether ``value`` is a real number, and no truth value."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def is_probability(value: Any) -> bool:
    """Return whether ``value`` is a number in (0, 1]."""
    return is_number(value) and SMALLEST_FLOAT32 <= value <= 1


def _whole(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _listed(lengths: Iterable[int]) -> str:
    return ", ".join(map(str, lengths))
