"""Each gated block against timm's own block of the same weights."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from nets import Net, close, random_images
from timm.layers import (
    BatchNormAct2d,
    BlurPool2d,
    CecaModule,
    DiffAttention,
    DropPath,
    EcaModule,
    EffectiveSEModule,
    GluMlp,
    GroupNorm,
    GroupNormAct,
    LayerNorm2d,
    RmsNorm,
    RmsNorm2d,
    SEModule,
    create_conv2d,
)
from timm.layers.norm_act import FrozenBatchNormAct2d
from timm.models import convnext, regnet, resnet, resnetv2
from timm.models.vision_transformer import Block, ResPostBlock
from timm_nets import DROP_PATHS, always_used, branch_parts, randomise, weighted
from torch import Tensor, nn
from torchvision.ops.misc import FrozenBatchNorm2d

import sdzoo
from sdzoo.errors import InputError
from sdzoo.gate import Gate
from sdzoo.timm_blocks import GATED, become_gated, become_stock

CHANS = 16
NoAffine = partial(nn.BatchNorm2d, affine=False)


def basic(proj: bool, chans: int = CHANS, **kwargs: Any) -> Net:
    down = resnet.downsample_conv(8, chans, 3, 2) if proj else None
    return resnet.BasicBlock(8 if proj else chans, chans, stride=2 if proj else 1, downsample=down, **kwargs)


def bottleneck(proj: bool, **kwargs: Any) -> Net:
    down = resnet.downsample_avg(8, CHANS, 1, 2) if proj else None
    return resnet.Bottleneck(8 if proj else CHANS, CHANS // 4, stride=2 if proj else 1, downsample=down, **kwargs)


def reg(kind: type[nn.Module], proj: bool, **kwargs: Any) -> Net:
    return kind(8 if proj else CHANS, CHANS, stride=2 if proj else 1, group_size=8, **kwargs)


def v2(kind: type[nn.Module], proj: bool, **kwargs: Any) -> Net:
    settings: dict[str, Any] = {"conv_layer": create_conv2d, "norm_layer": BatchNormAct2d} | kwargs
    down = resnetv2.DownsampleConv if proj else None
    return kind(8 if proj else CHANS, CHANS, stride=2 if proj else 1, proj_layer=down, **settings)


def conv_next(proj: bool, **kwargs: Any) -> Net:
    return convnext.ConvNeXtBlock(8 if proj else CHANS, CHANS, stride=2 if proj else 1, **kwargs)


BOTH = {
    "BasicBlock": basic,
    "Bottleneck": bottleneck,
    "regnet.Bottleneck": partial(reg, regnet.Bottleneck),
    "regnet.PreBottleneck": partial(reg, regnet.PreBottleneck),
    "PreActBasic": partial(v2, resnetv2.PreActBasic),
    "PreActBottleneck": partial(v2, resnetv2.PreActBottleneck),
    "resnetv2.Bottleneck": partial(v2, resnetv2.Bottleneck),
    "ConvNeXtBlock": conv_next,
}
VARIANTS: dict[str, tuple[Callable[[bool], Net], dict[str, Any]]] = {
    "BasicBlock SE": (basic, {"attn_layer": SEModule}),
    "BasicBlock SiLU": (basic, {"act_layer": nn.SiLU}),
    "BasicBlock LeakyReLU": (basic, {"act_layer": nn.LeakyReLU}),
    "BasicBlock PReLU": (basic, {"act_layer": lambda inplace: nn.PReLU()}),
    "BasicBlock reduce_first": (basic, {"reduce_first": 2}),
    "Bottleneck ECA": (bottleneck, {"attn_layer": EcaModule}),
    "Bottleneck groups": (bottleneck, {"cardinality": 2, "base_width": 32}),
    "regnet.Bottleneck linear": (BOTH["regnet.Bottleneck"], {"linear_out": True}),
    "regnet.PreBottleneck no SE": (BOTH["regnet.PreBottleneck"], {"se_ratio": 0}),
    "PreActBottleneck GroupNorm": (BOTH["PreActBottleneck"], {"norm_layer": partial(GroupNormAct, num_groups=2)}),
    "ConvNeXtBlock GRN conv": (conv_next, {"use_grn": True, "conv_mlp": True, "ls_init_value": None}),
}
TRANSFORMERS: dict[str, Callable[[], Net]] = {
    "Block": lambda: Block(CHANS, 2, qkv_bias=True),
    "Block LayerScale": lambda: Block(CHANS, 2, init_values=1e-5, qk_norm=True, scale_mlp_norm=True),
    "Block GLU": lambda: Block(CHANS, 2, mlp_layer=GluMlp, scale_attn_norm=True, proj_bias=False),  # type: ignore[arg-type]
    "Block differential": lambda: Block(CHANS, 2, attn_layer=DiffAttention),  # type: ignore[arg-type]
    "ResPostBlock": lambda: ResPostBlock(CHANS, 2),
    "ResPostBlock RMS": lambda: ResPostBlock(CHANS, 2, norm_layer=RmsNorm),
}
CASES: dict[str, Callable[[], Net]] = {
    **{f"{name}, {'projection' if p else 'identity'}": partial(f, p) for name, f in BOTH.items() for p in (0, 1)},
    **{
        f"{name}, {'projection' if p else 'identity'}": partial(f, p, **settings)
        for name, (f, settings) in VARIANTS.items()
        for p in (0, 1)
    },
    "BasicBlock, anti-alias": partial(basic, True, aa_layer=BlurPool2d),
    "Bottleneck, anti-alias": partial(bottleneck, True, aa_layer=BlurPool2d),
    **TRANSFORMERS,
}
every_block = pytest.mark.parametrize("case", CASES)
CHAINS = [name.removesuffix(", identity") for name in CASES if name.endswith(", identity")]


def block_of(case: str) -> Net:
    return randomise(CASES[case]().double()).eval()


def input_of(block: Net, seed: int = 1) -> Tensor:
    if isinstance(block, (Block, ResPostBlock)):
        return torch.randn(3, 5, CHANS, generator=torch.Generator().manual_seed(seed)).double()
    chans = next(p.shape[1] for p in block.parameters() if p.ndim == 4)
    if isinstance(block, convnext.ConvNeXtBlock):
        chans = 8 if isinstance(block.shortcut, convnext.Downsample) else CHANS
    x = random_images(3, 8, chans, seed).double()
    act = block.act2 if isinstance(block, resnet.BasicBlock) else nn.ReLU()
    return x.abs() if isinstance(act, nn.ReLU) else act(x)


def gates_of(block: nn.Module) -> int:
    return len(DROP_PATHS[type(block)])


def gated_of(block: Net, *probs: float) -> Net:
    """Return a gated copy of timm's ``block``; its branches have the survival probabilities ``probs``."""
    gated: Net = become_gated(copy.deepcopy(block), survival_prob=0.5)
    for name, p in zip(gated.gate_names, probs, strict=True):
        getattr(gated, name).set(p)
    return gated


def rounded(*probs: float) -> list[float]:
    return torch.tensor(probs).double().tolist()


def run(block: Net, x: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor | None]]:
    """Return the output, and the gradients of the input and of every parameter, of a weighted sum of the output."""
    x = x.detach().clone().requires_grad_()
    block.zero_grad()
    out = block(x)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).double()
    (out * weights).sum().backward()
    assert x.grad is not None
    return out, x.grad, {name: p.grad for name, p in block.named_parameters()}


def same_gradients(expected: dict[str, Tensor | None], got: dict[str, Tensor | None], tol: float) -> None:
    assert expected.keys() == got.keys()
    for name, gradient in expected.items():
        other = got[name]
        assert gradient is not None and other is not None, name
        close(gradient.flatten(), other.flatten(), tol)


def test_every_known_class_is_here() -> None:
    assert {type(build()) for build in CASES.values()} == set(GATED) == set(DROP_PATHS)


@every_block
def test_a_gated_block_is_still_timms(case: str) -> None:
    block = block_of(case)
    gated = gated_of(block, *[0.5] * gates_of(block))
    assert isinstance(gated, type(block))
    assert set(gated.state_dict()) - set(block.state_dict()) == {f"{name}.survival_prob" for name in gated.gate_names}
    assert not [module for module in gated.modules() if isinstance(module, DropPath)]


@every_block
def test_evaluation_weights_timms_branch_by_p(case: str) -> None:
    block = block_of(case)
    x, probs = input_of(block), [0.3, 0.8][: gates_of(block)]
    expected = weighted(block, rounded(*probs))(x)
    assert (expected - block(x)).abs().max() > 0.05
    close(expected, gated_of(block, *probs).eval()(x), tol=1e-12)


@every_block
def test_an_open_gate_trains_timms_block(case: str) -> None:
    block = block_of(case).train()
    gated = gated_of(block, *[0.5] * gates_of(block))
    with sdzoo.fixed_gates(gated, [1] * gates_of(block)):
        out, dx, gradients = run(gated, input_of(block))
    expected_out, expected_dx, expected = run(block, input_of(block))
    close(expected_out, out, tol=1e-12)
    close(expected_dx, dx, tol=1e-12)
    same_gradients(expected, gradients, tol=1e-12)
    for name, buffer in block.named_buffers():
        close(buffer.flatten(), gated.get_buffer(name).flatten(), tol=1e-12)


@every_block
def test_a_closed_gate_computes_nothing_of_the_branch(case: str) -> None:
    block = block_of(case).train()
    used, shut = always_used(block), [0] * gates_of(block)
    gated, before = gated_of(block, *[0.5] * gates_of(block)), copy.deepcopy(dict(block.named_buffers()))
    called: set[str] = set()
    for name, module in gated.named_modules():
        if name and not isinstance(module, Gate):
            module.register_forward_hook(lambda _m, _i, _o, name=name: called.add(name.partition(".")[0]))
    with sdzoo.fixed_gates(gated, shut):
        out, dx, gradients = run(gated, input_of(block))
    assert called <= set(used)
    reference = weighted(block, shut).train()
    expected_out, expected_dx, expected = run(reference, input_of(block))
    close(expected_out, out, tol=1e-12)
    close(expected_dx, dx, tol=1e-12)
    same_gradients(expected, gradients, tol=1e-12)
    for name, gradient in gradients.items():
        assert gradient is not None
        assert bool(gradient.any()) == (name.partition(".")[0] in used), name
    for name, buffer in gated.named_buffers():
        if not name.endswith("survival_prob") and name.partition(".")[0] not in used:
            assert torch.equal(buffer, before[name]), name
        elif name.endswith("running_mean"):  # the shortcut learns
            assert not torch.equal(buffer, before[name]), name


@pytest.mark.parametrize("case", TRANSFORMERS)
@pytest.mark.parametrize("bits", [(0, 1), (1, 0)])
def test_one_of_two_branches_is_skipped_alone(case: str, bits: tuple[int, int]) -> None:
    block = block_of(case).train()
    gated = gated_of(block, 0.5, 0.5)
    parts = branch_parts(block)
    called: set[str] = set()
    for name in itertools.chain(*parts):
        if hasattr(gated, name):
            getattr(gated, name).register_forward_hook(lambda _m, _i, _o, name=name: called.add(name))
    with sdzoo.fixed_gates(gated, bits):
        out, dx, gradients = run(gated, input_of(block))
    assert called
    assert called <= parts[bits.index(1)]
    expected_out, expected_dx, expected = run(weighted(block, bits), input_of(block))
    close(expected_out, out, tol=1e-12)
    close(expected_dx, dx, tol=1e-12)
    same_gradients(expected, gradients, tol=1e-12)


@every_block
@pytest.mark.parametrize("bit", [0, 1])
def test_frozen_parameters_get_no_gradient(case: str, bit: int) -> None:
    block = block_of(case).train()
    frozen = list(block.state_dict(keep_vars=True))[::2]
    for name, parameter in block.named_parameters():
        parameter.requires_grad_(name not in frozen)
    gated, bits = gated_of(block, *[0.5] * gates_of(block)), [bit] * gates_of(block)
    with sdzoo.fixed_gates(gated, bits):
        _, dx, gradients = run(gated, input_of(block))
        assert {name for name, gradient in gradients.items() if gradient is None} == {
            name for name, parameter in block.named_parameters() if not parameter.requires_grad
        }
        gated.requires_grad_(False)
        _, frozen_dx, gradients = run(gated, input_of(block))
    assert set(gradients.values()) == {None}
    assert torch.equal(frozen_dx, dx)


@every_block
@pytest.mark.parametrize("training", [True, False])
def test_the_input_is_not_overwritten(case: str, training: bool) -> None:
    block = block_of(case).train(training)
    gated = gated_of(block, *[0.5] * gates_of(block))
    x = -input_of(block)  # so that a ReLU would change it
    before = x.clone()
    for bit in (0, 1) if training else ():
        with sdzoo.fixed_gates(gated, [bit] * gates_of(block)), torch.no_grad():
            gated(x)
            assert torch.equal(x, before)
    if not training:
        gated(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("shortcut", [nn.Sequential(), nn.Dropout(0.0), nn.Flatten(2, 2)])
def test_a_shortcut_that_returns_its_input_is_not_overwritten(shortcut: nn.Module) -> None:
    block: Net = basic(False).double()
    block.downsample = shortcut
    x = random_images(3, 8, CHANS).double()
    before, gated = x.clone(), gated_of(block, 0.5)
    with sdzoo.fixed_gates(gated, [0]):
        with torch.no_grad():
            close(before.relu(), gated(x), tol=0)
        assert torch.equal(x, before)
        out, _, _ = run(gated, x)
    close(before.relu(), out, tol=0)


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("bits", list(itertools.product((0, 1), repeat=4)))
def test_a_chain_of_blocks_with_any_gates_is_timms_chain(name: str, bits: tuple[int, ...]) -> None:
    cases = [f"{name}, projection", *[f"{name}, identity"] * 3]
    blocks = [randomise(CASES[case]().double(), seed).train() for seed, case in enumerate(cases)]
    gated = nn.Sequential(*(gated_of(block, 0.5) for block in blocks))
    with sdzoo.fixed_gates(gated, bits):
        out, dx, gradients = run(gated, input_of(blocks[0]))
    reference = nn.Sequential(*(weighted(block, [bit]) for block, bit in zip(blocks, bits, strict=True)))
    expected_out, expected_dx, expected = run(reference, input_of(blocks[0]))
    close(expected_out, out, tol=1e-12)
    close(expected_dx, dx, tol=1e-11)
    same_gradients(expected, gradients, tol=1e-11)


@pytest.mark.parametrize("case", TRANSFORMERS)
@pytest.mark.parametrize("bits", [(1, 0, 0, 1), (0, 1, 1, 0), (0, 0, 1, 1), (1, 0, 1, 1)])
def test_a_chain_of_transformer_blocks_with_any_gates_is_timms_chain(case: str, bits: tuple[int, ...]) -> None:
    blocks = [randomise(CASES[case]().double(), seed).train() for seed in (1, 2)]
    gated = nn.Sequential(*(gated_of(block, 0.5, 0.5) for block in blocks))
    with sdzoo.fixed_gates(gated, bits):
        out, dx, gradients = run(gated, input_of(blocks[0]))
    reference = nn.Sequential(weighted(blocks[0], bits[:2]), weighted(blocks[1], bits[2:]))
    expected_out, expected_dx, expected = run(reference, input_of(blocks[0]))
    close(expected_out, out, tol=1e-12)
    close(expected_dx, dx, tol=1e-11)
    same_gradients(expected, gradients, tol=1e-11)


@pytest.mark.parametrize("causal", [False, True])
def test_a_transformer_block_takes_timms_masks(causal: bool) -> None:
    block = block_of("Block")
    x, mask = input_of(block), None if causal else torch.rand(5, 5) > 0.3
    if mask is not None:
        mask.fill_diagonal_(True)
    expected = weighted(block, rounded(0.3, 0.8))(x, attn_mask=mask, is_causal=causal)
    assert (expected - weighted(block, rounded(0.3, 0.8))(x)).abs().max() > 1e-3
    close(expected, gated_of(block, 0.3, 0.8)(x, attn_mask=mask, is_causal=causal), tol=1e-12)


@every_block
def test_sample_mode_keeps_or_drops_each_sample_unscaled(case: str) -> None:
    block = block_of(case).train()
    x = input_of(block).repeat(20, *[1] * (input_of(block).ndim - 1))
    gated = become_gated(copy.deepcopy(block), survival_prob=0.5, mode="sample")
    out = gated(x)
    count = gates_of(block)
    possible = torch.stack([weighted(block, bits)(x) for bits in itertools.product((0, 1), repeat=count)])
    distances = (possible - out).abs().flatten(2).amax(2)
    assert distances.amin(0).max() < 1e-9
    chosen = distances.argmin(0).bincount(minlength=2**count)
    assert (chosen > 0).all()


NORMS: dict[str, Callable[..., nn.Module]] = {
    "BatchNorm": nn.BatchNorm2d,
    "SyncBatchNorm": nn.SyncBatchNorm,
    "FrozenBatchNorm": lambda chans, **_: FrozenBatchNorm2d(chans),
    "GroupNorm": partial(GroupNorm, num_groups=2),
    "LayerNorm2d": LayerNorm2d,
    "RmsNorm2d": RmsNorm2d,
}
ATTENTIONS: dict[str, Callable[..., nn.Module]] = {
    "SE": SEModule,
    "SE with maximum": partial(SEModule, add_maxpool=True),
    "SE with norm": partial(SEModule, norm_layer=nn.BatchNorm2d),
    "ESE": EffectiveSEModule,
    "ECA": EcaModule,
    "ECA with MLP": partial(EcaModule, use_mlp=True),
    "CECA": CecaModule,
}
ENDINGS: dict[str, Callable[[], Net]] = {
    **CASES,
    **{f"BasicBlock {name}": partial(basic, True, norm_layer=norm) for name, norm in NORMS.items()},
    **{f"Bottleneck {name}": partial(bottleneck, False, norm_layer=norm) for name, norm in NORMS.items()},
    **{f"BasicBlock {name}": partial(basic, True, chans=32, attn_layer=attn) for name, attn in ATTENTIONS.items()},
    **{f"Bottleneck {name}": partial(bottleneck, False, attn_layer=attn) for name, attn in ATTENTIONS.items()},
    "BasicBlock GroupNorm SE": partial(basic, True, norm_layer=NORMS["GroupNorm"], attn_layer=SEModule),
    "resnetv2.Bottleneck GroupNorm": partial(
        v2, resnetv2.Bottleneck, True, norm_layer=partial(GroupNormAct, num_groups=2)
    ),
    "resnetv2.Bottleneck FrozenBatchNorm": partial(v2, resnetv2.Bottleneck, True, norm_layer=FrozenBatchNormAct2d),
    "ConvNeXtBlock conv": partial(conv_next, True, conv_mlp=True, ls_init_value=None),
    "ConvNeXtBlock linear": partial(conv_next, False, ls_init_value=None),
    "ConvNeXtBlock GRN": partial(conv_next, False, use_grn=True, ls_init_value=None),
}


@pytest.mark.parametrize("c", [2.0, 1 / 3, 1e-2])
@pytest.mark.parametrize("ending", ENDINGS)
def test_scale_branch_multiplies_the_branch_and_nothing_else(ending: str, c: float) -> None:
    block = randomise(ENDINGS[ending]().double()).eval()
    x, names = input_of(block), DROP_PATHS[type(block)]
    ones, zeros = [1.0] * len(names), [0.0] * len(names)
    for index, name in enumerate(names):
        gated = gated_of(block, *[0.5] * len(names))
        gated.scale_branch_(c, gated.gate_names[index])
        become_stock(gated)
        assert torch.equal(weighted(block, zeros)(x), weighted(gated, zeros)(x))
        # What the second branch reads depends on the first: that one must count as before.
        before = weighted(block, ones)
        after = weighted(gated, [1 / c, 1.0] if index == 0 and len(names) == 2 else ones)
        for model in (before, after):
            model(x)
        for other in names:
            factor = c if other == name else 1.0
            close(factor * getattr(before, other).branch, getattr(after, other).branch, tol=1e-12)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_without_the_inverse_an_attention_would_give_another_branch(attention: str) -> None:
    block = randomise(ENDINGS[f"BasicBlock {attention}"]().double()).eval()
    x, naive = input_of(block), copy.deepcopy(block)
    for tensor in (naive.bn2.weight, naive.bn2.bias):
        tensor.data.mul_(3)
    before, after = weighted(block, [1.0]), weighted(naive, [1.0])
    for model in (before, after):
        model(x)
    off = (3 * before.drop_path.branch - after.drop_path.branch).abs().max()
    assert off / (3 * before.drop_path.branch).abs().max() > 1e-3


def with_tanh_for_layer_scale() -> Net:
    block: Net = Block(CHANS, 2)
    block.ls1 = nn.Tanh()
    return block


class SquaringNorm(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) ** 2


UNSCALABLE: dict[str, tuple[Callable[[], Net], str]] = {
    "norm without affine": (partial(basic, True, norm_layer=NoAffine), "BasicBlock.*BatchNorm2d"),
    "unknown norm": (partial(basic, True, norm_layer=SquaringNorm), "BasicBlock.*SquaringNorm"),
    "norm with activation": (partial(basic, True, norm_layer=BatchNormAct2d), "BasicBlock.*BatchNormAct2d"),
    "StdConv2d": (partial(v2, resnetv2.PreActBottleneck, True, conv_layer=None), "PreActBottleneck.*StdConv2d"),
    "unknown layer scale": (with_tanh_for_layer_scale, "Block.*Tanh"),
}


@pytest.mark.parametrize("name", UNSCALABLE)
def test_a_branch_that_cannot_be_scaled_is_refused_by_class_name(name: str) -> None:
    build, message = UNSCALABLE[name]
    block = build()
    gated = gated_of(block, *[0.5] * gates_of(block))
    with pytest.raises(InputError, match=message):
        gated.scale_branch_(2.0, gated.gate_names[0])
