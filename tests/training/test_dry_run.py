"""What a dry run says of a recipe's cost, and that it leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from sdzoo.errors import InputError
from sdzoo.training.dry_run import Cost, dry_run
from sdzoo.training.model import create_model
from sdzoo.training.recipe import Recipe, SdzooSettings
from sdzoo.training.step import Trainer

MakeRecipe = Callable[..., Recipe]


def macs(model: nn.Module, side: int = 32) -> dict[str, int]:
    """Return, of every convolution and linear layer, outputs times the weights that make one, for an image."""
    found: dict[str, int] = {}

    def count(name: str) -> Callable[[Any, Any, Tensor], None]:
        def hook(module: Any, _: Any, output: Tensor) -> None:
            found[name] = output.numel() * module.weight[0].numel()

        return hook

    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(count(name))
    with torch.no_grad():
        model.eval()(torch.zeros(1, 3, side, side))
    return found


@pytest.mark.parametrize("drop_path", [0.5, 0.8, 0.0])
def test_cost_against_constant_depth_counts_each_branch_by_its_probability(
    image_folder: Path, make_recipe: MakeRecipe, drop_path: float
) -> None:
    recipe = make_recipe(drop_path=drop_path)
    found = macs(create_model(recipe))
    training = 0.0
    for name, count in found.items():
        block = 3 * (int(name[5]) - 1) + int(name[7]) + 1 if name.startswith("layer") else None
        training += count * (1 - block / 9 * drop_path if block else 1)
    cost = dry_run(recipe, image_folder, "cpu")
    assert len(found) == 20
    assert cost.relative_macs == pytest.approx(training / sum(found.values()), rel=1e-6)


@pytest.mark.parametrize("warmup", [0.5, 2.0])
def test_cost_counts_the_survival_warm_up(image_folder: Path, make_recipe: MakeRecipe, warmup: float) -> None:
    """By the sum over ten thousand moments of the run: p falls from 1 to the recipe's in a straight line."""
    recipe = make_recipe(drop_path=0.5, epochs=3, sdzoo=SdzooSettings(survival_warmup_epochs=warmup))
    found = macs(create_model(recipe))
    moments = [3 * (number + 0.5) / 10_000 for number in range(10_000)]
    begun = sum(min(1.0, moment / warmup) for moment in moments) / len(moments)  # the mean of (1 - p) / (1 - p_l)
    training = 0.0
    for name, count in found.items():
        block = 3 * (int(name[5]) - 1) + int(name[7]) + 1 if name.startswith("layer") else None
        training += count * (1 - block / 9 * 0.5 * begun if block else 1)
    cost = dry_run(recipe, image_folder, "cpu")
    assert cost.relative_macs == pytest.approx(training / sum(found.values()), rel=1e-6)


def test_nothing_is_downloaded_and_no_folder_made(
    tmp_path: Path, make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(*_: object, **__: object) -> None:
        raise AssertionError("a dry run downloads")

    monkeypatch.setattr("torchvision.datasets.CIFAR10.download", download)
    recipe = make_recipe(
        dataset="torch/cifar10",
        dataset_download=True,
        val_split="train",
        num_classes=10,
        sdzoo=SdzooSettings(held_out=5),
    )
    with pytest.raises(InputError, match=r"torch/cifar10 cannot be read in .*a dry run does not; or get it from http"):
        dry_run(recipe, tmp_path / "data", "cpu")
    assert list(tmp_path.iterdir()) == []


def test_weights_of_timms_hub_are_not_fetched(
    image_folder: Path, make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(*_: object, **__: object) -> None:
        raise AssertionError("a dry run downloads")

    name = "sd_resnet18.a1_in1k"
    assert name in timm.list_pretrained()
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", download)
    recipe = make_recipe(model=name, pretrained=True, drop_path=None)
    assert dry_run(recipe, image_folder, "cpu").blocks == 8
    assert dry_run(make_recipe(model=name, drop_path=None), image_folder, "cpu").blocks == 8


def test_steps_images_and_time(image_folder: Path, make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(epochs=7, batch_size=8, grad_accum_steps=2, cooldown_epochs=1)
    cost = dry_run(recipe, image_folder, "cpu")
    assert (cost.training_images, cost.validation_images) == (66, 12)
    assert (cost.steps_per_epoch, cost.epochs, cost.steps) == (4, 8, 32), "cool-down is trained too"
    assert (cost.blocks, cost.processes) == (9, 1)
    assert cost.parameters == sum(p.numel() for p in create_model(recipe).parameters())
    assert 0 < cost.step_s[0] <= cost.step_s[1] <= cost.step_s[2]
    assert cost.training_s == pytest.approx(32 * cost.mean_step_s)
    assert cost.memory_mib > 10


def test_images_held_out_are_counted_once(image_folder: Path, make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(val_split="train", sdzoo=SdzooSettings(held_out=16))
    cost = dry_run(recipe, image_folder, "cpu")
    assert (cost.training_images, cost.validation_images, cost.steps_per_epoch) == (50, 16, 3)


def test_quartiles_are_those_of_the_measured_steps(
    image_folder: Path, make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """12 steps of 1 to 12 seconds, of which the first 2 warm up: 3 to 12 remain."""
    from sdzoo.training import dry_run as module

    now = iter([second for number in range(12) for second in (100.0 * number, 100.0 * number + number + 1)])
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(now))
    monkeypatch.setattr(Trainer, "step", lambda *_: None)
    cost = dry_run(make_recipe(batch_size=2), image_folder, "cpu")
    assert cost.step_s == pytest.approx((5.25, 7.5, 9.75))
    assert cost.mean_step_s == pytest.approx(7.5)


@pytest.mark.parametrize("batch_size", [66, 33])
def test_epochs_of_one_or_two_steps_can_be_measured(
    image_folder: Path, make_recipe: MakeRecipe, batch_size: int
) -> None:
    cost = dry_run(make_recipe(batch_size=batch_size), image_folder, "cpu")
    assert isinstance(cost, Cost)
    assert cost.steps_per_epoch == 66 // batch_size
    assert cost.mean_step_s > 0


def test_nothing_is_written(
    image_folder: Path, tmp_path: Path, make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in image_folder.rglob("*")}
    dry_run(make_recipe(), image_folder, "cpu")
    assert list(tmp_path.iterdir()) == []
    assert {path: path.stat().st_mtime_ns for path in image_folder.rglob("*")} == before


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"batch_size": 67}, "66 training images do not fill one step of 67"),
        ({"val_split": "test"}, "never used for selection"),
        ({"model": "sd_resnet111"}, "nearest: sd_resnet11"),
    ],
)
def test_what_cannot_be_trained_is_refused_as_in_training(
    image_folder: Path, make_recipe: MakeRecipe, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        dry_run(make_recipe(**changes), image_folder, "cpu")


def test_a_learning_rate_that_needs_its_warm_up_does_not_end_a_dry_run(
    image_folder: Path, make_recipe: MakeRecipe
) -> None:
    """What breaks untrained weights in the second step of a run is no reason not to say what the run would cost."""
    falling: dict[str, Any] = {"lr": 1e30, "sched": "multistep", "decay_milestones": [1], "decay_rate": 1e-32}
    assert dry_run(make_recipe(**falling), image_folder, "cpu").steps == 8
