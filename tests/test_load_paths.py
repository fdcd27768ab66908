"""The loading rule along every way by which weights reach a model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import timm.models
import torch
import torch.nn.functional as F
from nets import Net, close, evaluate, linear_decay_by_hand, plain_forward, stored_probs, without_probs
from timm.utils import ModelEmaV3
from torch import Tensor, nn

import sdzoo

State = dict[str, Tensor]
EXPLICIT = {"schedule": "uniform", "drop_path_rate": 0.2}


def create(**kwargs: Any) -> Net:
    return timm.create_model("sd_resnet20", **kwargs)


def by_load_state_dict(state: State, _folder: Path, **kwargs: Any) -> Net:
    model = create(**kwargs)
    model.load_state_dict(state)
    return model


def by_assign(state: State, _folder: Path, **kwargs: Any) -> Net:
    model = create(**kwargs)
    model.load_state_dict(copy.deepcopy(state), assign=True)
    return model


def by_assign_to_meta(state: State, _folder: Path, **kwargs: Any) -> Net:
    with torch.device("meta"):
        model = create(**kwargs)
    model.load_state_dict(copy.deepcopy(state), assign=True)
    return model


def by_meta_and_to_empty(state: State, _folder: Path, **kwargs: Any) -> Net:
    model = create(device="meta", **kwargs).to_empty(device="cpu")
    model.load_state_dict(state)
    return model


def by_load_checkpoint(state: State, folder: Path, **kwargs: Any) -> Net:
    model = create(**kwargs)
    torch.save({"state_dict": {f"module.{name}": value for name, value in state.items()}}, folder / "last.pth.tar")
    timm.models.load_checkpoint(model, str(folder / "last.pth.tar"))
    return model


def by_checkpoint_path(state: State, folder: Path, **kwargs: Any) -> Net:
    safetensors.torch.save_file(state, folder / "model.safetensors")
    return create(checkpoint_path=str(folder / "model.safetensors"), **kwargs)


def by_pretrained_file(state: State, folder: Path, **kwargs: Any) -> Net:
    torch.save(state, folder / "weights.pth")
    return create(pretrained=True, pretrained_cfg_overlay={"file": str(folder / "weights.pth")}, **kwargs)


def by_local_dir(state: State, folder: Path, **kwargs: Any) -> Net:
    timm.models.save_for_hf(create(), str(folder), safe_serialization=True)
    safetensors.torch.save_file(state, folder / "model.safetensors")
    return timm.create_model(f"local-dir:{folder}", pretrained=True, **kwargs)


def by_ema_checkpoint(state: State, folder: Path, **kwargs: Any) -> Net:
    ema = ModelEmaV3(create(**kwargs))
    torch.save({"state_dict": create().state_dict(), "state_dict_ema": state}, folder / "last.pth.tar")
    timm.models.load_checkpoint(ema.module, str(folder / "last.pth.tar"), use_ema=True)
    return ema.module


def by_wrapper(state: State, _folder: Path, **kwargs: Any) -> Net:
    wrapped = nn.ModuleDict({"module": create(**kwargs)})
    wrapped.load_state_dict({f"module.{name}": value for name, value in state.items()})
    return wrapped["module"]


PATHS: list[Callable[..., Net]] = [
    by_load_state_dict,
    by_assign,
    by_assign_to_meta,
    by_meta_and_to_empty,
    by_load_checkpoint,
    by_checkpoint_path,
    by_pretrained_file,
    by_local_dir,
    by_ema_checkpoint,
    by_wrapper,
]
every_path = pytest.mark.parametrize("path", PATHS)


def test_the_branches_matter_to_these_tests(source: Net, images: Tensor) -> None:
    state = source.state_dict()
    logits = plain_forward(state, images, stored_probs(state))
    without = plain_forward(state, images, [0] * 9)
    as_of_constant_depth = plain_forward(state, images, [1] * 9)
    for other in (without, as_of_constant_depth):
        assert (logits - other).abs().max() > 0.01 * logits.abs().max()
    zeroed = copy.deepcopy(source)
    for name, module in zeroed.named_modules():
        if name.endswith("bn2"):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    close(without, evaluate(zeroed, images), tol=1e-5)


def test_the_source_computes_the_papers_evaluation(source: Net, images: Tensor) -> None:
    state = source.state_dict()
    assert stored_probs(state) == linear_decay_by_hand(9, 0.3)
    close(plain_forward(state, images, stored_probs(state)), evaluate(source, images), tol=1e-5)


@every_path
def test_weights_with_p_bring_it(path: Callable[..., Net], source: Net, images: Tensor, tmp_path: Path) -> None:
    model = path(source.state_dict(), tmp_path)
    assert stored_probs(model.state_dict()) == linear_decay_by_hand(9, 0.3)
    assert sdzoo.survival_probs(model) == pytest.approx(linear_decay_by_hand(9, 0.3), abs=1e-7)
    assert torch.equal(evaluate(model, images), evaluate(source, images))


@every_path
def test_weights_without_p_keep_the_function_of_constant_depth(
    path: Callable[..., Net], source: Net, images: Tensor, tmp_path: Path
) -> None:
    state = without_probs(source.state_dict())
    model = path(state, tmp_path)
    assert stored_probs(model.state_dict()) == linear_decay_by_hand(9, 0.5)
    close(plain_forward(state, images, [1] * 9), evaluate(model, images), tol=1e-4)


@every_path
@pytest.mark.parametrize("with_p", [True, False])
def test_an_explicit_schedule_stays_and_the_function_too(
    path: Callable[..., Net], with_p: bool, source: Net, images: Tensor, tmp_path: Path
) -> None:
    state = source.state_dict() if with_p else without_probs(source.state_dict())
    model = path(state, tmp_path, **EXPLICIT)
    assert stored_probs(model.state_dict()) == [torch.tensor(0.8).item()] * 9
    assert sdzoo.survival_probs(model) == [0.8] * 9
    expected = plain_forward(state, images, stored_probs(state) if with_p else [1] * 9)
    close(expected, evaluate(model, images), tol=1e-4)


@every_path
def test_a_part_of_a_block_is_refused(path: Callable[..., Net], source: Net, tmp_path: Path) -> None:
    state = source.state_dict()
    del state["layer2.1.bn2.bias"]
    with pytest.raises(RuntimeError, match=r"layer2.1: the weights hold \d+ of its tensors but not bn2.bias"):
        path(state, tmp_path)


@pytest.mark.parametrize("kwargs", [{}, EXPLICIT])
@pytest.mark.parametrize("assign", [False, True])
def test_in_float64_the_function_is_kept_to_ten_digits(
    kwargs: dict[str, Any], assign: bool, source: Net, images: Tensor
) -> None:
    state, images = source.double().state_dict(), images.double()
    for kept, probs in ((state, stored_probs(state)), (without_probs(state), [1.0] * 9)):
        model = create(**kwargs).double()
        model.load_state_dict(kept, assign=assign)
        close(plain_forward(kept, images, probs), evaluate(model, images), tol=1e-10)


@pytest.mark.parametrize("arguments", [{"drop_path_rate": 0.7}, {"drop_path_rate": 0.7, "schedule": "linear_decay"}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_weights_own_schedule_asked_for_explicitly_changes_no_weight(
    arguments: dict[str, Any], dtype: torch.dtype, source: Net
) -> None:
    state = {
        name: value.to(dtype) if value.is_floating_point() else value for name, value in source.state_dict().items()
    }
    model = create(**arguments)
    model.load_state_dict(state)
    for name, value in model.state_dict().items():
        if name.endswith("survival_prob"):
            assert value == source.state_dict()[name]
        else:
            assert torch.equal(value, state[name].to(value.dtype))


def test_half_precision_weights_under_another_schedule_keep_their_function(source: Net, images: Tensor) -> None:
    state = source.half().state_dict()
    stored = {name: value.half() if name.endswith("survival_prob") else value for name, value in state.items()}
    model = create(**EXPLICIT)
    model.load_state_dict(stored)
    plain = {name: value.float() if value.is_floating_point() else value for name, value in stored.items()}
    close(plain_forward(plain, images, stored_probs(stored)), evaluate(model, images), tol=1e-4)


def test_a_half_precision_model_keeps_its_probabilities_in_float32(source: Net) -> None:
    state = source.half().state_dict()
    assert stored_probs(state) == linear_decay_by_hand(9, 0.3)
    model = create().bfloat16()
    model.load_state_dict(state)
    assert stored_probs(model.state_dict()) == linear_decay_by_hand(9, 0.3)


@pytest.mark.parametrize("kwargs", [{}, EXPLICIT])
def test_another_number_of_classes_keeps_the_features(
    kwargs: dict[str, Any], source: Net, images: Tensor, tmp_path: Path
) -> None:
    model = by_pretrained_file(source.state_dict(), tmp_path, num_classes=3, **kwargs)
    assert evaluate(model, images).shape == (4, 3)
    with torch.no_grad():
        close(source.forward_features(images), model.eval().forward_features(images), tol=1e-4)


@pytest.mark.parametrize("kwargs", [{}, EXPLICIT])
def test_another_number_of_channels_keeps_the_function_of_grey_images(
    kwargs: dict[str, Any], source: Net, images: Tensor, tmp_path: Path
) -> None:
    model = by_pretrained_file(source.state_dict(), tmp_path, in_chans=1, **kwargs)
    grey = images[:, :1]
    close(evaluate(source, grey.expand(-1, 3, -1, -1)), evaluate(model, grey), tol=1e-4)


@pytest.mark.parametrize("kwargs", [{}, EXPLICIT])
@pytest.mark.parametrize("feature_cls", ["list", "dict", "hook", "getter"])
def test_features_only_keeps_the_features(
    kwargs: dict[str, Any], feature_cls: str, source: Net, images: Tensor, tmp_path: Path
) -> None:
    model = by_pretrained_file(source.state_dict(), tmp_path, features_only=True, feature_cls=feature_cls, **kwargs)
    with torch.no_grad():
        out = model.eval()(images)
        expected = source.forward_intermediates(images, intermediates_only=True)
    features = list(out.values()) if isinstance(out, dict) else out
    assert len(features) == 3
    for a, b in zip(expected, features, strict=True):
        close(a, b, tol=1e-4)
    assert sdzoo.survival_probs(model) == pytest.approx(
        linear_decay_by_hand(9, 0.3) if not kwargs else [0.8] * 9, abs=1e-7
    )


def test_a_classifier_alone_leaves_the_blocks_alone(source: Net, images: Tensor) -> None:
    before = evaluate(source, images)
    source.load_state_dict({"fc.weight": source.fc.weight * 2, "fc.bias": source.fc.bias * 2}, strict=False)
    close(2 * before, evaluate(source, images), tol=1e-6)


def test_loading_twice_takes_the_last_weights(source: Net, images: Tensor) -> None:
    model = create()
    model.load_state_dict(without_probs(source.state_dict()))
    model.load_state_dict(source.state_dict())
    assert torch.equal(evaluate(model, images), evaluate(source, images))


def test_weights_assigned_keep_their_dtype(source: Net) -> None:
    model = create(**EXPLICIT)
    model.load_state_dict(source.half().state_dict(), assign=True)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}
    assert model.layer1[0].gate.survival_prob.dtype == torch.float32


@pytest.mark.parametrize("kwargs", [{}, EXPLICIT])
@pytest.mark.parametrize("stored", [0.0, 1.5, float("nan")])
def test_a_stored_p_out_of_range_is_refused_by_name(kwargs: dict[str, Any], stored: float, source: Net) -> None:
    state = source.state_dict()
    state["layer3.0.gate.survival_prob"] = torch.tensor(stored)
    with pytest.raises(RuntimeError, match=r"layer3.0.gate.survival_prob is .*must lie in \(0, 1\]"):
        create(**kwargs).load_state_dict(state)


def test_folded_and_unfolded_weights_do_not_mix(source: Net) -> None:
    folded = sdzoo.fold(source)
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=r"layer1\.0: the weights hold 4 of its tensors but not"):
            create().load_state_dict(folded.state_dict(), strict=strict)
        with pytest.raises(RuntimeError, match=r"layer1\.0 is folded; these weights are not"):
            sdzoo.fold(source).load_state_dict(source.state_dict(), strict=strict)


def test_an_average_of_models_keeps_the_probabilities(source: Net, images: Tensor) -> None:
    ema = ModelEmaV3(source, decay=0.9)
    sgd = torch.optim.SGD(source.parameters(), lr=0.01)
    source.train()
    for _ in range(3):
        sgd.zero_grad()
        F.cross_entropy(source(images), torch.arange(4)).backward()
        sgd.step()
        ema.update(source)
    assert stored_probs(ema.module.state_dict()) == linear_decay_by_hand(9, 0.3)
    state = ema.module.state_dict()
    close(plain_forward(state, images, stored_probs(state)), evaluate(ema.module, images), tol=1e-5)


@pytest.mark.parametrize("step", ["set", "update without buffers"])
def test_an_average_made_before_the_weights_were_loaded_follows_them(step: str, source: Net, images: Tensor) -> None:
    model = create()
    ema = ModelEmaV3(model, exclude_buffers=True)
    model.load_state_dict(source.state_dict())
    if step == "set":
        ema.set(model)
    else:
        ema.update(model, step=0)  # decay 0: a copy
    ema.module.float()
    assert sdzoo.survival_probs(ema.module) == sdzoo.survival_probs(model)
    close(evaluate(source, images), evaluate(ema.module, images), tol=1e-4)


@pytest.mark.parametrize("kwargs", [{"drop_path_rate": 0.7}, EXPLICIT, {"survival_probs": [0.9] * 4 + [0.4] * 5}])
@pytest.mark.parametrize("changed", [False, True])
def test_a_published_model_comes_back_though_timm_drops_drop_path_rate(
    kwargs: dict[str, Any], changed: bool, source: Net, images: Tensor, tmp_path: Path
) -> None:
    model = create(**kwargs)
    model.load_state_dict(source.state_dict())
    if changed:
        sdzoo.set_survival(model, [0.6] * 9)
    timm.models.save_for_hf(model, str(tmp_path), safe_serialization=True)
    assert "drop_path_rate" not in (tmp_path / "config.json").read_text()
    back = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert sdzoo.survival_probs(back) == sdzoo.survival_probs(model)
    assert torch.equal(evaluate(back, images), evaluate(model, images))
    close(evaluate(source, images), evaluate(back, images), tol=1e-4)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, [0.8] * 9),
        ({"schedule": "uniform", "drop_path_rate": 0.3}, [0.7] * 9),
        ({"drop_path_rate": 0.4}, [0.6] * 9),
        ({"schedule": "constant_depth"}, [1.0] * 9),
        ({"survival_probs": [0.9] * 9}, [0.9] * 9),
    ],
)
def test_a_saved_folder_gives_its_own_probabilities_unless_others_are_asked_for(
    asked: dict[str, Any], expected: list[float], tmp_path: Path
) -> None:
    """timm writes schedule into config.json but not drop_path_rate: half of what the weights hold."""
    saved = timm.create_model("sd_resnet20", schedule="uniform", drop_path_rate=0.2).eval()
    timm.models.save_for_hf(saved, str(tmp_path), safe_serialization=True)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, **asked).eval()
    assert sdzoo.survival_probs(loaded) == pytest.approx(expected, abs=1e-6)
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    reference = saved(images)
    limit = 1e-4 * max(1, reference.abs().max().item())
    assert (loaded(images) - reference).abs().max().item() <= limit


@pytest.mark.parametrize("strict", [True, False])
def test_weights_that_lost_one_of_their_probabilities_are_refused(strict: bool) -> None:
    state = timm.create_model("sd_resnet20", drop_path_rate=0.2).state_dict()
    del state["layer3.2.gate.survival_prob"]
    with pytest.raises(RuntimeError, match=r"missing for layer3.2.gate.survival_prob and there for the others"):
        timm.create_model("sd_resnet20").load_state_dict(state, strict=strict)


@pytest.mark.parametrize(
    "schedule", [{"schedule": "constant_depth"}, {"schedule": "stagewise", "survival_probs": [1.0, 0.8, 0.5]}]
)
def test_a_rate_for_a_folder_of_another_schedule_is_linear_decay(schedule: dict[str, Any], tmp_path: Path) -> None:
    saved = timm.create_model("sd_resnet20", **schedule).eval()
    timm.models.save_for_hf(saved, str(tmp_path), safe_serialization=True)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, drop_path_rate=0.4).eval()
    assert sdzoo.survival_probs(loaded) == pytest.approx([1 - block / 9 * 0.4 for block in range(1, 10)], abs=1e-6)
