"""One optimizer step: accumulation, clipping, averages, warm-up of the gates, half precision, what is not finite."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from nets import calibrate, random_images
from runs import named_seed, plan, same
from torch import Tensor, nn

import sdzoo
from sdzoo.training import step as step_module
from sdzoo.training.distributed import Processes, Shard
from sdzoo.training.model import create_model
from sdzoo.training.recipe import Recipe, SdzooSettings
from sdzoo.training.step import Diverged, Step, Trainer

MakeRecipe = Callable[..., Recipe]
Batch = tuple[Tensor, Tensor]
TEAM = Processes(Shard(), torch.device("cpu"))
LINEAR_TO_HALF = [1 - block / 9 * 0.5 for block in range(1, 10)]


def batch(size: int = 16, seed: int = 0, side: int = 8) -> Batch:
    labels = torch.randint(0, 3, (size,), generator=torch.Generator().manual_seed(seed))
    return random_images(size, side, seed=seed) + labels.view(-1, 1, 1, 1) / 2, labels


def make_trainer(recipe: Recipe, steps: int = 4) -> Trainer:
    """Return a trainer of a calibrated net, in training; ``steps`` make an epoch."""
    torch.manual_seed(0)
    model = calibrate(create_model(recipe), images=batch(32)[0])
    trainer = Trainer(recipe, model, steps, TEAM)
    trainer.enter_epoch()
    return trainer


def freeze_batchnorm(trainer: Trainer) -> None:
    for module in trainer.model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()


def gradients(trainer: Trainer) -> dict[str, Tensor]:
    """Return what the last step handed to the optimizer."""
    return {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}


def snapshot(trainer: Trainer) -> dict[str, Any]:
    return copy.deepcopy(trainer.state())


@contextmanager
def recorded_blocks(model: nn.Module) -> Iterator[list[list[bool]]]:
    """Record, of every training forward, the blocks whose first convolution was called."""
    recorded: list[list[bool]] = []
    blocks: list[Any] = [block for name in ("layer1", "layer2", "layer3") for block in model.get_submodule(name)]  # type: ignore[union-attr]
    called: set[int] = set()
    handles = [
        block.conv1.register_forward_hook(lambda *_, index=index: called.add(index))
        for index, block in enumerate(blocks)
    ]

    def finish(*_: Any) -> None:
        recorded.append([index in called for index in range(len(blocks))])
        called.clear()

    handles.append(model.register_forward_hook(finish))
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()


# Accumulation


def test_two_micro_batches_of_8_are_one_of_16_under_the_same_gates(make_recipe: MakeRecipe) -> None:
    images, labels = batch()
    taken, steps = {}, {}
    for accum in (1, 2):
        trainer = make_trainer(make_recipe(drop=0.0, batch_size=16 // accum, grad_accum_steps=accum))
        freeze_batchnorm(trainer)
        parts = [(images[part::accum], labels[part::accum]) for part in range(accum)]
        with recorded_blocks(trainer.model) as blocks:
            steps[accum] = trainer.step(3, iter(parts))
        assert blocks == [plan(7, 3, LINEAR_TO_HALF)] * accum
        taken[accum] = gradients(trainer)
    largest = max(gradient.abs().max() for gradient in taken[1].values())
    worst = max((taken[1][name] - taken[2][name]).abs().max() for name in taken[1])
    assert 0 < worst <= 1e-5 * largest
    assert steps[2].loss == pytest.approx(steps[1].loss, rel=1e-5)
    assert steps[2].first_conv_gradient == pytest.approx(steps[1].first_conv_gradient, rel=1e-4)
    assert steps[2].live_blocks == steps[1].live_blocks == sum(plan(7, 3, LINEAR_TO_HALF))


def test_dropout_differs_from_micro_batch_to_micro_batch_and_step_to_step_but_not_from_run_to_run(
    make_recipe: MakeRecipe,
) -> None:
    recipe = make_recipe(drop=0.5, drop_path=0.0, batch_size=8, grad_accum_steps=2, lr=1e-9)
    trainer = make_trainer(recipe)
    masks: list[Tensor] = []
    trainer.model.get_submodule("fc").register_forward_pre_hook(lambda _, inputs: masks.append(inputs[0] == 0))
    images, labels = batch(8)
    for number in (0, 1, 0):
        torch.manual_seed(number + 40)  # whatever was drawn before
        trainer.step(number, iter([(images, labels)] * 2))
    first, second, third, fourth, fifth, sixth = masks
    assert torch.equal(first, fifth) and torch.equal(second, sixth)
    for one, other in ((first, second), (first, third), (second, fourth)):
        assert not torch.equal(one, other)


# Gradients: their magnitude in the first convolution, and clipping


def test_first_conv_gradient_is_the_mean_magnitude_before_clipping(make_recipe: MakeRecipe) -> None:
    plain, limited = (make_trainer(make_recipe(clip_grad=c, drop=0.0)) for c in (None, 1e-3))
    steps = [trainer.step(0, iter([batch()])) for trainer in (plain, limited)]
    expected = sum(abs(g) for g in gradients(plain)["conv1.weight"].flatten().tolist()) / (16 * 3 * 9)
    assert steps[0].first_conv_gradient == pytest.approx(expected, rel=1e-5)
    assert steps[1].first_conv_gradient == pytest.approx(expected, rel=1e-5)


def clipped(mode: str, limit: float, raw: dict[str, Tensor], weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return what each mode leaves of ``raw``, in float64."""
    raw = {name: gradient.double() for name, gradient in raw.items()}
    if mode == "value":
        return {name: gradient.clamp(-limit, limit) for name, gradient in raw.items()}
    if mode == "norm":
        norm = math.sqrt(sum(float((gradient**2).sum()) for gradient in raw.values()))
        return {name: gradient * min(1.0, limit / (norm + 1e-6)) for name, gradient in raw.items()}
    result = {}
    for name, gradient in raw.items():  # Brock et al., 2021: unit by unit; the classifier is left alone
        units = [gradient] if gradient.ndim == 1 else list(gradient)
        weight = weights[name].double()
        new = []
        for unit, own in zip(units, [weight] if gradient.ndim == 1 else list(weight), strict=True):
            most = limit * max(float(own.norm()), 1e-3)
            new.append(unit * min(1.0, most / max(float(unit.norm()), 1e-6)))
        result[name] = gradient if name.startswith("fc.") else new[0] if gradient.ndim == 1 else torch.stack(new)
    return result


@pytest.mark.parametrize(("mode", "limit"), [("norm", 0.3), ("value", 1e-3), ("agc", 0.01)])
def test_clipping(make_recipe: MakeRecipe, mode: str, limit: float) -> None:
    plain = make_trainer(make_recipe(drop=0.0))
    weights = {name: tensor.detach().clone() for name, tensor in plain.model.named_parameters()}
    plain.step(0, iter([batch()]))
    trainer = make_trainer(make_recipe(drop=0.0, clip_grad=limit, clip_mode=mode))
    trainer.step(0, iter([batch()]))
    raw, got = gradients(plain), gradients(trainer)
    expected = clipped(mode, limit, raw, weights)
    assert any(not torch.equal(raw[name], got[name]) for name in raw), "the limit must bite"
    for name, gradient in got.items():
        torch.testing.assert_close(gradient.double(), expected[name], rtol=1e-4, atol=1e-8, msg=name)


# Exponential moving average


@pytest.mark.parametrize("warmup", [False, True], ids=["constant", "warmed up"])
def test_moving_average_is_the_formula_and_its_survival_probabilities_are_copies(
    make_recipe: MakeRecipe, warmup: bool
) -> None:
    """After step n: a = d a + (1 - d) w; d is 0 in the first step, then 0.9, or min(0.9, 1 - (1 + n)^(-2/3))."""
    recipe = make_recipe(model_ema=True, model_ema_decay=0.9, model_ema_warmup=warmup, lr=0.05)
    trainer = make_trainer(recipe)
    average_model = trainer.ema
    assert average_model is not None and trainer.kept is average_model
    average: dict[str, Tensor] = {}
    for number in range(5):
        trainer.step(number, iter([batch(seed=number)]))
        decay = 0.0 if number == 0 else min(0.9, 1 - (1 + number) ** (-2 / 3)) if warmup else 0.9
        for name, tensor in trainer.model.state_dict().items():
            before = average[name] if number else tensor.double()
            average[name] = decay * before + (1 - decay) * tensor.double()
    state = average_model.state_dict()
    assert state.keys() == average.keys()
    for name, tensor in state.items():
        if name.endswith("survival_prob"):
            assert torch.equal(tensor, trainer.model.state_dict()[name])
        elif name.endswith("num_batches_tracked"):
            assert tensor == trainer.model.state_dict()[name]
        else:
            torch.testing.assert_close(tensor.double(), average[name], rtol=1e-5, atol=1e-6, msg=name)
    assert not torch.equal(state["fc.weight"], trainer.model.state_dict()["fc.weight"])


# Survival warm-up


def test_gates_of_the_warm_up_follow_their_probabilities_and_p_stays(make_recipe: MakeRecipe) -> None:
    """1 - (1 - p) min(1, t / W): of steps an epoch 4, over 1.5 epochs, every block live at first."""
    trainer = make_trainer(make_recipe(sdzoo=SdzooSettings(survival_warmup_epochs=1.5), drop_path=0.9))
    final = [1 - block / 9 * 0.9 for block in range(1, 10)]
    plans = []
    for number in range(9):
        probs = [1 - (1 - p) * min(1.0, number / 4 / 1.5) for p in final]
        plans.append(plan(7, number, probs))
        with recorded_blocks(trainer.model) as blocks:
            step = trainer.step(number, iter([batch(seed=number)]))
        assert blocks == [plans[-1]]
        assert step.live_blocks == sum(plans[-1])
        assert trainer.state()["draw_probs"] == pytest.approx(probs, abs=1e-6)
        assert sdzoo.survival_probs(trainer.model) == pytest.approx(final, abs=1e-6)
        stored = [v.item() for name, v in trainer.state()["state_dict"].items() if name.endswith("survival_prob")]
        assert stored == pytest.approx(final, abs=1e-6)
    assert all(plans[0])
    assert plans != [plan(7, number, final) for number in range(9)], "without warm-up others would be dropped"


# What is not finite


def broken(images: Tensor, value: float) -> Tensor:
    images = images.clone()
    images[3, 1, 2, 2] = value
    return images


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("micro", [0, 1])
def test_a_loss_that_is_not_finite_leaves_weights_and_momentum_as_they_were(
    make_recipe: MakeRecipe, value: float, micro: int
) -> None:
    trainer = make_trainer(make_recipe(grad_accum_steps=2, batch_size=8, model_ema=True))
    trainer.step(0, iter([batch(8), batch(8, seed=1)]))
    before = snapshot(trainer)
    parts = [batch(8, seed=2), batch(8, seed=3)]
    parts[micro] = broken(parts[micro][0], value), parts[micro][1]
    with pytest.raises(Diverged, match=r"^the loss is nan at step 2$"):
        trainer.step(1, iter(parts))
    after = trainer.state()
    parameters = {name for name, _ in trainer.model.named_parameters()}
    assert all(same(after["state_dict"][name], before["state_dict"][name]) for name in parameters)
    assert same(after["optimizer"]["state"], before["optimizer"]["state"])
    assert same(after["state_dict_ema"], before["state_dict_ema"])


def fp16_trainer(make_recipe: MakeRecipe, scale: float = 1024.0, **changes: Any) -> Trainer:
    """Return a trainer in float16 whose loss scale is one that the gradients bear."""
    trainer = make_trainer(make_recipe(amp=True, amp_dtype="float16", **{"drop": 0.0, "drop_path": 0.0, **changes}))
    trainer.scaler.load_state_dict({**trainer.scaler.state_dict(), "scale": scale})
    return trainer


def test_under_float16_a_step_that_is_not_finite_is_skipped_and_the_scale_halved(make_recipe: MakeRecipe) -> None:
    trainer = fp16_trainer(make_recipe)
    freeze_batchnorm(trainer)
    trainer.step(0, iter([batch()]))
    before, scale = snapshot(trainer), trainer.scaler.get_scale()
    images, labels = batch(seed=1)
    step = trainer.step(1, iter([(broken(images, math.nan), labels)]))
    assert math.isnan(step.loss)
    assert same(trainer.state()["state_dict"], before["state_dict"])
    assert same(trainer.state()["optimizer"]["state"], before["optimizer"]["state"])
    assert trainer.scaler.get_scale() == scale / 2
    trainer.step(2, iter([(images, labels)]))
    assert not same(trainer.state()["state_dict"], before["state_dict"]), "the next one trains again"


def test_under_float16_a_skipped_step_leaves_the_statistics_of_batchnorm_as_they_were(make_recipe: MakeRecipe) -> None:
    """The forward of the skipped step has filled them with NaN, in the second of its micro-batches."""
    trainer = fp16_trainer(make_recipe, model_ema=True, model_ema_decay=0.9, grad_accum_steps=2)
    images, labels = batch(seed=1)
    trainer.step(0, iter([batch(), batch(seed=2)]))
    before = copy.deepcopy(trainer.state()["state_dict"])
    step = trainer.step(1, iter([(images, labels), (broken(images, math.nan), labels)]))
    assert math.isnan(step.loss)
    assert same(trainer.state()["state_dict"], before)
    assert all(bool(tensor.isfinite().all()) for tensor in trainer.state()["state_dict_ema"].values())
    trainer.step(2, iter([(images, labels), batch(seed=2)]))
    assert not torch.equal(trainer.state()["state_dict"]["bn1.running_mean"], before["bn1.running_mean"])


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_under_float16_many_skipped_steps_in_a_row_are_divergence(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """A gradient may be NaN though the loss is not: no step would ever be taken, and nobody told."""
    monkeypatch.setattr(step_module, "SKIPPED_IN_A_ROW", 3)
    trainer = fp16_trainer(make_recipe)
    freeze_batchnorm(trainer)
    images, labels = batch()
    poison = {"on": True}
    if what == "gradient":
        trainer.first_conv.weight.register_hook(lambda g: g * math.nan if poison["on"] else g)

    def step(number: int, bad: bool) -> Step:
        poison["on"] = bad
        return trainer.step(number, iter([(broken(images, math.nan) if bad and what == "loss" else images, labels)]))

    for number, bad in enumerate([True, True, False, True, True]):
        step(number, bad)
    before = snapshot(trainer)
    with pytest.raises(Diverged, match=f"the {what} is (nan|not finite) at step 6, the 3th in a row that is skipped"):
        step(5, True)
    assert same(trainer.state()["state_dict"], before["state_dict"])


# Half precision


@pytest.mark.parametrize(("dtype", "precision"), [("bfloat16", 2**-8), ("float16", 2**-11)])
def test_ten_steps_in_half_precision_are_close_to_those_in_float32(
    make_recipe: MakeRecipe, dtype: str, precision: float
) -> None:
    """Losses to the type's precision; the way that the weights have gone to what it makes of 20 layers of ReLU.

    Of each layer's activations a share of about the precision changes sign: sqrt(20 * precision) of the gradient.
    """
    ways, losses = [], []
    for amp in (False, True):
        trainer = make_trainer(make_recipe(amp=amp, amp_dtype=dtype, drop=0.0, lr=1e-3), steps=10)
        start = torch.cat([p.detach().flatten().clone() for p in trainer.model.parameters()])
        if trainer.scaler.is_enabled():
            trainer.scaler.load_state_dict({**trainer.scaler.state_dict(), "scale": 1024.0})
        steps = [trainer.step(number, iter([batch(seed=number)])) for number in range(10)]
        losses.append([step.loss for step in steps])
        ways.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]) - start)
        assert all(p.dtype == torch.float32 for p in trainer.model.parameters())
    assert losses[1] != losses[0], "half precision must show"
    assert losses[1] == pytest.approx(losses[0], rel=precision)
    assert (ways[1] - ways[0]).norm() <= math.sqrt(20 * precision) * ways[0].norm()


def test_first_conv_gradient_is_that_of_the_loss_and_not_of_the_scaled_one(make_recipe: MakeRecipe) -> None:
    half, full = fp16_trainer(make_recipe), make_trainer(make_recipe(drop=0.0, drop_path=0.0))
    step, reference = (trainer.step(0, iter([batch()])) for trainer in (half, full))
    assert step.first_conv_gradient == pytest.approx(reference.first_conv_gradient, rel=0.1)


# Gradient checkpointing


def test_gradient_checkpointing_gives_the_same_weights(make_recipe: MakeRecipe) -> None:
    """Of 3 steps, to the bit. BatchNorm's statistics are updated a second time where a block is recomputed."""
    states, calls = [], []
    for checkpointing in (False, True):
        trainer = make_trainer(make_recipe(grad_checkpointing=checkpointing))
        count = 0

        def called(*_: Any) -> None:
            nonlocal count
            count += 1

        for module in trainer.model.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(called)
        for number in range(3):
            trainer.step(number, iter([batch(seed=number)]))
        states.append(dict(trainer.model.named_parameters()))
        calls.append(count)
    assert same(states[1], states[0])
    live = sum(sum(plan(7, number, LINEAR_TO_HALF)) for number in range(3))
    assert calls == [3 + 2 * live, 3 + 2 * 2 * live], "the stem once, two convolutions a live block"


# Steps are functions of their number


def test_a_step_is_the_same_whatever_was_drawn_before(make_recipe: MakeRecipe) -> None:
    states = []
    for other in (1, 2):
        trainer = make_trainer(make_recipe(drop=0.3))
        torch.manual_seed(other)
        torch.rand(other)
        trainer.step(5, iter([batch()]))
        states.append(snapshot(trainer))
    assert same(states[0], states[1])


def test_restored_state_is_the_saved_one(make_recipe: MakeRecipe) -> None:
    warm_up = SdzooSettings(survival_warmup_epochs=2.0)
    trainer, other = (
        fp16_trainer(make_recipe, scale, model_ema=True, drop_path=0.5, sdzoo=warm_up) for scale in (1024.0, 64.0)
    )
    for number in range(3):
        trainer.step(number, iter([batch(seed=number)]))
    saved = snapshot(trainer)
    assert (saved["amp_scaler"]["scale"], saved["amp_scaler"]["_growth_tracker"]) == (1024.0, 3)
    assert other.restore({**copy.deepcopy(saved), "recipe": {"opt": "sgd"}}, "here") == []
    assert same(other.state(), saved)
    steps = [each.step(3, iter([batch(seed=3)])) for each in (trainer, other)]
    assert steps[0] == steps[1]
    assert same(other.state(), trainer.state())


# Compilation


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_blocks_train_as_the_others_and_are_compiled_once_a_shape(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five shapes of blocks in 20 layers, in training and in evaluation; after the first steps none is compiled."""
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "propagate", False)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    graphs = torch._dynamo.utils.counters["stats"]
    eager, compiled = (
        make_trainer(make_recipe(torchcompile=backend, drop=0.0, channels_last=False))
        for backend in (None, "aot_eager")
    )
    seen = []
    for number in range(12):
        steps = [each.step(number, iter([batch(seed=number)])) for each in (eager, compiled)]
        assert steps[1].loss == pytest.approx(steps[0].loss, rel=2e-3)
        assert steps[1].live_blocks == steps[0].live_blocks
        if number % 4 == 3:
            compiled.leave_epoch()
            compiled.kept.eval()
            with torch.no_grad():
                compiled.kept(batch(4)[0])
            compiled.enter_epoch()
            seen.append(graphs["unique_graphs"])
    assert 5 <= seen[0] <= 15
    assert seen == [seen[0]] * 3
    torch._dynamo.reset()


def test_dropout_seed_is_a_named_stream() -> None:
    """What the tests above take for granted of names: seeds of neighbouring steps have nothing in common."""
    seeds = {named_seed(7, "dropout", number, 0, micro) for number in range(50) for micro in range(4)}
    assert len(seeds) == 200
