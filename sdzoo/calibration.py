"""Give a network's BatchNorms the statistics of its own weights, as evaluation needs them.

An untrained network's running statistics (mean 0, variance 1) are not those of its activations: without this, 110
layers in evaluation end in logits of millions, 1202 in NaN.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from sdzoo.errors import InputError
from sdzoo.gate import fixed_gates, gates


@torch.no_grad()
def calibrate_batchnorm(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Replace the running statistics of every BatchNorm, in place, by the average over ``batches``, all gates open.

    The weights and the training mode of every module stay as they are.

    Raises:
        InputError: without batches, or if the model has no gates.
    """
    batches = list(batches)
    if not batches:
        raise InputError("no batches to take the statistics from")
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    modes = {module: module.training for module in model.modules()}
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average, not an exponential one
    model.train()
    try:
        with fixed_gates(model, [1] * len(gates(model))):
            for batch in batches:
                model(batch)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, training in modes.items():
            module.training = training
