from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
from nets import after_relu, close, make_block, plain_branch, random_images
from torch import Tensor, nn

import sdzoo
from sdzoo.blocks import BasicBlock, PoolPadShortcut
from sdzoo.errors import InputError
from sdzoo.gate import Gate, OpenGate
from sdzoo.residual import OneBranchBlock


def plain_shortcut(x: Tensor, out_chans: int) -> Tensor:
    batch, chans, height, width = x.shape
    if chans == out_chans:
        return x
    pooled = torch.zeros(batch, out_chans, -(-height // 2), -(-width // 2), dtype=x.dtype)
    for row in range(pooled.shape[2]):
        for column in range(pooled.shape[3]):
            patch = x[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            pooled[:, :chans, row, column] = patch.mean((2, 3))
    return pooled


@pytest.mark.parametrize("size", [(8, 8), (33, 33), (7, 4), (1, 1)])
def test_the_shortcut_averages_and_appends_zero_channels_at_the_end(size: tuple[int, int]) -> None:
    x = torch.randn(2, 3, *size)
    out = PoolPadShortcut(3, 5)(x)
    assert torch.allclose(out, plain_shortcut(x, 5), atol=1e-6, rtol=0)
    assert not out[:, 3:].any()
    assert not list(PoolPadShortcut(3, 5).state_dict())


@pytest.mark.parametrize("out_chans", [8, 16])
@pytest.mark.parametrize("size", [8, 9])
@pytest.mark.parametrize("is_open", [False, True])
def test_training_adds_the_unscaled_branch_or_nothing(out_chans: int, size: int, is_open: bool) -> None:
    block, x = make_block(8, out_chans), after_relu(size=size)
    expected = plain_shortcut(x, out_chans)
    if is_open:
        expected = expected + plain_branch(block, x, training=True)
    with sdzoo.fixed_gates(block, [is_open]):
        close(F.relu(expected), block(x), tol=1e-6)


@pytest.mark.parametrize("out_chans", [8, 16])
@pytest.mark.parametrize("mode", ["batch", "sample"])
def test_evaluation_weights_the_branch_and_never_the_shortcut(out_chans: int, mode: str) -> None:
    block, x = make_block(8, out_chans).eval(), after_relu()
    block.gate = Gate(0.3, mode).eval()
    expected = F.relu(plain_shortcut(x, out_chans) + 0.3 * plain_branch(block, x, training=False))
    close(expected, block(x), tol=1e-6)


def test_sample_mode_masks_each_sample_and_computes_everything() -> None:
    block, x = make_block(8, 8), after_relu()
    block.gate = Gate(0.5, "sample").train()
    branch, tracked = plain_branch(block, x, training=True), int(block.bn1.num_batches_tracked)
    out = block(x)
    for sample in range(4):
        with_branch, without = F.relu(x + branch)[sample], x[sample]
        off = (out[sample] - without).abs().max()
        assert off == 0 or (out[sample] - with_branch).abs().max() < 1e-5
    assert int(block.bn1.num_batches_tracked) == tracked + 1


@pytest.mark.parametrize("out_chans", [8, 16])
def test_a_skipped_block_calls_no_convolution_and_leaves_its_batchnorms_alone(
    out_chans: int, conv_calls: Callable[[nn.Module], dict[str, int]]
) -> None:
    block, x = make_block(8, out_chans), after_relu()
    before, calls = copy.deepcopy(block.state_dict()), conv_calls(block)
    with sdzoo.fixed_gates(block, [0]):
        block(x)
    assert calls == {"conv1": 0, "conv2": 0}
    assert all(torch.equal(value, before[name]) for name, value in block.state_dict().items())
    with sdzoo.fixed_gates(block, [1]):
        block(x)
    assert calls == {"conv1": 1, "conv2": 1}
    for bn in ("bn1", "bn2"):
        assert block.state_dict()[f"{bn}.num_batches_tracked"] == before[f"{bn}.num_batches_tracked"] + 1
        assert not torch.equal(block.state_dict()[f"{bn}.running_mean"], before[f"{bn}.running_mean"])


@pytest.mark.parametrize("out_chans", [8, 16])
def test_a_skipped_block_hands_zero_gradients_to_its_parameters_and_the_shortcuts_to_its_input(out_chans: int) -> None:
    block, x = make_block(8, out_chans), after_relu().requires_grad_()
    with sdzoo.fixed_gates(block, [0]):
        (block(x) * 3).sum().backward()
    assert x.grad is not None
    # the identity; through pooling each output is shared by four inputs, and the block's ReLU passes what is positive
    expected = torch.full_like(x, 3.0)
    if out_chans != 8:
        alive = F.avg_pool2d(x.detach(), 2) > 0
        expected = 0.75 * F.interpolate(alive.float(), scale_factor=2)
    assert torch.equal(x.grad, expected)
    for parameter in block.parameters():
        assert parameter.grad is not None
        assert not parameter.grad.any()


def test_frozen_parameters_of_a_skipped_block_get_no_gradient() -> None:
    block = make_block()
    block.conv1.requires_grad_(False)
    with sdzoo.fixed_gates(block, [0]):
        block(after_relu().requires_grad_()).sum().backward()
    assert block.conv1.weight.grad is None
    assert block.conv2.weight.grad is not None


def test_momentum_and_weight_decay_act_on_the_parameters_of_a_skipped_block() -> None:
    block = make_block()
    sgd = torch.optim.SGD(block.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    weight, momentum = block.conv1.weight.detach().clone().double(), torch.zeros_like(block.conv1.weight).double()
    for bit in (1, 0, 0):
        sgd.zero_grad()
        with sdzoo.fixed_gates(block, [bit]):
            block(after_relu()).square().sum().backward()
        gradient = block.conv1.weight.grad.double() if bit else 0
        sgd.step()
        momentum = 0.9 * momentum + gradient + 0.01 * weight
        weight = weight - 0.1 * momentum
        close(weight, block.conv1.weight, tol=1e-6)
    assert momentum.abs().max() > 0


def test_a_skipped_block_after_another_block_lets_the_gradient_through() -> None:
    # an in-place ReLU on the skipped identity would overwrite what the first block needs for its backward
    first, second, third = make_block(), make_block(), make_block()
    model, x = nn.Sequential(first, second, third), random_images(4, 8, 8).requires_grad_()
    for bits in ([1, 0, 0], [1, 0, 1], [0, 0, 1], [0, 0, 0]):
        x.grad = None
        with sdzoo.fixed_gates(model, bits):
            model(x.relu()).square().sum().backward()
        by_hand = x.detach().clone().requires_grad_()
        out = by_hand.relu()
        for block, bit in zip(model, bits, strict=True):
            assert isinstance(block, BasicBlock)
            out = F.relu(out + plain_branch(block, out, training=True)) if bit else F.relu(out)
        out.square().sum().backward()
        assert x.grad is not None
        assert by_hand.grad is not None
        close(by_hand.grad, x.grad, tol=1e-5)


@pytest.mark.parametrize("act_layer", [nn.SiLU, nn.LeakyReLU, nn.ReLU6])
@pytest.mark.parametrize("out_chans", [8, 16])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_skipped_block_with_another_activation_applies_it(
    act_layer: type[nn.Module], out_chans: int, frozen: bool
) -> None:
    block = make_block(8, out_chans, act_layer=act_layer)
    block.requires_grad_(not frozen)
    leaf = torch.randn(4, 8, 8, 8, requires_grad=True)
    x = leaf.sigmoid() - 0.5  # its backward needs what it returned
    kept = x.detach().clone()
    with sdzoo.fixed_gates(block, [0]):
        out = block(x)
    assert torch.equal(x, kept), "the input was overwritten"
    close(act_layer()(plain_shortcut(kept, out_chans)), out, tol=1e-6)
    out.sum().backward()
    assert leaf.grad is not None
    assert all(frozen or p.grad is not None for p in block.parameters())


def test_a_skipped_block_without_gradients_leaves_its_input_alone() -> None:
    block, x = make_block(8, 8, act_layer=nn.LeakyReLU), torch.randn(2, 8, 4, 4)
    kept = x.clone()
    with torch.no_grad(), sdzoo.fixed_gates(block, [0]):
        block(x)
    assert torch.equal(x, kept)


def test_a_block_with_p_one_draws_no_random_number() -> None:
    block, before = make_block(p=1.0), torch.get_rng_state()
    block(after_relu())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("c", [0.5, 3.7, 1e-3])
def test_scale_branch_multiplies_the_branch_alone(c: float) -> None:
    block, x = make_block(8, 16).double().eval(), after_relu().double()
    branch, shortcut = block.branch(x), block.shortcut(x)
    block.scale_branch_(c)
    close(c * branch, block.branch(x), tol=1e-12)
    assert torch.equal(block.shortcut(x), shortcut)


def test_set_survival_prob_keeps_the_evaluation_function() -> None:
    block, x = make_block(p=0.3).double().eval(), after_relu().double()
    expected = block(x)
    block.set_survival_prob(0.9)
    assert block.gate.p == pytest.approx(0.9, abs=1e-7)
    close(expected, block(x), tol=1e-12)


def test_a_block_without_a_branch_says_so() -> None:
    class Bare(OneBranchBlock):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.shortcut, self.act = Gate(), nn.Identity(), nn.ReLU()

    with pytest.raises(TypeError, match="must define its branch"):
        Bare().eval()(torch.ones(1))


@pytest.mark.parametrize("out_chans", [8, 16])
def test_fuse_keeps_the_evaluation_function_and_returns_the_block(out_chans: int) -> None:
    block, x = make_block(8, out_chans).double().eval(), after_relu().double()
    expected = block(x)
    assert block.fuse() is block
    close(expected, block(x), tol=1e-12)
    assert isinstance(block.gate, OpenGate)
    assert not [module for module in block.modules() if isinstance(module, nn.BatchNorm2d)]
    assert block.fuse() is block  # once more changes nothing
    close(expected, block(x), tol=1e-12)


@pytest.mark.parametrize("part", ["bn1", "bn2", ""])
def test_fuse_refuses_training_mode_and_has_changed_nothing(part: str) -> None:
    block = make_block().eval()
    block.get_submodule(part).train()
    before = copy.deepcopy(block.state_dict())
    with pytest.raises(InputError, match="training mode"):
        block.fuse()
    assert block.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in block.state_dict().items())


def test_a_normalisation_that_cannot_be_rescaled_is_refused_at_creation() -> None:
    with pytest.raises(InputError, match=r"BatchNorm2d \(bn2\), which cannot be scaled exactly"):
        timm.create_model("sd_resnet20", norm_layer=partial(nn.BatchNorm2d, affine=False))
