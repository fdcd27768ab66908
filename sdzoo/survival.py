"""Read and change the survival probabilities of a model, its evaluation function kept."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import nn

from sdzoo.blocks import ResidualBlock
from sdzoo.gate import gates
from sdzoo.schedule import check_survival_probs


def survival_probs(model: nn.Module) -> list[float]:
    """Return p_l of every residual block, input to output: the shortest decimals that are the stored float32 numbers.

    Raises:
        InputError: if ``model`` has none: a folded model has them in its weights.
    """
    return [float(str(np.float32(gate.read()))) for gate in gates(model)]


def set_survival(model: nn.Module, probs: Sequence[float]) -> None:
    """Give every residual block its p_l of ``probs``, in place, and rescale its branch by p_old / p_new.

    Training changes; the evaluation function stays within rounding.

    Raises:
        InputError: if there is not one number in (0, 1] per block; nothing has changed then.
    """
    probs = check_survival_probs(probs, len(gates(model)), "set_survival")
    blocks = [module for module in model.modules() if isinstance(module, ResidualBlock) and module.gate is not None]
    for block, p in zip(blocks, probs, strict=True):
        block.set_survival_prob(p)
