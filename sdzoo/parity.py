"""Parity: whether two callables compute the same function on the same inputs, by one rule everywhere.

A batch passes if ``max|a - b| <= tol * max(1, max|a|)``, a being the reference; any non-finite value fails. Top-1 must
agree for every image whose two best reference logits are further apart than twice the allowed difference; the others
are counted. (An absolute limit would say nothing: logits of deep networks range over orders of magnitude.)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sdzoo.errors import ParityError

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10}


@dataclass(frozen=True)
class Parity:
    """A comparison that passed. ``max_abs_diff``, ``allowed`` and ``max_abs_reference`` are of the worst batch."""

    tol: float
    batch_sizes: tuple[int, ...]
    max_abs_diff: float
    allowed: float
    max_abs_reference: float
    top1_equal: int
    top1_below_margin: int

    @property
    def images(self) -> int:
        """How many images were compared."""
        return sum(self.batch_sizes)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return dataclasses.asdict(self) | {"images": self.images}

    def __str__(self) -> str:
        text = f"max |difference| {self.max_abs_diff:.2g} of {self.allowed:.2g} allowed"
        if self.top1_equal or self.top1_below_margin:  # else the output is no logits
            text += f", top-1 equal on {self.top1_equal} of {self.images} images"
        if self.top1_below_margin:
            text += f", {self.top1_below_margin} too close to call"
        return text


def compare(
    reference: Callable[[Tensor], Tensor],
    candidate: Callable[[Tensor], Tensor],
    batches: Iterable[Tensor],
    tol: float | None = None,
) -> Parity:
    """Return how close ``candidate`` is to ``reference`` on ``batches`` of inputs ``(B, ...)``.

    Args:
        reference: The model that was trained.
        candidate: What shall replace it.
        batches: At least one.
        tol: Default: 1e-4 for float32, 1e-10 for float64 outputs of the reference.

    Raises:
        ParityError: with the image, the output and the figures, as soon as a batch fails.
    """
    sizes: list[int] = []
    worst, equal, below = (0.0, 0.0, 0.0), 0, 0
    for batch in batches:
        with torch.inference_mode():
            a, b = reference(batch).detach().cpu(), candidate(batch).detach().cpu()
        tol = TOLERANCE.get(a.dtype, 1e-4) if tol is None else tol
        where = f"batch of {len(batch)}"
        if a.shape != b.shape:
            raise ParityError(f"{where}: the output is {tuple(b.shape)}, the reference's {tuple(a.shape)}")
        for name, values in (("reference", a), ("candidate", b)):
            if not torch.isfinite(values).all():
                raise ParityError(f"{where}: the {name}'s output is not finite")
        diff, size = (a.double() - b.double()).abs(), a.abs().max().item()
        allowed = tol * max(1.0, size)
        if diff.max().item() > allowed:
            place = [int(i) for i in torch.unravel_index(diff.argmax(), diff.shape)]
            raise ParityError(
                f"{where}: image {place[0]}, output {place[1:]} is {b[tuple(place)]:.6g}, the reference's "
                f"{a[tuple(place)]:.6g}: differs by {diff.max():.2g}, allowed {allowed:.2g}"
            )
        if a.ndim == 2 and a.shape[1] > 1:
            best = a.topk(2, dim=1).values
            # That top-1 agrees wherever the margin is clear follows from the limit; what is counted is the rest.
            clear, same = best[:, 0] - best[:, 1] > 2 * allowed, a.argmax(1) == b.argmax(1)
            equal += int(same.sum())
            below += int((~clear).sum())
        sizes.append(len(batch))
        if not worst[1] or diff.max().item() / allowed > worst[0] / worst[1]:
            worst = (diff.max().item(), allowed, size)
    if tol is None or not sizes:
        raise ParityError("nothing was compared: no batches")
    return Parity(tol, tuple(sizes), *worst, equal, below)
