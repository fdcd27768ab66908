from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from small_sets import named_seed, recipe
from torch import Tensor

from sdzoo.errors import InputError
from sdzoo.training.data.mixing import Mixing

CLASSES = 5
MODES: dict[str, dict[str, Any]] = {
    "mixup": {"mixup": 0.4},
    "cutmix": {"cutmix": 1.0},
    "minmax": {"cutmix_minmax": [0.3, 0.8]},
    "both": {"mixup": 0.4, "cutmix": 1.0, "mixup_prob": 0.8},
}


def batch(count: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 3, 12, 12, generator=generator), torch.randint(CLASSES, (count,), generator=generator)


def mixing(**changes: Any) -> Mixing:
    return Mixing(recipe(**changes), CLASSES)


def smoothed(labels: Tensor, smoothing: float) -> Tensor:
    return torch.eye(CLASSES)[labels] * (1 - smoothing) + smoothing / CLASSES


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("world", "accum"), [(2, 1), (4, 1), (1, 2), (2, 4)])
def test_ranks_and_micro_batches_together_get_what_one_process_gets(mode: str, world: int, accum: int) -> None:
    images, labels = batch()
    stride = world * accum
    changed = 0
    for step in range(6):
        expected, targets = mixing(**MODES[mode])(images, labels, step, 0)
        changed += not torch.equal(expected, images)
        for place in range(stride):
            part, part_targets = mixing(**MODES[mode])(images[place::stride], labels[place::stride], step, 0)
            assert torch.equal(part, expected[place::stride])
            assert torch.equal(part_targets, targets[place::stride])
    assert changed > 2


def test_mixup_is_lambda_of_the_sample_and_the_rest_of_the_one_half_a_batch_on() -> None:
    images, labels = batch()
    partner = torch.arange(16).roll(8)
    for step in range(5):
        np.random.seed(named_seed(7, "mixup", step) % 2**32)
        np.random.rand()  # timm asks first whether to mix at all
        share = np.random.beta(0.4, 0.4)
        got, targets = mixing(mixup=0.4, smoothing=0.2)(images, labels, step, 0)
        torch.testing.assert_close(got, share * images + (1 - share) * images[partner])
        hot = smoothed(labels, 0.2)
        torch.testing.assert_close(targets, share * hot + (1 - share) * hot[partner])


def test_cutmix_takes_a_rectangle_of_the_partner_and_counts_its_pixels() -> None:
    images, labels = batch()
    partner = torch.arange(16).roll(8)
    seen = set()
    for step in range(8):
        got, targets = mixing(cutmix=1.0, smoothing=0.0)(images, labels, step, 0)
        theirs = (got != images).any(dim=1)
        assert torch.equal(torch.where(theirs[:, None], images[partner], images), got)
        assert all(torch.equal(theirs[0], mask) for mask in theirs)
        share = 1 - theirs[0].float().mean()
        torch.testing.assert_close(
            targets, share * torch.eye(CLASSES)[labels] + (1 - share) * torch.eye(CLASSES)[labels[partner]]
        )
        seen.add(float(share))
    assert len(seen) > 4


def test_other_steps_and_seeds_mix_otherwise() -> None:
    images, labels = batch()
    results = [mixing(mixup=0.4, seed=seed)(images, labels, step, 0)[1] for seed in (1, 2) for step in (0, 1)]
    assert all(not torch.equal(one, other) for i, one in enumerate(results) for other in results[:i])


def test_its_arguments_and_the_global_generators_are_left_alone() -> None:
    images, labels = batch()
    before = images.clone(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # type: ignore[index]
    mixing(mixup=0.4)(images, labels, 0, 0)
    assert torch.equal(images, before[0])
    assert np.random.get_state()[1].tolist() == before[1]  # type: ignore[index]
    assert torch.equal(torch.get_rng_state(), before[2])


def test_from_mixup_off_epoch_on_targets_are_only_smoothed() -> None:
    images, labels = batch()
    mix = mixing(mixup=0.4, mixup_off_epoch=3, smoothing=0.1)
    assert [mix.active(epoch) for epoch in range(5)] == [True, True, True, False, False]
    got, targets = mix(images, labels, 0, 3)
    assert torch.equal(got, images)
    torch.testing.assert_close(targets, smoothed(labels, 0.1))
    assert not torch.equal(mix(images, labels, 0, 2)[0], images)


def test_a_recipe_without_mixing_is_never_active() -> None:
    assert not mixing().active(0)
    assert all(mixing(**options).active(10**6) for options in MODES.values())


def test_an_odd_batch_is_refused() -> None:
    with pytest.raises(InputError, match="batch_size is 5"):
        mixing(mixup=0.4)(*batch(5), 0, 0)
