from __future__ import annotations

import contextlib
import copy
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import timm
import torch
from nets import Net, calibrated, close, evaluate, linear_decay_by_hand, random_images, stored_probs
from timm.layers import freeze_batch_norm_2d
from torch import Tensor, nn

import sdzoo
from sdzoo.errors import InputError

RISING = [0.1 * index for index in range(1, 10)]


def create(**kwargs: Any) -> Net:
    return timm.create_model("sd_resnet20", **kwargs)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, linear_decay_by_hand(9, 0.5)),
        ({"drop_path_rate": 0.8}, linear_decay_by_hand(9, 0.2)),
        ({"drop_path_rate": 0.0}, [1.0] * 9),
        ({"schedule": "uniform"}, [0.5] * 9),
        ({"schedule": "uniform", "drop_path_rate": 0.25}, [0.75] * 9),
        ({"schedule": "constant_depth"}, [1.0] * 9),
        ({"schedule": "linear_decay", "drop_path_rate": 0.4}, linear_decay_by_hand(9, 0.6)),
        ({"survival_probs": RISING}, RISING),
    ],
)
@pytest.mark.parametrize("mode", ["batch", "sample"])
def test_keyword_arguments_at_creation_set_the_probabilities(
    arguments: dict[str, Any], expected: list[float], mode: str
) -> None:
    model = create(mode=mode, **arguments)
    assert sdzoo.survival_probs(model) == pytest.approx(expected, abs=1e-7)
    assert stored_probs(model.state_dict()) == pytest.approx(expected, abs=1e-7)


def test_110_layers_have_the_papers_probabilities() -> None:
    probs = sdzoo.survival_probs(timm.create_model("sd_resnet110", device="meta"))
    assert len(probs) == 54
    assert probs[0] == pytest.approx(0.990741, abs=5e-7)
    assert sum(probs) == pytest.approx(40.25, abs=1e-5)


def test_probabilities_are_given_in_their_shortest_decimals() -> None:
    assert sdzoo.survival_probs(create(survival_probs=[0.1] * 9)) == [0.1] * 9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"survival_probs": [0.5] * 8}, "survival_probs has 8 entries; the model has 9 blocks"),
        ({"survival_probs": [0.5] * 6 + [1.2] * 3}, r"survival_probs\[6\] is 1.2; each must lie in \(0, 1\]"),
        ({"survival_probs": [math.nan] * 9}, r"survival_probs\[0\] is nan"),
        ({"survival_probs": [0.5] * 9, "drop_path_rate": 0.5}, "give it without drop_path_rate and schedule"),
        ({"survival_probs": [0.5] * 9, "schedule": "uniform"}, "give it without drop_path_rate and schedule"),
        ({"schedule": "constant_depth", "drop_path_rate": 0.5}, "constant_depth drops nothing"),
        ({"schedule": "unifrom"}, "nearest: uniform"),
        ({"drop_path_rate": 1.0}, r"drop_path_rate is 1.0; it must lie in \[0, 1\)"),
        ({"mode": "row"}, 'mode is "row"; known: batch, sample'),
    ],
)
def test_wrong_keyword_arguments_at_creation_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        create(**arguments)


def test_a_probability_that_float32_rounds_to_zero_is_refused() -> None:
    with pytest.raises(InputError, match=r"must lie in \(0, 1\]"):
        create(survival_probs=[1e-46] * 9)


@pytest.mark.parametrize(
    ("arch", "dtype", "tol"),
    [
        ("sd_resnet20", torch.float32, 1e-4),
        ("sd_resnet20", torch.float64, 1e-10),
        ("sd_resnet110", torch.float32, 1e-4),
        ("sd_resnet110", torch.float64, 1e-10),
    ],
)
def test_set_survival_changes_the_probabilities_and_keeps_the_evaluation(
    arch: str, dtype: torch.dtype, tol: float
) -> None:
    small = random_images(4, 16)
    model, images = calibrated(arch, images=small).to(dtype), small.to(dtype)
    expected, blocks = evaluate(model, images), len(sdzoo.survival_probs(model))
    for probs in ([0.2] * blocks, [1.0] * blocks, [1 - 0.9 * index / blocks for index in range(blocks)]):
        sdzoo.set_survival(model, probs)
        assert sdzoo.survival_probs(model) == pytest.approx(probs, abs=1e-7)
        assert stored_probs(model.state_dict()) == pytest.approx(probs, abs=1e-7)
        close(expected, evaluate(model, images), tol=tol)


def test_set_survival_touches_nothing_but_the_last_norm_of_a_branch(source: Net) -> None:
    before = copy.deepcopy(source.state_dict())
    sdzoo.set_survival(source, [0.9] * 9)
    touched = {name for name, value in source.state_dict().items() if not torch.equal(value, before[name])}
    assert {name.split(".", 2)[2] for name in touched} == {"bn2.weight", "bn2.bias", "gate.survival_prob"}


def test_set_survival_to_what_it_is_changes_no_weight(source: Net) -> None:
    before = copy.deepcopy(source.state_dict())
    sdzoo.set_survival(source, sdzoo.survival_probs(source))
    assert all(torch.equal(value, before[name]) for name, value in source.state_dict().items())


def test_set_survival_decides_what_is_drawn(source: Net, images: Tensor) -> None:
    sdzoo.set_survival(source, [1.0, 1.0, 1e-9, 1.0, 1e-9, 1.0, 1.0, 1e-9, 1.0])
    source.train()(images)
    assert sdzoo.live_blocks(source) == [True, True, False, True, False, True, True, False, True]


def test_set_survival_is_a_request_that_later_weights_obey(source: Net, images: Tensor) -> None:
    model = create()
    sdzoo.set_survival(model, RISING)
    model.load_state_dict(source.state_dict())
    assert sdzoo.survival_probs(model) == pytest.approx(RISING, abs=1e-7)
    close(evaluate(source, images), evaluate(model, images), tol=1e-4)


def test_set_survival_takes_an_array(source: Net) -> None:
    sdzoo.set_survival(source, np.linspace(1, 0.5, 9))  # type: ignore[arg-type]
    assert sdzoo.survival_probs(source) == pytest.approx(np.linspace(1, 0.5, 9).tolist(), abs=1e-7)


@pytest.mark.parametrize(
    ("probs", "message"),
    [
        ([0.5] * 8, "has 8 entries; the model has 9 gates"),
        ([0.5] * 8 + [0], r"survival_probs\[8\] is 0; each must lie in \(0, 1\] \(9 gates, set_survival\)"),
        ([0.5] * 8 + [1.01], r"survival_probs\[8\] is 1.01"),
        ([0.5] * 8 + [math.nan], r"survival_probs\[8\] is nan"),
    ],
)
def test_set_survival_refuses_and_has_changed_nothing(probs: list[float], message: str, source: Net) -> None:
    before = copy.deepcopy(source.state_dict())
    with pytest.raises(InputError, match=message):
        sdzoo.set_survival(source, probs)
    assert all(torch.equal(value, before[name]) for name, value in source.state_dict().items())


@pytest.mark.parametrize("operation", [sdzoo.survival_probs, lambda model: sdzoo.set_survival(model, [0.5] * 9)])
def test_a_folded_model_has_no_survival_probabilities(operation: Callable[[nn.Module], object], source: Net) -> None:
    with pytest.raises(InputError, match="SDResNetCifar has no gates: it is folded"):
        operation(sdzoo.fold(source))


def test_frozen_batchnorms_are_rescaled_or_refused(source: Net, images: Tensor) -> None:
    # timm.utils.freeze replaces BatchNorm2d by FrozenBatchNorm2d, whose weight and bias are buffers
    frozen = freeze_batch_norm_2d(source)
    expected = evaluate(frozen, images)
    with contextlib.suppress(InputError):
        sdzoo.set_survival(frozen, [0.9] * 9)
    close(expected, evaluate(frozen, images), tol=1e-4)


def by_torch_save(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": by_torch_save,
}


@pytest.mark.parametrize("way", COPIES)
def test_a_copy_has_the_same_gates_of_its_own(way: str, source: Net, images: Tensor) -> None:
    twin = COPIES[way](source)
    assert sdzoo.survival_probs(twin) == sdzoo.survival_probs(source)
    assert torch.equal(evaluate(twin, images), evaluate(source, images))
    outputs = []
    for model in (source, twin):
        torch.manual_seed(7)
        outputs.append(model.train()(images))
    assert torch.equal(*outputs)
    assert sdzoo.live_blocks(twin) == sdzoo.live_blocks(source)
    sdzoo.set_survival(twin, [0.9] * 9)
    assert sdzoo.survival_probs(source) == pytest.approx(linear_decay_by_hand(9, 0.3), abs=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_cast_leaves_the_probabilities_in_float32(dtype: torch.dtype, source: Net, images: Tensor) -> None:
    for cast in (source.to(dtype), copy.deepcopy(source).to(torch.float32)):
        assert stored_probs(cast.state_dict()) == linear_decay_by_hand(9, 0.3)
        assert {gate.dtype for name, gate in cast.state_dict().items() if "survival_prob" in name} == {torch.float32}
    assert evaluate(source, images.to(dtype)).dtype == dtype


@pytest.mark.parametrize("mode", ["batch", "sample"])
def test_the_mode_is_the_users_and_evaluation_does_not_know_it(mode: str, source: Net, images: Tensor) -> None:
    model = create(mode=mode)
    model.load_state_dict(source.state_dict())
    assert torch.equal(evaluate(model, images), evaluate(source, images))
    model.train()(images)
    assert (model.layer1[0].gate.last_draw is None) == (mode == "sample")
