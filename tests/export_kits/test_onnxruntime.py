"""The onnxruntime kit, run as its README says."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from cards import put_card, save_card
from exported import KITS, export_folder, load_file, not_finite, without_classifier
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.data import create_transform, resolve_data_config

from sdzoo.assets import pictures as demo_pictures
from sdzoo.images import normalise, resizer

pytest.importorskip("onnxruntime", reason="needs onnxruntime: pip install -r export/onnxruntime/requirements.txt")
KIT = KITS / "onnxruntime"
pictures = load_file(KIT / "pictures.py")


@pytest.fixture(scope="module", params=["client", "in-graph"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an exported folder of either preprocessing. Read only."""
    return export_folder(tmp_path_factory.mktemp("exported") / "folder", request.param)


@pytest.fixture
def own_folder(folder: Path, tmp_path: Path) -> Path:
    """Return a copy of the exported folder, to be damaged."""
    return Path(shutil.copytree(folder, tmp_path / "folder"))


def classify(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, KIT / "classify.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def refused(*arguments: str | Path) -> str:
    done = classify(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    return done.stderr


def png(width: int, height: int) -> bytes:
    """Return a PNG file of this size that ends where its pixels would begin."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return start + struct.pack(">I", 1000) + b"IDAT"


def test_five_best_labels_are_those_of_the_trained_model(folder: Path) -> None:
    model = timm.create_model("sd_resnet20", pretrained=True).eval()
    transform: Any = create_transform(**resolve_data_config({}, model=model))
    labels = json.loads((folder / "labels.json").read_text())
    files = list(demo_pictures().values())
    done = classify(folder, *files)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 6 * len(files)
    for index, file in enumerate(files):
        with torch.inference_mode():
            expected = model(transform(Image.open(file))[None])[0].double().softmax(0).topk(5)
        assert lines[6 * index] == str(file)
        for line, value, number in zip(lines[6 * index + 1 :], *expected, strict=False):
            percent, label = line.split()
            assert label == labels[number]
            assert float(percent.rstrip("%")) == pytest.approx(100 * float(value), abs=0.051)


def test_folder_that_is_none(tmp_path: Path) -> None:
    assert "holds no card.json" in refused(tmp_path / "absent", "x.jpg")
    assert "holds no card.json" in refused(tmp_path, "x.jpg")


@pytest.mark.parametrize("name", ["model.onnx", "labels.json"])
def test_damaged_or_missing_file(own_folder: Path, name: str) -> None:
    content = bytearray((own_folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (own_folder / name).write_bytes(content)
    assert f"{name} is damaged: its sha256" in refused(own_folder, "x.jpg")
    (own_folder / name).unlink()
    assert f"{name} is missing" in refused(own_folder, "x.jpg")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": "other"}, 'not of the format "sdzoo-2"'),
        ({"file": "labels.json"}, "holds labels.json; this kit runs what `sdzoo export --to onnx` wrote"),
        ({"file": "model.engine"}, "has no sha256 of model.engine"),
        ({"files": {}}, "has no sha256 of labels.json, model.onnx"),
        ({"preprocessing": {"crop_mode": "border"}}, 'crop_mode is "border"'),
    ],
)
def test_card_that_is_not_for_this_kit(own_folder: Path, change: dict[str, Any], said: str) -> None:
    put_card(own_folder, **change)
    assert said in refused(own_folder, "x.jpg")


@pytest.mark.parametrize(("content", "said"), [("{", "is not JSON"), ("[]", "not of the format"), ("", "not JSON")])
def test_damaged_card(own_folder: Path, content: str, said: str) -> None:
    (own_folder / "card.json").write_text(content)
    assert said in refused(own_folder, "x.jpg")


@pytest.mark.parametrize(("old", "new"), [("0.4914", "4.4914"), ('"seal": "', '"seal": "\\ud800')])
def test_changed_card(own_folder: Path, old: str, new: str) -> None:
    text = (own_folder / "card.json").read_text()
    assert old in text
    (own_folder / "card.json").write_text(text.replace(old, new, 1))
    assert "card.json is damaged: its sha256 is not the seal in it" in refused(own_folder, "x.jpg")


def test_model_without_classifier(tmp_path: Path) -> None:
    assert "gives features: its model has no classifier" in refused(without_classifier(tmp_path / "out"), "x.jpg")


def test_values_that_are_not_finite(own_folder: Path) -> None:
    assert "values that are not finite" in refused(not_finite(own_folder), demo_pictures()["cat"])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_softmax_of_values_that_are_not_finite(value: float) -> None:
    with pytest.raises(ValueError, match="values that are not finite: it is damaged or untrained"):
        pictures.softmax(np.array([[0, 1], [value, 0]], np.float32))


def test_files_that_were_changed_on_purpose(own_folder: Path) -> None:
    (own_folder / "labels.json").write_text("[]")
    assert pictures.read_sealed(own_folder, ["labels.json"])["file"] == "model.onnx"
    with pytest.raises(ValueError, match=r"labels\.json is damaged"):
        pictures.read_sealed(own_folder, ["model.onnx"])
    (own_folder / "labels.json").unlink()
    with pytest.raises(ValueError, match=r"labels\.json is missing"):
        pictures.read_sealed(own_folder, ["labels.json"])


def test_card_without_an_entry(own_folder: Path) -> None:
    card = json.loads((own_folder / "card.json").read_text())
    del card["output"]
    save_card(own_folder, card)
    assert "it lacks output" in refused(own_folder, "x.jpg")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is not a picture"),
        (b"A text is no picture.", "is not a picture"),
        (png(10_000, 10_000), "has 10000x10000 pixels; at most 64,000,000 in all"),
        (png(30_000, 30_000), "cannot be read"),  # Pillow's own limit comes first
        (png(7, 100), "has 7x100 pixels; at least 8x8"),
        (png(100, 100), "cannot be read"),
    ],
    ids=["empty", "text", "100 megapixels", "900 megapixels", "7 pixels", "cut short"],
)
def test_file_that_is_no_usable_picture(folder: Path, tmp_path: Path, content: bytes, said: str) -> None:
    """The sizes are in headers without a pixel: a picture that is too large is refused before it is decoded."""
    (tmp_path / "x.png").write_bytes(content)
    message = refused(folder, tmp_path / "x.png")
    assert said in message
    assert str(tmp_path / "x.png") in message


def test_missing_picture(folder: Path) -> None:
    assert "absent.jpg does not exist" in refused(folder, "absent.jpg")


def test_no_picture_named(folder: Path) -> None:
    done = classify(folder)
    assert done.returncode == 2
    assert "usage:" in done.stderr


def card_of(where: str, **config: Any) -> dict[str, Any]:
    usual = {"input_size": [3, 32, 32], "mean": [0.49, 0.48, 0.45], "std": [0.25, 0.24, 0.26]}
    usual |= {"interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "center"}
    return {"preprocessing": {"where": where, **usual, **config}}


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(width * height).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels).convert(mode)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(
    size=st.tuples(st.integers(8, 300), st.integers(8, 300)),
    goal=st.sampled_from([(32, 32), (33, 33), (224, 224), (32, 48), (65, 40)]),
    interpolation=st.sampled_from(["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"]),
    crop_pct=st.sampled_from([0.875, 0.9, 0.95, 0.96, 1.0]) | st.floats(0.3, 1.0),
    channels=st.sampled_from([1, 3]),
)
def test_pixels_are_those_of_timms_transform(
    size: tuple[int, int], goal: tuple[int, int], interpolation: str, crop_pct: float, channels: int
) -> None:
    config = card_of("client", input_size=(channels, *goal), interpolation=interpolation, crop_pct=crop_pct)
    config["preprocessing"] |= {"mean": [0.3, 0.4, 0.5][:channels], "std": [0.2, 0.3, 0.7][:channels]}
    image = noise(*size, mode={1: "L", 3: "RGB"}[channels])
    expected = resizer(config["preprocessing"])(image)
    array = pictures.to_array(image, config)
    assert array.dtype == np.float32
    np.testing.assert_array_equal(array, normalise(expected[None], config["preprocessing"])[0])
    config["preprocessing"]["where"] = "in-graph"
    array = pictures.to_array(image, config)
    assert array.dtype == np.uint8
    np.testing.assert_array_equal(array, expected.transpose(1, 2, 0))


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "CMYK", "1"])
def test_other_colours_are_converted_before_resizing(mode: str) -> None:
    image = noise(40, 50, mode)
    card = card_of("in-graph")
    np.testing.assert_array_equal(pictures.to_array(image, card), pictures.to_array(image.convert("RGB"), card))


def test_more_than_8_bits_a_channel_are_refused() -> None:
    with pytest.raises(ValueError, match="more than 8 bits a channel"):
        pictures.to_array(Image.fromarray(np.zeros((32, 32), np.uint16)), card_of("client"))


def test_picture_that_resizing_would_blow_up_is_refused() -> None:
    with pytest.raises(ValueError, match="8x600000 pixels: too long and narrow"):
        pictures.to_array(Image.new("RGB", (8, 600_000)), card_of("client"))


def test_picture_from_bytes() -> None:
    file = demo_pictures()["cat"]
    assert pictures.open_picture(file.read_bytes()).tobytes() == Image.open(file).tobytes()
    with pytest.raises(ValueError, match=r"^the picture is not a picture"):
        pictures.open_picture(b"text")


def test_limit_of_pixels_can_be_set() -> None:
    content = demo_pictures()["cat"].read_bytes()
    assert pictures.open_picture(content, max_pixels=1024).size == (32, 32)
    with pytest.raises(ValueError, match="has 32x32 pixels; at most 1,023 in all"):
        pictures.open_picture(content, max_pixels=1023)


def test_softmax_of_large_logits() -> None:
    got = pictures.softmax(np.array([[1000.0, 1000.0 + np.log(3)], [0.0, 0.0]], np.float32))
    np.testing.assert_allclose(got, [[0.25, 0.75], [0.5, 0.5]], rtol=1e-4)
