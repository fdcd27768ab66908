"""Survival schedules: the probability p_l that residual block l is computed in a training step.

Huang et al., "Deep Networks with Stochastic Depth", ECCV 2016, section 3. Blocks are counted from 1 to L, from the
input to the output. Pure functions on floats; nothing here knows about tensors.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Sequence

from sdzoo.errors import InputError, nearest

DEFAULT_FINAL_SURVIVAL_PROB = 0.5
SMALLEST_FLOAT32 = 2.0**-126  # what is below is 0, or nearly, where probabilities are stored


def linear_decay(num_blocks: int, final_survival_prob: float = DEFAULT_FINAL_SURVIVAL_PROB) -> list[float]:
    """Return ``p_l = 1 - (l / L) * (1 - p_L)`` for l = 1..L: the paper's schedule.

    Raises:
        InputError: if ``final_survival_prob`` is not in (0, 1].
    """
    probs = [1 - block / num_blocks * (1 - final_survival_prob) for block in range(1, num_blocks + 1)]
    return check_survival_probs(probs, num_blocks, f"linear_decay to {final_survival_prob}")


def uniform(num_blocks: int, final_survival_prob: float = DEFAULT_FINAL_SURVIVAL_PROB) -> list[float]:
    """Return ``p_l = p_L`` for every block.

    Raises:
        InputError: if ``final_survival_prob`` is not in (0, 1].
    """
    return check_survival_probs([final_survival_prob] * num_blocks, num_blocks, f"uniform {final_survival_prob}")


def constant_depth(num_blocks: int) -> list[float]:
    """Return ``p_l = 1`` for every block: no stochastic depth."""
    return [1.0] * num_blocks


SCHEDULES: dict[str, Callable[..., list[float]]] = {
    "linear_decay": linear_decay,
    "uniform": uniform,
    "constant_depth": constant_depth,
}


def check_survival_probs(probs: Sequence[float], num_blocks: int, source: str = "survival_probs") -> list[float]:
    """Return ``probs`` as a list of floats, one in (0, 1] for each of ``num_blocks`` blocks.

    Raises:
        InputError: naming the first entry out of range, or both lengths; ``source`` says where they came from.
    """
    probs = list(probs)
    if len(probs) != num_blocks:
        raise InputError(f"survival_probs has {len(probs)} entries; the model has {num_blocks} blocks ({source})")
    for index, prob in enumerate(probs):
        number = isinstance(prob, numbers.Real) and not isinstance(prob, bool)
        if not number or not SMALLEST_FLOAT32 <= prob <= 1:
            raise InputError(
                f"survival_probs[{index}] is {prob!r}; each must lie in (0, 1] ({num_blocks} blocks, {source})"
            )
    return [float(prob) for prob in probs]


def resolve_survival_probs(
    num_blocks: int,
    drop_path_rate: float | None = None,
    schedule: str | None = None,
    survival_probs: Sequence[float] | None = None,
) -> tuple[list[float], bool]:
    """Return the survival probabilities that a model's keyword arguments ask for, and whether they ask for any.

    ``drop_path_rate`` is timm's word for 1 - p_L and ends here. With nothing asked for, the paper's default: linear
    decay to 0.5, which a checkpoint's own probabilities replace.

    Raises:
        InputError: if the arguments contradict each other, name no schedule, or leave (0, 1].
    """
    explicit = any(argument is not None for argument in (drop_path_rate, schedule, survival_probs))
    if survival_probs is not None:
        if drop_path_rate is not None or schedule is not None:
            raise InputError("survival_probs already says everything: give it without drop_path_rate and schedule")
        return check_survival_probs(survival_probs, num_blocks), explicit
    if schedule is not None and schedule not in SCHEDULES:
        raise InputError(f'schedule is "{schedule}"; known: {", ".join(SCHEDULES)}{nearest(str(schedule), SCHEDULES)}')
    if schedule == "constant_depth":
        if drop_path_rate:
            raise InputError(f"constant_depth drops nothing, but drop_path_rate is {drop_path_rate}")
        return constant_depth(num_blocks), explicit
    if drop_path_rate is None:
        final = DEFAULT_FINAL_SURVIVAL_PROB
    elif isinstance(drop_path_rate, (int, float)) and 0 <= drop_path_rate < 1:
        final = 1.0 - drop_path_rate
    else:
        raise InputError(f"drop_path_rate is {drop_path_rate!r}; it must lie in [0, 1), being 1 - p_L")
    return SCHEDULES[schedule or "linear_decay"](num_blocks, final), explicit
