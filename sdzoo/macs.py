"""Multiply-accumulates of a model, in evaluation and, on average over the gates, in training."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from sdzoo.gate import Gate, fixed_gates, gates


@dataclass(frozen=True)
class Macs:
    """Multiply-accumulates of one image's forward; ``training`` is the mean over the gates: what is dropped is free."""

    evaluation: int
    training: float


def count_macs(model: nn.Module, input_size: Sequence[int]) -> Macs:
    """Return what one image of ``input_size`` (C, H, W) costs ``model``, which is left alone.

    Raises:
        InputError: if the model has no gates.
    """
    model = copy.deepcopy(model)  # a forward in training counts its batches
    first = next(model.parameters())
    image = torch.zeros(1, *input_size, device=first.device, dtype=first.dtype)
    blocks = [module for module in model.modules() if gates_of(module)]
    macs, computed = _macs(model.eval(), image, blocks)
    with fixed_gates(model.train(), [0] * len(gates(model))):
        base, skipped = _macs(model, image, blocks)
    # Gates of one block share p, and each draws for itself: its branches count by the same p.
    probs = [gates_of(block)[0].read() for block in blocks]
    dropped = sum(p * (a - b) for p, a, b in zip(probs, computed, skipped, strict=True))
    return Macs(macs, base + dropped)


def gates_of(module: nn.Module) -> list[Gate]:
    """Return the gates that are ``module``'s own."""
    return [child for child in module.children() if isinstance(child, Gate)]


def _macs(model: nn.Module, image: Tensor, blocks: Sequence[nn.Module]) -> tuple[int, list[int]]:
    """Return the multiply-accumulates of a forward, and those inside each block."""
    flops = dict.fromkeys(blocks, 0)

    def enter(block: nn.Module, *_: object) -> None:
        flops[block] -= counter.get_total_flops()

    def leave(block: nn.Module, *_: object) -> None:
        flops[block] += counter.get_total_flops()

    hooks = [block.register_forward_pre_hook(enter) for block in blocks]
    hooks += [block.register_forward_hook(leave) for block in blocks]
    with FlopCounterMode(display=False) as counter, _WithoutBatchNorm(), torch.no_grad():
        model(image)
    for hook in hooks:
        hook.remove()
    return counter.get_total_flops() // 2, [count // 2 for count in flops.values()]


class _WithoutBatchNorm(TorchFunctionMode):
    """Leaves BatchNorm out, of which nothing is counted: on the meta device it takes longer than all else."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0] if func is F.batch_norm else func(*args, **(kwargs or {}))
