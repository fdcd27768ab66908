"""The architecture, and training with skipped blocks. What timm expects of a model: test_timm_contract.py."""

from __future__ import annotations

import copy
import itertools
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from nets import Net, calibrated, close, evaluate, plain_forward, random_images, randomise_batchnorm, stored_probs
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import sdzoo

BITS = [1, 0, 1, 0, 0, 1, 1, 0, 1]
TARGETS = torch.arange(4)

# name: blocks per stage n, parameters
FAMILY = {
    "sd_resnet20": (3, 269_722),
    "sd_resnet32": (5, 464_154),
    "sd_resnet44": (7, 658_586),
    "sd_resnet56": (9, 853_018),
    "sd_resnet110": (18, 1_727_962),
    "sd_resnet1202": (200, 19_421_274),
    "sd_resnet152_cifar": (25, 2_408_474),
}


def training_net(seed: int = 0, **kwargs: Any) -> Net:
    torch.manual_seed(seed)
    model = timm.create_model("sd_resnet20", **kwargs)
    randomise_batchnorm(model, seed)
    return model.train()


@pytest.mark.parametrize("name", FAMILY)
def test_layers_blocks_and_parameters_are_the_papers(name: str) -> None:
    n, parameters = FAMILY[name]
    model = timm.create_model(name, device="meta")
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert len(sdzoo.survival_probs(model)) == 3 * n
    assert sum(isinstance(module, (nn.Conv2d, nn.Linear)) for module in model.modules()) == 6 * n + 2
    # by hand: 3x3 convolutions, two numbers for each channel of a BatchNorm, the classifier
    widths = [3, 16, *[16] * 2 * n, *[32] * 2 * n, *[64] * 2 * n]
    by_hand = sum(9 * a * b + 2 * b for a, b in itertools.pairwise(widths)) + 650
    assert by_hand == parameters


def test_the_family_is_registered_with_timm() -> None:
    assert set(timm.list_models(module="sd_resnet_cifar")) == {*FAMILY, "sd_resnext29_8x64"}


def test_keys_stand_at_the_root() -> None:
    names = timm.create_model("sd_resnet20", device="meta").state_dict()
    block = r"layer[123]\.[012]\."
    patterns = rf"conv1\.weight|fc\.(weight|bias)|({block})?bn[12]\.\w+|{block}(conv[12]\.weight|gate\.survival_prob)"
    assert [name for name in names if not re.fullmatch(patterns, name)] == []
    assert len(names) == 1 + 5 + 9 * (2 + 2 * 5 + 1) + 2


def test_convolutions_have_no_bias_and_variance_two_over_fan_in() -> None:
    model = timm.create_model("sd_resnet56")
    for conv in (module for module in model.modules() if isinstance(module, nn.Conv2d)):
        assert conv.bias is None
        fan_in = conv.in_channels * 9
        count = conv.weight.numel()
        assert conv.weight.var().item() * fan_in / 2 == pytest.approx(1, abs=5 * math.sqrt(2 / count))
        assert abs(conv.weight.mean().item()) < 5 * math.sqrt(2 / fan_in / count)


def test_a_fresh_block_is_not_switched_off() -> None:
    # timm's own ResNets start with zero in the last BatchNorm of a branch; the authors do not
    model = timm.create_model("sd_resnet20")
    assert all(bool((module.weight == 1).all()) for module in model.modules() if isinstance(module, nn.BatchNorm2d))


@pytest.mark.parametrize("bits", [BITS, [1] * 9, [0] * 9, [0, 0, 0, 1, 1, 1, 0, 0, 0]])
def test_training_computes_the_papers_equation_forward_and_backward(bits: list[int], images: Tensor) -> None:
    model = training_net().double()
    plain = {name: value.detach().clone() for name, value in model.state_dict().items()}
    for name, _ in model.named_parameters():
        plain[name].requires_grad_()
    by_hand = plain_forward(plain, images.double(), bits, training=True)
    with sdzoo.fixed_gates(model, bits):
        out = model(images.double())
    close(by_hand, out, tol=1e-10)
    F.cross_entropy(by_hand, TARGETS).backward()
    F.cross_entropy(out, TARGETS).backward()
    for name, parameter in model.named_parameters():
        expected = plain[name].grad
        assert parameter.grad is not None, name
        close(torch.zeros_like(parameter) if expected is None else expected, parameter.grad, tol=1e-10)


def test_the_gates_that_were_drawn_are_those_that_were_computed(images: Tensor) -> None:
    model = training_net(drop_path_rate=0.7)
    state = copy.deepcopy(model.state_dict())
    torch.manual_seed(11)
    expected = [torch.rand(()).item() < p for p in stored_probs(state)]
    assert 0 < sum(expected) < 9
    torch.manual_seed(11)
    out = model(images)
    assert sdzoo.live_blocks(model) == expected
    close(plain_forward(state, images, expected, training=True), out, tol=1e-5)


def test_the_convolutions_called_are_those_of_the_live_blocks_and_as_often_as_p(
    conv_calls: Callable[[nn.Module], dict[str, int]],
) -> None:
    probs, steps = [0.95, 0.9, 0.2, 0.5, 0.1, 0.8, 0.3, 1.0, 0.6], 150
    model, calls = training_net(survival_probs=probs), {}
    calls = conv_calls(model)
    live = torch.zeros(9)
    with torch.no_grad():
        for _ in range(steps):
            model(random_images(2, 8))
            live += torch.tensor(sdzoo.live_blocks(model))
    for index, p in enumerate(probs):
        name = f"layer{index // 3 + 1}.{index % 3}"
        assert calls[f"{name}.conv1"] == calls[f"{name}.conv2"] == live[index]
        assert abs(live[index] / steps - p) <= 4 * math.sqrt(p * (1 - p) / steps)
        batches_seen = model.get_submodule(f"{name}.bn2").num_batches_tracked
        assert batches_seen == live[index]
    assert calls["conv1"] == steps


def test_a_skipped_block_leaves_no_convolution_to_differentiate(images: Tensor) -> None:
    model = training_net()
    with sdzoo.fixed_gates(model, BITS):
        out = model(images)
    seen, queue = set(), [out.grad_fn]
    while queue:
        node = queue.pop()
        if node is not None and node not in seen:
            seen.add(node)
            queue.extend(following for following, _ in node.next_functions)
    assert sum(node.name().startswith("ConvolutionBackward") for node in seen) == 1 + 2 * sum(BITS)


def test_a_skipped_blocks_batchnorms_are_untouched(images: Tensor) -> None:
    model = training_net()
    before = copy.deepcopy(model.state_dict())
    with sdzoo.fixed_gates(model, BITS):
        model(images)
    for index, bit in enumerate(BITS):
        for kind in ("running_mean", "running_var", "num_batches_tracked"):
            for bn in ("bn1", "bn2"):
                name = f"layer{index // 3 + 1}.{index % 3}.{bn}.{kind}"
                assert torch.equal(model.state_dict()[name], before[name]) is (not bit)


@pytest.mark.parametrize("seed", range(3))
def test_every_parameter_has_a_gradient_after_one_backward(seed: int, images: Tensor) -> None:
    model = training_net(seed, schedule="uniform")
    F.cross_entropy(model(images), TARGETS).backward()
    live = sdzoo.live_blocks(model)
    assert not all(live)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        if name.startswith("layer"):
            stage, block = int(name[5]) - 1, int(name[7])
            assert bool(parameter.grad.any()) is live[3 * stage + block], name


def test_sgd_acts_on_skipped_parameters_as_in_the_authors_code(images: Tensor) -> None:
    model = training_net()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2, nesterov=True)
    weight = model.get_parameter("layer1.1.conv1.weight")
    by_hand, momentum = weight.detach().clone().double(), 0
    for bit in (1, 0, 0):
        sgd.zero_grad()
        with sdzoo.fixed_gates(model, [1, bit, 1, 1, 1, 1, 1, 1, 1]):
            F.cross_entropy(model(images), TARGETS).backward()
        assert weight.grad is not None
        gradient = (weight.grad.double() if bit else 0) + 1e-2 * by_hand
        momentum = 0.9 * momentum + gradient
        by_hand = by_hand - 0.1 * (gradient + 0.9 * momentum)
        sgd.step()
        close(by_hand, weight, tol=1e-6)


def test_frozen_parameters_get_no_gradient(images: Tensor) -> None:
    model = training_net(schedule="uniform")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(("conv1", "bn1", "layer1", "layer2.0")))
    with sdzoo.fixed_gates(model, [0, 1, 0, 0, 1, 0, 0, 1, 0]):
        F.cross_entropy(model(images), TARGETS).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) is parameter.requires_grad, name


def test_constant_depth_draws_no_random_number_and_skips_nothing(images: Tensor) -> None:
    model = training_net(schedule="constant_depth")
    before = torch.get_rng_state()
    out = model(images)
    assert torch.equal(torch.get_rng_state(), before)
    assert sdzoo.live_blocks(model) == [True] * 9
    close(plain_forward(training_net().state_dict(), images, [1] * 9, training=True), out, tol=1e-5)


@pytest.mark.parametrize("mode", ["batch", "sample"])
def test_gradient_checkpointing_changes_neither_outputs_nor_gradients(mode: str, images: Tensor) -> None:
    results = []
    for checkpointing in (False, True):
        model = training_net(schedule="uniform", mode=mode)
        model.set_grad_checkpointing(checkpointing)
        torch.manual_seed(4)
        out = model(images)
        F.cross_entropy(out, TARGETS).backward()
        results.append((out, [parameter.grad for parameter in model.parameters()]))
        if mode == "batch":
            results[-1][1].append(torch.tensor(sdzoo.live_blocks(model)))
    close(results[0][0], results[1][0], tol=1e-6)
    for plain, checkpointed in zip(results[0][1], results[1][1], strict=True):
        close(plain, checkpointed, tol=1e-6)


def test_gradient_checkpointing_calls_no_convolution_of_a_skipped_block(
    images: Tensor, conv_calls: Callable[[nn.Module], dict[str, int]]
) -> None:
    model = training_net()
    model.set_grad_checkpointing()
    calls = conv_calls(model)
    with sdzoo.fixed_gates(model, BITS):
        model(images).sum().backward()
    for index, bit in enumerate(BITS):
        assert calls[f"layer{index // 3 + 1}.{index % 3}.conv1"] == 2 * bit  # once more in the backward


def test_sample_mode_masks_each_sample_by_itself() -> None:
    image = random_images(1, 8).expand(64, -1, -1, -1)
    model = training_net(survival_probs=[1.0] * 8 + [0.5], mode="sample")
    seen = torch.unique(model(image).detach().round(decimals=3), dim=0)
    assert len(seen) == 2  # with the last branch, and without
    state = training_net().state_dict()
    for bit in (0, 1):
        by_hand = plain_forward(state, image, [1] * 8 + [bit], training=True)[0]
        assert ((seen - by_hand).abs().max(1).values < 2e-3).sum() == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_evaluation_is_the_papers_and_has_no_randomness(dtype: torch.dtype) -> None:
    model, images = calibrated("sd_resnet110", images=random_images(8, 16)).to(dtype), random_images(4, 16).to(dtype)
    before, state = torch.get_rng_state(), model.state_dict()
    out = evaluate(model, images)
    assert torch.equal(torch.get_rng_state(), before)
    close(plain_forward(state, images, stored_probs(state)), out, tol=1e-5 if dtype == torch.float32 else 1e-11)


@pytest.mark.parametrize("act_layer", ["silu", "gelu", "leaky_relu"])
def test_training_works_with_another_activation(act_layer: str, images: Tensor) -> None:
    model = training_net(act_layer=act_layer, schedule="uniform")
    with sdzoo.fixed_gates(model, BITS):
        F.cross_entropy(model(images), TARGETS).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("size", [(33, 33), (31, 40), (5, 7), (1, 1)])
def test_odd_sizes_train_evaluate_and_fold(size: tuple[int, int]) -> None:
    model, images = training_net(schedule="uniform"), torch.randn(4, 3, *size)
    height, width = (math.ceil(math.ceil(side / 2) / 2) for side in size)
    with sdzoo.fixed_gates(model, [1, 0, 1, 0, 1, 1, 0, 1, 1]):
        model(images).sum().backward()
    model.eval()
    assert model.forward_features(images).shape == (4, 64, height, width)
    close(evaluate(model, images), evaluate(sdzoo.fold(model), images), tol=1e-4)


def test_channels_last_gives_the_same_function_and_gradients(images: Tensor) -> None:
    results = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        model = training_net().to(memory_format=memory_format)
        with sdzoo.fixed_gates(model, BITS):
            out = model(images.to(memory_format=memory_format))
        out.square().sum().backward()
        results.append([out, *(parameter.grad for parameter in model.parameters())])
    for a, b in zip(*results, strict=True):
        close(a, b, tol=1e-4)


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_ddp_trains_without_a_search_for_unused_parameters(images: Tensor) -> None:
    model = training_net()
    parallel, alone = DistributedDataParallel(copy.deepcopy(model)), copy.deepcopy(model)
    for bits in (BITS, [1 - bit for bit in BITS], [0] * 9, [1] * 9):
        for net in (parallel, alone):
            net.zero_grad()
            with sdzoo.fixed_gates(net, bits):
                F.cross_entropy(net(images), TARGETS).backward()  # DDP raises here if a gradient was missing
        for a, b in zip(alone.parameters(), parallel.parameters(), strict=True):
            assert a.grad is not None
            assert b.grad is not None
            close(a.grad, b.grad, tol=1e-6)


def test_autocast_keeps_the_gates_and_the_gradients(images: Tensor) -> None:
    model = training_net()
    with torch.autocast("cpu", torch.bfloat16), sdzoo.fixed_gates(model, BITS):
        out = model(images[:2, :, :8, :8])
    out.float().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.dtype == torch.float32 for parameter in model.parameters())
