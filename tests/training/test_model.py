"""From a recipe to its model: which weights it starts with, what of it trains."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import sdzoo
from sdzoo import survival_probs
from sdzoo.errors import InputError
from sdzoo.images import input_config
from sdzoo.schedule import linear_decay
from sdzoo.training.model import create_model, enter_training
from sdzoo.training.recipe import Recipe, SdzooSettings

BUNDLED = "sd_resnet20.cifar10_jpeg"
WEIGHTS = Path(sdzoo.__file__).parent / "weights" / f"{BUNDLED}.safetensors"
HEAD = SdzooSettings(trainable="head")


def recipe(**values: Any) -> Recipe:
    return dataclasses.replace(Recipe("sd_resnet20", 9, 0.1, drop_path=None), **values)


@pytest.fixture
def images() -> Tensor:
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def bundled() -> nn.Module:
    return timm.create_model(BUNDLED, pretrained=True).eval()


def features(model: nn.Module, images: Tensor) -> Tensor:
    """Return what the classifier gets, in evaluation."""
    model.eval()
    with torch.no_grad():
        return model.forward_head(model.forward_features(images), pre_logits=True)  # type: ignore[operator]


def backbone(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items() if not name.startswith("fc.")}


@pytest.mark.parametrize(
    "values",
    [{"model": BUNDLED, "pretrained": True}, {"initial_checkpoint": str(WEIGHTS)}],
    ids=["pretrained", "checkpoint"],
)
class TestWeightsFromElsewhere:
    def test_they_are_taken_with_their_survival_probabilities(
        self, values: dict[str, Any], bundled: nn.Module, images: Tensor
    ) -> None:
        model = create_model(recipe(**values)).eval()
        assert survival_probs(model) == survival_probs(bundled) == pytest.approx(linear_decay(9, 0.8), rel=1e-6)
        with torch.no_grad():
            assert torch.equal(model(images), bundled(images))

    def test_another_schedule_keeps_the_evaluation_function(
        self, values: dict[str, Any], bundled: nn.Module, images: Tensor
    ) -> None:
        model = create_model(recipe(**values, drop_path=0.5)).eval()
        assert survival_probs(model) == pytest.approx(linear_decay(9, 0.5), rel=1e-6)
        with torch.no_grad():
            got, wanted = model(images), bundled(images)
        assert (got - wanted).abs().max() <= 1e-4 * max(1.0, float(wanted.abs().max()))
        assert any(not torch.equal(value, bundled.state_dict()[name]) for name, value in backbone(model).items())

    def test_another_number_of_classes_gets_a_new_classifier(
        self, values: dict[str, Any], bundled: nn.Module, images: Tensor
    ) -> None:
        model = create_model(recipe(**values, num_classes=7))
        assert model.num_classes == 7
        assert model.get_classifier().weight.shape == (7, 64)  # type: ignore[operator]
        assert torch.equal(features(model, images), features(bundled, images))

    def test_dropout_is_taken_from_the_recipe(self, values: dict[str, Any], bundled: nn.Module) -> None:
        assert create_model(recipe(**values, drop=0.3)).drop_rate == 0.3


def test_a_checkpoint_of_another_number_of_classes_is_refused_if_the_recipe_asks_for_none(tmp_path: Path) -> None:
    path = tmp_path / "seven.pth"
    torch.save({"state_dict": timm.create_model("sd_resnet20", num_classes=7).state_dict()}, path)
    with pytest.raises(InputError, match=r"fc\.weight \(7, 64\) for \(10, 64\)"):
        create_model(recipe(initial_checkpoint=str(path)))


def test_averaged_weights_come_first_as_in_timm(tmp_path: Path, bundled: nn.Module, images: Tensor) -> None:
    path = tmp_path / "last.pth"
    plain = timm.create_model("sd_resnet20").state_dict()
    torch.save({"state_dict": plain, "state_dict_ema": bundled.state_dict()}, path)
    model = create_model(recipe(initial_checkpoint=str(path))).eval()
    like_timm = timm.create_model("sd_resnet20", checkpoint_path=str(path)).eval()
    with torch.no_grad():
        assert torch.equal(model(images), bundled(images))
        assert torch.equal(like_timm(images), bundled(images))


@pytest.mark.parametrize("path", ["nowhere.pth", "recipe.yaml"])
def test_checkpoint_that_is_none(tmp_path: Path, path: str) -> None:
    (tmp_path / "recipe.yaml").write_text("model: x")
    with pytest.raises(InputError, match=path):
        create_model(recipe(initial_checkpoint=str(tmp_path / path)))


def test_checkpoint_of_another_model() -> None:
    with pytest.raises(InputError, match=r"does not fit SDResNetCifar: missing: layer1\.3"):
        create_model(recipe(model="sd_resnet32", initial_checkpoint=str(WEIGHTS), num_classes=7))


def test_input_of_another_size() -> None:
    model = create_model(recipe(input_size=[1, 40, 48]))
    assert input_config(model)["input_size"] == (1, 40, 48)
    assert model.eval()(torch.zeros(2, 1, 40, 48)).shape == (2, 10)


def test_head_is_initialised_as_asked(images: Tensor) -> None:
    torch.manual_seed(0)
    plain = create_model(recipe()).get_classifier()  # type: ignore[operator]
    torch.manual_seed(0)
    scaled = create_model(recipe(head_init_scale=0.5, head_init_bias=-4.0)).get_classifier()  # type: ignore[operator]
    assert torch.equal(scaled.weight, plain.weight * 0.5)
    assert torch.equal(scaled.bias, torch.full((10,), -4.0))


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        ({"model_kwargs": {"survival_probs": [0.5] * 8}}, "has 8 entries; the model has 9 blocks"),
        ({"drop_block": 0.1}, "drop_block_rate"),
        ({"mean": [0.5]}, "mean has 1 numbers, the model 3 channels"),
        ({"num_classes": 0, "head_init_scale": 0.1}, "the model has no classifier"),
        ({"num_classes": 0, "sdzoo": HEAD}, "the model has no classifier"),
    ],
)
def test_what_the_model_refuses(values: dict[str, Any], fault: str) -> None:
    with pytest.raises(InputError, match=fault):
        create_model(recipe(**values))


def test_drop_block_where_the_network_has_it() -> None:
    model = create_model(recipe(model="sd_resnet18", drop_block=0.1, num_classes=3))
    assert any(type(module).__name__.startswith("DropBlock") for module in model.modules())


@pytest.mark.parametrize("name", [BUNDLED, "sd_resnet18", "sd_wide_resnet16_4"])
def test_head_only_trains_the_classifier_on_a_backbone_as_in_evaluation(name: str) -> None:
    asked = recipe(model=name, pretrained=name == BUNDLED, num_classes=7, drop=0.5, sdzoo=HEAD)
    model = create_model(asked)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {"fc.weight", "fc.bias"}
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    pooled = features(model, images)
    before = backbone(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for seed in range(4):
        enter_training(model, asked)
        torch.manual_seed(seed)
        logits = model(images)
        torch.manual_seed(seed)
        dropped = nn.functional.dropout(pooled, 0.5)  # before the classifier it still acts
        assert torch.allclose(logits, nn.functional.linear(dropped, model.fc.weight, model.fc.bias), atol=1e-6)  # type: ignore[union-attr, arg-type]
        logits.logsumexp(1).sum().backward()
        optimizer.step()
    assert all(torch.equal(value, before[n]) for n, value in backbone(model).items())


def test_all_of_the_model_trains_otherwise() -> None:
    model = create_model(recipe()).eval()
    enter_training(model, recipe())
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
