from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
from nets import random_images, randomise_batchnorm, without_probs
from torch import Tensor, nn

from sdzoo.calibration import calibrate_batchnorm


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
