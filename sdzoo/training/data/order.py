"""Which samples make which micro-batch of which rank: a function of seed, epoch and step, kept nowhere."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sdzoo.training.distributed import Shard
from sdzoo.training.streams import stream


def micro_batches(
    count: int, seed: int, epoch: int, batch_size: int, accum: int, shard: Shard, start_step: int = 0
) -> Iterator[Tensor]:
    """Yield the indices of this rank's micro-batches, ``accum`` a step, from ``start_step`` to the epoch's end.

    A step covers G = batch_size * world * accum samples; the last, partial step is left out. What the ranks and
    micro-batches of a step hold together does not depend on how many they are.

    Args:
        count: Samples of the training set.
        seed: The run's.
        epoch: From 0.
        batch_size: Samples of one micro-batch of one rank.
        accum: Micro-batches that one rank accumulates for a step.
        shard: Which rank this is, of how many.
        start_step: The first step of the epoch to yield.
    """
    order = torch.randperm(count, generator=stream(seed, "order", epoch))
    stride = shard.world * accum
    together = batch_size * stride
    for step in range(start_step, count // together):
        samples = order[step * together : (step + 1) * together]
        for micro in range(accum):
            yield samples[shard.rank + shard.world * micro :: stride]


def held_out(count: int, number: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return the indices to train on and the ``number`` held out, both ascending: disjoint, together ``range(count)``.

    The choice follows from the seed alone, whatever the epoch, the ranks or the batch size.
    """
    order = torch.randperm(count, generator=stream(seed, "held_out"))
    return order[number:].sort().values, order[:number].sort().values
