"""Stochastic depth for timm's own networks, against timm's forward with the branches weighted by hand."""

from __future__ import annotations

import copy
import io
import math
import pickle
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import timm
import torch
from nets import Net, close, evaluate, linear_decay_by_hand, random_images, without_probs
from timm.layers import BatchNormAct2d, DropPath, FilterResponseNormTlu2d, create_conv2d, freeze_batch_norm_2d
from timm.layers.evo_norm import EvoNorm2dS0
from timm.models import resnet, resnetv2
from timm.models.vision_transformer import (
    DiffParallelScalingBlock,
    ParallelScalingBlock,
    ParallelThingsBlock,
)
from timm.utils import ModelEmaV3, reparameterize_model
from timm_nets import (
    DROP_PATHS,
    NETS,
    branch_parts,
    branches,
    randomise,
    res_post_vit,
    stock,
    timm_blocks,
    tiny_vit,
    trained_like,
    weighted,
)
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

import sdzoo
from sdzoo.errors import InputError
from sdzoo.gate import Gate

KNOWN = (
    *("resnet.BasicBlock", "resnet.Bottleneck", "regnet.Bottleneck", "regnet.PreBottleneck", "resnetv2.PreActBasic"),
    *("resnetv2.PreActBottleneck", "resnetv2.Bottleneck", "convnext.ConvNeXtBlock", "vision_transformer.Block"),
    "vision_transformer.ResPostBlock",
)


@pytest.fixture(scope="module", params=NETS)
def name(request: pytest.FixtureRequest) -> str:
    """Return each network in turn, all tests of one together."""
    return request.param


@pytest.fixture
def images() -> Tensor:
    """Return two 64-pixel images of noise."""
    return random_images(2, 64).double()


def gate_probs(name: str, probs: Sequence[float] | None = None) -> list[float]:
    """Return p of every gate of the network ``name``: a transformer block has two."""
    per_block = linear_decay_by_hand(NETS[name][1]) if probs is None else probs
    gates = [len(DROP_PATHS[type(block)]) for _, block in timm_blocks(stock(name))]
    return [p for p, count in zip(per_block, gates, strict=True) for _ in range(count)]


def of_gated(model: nn.Module, gated: nn.Module) -> Net:
    """Return timm's ``model`` with the weights of ``gated``, whose p are thrown away."""
    copied = copy.deepcopy(model)
    copied.load_state_dict(without_probs(gated.state_dict()))
    return copied


def run(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    out = model(x)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out)
    (out * weights).sum().backward()
    assert x.grad is not None
    return out.detach(), x.grad


def snapshot(model: nn.Module) -> dict[str, Any]:
    return {
        "state": copy.deepcopy(model.state_dict()),
        "modules": [(name, id(module), type(module), module.training) for name, module in model.named_modules()],
        "hooks": [len(module._load_state_dict_pre_hooks) for module in model.modules()],
        "grads": [(p.requires_grad, p.grad) for p in model.parameters()],
    }


def unchanged(model: nn.Module, before: dict[str, Any]) -> None:
    after = snapshot(model)
    state = before.pop("state")
    assert after["state"].keys() == state.keys()
    assert all(torch.equal(value, after["state"][key]) for key, value in state.items())
    assert {**after, "state": None} == {**before, "state": None}


def test_the_evaluation_function_stays_in_both_precisions(name: str, images: Tensor) -> None:
    model = stock(name)
    expected, gates = model(images).detach(), NETS[name][2]
    for weights in ([0.0] * gates, gate_probs(name)):  # nothing here would be seen if the branches did not matter
        assert (expected - evaluate(weighted(model, weights), images)).abs().max() > 0.02 * expected.abs().max()
    gated = sdzoo.add_stochastic_depth(model)
    close(expected, evaluate(gated, images), tol=1e-10)
    model.float()
    close(evaluate(model, images.float()), evaluate(sdzoo.add_stochastic_depth(model), images.float()), tol=1e-4)


def test_the_branches_hold_one_over_p(name: str, images: Tensor) -> None:
    model = stock(name)
    gated = sdzoo.add_stochastic_depth(model)
    inner = of_gated(model, gated)
    close(evaluate(model, images), evaluate(weighted(inner, gate_probs(name)), images), tol=1e-10)
    first, first_inner = branches(model, images)[0], branches(inner, images)[0]
    close(first / gate_probs(name)[0], first_inner, tol=1e-10)


def test_probabilities_count_blocks_and_stand_once_a_gate(name: str) -> None:
    _, blocks, gates = NETS[name]
    gated = sdzoo.add_stochastic_depth(stock(name), 0.5)
    probs = sdzoo.survival_probs(gated)
    assert len(probs) == gates
    assert probs == pytest.approx(gate_probs(name), abs=1e-7)
    if gates == 2 * blocks:
        assert probs[::2] == probs[1::2]
    assert sum(isinstance(module, Gate) for module in gated.modules()) == gates


def test_the_argument_is_left_alone_and_the_class_kept(name: str) -> None:
    model = stock(name)
    model.get_submodule(timm_blocks(model)[0][0]).train()
    modes = [module.training for module in model.modules()]
    before = snapshot(model)
    gated = sdzoo.add_stochastic_depth(model)
    unchanged(model, before)
    assert type(gated) is type(model)
    assert {id(p) for p in gated.parameters()}.isdisjoint(id(p) for p in model.parameters())
    kinds = {key: type(module) for key, module in model.named_modules()}
    assert all(
        isinstance(module, kinds[key])
        for key, module in gated.named_modules()
        if "drop_path" not in key and key in kinds
    )
    assert [gated.get_submodule(key).training for key, _ in model.named_modules()] == modes
    for key, block in timm_blocks(model):
        gates = [module for module in gated.get_submodule(key).modules() if isinstance(module, Gate)]
        assert [gate.training for gate in gates] == [block.training] * len(gates)


def test_the_state_dict_is_timms_and_p(name: str) -> None:
    model = stock(name)
    gated = sdzoo.add_stochastic_depth(model)
    more = set(gated.state_dict()) - set(model.state_dict())
    assert set(model.state_dict()) <= set(gated.state_dict())
    assert len(more) == NETS[name][2]
    assert all(re.search(r"\.gate[12]?\.survival_prob$", key) for key in more)
    assert [key for key, _ in gated.named_parameters()] == [key for key, _ in model.named_parameters()]


def test_timms_own_drop_path_is_gone_and_not_doubled(name: str, images: Tensor) -> None:
    model = stock(name)
    gated = sdzoo.add_stochastic_depth(model).train()
    assert not [module for module in gated.modules() if isinstance(module, DropPath)]
    assert [module for module in model.modules() if isinstance(module, DropPath) and module.drop_prob]
    gates = NETS[name][2]
    expected = weighted(of_gated(model, gated), [1.0] * gates).train()(images)
    with sdzoo.fixed_gates(gated, [1] * gates):
        close(expected, gated(images), tol=1e-10)
        close(expected, gated(images), tol=1e-10)


def test_training_with_some_gates_closed_is_timms_without_these_branches(name: str, images: Tensor) -> None:
    model = stock(name)
    gated = sdzoo.add_stochastic_depth(model).train()
    bits = [int(bit) for bit in torch.randint(2, (NETS[name][2],), generator=torch.Generator().manual_seed(4))]
    reference = weighted(of_gated(model, gated), bits).train()
    expected, expected_dx = run(reference, images)
    with sdzoo.fixed_gates(gated, bits):
        out, dx = run(gated, images)
    close(expected, out, tol=1e-10)
    close(expected_dx, dx, tol=1e-9)
    theirs = dict(reference.named_parameters())
    for key, parameter in gated.named_parameters():
        assert parameter.grad is not None, key
        close(theirs[key].grad.flatten(), parameter.grad.flatten(), tol=1e-9)


def test_a_dropped_branch_calls_no_module_and_updates_no_statistic(name: str, images: Tensor) -> None:
    blocks = dict(timm_blocks(stock(name)))
    gated = sdzoo.add_stochastic_depth(stock(name), 0.3, "uniform").train()
    called: list[str] = []
    for key, module in gated.named_modules():
        module.register_forward_pre_hook(lambda _m, _i, key=key: called.append(key))
    before = {key: buffer.clone() for key, buffer in gated.named_buffers()}
    torch.manual_seed(3)
    gated(images)
    live = sdzoo.live_blocks(gated)
    assert {True, False} == set(live)
    parts = [(key, part) for key, block in blocks.items() for part in branch_parts(block)]
    for (key, part), computed in zip(parts, live, strict=True):
        inside = tuple(f"{key}.{child}." for child in part)
        assert any(f"{call}.".startswith(inside) for call in called) == computed, key
        updated = {b for b in before if b.startswith(inside) and not torch.equal(before[b], gated.get_buffer(b))}
        assert bool(updated) == (computed and any("running_mean" in b for b in before if b.startswith(inside)))
    assert [key for key in called if key in blocks] == list(blocks)


@pytest.mark.filterwarnings("ignore:fold keeps")
def test_a_folded_model_computes_the_same(name: str, images: Tensor) -> None:
    model = stock(name)
    gated = sdzoo.add_stochastic_depth(model).eval()
    before = snapshot(gated)
    folded = sdzoo.fold(gated)
    unchanged(gated, before)
    close(evaluate(model, images), evaluate(folded, images), tol=1e-10)
    assert not [module for module in folded.modules() if isinstance(module, (Gate, nn.BatchNorm2d, DropPath))]
    with pytest.raises(InputError, match="has no gates"):
        sdzoo.survival_probs(folded)
    with pytest.raises(InputError, match="training mode"):
        sdzoo.fold(gated.train())


CHECKPOINTED = [
    "resnet26t",
    "resnetv2_18",
    "regnety_002",
    "convnext_atto",
    "vit_tiny_patch16_224",
    "vit_small_r26_s32_224",
]


@pytest.mark.parametrize("mode", ["batch", "sample"])
@pytest.mark.parametrize("net", CHECKPOINTED)
def test_gradient_checkpointing_changes_nothing(net: str, mode: str, images: Tensor) -> None:
    plain = sdzoo.add_stochastic_depth(stock(net), 0.5, "uniform", mode=mode).train()
    checkpointed = copy.deepcopy(plain)
    checkpointed.set_grad_checkpointing()
    results = []
    for model in (plain, checkpointed):
        torch.manual_seed(5)
        results.append((*run(model, images), [p.grad for p in model.parameters()]))
    (out, dx, grads), (out2, dx2, grads2) = results
    assert torch.equal(out, out2)
    close(dx, dx2, tol=1e-12)
    for grad, grad2 in zip(grads, grads2, strict=True):
        assert (grad is None) == (grad2 is None)
        if grad is not None:
            close(grad.flatten(), grad2.flatten(), tol=1e-12)


SCHEDULES: list[tuple[Any, Any, list[float]]] = [
    (0.5, "linear", [0.9375, 0.875, 0.8125, 0.75, 0.6875, 0.625, 0.5625, 0.5]),
    (0.2, "linear_decay", [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2]),
    (0.7, "uniform", [0.7] * 8),
    (0.5, "constant_depth", [1.0] * 8),
    (1, "linear", [1.0] * 8),
    (1.0, "uniform", [1.0] * 8),
    (np.float32(0.5), "uniform", [0.5] * 8),
    (0.5, [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2], [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2]),
    (0.5, np.linspace(1, 0.3, 8), list(np.linspace(1, 0.3, 8))),
    (0.5, (1, 0.5, 1, 0.5, 1, 0.5, 1, 0.5), [1, 0.5, 1, 0.5, 1, 0.5, 1, 0.5]),
]


@pytest.mark.parametrize(("final", "schedule", "expected"), SCHEDULES)
def test_schedules(final: Any, schedule: Any, expected: list[float], images: Tensor) -> None:
    model = stock("resnet18")
    gated = sdzoo.add_stochastic_depth(model, final, schedule)
    assert sdzoo.survival_probs(gated) == pytest.approx(expected, abs=1e-6)
    close(evaluate(model, images), evaluate(gated, images), tol=1e-10)
    gated.load_state_dict(gated.state_dict())
    assert sdzoo.survival_probs(gated) == pytest.approx(expected, abs=1e-6)


def test_a_list_for_a_transformer_has_one_entry_a_block(images: Tensor) -> None:
    model = stock("res_post_vit")
    gated = sdzoo.add_stochastic_depth(model, schedule=[0.9, 0.6, 0.3])
    assert sdzoo.survival_probs(gated) == [0.9, 0.9, 0.6, 0.6, 0.3, 0.3]
    with pytest.raises(InputError, match="survival_probs has 6 entries; the model has 3 blocks"):
        sdzoo.add_stochastic_depth(model, schedule=[0.5] * 6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), "final_survival_prob is 0; it must lie in"),
        ((1.5,), "final_survival_prob is 1.5; it must lie in"),
        ((-0.1, "uniform"), "final_survival_prob is -0.1; it must lie in"),
        ((math.nan,), "final_survival_prob is nan; it must lie in"),
        (("0.5",), "final_survival_prob is '?0.5'?; it must lie in"),
        ((None,), "final_survival_prob is None; it must lie in"),
        (([0.5],), r"final_survival_prob is \[0.5\]; it must lie in"),
        ((1e-46,), "must lie in"),
        ((0.5, "lineer"), 'schedule is "lineer"; known: .*nearest: linear'),
        ((0.5, [0.5] * 7), "survival_probs has 7 entries; the model has 8 blocks"),
        ((0.5, [0.5] * 9), "survival_probs has 9 entries; the model has 8 blocks"),
        ((0.5, []), "survival_probs has 0 entries; the model has 8 blocks"),
        ((0.5, [0.5] * 7 + [0]), r"survival_probs\[7\] is 0; each must lie in \(0, 1\]"),
        ((0.5, [1.2] + [0.5] * 7), r"survival_probs\[0\] is 1.2; each must lie in \(0, 1\]"),
        ((0.5, [math.nan] + [0.5] * 7), r"survival_probs\[0\] is nan; each must lie in \(0, 1\]"),
        ((0.5, 0.5), 'schedule is "0.5"; known'),
        ((0.9, None), "schedule is None|None; it must be"),
        ((0.5, "linear", "bach"), 'mode is "bach"; known: batch, sample; nearest: batch'),
    ],
)
def test_wrong_settings_are_refused(arguments: tuple[Any, ...], message: str) -> None:
    model = stock("resnet18")
    before = snapshot(model)
    with pytest.raises(InputError, match=message):
        sdzoo.add_stochastic_depth(model, *arguments)
    unchanged(model, before)


def test_sample_mode_computes_everything_and_masks_unscaled(images: Tensor) -> None:
    model = stock("res_post_vit")
    gated = sdzoo.add_stochastic_depth(model, 0.5, "uniform", mode="sample")
    close(evaluate(model, images), evaluate(gated, images), tol=1e-10)
    calls: list[nn.Module] = []
    for module in gated.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda module, _i, _o: calls.append(module))
    inner = of_gated(model, gated)
    outs = {bits: evaluate(weighted(inner, bits), images) for bits in [tuple(map(int, f"{i:06b}")) for i in range(64)]}
    for seed in range(5):
        torch.manual_seed(seed)
        out = gated.train()(images).detach()
        for sample in (0, 1):
            assert min(float((outs[bits][sample] - out[sample]).abs().max()) for bits in outs) < 1e-9
    assert len(calls) == 5 * len({id(module) for module in calls}) == 5 * 13


def test_the_two_branches_of_a_block_draw_independently() -> None:
    gated = sdzoo.add_stochastic_depth(tiny_vit(embed_dim=4, depth=1, num_heads=1, img_size=16), 0.5, "uniform").train()
    x, joint = torch.zeros(1, 3, 16, 16), torch.zeros(2, 2)
    for _ in range(2000):
        with torch.no_grad():
            gated(x)
        first, second = sdzoo.live_blocks(gated)
        joint[int(first), int(second)] += 1
    assert (joint - 500).abs().max() < 5 * (2000 * 0.25 * 0.75) ** 0.5


def test_gates_open_as_often_as_p_says() -> None:
    gated = sdzoo.add_stochastic_depth(tiny_vit(embed_dim=4, num_heads=1, img_size=16), 0.2).train()
    x, live = torch.zeros(1, 3, 16, 16), torch.zeros(6)
    for _ in range(1000):
        with torch.no_grad():
            gated(x)
        live += torch.tensor(sdzoo.live_blocks(gated))
    p = torch.tensor(sdzoo.survival_probs(gated))
    assert ((live / 1000 - p).abs() < 5 * (p * (1 - p) / 1000).sqrt()).all()


SMALL = ["resnet18", "seresnet50", "regnetz_005", "convnext_atto", "vit_tiny_patch16_224", "res_post_vit"]
every_small = pytest.mark.parametrize("net", SMALL)


def other_weights(net: str) -> Net:
    """Return a network of the same kind with other weights, in float64."""
    torch.manual_seed(7)
    return randomise(NETS[net][0]().double(), seed=7)


@every_small
def test_weights_keep_their_function_under_another_schedule(net: str, images: Tensor) -> None:
    model = stock(net)
    expected = evaluate(model, images)
    saved = sdzoo.add_stochastic_depth(model, 0.5).state_dict()
    for state, changes in ((saved, True), (model.state_dict(), True), (saved, False)):
        settings: dict[str, Any] = {"final_survival_prob": 0.8, "schedule": "uniform"} if changes else {}
        into = sdzoo.add_stochastic_depth(other_weights(net), **settings)
        probs = sdzoo.survival_probs(into)
        assert (expected - evaluate(into, images)).abs().max() > 0.02 * expected.abs().max()
        into.load_state_dict(state)
        assert sdzoo.survival_probs(into) == probs
        close(expected, evaluate(into, images), tol=1e-10)
        if not changes:
            assert all(torch.equal(value, saved[key]) for key, value in into.state_dict().items())


@every_small
@pytest.mark.parametrize("wrapped", [False, True])
def test_weights_that_lost_one_p_are_refused(net: str, wrapped: bool) -> None:
    gated = sdzoo.add_stochastic_depth(stock(net))
    state = gated.state_dict()
    lost = [key for key in state if key.endswith("survival_prob")][-1]
    del state[lost]
    before = copy.deepcopy(gated.state_dict())
    into: nn.Module = nn.ModuleDict({"model": gated}) if wrapped else gated
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=f"survival probabilities are missing for .*{re.escape(lost)}"):
            into.load_state_dict({f"model.{k}" if wrapped else k: v for k, v in state.items()}, strict=strict)
    assert torch.equal(gated.state_dict()[lost], before[lost])


@every_small
def test_copies_keep_the_function_and_p(net: str, images: Tensor) -> None:
    gated = sdzoo.add_stochastic_depth(stock(net), 0.3).eval()
    expected, probs = evaluate(gated, images), sdzoo.survival_probs(gated)
    file = io.BytesIO()
    torch.save(gated, file)
    file.seek(0)
    ema = ModelEmaV3(gated, decay=0.5)
    ema.update(gated)
    for other in (
        copy.deepcopy(gated),
        pickle.loads(pickle.dumps(gated)),
        torch.load(file, weights_only=False),
        ema.module,
        sdzoo.add_stochastic_depth(stock(net), 0.3).to(torch.float64),
    ):
        assert sdzoo.survival_probs(other) == probs
        close(expected, evaluate(other, images), tol=1e-10)
        assert type(other) is type(gated)
        state = other.state_dict()
        state.pop(next(key for key in state if key.endswith("survival_prob")))
        with pytest.raises(RuntimeError, match="survival probabilities are missing"):
            other.load_state_dict(state)


@every_small
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_p(net: str, dtype: torch.dtype, images: Tensor) -> None:
    gated = sdzoo.add_stochastic_depth(stock(net), 0.3).eval()
    probs = sdzoo.survival_probs(gated)
    gated.to(dtype)
    assert sdzoo.survival_probs(gated) == probs
    assert all(gate.survival_prob.dtype == torch.float32 for gate in gated.modules() if isinstance(gate, Gate))
    if dtype is torch.bfloat16:
        out = evaluate(gated, images.to(dtype))
        assert out.dtype == dtype
        assert (evaluate(stock(net), images) - out).abs().max() < 0.2


@every_small
def test_set_survival_has_one_entry_a_gate(net: str, images: Tensor) -> None:
    model, gates = stock(net), NETS[net][2]
    gated = sdzoo.add_stochastic_depth(model)
    probs = [round(0.3 + 0.6 * index / gates, 3) for index in range(gates)]
    sdzoo.set_survival(gated, probs)
    assert sdzoo.survival_probs(gated) == probs
    close(evaluate(model, images), evaluate(gated, images), tol=1e-10)
    with pytest.raises(InputError, match=f"survival_probs has {gates - 1} entries; the model has {gates} "):
        sdzoo.set_survival(gated, probs[1:])


def test_a_model_in_evaluation_stays_so_in_every_part() -> None:
    model = stock("resnet18")
    gated = sdzoo.add_stochastic_depth(model)
    assert [key for key, module in gated.named_modules() if module.training] == []
    sdzoo.fold(gated)
    sdzoo.to_timm(gated)
    assert all(module.training for module in sdzoo.add_stochastic_depth(model.train()).modules())


def test_probabilities_that_overflow_one_block_change_none() -> None:
    gated = sdzoo.add_stochastic_depth(stock("resnet18").half())
    before, probs = copy.deepcopy(gated.state_dict()), sdzoo.survival_probs(gated)
    with pytest.raises(InputError, match="overflows"):
        sdzoo.set_survival(gated, [0.3] * 7 + [1e-7])
    assert sdzoo.survival_probs(gated) == probs
    assert all(torch.equal(value, before[key]) for key, value in gated.state_dict().items())


@every_small
def test_timms_reparameterization_keeps_the_function(net: str, images: Tensor) -> None:
    model = stock(net)
    reparameterized = reparameterize_model(sdzoo.add_stochastic_depth(model).eval())
    close(evaluate(model, images), evaluate(reparameterized, images), tol=1e-10)


FEATURES: list[tuple[str, dict[str, Any]]] = [
    ("resnet18", {}),
    ("resnet26t", {"out_indices": (1, 3)}),
    ("resnet18", {"feature_cls": "hook"}),
    ("resnet18", {"feature_cls": "dict"}),
    ("resnetv2_18", {}),
    ("regnety_002", {}),
    ("convnext_atto", {}),
    ("vit_tiny_patch16_224", {"img_size": 64}),
]


@pytest.mark.parametrize(("net", "kwargs"), FEATURES)
def test_features_only_models(net: str, kwargs: dict[str, Any], images: Tensor) -> None:
    model = timm.create_model(net, features_only=True, drop_path_rate=0.2, **kwargs).double()
    model = trained_like(model, images)
    before = snapshot(model)
    gated: Net = sdzoo.add_stochastic_depth(model, 0.5)
    unchanged(model, before)
    assert type(gated) is type(model)
    assert not [module for module in gated.modules() if isinstance(module, DropPath)]
    with torch.no_grad():
        expected, got = model(images), gated.eval()(images)
    if isinstance(expected, dict):
        expected, got = list(expected.values()), list(got.values())
    assert len(got) == len(expected) >= 2
    for one, other in zip(expected, got, strict=True):
        close(one, other, tol=1e-10)
    assert gated.feature_info.channels() == model.feature_info.channels()
    count = len(sdzoo.survival_probs(gated))
    with sdzoo.fixed_gates(gated.train(), [0] * count):
        gated(images)
    assert sdzoo.live_blocks(gated) == [False] * count
    state = gated.state_dict()
    del state[next(key for key in state if key.endswith("survival_prob"))]
    with pytest.raises(RuntimeError, match="survival probabilities are missing"):
        gated.load_state_dict(state)


def test_blocks_that_run_side_by_side(images: Tensor) -> None:
    model = trained_like(timm.create_model("hrnet_w18_small", num_classes=10).double(), images)
    gated: Net = sdzoo.add_stochastic_depth(model)
    close(evaluate(model, images), evaluate(gated, images), tol=1e-10)
    for seed in (1, 2):
        bits = torch.randint(2, (23,), generator=torch.Generator().manual_seed(seed)).tolist()
        expected, expected_dx = run(weighted(of_gated(model, gated), bits).train(), images)
        with sdzoo.fixed_gates(gated.train(), bits):
            out, dx = run(gated, images)
        close(expected, out, tol=1e-10)
        close(expected_dx, dx, tol=1e-9)


def test_a_model_on_meta_gets_its_gates_there(images: Tensor) -> None:
    with torch.device("meta"):
        gated = sdzoo.add_stochastic_depth(NETS["resnet18"][0]())
    assert all(tensor.is_meta for tensor in gated.state_dict().values())
    assert sdzoo.survival_probs(gated) == pytest.approx(linear_decay_by_hand(8), abs=1e-7)
    model = stock("resnet18")
    gated.load_state_dict(sdzoo.add_stochastic_depth(model).state_dict(), assign=True)
    close(evaluate(model, images), evaluate(gated, images), tol=1e-10)


def test_gradients_and_frozen_weights_are_kept() -> None:
    model = stock("resnet18")
    model.layer1.requires_grad_(False)
    gated = sdzoo.add_stochastic_depth(model)
    assert [p.requires_grad for p in gated.parameters()] == [p.requires_grad for p in model.parameters()]
    assert all(p.is_leaf for p in gated.parameters())


def test_frozen_batchnorm(images: Tensor) -> None:
    model = stock("resnet18")
    model = freeze_batch_norm_2d(model)
    gated = sdzoo.add_stochastic_depth(model)
    close(evaluate(model, images), evaluate(gated, images), tol=1e-10)
    with pytest.warns(UserWarning, match="fold keeps 20 FrozenBatchNorm2d"):
        folded = sdzoo.fold(gated.eval())
    close(evaluate(model, images), evaluate(folded, images), tol=1e-10)


def test_what_a_lists_probabilities_leave_unused_is_refused() -> None:
    for arguments in ((0.9, [0.5] * 8), (0.3, "constant_depth"), (7, [0.5] * 8), (0.5, "stagewise")):
        with pytest.raises(InputError, match=r"final_survival_prob is|schedule is stagewise"):
            sdzoo.add_stochastic_depth(resnet18(), *arguments)


@pytest.mark.parametrize("arch", ["sd_resnext29_8x64", "sd_wide_resnet16_4", "sd_resnet20"])
def test_to_timm_of_sdzoos_own_networks_is_refused(arch: str) -> None:
    with pytest.raises(InputError, match="timm has no network like sdzoo's own"):
        sdzoo.to_timm(timm.create_model(arch).eval())


@pytest.mark.parametrize("strict", [True, False])
def test_a_feature_extractor_refuses_weights_that_lost_a_probability(strict: bool) -> None:
    model = timm.create_model("sd_resnet18", features_only=True)
    state = model.state_dict()
    del state["layer1.0.gate.survival_prob"]
    with pytest.raises(RuntimeError, match=r"missing for layer1\.0\.gate\.survival_prob and there for the others"):
        model.load_state_dict(state, strict=strict)


def resnet18(**kwargs: Any) -> Net:
    return timm.create_model("resnet18", num_classes=10, **kwargs)


def named_timm(name: str, **kwargs: Any) -> Net:
    with torch.device("meta"):
        return timm.create_model(name, **kwargs)


def vit_of(block: type[nn.Module]) -> Net:
    return tiny_vit(block_fn=block)


def parametrised(how: Callable[..., Any], path: str = "layer3.1.conv2", net: str = "resnetv2_18") -> Net:
    model = NETS[net][0]()
    module = model
    for part in (path if net == "resnet18" else path.replace("layer", "stages.").replace("3.1", "2.blocks.1")).split(
        "."
    ):
        module = getattr(module, part)
    how(module)
    return model


def parametrised_attention(how: Callable[..., Any]) -> Net:
    model = resnet18(block_args={"attn_layer": "se"})
    how(model.layer2[0].se.fc1)
    return model


def sharing(share: Callable[[Net, Net], None]) -> Net:
    model = resnet18()
    share(model.layer2[0], model.layer2[1])
    return model


def share_weight(one: Net, other: Net) -> None:
    other.bn2.weight = one.bn2.weight


def share_norm(one: Net, other: Net) -> None:
    other.bn2 = one.bn2


def share_storage(one: Net, other: Net) -> None:
    other.bn2.weight = nn.Parameter(one.bn2.weight.data)


def share_inside(_: Net, other: Net) -> None:
    other.bn1.bias = other.bn2.bias


def twice() -> Net:
    model = resnet18()
    model.layer3.append(model.layer3[1])
    return model


def twice_by_stage() -> Net:
    model = resnet18()
    return nn.Sequential(model.conv1, model.maxpool, model.layer1, model.layer1)


def shared_frozen() -> Net:
    model: Net = freeze_batch_norm_2d(resnet18())
    model.layer1[0].bn2 = model.layer1[1].bn2
    return model


def shared_frozen_buffer() -> Net:
    model: Net = freeze_batch_norm_2d(resnet18())
    model.layer1[0].bn2.weight = model.layer1[1].bn2.weight
    return model


class OtherBottleneck(resnet.Bottleneck):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


def with_other_bottleneck() -> Net:
    model: Net = timm.create_model("resnet50", num_classes=10, layers=(1, 1, 1, 1))
    model.layer4[0].__class__ = OtherBottleneck
    return model


def with_other_layer_scale() -> Net:
    model = tiny_vit(init_values=0.1)
    model.blocks[1].ls2 = nn.Tanh()
    return model


def post_norm_v2(norm: Callable[..., nn.Module]) -> Net:
    return resnetv2.ResNetV2(
        [1, 1, 1, 1], channels=(32, 32, 32, 32), preact=False, conv_layer=create_conv2d, norm_layer=norm
    )


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "StdConv2d": (partial(named_timm, "resnetv2_50x1_bit"), "resnetv2.PreActBottleneck.*StdConv2d"),
    "CBAM": (partial(resnet18, block_args={"attn_layer": "cbam"}), "resnet.BasicBlock.*CbamModule"),
    "global context": (partial(resnet18, block_args={"attn_layer": "gc"}), "resnet.BasicBlock.*GlobalContext"),
    "Swin": (partial(named_timm, "swin_tiny_patch4_window7_224"), "swin_transformer.SwinTransformerBlock"),
    "EfficientNet": (partial(named_timm, "efficientnet_b0"), "InvertedResidual"),
    "ResNeSt": (partial(named_timm, "resnest14d"), "resnest.ResNestBottleneck"),
    "Res2Net": (partial(named_timm, "res2net50_14w_8s"), "res2net.Bottle2neck"),
    "SKNet": (partial(named_timm, "skresnet18"), "sknet.SelectiveKernelBasic"),
    "BEiT": (partial(named_timm, "beit_base_patch16_224"), "beit.Block"),
    "legacy SENet": (partial(named_timm, "legacy_seresnet18"), "SENet has no residual block|SEResNetBlock"),
    "parallel": (partial(vit_of, ParallelScalingBlock), "vision_transformer.ParallelScalingBlock"),
    "parallel, differential": (partial(vit_of, DiffParallelScalingBlock), "DiffParallelScalingBlock"),
    "parallel things": (partial(vit_of, ParallelThingsBlock), "vision_transformer.ParallelThingsBlock"),
    "weight norm": (partial(parametrised, parametrizations.weight_norm), "resnetv2.PreActBasic"),
    "weight norm of a norm": (
        partial(parametrised, parametrizations.weight_norm, "layer3.1.bn2", "resnet18"),
        "resnet.BasicBlock",
    ),
    "old weight norm": (partial(parametrised, weight_norm), "resnetv2.PreActBasic.*conv2"),
    "spectral norm": (partial(parametrised, parametrizations.spectral_norm), "resnetv2.PreActBasic"),
    "old spectral norm": (partial(parametrised, spectral_norm), "resnetv2.PreActBasic.*conv2"),
    "pruned": (partial(parametrised, partial(prune.l1_unstructured, name="weight", amount=2)), "PreActBasic.*conv2"),
    "weight norm of an attention": (
        partial(parametrised_attention, parametrizations.weight_norm),
        "resnet.BasicBlock: se.fc1.weight of layer2.0 is parametrised",
    ),
    "pruned attention": (
        partial(parametrised_attention, partial(prune.l1_unstructured, name="weight", amount=2)),
        "resnet.BasicBlock: se.fc1.weight of layer2.0 is parametrised",
    ),
    "shared weight": (partial(sharing, share_weight), "resnet.BasicBlock.*shared"),
    "shared norm": (partial(sharing, share_norm), "resnet.BasicBlock.*shared"),
    "shared memory": (partial(sharing, share_storage), "resnet.BasicBlock.*shared"),
    "shared inside a block": (partial(sharing, share_inside), "resnet.BasicBlock.*shared"),
    "the same block twice": (twice, "resnet.BasicBlock.*shared"),
    "the same stage twice": (twice_by_stage, "resnet.BasicBlock.*shared"),
    "shared frozen norm": (shared_frozen, "resnet.BasicBlock.*shared"),
    "shared frozen buffer": (shared_frozen_buffer, "resnet.BasicBlock.*shared"),
    "norm without affine": (
        partial(resnet18, norm_layer=partial(nn.BatchNorm2d, affine=False), zero_init_last=False),
        "resnet.BasicBlock.*BatchNorm2d",
    ),
    "EvoNorm at the end": (partial(post_norm_v2, EvoNorm2dS0), "resnetv2.Bottleneck.*EvoNorm2dS0"),
    "FRN at the end": (partial(post_norm_v2, FilterResponseNormTlu2d), "resnetv2.Bottleneck.*FilterResponseNormTlu2d"),
    "subclass": (with_other_bottleneck, "OtherBottleneck"),
    "other layer scale": (with_other_layer_scale, "vision_transformer.Block.*Tanh"),
    "VGG": (partial(named_timm, "vgg11"), "VGG has no residual block"),
    "no model of timm's": (partial(nn.Linear, 2, 2), "Linear has no residual block"),
    "compiled": (lambda: torch.compile(resnet18()), "compiled"),
    "scripted": (lambda: torch.jit.script(resnet18()), "RecursiveScriptModule"),
    "gates already": (partial(timm.create_model, "sd_resnet18", num_classes=10), r"has gates already.*set_survival\("),
    "gates again": (lambda: sdzoo.add_stochastic_depth(resnet18()), r"has gates already.*set_survival\("),
    "gates in CIFAR net": (partial(timm.create_model, "sd_resnet20"), r"has gates already.*set_survival\("),
    "folded": (lambda: sdzoo.fold(sdzoo.add_stochastic_depth(resnet18()).eval()), "ResNet is folded"),
    "folded CIFAR net": (lambda: sdzoo.fold(timm.create_model("sd_resnet20").eval()), "BasicBlock|folded"),
}
LISTED = (
    "Swin",
    "EfficientNet",
    "ResNeSt",
    "Res2Net",
    "SKNet",
    "parallel things",
    "subclass",
    "VGG",
    "no model of timm's",
)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm`:FutureWarning")
@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_scaled_exactly_is_refused_by_class_name(kind: str) -> None:
    build, message = REFUSED[kind]
    model = build()
    parts = dict(model.named_modules())
    state = {key: None if value.is_meta else value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(InputError, match=f"(?s){message}") as raised:
        sdzoo.add_stochastic_depth(model)
    if kind in LISTED:
        assert all(known in str(raised.value) for known in KNOWN)
    after = model.state_dict()
    assert after.keys() == state.keys()
    assert all(value is None or torch.equal(value, after[key]) for key, value in state.items())
    assert {key: type(module) for key, module in model.named_modules()} == {k: type(m) for k, m in parts.items()}


@pytest.mark.parametrize("anything", ["resnet50", None, {"model": 1}])
def test_what_is_no_model_is_refused(anything: Any) -> None:
    with pytest.raises(InputError, match="model"):
        sdzoo.add_stochastic_depth(anything)


def test_norms_that_do_not_end_the_branch_may_be_any(images: Tensor) -> None:
    model: Net = resnetv2.ResNetV2(
        [1, 2, 1, 1],
        channels=(32, 32, 32, 32),
        num_classes=10,
        conv_layer=create_conv2d,
        norm_layer=FilterResponseNormTlu2d,
    ).double()
    randomise(model).eval()
    gated = sdzoo.add_stochastic_depth(model)
    assert (evaluate(model, images) - evaluate(weighted(model, [0] * 5), images)).abs().max() > 0.01
    close(evaluate(model, images), evaluate(gated, images), tol=1e-10)


def test_weights_parametrised_elsewhere_are_no_hindrance(images: Tensor) -> None:
    model = stock("resnet18")
    parametrizations.weight_norm(model.layer1[0].conv2)
    gated = sdzoo.add_stochastic_depth(model)
    close(evaluate(model, images), evaluate(gated, images), tol=1e-10)


def test_weights_shared_elsewhere_stay_shared(images: Tensor) -> None:
    model = stock("resnet18")
    model.layer1[1].conv1 = model.layer1[0].conv2
    gated = sdzoo.add_stochastic_depth(model)
    assert gated.layer1[1].conv1.weight is gated.layer1[0].conv2.weight
    close(evaluate(model, images), evaluate(gated, images), tol=1e-10)


@pytest.mark.parametrize(("final", "dtype"), [(1e-38, torch.float32), (1e-6, torch.float16)])
def test_a_probability_by_which_weights_overflow_is_refused(final: float, dtype: torch.dtype) -> None:
    model = stock("resnet18").to(dtype)
    with pytest.raises(InputError):
        sdzoo.add_stochastic_depth(model, final, "uniform")


@pytest.mark.parametrize("norm", ["groupnorm", "layernorm2d", "groupnorm1"])
def test_other_norms_of_resnet(norm: str, images: Tensor) -> None:
    model = randomise(resnet18(norm_layer=norm).double()).eval()
    gated = sdzoo.add_stochastic_depth(model)
    assert (evaluate(model, images) - evaluate(weighted(model, [0] * 8), images)).abs().max() > 0.01
    close(evaluate(model, images), evaluate(gated, images), tol=1e-10)


@pytest.mark.parametrize("attention", ["se", "ese", "eca", "ceca"])
def test_attention_after_the_last_norm(attention: str, images: Tensor) -> None:
    model = trained_like(resnet18(block_args={"attn_layer": attention}).double(), images)
    expected, gated = evaluate(model, images), sdzoo.add_stochastic_depth(model)
    close(expected, evaluate(gated, images), tol=1e-10)
    for name, module in gated.named_modules():
        if name.endswith((".se.fc1", ".se.fc", ".se.conv")):
            module.weight.data.copy_(model.get_submodule(name).weight)  # type: ignore[union-attr, operator]
    assert (expected - evaluate(gated, images)).abs().max() > 1e-3


def test_a_layer_scale_takes_p_and_the_linear_layers_stay() -> None:
    model = stock("deit3_small_patch16_224")
    gated = sdzoo.add_stochastic_depth(model)
    state, after = model.state_dict(), gated.state_dict()
    changed = {key for key in state if not torch.equal(state[key], after[key])}
    assert changed == {f"blocks.{index}.ls{branch}.gamma" for index in range(12) for branch in (1, 2)}


def test_one_step_of_training_changes_what_was_open(images: Tensor) -> None:
    gated = sdzoo.add_stochastic_depth(stock("resnet18")).train()
    optimizer = torch.optim.SGD(gated.parameters(), lr=0.1)
    before = copy.deepcopy(gated.state_dict())
    with sdzoo.fixed_gates(gated, [0, 1] * 4):
        gated(images).square().mean().backward()
    optimizer.step()
    assert torch.equal(before["layer1.0.conv2.weight"], gated.layer1[0].conv2.weight)
    assert not torch.equal(before["layer1.1.conv2.weight"], gated.layer1[1].conv2.weight)


def test_batchnorm_that_is_not_timms_own_place_keeps_its_act(images: Tensor) -> None:
    model = stock("resnetv2_18")
    gated = sdzoo.add_stochastic_depth(model)
    assert {type(m) for m in gated.modules() if isinstance(m, BatchNormAct2d)} == {BatchNormAct2d}
    close(evaluate(model, images), evaluate(gated, images), tol=1e-10)


def test_res_post_blocks_with_init_values(images: Tensor) -> None:
    model = randomise(res_post_vit(init_values=1e-5).double()).eval()
    close(evaluate(model, images), evaluate(sdzoo.add_stochastic_depth(model), images), tol=1e-10)
