from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdzoo.errors import InputError
from sdzoo.schedule import (
    SCHEDULES,
    budget,
    check_survival_probs,
    constant_depth,
    linear_decay,
    resolve_survival_probs,
    stagewise,
    uniform,
    warm_up,
)

PROBS = st.lists(st.floats(1e-6, 1), min_size=1, max_size=40)
NOT_PROBABILITIES = [0, 0.0, -0.1, 1.2, math.nan, math.inf, -math.inf, "0.5", None, True]


def test_linear_decay_of_110_layers_is_the_papers() -> None:
    probs = linear_decay(54, 0.5)
    assert probs[0] == pytest.approx(0.990741, abs=5e-7)
    assert probs[-1] == 0.5
    assert sum(probs) == pytest.approx(40.25, abs=1e-12)  # timm's rule would give 40.5


def test_linear_decay_ends_in_one_half_by_default() -> None:
    expected = [float(1 - Fraction(layer, 9) / 2) for layer in range(1, 10)]
    assert linear_decay(9) == pytest.approx(expected, abs=1e-15)


@settings(deadline=None)
@given(num_blocks=st.integers(1, 700), final=st.floats(0.01, 1))
def test_linear_decay_falls_in_equal_steps_to_the_last_block(num_blocks: int, final: float) -> None:
    probs = linear_decay(num_blocks, final)
    step = (1 - final) / num_blocks
    assert len(probs) == num_blocks
    assert probs[-1] == pytest.approx(final, abs=1e-12)
    assert probs[0] == pytest.approx(1 - step, abs=1e-12)
    assert math.fsum(probs) == pytest.approx(num_blocks - step * num_blocks * (num_blocks + 1) / 2, abs=1e-9)
    assert all(a - b == pytest.approx(step, abs=1e-12) for a, b in itertools.pairwise(probs))


def test_uniform_has_the_final_probability_everywhere() -> None:
    assert uniform(5, 0.3) == [0.3] * 5
    assert uniform(2) == [0.5, 0.5]


def test_constant_depth_never_drops() -> None:
    assert constant_depth(3) == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("schedule", [linear_decay, uniform])
@pytest.mark.parametrize("final", [0, -0.5, 1.5, math.nan, math.inf])
def test_a_final_probability_out_of_range_is_refused(schedule: Callable[..., list[float]], final: float) -> None:
    with pytest.raises(InputError, match=rf"each must lie in \(0, 1\] \(54 blocks, {schedule.__name__}"):
        schedule(54, final)


@pytest.mark.parametrize("wrong", NOT_PROBABILITIES)
def test_an_entry_out_of_range_is_named_with_its_index(wrong: Any) -> None:
    probs = [0.9] * 6 + [wrong] + [0.9] * 2
    message = f"survival_probs[6] is {wrong!r}; each must lie in (0, 1] (9 blocks, here)"
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        check_survival_probs(probs, 9, "here")


@pytest.mark.parametrize("count", [0, 8, 10])
def test_a_wrong_length_is_named_with_the_right_one(count: int) -> None:
    with pytest.raises(InputError, match=f"survival_probs has {count} entries; the model has 9 blocks"):
        check_survival_probs([0.5] * count, 9)


@pytest.mark.parametrize("wrong", [0.5, "0.5", None])
def test_what_is_no_list_is_refused(wrong: Any) -> None:
    with pytest.raises(InputError, match=rf"survival_probs is {wrong!r}; it must be a list of numbers \(here\)"):
        check_survival_probs(wrong, 3, "here")


def test_checked_probabilities_are_a_list_of_floats() -> None:
    checked = check_survival_probs((1, 0.5), 2)
    assert checked == [1.0, 0.5]
    assert [type(prob) for prob in checked] == [float, float]


@pytest.mark.parametrize(
    ("arguments", "expected", "explicit"),
    [
        ({}, [0.75, 0.5], False),
        ({"drop_path_rate": 0.2}, [0.9, 0.8], True),
        ({"drop_path_rate": 0}, [1.0, 1.0], True),
        ({"drop_path_rate": 0.0}, [1.0, 1.0], True),
        ({"schedule": "linear_decay"}, [0.75, 0.5], True),
        ({"schedule": "linear"}, [0.75, 0.5], True),
        ({"schedule": "linear", "drop_path_rate": 0.2}, [0.9, 0.8], True),
        ({"schedule": "uniform"}, [0.5, 0.5], True),
        ({"schedule": "uniform", "drop_path_rate": 0.2}, [0.8, 0.8], True),
        ({"schedule": "constant_depth"}, [1.0, 1.0], True),
        ({"schedule": "constant_depth", "drop_path_rate": 0.0}, [1.0, 1.0], True),
        ({"survival_probs": [0.9, 0.3]}, [0.9, 0.3], True),
        ({"survival_probs": (1, 0.3)}, [1.0, 0.3], True),
        ({"schedule": [0.9, 0.3]}, [0.9, 0.3], True),
        ({"schedule": (1, 0.3)}, [1.0, 0.3], True),
        ({"schedule": "stagewise", "survival_probs": [0.9, 0.3], "blocks_per_stage": [1, 1]}, [0.9, 0.3], True),
        ({"schedule": "stagewise", "survival_probs": [0.9], "blocks_per_stage": (2,)}, [0.9, 0.9], True),
        ({"blocks_per_stage": [1, 1]}, [0.75, 0.5], False),
        ({"survival_probs": [0.9, 0.3], "blocks_per_stage": [2]}, [0.9, 0.3], True),
    ],
)
def test_arguments_say_the_probabilities_and_whether_they_were_asked_for(
    arguments: dict[str, Any], expected: list[float], explicit: bool
) -> None:
    probs, asked_for = resolve_survival_probs(2, **arguments)
    assert probs == pytest.approx(expected, abs=1e-15)
    assert asked_for is explicit


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"survival_probs": [1, 1], "drop_path_rate": 0.0}, "give it without drop_path_rate and schedule"),
        ({"survival_probs": [1, 1], "schedule": "uniform"}, "give it without drop_path_rate and schedule"),
        ({"survival_probs": [1]}, "has 1 entries; the model has 2 blocks"),
        ({"survival_probs": [1, 1.5]}, r"survival_probs\[1\] is 1.5; each must lie in \(0, 1\]"),
        ({"schedule": "constant_depth", "drop_path_rate": 0.1}, "drops nothing, but drop_path_rate is 0.1"),
        ({"schedule": "linear_decy"}, "linear, uniform, constant_depth, stagewise; nearest: linear_decay$"),
        ({"schedule": "quadratic"}, '"quadratic"; known: linear_decay, linear, uniform, constant_depth, stagewise$'),
        ({"schedule": 0.5}, 'schedule is "0.5"; known: linear_decay'),
        ({"schedule": [1]}, "has 1 entries; the model has 2 blocks"),
        ({"schedule": []}, "has 0 entries; the model has 2 blocks"),
        ({"schedule": [1, 1.5]}, r"survival_probs\[1\] is 1.5; each must lie in \(0, 1\]"),
        ({"schedule": [1, 1], "survival_probs": [1, 1]}, "both lists of probabilities: give one of the two"),
        ({"schedule": [1, 1], "drop_path_rate": 0.1}, "give it without drop_path_rate and schedule"),
        ({"drop_path_rate": 1.0}, r"drop_path_rate is 1.0; it must lie in \[0, 1\)"),
        ({"drop_path_rate": -0.1}, "drop_path_rate is -0.1"),
        ({"drop_path_rate": math.nan}, "drop_path_rate is nan"),
        ({"drop_path_rate": "0.5"}, "drop_path_rate is '0.5'"),
    ],
)
def test_arguments_that_contradict_or_leave_the_range_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        resolve_survival_probs(2, **arguments)


# For a model of two stages, of one and of two blocks
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"blocks_per_stage": None}, "stagewise needs a model that says its blocks_per_stage; this one has 3 blocks"),
        ({"survival_probs": None}, "needs survival_probs, one for each of 2 stages, of 1, 2 blocks"),
        ({"drop_path_rate": 0.0}, "one for each of 2 stages, of 1, 2 blocks: give it without drop_path_rate"),
        ({"survival_probs": [1, 1, 1]}, r"has 3 entries; the model has 2 stages \(stagewise, of 1, 2 blocks\)"),
        ({"survival_probs": [1]}, r"has 1 entries; the model has 2 stages \(stagewise, of 1, 2 blocks\)"),
        ({"survival_probs": [1, 1.5]}, r"survival_probs\[1\] is 1.5; each must lie in \(0, 1\] \(2 stages, stagewise"),
        ({"survival_probs": 0.5}, "survival_probs is 0.5; it must be a list of numbers"),
        ({"blocks_per_stage": [1, 1]}, "has 2 entries; the model has 3 blocks"),
    ],
)
def test_a_stagewise_schedule_says_the_stages_where_it_is_refused(arguments: dict[str, Any], message: str) -> None:
    fitting = {"schedule": "stagewise", "survival_probs": [0.9, 0.8], "blocks_per_stage": [1, 2]}
    assert resolve_survival_probs(3, **fitting) == ([0.9, 0.8, 0.8], True)
    with pytest.raises(InputError, match=message):
        resolve_survival_probs(3, **{**fitting, **arguments})


def test_linear_is_another_name_of_linear_decay() -> None:
    assert SCHEDULES["linear"](7, 0.3) == linear_decay(7, 0.3)


# stagewise


def test_stagewise_repeats_each_stages_probability() -> None:
    assert stagewise([0.9, 0.8, 0.7, 0.6], [3, 4, 6, 3]) == [0.9] * 3 + [0.8] * 4 + [0.7] * 6 + [0.6] * 3
    assert stagewise((1,), (2,)) == [1.0, 1.0]


@pytest.mark.parametrize("count", [0, 2, 4])
def test_stagewise_of_another_number_of_stages_is_refused(count: int) -> None:
    message = f"survival_probs has {count} entries; the model has 3 stages (stagewise, of 3, 4, 5 blocks)"
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        stagewise([0.5] * count, [3, 4, 5])


@pytest.mark.parametrize("wrong", NOT_PROBABILITIES)
def test_stagewise_names_the_stage_that_is_out_of_range(wrong: Any) -> None:
    with pytest.raises(InputError, match=rf"survival_probs\[1\] is {re.escape(repr(wrong))}; .* \(2 stages"):
        stagewise([0.9, wrong], [3, 4])


@pytest.mark.parametrize("lengths", [[], [3, 0], [-1, 3], [3, 2.5], [3, True], [3, "4"]])
def test_stagewise_needs_stages_with_blocks(lengths: list[Any]) -> None:
    with pytest.raises(InputError, match=rf"blocks_per_stage is {re.escape(repr(lengths))}; each stage must have"):
        stagewise([0.5] * len(lengths), lengths)


# budget


def lowest_mean(probs: list[float], p_min: float) -> float:
    return math.fsum(1 if p == 1 else p_min for p in probs) / len(probs)


def budget_by_bisection(probs: list[float], mean: float, p_min: float) -> list[float]:
    """Return the same by halving an interval of k, in exact arithmetic but for the halving's end."""
    drops, limit = [1 - Fraction(p) for p in probs], Fraction(p_min)

    def clipped(k: Fraction) -> list[Fraction]:
        return [max(limit, 1 - k * drop) if drop else Fraction(1) for drop in drops]

    low, high = Fraction(0), 1 / min((drop for drop in drops if drop), default=Fraction(1))
    for _ in range(120):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(clipped(middle)) > Fraction(mean) * len(probs) else (low, middle)
    return [float(p) for p in clipped(low)]


@settings(deadline=None)
@given(probs=PROBS, p_min=st.floats(1e-3, 1), share=st.floats(0, 1))
def test_a_budget_has_the_mean_that_was_asked_for(probs: list[float], p_min: float, share: float) -> None:
    lowest = lowest_mean(probs, p_min)
    mean = min(1.0, lowest + share * (1 - lowest))
    planned = budget(probs, mean, p_min)
    assert math.fsum(planned) / len(probs) == pytest.approx(mean, abs=1e-9)
    assert all(p_min <= p <= 1 for p in planned)
    by_drop = sorted(zip(probs, planned, strict=True))
    assert all(a <= b for (_, a), (_, b) in itertools.pairwise(by_drop)), "the order is kept"
    assert all(a == b for (p, a), (q, b) in itertools.pairwise(by_drop) if p == q)
    # One k: where nothing was clipped, the drop rates are those of the schedule times the same number.
    free = [(1 - p, 1 - q) for p, q in zip(probs, planned, strict=True) if q > p_min]
    assert all(q * d == pytest.approx(r * c, abs=1e-9) for (c, q), (d, r) in itertools.combinations(free, 2))


@settings(deadline=None, max_examples=50)
@given(
    probs=st.lists(st.floats(0.01, 0.999), min_size=1, max_size=9), p_min=st.floats(0.01, 0.9), share=st.floats(0, 1)
)
def test_a_budget_is_what_bisection_finds(probs: list[float], p_min: float, share: float) -> None:
    mean = p_min + share * (1 - p_min)
    assert budget(probs, mean, p_min) == pytest.approx(budget_by_bisection(probs, mean, p_min), abs=1e-9)


def test_budgets_by_hand() -> None:
    assert budget([0.8, 0.6], 0.85) == pytest.approx([0.9, 0.8], abs=1e-15)  # k = 1/2
    assert budget([0.8, 0.6], 0.55) == pytest.approx([0.7, 0.4], abs=1e-15)  # k = 3/2
    assert budget([0.8, 0.6], 0.3, p_min=0.2) == pytest.approx([0.4, 0.2], abs=1e-15)  # k = 3, the second at its limit
    assert budget([1, 0.5], 0.6, p_min=0.1) == pytest.approx([1, 0.2], abs=1e-15)
    assert budget(linear_decay(54), 0.6)[-1] == pytest.approx(1 - 0.5 * 0.4 / (1 - 40.25 / 54), abs=1e-12)


def test_a_schedule_on_its_own_budget_is_itself() -> None:
    assert budget(linear_decay(54), 40.25 / 54) == pytest.approx(linear_decay(54), abs=1e-12)


@settings(deadline=None)
@given(probs=PROBS, p_min=st.floats(1e-3, 1))
def test_a_budget_of_one_computes_everything(probs: list[float], p_min: float) -> None:
    assert budget(probs, 1, p_min) == [1.0] * len(probs)


@pytest.mark.parametrize("probs", [[0.5] * 3, [0.9, 0.5], linear_decay(600), [1.0, 1.0, 0.3]])
@pytest.mark.parametrize("p_min", [0.05, 0.1, 1 / 3])
def test_the_lowest_budget_drops_as_far_as_it_may(probs: list[float], p_min: float) -> None:
    planned = budget(probs, lowest_mean(probs, p_min), p_min)
    assert planned == pytest.approx([1 if p == 1 else p_min for p in probs], abs=1e-9)


@pytest.mark.parametrize(
    ("probs", "mean", "p_min", "lowest"),
    [
        ([1.0, 1.0], 0.99, 0.05, 1),
        ([0.5] * 9, 0.049, 0.05, 0.05),
        ([0.5] * 9, 0.3, 0.4, 0.4),
        ([1.0, 0.9, 0.9, 0.9], 0.28, 0.05, 0.2875),
        ([1.0, 0.9, 0.9], 0.3, 0.05, 0.3666666667),
    ],
)
def test_a_budget_that_cannot_be_kept_says_which_can(
    probs: list[float], mean: float, p_min: float, lowest: float
) -> None:
    with pytest.raises(
        InputError, match=rf"mean is {mean}; the lowest that can be reached is {lowest}: \d of"
    ) as caught:
        budget(probs, mean, p_min)
    assert f"{sum(p < 1 for p in probs)} of {len(probs)} blocks drop, down to p_min = {p_min}" in str(caught.value)
    assert math.fsum(budget(probs, lowest, p_min)) / len(probs) == pytest.approx(lowest, abs=1e-9), "what is said holds"


@pytest.mark.parametrize("name", ["mean", "p_min"])
@pytest.mark.parametrize("wrong", NOT_PROBABILITIES)
def test_a_budget_out_of_range_is_refused(name: str, wrong: Any) -> None:
    with pytest.raises(InputError, match=rf"^{name} is {re.escape(repr(wrong))}; it must lie in \(0, 1\]$"):
        budget([0.5, 0.5], **{"mean": 0.9, name: wrong})


@pytest.mark.parametrize(("probs", "message"), [([], "empty"), ([0.5, 1.5], r"\[1\] is 1.5"), (0.5, "list of numbers")])
def test_a_budget_of_no_schedule_is_refused(probs: Any, message: str) -> None:
    with pytest.raises(InputError, match=rf"{message}.*the schedule of a budget"):
        budget(probs, 0.9)


# warm_up


@pytest.mark.parametrize(
    ("epoch", "expected"),
    [
        (0, [1, 1, 1]),
        (1, [1, 0.9, 0.8]),
        (2.5, [1, 0.75, 0.5]),
        (5, [1, 0.5, 0]),
        (5.5, [1, 0.5, 0]),
        (99, [1, 0.5, 0]),
    ],
)
def test_warm_up_falls_from_one_in_step_with_the_epochs(epoch: float, expected: list[float]) -> None:
    """``expected`` for p = 1, 0.5 and, but for 1e-30, 0."""
    assert warm_up([1, 0.5, 1e-30], epoch, 5) == pytest.approx(expected, abs=1e-15)


@settings(deadline=None)
@given(probs=PROBS, epoch=st.floats(0, 1e6), warmup_epochs=st.floats(0.01, 1e6))
def test_warm_up_stays_between_one_and_the_schedule(probs: list[float], epoch: float, warmup_epochs: float) -> None:
    drawn = warm_up(probs, epoch, warmup_epochs)
    assert all(p <= q <= 1 for p, q in zip(probs, drawn, strict=True))
    share = min(1, epoch / warmup_epochs)
    assert [1 - q for q in drawn] == pytest.approx([share * (1 - p) for p in probs], abs=1e-12)


@given(probs=PROBS, epochs=st.floats(0, 1e6))
def test_after_the_warm_up_the_draw_is_the_schedules_to_the_bit(probs: list[float], epochs: float) -> None:
    assert warm_up(probs, epochs, epochs) == probs
    assert warm_up(probs, epochs, 0) == probs
    assert warm_up(probs, 0, 0) == probs
    assert warm_up(probs, 0, 1 + epochs) == [1.0] * len(probs)


@pytest.mark.parametrize("name", ["epoch", "warmup_epochs"])
@pytest.mark.parametrize("wrong", [-1, -0.5, math.nan, math.inf, "1", None, True])
def test_epochs_that_cannot_be_are_refused(name: str, wrong: Any) -> None:
    with pytest.raises(InputError, match=rf"^{name} is {re.escape(repr(wrong))}; it must be a number of at least 0$"):
        warm_up([0.5], **{"epoch": 1, "warmup_epochs": 2, name: wrong})


@pytest.mark.parametrize("wrong", NOT_PROBABILITIES)
def test_warm_up_refuses_what_is_no_probability(wrong: Any) -> None:
    with pytest.raises(InputError, match=r"survival_probs\[1\] .*warm_up"):
        warm_up([0.5, wrong], 1, 2)


@pytest.mark.parametrize("miss", [1e-6, 1e-8])
def test_a_budget_just_out_of_reach_is_refused(miss: float) -> None:
    lowest = 0.5 * (1 + 0.2)
    assert sum(budget([1.0, 0.9], lowest, p_min=0.2)) / 2 == pytest.approx(lowest, abs=1e-12)
    with pytest.raises(InputError, match=r"lowest that can be reached is 0\.6"):
        budget([1.0, 0.9], lowest - miss, p_min=0.2)


@pytest.mark.parametrize("arguments", [(0, 0.5), (-1, 0.5), (3.5, 0.5), (3, "a"), (3, None), (True, 0.5)])
def test_schedules_check_their_arguments(arguments: tuple[Any, Any]) -> None:
    for function in (linear_decay, uniform):
        with pytest.raises(InputError, match=r"num_blocks is|final_survival_prob is"):
            function(*arguments)
