from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from sdzoo.errors import ParityError
from sdzoo.parity import Accuracy, Parity, compare, compare_accuracy

TOL = 2.0**-10  # powers of two, so that the limits below are exact


def constant(*outputs: Tensor) -> Callable[[Tensor], Tensor]:
    """Return a callable that gives ``outputs``, one a call, whatever it is called with."""
    remaining = list(outputs)
    return lambda _: remaining.pop(0)


def compared(a: Tensor, b: Tensor, tol: float | None = TOL) -> Parity:
    return compare(constant(a), constant(b), [torch.zeros(len(a), 1)], tol)


def differing(a: Tensor, b: Tensor, tol: float | None = TOL) -> str:
    with pytest.raises(ParityError) as caught:
        compared(a, b, tol)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize(
    ("values", "allowed"),
    [([0.0, 0.25], TOL), ([0.0, 1.0], TOL), ([0.0, 8.0], 8 * TOL), ([0.0, -8.0], 8 * TOL), ([0.0, -0.5], TOL)],
)
def test_the_limit_is_tol_times_the_largest_reference_but_at_least_tol(
    values: list[float], allowed: float, sign: int
) -> None:
    a = torch.tensor([values], dtype=torch.float64)
    at_the_limit, beyond = a.clone(), a.clone()
    at_the_limit[0, 0] += sign * allowed
    beyond[0, 0] += sign * math.nextafter(allowed, 1)
    parity = compared(a, at_the_limit)
    assert parity.max_abs_diff == parity.allowed == allowed
    assert parity.max_abs_reference == max(abs(value) for value in values)
    assert "allowed" in differing(a, beyond)


def test_the_largest_reference_is_that_of_the_batch_not_of_the_image() -> None:
    a = torch.tensor([[0.0, 0.5], [0.0, 64.0]], dtype=torch.float64)
    b = a.clone()
    b[0, 0] += 64 * TOL
    assert compared(a, b).allowed == 64 * TOL
    assert "batch of 1" in differing(a[:1], b[:1])


def test_the_largest_reference_is_not_the_candidates() -> None:
    a, b = torch.tensor([[1.0, 0.0]]), torch.tensor([[1000.0, 0.0]])
    assert "allowed 0.001" in differing(a, b, tol=1e-3)


@pytest.mark.parametrize(("dtype", "tol"), [(torch.float32, 1e-4), (torch.float64, 1e-10)])
@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_default_tolerance_follows_the_reference_dtype(dtype: torch.dtype, tol: float, scale: float) -> None:
    a = torch.tensor([[scale, 0.0]], dtype=dtype)
    inside, beyond = a.clone(), a.clone()
    inside[0, 1], beyond[0, 1] = 0.99 * tol * scale, 1.01 * tol * scale
    assert compared(a, inside, None).tol == tol
    differing(a, beyond, None)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", ["reference", "candidate", "both"])
def test_non_finite_values_fail_on_either_side(bad: float, side: str) -> None:
    a, b = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    if side != "candidate":
        a[1, 0] = bad
    if side != "reference":
        b[1, 0] = bad
    message = differing(a, b)
    assert "not finite" in message
    assert ("reference" if side != "candidate" else "candidate") in message


def test_a_pair_of_infinities_does_not_lift_the_limit() -> None:
    a, b = torch.tensor([[math.inf, 0.0]]), torch.tensor([[math.inf, 5.0]])
    assert "not finite" in differing(a, b)


def test_top1_below_the_margin_may_differ_and_is_counted() -> None:
    """Margins, with 2 * allowed = 0.25: image 0 far above; 1 a tie broken the other way; 2 within; 3 exactly on it."""
    tol = 0.125 / 8
    a = torch.tensor([[8.0, 0.0, 0.0], [1.0, 1.0, 0.0], [1.0, 1.125, 0.0], [1.0, 1.25, 0.0]], dtype=torch.float64)
    b = a.clone()
    b[1, 1] += 0.0625
    b[2] = torch.tensor([1.125, 1.0, 0.0])
    parity = compared(a, b, tol)
    assert parity.top1_below_margin == 3  # "exceeds" twice the allowed difference: on it is not clear
    assert parity.top1_equal == 2  # images 0 and 3
    assert "top-1 equal on 2 of 4 images, 3 too close to call" in str(parity)


def test_top1_above_the_margin_is_counted_as_equal() -> None:
    a = torch.eye(5, dtype=torch.float64)
    parity = compared(a, a + TOL)
    assert (parity.top1_equal, parity.top1_below_margin) == (5, 0)
    assert "too close" not in str(parity)


@pytest.mark.parametrize("shape", [(4, 1), (4, 3, 2, 2), (4,)])
def test_outputs_that_are_no_logits_have_no_top1(shape: tuple[int, ...]) -> None:
    a = torch.ones(shape)
    parity = compared(a, a.clone())
    assert (parity.top1_equal, parity.top1_below_margin) == (0, 0)
    assert "top-1" not in str(parity)


@pytest.mark.parametrize(("a", "b"), [((2, 3), (2, 4)), ((2, 3), (2, 3, 1)), ((2, 3), (1, 3)), ((2, 1), (2, 3))])
def test_shapes_must_be_equal_also_where_they_would_broadcast(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    message = differing(torch.zeros(a), torch.zeros(b))
    assert str(a) in message
    assert str(b) in message


def test_message_holds_image_output_and_figures() -> None:
    a = torch.zeros(17, 10)
    a[5, 7] = 4.0
    b = a.clone()
    b[3, 2] = 0.004  # also over, but not the worst
    b[11, 4] = -0.0625
    message = differing(a, b, tol=2.0**-11)
    assert "batch of 17: image 11, output [4] is -0.0625, the reference's 0: differs by 0.062, allowed 0.002" in message


def test_message_names_the_place_in_a_feature_map() -> None:
    a = torch.zeros(2, 3, 4, 5)
    b = a.clone()
    b[1, 2, 3, 4] = 1.0
    assert "image 1, output [2, 3, 4]" in differing(a, b)


def test_figures_are_of_the_batch_that_came_closest_to_its_limit() -> None:
    """A smaller difference may come closer: 1 of 2 allowed, then 100 of 1000, then 1.5 of 2."""
    outputs = [torch.tensor([[size, 0.0]], dtype=torch.float64) for size in (2.0, 1000.0, 2.0)]
    others = [out + torch.tensor([[0.0, diff]]) for out, diff in zip(outputs, (1.0, 100.0, 1.5), strict=True)]
    parity = compare(constant(*outputs), constant(*others), [torch.zeros(1, 1)] * 3, 1.0)
    assert (parity.max_abs_diff, parity.allowed, parity.max_abs_reference) == (1.5, 2.0, 2.0)
    assert str(parity).startswith("|difference| 1.5 of 2 allowed in the batch nearest its limit, top-1 ")


def test_every_batch_counts() -> None:
    batches = [torch.eye(10)[:size] for size in (1, 2, 7)]
    parity = compare(lambda x: x, lambda x: x.clone(), batches)
    assert parity.batch_sizes == (1, 2, 7)
    assert parity.images == parity.top1_equal == 10
    with pytest.raises(ParityError, match=r"batch of 7: image 6"):
        compare(lambda x: x, lambda x: x + (x.cumsum(0) - x) * (torch.arange(len(x)) == 6)[:, None], batches)


def test_stops_at_the_first_batch_that_fails() -> None:
    sizes: list[int] = []

    def candidate(x: Tensor) -> Tensor:
        sizes.append(len(x))
        return x + 1

    with pytest.raises(ParityError):
        compare(lambda x: x, candidate, [torch.zeros(1, 2), torch.zeros(2, 2)])
    assert sizes == [1]


@pytest.mark.parametrize("tol", [None, 1e-4])
def test_comparing_nothing_proves_nothing(tol: float | None) -> None:
    with pytest.raises(ParityError, match="nothing was compared"):
        compare(lambda x: x, lambda x: x, [], tol)


def test_no_graph_is_recorded() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    seen: list[bool] = []

    def reference(x: Tensor) -> Tensor:
        out = x * weight
        seen.append(out.requires_grad)
        return out

    compare(reference, lambda x: x.clone(), [torch.ones(1, 2)])
    assert seen == [False]


def test_as_dict_is_plain_json() -> None:
    parity = compare(lambda x: x, lambda x: x.clone(), [torch.eye(3), torch.eye(3)[:2]])
    assert json.loads(json.dumps(parity.as_dict())) == {
        "tol": 1e-4,
        "images": 5,
        "batch_sizes": [3, 2],
        "max_abs_diff": 0.0,
        "allowed": 1e-4,
        "max_abs_reference": 1.0,
        "top1_equal": 5,
        "top1_below_margin": 0,
    }


@settings(max_examples=60, deadline=None)
@given(data=st.data(), scale=st.sampled_from([1e-3, 1.0, 1e6]))
def test_the_rule_on_any_arrays(data: st.DataObject, scale: float) -> None:
    shape = data.draw(st.tuples(st.integers(1, 4), st.integers(1, 5)))
    numbers = st.floats(-1, 1, width=32)
    a = data.draw(arrays(np.float64, shape, elements=numbers)) * scale
    b = a + data.draw(arrays(np.float64, shape, elements=numbers)) * data.draw(st.sampled_from([0, 1e-5, 1e-3])) * scale
    diff, allowed = np.abs(a - b).max(), 1e-4 * max(1.0, np.abs(a).max())
    if diff > allowed:
        differing(torch.from_numpy(a), torch.from_numpy(b), 1e-4)
    else:
        parity = compared(torch.from_numpy(a), torch.from_numpy(b), 1e-4)
        assert parity.max_abs_diff == diff
        if shape[1] > 1:
            best = np.sort(a, axis=1)
            assert parity.top1_below_margin == (best[:, -1] - best[:, -2] <= 2 * allowed).sum()


# What precisions below float32 are held to


def test_sizes_of_batch_are_each_named_once_in_order() -> None:
    batches = [torch.eye(10)[:size] for size in (1, 2, 7, 7, 2, 3)]
    parity = compare(lambda x: x, lambda x: x.clone(), batches)
    assert (parity.batch_sizes, parity.images) == ((1, 2, 7, 3), 22)


def test_the_image_is_called_by_its_name_over_all_batches() -> None:
    batches = [torch.zeros(size, 3) for size in (1, 2, 4)]
    outputs = [torch.zeros(size, 3) for size in (1, 2, 4)]
    outputs[2][3, 1] = 1.0
    with pytest.raises(ParityError, match=r"batch of 4: image 3 \(picture 6\), output \[1\] is 1"):
        compare(lambda x: x.clone(), constant(*outputs), batches, name=lambda position: f"picture {position}")


@pytest.mark.parametrize(("same", "passes"), [(10, True), (9, True), (8, False)])
def test_share_of_images_on_which_top1_must_be_equal(same: int, passes: bool) -> None:
    """Ten images in three batches, whose logits all but tie; those after ``same`` answer otherwise."""
    a = torch.tensor([[0.0, 1e-5]]).repeat(10, 1)
    b = a.clone()
    b[same:] = a[same:].flip(1)
    pieces = [(0, 1), (1, 4), (4, 10)]

    def run() -> Parity:
        return compare(
            constant(*(a[i:j] for i, j in pieces)),
            constant(*(b[i:j] for i, j in pieces)),
            [torch.zeros(j - i, 1) for i, j in pieces],
            tol=1e-2,
            top1_percent=90,
            name=lambda position: f"picture {position}",
        )

    if passes:
        assert run().top1_equal == same
    else:
        message = r"^top-1 is equal on 8 of 10 images, 80.00 %; at least 90 % must be, the first at picture 8$"
        with pytest.raises(ParityError, match=message):
            run()


def labelled_pairs(*batches: int) -> list[tuple[Tensor, Tensor]]:
    return [(torch.zeros(size, 1), torch.zeros(size, dtype=torch.long)) for size in batches]


def answering(*classes: list[int]) -> Callable[[Tensor], Tensor]:
    return constant(*(torch.eye(3)[torch.tensor(row)] for row in classes))


def test_accuracy_before_and_after() -> None:
    accuracy = compare_accuracy(
        answering([0, 0], [0, 1, 0]), answering([0, 1], [0, 1, 2]), labelled_pairs(2, 3), max_drop_points=40
    )
    assert accuracy == Accuracy(5, 80.0, 40.0, 40, 3)
    assert str(accuracy) == ("top-1 80.00 % before, 40.00 % after (-40.00 points, at most -40 allowed) on 5 images")
    assert json.loads(json.dumps(accuracy.as_dict()))["top1_percent_after"] == 40.0
    assert "at most 0 allowed" in str(replace(accuracy, max_drop_points=0))
    with pytest.raises(ParityError, match=r"top-1 80\.00 % before, 40\.00 % after .* at most -39\.9 allowed"):
        compare_accuracy(
            answering([0, 0], [0, 1, 0]), answering([0, 1], [0, 1, 2]), labelled_pairs(2, 3), max_drop_points=39.9
        )


def test_accuracy_on_nothing_proves_nothing() -> None:
    with pytest.raises(ParityError, match="nothing was compared"):
        compare_accuracy(answering(), answering(), [], 0.5)


@pytest.mark.parametrize("side", [0, 1])
def test_accuracy_of_what_is_not_finite(side: int) -> None:
    outputs = [torch.zeros(2, 3), torch.zeros(2, 3)]
    outputs[side][1, 2] = math.nan
    with pytest.raises(ParityError, match="batch of 2: an output is not finite"):
        compare_accuracy(constant(outputs[0]), constant(outputs[1]), labelled_pairs(2), 100)
