"""The loading rule, block by block: the evaluation function is that of the weights, or loading raises.

Whole models, and every way to load them: test_load_paths.py.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from nets import after_relu, close, make_block, plain_branch
from torch import Tensor, nn

import sdzoo
from sdzoo.blocks import BasicBlock
from sdzoo.gate import Gate


def changed(block: nn.Module, **values: Tensor | None) -> dict[str, Tensor]:
    state = {**block.state_dict(), **{name.replace("__", "."): value for name, value in values.items()}}
    return {name: value for name, value in state.items() if value is not None}


def test_weights_with_p_bring_it() -> None:
    saved, block = make_block(p=0.3), make_block(p=0.8)
    block.load_state_dict(saved.state_dict())
    assert block.gate.p == saved.gate.p
    assert all(torch.equal(value, saved.state_dict()[name]) for name, value in block.state_dict().items())


def test_an_explicit_p_stays_and_the_branch_is_rescaled() -> None:
    saved, block, x = make_block(p=0.3).double().eval(), make_block(p=0.8).double().eval(), after_relu().double()
    block.gate.explicit = True
    block.load_state_dict(saved.state_dict())
    assert block.gate.p == pytest.approx(0.8, abs=1e-7)
    close(saved(x), block(x), tol=1e-12)
    for name in ("conv1.weight", "conv2.weight", "bn1.weight", "bn1.bias", "bn2.running_var"):
        assert torch.equal(block.state_dict()[name], saved.state_dict()[name])


@pytest.mark.parametrize("explicit", [False, True])
def test_weights_without_p_are_a_network_of_constant_depth(explicit: bool) -> None:
    saved, block, x = make_block(p=1.0).double().eval(), make_block(p=0.8).double().eval(), after_relu().double()
    block.gate.explicit = explicit
    result = block.load_state_dict(changed(saved, gate__survival_prob=None))
    assert not result.missing_keys
    assert block.gate.p == pytest.approx(0.8, abs=1e-7)
    close(F.relu(x + plain_branch(saved, x, training=False)), block(x), tol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_p_equal_after_rounding_is_equal(dtype: torch.dtype) -> None:
    block = make_block(p=0.3)
    block.gate.explicit = True
    saved = {
        name: value.to(dtype) if value.is_floating_point() else value for name, value in block.state_dict().items()
    }
    assert float(saved["gate.survival_prob"]) != block.gate.p
    block.load_state_dict(saved)
    assert torch.equal(block.bn2.weight, saved["bn2.weight"].float())
    assert torch.equal(block.bn2.bias, saved["bn2.bias"].float())
    assert block.gate.p == block.gate.survival_prob.item() == torch.tensor(0.3).item()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_another_p_in_half_precision_is_applied_exactly(dtype: torch.dtype) -> None:
    block = make_block(p=0.8)
    block.gate.explicit = True
    saved = changed(block, gate__survival_prob=torch.tensor(0.3, dtype=dtype))
    weight = block.bn2.weight.detach().clone().double()
    block.load_state_dict(saved)
    stored = float(torch.tensor(0.3, dtype=dtype))
    close(weight * stored / torch.tensor(0.8).double(), block.bn2.weight, tol=1e-7)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("explicit", [False, True])
def test_loading_leaves_the_callers_dict_alone(explicit: bool, assign: bool) -> None:
    block = make_block(p=0.8)
    block.gate.explicit = explicit
    for state in (make_block(p=0.3).state_dict(), changed(make_block(), gate__survival_prob=None)):
        kept = {name: value.clone() for name, value in state.items()}
        block.load_state_dict(state, assign=assign)
        assert state.keys() == kept.keys()
        assert all(torch.equal(state[name], value) for name, value in kept.items())


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize(
    ("held", "lacking"),
    [
        (["gate.survival_prob"], "bn2.weight, bn2.bias"),
        (["conv1.weight"], "bn2.weight, bn2.bias"),
        (["bn2.weight"], "bn2.bias"),
        (["bn2.bias", "gate.survival_prob", "conv2.weight"], "bn2.weight"),
    ],
)
def test_a_part_of_a_block_is_refused(held: list[str], lacking: str, explicit: bool, strict: bool) -> None:
    block, p = make_block(p=0.8), torch.tensor(0.8).item()
    block.gate.explicit = explicit
    state = {name: value for name, value in make_block(p=0.3).state_dict().items() if name in held}
    with pytest.raises(RuntimeError, match=f"hold {len(held)} of its tensors but not {lacking}, so its evaluation"):
        block.load_state_dict(state, strict=strict)
    assert block.gate.p == block.gate.survival_prob.item() == p


@pytest.mark.parametrize("explicit", [False, True])
def test_none_of_a_blocks_tensors_leaves_it_alone(explicit: bool) -> None:
    block = make_block(p=0.8)
    block.gate.explicit = explicit
    model, before = nn.Sequential(block, nn.Linear(2, 2)), copy.deepcopy(block.state_dict())
    model.load_state_dict({"1.weight": torch.ones(2, 2), "1.bias": torch.ones(2)}, strict=False)
    assert all(torch.equal(value, before[name]) for name, value in block.state_dict().items())
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({"1.weight": torch.ones(2, 2), "1.bias": torch.ones(2)})


def test_a_block_whose_name_begins_like_anothers_is_not_taken_for_it() -> None:
    model = nn.Sequential(*(make_block(p=0.8) for _ in range(11)))
    tenth = {f"10.{name}": value for name, value in make_block(p=0.3).state_dict().items()}
    model.load_state_dict(tenth, strict=False)
    probs = [round(p, 6) for p in sdzoo.survival_probs(model)]
    assert probs == [0.8] * 10 + [0.3]


@pytest.mark.parametrize("stored", [0.0, -0.5, 1.5, float("nan"), float("inf"), [0.5, 0.5]])
@pytest.mark.parametrize("explicit", [False, True])
def test_a_stored_p_out_of_range_is_refused(stored: float | list[float], explicit: bool) -> None:
    block = make_block(p=0.8)
    block.gate.explicit = explicit
    with pytest.raises(RuntimeError, match=r"gate.survival_prob is .*; a survival probability must lie in \(0, 1\]"):
        block.load_state_dict(changed(make_block(), gate__survival_prob=torch.tensor(stored)))
    assert block.gate.p == block.gate.survival_prob.item() == torch.tensor(0.8).item()


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("with_p", [False, True])
def test_unfolded_weights_are_refused_by_a_folded_block(with_p: bool, strict: bool) -> None:
    state = changed(make_block(), **({} if with_p else {"gate__survival_prob": None}))
    folded = make_block().eval().fuse()
    with pytest.raises(RuntimeError, match="folded" if with_p or not strict else None):
        folded.load_state_dict(state, strict=strict)


@pytest.mark.parametrize("strict", [False, True])
def test_folded_weights_are_refused_by_a_block_with_a_gate(strict: bool) -> None:
    with pytest.raises(RuntimeError, match=r"hold 4 of its tensors but not bn2\.weight, bn2\.bias"):
        make_block().load_state_dict(make_block().eval().fuse().state_dict(), strict=strict)


def test_folded_weights_load_into_a_folded_block() -> None:
    saved, block, x = make_block().eval().fuse(), BasicBlock(8, 8, Gate(0.9)).eval().fuse(), after_relu()
    block.load_state_dict(saved.state_dict())
    assert torch.equal(block(x), saved(x))


def test_a_float32_file_keeps_its_function_in_a_float64_model_under_another_schedule() -> None:
    state, x = make_block(p=0.3).state_dict(), after_relu().double()
    saved, block = make_block(p=0.3).double().eval(), make_block(p=0.8).double().eval()
    saved.load_state_dict(state)
    block.gate.explicit = True
    block.load_state_dict(state)
    close(saved(x), block(x), tol=1e-10)
