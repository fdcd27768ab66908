"""Give a network's BatchNorms the statistics of its own weights, as evaluation needs them.

An untrained network's running statistics (mean 0, variance 1) are not those of its activations: without this, 110
layers in evaluation end in logits of millions, 1202 in NaN. A trained one's are those of the shallower networks that
its gates left over, a moving average: at full depth, with every branch weighted by p, they are slightly others.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sdzoo.errors import InputError
from sdzoo.gate import fixed_gates, gates


@torch.no_grad()
def calibrate_batchnorm(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Replace the running statistics of every BatchNorm, in place, by the average over ``batches``, all gates open.

    A batch weighs as many as its images. The weights and the training mode of every module stay as they are.

    Raises:
        InputError: without batches, or if the model has no gates.
    """
    batches, open_gates = _not_empty(batches), [1] * len(gates(model))
    with _fresh_statistics(model) as norms, fixed_gates(model.train(), open_gates):
        for batch in _weighing_by_images(norms, batches):
            model(batch)


@torch.no_grad()
def recalibrate_batchnorm(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Replace the running statistics of every BatchNorm, in place, by the average over ``batches`` at full depth.

    A batch weighs as many as its images. Every block is computed and weighted by p, as in evaluation; dropout is off.
    The weights and the training mode of every module stay as they are.

    Raises:
        InputError: without batches.
    """
    batches = _not_empty(batches)
    with _fresh_statistics(model) as norms:
        model.eval()
        for norm in norms:
            norm.train()
        for batch in _weighing_by_images(norms, batches):
            model(batch)


@contextmanager
def _fresh_statistics(model: nn.Module) -> Iterator[list[nn.BatchNorm2d]]:
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    modes = {module: module.training for module in model.modules()}
    for norm in norms:
        norm.reset_running_stats()
    try:
        yield norms
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, training in modes.items():
            module.training = training


def _weighing_by_images(norms: list[nn.BatchNorm2d], batches: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield ``batches``, each with the momentum at which the running statistics are the average over all images."""
    images = 0
    for batch in batches:
        images += len(batch)
        for norm in norms:
            norm.momentum = len(batch) / images
        yield batch


def _not_empty(batches: Iterable[Tensor]) -> Iterator[Tensor]:
    iterator = iter(batches)
    first = next(iterator, None)
    if first is None:
        raise InputError("no batches to take the statistics from")
    return itertools.chain([first], iterator)
