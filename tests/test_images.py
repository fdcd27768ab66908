from __future__ import annotations

import re
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import timm
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import sdzoo  # noqa: F401  registers the models
from sdzoo.errors import InputError
from sdzoo.images import check_image, input_config, normalise, open_image, resizer

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 10, 3), np.uint8)


def save(path: Path, mode: str = "RGB", size: tuple[int, int] | None = None) -> Path:
    image = Image.fromarray(PIXELS).convert(mode)
    (image.resize(size) if size else image).save(path)
    return path


def refused(path: Path, *, convert: bool = False, in_chans: int = 3) -> str:
    with pytest.raises(InputError) as caught:
        open_image(path, in_chans, convert)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_rgb_picture_is_returned_as_it_is(tmp_path: Path) -> None:
    image = open_image(save(tmp_path / "a.png"))
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), PIXELS)


def test_grey_picture_for_a_model_of_one_channel(tmp_path: Path) -> None:
    assert open_image(save(tmp_path / "a.png", "L"), in_chans=1).mode == "L"


@pytest.mark.parametrize("mode", ["L", "RGBA", "LA", "P", "1"])
@pytest.mark.parametrize("convert", [False, True])
def test_other_colour_modes_are_refused_unless_conversion_is_asked_for(
    tmp_path: Path, mode: str, convert: bool
) -> None:
    path = save(tmp_path / "a.png", mode)
    if convert:
        image = open_image(path, convert=True)
        assert (image.mode, image.size) == ("RGB", (10, 12))
    else:
        assert re.search(rf"is .*\b{mode}\b.*; the model takes .*RGB", refused(path))


def test_cmyk_jpeg(tmp_path: Path) -> None:
    assert "is CMYK" in refused(save(tmp_path / "a.jpg", "CMYK"))


def test_conversion_drops_transparency_and_keeps_the_colour(tmp_path: Path) -> None:
    rgba = np.concatenate([PIXELS, np.full((12, 10, 1), 7, np.uint8)], axis=2)
    Image.fromarray(rgba).save(tmp_path / "a.png")
    np.testing.assert_array_equal(np.asarray(open_image(tmp_path / "a.png", convert=True)), PIXELS)


def test_rgb_picture_for_a_model_of_one_channel(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png")
    assert re.search(r"is .*RGB.*; the model takes .*\bL\b", refused(path, in_chans=1))
    assert open_image(path, in_chans=1, convert=True).mode == "L"


def test_model_that_takes_no_pictures(tmp_path: Path) -> None:
    assert "4 input channels" in refused(save(tmp_path / "a.png"), in_chans=4)


@pytest.mark.parametrize("size", [(1, 1), (7, 100), (100, 7)])
@pytest.mark.parametrize("convert", [False, True])
def test_picture_that_is_too_small(tmp_path: Path, size: tuple[int, int], convert: bool) -> None:
    message = refused(save(tmp_path / "a.png", size=size), convert=convert)
    assert f"is {size[0]}x{size[1]} pixels; at least 8x8" in message


def test_smallest_picture_taken(tmp_path: Path) -> None:
    assert open_image(save(tmp_path / "a.png", size=(8, 8))).size == (8, 8)


@pytest.mark.parametrize("suffix", ["jpg", "png", "bmp", "gif"])
@pytest.mark.parametrize("kept", [0.3, 0.8])
def test_truncated_picture(tmp_path: Path, suffix: str, kept: float) -> None:
    content = save(tmp_path / f"a.{suffix}").read_bytes()
    path = tmp_path / f"cut.{suffix}"
    path.write_bytes(content[: int(len(content) * kept)])
    refused(path, convert=True)


@pytest.mark.parametrize("content", [b"", b"hello", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", bytes(1000)])
def test_file_that_is_no_picture(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.png").write_bytes(content)
    refused(tmp_path / "a.png")


def test_missing_picture(tmp_path: Path) -> None:
    assert "does not exist" in refused(tmp_path / "a.png")


def test_folder_instead_of_a_picture(tmp_path: Path) -> None:
    refused(tmp_path)


def test_picture_of_too_many_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    assert "cannot be decoded" in refused(save(tmp_path / "a.png"))


def test_dds_of_unknown_pixel_format(tmp_path: Path) -> None:
    """Pillow says NotImplementedError to what it cannot decode, which is no OSError."""
    content = bytearray(save(tmp_path / "a.dds").read_bytes())
    content[80:84] = (152).to_bytes(4, "little")
    (tmp_path / "b.dds").write_bytes(content)
    refused(tmp_path / "b.dds")


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(
    suffix=st.sampled_from(["jpg", "png", "gif", "bmp", "webp"]),
    cut=st.none() | st.floats(0, 1),
    bytes_changed=st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), max_size=6),
)
def test_damaged_picture_is_opened_or_refused(
    tmp_path_factory: pytest.TempPathFactory,
    suffix: str,
    cut: float | None,
    bytes_changed: list[tuple[float, int]],
) -> None:
    path = tmp_path_factory.getbasetemp() / f"damaged.{suffix}"
    content = bytearray(save(path).read_bytes())
    for place, byte in bytes_changed:
        content[int(place * len(content))] = byte
    path.write_bytes(content if cut is None else content[: int(cut * len(content))])
    message = ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, on metadata and on sizes
        try:
            assert open_image(path, convert=True).mode == "RGB"
        except InputError as error:
            message = str(error)
    assert "\n" not in message


def test_check_image_calls_the_picture_by_the_name_given() -> None:
    with pytest.raises(InputError, match=r"^upload 3 is 1x1 pixels"):
        check_image(Image.new("RGB", (1, 1)), name="upload 3")


@pytest.fixture
def config() -> dict[str, object]:
    return {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2470, 0.2435, 0.2616)}


def test_normalise_is_x_over_255_minus_mean_over_std(config: dict[str, object]) -> None:
    images = np.random.default_rng(1).integers(0, 256, (2, 3, 4, 5), np.uint8)
    got = normalise(images, config)
    assert got.dtype == np.float32
    for channel, (mean, std) in enumerate(zip((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), strict=True)):
        expected = (images[:, channel].astype(np.float64) / 255 - mean) / std
        np.testing.assert_allclose(got[:, channel], expected, rtol=0, atol=2e-6)


def test_normalise_leaves_its_argument_alone(config: dict[str, object]) -> None:
    images = np.full((1, 3, 2, 2), 9, np.uint8)
    normalise(images, config)
    assert (images == 9).all()


@pytest.mark.parametrize(
    ("size", "resized", "corner"),
    [
        pytest.param((64, 48), (42, 32), (5, 0), id="wide: 32 * 64 / 48 = 42.7 wide, 5 off each side"),
        pytest.param((40, 80), (32, 64), (0, 16), id="tall"),
        pytest.param((32, 32), (32, 32), (0, 0), id="as it is"),
        pytest.param((8, 8), (32, 32), (0, 0), id="enlarged"),
    ],
)
def test_resizer_scales_the_shorter_side_and_crops_the_centre(
    size: tuple[int, int], resized: tuple[int, int], corner: tuple[int, int]
) -> None:
    image = Image.fromarray(PIXELS).resize(size, Image.Resampling.NEAREST)
    left, top = corner
    expected = image.resize(resized, Image.Resampling.BILINEAR).crop((left, top, left + 32, top + 32))
    resize = resizer({"input_size": (3, 32, 32), "interpolation": "bilinear", "crop_pct": 1.0})
    got = resize(image)
    assert got.dtype == np.uint8
    np.testing.assert_array_equal(got, np.asarray(expected).transpose(2, 0, 1))


def test_resizer_gives_grey_pictures_one_channel() -> None:
    resize = resizer({"input_size": (1, 32, 32), "interpolation": "bilinear", "crop_pct": 1.0})
    assert resize(Image.new("L", (40, 40), 9)).shape == (1, 32, 32)


def test_input_config_is_the_models_own() -> None:
    config = input_config(timm.create_model("sd_resnet20"))
    assert config["input_size"] == (3, 32, 32)
    assert config["mean"] == (0.4914, 0.4822, 0.4465)
    assert config["std"] == (0.2470, 0.2435, 0.2616)
    assert (config["interpolation"], config["crop_pct"]) == ("bilinear", 1.0)


def test_input_config_of_another_number_of_channels_takes_the_mean_of_the_means() -> None:
    config = input_config(timm.create_model("sd_resnet20", in_chans=1))
    assert config["input_size"] == (1, 32, 32)
    assert config["mean"] == pytest.approx(((0.4914 + 0.4822 + 0.4465) / 3,), abs=1e-9)
    assert config["std"] == pytest.approx(((0.2470 + 0.2435 + 0.2616) / 3,), abs=1e-9)


@pytest.mark.parametrize("mode", ["I", "I;16", "F"])
@pytest.mark.parametrize("convert", [False, True])
def test_more_than_8_bits_are_refused_also_with_conversion(mode: str, convert: bool) -> None:
    """Pillow would clip them to white."""
    with pytest.raises(InputError, match="more than 8 bits"):
        check_image(Image.new(mode, (32, 32)), 3, convert)


def png_that_promises(path: Path, width: int, height: int) -> Path:
    """Write the header of a picture, without its pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [header, b"IDAT" + zlib.compress(b"")]
    parts = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    return path


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(("width", "height"), [(10_000, 10_000), (8001, 8000), (64_000_001, 1)])
def test_too_many_pixels_are_seen_before_they_are_decoded(tmp_path: Path, width: int, height: int) -> None:
    """Decoding this one would end with another message: it has no pixels."""
    path = png_that_promises(tmp_path / "a.png", width, height)
    megapixels = f"{width * height / 1e6:.0f} million; at most 64 million"
    assert refused(path, convert=True) == f"{path} is {width}x{height} pixels, {megapixels}"
    with Image.open(path) as image, pytest.raises(InputError, match=r"^upload is .* at most 64 million$"):
        check_image(image, name="upload")


def test_most_pixels_are_taken_to_be_decoded(tmp_path: Path) -> None:
    assert "cannot be decoded" in refused(png_that_promises(tmp_path / "a.png", 8000, 8000))


@pytest.mark.parametrize("side", [10_000, 20_000])
def test_sizes_that_pillow_itself_warns_of_or_refuses(tmp_path: Path, side: int) -> None:
    """Here its warnings are errors."""
    refused(png_that_promises(tmp_path / "a.png", side, side))


def test_a_pil_image_that_cannot_be_decoded(tmp_path: Path) -> None:
    content = save(tmp_path / "a.png").read_bytes()
    (tmp_path / "b.png").write_bytes(content[: len(content) // 2])
    with Image.open(tmp_path / "b.png") as image, pytest.raises(InputError, match=r"^the image cannot be decoded: "):
        check_image(image)
