"""The gate: decides once per mini-batch whether a residual branch is computed at all.

Training draws ``b ~ Bernoulli(p)`` and a block with ``b = 0`` is skipped, forward and backward; evaluation weights the
branch by p (Huang et al., 2016, equations 2 and 5).
"""

import math
import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sdzoo.errors import InputError, nearest
from sdzoo.schedule import check_survival_probs

MODES = ("batch", "sample")


class Gate(nn.Module):
    """The survival probability p of one residual block, and the draws from it.

    p is kept twice, the same float32 number: as a Python float for the draw (no host synchronisation) and as the
    persistent buffer ``survival_prob`` for evaluation and the state dict. :meth:`set` and loading write both; what
    copies into the buffer alone (timm's EMA does) is noticed by :meth:`read`.

    Args:
        survival_prob: p, in (0, 1].
        mode: ``"batch"`` draws one gate per mini-batch and skips; ``"sample"`` multiplies by an unscaled 0/1 mask per
            sample and computes everything (for whole-graph compilation).
        explicit: Whether the user asked for this p; loading then keeps it and rescales the weights instead.
    """

    if TYPE_CHECKING:  # at run time TorchScript would trip over the annotations
        survival_prob: Tensor
        draw_prob: float | None
        planned: bool | None
        last_draw: bool | None

    def __init__(
        self,
        survival_prob: float = 1.0,
        mode: str = "batch",
        explicit: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if mode not in MODES:
            raise InputError(f'mode is "{mode}"; known: {", ".join(MODES)}{nearest(str(mode), MODES)}')
        self.p = float32(survival_prob)
        self.mode = mode
        self.explicit = explicit
        self.draw_prob = None
        self.planned = None
        self.last_draw = None
        self.register_buffer("survival_prob", torch.full((), self.p, dtype=torch.float32, device=device))

    def set(self, survival_prob: float) -> None:
        """Set p, the float and the buffer, both to the nearest float32."""
        self.p = float32(survival_prob)
        self.survival_prob = torch.full((), self.p, dtype=torch.float32, device=self.survival_prob.device)

    def read(self) -> float:
        """Return p from the buffer, and draw with it from now on."""
        if not self.survival_prob.is_meta:
            self.p = float(self.survival_prob)
        return self.p

    def train(self, mode: bool = True) -> "Gate":
        """Switch between drawing and weighting by p."""
        self.read()
        return super().train(mode)

    def closed(self) -> bool:
        """Return whether the branch is left out: in training with one gate per mini-batch, if the draw says so."""
        if not self.training or self.mode != "batch":
            return False
        return not self.draw()

    @torch.jit.unused
    def draw(self) -> bool:
        """Return whether the branch is computed in this mini-batch: the planned bit if there is one, else a draw.

        Draws from torch's global CPU generator, which gradient checkpointing restores; p = 1 draws nothing.
        """
        p = self._draw_prob()
        is_open = self.planned if self.planned is not None else p >= 1 or torch.rand((), device="cpu").item() < p
        self.last_draw = is_open
        return is_open

    def _draw_prob(self) -> float:
        return self.p if self.draw_prob is None else self.draw_prob

    @torch.jit.unused
    def sample_mask(self, branch: Tensor) -> Tensor:
        """Return an unscaled 0/1 mask ``(B, 1, ...)`` for ``branch`` ``(B, ...)``, drawn on its device."""
        shape = (branch.shape[0],) + (1,) * (branch.ndim - 1)
        if self.planned is not None:
            return branch.new_full(shape, float(self.planned))
        p = self._draw_prob()
        if p >= 1:
            return branch.new_ones(shape)
        return (torch.rand(shape, device=branch.device) < p).to(branch.dtype)

    def forward(self, branch: Tensor) -> Tensor:
        """Return ``branch`` ``(B, ...)``: weighted by p in evaluation; in training as it is, or masked per sample."""
        if not self.training:
            return branch * self.survival_prob
        return branch if self.mode == "batch" else branch * self.sample_mask(branch)

    def _apply(self, fn: Any, recurse: bool = True) -> "Gate":
        p = self.read()
        super()._apply(fn, recurse)
        self.set(p)  # half(), bfloat16() and to_empty() lose digits of p, or all of it
        return self

    def _load_from_state_dict(  # type: ignore[override]
        self, state_dict: dict[str, Any], prefix: str, *args: Any
    ) -> None:
        key, error_msgs = prefix + "survival_prob", args[-1]
        if key in state_dict:
            stored = state_dict[key]
            p = float32(float(stored)) if stored.numel() == 1 else math.nan
            if not 0 < p <= 1:
                error_msgs.append(f"{key} is {stored.tolist()}; a survival probability must lie in (0, 1]")
                p = self.read()
            self.set(p)
            device = stored.device if self.survival_prob.is_meta else self.survival_prob.device
            state_dict[key] = torch.tensor(p, dtype=torch.float32, device=device)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"survival_prob={self.p:.6g}, mode={self.mode!r}"


class OpenGate(nn.Module):
    """What stands in a block's gate when p is in the weights, or before it has one: the branch counts in full."""

    def closed(self) -> bool:
        """Return False."""
        return False

    def forward(self, branch: Tensor) -> Tensor:
        """Return ``branch``."""
        return branch


def float32(number: float) -> float:
    """Return the nearest float32 number; infinity beyond its range."""
    if abs(number) > 2.0**128:
        return math.copysign(math.inf, number)
    return float(struct.unpack("f", struct.pack("f", number))[0])


class _ZeroGradients(torch.autograd.Function):
    """``(x, *parameters) -> x``, whose backward hands every parameter that wants a gradient a zero one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.parameters = parameters  # for their shape and strides only; nothing is read in backward
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[1:]
        zeros = (torch.zeros_like(p) if w else None for p, w in zip(ctx.parameters, wanted, strict=True))
        return grads[0], *zeros


def with_zero_gradients(x: Tensor, parameters: Iterable[nn.Parameter]) -> Tensor:
    """Return a view of ``x`` through which every trainable one of ``parameters`` gets a zero gradient.

    Zero, not None: DDP then needs no search for unused parameters, and SGD's weight decay and momentum act on a skipped
    block as in the authors' code. An in-place operation must not follow directly: the result is a view.
    """
    wanted = [p for p in parameters if p.requires_grad] if torch.is_grad_enabled() else []
    if not wanted:
        return x
    return _ZeroGradients.apply(x, *wanted)  # type: ignore[no-any-return]


def gates(model: nn.Module) -> list[Gate]:
    """Return the gates of ``model``, input to output.

    Raises:
        InputError: if it has none, as a folded model.
    """
    found = [module for module in model.modules() if isinstance(module, Gate)]
    if not found:
        raise InputError(f"{type(model).__name__} has no gates: it is folded, or not a stochastic-depth model")
    return found


def live_blocks(model: nn.Module) -> list[bool]:
    """Return which residual blocks the last training forward computed, input to output.

    Raises:
        InputError: if no forward in training has drawn yet, or the gates are per sample (nothing is skipped then).
    """
    draws = [gate.last_draw for gate in gates(model)]
    if any(draw is None for draw in draws):
        raise InputError('no gates drawn yet: call the model in training mode, with mode="batch", first')
    return [bool(draw) for draw in draws]


@contextmanager
def fixed_gates(model: nn.Module, bits: Sequence[bool | int]) -> Iterator[None]:
    """Make every training forward inside the ``with`` use ``bits``, one per gate, input to output, instead of drawing.

    Under gradient checkpointing the backward belongs inside too: it computes the blocks again.

    Raises:
        InputError: if there is not one 0 or 1 per gate, or a gate is in evaluation, where it would have no effect.
    """
    found, bits = gates(model), list(bits)
    if len(bits) != len(found):
        raise InputError(f"bits has {len(bits)} entries; the model has {len(found)} gates")
    for index, bit in enumerate(bits):
        if bit not in (0, 1):
            raise InputError(f"bits[{index}] is {bit!r}; each must be 0 (skip) or 1 (compute)")
    if not all(gate.training for gate in found):
        raise InputError("gates are drawn in training only; the model is in evaluation: call model.train() first")
    before = [gate.planned for gate in found]
    for gate, bit in zip(found, bits, strict=True):
        gate.planned = bool(bit)
    try:
        yield
    finally:
        for gate, planned in zip(found, before, strict=True):
            gate.planned = planned


def set_draw_probs(model: nn.Module, probs: Sequence[float] | None) -> None:
    """Draw with ``probs`` in training, one per gate, instead of p; None: with p again.

    For schedules over epochs (:func:`sdzoo.warm_up`): evaluation and the state dict keep p.

    Raises:
        InputError: if there is not one number in (0, 1] per gate; nothing has changed then.
    """
    found = gates(model)
    checked = (
        [None] * len(found) if probs is None else check_survival_probs(probs, len(found), "set_draw_probs", "gates")
    )
    for gate, prob in zip(found, checked, strict=True):
        gate.draw_prob = prob
