from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from nets import random_images, randomise_batchnorm, without_probs
from torch import Tensor, nn

import sdzoo
from sdzoo.calibration import calibrate_batchnorm, recalibrate_batchnorm
from sdzoo.errors import InputError


def batchnorms(model: nn.Module) -> dict[str, nn.BatchNorm2d]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}


def untrained(**kwargs: object) -> nn.Module:
    torch.manual_seed(3)
    model = timm.create_model("sd_resnet20", **kwargs)  # type: ignore[arg-type]
    randomise_batchnorm(model)
    return model.eval()


BATCHES = [random_images(6, seed=1), random_images(6, seed=2) * 2 + 1, random_images(6, seed=3) - 0.5]


def test_statistics_are_the_averages_over_batches_of_what_each_norm_was_fed() -> None:
    """Computed with hooks in a twin of constant depth, whose gates are always open."""
    model = untrained(drop_path_rate=0.9)
    twin = untrained(schedule="constant_depth")
    twin.load_state_dict(without_probs(model.state_dict()), strict=False)
    fed: dict[str, list[Tensor]] = {name: [] for name in batchnorms(twin)}

    def record(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, inputs: fed[name].append(inputs[0].detach().double())

    for name, norm in batchnorms(twin).items():
        norm.register_forward_pre_hook(record(name))
    twin.train()
    for batch in BATCHES:
        twin(batch)

    calibrate_batchnorm(model, iter(BATCHES))
    for name, norm in batchnorms(model).items():
        mean = sum(x.mean((0, 2, 3)) for x in fed[name]) / len(BATCHES)
        variance = sum(x.transpose(0, 1).flatten(1).var(1, unbiased=True) for x in fed[name]) / len(BATCHES)
        torch.testing.assert_close(norm.running_mean, mean.float(), rtol=1e-4, atol=1e-4, msg=name)  # type: ignore[union-attr]
        torch.testing.assert_close(norm.running_var, variance.float(), rtol=1e-4, atol=1e-4, msg=name)  # type: ignore[union-attr]
        assert norm.num_batches_tracked == len(BATCHES)


@pytest.mark.parametrize("estimate", [calibrate_batchnorm, recalibrate_batchnorm])
def test_a_batch_weighs_as_many_as_its_images(estimate: Callable[[nn.Module, list[Tensor]], None]) -> None:
    """Of 260 images in batches of 250 and 10, the last ten have ten 260ths."""
    model, images = untrained(), random_images(260)
    images[250:] = images[250:] * 3 + 2
    estimate(model, [images[:250], images[250:]])
    norm = batchnorms(model)["bn1"]
    with torch.no_grad():
        fed = model.get_submodule("conv1")(images).transpose(0, 1).flatten(2).double()  # (C, N, pixels)
    variances = torch.stack([fed[:, :250].flatten(1).var(1), fed[:, 250:].flatten(1).var(1)])
    torch.testing.assert_close(norm.running_mean, fed.mean((1, 2)).float(), rtol=1e-4, atol=1e-5)
    wanted = (250 * variances[0] + 10 * variances[1]) / 260
    torch.testing.assert_close(norm.running_var, wanted.float(), rtol=1e-4, atol=1e-5)


def test_what_was_there_before_does_not_count() -> None:
    fresh, other = untrained(), untrained()
    randomise_batchnorm(other, seed=9)
    for name, norm in batchnorms(fresh).items():
        batchnorms(other)[name].load_state_dict(norm.state_dict() | {"running_mean": norm.running_mean * 5 + 1})  # type: ignore[operator]
    calibrate_batchnorm(fresh, BATCHES[:1])
    calibrate_batchnorm(other, BATCHES[:1])
    for name, norm in batchnorms(fresh).items():
        torch.testing.assert_close(batchnorms(other)[name].running_mean, norm.running_mean, rtol=0, atol=0)


def test_weights_and_survival_probabilities_stay() -> None:
    model = untrained()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    calibrate_batchnorm(model, BATCHES[:1])
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    statistics = {f"{name}.{kind}" for name in batchnorms(model) for kind in ("running_mean", "running_var")}
    assert changed == statistics | {f"{name}.num_batches_tracked" for name in batchnorms(model)}


def set_modes(model: nn.Module) -> dict[str, tuple[bool, float | None]]:
    """Give the modules of ``model`` different modes and momenta and return them."""
    model.train()
    for index, (_, module) in enumerate(model.named_modules()):
        module.training = index % 3 == 0
    for index, norm in enumerate(batchnorms(model).values()):
        norm.momentum = None if index == 2 else 0.01 * index
    return modes(model)


def modes(model: nn.Module) -> dict[str, tuple[bool, float | None]]:
    return {name: (module.training, getattr(module, "momentum", None)) for name, module in model.named_modules()}


def test_modes_and_momenta_are_restored() -> None:
    model = untrained()
    before = set_modes(model)
    calibrate_batchnorm(model, BATCHES[:1])
    assert modes(model) == before


def test_modes_and_momenta_are_restored_after_a_failure() -> None:
    model = untrained()
    before = set_modes(model)
    with pytest.raises(RuntimeError):
        calibrate_batchnorm(model, [torch.zeros(2, 5, 32, 32)])
    assert modes(model) == before


def test_gates_draw_again_afterwards() -> None:
    model = untrained(survival_probs=[1e-6] * 9)
    calibrate_batchnorm(model, BATCHES[:1])
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    for block in (*model.layer1, *model.layer2, *model.layer3):  # type: ignore[misc]
        block.conv1.register_forward_hook(count)
    model.train()(BATCHES[0])
    assert calls == 0


def test_a_deep_untrained_network_comes_out_usable() -> None:
    torch.manual_seed(0)
    model = timm.create_model("sd_resnet110").eval()
    images = random_images(4)
    with torch.no_grad():
        assert model(images).abs().max() > 1e4  # why this is needed
        calibrate_batchnorm(model, [images])
        assert model(images).abs().max() < 100


# At full depth, as in evaluation

Statistics = dict[str, list[tuple[Tensor, Tensor]]]


@torch.no_grad()
def weighted_forward(model: Any, x: Tensor, probs: list[float], fed: Statistics) -> None:
    """Compute ``sd_resnet20`` by hand: each norm by its batch, each branch weighted by p; note what norms are fed."""

    def norm(name: str, x: Tensor) -> Tensor:
        own = model.get_submodule(name)
        mean = x.mean((0, 2, 3), keepdim=True)
        centred = x - mean
        count = x.numel() // x.shape[1]
        square = (centred**2).sum((0, 2, 3), keepdim=True)
        fed[name].append((mean.flatten(), square.flatten() / (count - 1)))
        weight, bias = own.weight.view(1, -1, 1, 1), own.bias.view(1, -1, 1, 1)
        return centred / torch.sqrt(square / count + own.eps) * weight + bias

    def conv(name: str, x: Tensor, stride: int = 1) -> Tensor:
        return F.conv2d(x, model.get_submodule(name).weight, stride=stride, padding=1)

    x = F.relu(norm("bn1", conv("conv1", x)))
    for number, p in enumerate(probs):
        block, stride = f"layer{number // 3 + 1}.{number % 3}", 2 if number in (3, 6) else 1
        shortcut = x
        if stride == 2:
            shortcut = F.avg_pool2d(x, 2)
            shortcut = torch.cat([shortcut, torch.zeros_like(shortcut)], dim=1)
        branch = F.relu(norm(f"{block}.bn1", conv(f"{block}.conv1", x, stride)))
        x = F.relu(shortcut + p * norm(f"{block}.bn2", conv(f"{block}.conv2", branch)))


def test_recalibrated_statistics_are_the_averages_at_full_depth_of_branches_weighted_by_p() -> None:
    probs = [0.9, 0.3, 1.0, 0.5, 0.7, 0.2, 0.8, 0.4, 0.6]
    model = untrained(survival_probs=probs, drop_rate=0.5)
    twin = untrained(survival_probs=probs).double()
    fed: Statistics = {name: [] for name in batchnorms(twin)}
    for batch in BATCHES:
        weighted_forward(twin, batch.double(), probs, fed)
    recalibrate_batchnorm(model, iter(BATCHES))
    at_full_depth = untrained(survival_probs=probs)
    calibrate_batchnorm(at_full_depth, BATCHES)
    for name, norm in batchnorms(model).items():
        mean, variance = (torch.stack(values).mean(0).float() for values in zip(*fed[name], strict=True))
        torch.testing.assert_close(norm.running_mean, mean, rtol=1e-4, atol=1e-4, msg=name)
        torch.testing.assert_close(norm.running_var, variance, rtol=1e-4, atol=1e-4, msg=name)
        assert norm.num_batches_tracked == len(BATCHES)
    last = "layer3.2.bn1"
    assert not torch.allclose(batchnorms(model)[last].running_var, batchnorms(at_full_depth)[last].running_var)  # type: ignore[arg-type]


def test_recalibration_leaves_weights_probabilities_and_modes() -> None:
    model = untrained()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = set_modes(model)
    recalibrate_batchnorm(model, BATCHES[:1])
    assert modes(model) == before
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, state[name])}
    kinds = ("running_mean", "running_var", "num_batches_tracked")
    assert changed == {f"{name}.{kind}" for name in batchnorms(model) for kind in kinds}


def test_recalibration_draws_no_gates_and_no_random_number() -> None:
    model = untrained(survival_probs=[1e-6] * 9, drop_rate=0.5)
    first, second = untrained(survival_probs=[1e-6] * 9, drop_rate=0.5), torch.get_rng_state()
    recalibrate_batchnorm(model.train(), BATCHES)
    assert torch.equal(torch.get_rng_state(), second)
    recalibrate_batchnorm(first.eval(), BATCHES)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, first.state_dict()[name])


def test_recalibration_of_a_net_without_gates() -> None:
    """A folded one has no BatchNorm either: nothing changes; a plain one is recalibrated as it is."""
    model = timm.create_model("resnet18", num_classes=3).eval()
    recalibrate_batchnorm(model, [random_images(4, 64)])
    norm = batchnorms(model)["bn1"]
    fed = model.get_submodule("conv1")(random_images(4, 64)).detach()
    torch.testing.assert_close(norm.running_mean, fed.mean((0, 2, 3)), rtol=1e-4, atol=1e-4)
    folded = sdzoo.fold(untrained())
    before = folded(BATCHES[0])
    recalibrate_batchnorm(folded, BATCHES)
    assert torch.equal(folded(BATCHES[0]), before)


@pytest.mark.parametrize("estimate", [calibrate_batchnorm, recalibrate_batchnorm])
def test_without_batches_nothing_is_touched(estimate: Callable[[nn.Module, list[Tensor]], None]) -> None:
    model = untrained()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(InputError, match="no batches to take the statistics from"):
        estimate(model, [])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
