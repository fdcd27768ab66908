from __future__ import annotations

import itertools

import pytest
import torch
from small_sets import named_generator

from sdzoo.training.data.order import held_out, micro_batches
from sdzoo.training.distributed import Shard

COUNT, SEED, EPOCH, TOGETHER = 203, 5, 3, 24
SPREADS = [(1, 1), (2, 1), (1, 2), (2, 3), (3, 4), (4, 2)]


def spread(world: int, accum: int, start_step: int = 0, epoch: int = EPOCH, seed: int = SEED) -> list[list[list[int]]]:
    """Return ``[rank][micro-batch][sample]``."""
    size = TOGETHER // world // accum
    return [
        [b.tolist() for b in micro_batches(COUNT, seed, epoch, size, accum, Shard(rank, world), start_step)]
        for rank in range(world)
    ]


@pytest.mark.parametrize(("world", "accum"), SPREADS)
def test_micro_batches_are_strided_slices_of_one_order(world: int, accum: int) -> None:
    order = torch.randperm(COUNT, generator=named_generator(SEED, "order", EPOCH)).tolist()
    ranks = spread(world, accum)
    for rank in range(world):
        assert len(ranks[rank]) == COUNT // TOGETHER * accum
        for number, batch in enumerate(ranks[rank]):
            step, micro = divmod(number, accum)
            chunk = order[step * TOGETHER : (step + 1) * TOGETHER]
            assert batch == [
                chunk[place] for place in range(TOGETHER) if place % (world * accum) == rank + world * micro
            ]


@pytest.mark.parametrize(("world", "accum"), SPREADS[1:])
def test_every_step_holds_what_a_single_process_takes(world: int, accum: int) -> None:
    alone, ranks = spread(1, 1)[0], spread(world, accum)
    for step, together in enumerate(alone):
        parts = itertools.chain(*(rank[step * accum : (step + 1) * accum] for rank in ranks))
        assert sorted(itertools.chain(*parts)) == sorted(together)


@pytest.mark.parametrize("start_step", [0, 1, 5, 8])
def test_an_epoch_goes_on_at_any_step(start_step: int) -> None:
    for whole, rest in zip(spread(2, 2), spread(2, 2, start_step), strict=True):
        assert rest == whole[start_step * 2 :]


def test_no_sample_twice_and_another_order_for_other_epochs_and_seeds() -> None:
    orders = [list(itertools.chain(*spread(1, 1, epoch=epoch, seed=seed)[0])) for epoch in (0, 1) for seed in (5, 6)]
    for order in orders:
        assert len(order) == len(set(order)) == COUNT // TOGETHER * TOGETHER
    assert len({tuple(order) for order in orders}) == 4


@pytest.mark.parametrize("number", [1, 50, 202])
def test_what_is_held_out_and_what_is_left_are_disjoint_and_all(number: int) -> None:
    left, kept = held_out(COUNT, number, SEED)
    assert kept.tolist() == sorted(torch.randperm(COUNT, generator=named_generator(SEED, "held_out"))[:number].tolist())
    assert sorted(left.tolist() + kept.tolist()) == list(range(COUNT))
    assert left.tolist() == sorted(left.tolist())
    assert held_out(COUNT, number, SEED + 1)[1].tolist() != kept.tolist()
