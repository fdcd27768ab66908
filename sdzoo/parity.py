"""Parity: whether two callables compute the same function on the same inputs, by one rule everywhere.

A batch passes if ``max|a - b| <= tol * max(1, max|a|)``, a being the reference; any non-finite value fails. Top-1 must
agree for every image whose two best reference logits are further apart than twice the allowed difference; the others
are counted. (An absolute limit would say nothing: logits of deep networks range over orders of magnitude.)

Half precision has a wider limit and, since that no longer settles top-1, a share of images on which it must agree.
Integers are another function altogether: there, what counts is the accuracy that they lose.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sdzoo.errors import ParityError

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10}
Compute = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Parity:
    """A comparison that passed.

    Attributes:
        tol: The limit's factor.
        images: How many were compared, each counted once.
        batch_sizes: Which sizes of batch there were, in the order in which each came first.
        max_abs_diff: Of the batch that came closest to its limit, as are ``allowed`` and ``max_abs_reference``.
        allowed: The limit.
        max_abs_reference: The reference's largest value.
        top1_equal: Images whose best class is the same.
        top1_below_margin: Images whose two best classes are too close for the limit to tell them apart.
    """

    tol: float
    images: int
    batch_sizes: tuple[int, ...]
    max_abs_diff: float
    allowed: float
    max_abs_reference: float
    top1_equal: int
    top1_below_margin: int

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return dataclasses.asdict(self) | {"batch_sizes": list(self.batch_sizes)}

    def __str__(self) -> str:
        text = f"|difference| {self.max_abs_diff:.2g} of {self.allowed:.2g} allowed in the batch nearest its limit"
        if self.top1_equal or self.top1_below_margin:  # else the output is no logits
            text += f", top-1 equal on {self.top1_equal} of {self.images} images"
        if self.top1_below_margin:
            text += f", {self.top1_below_margin} too close to call"
        return text


@dataclass(frozen=True)
class Accuracy:
    """A loss of accuracy that is allowed: top-1 on labelled images before and after, in percent, and in points."""

    images: int
    top1_percent_before: float
    top1_percent_after: float
    max_drop_points: float
    top1_equal: int

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        return (
            f"top-1 {self.top1_percent_before:.2f} % before, {self.top1_percent_after:.2f} % after "
            f"({self.top1_percent_after - self.top1_percent_before:+.2f} points, at most {0 - self.max_drop_points:g} "
            f"allowed) on {self.images} images"
        )


@contextmanager
def full_float32() -> Iterator[None]:
    """Compute float32 as such on a GPU too, not in TF32, whose ten bits of mantissa do not hold the limit."""
    backends: tuple[Any, ...] = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = False
        yield
    finally:
        for backend, allowed in zip(backends, before, strict=True):
            backend.allow_tf32 = allowed


@full_float32()
def compare(
    reference: Compute,
    candidate: Compute,
    batches: Iterable[Tensor],
    tol: float | None = None,
    top1_percent: float = 0.0,
    name: Callable[[int], str] | None = None,
    distinct: int | None = None,
) -> Parity:
    """Return how close ``candidate`` is to ``reference`` on ``batches`` of inputs ``(B, ...)``.

    Args:
        reference: The model that was trained.
        candidate: What shall replace it.
        batches: At least one.
        tol: Default: 1e-4 for float32, 1e-10 for float64 outputs of the reference.
        top1_percent: On how many images, of all, top-1 must be equal in any case.
        name: What errors call the image that comes n-th over all batches.
        distinct: How many images there are, if they come again after that; those are compared, and not counted.

    Raises:
        ParityError: with the image, the output and the figures, as soon as a batch fails; or with the share of images
            whose top-1 is equal, after the last one.
    """
    sizes: dict[int, None] = {}
    seen, worst, equal, below = 0, (0.0, 0.0, 0.0), 0, 0
    first_other = None
    for batch in batches:
        with torch.inference_mode():
            a, b = reference(batch).detach().cpu(), candidate(batch).detach().cpu()
        tol = TOLERANCE.get(a.dtype, 1e-4) if tol is None else tol
        where = f"batch of {len(batch)}"
        if a.shape != b.shape:
            raise ParityError(f"{where}: the output is {tuple(b.shape)}, the reference's {tuple(a.shape)}")
        for side, values in (("reference", a), ("candidate", b)):
            if not torch.isfinite(values).all():
                raise ParityError(f"{where}: the {side}'s output is not finite")
        diff, size = (a.double() - b.double()).abs(), a.abs().max().item()
        allowed = tol * max(1.0, size)
        if diff.max().item() > allowed:
            place = [int(i) for i in torch.unravel_index(diff.argmax(), diff.shape)]
            called = f" ({name(seen + place[0])})" if name else ""
            raise ParityError(
                f"{where}: image {place[0]}{called}, output {place[1:]} is {b[tuple(place)]:.6g}, the reference's "
                f"{a[tuple(place)]:.6g}: differs by {diff.max():.2g}, allowed {allowed:.2g}"
            )
        if a.ndim == 2 and a.shape[1] > 1:
            best = a.topk(2, dim=1).values
            # That top-1 agrees wherever the margin is clear follows from the limit; what is counted is the rest.
            clear, same = best[:, 0] - best[:, 1] > 2 * allowed, a.argmax(1) == b.argmax(1)
            if distinct is not None:
                clear, same = (of[: max(0, distinct - seen)] for of in (clear, same))
            equal += int(same.sum())
            below += int((~clear).sum())
            if first_other is None and not same.all():
                first_other = seen + int((~same).nonzero()[0])
        seen += len(batch)
        sizes[len(batch)] = None
        if not worst[1] or diff.max().item() / allowed > worst[0] / worst[1]:
            worst = (diff.max().item(), allowed, size)
    images = seen if distinct is None else min(seen, distinct)
    if tol is None or not images:
        raise ParityError("nothing was compared: no batches")
    if 100 * equal < top1_percent * images:
        first = f", the first at {name(first_other)}" if name and first_other is not None else ""
        raise ParityError(
            f"top-1 is equal on {equal} of {images} images, {100 * equal / images:.2f} %; "
            f"at least {top1_percent:g} % must be{first}"
        )
    return Parity(tol, images, tuple(sizes), *worst, equal, below)


@full_float32()
def compare_accuracy(
    reference: Compute, candidate: Compute, batches: Iterable[tuple[Tensor, Tensor]], max_drop_points: float
) -> Accuracy:
    """Return the top-1 of ``reference`` and of ``candidate`` on ``batches`` of inputs ``(B, ...)`` and labels ``(B,)``.

    An image whose label is -1 is computed, and does not count.

    Raises:
        ParityError: if ``candidate`` loses more than ``max_drop_points``, or computes anything that is not finite.
    """
    images = before = after = equal = 0
    for batch, labels in batches:
        with torch.inference_mode():
            a, b = reference(batch).detach().cpu(), candidate(batch).detach().cpu()
        where = f"batch of {len(batch)}"
        if a.shape != b.shape:
            raise ParityError(f"{where}: the output is {tuple(b.shape)}, the reference's {tuple(a.shape)}")
        if not torch.isfinite(a).all() or not torch.isfinite(b).all():
            raise ParityError(f"{where}: an output is not finite")
        counts = labels >= 0
        best_a, best_b, labels = a.argmax(1)[counts], b.argmax(1)[counts], labels[counts]
        images += len(labels)
        before += int((best_a == labels).sum())
        after += int((best_b == labels).sum())
        equal += int((best_a == best_b).sum())
    if not images:
        raise ParityError("nothing was compared: no images")
    accuracy = Accuracy(images, 100 * before / images, 100 * after / images, max_drop_points, equal)
    if 100 * (before - after) > max_drop_points * images:
        raise ParityError(str(accuracy))
    return accuracy
