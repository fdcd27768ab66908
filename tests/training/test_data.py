from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from sdzoo.errors import InputError
from sdzoo.training import data as data_module
from sdzoo.training.data import ImageSet, load_image_set, normaliser, pad_crop_flip, training_batches

CONFIG: dict[str, Any] = {"input_size": (3, 32, 32), "interpolation": "bilinear", "crop_pct": 1.0}
CPU = torch.device("cpu")


def plain(images: Tensor) -> Tensor:
    return images.float()


def refused(folder: Path, split: str = "train", config: dict[str, Any] = CONFIG) -> str:
    with pytest.raises(InputError) as caught:
        load_image_set(folder, split, config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def naive_pad_crop_flip(image: np.ndarray, row: int, column: int, flip: bool) -> np.ndarray:
    """Return one image ``(C, H, W)``, pixel by pixel: output (y, x) is input (y + row - 4, x' + column - 4), or 0."""
    _, height, width = image.shape
    result = np.zeros_like(image)
    for y in range(height):
        for x in range(width):
            mirrored = width - 1 - x if flip else x
            source_y, source_x = y + row - 4, mirrored + column - 4
            if 0 <= source_y < height and 0 <= source_x < width:
                result[:, y, x] = image[:, source_y, source_x]
    return result


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 5, 9)])
def test_pad_crop_flip_is_the_naive_loop(shape: tuple[int, int, int]) -> None:
    cases = [(row, column, flip) for row in range(9) for column in range(9) for flip in (False, True)]
    images = torch.randn(len(cases), *shape, generator=torch.Generator().manual_seed(0))
    offsets = torch.tensor([case[:2] for case in cases])
    flips = torch.tensor([case[2] for case in cases])
    got = pad_crop_flip(images, offsets, flips)
    for image, result, case in zip(images.numpy(), got.numpy(), cases, strict=True):
        np.testing.assert_array_equal(result, naive_pad_crop_flip(image, *case))


def test_offset_4_without_flip_is_the_image_itself() -> None:
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(pad_crop_flip(images, torch.full((2, 2), 4), torch.zeros(2, dtype=torch.bool)), images)


def test_what_is_shifted_in_is_the_mean_and_not_black() -> None:
    """Padding follows normalisation: white images become 2 inside, and exactly 0 where nothing was."""
    data = ImageSet(torch.full((64, 3, 8, 8), 255, dtype=torch.uint8), torch.arange(64), ("a",) * 64)
    batches = training_batches(data, normaliser((0.5,) * 3, (0.25,) * 3, CPU), 64, seed=0, epoch=0)
    images, _ = next(batches)
    assert images.unique().tolist() == pytest.approx([0.0, 2.0], abs=1e-6)
    assert 0.0 in images.unique().tolist()


def test_normaliser_is_x_over_255_minus_mean_over_std() -> None:
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, 16, 16)
    mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    got = normaliser(mean, std, CPU)(images)
    assert got.dtype == torch.float32
    for channel in range(3):
        expected = (np.arange(256) / 255 - mean[channel]) / std[channel]
        np.testing.assert_allclose(got[1, channel].flatten().numpy(), expected, rtol=0, atol=2e-6)


def coded_set(count: int, size: int = 12) -> ImageSet:
    """Return images whose pixel (y, x) is 12 y + x, labelled with their index: both can be read off a batch."""
    pixels = torch.arange(size * size, dtype=torch.uint8).view(1, 1, size, size)
    return ImageSet(pixels.expand(count, 1, size, size).clone(), torch.arange(count), ("a",))


def by_label(data: ImageSet, batch_size: int, **options: Any) -> dict[int, Tensor]:
    """Return the images of an epoch by their label."""
    return {
        label: image
        for images, labels in training_batches(data, plain, batch_size, **{"seed": 5, "epoch": 0, **options})
        for image, label in zip(images, labels.tolist(), strict=True)
    }


@pytest.mark.parametrize("batch_size", [3, 7, 20, 60])
def test_augmentation_of_an_image_depends_neither_on_its_batch_nor_on_the_batch_size(batch_size: int) -> None:
    data = coded_set(60)
    alone, batched = by_label(data, 1), by_label(data, batch_size)
    assert len(alone) == 60
    assert all(torch.equal(image, alone[label]) for label, image in batched.items())
    assert len({image.numpy().tobytes() for image in alone.values()}) > 30, "augmentation must do something"


def decode(image: Tensor) -> tuple[int, int, bool]:
    """Return the offsets (row, column) and the flip by which an image of ``coded_set`` was made."""
    here, right = (int(image[0, 6, x]) for x in (5, 6))
    flip = right < here
    row, column = divmod(here, 12)
    return row - 6 + 4, column - (6 if flip else 5) + 4, flip


@pytest.mark.parametrize("changed", [{"epoch": 1}, {"seed": 6}], ids=str)
def test_rows_columns_and_flips_all_differ_from_epoch_to_epoch_and_from_seed_to_seed(changed: dict[str, int]) -> None:
    """By chance 1 of 9 offsets and 1 of 2 flips stay as they were: of 300, 33 and 150; far fewer than all."""
    data = coded_set(300)
    base, again, other = by_label(data, 1), by_label(data, 1), by_label(data, 1, **changed)
    assert all(torch.equal(image, base[label]) for label, image in again.items())
    for part, most in ((0, 60), (1, 60), (2, 190)):
        assert sum(decode(base[label])[part] == decode(other[label])[part] for label in range(300)) < most


def test_shifts_and_flips_are_uniform_and_independent() -> None:
    """4000 images: every one of 81 shifts and 2 mirrorings as often as chance has it, within 5 standard deviations."""
    count = 4000
    seen = np.zeros((9, 9, 2))
    for image in by_label(coded_set(count), 100).values():
        row, column, flip = decode(image)
        seen[row, column, int(flip)] += 1
    probability = 1 / seen.size
    assert seen.sum() == count
    assert np.abs(seen - count * probability).max() < 5 * (count * probability * (1 - probability)) ** 0.5
    for axes, share in (((0, 1), 1 / 2), ((1, 2), 1 / 9), ((0, 2), 1 / 9)):
        deviation = np.abs(seen.sum(axis=axes) - count * share).max()
        assert deviation < 4 * (count * share * (1 - share)) ** 0.5


@pytest.mark.parametrize(("hflip", "flipped"), [(0.0, 0), (1.0, 200)])
def test_hflip_is_the_probability_of_a_flip(hflip: float, flipped: int) -> None:
    images = by_label(coded_set(200), 10, hflip=hflip).values()
    assert sum(bool(image[0, 6, 6] < image[0, 6, 5]) for image in images) == flipped


def test_without_augmentation_images_are_as_they_are() -> None:
    data = coded_set(20)
    assert all(torch.equal(image, data.images[0].float()) for image in by_label(data, 5, augment=False).values())


def test_an_epoch_shows_every_image_once_in_another_order_each_time() -> None:
    orders = []
    for epoch in range(3):
        batches = training_batches(coded_set(60), plain, 20, seed=5, epoch=epoch)
        orders.append([label for _, labels in batches for label in labels.tolist()])
        assert sorted(orders[-1]) == list(range(60))
        assert orders[-1] != list(range(60))
    assert len({tuple(order) for order in orders}) == 3


def test_last_partial_batch_is_left_out() -> None:
    assert [len(labels) for _, labels in training_batches(coded_set(66), plain, 16, seed=5, epoch=0)] == [16] * 4


@pytest.mark.parametrize("start", [0, 1, 3, 4])
def test_batches_go_on_at_start(start: int) -> None:
    whole = list(training_batches(coded_set(66), plain, 16, seed=5, epoch=2))
    rest = list(training_batches(coded_set(66), plain, 16, seed=5, epoch=2, start=start))
    assert len(rest) == 4 - start
    for (images, labels), (expected_images, expected_labels) in zip(rest, whole[start:], strict=True):
        assert torch.equal(images, expected_images)
        assert torch.equal(labels, expected_labels)


def test_batches_leave_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    list(training_batches(coded_set(10), plain, 2, seed=5, epoch=0))
    assert torch.equal(torch.get_rng_state(), before)


def test_images_labels_and_classes_of_a_folder(image_folder: Path) -> None:
    loaded = load_image_set(image_folder, "train", CONFIG)
    assert loaded.classes == ("blue", "green", "red")
    assert len(loaded) == 66
    assert (loaded.images.shape, loaded.images.dtype) == ((66, 3, 32, 32), torch.uint8)
    assert (loaded.labels.dtype, loaded.labels.bincount().tolist()) == (torch.int64, [22, 22, 22])
    brightest = loaded.images.float().mean(dim=(2, 3)).argmax(dim=1)
    assert torch.equal(brightest, torch.tensor([2, 1, 0])[loaded.labels]), "every label is that of its picture's colour"


def test_images_of_the_models_size_are_read_as_they_are_and_others_scaled_and_cropped(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 64, 48, 3), np.uint8)
    folder = tmp_path / "train" / "a"
    folder.mkdir(parents=True)
    Image.fromarray(pixels[0, :32, :32]).save(folder / "0.png")
    Image.fromarray(pixels[1]).save(folder / "1.png")  # 48 wide, 64 high: 32 x 42, then 5 rows off above
    loaded = load_image_set(tmp_path, "train", CONFIG).images.permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(loaded[0], pixels[0, :32, :32])
    expected = Image.fromarray(pixels[1]).resize((32, 42), Image.Resampling.BILINEAR).crop((0, 5, 32, 37))
    np.testing.assert_array_equal(loaded[1], np.asarray(expected))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_pictures_of_other_colour_modes_are_converted(make_image_folder: Callable[..., Path], mode: str) -> None:
    folder = make_image_folder({"train": 1})
    picture = folder / "train" / "blue" / "000.png"
    Image.open(picture).convert(mode).save(picture)
    expected = np.asarray(Image.open(picture).convert("RGB")).transpose(2, 0, 1)
    np.testing.assert_array_equal(load_image_set(folder, "train", CONFIG).images[0].numpy(), expected)


def test_grey_model_gets_one_channel(image_folder: Path) -> None:
    assert load_image_set(image_folder, "val", {**CONFIG, "input_size": (1, 32, 32)}).images.shape == (12, 1, 32, 32)


@pytest.mark.parametrize("split", ["train", "no_such_split"])
def test_missing_folder(tmp_path: Path, split: str) -> None:
    message = refused(tmp_path / "data", split)
    assert f"data/{split} is not a folder" in message
    assert "<class>/<image>" in message


def test_file_instead_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "train").write_text("")
    assert "is not a folder" in refused(tmp_path)


@pytest.mark.parametrize("inside", [(), ("a", "b")], ids=["nothing", "class folders without images"])
def test_folder_without_images(tmp_path: Path, inside: tuple[str, ...]) -> None:
    (tmp_path / "train").mkdir()
    for name in inside:
        (tmp_path / "train" / name).mkdir()
    assert "holds no images" in refused(tmp_path)


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "tiny"])
def test_damaged_image_is_named(make_image_folder: Callable[..., Path], damage: str) -> None:
    """timm's own reader would take the next image in its place."""
    folder = make_image_folder({"train": 3})
    picture = folder / "train" / "green" / "001.jpg"
    if damage == "tiny":
        Image.new("RGB", (1, 1)).save(picture)
    else:
        content = picture.read_bytes()
        picture.write_bytes({"truncated": content[: len(content) // 2], "empty": b"", "text": b"hello"}[damage])
    assert str(picture) in refused(folder)


def test_more_images_than_memory(image_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_module, "MEMORY_LIMIT_GIB", 1e-6)
    assert "of memory" in refused(image_folder)


def test_order_of_images_does_not_depend_on_the_file_system(
    make_image_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """Copied in reverse, the folder lists its files in another order; the run must not notice."""
    folder = make_image_folder({"train": 12})
    for picture in sorted(folder.rglob("*.*"), reverse=True):
        target = tmp_path / "copy" / picture.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(picture, target)
    first, second = (load_image_set(root, "train", CONFIG) for root in (folder, tmp_path / "copy"))
    assert torch.equal(first.images, second.images)
    assert torch.equal(first.labels, second.labels)
