"""Read and change the survival probabilities of a model, its evaluation function kept."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import nn

from sdzoo.gate import float32, gates
from sdzoo.residual import residual_blocks
from sdzoo.schedule import check_survival_probs


def survival_probs(model: nn.Module) -> list[float]:
    """Return p of every gate, input to output: the shortest decimals that are the stored float32 numbers.

    A residual block has one gate, a transformer block one for each of its two branches.

    Raises:
        InputError: if ``model`` has none: a folded model has them in its weights.
    """
    return [float(str(np.float32(gate.read()))) for gate in gates(model)]


def set_survival(model: nn.Module, probs: Sequence[float]) -> None:
    """Give every gate its p of ``probs``, in place, and rescale its branch by p_old / p_new.

    Training changes; the evaluation function stays within rounding. An EMA of the model needs the same call: timm's
    averages the weights from before with those from after.

    Raises:
        InputError: if there is not one number in (0, 1] per gate, or a weight would overflow; nothing has changed then.
    """
    probs = check_survival_probs(probs, len(gates(model)), "set_survival", "gates")
    branches = [(block, gate) for _, block in residual_blocks(model) for gate in block.gate_names]
    for (block, gate), p in zip(branches, probs, strict=True):
        block.scaled_branch(getattr(block, gate).read() / float32(p), gate)  # raises before anything has changed
    for (block, gate), p in zip(branches, probs, strict=True):
        block.set_survival_prob(p, gate)
