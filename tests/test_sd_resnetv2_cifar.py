"""The pre-activation, wide and aggregated nets for 32 pixels: architecture, equations, folding, loading."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from nets import Net, block_names, calibrated, close, evaluate, random_images, stored_probs, without_probs
from torch import Tensor, nn

import sdzoo
from sdzoo.fold import ScaleShift
from sdzoo.residual import residual_blocks

State = dict[str, Tensor]
TARGETS = torch.arange(4)

# name: blocks per stage, widths, parameters with 10 classes
FAMILY: dict[str, tuple[int, tuple[int, int, int], int]] = {
    "sd_resnetv2_164": (18, (64, 128, 256), 1_703_258),
    "sd_resnetv2_1001": (111, (64, 128, 256), 10_327_706),
    "sd_wide_resnet16_4": (2, (64, 128, 256), 2_748_890),
    "sd_wide_resnet28_10": (4, (160, 320, 640), 36_479_194),
    "sd_resnext29_8x64": (3, (256, 512, 1024), 34_426_698),
}
every_name = pytest.mark.parametrize("name", FAMILY)
# The same networks with few blocks, of which two to a stage have no projection: quick enough for double precision.
SMALL: dict[str, dict[str, Any]] = {
    "sd_resnetv2_164": {"blocks_per_stage": 3},
    "sd_wide_resnet16_4": {"blocks_per_stage": 3, "widths": (24, 48, 96)},
    "sd_resnext29_8x64": {"widths": (32, 64, 128), "base_width": 16},
}
every_small = pytest.mark.parametrize("name", SMALL)
BITS = [1, 0, 1, 0, 0, 1, 1, 1, 0]
every_draw = pytest.mark.parametrize("bits", [BITS, [1] * 9, [0] * 9, [0, 1, 0, 1, 1, 0, 0, 0, 1]])


def small(name: str, seed: int = 0, **kwargs: Any) -> Net:
    """Return a calibrated net of nine blocks in double precision and evaluation."""
    return calibrated(name, seed, images=random_images(8, 16), **(SMALL[name] | kwargs)).double()


def plain_forward(state: State, images: Tensor, branch_weights: Sequence[float], training: bool = False) -> Tensor:
    """Return the logits by the papers' equations on a state dict, no module involved.

    Branch l is multiplied by ``branch_weights[l]``; one of weight 0 is left out. In training the running statistics in
    ``state`` are updated, of what runs.
    """

    def norm(x: Tensor, name: str) -> Tensor:
        statistics = (state[f"{name}.running_mean"], state[f"{name}.running_var"])
        return F.batch_norm(x, *statistics, state[f"{name}.weight"], state[f"{name}.bias"], training)

    def conv(x: Tensor, name: str, stride: int = 1) -> Tensor:
        weight = state[f"{name}.weight"]
        return F.conv2d(x, weight, None, stride, weight.shape[-1] // 2, groups=x.shape[1] // weight.shape[1])

    pre_activation = "norm.weight" in state
    x = conv(images, "conv1")
    if not pre_activation:
        x = F.relu(norm(x, "bn1"))
    for name, weight in zip(block_names(state), branch_weights, strict=True):
        stride = 2 if name in ("layer2.0", "layer3.0") else 1
        bottleneck = f"{name}.conv3.weight" in state
        projects = any(key.startswith(f"{name}.downsample.") for key in state)
        shortcut = x
        if pre_activation:
            # Zagoruyko's and He's: the first norm and ReLU before the projection; an identity carries the raw sum
            entry = F.relu(norm(x, f"{name}.norm1")) if projects or weight != 0 else x
            if projects:
                shortcut = conv(entry, f"{name}.downsample.conv", stride)
            if weight != 0:
                y = conv(entry, f"{name}.conv1", 1 if bottleneck else stride)
                y = conv(F.relu(norm(y, f"{name}.norm2")), f"{name}.conv2", stride if bottleneck else 1)
                if bottleneck:
                    y = conv(F.relu(norm(y, f"{name}.norm3")), f"{name}.conv3")
                shortcut = shortcut + weight * y
            x = shortcut
        else:
            if projects:
                shortcut = norm(conv(x, f"{name}.downsample.0", stride), f"{name}.downsample.1")
            if weight != 0:
                y = F.relu(norm(conv(x, f"{name}.conv1"), f"{name}.bn1"))
                y = F.relu(norm(conv(y, f"{name}.conv2", stride), f"{name}.bn2"))
                shortcut = shortcut + weight * norm(conv(y, f"{name}.conv3"), f"{name}.bn3")
            x = F.relu(shortcut)
    if pre_activation:
        x = F.relu(norm(x, "norm"))
    return x.mean((2, 3)) @ state["fc.weight"].T + state["fc.bias"]


def copied(state: State) -> State:
    return {name: value.detach().clone() for name, value in state.items()}


# --- architecture


def block_shapes(name: str) -> Iterator[tuple[int, int]]:
    """Yield the channels in and out of each block."""
    blocks, widths, _ = FAMILY[name]
    chans = 64 if "resnext" in name else 16
    for width in widths:
        for _ in range(blocks):
            yield chans, width
            chans = width


def parameters_by_hand(name: str, classes: int = 10) -> int:
    """Count weights of convolutions, two numbers for each channel of a norm, and the classifier."""
    _, widths, _ = FAMILY[name]
    stem = 27 * (64 if "resnext" in name else 16)
    body = 0
    for a, c in block_shapes(name):
        project = a * c if a != c else 0
        if "wide" in name:
            body += 2 * a + 9 * a * c + 2 * c + 9 * c * c + project
        elif "resnext" in name:
            mid = 2 * c  # 8 groups of 64 channels where the block gives 256
            body += a * mid + 2 * mid + 9 * mid * (mid // 8) + 2 * mid + mid * c + 2 * c + project + (2 * c) * (a != c)
        else:
            mid = c // 4
            body += 2 * a + a * mid + 2 * mid + 9 * mid * mid + 2 * mid + mid * c + project
    end = 2 * (64 if "resnext" in name else widths[-1])  # the stem's norm, or the last sum's
    return stem + body + end + classes * (widths[-1] + 1)


@every_name
def test_layers_blocks_and_parameters_are_the_papers(name: str) -> None:
    blocks, widths, parameters = FAMILY[name]
    model: Net = timm.create_model(name, device="meta")
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert parameters_by_hand(name) == parameters
    assert len(sdzoo.survival_probs(model)) == 3 * blocks
    convs = [key for key, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    projections = [key for key in convs if "downsample" in key]
    assert len(projections) == 3
    # Zagoruyko and Komodakis count the convolutions, projections too; the others the classifier instead
    depth = len(convs) if "wide" in name else len(convs) - 3 + 1
    assert re.search(rf"[t_]{depth}(_|$)", name)
    assert model.widths == widths


@every_name
def test_a_hundred_classes(name: str) -> None:
    model: Net = timm.create_model(name, num_classes=100, device="meta")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert parameters == parameters_by_hand(name, 100) == FAMILY[name][2] + 90 * (FAMILY[name][1][-1] + 1)
    assert model(torch.empty(2, 3, 32, 32, device="meta")).shape == (2, 100)


@every_name
def test_widths_strides_and_groups(name: str) -> None:
    model: Net = timm.create_model(name, device="meta")
    shapes = dict(zip(block_names(model.state_dict()), block_shapes(name), strict=True))
    assert model.conv1.stride == (1, 1)
    for block, (chans, width) in shapes.items():
        stride = (2, 2) if block in ("layer2.0", "layer3.0") else (1, 1)
        convs = {
            key: module for key, module in model.get_submodule(block).named_modules() if isinstance(module, nn.Conv2d)
        }
        last = "conv3" if "conv3" in convs else "conv2"
        strided = "conv2" if last == "conv3" else "conv1"  # the 3x3 of a bottleneck
        assert convs["conv1"].in_channels == chans
        assert convs[last].out_channels == width
        for key, conv in convs.items():
            assert conv.bias is None
            assert conv.stride == (stride if key == strided or "downsample" in key else (1, 1)), (block, key)
            three = ("wide" in name and "downsample" not in key) or (last == "conv3" and key == "conv2")
            assert conv.kernel_size == ((3, 3) if three else (1, 1)), (block, key)
            assert conv.groups == (8 if "resnext" in name and key == "conv2" else 1)
        assert any("downsample" in key for key in convs) is (chans != width)


@every_small
def test_a_fresh_branch_is_not_switched_off_and_convolutions_have_relu_gain(name: str) -> None:
    model: Net = timm.create_model(name, **SMALL[name])
    for key, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            assert bool((module.weight == 1).all()), key
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 2000:
            fan_out = module.out_channels // module.groups * module.kernel_size[0] ** 2
            fan_out = module.weight.shape[0] * module.kernel_size[0] ** 2 if module.groups > 1 else fan_out
            ratio = module.weight.var().item() * fan_out / 2
            assert ratio == pytest.approx(1, abs=5 * math.sqrt(2 / module.weight.numel())), key


# --- the equations


@every_small
def test_evaluation_is_the_papers(name: str) -> None:
    model, images = small(name), random_images(4, 16).double()
    state = model.state_dict()
    out = evaluate(model, images)
    close(plain_forward(copied(state), images, stored_probs(state)), out, tol=1e-10)
    for other in ([1.0] * 9, [0.0] * 9):  # the branches and their probabilities matter to this test
        assert (plain_forward(copied(state), images, other) - out).abs().max() > 0.01 * out.abs().max()


@every_name
def test_evaluation_of_the_whole_nets_is_the_papers(name: str) -> None:
    model, images = calibrated(name, images=random_images(8, 8)).double(), random_images(2, 8).double()
    state = model.state_dict()
    expected = plain_forward(copied(state), images, stored_probs(state))
    close(expected, evaluate(model, images), tol=1e-10)
    model.float()
    close(expected, evaluate(model, images.float()), tol=1e-4)


@every_draw
@every_small
def test_training_computes_the_equation_forward_backward_and_statistics(name: str, bits: list[int]) -> None:
    model, images = small(name).train(), random_images(4, 16).double()
    plain = copied(model.state_dict())
    for key, _ in model.named_parameters():
        plain[key].requires_grad_()
    by_hand = plain_forward(plain, images, bits, training=True)
    with sdzoo.fixed_gates(model, bits):
        out = model(images)
    close(by_hand, out, tol=1e-10)
    F.cross_entropy(by_hand, TARGETS).backward()
    F.cross_entropy(out, TARGETS).backward()
    for key, parameter in model.named_parameters():
        expected = plain[key].grad
        assert parameter.grad is not None, key
        close(torch.zeros_like(parameter) if expected is None else expected, parameter.grad, tol=1e-10)
    for key, buffer in model.named_buffers():
        if "running" in key:
            close(plain[key], buffer, tol=1e-12)


@every_draw
@every_small
def test_what_is_skipped_and_what_always_runs(
    name: str, bits: list[int], conv_calls: Callable[[nn.Module], dict[str, int]]
) -> None:
    model = small(name).train()
    calls, before = conv_calls(model), copied(model.state_dict())
    with sdzoo.fixed_gates(model, bits):
        model(random_images(2, 8).double()).sum().backward()
    assert calls.pop("conv1") == 1
    live = dict(zip(block_names(before), bits, strict=True))
    for key, count in calls.items():
        block = ".".join(key.split(".")[:2])
        assert count == (1 if "downsample" in key else live[block]), key
    for key, count in model.named_buffers():
        if not key.endswith("num_batches_tracked") or not key.startswith("layer"):
            continue
        block, norm = ".".join(key.split(".")[:2]), key.split(".")[2]
        projects = block.endswith(".0")
        always = norm == "downsample" or (norm == "norm1" and projects)  # the shortcut reads it too
        assert count - before[key] == (1 if always else live[block]), key


def test_a_skipped_identity_hands_on_the_raw_sum() -> None:
    model = small("sd_resnetv2_164").train()
    for index in (1, 2):
        block: Net = model.layer2[index]
        x = random_images(2, 4, 128).double()  # negative values too: no ReLU touches it
        with sdzoo.fixed_gates(block, [0]):
            assert torch.equal(block(x), x)
            assert (x < 0).any()


@every_small
def test_per_sample_masks_are_gates_of_samples(name: str) -> None:
    model = small(name, mode="sample", survival_probs=[1.0] * 8 + [0.5]).train()
    image = random_images(1, 8).double().expand(32, -1, -1, -1)
    out = model(image).detach()
    seen = torch.unique(out.round(decimals=6), dim=0)
    assert len(seen) == 2
    if name != "sd_resnext29_8x64":
        return  # the last norm's statistics depend on the masks
    state = copied(model.state_dict())
    for bit in (0, 1):
        by_hand = plain_forward(copied(state), image, [1] * 8 + [bit], training=True)[0]
        assert ((seen - by_hand).abs().max(1).values < 1e-5).sum() == 1


# --- folding


@every_small
@pytest.mark.parametrize(("dtype", "tol"), [(torch.float32, 1e-4), (torch.float64, 1e-10)])
def test_a_folded_net_computes_the_evaluation_function(name: str, dtype: torch.dtype, tol: float) -> None:
    model, images = small(name), random_images(4, 16)
    state = model.state_dict()
    expected = plain_forward(copied(state), images.double(), stored_probs(state))
    folded = sdzoo.fold(model.to(dtype))
    close(expected, evaluate(folded, images.to(dtype)), tol=tol)
    close(evaluate(model, images.to(dtype)), evaluate(folded, images.to(dtype)), tol=tol)


@every_small
def test_only_norms_that_a_sum_feeds_are_left_and_as_scale_and_shift(name: str) -> None:
    folded = sdzoo.fold(small(name))
    assert not [key for key, module in folded.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    assert residual_blocks(folded) == []
    left = {key for key, module in folded.named_modules() if isinstance(module, ScaleShift)}
    # the first norm of the first block follows the stem's convolution
    sums = {f"layer{stage}.{block}.norm1" for stage in (1, 2, 3) for block in range(3)} - {"layer1.0.norm1"}
    assert left == (set() if "resnext" in name else {*sums, "norm"})
    assert not list(folded.buffers())


@every_name
def test_the_whole_nets_fold(name: str) -> None:
    model, images = calibrated(name, images=random_images(8, 8)), random_images(4, 8)
    close(evaluate(model, images), evaluate(sdzoo.fold(model), images), tol=1e-4)


# --- the loading rule


@every_small
def test_weights_with_p_bring_it_or_are_rescaled(name: str) -> None:
    source, images = small(name, drop_path_rate=0.7), random_images(4, 16).double()
    state = source.state_dict()
    taken: Net = timm.create_model(name, **SMALL[name]).double()
    taken.load_state_dict(state)
    assert sdzoo.survival_probs(taken) == sdzoo.survival_probs(source)
    assert torch.equal(evaluate(taken, images), evaluate(source, images))
    explicit: Net = timm.create_model(name, schedule="uniform", drop_path_rate=0.2, **SMALL[name]).double()
    explicit.load_state_dict(state)
    assert sdzoo.survival_probs(explicit) == [0.8] * 9
    close(plain_forward(copied(state), images, stored_probs(state)), evaluate(explicit, images), tol=1e-10)


@every_small
@pytest.mark.parametrize("asked", [{}, {"schedule": "uniform", "drop_path_rate": 0.7}])
def test_weights_without_p_are_of_constant_depth(name: str, asked: dict[str, Any]) -> None:
    source, images = small(name), random_images(4, 16).double()
    state = copied(without_probs(source.state_dict()))
    model: Net = timm.create_model(name, **asked, **SMALL[name]).double()
    model.load_state_dict(copied(state))
    expected = plain_forward(state, images, [1.0] * 9)
    close(expected, evaluate(model, images), tol=1e-10)
    assert sdzoo.survival_probs(model)[-1] == pytest.approx(0.3 if asked else 0.5, abs=1e-6)


@every_small
def test_set_survival_keeps_the_function(name: str) -> None:
    model, images = small(name), random_images(4, 16).double()
    expected = evaluate(model, images)
    twin = copy.deepcopy(model)
    sdzoo.set_survival(model, [0.1 * index for index in range(1, 10)])
    close(expected, evaluate(model, images), tol=1e-10)
    with sdzoo.fixed_gates(model.train(), [1] * 9), sdzoo.fixed_gates(twin.train(), [1] * 9):
        assert (model(images) - twin(images)).abs().max() > 1e-3


@every_small
@pytest.mark.parametrize("missing", ["conv", "norm"])
def test_a_part_of_a_branch_is_refused(name: str, missing: str) -> None:
    state = copied(small(name).state_dict())
    branch_end = "layer2.1.bn3.weight" if "resnext" in name else f"layer2.1.conv{3 if 'v2' in name else 2}.weight"
    del state[branch_end if missing == "conv" else "layer2.1.gate.survival_prob"]
    model: Net = timm.create_model(name, **SMALL[name]).double()
    with pytest.raises(RuntimeError, match=r"layer2\.1"):
        model.load_state_dict(state, strict=False)
