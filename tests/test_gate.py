from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable

import pytest
import timm
import torch
from nets import random_images
from torch import Tensor, nn

import sdzoo
from sdzoo.errors import InputError
from sdzoo.gate import Gate, gates, with_zero_gradients

FLOAT32_03 = 0.30000001192092896  # the float32 nearest to 0.3


def stack(probs: list[float], mode: str = "batch") -> nn.Sequential:
    return nn.Sequential(*(Gate(p, mode) for p in probs)).train()


def test_gates_open_as_often_as_their_probabilities_say_and_independently() -> None:
    probs, draws = [0.1, 0.3, 0.5, 0.9, 0.99], 4000
    model = stack(probs)
    bits = torch.tensor([[gate.draw() for gate in gates(model)] for _ in range(draws)], dtype=torch.float64)
    for p, frequency in zip(probs, bits.mean(0).tolist(), strict=True):
        assert abs(frequency - p) < 4 * math.sqrt(p * (1 - p) / draws)
    correlation = torch.corrcoef(bits.T) - torch.eye(len(probs))
    assert correlation.abs().max() < 4.5 / math.sqrt(draws)
    in_time = torch.corrcoef(torch.stack([bits[1:, 2], bits[:-1, 2]]))[0, 1]
    assert in_time.abs() < 4.5 / math.sqrt(draws)


def test_the_gate_that_stays_shut_is_the_one_with_the_small_probability() -> None:
    for index in range(4):
        model = stack([1e-6 if block == index else 1.0 for block in range(4)])
        for gate in gates(model):
            gate.draw()
        assert sdzoo.live_blocks(model) == [block != index for block in range(4)]


def test_all_gates_may_be_shut_at_once() -> None:
    model = stack([0.2] * 3)
    seen = {tuple(gate.draw() for gate in gates(model)) for _ in range(400)}
    assert len(seen) == 8


def test_the_seed_of_torch_decides_what_is_drawn() -> None:
    model = stack([0.5] * 30)

    def draw(seed: int) -> list[bool]:
        torch.manual_seed(seed)
        return [gate.draw() for gate in gates(model)]

    torch.manual_seed(3)
    expected = [torch.rand(()).item() < 0.5 for _ in range(30)]
    assert draw(3) == expected
    assert draw(3) != draw(4)


@pytest.mark.parametrize("mode", ["batch", "sample"])
def test_a_probability_of_one_draws_no_random_number(mode: str) -> None:
    gate = Gate(1.0, mode).train()
    before = torch.get_rng_state()
    if mode == "batch":
        assert gate.draw() is True
    else:
        assert torch.equal(gate(torch.ones(5, 2)), torch.ones(5, 2))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("mode", ["batch", "sample"])
def test_evaluation_weights_the_branch_by_p_and_draws_nothing(mode: str) -> None:
    gate, branch = Gate(0.3, mode).eval(), random_images(2, 4)
    before = torch.get_rng_state()
    assert torch.equal(gate(branch), branch * torch.tensor(0.3))
    assert torch.equal(torch.get_rng_state(), before)
    assert gate.last_draw is None


def test_a_sample_mask_is_an_unscaled_bit_for_each_sample() -> None:
    gate = Gate(0.3, "sample").train()
    out = gate(torch.ones(4000, 3, 2, 2))
    bits = out[:, 0, 0, 0]
    assert set(bits.tolist()) == {0.0, 1.0}  # never 1 / p
    assert torch.equal(out, bits[:, None, None, None].expand_as(out))
    assert abs(bits.mean().item() - 0.3) < 4 * math.sqrt(0.3 * 0.7 / 4000)


def test_the_expectation_of_sample_masks_is_the_evaluation() -> None:
    gate, branch = Gate(0.7, "sample"), random_images(1, 4)
    many = gate.train()(branch.expand(6000, -1, -1, -1)).double().mean(0)
    evaluated = gate.eval()(branch)[0].double()
    # the mean of n masks is off by at most 4 standard errors, and by the same factor everywhere
    assert (many - evaluated).abs().max() < 4 * math.sqrt(0.7 * 0.3 / 6000) * branch.abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_sample_mask_keeps_the_dtype_of_the_branch(dtype: torch.dtype) -> None:
    assert Gate(0.5, "sample").train()(torch.ones(8, 2, dtype=dtype)).dtype == dtype
    assert Gate(0.5).eval()(torch.ones(8, 2, dtype=dtype)).dtype == dtype


CASTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "half": lambda module: module.half(),
    "bfloat16": lambda module: module.bfloat16(),
    "double": lambda module: module.double(),
    "to half": lambda module: module.to(torch.float16),
    "to double": lambda module: module.to(dtype=torch.float64),
    "half and back": lambda module: module.half().float(),
    "meta and back": lambda module: module.to("meta").to_empty(device="cpu"),
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
}


@pytest.mark.parametrize("cast", CASTS)
def test_the_probability_stays_the_same_float32_number(cast: str) -> None:
    gate = CASTS[cast](Gate(0.3, explicit=True))
    assert isinstance(gate, Gate)
    assert gate.survival_prob.dtype == torch.float32
    assert gate.survival_prob.device.type == "cpu"
    assert gate.p == gate.survival_prob.item() == FLOAT32_03
    assert gate.explicit is True
    assert "survival_prob" in gate.state_dict()


def test_the_probability_is_known_on_the_meta_device() -> None:
    gate = Gate(0.3, device="meta")
    assert gate.survival_prob.is_meta
    assert gate.p == FLOAT32_03
    assert gate.to_empty(device="cpu").survival_prob.item() == FLOAT32_03


def test_set_changes_the_float_and_the_buffer() -> None:
    gate = Gate(0.9)
    gate.set(0.3)
    assert gate.p == gate.survival_prob.item() == FLOAT32_03


@pytest.mark.parametrize(
    ("mode", "hint"), [("sampel", 'mode is "sampel"; known: batch, sample; nearest: sample'), ("row", 'mode is "row"')]
)
def test_an_unknown_mode_is_refused(mode: str, hint: str) -> None:
    with pytest.raises(InputError, match=hint):
        Gate(0.5, mode)


def test_gates_stand_from_input_to_output() -> None:
    model = timm.create_model("sd_resnet20")
    names = {module: name for name, module in model.named_modules()}
    expected = [f"layer{stage}.{block}.gate" for stage in (1, 2, 3) for block in range(3)]
    assert [names[gate] for gate in gates(model)] == expected


def test_a_model_without_gates_is_named() -> None:
    with pytest.raises(InputError, match="Linear has no gates: it is folded, or not a stochastic-depth model"):
        gates(nn.Linear(1, 1))


def test_live_blocks_are_those_of_the_last_forward(images: Tensor) -> None:
    model = timm.create_model("sd_resnet20", schedule="uniform").train()
    with pytest.raises(InputError, match="no gates drawn yet: call the model in training mode"):
        sdzoo.live_blocks(model)
    torch.manual_seed(5)
    expected = [torch.rand(()).item() < 0.5 for _ in range(9)]
    assert 0 < sum(expected) < 9
    torch.manual_seed(5)
    model(images)
    assert sdzoo.live_blocks(model) == expected
    model.eval()(images)
    assert sdzoo.live_blocks(model) == expected


def test_live_blocks_of_a_sample_mode_model_are_refused(images: Tensor) -> None:
    model = timm.create_model("sd_resnet20", mode="sample").train()
    model(images)
    with pytest.raises(InputError, match='mode="batch"'):
        sdzoo.live_blocks(model)


def test_fixed_gates_hold_inside_and_only_there() -> None:
    model = stack([1.0, 1.0, 1e-6])
    with sdzoo.fixed_gates(model, [0, True, 1]):
        assert [gate.draw() for gate in gates(model)] == [False, True, True]
        with sdzoo.fixed_gates(model, (False, 0, 0)):
            assert [gate.draw() for gate in gates(model)] == [False, False, False]
        assert [gate.draw() for gate in gates(model)] == [False, True, True]
    assert [gate.draw() for gate in gates(model)] == [True, True, False]


def test_fixed_gates_end_with_an_exception_too() -> None:
    model = stack([1.0])
    with pytest.raises(KeyError), sdzoo.fixed_gates(model, [0]):
        raise KeyError
    assert gates(model)[0].draw() is True


def test_fixed_gates_draw_no_random_number() -> None:
    model = stack([0.5, 0.5])
    before = torch.get_rng_state()
    with sdzoo.fixed_gates(model, [0, 1]):
        for gate in gates(model):
            gate.draw()
    assert torch.equal(torch.get_rng_state(), before)


def test_fixed_gates_hold_for_sample_masks() -> None:
    model, ones = stack([0.5, 0.5], "sample"), torch.ones(64, 2)
    with sdzoo.fixed_gates(model, [1, 0]):
        assert torch.equal(gates(model)[0](ones), ones)
        assert torch.equal(gates(model)[1](ones), torch.zeros_like(ones))


@pytest.mark.parametrize(
    ("bits", "message"),
    [
        ([1], "bits has 1 entries; the model has 2 gates"),
        ([1, 0, 1], "bits has 3 entries; the model has 2 gates"),
        ([1, 2], r"bits\[1\] is 2; each must be 0 \(skip\) or 1 \(compute\)"),
        ([0.5, 1], r"bits\[0\] is 0.5"),
    ],
)
def test_wrong_bits_are_refused(bits: list[int], message: str) -> None:
    model = stack([0.5, 0.5])
    with pytest.raises(InputError, match=message), sdzoo.fixed_gates(model, bits):
        pass
    assert [gate.planned for gate in gates(model)] == [None, None]


def test_fixed_gates_are_refused_in_evaluation() -> None:
    with pytest.raises(InputError, match=r"call model.train\(\) first"), sdzoo.fixed_gates(stack([0.5]).eval(), [1]):
        pass


def test_zero_gradients_reach_trainable_parameters_only() -> None:
    layer, x = nn.Linear(3, 2), torch.randn(4, 3, requires_grad=True)
    layer.bias.requires_grad_(False)
    out = with_zero_gradients(x, layer.parameters())
    assert torch.equal(out, x)
    (out * 2).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.full_like(x, 2))
    assert layer.weight.grad is not None
    assert torch.equal(layer.weight.grad, torch.zeros(2, 3))
    assert layer.bias.grad is None


def test_zero_gradients_reach_parameters_though_the_input_wants_none() -> None:
    layer = nn.Linear(3, 2)
    with_zero_gradients(torch.randn(4, 3), layer.parameters()).sum().backward()
    assert layer.weight.grad is not None
    assert not layer.weight.grad.any()


def test_zero_gradients_have_the_strides_of_their_parameter() -> None:
    conv = nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last)
    out = with_zero_gradients(torch.randn(1, 4, 5, 5), conv.parameters())
    (gradient,) = torch.autograd.grad(out.sum(), conv.weight)  # backward() would lay it out anew
    assert gradient.stride() == conv.weight.stride()


def test_zero_gradients_cost_nothing_where_none_is_wanted() -> None:
    layer, x = nn.Linear(3, 2), torch.randn(4, 3, requires_grad=True)
    with torch.no_grad():
        assert with_zero_gradients(x, layer.parameters()) is x
    assert with_zero_gradients(x, layer.requires_grad_(False).parameters()) is x


def test_what_was_copied_into_the_buffer_is_drawn_with_after_train() -> None:
    """As timm's EMA does it: the float follows the buffer."""
    gate = Gate(1.0)
    gate.survival_prob.copy_(torch.tensor(0.25))
    gate.train()
    torch.manual_seed(0)
    drawn = sum(gate.draw() for _ in range(2000)) / 2000
    assert abs(drawn - 0.25) < 4 * (0.25 * 0.75 / 2000) ** 0.5


@pytest.mark.filterwarnings("ignore")
def test_a_jit_trace_in_training_is_refused() -> None:
    model = timm.create_model("sd_resnet20").train()
    with pytest.raises(InputError, match="a trace would freeze this draw"):
        torch.jit.trace(model, torch.randn(2, 3, 16, 16), check_trace=False)


@pytest.mark.parametrize("mode", ["batch", "sample"])
def test_the_draw_follows_set_draw_probs_and_evaluation_keeps_p(mode: str) -> None:
    model = nn.Sequential(Gate(0.9, mode), Gate(0.5, mode)).train()
    sdzoo.set_draw_probs(model, [0.2, 1.0])
    torch.manual_seed(0)
    if mode == "batch":
        rates = [sum(gate.draw() for _ in range(2000)) / 2000 for gate in gates(model)]
    else:
        rates = [float(gate(torch.ones(2000, 1)).mean()) for gate in gates(model)]
    assert abs(rates[0] - 0.2) < 4 * (0.16 / 2000) ** 0.5
    assert rates[1] == 1.0
    assert [gate.eval()(torch.ones(1)).item() for gate in gates(model)] == pytest.approx([0.9, 0.5])
    sdzoo.set_draw_probs(model, None)
    assert [gate.draw_prob for gate in gates(model)] == [None, None]


def test_set_survival_ends_a_warm_up() -> None:
    model = timm.create_model("sd_resnet20").train()
    sdzoo.set_draw_probs(model, [1.0] * 9)
    sdzoo.set_survival(model, [0.01] * 9)
    model(torch.randn(2, 3, 16, 16))
    assert not all(sdzoo.live_blocks(model))
