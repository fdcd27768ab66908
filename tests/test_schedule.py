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
    check_survival_probs,
    constant_depth,
    linear_decay,
    resolve_survival_probs,
    uniform,
)


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


@pytest.mark.parametrize("wrong", [0, 0.0, -0.1, 1.2, math.nan, math.inf, -math.inf, "0.5", None, True])
def test_an_entry_out_of_range_is_named_with_its_index(wrong: Any) -> None:
    probs = [0.9] * 6 + [wrong] + [0.9] * 2
    message = f"survival_probs[6] is {wrong!r}; each must lie in (0, 1] (9 blocks, here)"
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        check_survival_probs(probs, 9, "here")


@pytest.mark.parametrize("count", [0, 8, 10])
def test_a_wrong_length_is_named_with_the_right_one(count: int) -> None:
    with pytest.raises(InputError, match=f"survival_probs has {count} entries; the model has 9 blocks"):
        check_survival_probs([0.5] * count, 9)


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
        ({"schedule": "uniform"}, [0.5, 0.5], True),
        ({"schedule": "uniform", "drop_path_rate": 0.2}, [0.8, 0.8], True),
        ({"schedule": "constant_depth"}, [1.0, 1.0], True),
        ({"schedule": "constant_depth", "drop_path_rate": 0.0}, [1.0, 1.0], True),
        ({"survival_probs": [0.9, 0.3]}, [0.9, 0.3], True),
        ({"survival_probs": (1, 0.3)}, [1.0, 0.3], True),
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
        ({"schedule": "linear"}, "known: linear_decay, uniform, constant_depth; nearest: linear_decay"),
        ({"schedule": "quadratic"}, '"quadratic"; known: linear_decay, uniform, constant_depth$'),
        ({"drop_path_rate": 1.0}, r"drop_path_rate is 1.0; it must lie in \[0, 1\)"),
        ({"drop_path_rate": -0.1}, "drop_path_rate is -0.1"),
        ({"drop_path_rate": math.nan}, "drop_path_rate is nan"),
        ({"drop_path_rate": "0.5"}, "drop_path_rate is '0.5'"),
    ],
)
def test_arguments_that_contradict_or_leave_the_range_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        resolve_survival_probs(2, **arguments)
