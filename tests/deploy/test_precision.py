from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sdzoo.deploy.precision import check_images, check_precision, judge
from sdzoo.deploy.verification import Images
from sdzoo.errors import InputError, ParityError
from sdzoo.parity import Accuracy, Parity

CLASSES = ("cat", "dog", "frog")


def images(count: int, labels: Tensor | None = None, made: bool = False) -> Images:
    """Return images of 1x1 pixels, the n-th of which is n modulo 3."""
    names = [f"{index}.png" for index in range(count)]
    classes = () if labels is None else CLASSES
    return Images("those", names, lambda i: np.full((1, 1, 1), i % 3, np.uint8), classes, labels, made)


def answers(scale: float = 1.0) -> Callable[[Tensor], Tensor]:
    """Return what answers a pixel of n with class n."""
    return lambda batch: scale * torch.eye(3)[batch[:, 0, 0, 0].long()]


def wrong_after(right: int) -> Callable[[Tensor], Tensor]:
    """Return what answers so to the first ``right`` images, and with the next class from then on."""
    seen = 0

    def compute(batch: Tensor) -> Tensor:
        nonlocal seen
        shift = torch.arange(seen, seen + len(batch)) >= right
        seen += len(batch)
        return torch.eye(3)[(batch[:, 0, 0, 0].long() + shift) % 3]

    return compute


@pytest.mark.parametrize("precision", ["fp8", "FP16", "", "float16", None])
def test_unknown_precision(precision: Any) -> None:
    with pytest.raises(InputError) as caught:
        check_precision(precision)
    assert f'precision "{precision}" is unknown; known: fp32, fp16, int8' in str(caught.value)


def test_fp16_takes_a_thousand_real_images() -> None:
    check_images("fp16", images(1000))
    with pytest.raises(InputError, match=r"fp16 is compared on at least 1000 real images .*given are those"):
        check_images("fp16", images(999))
    with pytest.raises(InputError, match="at least 1000 real images"):
        check_images("fp16", images(2000, made=True))


def test_int8_takes_200_labelled_images() -> None:
    """So that one image is at most half a point."""
    check_images("int8", images(200, torch.arange(200) % 3))
    for given in (images(200), images(199, torch.arange(199) % 3)):
        with pytest.raises(InputError, match=r"at least 200 images in class folders \(--images DIR\); given are those"):
            check_images("int8", given)


@pytest.mark.parametrize("points", ["a", None, float("nan"), -0.1, 100.1, float("inf")])
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_loss_that_cannot_be(points: Any, precision: str) -> None:
    with pytest.raises(InputError, match=f"max_drop is {points}; it is in points of top-1, 0 to 100"):
        judge(answers(), answers(), images(300, torch.arange(300) % 3), precision, points)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_both_are_computed_in_full_float32_on_a_gpu_too(precision: str) -> None:
    """Whatever the user set, which is found again afterwards."""
    backends: tuple[Any, ...] = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = True
    seen: list[bool] = []

    def watched(batch: Tensor) -> Tensor:
        seen.extend(backend.allow_tf32 for backend in backends)
        return answers()(batch)

    try:
        judge(watched, watched, images(200, torch.arange(200) % 3), precision)
        assert set(seen) == {False}
        assert all(backend.allow_tf32 for backend in backends)
    finally:
        for backend, allowed in zip(backends, before, strict=True):
            backend.allow_tf32 = allowed


@pytest.mark.parametrize("count", [1, 10, 84, 100])
def test_images_that_come_again_are_compared_and_not_counted(count: int) -> None:
    proof = judge(answers(), answers(), images(count), "fp32")
    assert isinstance(proof, Parity)
    assert (proof.images, proof.top1_equal, proof.top1_below_margin) == (count, count, 0)
    assert proof.batch_sizes[:4] == (1, 2, 17, 64)
    seen = 0

    def wrong_at_last(batch: Tensor) -> Tensor:
        nonlocal seen
        seen += len(batch)
        return answers()(batch) + (seen >= 84)

    with pytest.raises(ParityError, match="batch of 64"):
        judge(answers(), wrong_at_last, images(count), "fp32")


def test_fp32_takes_any() -> None:
    check_images("fp32", images(1, made=True))


@pytest.mark.parametrize(("precision", "factor"), [("fp32", 1e-4), ("fp16", 1e-2)])
@pytest.mark.parametrize("size", [0.5, 50.0])
def test_the_limit_of_each_precision(precision: str, factor: float, size: float) -> None:
    """max|a - b| <= factor * max(1, max|a|)."""

    def off_by(share: float) -> Callable[[Tensor], Tensor]:
        return lambda batch: answers(size)(batch) + share * factor * max(1, size)

    proof = judge(answers(size), off_by(0.98), images(1000), precision)
    assert isinstance(proof, Parity)
    assert proof.tol == factor
    assert proof.max_abs_diff == pytest.approx(0.98 * factor * max(1, size), rel=1e-2)
    assert (proof.images, proof.batch_sizes[:4]) == (1000, (1, 2, 17, 64))
    with pytest.raises(ParityError, match=r"image 0 \(0.png\), output"):
        judge(answers(size), off_by(1.02), images(1000), precision)


def test_fp16_keeps_top1_on_99_5_percent() -> None:
    """Differences are within the limit: all logits nearly tie."""

    def nearly(compute: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda batch: 1e-3 * compute(batch)

    proof = judge(nearly(answers()), nearly(wrong_after(995)), images(1000), "fp16")
    assert isinstance(proof, Parity)
    assert proof.top1_equal == 995
    with pytest.raises(ParityError, match=r"equal on 994 of 1000 images, 99.40 %; at least 99.5 % .* at 994.png"):
        judge(nearly(answers()), nearly(wrong_after(994)), images(1000), "fp16")


@pytest.mark.parametrize("count", [200, 1000])
def test_int8_is_judged_by_the_accuracy_it_loses(count: int) -> None:
    """However far off the logits are."""
    given = images(count, torch.arange(count) % 3)
    proof = judge(answers(), answers(1000), given, "int8")
    assert isinstance(proof, Accuracy)
    assert (proof.top1_percent_before, proof.top1_percent_after, proof.top1_equal) == (100, 100, count)
    assert proof.images == count  # each once, however few


def test_int8_may_lose_half_a_point_or_what_is_said() -> None:
    given = images(1000, torch.arange(1000) % 3)
    proof = judge(answers(), wrong_after(995), given, "int8")
    assert isinstance(proof, Accuracy)
    assert proof.top1_percent_after == 99.5
    with pytest.raises(
        ParityError, match=r"top-1 100.00 % before, 99.40 % after \(-0.60 points, at most -0.5 allowed\) on 1000 images"
    ):
        judge(answers(), wrong_after(994), given, "int8")
    judge(answers(), wrong_after(990), given, "int8", max_drop=1)
    with pytest.raises(ParityError):
        judge(answers(), wrong_after(989), given, "int8", max_drop=1)


def test_int8_may_gain() -> None:
    given = images(300, torch.arange(300) % 3)
    proof = judge(wrong_after(100), answers(), given, "int8", max_drop=0)
    assert isinstance(proof, Accuracy)
    assert proof.top1_percent_before == pytest.approx(100 / 3)
    assert proof.top1_percent_after == 100


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_int8_outputs_must_be_finite_and_of_the_same_classes(bad: float) -> None:
    given = images(200, torch.arange(200) % 3)
    with pytest.raises(ParityError, match="not finite"):
        judge(answers(), lambda batch: answers()(batch) * bad, given, "int8")
    with pytest.raises(ParityError, match=r"the output is \(1, 2\), the reference's \(1, 3\)"):
        judge(answers(), lambda batch: answers()(batch)[:, :2], given, "int8")
