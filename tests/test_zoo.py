from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from torch import nn

from sdzoo import registry, weights, zoo
from sdzoo.errors import InputError
from sdzoo.training.checkpoint import describe, save_weights

NAME = "sd_resnet20.cifar10_jpeg"
BLOCKS_PER_STAGE = {
    "sd_resnet20": 3,
    "sd_resnet32": 5,
    "sd_resnet44": 7,
    "sd_resnet56": 9,
    "sd_resnet110": 18,
    "sd_resnet152_cifar": 25,
    "sd_resnet1202": 200,
}
PARAMETERS = {
    "sd_resnet20": 269_722,
    "sd_resnet32": 464_154,
    "sd_resnet44": 658_586,
    "sd_resnet56": 853_018,
    "sd_resnet110": 1_727_962,
    "sd_resnet152_cifar": 2_408_474,
    "sd_resnet1202": 19_421_274,
}


def macs_by_hand(n: int) -> int:
    """Return kernel x channels in x channels out x pixels of every convolution, and the classifier."""
    stem = 9 * 3 * 16 * 32**2
    first = 2 * n * 9 * 16 * 16 * 32**2
    second = 9 * 16 * 32 * 16**2 + (2 * n - 1) * 9 * 32 * 32 * 16**2
    third = 9 * 32 * 64 * 8**2 + (2 * n - 1) * 9 * 64 * 64 * 8**2
    return stem + first + second + third + 64 * 10


def test_models_are_listed_smallest_first() -> None:
    assert registry.models() == list(BLOCKS_PER_STAGE)


@pytest.mark.parametrize("name", list(BLOCKS_PER_STAGE))
def test_summary(name: str) -> None:
    summary, n = zoo.summarise(name), BLOCKS_PER_STAGE[name]
    assert summary.name == name
    assert summary.input_size == (3, 32, 32)
    assert summary.parameters == PARAMETERS[name]
    assert summary.macs == macs_by_hand(n)
    assert summary.layers == 6 * n + 2
    assert summary.blocks == 3 * n
    assert summary.survival_probs == pytest.approx([1 - block / (6 * n) for block in range(1, 3 * n + 1)], abs=1e-6)
    assert summary.expected_live_blocks == pytest.approx(3 * n - (3 * n + 1) / 4, abs=1e-4)


@pytest.mark.parametrize("name", ["sd_resnet20", NAME])
def test_summary_names_the_weights_that_ship(name: str) -> None:
    assert NAME in zoo.summarise(name).weights
    assert zoo.summarise("sd_resnet32").weights == ()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("sd_resnet111", '"sd_resnet111" is not a model; nearest: sd_resnet110'),
        ("sd_resnet_20", "nearest: sd_resnet20"),
        ("sdresnet56.cifar10_jpeg", "nearest: sd_resnet56"),
        ("resnet18", '"resnet18" is not a model'),  # timm's, not sdzoo's
        ("", '"" is not a model'),
        ("sd_resnet20.cifar10", 'sd_resnet20 has no weights "cifar10"; it has: cifar10_jpeg'),
        ("sd_resnet1202.cifar10", 'sd_resnet1202 has no weights "cifar10"; it has none'),
    ],
)
def test_unknown_names_are_refused_with_what_there_is(name: str, says: str) -> None:
    for ask in (registry.check_name, zoo.summarise, zoo.open_model):
        with pytest.raises(InputError) as caught:
            ask(name)
        assert says in str(caught.value)


@pytest.mark.parametrize("name", ["sd_resnet20", NAME])
def test_open_by_name_gives_the_weights_that_ship(name: str) -> None:
    model = zoo.open_model(name)
    assert not model.training
    stored = safetensors.torch.load_file(weights.path(NAME))
    for key, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, stored[key], rtol=0, atol=0, msg=key)


def test_open_refuses_a_model_without_weights_and_names_those_with() -> None:
    with pytest.raises(InputError, match=r"sd_resnet32 has no weights: .*sd_resnet20\.cifar10_jpeg"):
        zoo.open_model("sd_resnet32")


def test_open_untrained_where_that_will_do() -> None:
    model = zoo.open_model("sd_resnet32", need_weights=False)
    assert not model.training
    assert sum(p.numel() for p in model.parameters()) == 464_154


@pytest.fixture
def checkpoint(tmp_path: Path) -> tuple[Path, nn.Module]:
    model = timm.create_model("sd_resnet32", num_classes=2)
    save_weights(tmp_path / "best.safetensors", model, describe(model, ("cat", "dog")))
    return tmp_path / "best.safetensors", model


def test_open_a_checkpoint(checkpoint: tuple[Path, nn.Module]) -> None:
    file, saved = checkpoint
    model = zoo.open_model(str(file))
    assert not model.training
    assert list(model.pretrained_cfg["label_names"]) == ["cat", "dog"]  # type: ignore[index]
    for key, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, saved.state_dict()[key], rtol=0, atol=0, msg=key)


@pytest.mark.parametrize("name", ["weights", "weights.bin", "sd_resnet20"])
def test_open_a_file_whatever_its_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one called like a model: what lies there was meant."""
    monkeypatch.chdir(tmp_path)
    torch.save(timm.create_model("sd_resnet32").state_dict(), name)
    assert len(zoo.open_model(name, "sd_resnet32").layer1) == 5  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["missing.safetensors", "missing.pth", "missing.pt", "no/such/folder/x.pth"])
def test_open_a_missing_checkpoint(name: str) -> None:
    with pytest.raises(InputError, match="does not exist"):
        zoo.open_model(name)


@pytest.mark.parametrize("name", ["runs/first", "/nowhere/sd_resnet20", "./sd_resnet20"])
def test_open_a_path_that_is_no_file(name: str) -> None:
    with pytest.raises(InputError):
        zoo.open_model(name)
