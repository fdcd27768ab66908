"""Losses, mixing, learning rates and what is trained: each by its formula, written out a second time."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from nets import calibrate, random_images
from runs import after_step, named_seed, same, steps
from torch import Tensor

import sdzoo
from sdzoo.training.checkpoint import describe, load_model, read_checkpoint, save_weights
from sdzoo.training.distributed import Processes, Shard
from sdzoo.training.engine import train
from sdzoo.training.model import create_model
from sdzoo.training.optimisation import create_optimizer, create_scheduler
from sdzoo.training.recipe import Recipe, SdzooSettings
from sdzoo.training.step import Trainer

MakeRecipe = Callable[..., Recipe]
TEAM = Processes(Shard(), torch.device("cpu"))
STEPS = 4  # an epoch


def batch(size: int = 16, side: int = 12) -> tuple[Tensor, Tensor]:
    return random_images(size, side), torch.arange(size) % 3


def constant_depth(make_recipe: MakeRecipe, **changes: Any) -> Trainer:
    """Return a trainer without anything random: what a step is follows from its batch."""
    recipe = make_recipe(**{"drop": 0.0, "drop_path": 0.0, "channels_last": False, **changes})
    torch.manual_seed(0)
    trainer = Trainer(recipe, calibrate(create_model(recipe), images=batch()[0]), STEPS, TEAM)
    trainer.enter_epoch()
    return trainer


# Losses


def one_hot(labels: Tensor, smoothing: float = 0.0) -> np.ndarray:
    """Return targets ``(B, 3)``: 1 - s + s / 3 where the label is, else s / 3."""
    targets = np.full((len(labels), 3), smoothing / 3)
    targets[np.arange(len(labels)), labels.numpy()] += 1 - smoothing
    return targets


def cross_entropy(logits: np.ndarray, targets: np.ndarray) -> float:
    logs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return float(-(targets * logs).sum(axis=1).mean())


def binary(logits: np.ndarray, targets: np.ndarray, weight: float = 1.0, total: bool = False) -> float:
    """Return the binary cross-entropy, by class: its mean over all, or its sum over classes."""
    sigmoid = 1 / (1 + np.exp(-logits))
    terms = -(weight * targets * np.log(sigmoid) + (1 - targets) * np.log(1 - sigmoid))
    return float(terms.sum(axis=1).mean() if total else terms.mean())


def first_loss(trainer: Trainer, images: Tensor, labels: Tensor, number: int = 0) -> tuple[float, Tensor]:
    """Return the loss of step ``number`` and the images that the model was given in it."""
    given: list[Tensor] = []
    handle = trainer.model.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0].clone()))
    loss = trainer.step(number, iter([(images, labels)])).loss
    handle.remove()
    return loss, given[0]


@torch.no_grad()
def logits_in_training(trainer: Trainer, images: Tensor) -> np.ndarray:
    return trainer.model(images).double().numpy()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, lambda logits, labels: cross_entropy(logits, one_hot(labels))),
        ({"smoothing": 0.2}, lambda logits, labels: cross_entropy(logits, one_hot(labels, 0.2))),
        ({"bce_loss": True, "smoothing": 0.2}, lambda logits, labels: binary(logits, one_hot(labels, 0.2))),
        (
            {"bce_loss": True, "smoothing": 0.2, "bce_sum": True},
            lambda logits, labels: binary(logits, one_hot(labels, 0.2), total=True),
        ),
        (
            {"bce_loss": True, "smoothing": 0.2, "bce_target_thresh": 0.3},
            lambda logits, labels: binary(logits, one_hot(labels)),
        ),
        (
            {"bce_loss": True, "smoothing": 0.2, "bce_pos_weight": 3.0},
            lambda logits, labels: binary(logits, one_hot(labels, 0.2), weight=3.0),
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_loss(
    make_recipe: MakeRecipe, changes: dict[str, Any], expected: Callable[[np.ndarray, Tensor], float]
) -> None:
    images, labels = batch()
    logits = logits_in_training(constant_depth(make_recipe), images)
    loss, given = first_loss(constant_depth(make_recipe, **changes), images, labels)
    assert torch.equal(given, images)
    assert loss == pytest.approx(expected(logits, labels), rel=1e-5)


def draws(recipe: Recipe, step: int) -> np.random.RandomState:
    return np.random.RandomState(named_seed(recipe.seed, "mixup", step) % 2**32)


def mixed(images: Tensor, labels: Tensor, recipe: Recipe, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Return images and targets of mixup or cutmix in numpy: sample l with l + B / 2, one draw for the batch."""
    x, partners = images.double().numpy(), np.roll(images.double().numpy(), len(labels) // 2, axis=0)
    targets = one_hot(labels, recipe.smoothing)
    random = draws(recipe, step)
    random.rand()  # whether to mix at all: always
    if recipe.mixup > 0:
        share = random.beta(recipe.mixup, recipe.mixup)
        x = share * x + (1 - share) * partners
    else:
        side = x.shape[-1]
        share = random.beta(1.0, 1.0)  # alpha is 1 in these tests; with given limits it is drawn and not used
        if recipe.cutmix_minmax is not None:
            low, high = (int(side * limit) for limit in recipe.cutmix_minmax)
            height, width = random.randint(low, high), random.randint(low, high)
            top, left = random.randint(0, side - height + 1), random.randint(0, side - width + 1)
            box = slice(top, top + height), slice(left, left + width)
        else:
            cut = int(side * math.sqrt(1 - share))
            middles = random.randint(0, side), random.randint(0, side)
            box = tuple(slice(max(0, m - cut // 2), min(side, m + (cut + 1) // 2)) for m in middles)
        x = x.copy()
        x[:, :, box[0], box[1]] = partners[:, :, box[0], box[1]]
        share = 1 - x[0, 0][box].size / side**2
    return x, share * targets + (1 - share) * np.roll(targets, len(labels) // 2, axis=0)


@pytest.mark.parametrize(
    "changes",
    [
        {"mixup": 0.4},
        {"mixup": 0.4, "smoothing": 0.1},
        {"cutmix": 1.0, "smoothing": 0.1},
        {"cutmix_minmax": [0.2, 0.8]},
        {"mixup": 0.4, "bce_loss": True, "smoothing": 0.1},
        {"cutmix": 1.0, "bce_loss": True},
        {"mixup": 0.4, "bce_loss": True, "bce_target_thresh": 0.2},
    ],
    ids=str,
)
@pytest.mark.parametrize("step", [0, 5])
def test_mixing_and_its_loss(make_recipe: MakeRecipe, changes: dict[str, Any], step: int) -> None:
    images, labels = batch()
    trainer = constant_depth(make_recipe, **changes)
    x, targets = mixed(images, labels, trainer.recipe, step)
    logits = logits_in_training(constant_depth(make_recipe), torch.from_numpy(x).float())
    loss, given = first_loss(trainer, images, labels, step)
    np.testing.assert_allclose(given.numpy(), x, rtol=0, atol=1e-5)
    assert not torch.equal(given, images)
    if threshold := trainer.recipe.bce_target_thresh:
        targets = (targets > threshold).astype(float)
    expected = binary(logits, targets) if trainer.recipe.bce_loss else cross_entropy(logits, targets)
    assert loss == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("step", "is_mixed"), [(4 * 2 - 1, True), (4 * 2, False)])
def test_mixing_ends_with_its_epoch(make_recipe: MakeRecipe, step: int, is_mixed: bool) -> None:
    """``mixup_off_epoch: 2`` mixes in epochs 0 and 1, of 4 steps each; smoothing stays."""
    images, labels = batch()
    trainer = constant_depth(make_recipe, mixup=0.4, mixup_off_epoch=2, smoothing=0.1, epochs=4)
    loss, given = first_loss(trainer, images, labels, step)
    assert torch.equal(given, images) != is_mixed
    if not is_mixed:
        logits = logits_in_training(constant_depth(make_recipe), images)
        assert loss == pytest.approx(cross_entropy(logits, one_hot(labels, 0.1)), rel=1e-5)


# Learning rates


def rates(recipe: Recipe, count: int) -> list[float]:
    """Return the learning rate of each step of ``count`` steps, as the trainer sets it."""
    trainer = Trainer(recipe, create_model(recipe), STEPS, TEAM)
    trainer.enter_epoch()
    return [trainer.step(number, iter([batch(2, 8)])).lr for number in range(count)]


def warmed(values: Callable[[int], float], warm_up: int = 0) -> Callable[[int], float]:
    return lambda t: 0.01 + t * (0.1 - 0.01) / warm_up if t < warm_up else values(t)


SCHEDULES: list[tuple[dict[str, Any], Callable[[int], float]]] = [
    # by update: t is the step, T = 12
    ({"sched": "poly", "decay_rate": 2.0}, lambda t: 0.002 + 0.098 * (1 - t / 12) ** 2),
    ({"sched": "tanh"}, lambda t: 0.002 + 0.049 * (1 - math.tanh(-7 * (1 - t / 12) + 3 * t / 12))),
    ({"sched": "step", "decay_epochs": 1.5, "decay_rate": 0.5}, lambda t: 0.1 * 0.5 ** (t // 6)),
    ({"sched": "cosine", "warmup_epochs": 1}, warmed(lambda t: 0.002 + 0.049 * (1 + math.cos(math.pi * t / 12)), 4)),
    (
        {"sched": "cosine", "warmup_epochs": 1, "warmup_prefix": True},
        warmed(lambda t: 0.002 + 0.049 * (1 + math.cos(math.pi * (t - 4) / 12)), 4),
    ),
    (
        {"sched": "cosine", "cooldown_epochs": 2},
        lambda t: 0.002 + 0.049 * (1 + math.cos(math.pi * t / 12)) if t < 12 else 0.002,
    ),
    ({"sched": "constant", "warmup_epochs": 2}, warmed(lambda _: 0.1, 8)),
    # by epoch: t // 4
    (
        {"sched": "cosine", "sched_on_updates": False},
        lambda t: 0.002 + 0.049 * (1 + math.cos(math.pi * (t // 4) / 3)),
    ),
    ({"sched": "step", "decay_epochs": 2.0, "sched_on_updates": False}, lambda t: 0.1 * 0.1 ** (t // 4 // 2)),
]


@pytest.mark.parametrize(
    ("changes", "expected"), SCHEDULES, ids=lambda value: str(value) if isinstance(value, dict) else ""
)
def test_learning_rate_of_every_step(
    make_recipe: MakeRecipe, changes: dict[str, Any], expected: Callable[[int], float]
) -> None:
    """3 epochs of 4 steps; what warm-up or cool-down add is trained too."""
    recipe = make_recipe(**{"epochs": 3, "min_lr": 0.002, "warmup_lr": 0.01, **changes})
    more = (recipe.warmup_epochs if recipe.warmup_prefix else 0) + recipe.cooldown_epochs
    optimizer = create_optimizer(recipe, torch.nn.Linear(2, 2))
    assert create_scheduler(recipe, optimizer, STEPS)[1] == 3 + more
    count = 4 * (3 + more)
    assert rates(recipe, count) == pytest.approx([expected(t) for t in range(count)], rel=1e-9)


def layer(name: str) -> int:
    """Return which layer a parameter belongs to: the stem 0, the blocks 1 to 9, the classifier 10."""
    if name.startswith("layer"):
        stage, block = name.removeprefix("layer").split(".")[:2]
        return 3 * (int(stage) - 1) + int(block) + 1
    return 10 if name.startswith("fc.") else 0


@pytest.mark.parametrize(("changes", "floor"), [({}, 0.0), ({"layer_decay_min_scale": 0.3}, 0.3)])
def test_layer_decay_scales_the_learning_rate_by_depth(
    make_recipe: MakeRecipe, changes: dict[str, Any], floor: float
) -> None:
    recipe = make_recipe(layer_decay=0.8, opt="momentum", momentum=0.0, weight_decay=0.0, lr=0.05, **changes)
    trainer = constant_depth(make_recipe)
    trainer = Trainer(recipe, trainer.model, STEPS, TEAM)
    trainer.enter_epoch()
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    step = trainer.step(2, iter([batch()]))
    rate = 0.05 * 0.5 * (1 + math.cos(math.pi * 2 / 8))
    rate_of = {id(p): group["lr"] for group in trainer.optimizer.param_groups for p in group["params"]}
    seen = set()
    for name, p in trainer.model.named_parameters():
        own = rate * max(floor, 0.8 ** (10 - layer(name)))
        assert rate_of[id(p)] == pytest.approx(own, rel=1e-6), name
        assert p.grad is not None
        torch.testing.assert_close(p.detach(), before[name] - own * p.grad, rtol=1e-5, atol=1e-7)
        seen.add(layer(name))
    assert seen == set(range(11))
    assert step.lr > 0


def test_layers_below_a_scale_are_not_trained(make_recipe: MakeRecipe) -> None:
    """0.5 ** (10 - layer) < 0.1 up to layer 6."""
    recipe = make_recipe(layer_decay=0.5, layer_decay_no_opt_scale=0.1, lr=0.05, drop_path=0.0)
    trainer = Trainer(recipe, create_model(recipe), STEPS, TEAM)
    trainer.enter_epoch()
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.step(0, iter([batch()]))
    changed = {layer(name) for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {7, 8, 9, 10}


# Head only


def test_head_only_changes_the_classifier_and_nothing_else(
    image_folder: Path, tmp_path: Path, make_recipe: MakeRecipe
) -> None:
    """Backbone, BatchNorm's statistics and p to the bit; every block runs; the averages too."""
    torch.manual_seed(2)
    source = calibrate(timm.create_model("sd_resnet20", num_classes=5, survival_probs=[0.6] * 9))
    save_weights(tmp_path / "source.safetensors", source, describe(source, tuple("abcde")))
    recipe = make_recipe(
        drop_path=None,
        initial_checkpoint=str(tmp_path / "source.safetensors"),
        model_ema=True,
        model_ema_decay=0.5,
        weight_decay=0.01,
        sdzoo=SdzooSettings(trainable="head", survival_warmup_epochs=1.0),
    )
    modes: list[list[bool]] = []

    def look(_: Any) -> None:
        modes.append([module.training for name, module in trained[0].named_modules() if name.startswith("layer")])

    trained: list[Any] = []
    original = Trainer.__init__

    def note(trainer: Trainer, *args: Any) -> None:
        original(trainer, *args)
        trained.append(trainer.model)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "__init__", note)
        with after_step(3, look):
            best = train(recipe, image_folder, tmp_path / "run", device="cpu")
    assert not any(modes[0])
    state, rest = read_checkpoint(tmp_path / "run" / "last.pth")
    for weights in (state, rest["state_dict_ema"], read_checkpoint(best)[0]):
        for name, tensor in source.state_dict().items():
            if name.startswith("fc."):
                assert weights[name].shape[0] == 3
            else:
                assert same(weights[name], tensor), name
    initial = create_model(recipe).state_dict()
    assert not torch.equal(state["fc.weight"], initial["fc.weight"])
    assert [row["live_blocks"] for row in steps(tmp_path / "run")] == ["9"] * 8
    assert [float(row["first_conv_gradient"]) for row in steps(tmp_path / "run")] == [0.0] * 8
    assert sdzoo.survival_probs(load_model(best)) == pytest.approx([0.6] * 9)
