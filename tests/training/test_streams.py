from __future__ import annotations

import hashlib
import itertools

import pytest
import torch

from sdzoo.training.streams import stream, stream_seed


@pytest.mark.parametrize("name", [(42, "gates", 0), (42, "gates", 1), (0, "init"), (-1, "crop", 10**12)])
def test_seed_is_the_first_63_bits_of_the_sha256_of_the_name(name: tuple[str | int, ...]) -> None:
    assert stream_seed(*name) == int(hashlib.sha256(repr(name).encode()).hexdigest()[:16], 16) // 2


def test_seed_is_pinned() -> None:
    """A change would break the resuming of every run there is, and every published figure."""
    assert stream_seed(42, "gates", 0) == 5_101_647_186_136_422_721


def test_neighbouring_seeds_steps_and_names_share_no_stream() -> None:
    names = list(itertools.product(range(30), ("gates", "dropout", "order", "crop", "flip"), range(30)))
    assert len({stream_seed(*name) for name in names}) == len(names)


def test_the_parts_of_a_name_are_kept_apart() -> None:
    assert len({stream_seed(1, 23), stream_seed(12, 3), stream_seed(123), stream_seed("1", "23")}) == 4


def test_same_name_same_numbers_whatever_was_drawn_before() -> None:
    first = torch.rand(100, generator=stream(3, "gates", 5))
    torch.manual_seed(0)
    torch.rand(7)
    assert torch.equal(first, torch.rand(100, generator=stream(3, "gates", 5)))
    assert not torch.equal(first, torch.rand(100, generator=stream(3, "gates", 6)))


def test_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    torch.rand(10, generator=stream(3, "gates", 5))
    assert torch.equal(torch.get_rng_state(), before)


def test_first_draws_of_successive_streams_are_uniform() -> None:
    draws = torch.cat([torch.rand(1, generator=stream(42, "gates", step)) for step in range(4000)])
    assert draws.mean().item() == pytest.approx(0.5, abs=4 * (1 / 12 / 4000) ** 0.5)
    correlation = torch.corrcoef(torch.stack([draws[:-1], draws[1:]]))[0, 1].item()
    assert abs(correlation) < 4 / 4000**0.5
