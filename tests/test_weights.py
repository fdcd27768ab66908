from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import timm
import timm.models._builder as timm_builder
import torch
from nets import close, evaluate, plain_forward, random_images, stored_probs
from torch import Tensor

import sdzoo
from sdzoo import weights
from sdzoo.errors import InputError

NAME = "sd_resnet20.cifar10_jpeg"
BUNDLED = sorted(file.name.removesuffix(".safetensors") for file in weights.FOLDER.glob("*.safetensors"))


@pytest.fixture(scope="module")
def stored() -> dict[str, Tensor]:
    return safetensors.torch.load_file(weights.path(NAME))


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the bundled file in a copy of its folder, which is the bundled folder for this test."""
    folder = tmp_path / "weights"
    shutil.copytree(weights.FOLDER, folder, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(weights, "FOLDER", folder)
    return folder / f"{NAME}.safetensors"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return what timm's reader of checkpoint files is called with."""
    called: list[str] = []
    read = timm_builder.load_state_dict

    def record(path: str, *args: Any, **kwargs: Any) -> Any:
        called.append(path)
        return read(path, *args, **kwargs)

    monkeypatch.setattr(timm_builder, "load_state_dict", record)
    return called


def create(file: Path) -> torch.nn.Module:
    return timm.create_model("sd_resnet20", pretrained=True, pretrained_cfg_overlay={"file": str(file)})


def test_the_whole_file_is_read_once_it_is_checked(copied: Path, reads: list[str]) -> None:
    create(copied)
    assert reads == [str(copied)]


@pytest.mark.parametrize("place", [0, 9, 3000, 0.5, -1], ids=["length", "header", "early", "middle", "last"])
def test_a_flipped_byte_is_refused_before_timm_reads_the_file(copied: Path, reads: list[str], place: float) -> None:
    content = bytearray(copied.read_bytes())
    content[int(len(content) * place) if isinstance(place, float) else place] ^= 1
    copied.write_bytes(content)
    with pytest.raises(InputError, match="is damaged: sha256 ") as caught:
        create(copied)
    assert hashlib.sha256(content).hexdigest() in str(caught.value)
    assert str(copied) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert reads == []


@pytest.mark.parametrize("kept", [0, 1000, -1])
def test_a_truncated_file_is_refused_before_timm_reads_it(copied: Path, reads: list[str], kept: int) -> None:
    copied.write_bytes(copied.read_bytes()[:kept])
    with pytest.raises(InputError, match="is damaged"):
        create(copied)
    assert reads == []


def test_a_card_of_other_weights_is_noticed(copied: Path, reads: list[str]) -> None:
    card = copied.with_suffix(".md")
    card.write_text(card.read_text().replace("\nsha256: ", "\nsha256: 00"))
    with pytest.raises(InputError, match="its card says 00"):
        create(copied)
    assert reads == []


@pytest.mark.parametrize("file", [None, "", "elsewhere.safetensors", Path("sub/x.safetensors")])
def test_files_that_are_not_bundled_are_not_looked_at(file: str | Path | None) -> None:
    weights.check(file)


def test_weights_of_ones_own_in_another_folder_load_unchecked(tmp_path: Path, stored: dict[str, Tensor]) -> None:
    file = tmp_path / f"{NAME}.safetensors"
    safetensors.torch.save_file({**stored, "fc.bias": stored["fc.bias"] + 1}, file)
    torch.testing.assert_close(create(file).state_dict()["fc.bias"], stored["fc.bias"] + 1, rtol=0, atol=0)


@pytest.mark.parametrize("name", [NAME, "sd_resnet20"])
def test_pretrained_needs_no_network(name: str, stored: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    model = timm.create_model(name, pretrained=True)
    state = model.state_dict()
    assert state.keys() == stored.keys()
    for key, tensor in state.items():
        torch.testing.assert_close(tensor, stored[key], rtol=0, atol=0, msg=key)
    assert sdzoo.survival_probs(model) == pytest.approx(stored_probs(stored), abs=1e-7)


def test_pretrained_evaluates_as_the_paper_has_it(stored: dict[str, Tensor]) -> None:
    images = random_images(8)
    model = timm.create_model(NAME, pretrained=True)
    close(plain_forward(stored, images, stored_probs(stored)), evaluate(model, images), 1e-4)


@pytest.mark.parametrize("asked", [{"drop_path_rate": 0.77}, {"schedule": "uniform"}, {"survival_probs": [0.25] * 9}])
def test_another_schedule_keeps_the_evaluation_function(stored: dict[str, Tensor], asked: dict[str, Any]) -> None:
    images = random_images(8)
    model = timm.create_model(NAME, pretrained=True, **asked)
    assert sdzoo.survival_probs(model) != pytest.approx(stored_probs(stored), abs=1e-3)
    close(plain_forward(stored, images, stored_probs(stored)), evaluate(model, images), 1e-4)


def test_another_number_of_classes_replaces_the_classifier_alone(stored: dict[str, Tensor]) -> None:
    model = timm.create_model(NAME, pretrained=True, num_classes=3)
    state = model.state_dict()
    assert state["fc.weight"].shape == (3, 64)
    assert state["fc.bias"].shape == (3,)
    for key in stored.keys() - {"fc.weight", "fc.bias"}:
        torch.testing.assert_close(state[key], stored[key], rtol=0, atol=0, msg=key)
    assert evaluate(model, random_images(2)).shape == (2, 3)


def test_one_input_channel_sums_the_filters_over_the_colours(stored: dict[str, Tensor]) -> None:
    """timm's rule: a grey picture then gives what it gave as three equal channels."""
    model = timm.create_model(NAME, pretrained=True, in_chans=1)
    grey = random_images(4, chans=1)
    colour = timm.create_model(NAME, pretrained=True)
    close(evaluate(colour, grey.expand(-1, 3, -1, -1)), evaluate(model, grey), 1e-4)
    torch.testing.assert_close(
        model.state_dict()["conv1.weight"], stored["conv1.weight"].sum(1, keepdim=True), rtol=1e-6, atol=1e-6
    )


def test_features_only_gives_the_three_stages(stored: dict[str, Tensor]) -> None:
    backbone = timm.create_model(NAME, pretrained=True, features_only=True).eval()
    images = random_images(2)
    with torch.no_grad():
        features = backbone(images)
    assert [tuple(feature.shape) for feature in features] == [(2, 16, 32, 32), (2, 32, 16, 16), (2, 64, 8, 8)]
    logits = features[-1].mean((2, 3)) @ stored["fc.weight"].T + stored["fc.bias"]
    close(plain_forward(stored, images, stored_probs(stored)), logits, 1e-4)


def test_something_ships() -> None:
    assert NAME in BUNDLED
    assert set(BUNDLED) <= set(timm.list_pretrained("sd_*"))


@pytest.mark.parametrize("name", BUNDLED)
def test_card_says_what_the_code_reads_and_the_file_is_the_one_it_means(name: str) -> None:
    card = weights.card(name)
    content = weights.path(name).read_bytes()
    assert card["sha256"] == hashlib.sha256(content).hexdigest()
    digest = hashlib.sha256()
    for key, tensor in sorted(safetensors.torch.load(content).items()):
        array = tensor.numpy()
        digest.update(f"{key} {array.dtype} {array.shape}\n".encode())
        digest.update(array.tobytes())
    assert card["state_sha256"] == digest.hexdigest()
    assert isinstance(card["data"], str)
    assert isinstance(card["epochs"], int)
    for figure in ("val_top1_percent", "test_top1_percent"):
        assert isinstance(card[figure], float)
        assert 0 <= card[figure] <= 100


@pytest.mark.parametrize("name", BUNDLED)
def test_header_of_the_file_says_which_model_it_is(name: str) -> None:
    with safetensors.safe_open(weights.path(name), "pt") as file:
        header = json.loads(file.metadata()["sdzoo"])
    arch = name.partition(".")[0]
    model = timm.create_model(arch)
    assert header["arch"] == arch
    assert header["num_classes"] == model.num_classes
    assert tuple(header["labels"]) == tuple(model.pretrained_cfg["label_names"])  # type: ignore[index]
    assert tuple(header["input_size"]) == model.pretrained_cfg["input_size"]  # type: ignore[index]


def test_tag_is_known_by_the_digest_of_the_state() -> None:
    digest = weights.card(NAME)["state_sha256"]
    assert weights.tag_of(digest) == "cifar10_jpeg"
    assert weights.tag_of(digest[::-1]) is None
    assert weights.tag_of("") is None


def test_the_default_configuration_points_at_the_bundled_file() -> None:
    config = timm.get_pretrained_cfg(NAME)
    assert config is not None
    assert Path(dataclasses.asdict(config)["file"]) == weights.path(NAME)
    assert config.label_names is not None
    assert len(config.label_names) == config.num_classes == 10
