from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nets import calibrated, close, evaluate, plain_forward, random_images, stored_probs
from numpy.typing import NDArray
from PIL import Image
from samples import FILES, LABELS, equal, normalised
from torch import nn

from sdzoo.deploy.onnx_export import export_onnx
from sdzoo.deploy.predictor import Predictor, model_predictor
from sdzoo.deploy.runtime import load_predictor
from sdzoo.errors import InputError


@pytest.fixture(params=["onnx", "torch"])
def either(request: pytest.FixtureRequest, predictor: Predictor, torch_predictor: Predictor) -> Predictor:
    return predictor if request.param == "onnx" else torch_predictor


@pytest.fixture
def expected(model: nn.Module) -> Callable[..., NDArray[np.float32]]:
    """Return the logits of picture files by the paper's equations on the model's state dict."""
    state = model.state_dict()
    return lambda *files: plain_forward(state, torch.from_numpy(normalised(*files)), stored_probs(state)).numpy()


# What it takes and gives


def test_a_path(either: Predictor, expected: Callable[..., NDArray[np.float32]]) -> None:
    equal(expected(FILES[0]), either(FILES[0]))
    equal(expected(FILES[0]), either(str(FILES[0])))


def test_a_pil_image(either: Predictor, expected: Callable[..., NDArray[np.float32]]) -> None:
    with Image.open(FILES[1]) as image:
        equal(expected(FILES[1]), either(image))


def test_several_of_either_kind(either: Predictor, expected: Callable[..., NDArray[np.float32]]) -> None:
    logits = either([FILES[2], str(FILES[3]), Image.open(FILES[4])])
    equal(expected(FILES[2], FILES[3], FILES[4]), logits)
    equal(logits, either((FILES[2], FILES[3], FILES[4])))


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
@pytest.mark.parametrize("batch_size", [1, 5])
def test_a_normalised_array(
    model: nn.Module, either: Predictor, dtype: type[np.floating[Any]], batch_size: int
) -> None:
    images = random_images(batch_size).half()  # so that every dtype holds the same numbers
    logits = either(images.numpy().astype(dtype))
    assert logits.dtype == np.float32
    equal(evaluate(model, images.float()).numpy(), logits)


def test_an_array_laid_out_otherwise(model: nn.Module, either: Predictor) -> None:
    images = random_images(3)
    channels_last = np.ascontiguousarray(images.permute(0, 2, 3, 1).numpy()).transpose(0, 3, 1, 2)
    equal(evaluate(model, images).numpy(), either(channels_last))


def test_both_predictors_are_alike(predictor: Predictor, torch_predictor: Predictor) -> None:
    close(torch.from_numpy(torch_predictor(FILES)), torch.from_numpy(predictor(FILES)), 1e-4)
    for theirs, ours in zip(predictor.top(FILES, 3), torch_predictor.top(FILES, 3), strict=True):
        assert [one.label for one in theirs] == [one.label for one in ours]
        assert [one.probability for one in theirs] == pytest.approx([one.probability for one in ours], abs=1e-4)
    assert predictor.name == torch_predictor.name == "sd_resnet20"
    assert predictor.labels == torch_predictor.labels == LABELS
    for name in ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode"):
        assert predictor.config[name] == torch_predictor.config[name]


def test_the_larger_picture_is_resized_and_its_centre_taken(tmp_path: Path, either: Predictor) -> None:
    """Shorter side to 32, antialiased bilinear, then the middle 32 columns: columns 16 to 48 of 64."""
    pixels = np.random.default_rng(0).integers(0, 256, (48, 96, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    small = Image.fromarray(pixels).resize((64, 32), Image.Resampling.BILINEAR).crop((16, 0, 48, 32))
    small.save(tmp_path / "small.png")
    equal(either(normalised(tmp_path / "small.png")), either(tmp_path / "wide.png"))


def test_probabilities_are_the_softmax_of_the_logits(either: Predictor) -> None:
    images = random_images(3).numpy() * 3
    logits = either(images).astype(np.float64)
    softmax = torch.from_numpy(logits).softmax(1).numpy()
    for row, best in zip(softmax, either.top(images, 4), strict=True):
        order = sorted(range(10), key=lambda index: -row[index])[:4]
        assert [one.label for one in best] == [LABELS[index] for index in order]
        assert [one.probability for one in best] == pytest.approx(row[order].tolist(), rel=1e-9)
    assert len(either.top(images)[0]) == 5
    assert sum(one.probability for one in either.top(images, 10)[0]) == pytest.approx(1, abs=1e-12)
    assert len(either.top(images, 99)[0]) == 10


def test_large_logits_do_not_overflow(source: nn.Module) -> None:
    with torch.no_grad():
        source.get_parameter("fc.bias")[7] = 1e6
    best = model_predictor(source).top(FILES[0], 2)[0]
    assert (best[0].label, best[0].probability) == ("horse", 1.0)
    assert best[1].probability == 0.0


def test_classes_without_names_are_numbered(tmp_path: Path) -> None:
    model = calibrated("sd_resnet20", num_classes=3)
    export_onnx(model, tmp_path / "model.onnx")
    for predictor in (load_predictor(tmp_path / "model.onnx"), model_predictor(model)):
        assert predictor.labels is None
        assert {one.label for one in predictor.top(FILES[0])[0]} == {"0", "1", "2"}


@pytest.mark.parametrize("global_pool", ["avg", ""])
def test_a_model_without_classifier_has_no_top_classes(global_pool: str) -> None:
    predictor = model_predictor(calibrated("sd_resnet20", num_classes=0, global_pool=global_pool))
    assert predictor(FILES[0]).shape == ((1, 64) if global_pool else (1, 64, 8, 8))
    with pytest.raises(InputError):
        predictor.top(FILES[0])


@pytest.mark.parametrize("k", [0, -1])
def test_top_of_no_classes_is_refused(torch_predictor: Predictor, k: int) -> None:
    with pytest.raises(InputError):
        torch_predictor.top(FILES[0], k)


def test_one_channel(tmp_path: Path) -> None:
    model = calibrated("sd_resnet20", in_chans=1, images=random_images(8, chans=1))
    export_onnx(model, tmp_path / "model.onnx")
    grey = Image.open(FILES[0]).convert("L")
    mean, std = (0.4914 + 0.4822 + 0.4465) / 3, (0.2470 + 0.2435 + 0.2616) / 3
    array = ((np.asarray(grey) / 255 - mean) / std).astype(np.float32)[None, None]
    predictor = load_predictor(tmp_path / "model.onnx")
    equal(evaluate(model, torch.from_numpy(array)).numpy(), predictor(grey))
    with pytest.raises(InputError, match=r"is RGB; the model takes .*\bL\b"):
        predictor(FILES[0])


def test_the_torch_predictor_refuses_training_mode(source: nn.Module) -> None:
    with pytest.raises(InputError, match=r"training mode.*call model\.eval\(\)"):
        model_predictor(source.train())


def test_the_torch_predictor_computes_in_the_models_dtype(source: nn.Module) -> None:
    images = random_images(2)
    reference = evaluate(source, images)
    logits = model_predictor(source.double())(images.numpy())
    assert logits.dtype == np.float32
    close(reference, torch.from_numpy(logits), 1e-5)


# Arrays and pictures it refuses


@pytest.mark.parametrize(
    "shape", [(3, 32, 32), (1, 3, 32, 31), (1, 1, 32, 32), (1, 32, 32, 3), (0, 3, 32, 32), (1, 1, 3, 32, 32), ()]
)
def test_arrays_of_other_shapes(either: Predictor, shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError) as caught:
        either(np.zeros(shape, np.float32))
    assert f"the array is {shape}; sd_resnet20 takes (batch, 3, 32, 32)" in str(caught.value)


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.bool_, np.complex64, object, "U1"])
def test_arrays_of_other_types(either: Predictor, dtype: Any) -> None:
    """uint8 above all: pixels that are not normalised would give a confident wrong answer."""
    with pytest.raises(InputError, match=r"the array is .*; give normalised floats, or pictures"):
        either(np.zeros((1, 3, 32, 32), dtype))


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(1, 3, 32, 32),
        [np.zeros((3, 32, 32), np.float32)],
        [torch.zeros(3, 32, 32)],
        None,
        5,
        b"x.jpg",
        [None],
    ],
    ids=["tensor", "arrays", "tensors", "None", "number", "bytes", "Nones"],
)
def test_things_that_are_neither_pictures_nor_arrays(torch_predictor: Predictor, images: Any) -> None:
    with pytest.raises(InputError):
        torch_predictor(images)


def test_no_images(either: Predictor) -> None:
    with pytest.raises(InputError, match="no images given"):
        either([])


@pytest.fixture(scope="module")
def odd_pictures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pictures")
    with Image.open(FILES[0]) as image:
        image.convert("L").save(folder / "grey.png")
        image.convert("RGBA").save(folder / "rgba.png")
        image.resize((1, 1)).save(folder / "tiny.png")
    content = FILES[0].read_bytes()
    (folder / "truncated.jpg").write_bytes(content[: len(content) // 2])
    (folder / "text.jpg").write_text("no picture")
    return {file.stem: file for file in folder.iterdir()} | {"missing": folder / "missing.jpg", "folder": folder}


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("grey", r"is .*\bL\b.*; the model takes RGB"),
        ("rgba", r"is .*\bRGBA\b.*; the model takes RGB"),
        ("tiny", "is 1x1 pixels"),
        ("truncated", "cannot be decoded"),
        ("text", "is not an image"),
        ("missing", "does not exist"),
        ("folder", "is a folder"),
    ],
)
def test_pictures_that_cannot_be_used(either: Predictor, odd_pictures: dict[str, Path], name: str, says: str) -> None:
    with pytest.raises(InputError, match=says) as caught:
        either([FILES[0], odd_pictures[name]])
    assert str(odd_pictures[name]) in str(caught.value)


@pytest.mark.parametrize("mode", ["L", "RGBA"])
def test_a_pil_image_of_another_mode(either: Predictor, mode: str) -> None:
    with pytest.raises(InputError, match=rf"the image is .*\b{mode}\b.*; the model takes RGB"):
        either(Image.open(FILES[0]).convert(mode))


@pytest.mark.parametrize("kind", ["onnx", "torch"])
def test_conversion_where_it_is_asked_for(
    exported: Path, model: nn.Module, odd_pictures: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    predictor = load_predictor(exported, convert=True) if kind == "onnx" else model_predictor(model, convert=True)
    for name in ("grey", "rgba"):
        with Image.open(odd_pictures[name]) as image:
            image.convert("RGB").save(tmp_path / "rgb.png")
            equal(predictor(normalised(tmp_path / "rgb.png")), predictor(image))
        equal(predictor(normalised(tmp_path / "rgb.png")), predictor(odd_pictures[name]))
    with pytest.raises(InputError, match="1x1"):
        predictor(odd_pictures["tiny"])


# Shared, warmed up


def test_eight_threads_get_what_one_gets(predictor: Predictor, torch_predictor: Predictor) -> None:
    """Pictures and arrays at once, of different sizes of batch."""
    for shared in (predictor, torch_predictor):
        tasks: list[Any] = [FILES[i : i + 1 + i % 3] for i in range(8)] + [
            random_images(1 + i, seed=i).numpy() for i in range(8)
        ]
        alone = [shared(task) for task in tasks]
        with ThreadPoolExecutor(8) as pool:
            together = list(pool.map(shared, tasks * 4))
        for index, logits in enumerate(together):
            equal(alone[index % len(tasks)], logits, 1e-5)


def test_warming_up_runs_batches_of_the_size_that_is_asked_for() -> None:
    seen: list[tuple[type, tuple[int, ...]]] = []

    def run(batch: NDArray[Any]) -> NDArray[np.float32]:
        seen.append((batch.dtype.type, batch.shape))
        return np.zeros((len(batch), 2), np.float32)

    config = {"input_size": (3, 30, 40)}
    Predictor(run, "x", "y", None, config).warmup()
    Predictor(run, "x", "y", None, config, in_graph=True).warmup(batch_size=5, runs=2)
    assert seen == [(np.float32, (1, 3, 30, 40))] * 3 + [(np.uint8, (5, 30, 40, 3))] * 2


def test_warming_up_a_real_one(either: Predictor) -> None:
    before = either(FILES[0])
    either.warmup(batch_size=4)
    np.testing.assert_allclose(either(FILES[0]), before, rtol=0, atol=1e-5)


# More that it refuses


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_hundred_megapixels_are_refused_before_they_are_decoded(either: Predictor, tmp_path: Path) -> None:
    """A lazily opened image too, of which Pillow has read the header alone."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 10_000, 10_000, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n"
    for chunk in (header, b"IDAT" + zlib.compress(b"")):
        data += struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    (tmp_path / "large.png").write_bytes(data)
    with pytest.raises(InputError, match=r"large\.png is 10000x10000 pixels, 100 million; at most 64 million"):
        either(tmp_path / "large.png")
    with Image.open(tmp_path / "large.png") as image, pytest.raises(InputError, match="100 million; at most 64"):
        either(image)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e300])
def test_arrays_that_are_not_finite_in_float32(either: Predictor, bad: float) -> None:
    array = np.zeros((1, 3, 32, 32))
    array[0, 1, 2, 3] = bad
    with pytest.raises(InputError, match="values that are not finite"):
        either(array)


def test_logits_that_are_not_finite_are_no_answer(source: nn.Module) -> None:
    with torch.no_grad():
        source.get_parameter("fc.bias")[3] = torch.nan
    broken = model_predictor(source)
    for images in (FILES[0], np.zeros((1, 3, 32, 32), np.float32)):
        with pytest.raises(InputError, match="sd_resnet20 gives values that are not finite"):
            broken(images)
    assert np.isnan(broken.pixels(np.zeros((1, 3, 32, 32), np.uint8))).any()  # whoever compares sees them


def test_a_model_that_does_not_say_its_input() -> None:
    with pytest.raises(InputError, match=r"Sequential does not say its classes and input: create it with timm"):
        model_predictor(nn.Sequential(nn.Conv2d(3, 4, 3)).eval())


def test_a_file_that_does_not_say_how_takes_arrays_alone() -> None:
    foreign = Predictor(lambda batch: batch.sum((2, 3)), "x.onnx", "y", None, {"input_size": (3, None, 16)})
    assert foreign(np.ones((2, 3, 5, 16), np.float32)).tolist() == [[80.0] * 3] * 2
    with pytest.raises(InputError, match=r"x\.onnx does not say how pictures are resized and normalised: give it arr"):
        foreign(FILES[0])
    with pytest.raises(InputError, match=r"\(2, 3, 5, 15\); x\.onnx takes \(batch, 3, any, 16\)"):
        foreign(np.ones((2, 3, 5, 15), np.float32))
