from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_sets import (
    CONFIG,
    HEAVY,
    RAND,
    epoch_of,
    named_generator,
    named_seed,
    noise,
    normalised,
    pixels_of,
    recipe,
    stacked,
    training,
    write_folder,
)
from timm.data import create_transform
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from sdzoo.training.data.augment import (
    BatchAugmentation,
    normaliser,
    own_generators,
    pad_crop_flip,
    posterize,
    training_steps,
)
from sdzoo.training.data.streaming import transform_of

CPU = torch.device("cpu")
GREY = {**CONFIG, "mean": (0.0,), "std": (1 / 255,)}


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


def test_normaliser_is_x_over_255_minus_mean_over_std() -> None:
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, 16, 16)
    mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    got = normaliser(mean, std, CPU)(images)
    assert got.dtype == torch.float32
    for channel in range(3):
        expected = (np.arange(256) / 255 - mean[channel]) / std[channel]
        np.testing.assert_allclose(got[1, channel].flatten().numpy(), expected, rtol=0, atol=2e-6)


def coded(count: int, size: int = 12) -> Tensor:
    """Return grey images whose pixel (y, x) is 12 y + x: shift and mirroring can be read off them."""
    return torch.arange(size * size, dtype=torch.uint8).view(1, 1, size, size).expand(count, 1, size, size).clone()


def decode(image: Tensor) -> tuple[int, int, bool]:
    """Return the offsets (row, column) and the flip by which an image of ``coded`` was made."""
    here, right = (round(float(image[0, 6, x])) for x in (5, 6))
    flip = right < here
    row, column = divmod(here, 12)
    return row - 6 + 4, column - (6 if flip else 5) + 4, flip


def augmented(count: int, keys: Tensor | None = None, /, epoch: int = 0, **changes: Any) -> Tensor:
    keys = torch.arange(count) if keys is None else keys
    return BatchAugmentation(recipe(**changes), GREY, CPU, count)(coded(len(keys)), keys, epoch)


def test_shifts_and_flips_are_rows_of_the_epochs_streams() -> None:
    keys, epoch = torch.tensor([17, 3, 299, 0]), 4
    offsets = torch.randint(0, 9, (300, 2), generator=named_generator(7, "crop", epoch))[keys]
    flips = torch.rand(300, generator=named_generator(7, "flip", epoch))[keys] < 0.3
    got = [decode(image) for image in augmented(300, keys, epoch, hflip=0.3)]
    assert got == [(*offset, flip) for offset, flip in zip(offsets.tolist(), flips.tolist(), strict=True)]


def test_upside_down_is_a_stream_of_its_own() -> None:
    keys = torch.arange(40)
    up = torch.rand(40, generator=named_generator(7, "vflip", 0)) < 0.5
    plain, flipped = (augmented(40, keys, hflip=0.0, vflip=vflip) for vflip in (0.0, 0.5))
    offsets = torch.randint(0, 9, (40, 2), generator=named_generator(7, "crop", 0))
    for index in range(40):
        image = coded(1)[0].float()
        row, column = offsets[index].tolist()
        expected = naive_pad_crop_flip((image.flip(1) if up[index] else image).numpy(), row, column, False)
        np.testing.assert_allclose(flipped[index].numpy(), expected, rtol=0, atol=1e-3)
        if not up[index]:
            assert torch.equal(plain[index], flipped[index])


def test_what_is_shifted_in_is_the_mean_and_not_black() -> None:
    """Padding follows normalisation: white images become 1 / std inside, and exactly 0 where nothing was."""
    config = {**CONFIG, "mean": (0.5,) * 3, "std": (0.25,) * 3}
    augment = BatchAugmentation(recipe(), config, CPU, 64)
    images = augment(torch.full((64, 3, 8, 8), 255, dtype=torch.uint8), torch.arange(64), 0)
    assert images.unique().tolist() == pytest.approx([0.0, 2.0], abs=1e-6)
    assert 0.0 in images.unique().tolist()


@pytest.mark.parametrize("changed", [{"epoch": 1}, {"seed": 8}], ids=str)
def test_rows_columns_and_flips_all_differ_from_epoch_to_epoch_and_from_seed_to_seed(changed: dict[str, int]) -> None:
    """By chance 1 of 9 offsets and 1 of 2 flips stay as they were: of 300, 33 and 150; far fewer than all."""
    base, other = ([decode(image) for image in augmented(300, None, **options)] for options in ({"epoch": 0}, changed))
    for part, most in ((0, 60), (1, 60), (2, 190)):
        assert sum(a[part] == b[part] for a, b in zip(base, other, strict=True)) < most


def test_every_epoch_of_one_object_is_that_of_another() -> None:
    augment = BatchAugmentation(recipe(), GREY, CPU, 20)
    for epoch in (0, 1, 5, 1):
        assert torch.equal(augment(coded(20), torch.arange(20), epoch), augmented(20, epoch=epoch))


def test_shifts_and_flips_are_uniform_and_independent() -> None:
    """4000 images: every one of 81 shifts and 2 mirrorings as often as chance has it, within 5 standard deviations."""
    count = 4000
    seen = np.zeros((9, 9, 2))
    for image in augmented(count):
        row, column, flip = decode(image)
        seen[row, column, int(flip)] += 1
    probability = 1 / seen.size
    assert seen.sum() == count
    assert np.abs(seen - count * probability).max() < 5 * (count * probability * (1 - probability)) ** 0.5
    for axes, share in (((0, 1), 1 / 2), ((1, 2), 1 / 9), ((0, 2), 1 / 9)):
        deviation = np.abs(seen.sum(axis=axes) - count * share).max()
        assert deviation < 4 * (count * share * (1 - share)) ** 0.5


def test_samples_known_by_their_content_are_augmented_by_it() -> None:
    keys = torch.tensor([named_seed("a"), 5, named_seed("b")])
    augment = BatchAugmentation(recipe(), GREY, CPU, None)
    together = augment(coded(3), keys, 2)
    assert all(torch.equal(augment(coded(1), keys[i : i + 1], 2)[0], together[i]) for i in range(3))
    offsets = torch.randint(0, 9, (1, 2), generator=named_generator(7, "crop", 2, 5))
    assert list(decode(together[1])[:2]) == offsets[0].tolist()


@pytest.mark.parametrize("mode", ["const", "rand", "pixel"])
def test_erasing_is_timms_seeded_by_sample(mode: str) -> None:
    made = recipe(train_crop_mode="rrc", reprob=0.7, remode=mode, recount=3)
    pixels = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    keys = torch.tensor([4, 9, 2, 0, 7, 5])
    got = BatchAugmentation(made, CONFIG, CPU, 10)(pixels, keys, 3)
    erase = RandomErasing(0.7, mode=mode, max_count=3, device="cpu")
    changed = 0
    for image, key, result in zip(
        normaliser(CONFIG["mean"], CONFIG["std"], CPU)(pixels), keys.tolist(), got, strict=True
    ):
        random.seed(named_seed(7, "erase", 3, key))
        torch.manual_seed(named_seed(7, "erase", 3, key))
        expected = erase(image.clone())
        changed += not torch.equal(expected, image)
        assert torch.equal(result, expected)
    assert changed > 0


@pytest.mark.parametrize("options", [HEAVY, RAND | {"train_crop_mode": "rkrc"}], ids=["heavy", "rand"])
def test_a_sample_is_timms_transform_seeded_by_seed_epoch_and_index(tmp_path: Path, options: dict[str, Any]) -> None:
    options = options | {"reprob": 0.0, "train_interpolation": "random"}
    files = write_folder(tmp_path, count=4, size=48)
    made = recipe(**options, batch_size=6)
    images, labels = stacked(epoch_of(training(tmp_path, made=made), 2))
    order = torch.randperm(12, generator=named_generator(7, "order", 2)).tolist()
    assert labels.tolist() == [index // 4 for index in order]
    transform: Any = create_transform(
        (3, 32, 32),
        is_training=True,
        train_crop_mode=made.train_crop_mode,
        scale=(made.scale[0], made.scale[1]),
        ratio=(made.ratio[0], made.ratio[1]),
        vflip=made.vflip,
        color_jitter=made.color_jitter,
        grayscale_prob=made.grayscale_prob or 0,
        gaussian_blur_prob=made.gaussian_blur_prob or 0,
        auto_augment=made.aa,
        interpolation="random",
        mean=CONFIG["mean"],
        normalize=False,
    )
    for index, image in zip(order, images, strict=True):
        seed = named_seed(7, "augment", 2, index)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        expected = normalised(transform(Image.open(files[index]).convert("RGB")))
        torch.testing.assert_close(image, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("aa", ["rand-m10-n4-inc1", "v0", "augmix-m9-w3", "3a", "original"])
@pytest.mark.parametrize("channels", [3, 1])
def test_no_policy_of_timms_fails_on_any_picture(aa: str, channels: int) -> None:
    """RandAugment and AutoAugment ask Pillow to keep 0 bits, which Pillow 13 refuses."""
    config = {**CONFIG, "input_size": (channels, 32, 32), "mean": CONFIG["mean"][:channels]}
    fixed, steps = training_steps(recipe(aa=aa), config)
    transform = transform_of([*fixed, *steps])
    with own_generators() as seed:
        for index, pixels in enumerate(noise(120)):
            seed(index)
            image = transform(Image.fromarray(pixels).convert("RGB" if channels == 3 else "L"))
            assert (image.shape, image.dtype) == (config["input_size"], torch.uint8)


@pytest.mark.parametrize("bits", [0, 1, 4, 8])
def test_posterised_pixels_keep_their_first_bits(bits: int) -> None:
    pixels = noise(1)[0]
    expected = pixels & ((0xFF << (8 - bits)) & 0xFF)
    np.testing.assert_array_equal(np.asarray(posterize(Image.fromarray(pixels), bits)), expected)


def test_colours_change_before_the_paper_shift(tmp_path: Path) -> None:
    """pad4 with colour jitter: timm's jitter of the picture, seeded by sample, then the epoch's shift and flip."""
    files = write_folder(tmp_path, count=4)
    images, _ = stacked(epoch_of(training(tmp_path, color_jitter=0.4, batch_size=6)))
    order = torch.randperm(12, generator=named_generator(7, "order", 0)).tolist()
    offsets = torch.randint(0, 9, (12, 2), generator=named_generator(7, "crop", 0))
    flips = torch.rand(12, generator=named_generator(7, "flip", 0)) < 0.5
    jitter: Any = create_transform((3, 32, 32), is_training=True, color_jitter=0.4, separate=True)
    for index, image in zip(order, images, strict=True):
        torch.manual_seed(named_seed(7, "augment", 0, index))
        pixels = torch.from_numpy(np.array(jitter[1](Image.open(files[index])))).permute(2, 0, 1)
        assert not torch.equal(pixels, pixels_of(files[index]))
        row, column = offsets[index].tolist()
        shifted = naive_pad_crop_flip(normalised(pixels).numpy(), row, column, bool(flips[index]))
        np.testing.assert_allclose(image.numpy(), shifted, rtol=0, atol=1e-5)


FLIPS = {
    "train_crop_mode": "rrc",
    "scale": [1.0, 1.0],
    "ratio": [1.0, 1.0],
    "train_interpolation": "bilinear",
    "hflip": 0.5,
    "vflip": 0.3,
}


@pytest.mark.parametrize(("height", "width"), [(32, 32), (48, 48), (48, 30)])
def test_where_only_flips_are_random_the_picture_is_timms_and_whole_batches_are_flipped(
    tmp_path: Path, height: int, width: int
) -> None:
    """Each sample is timm's transform of the picture, in the one of its four flips that the epoch's streams say."""
    data = tmp_path / "train"
    for index in range(12):
        (data / str(index % 3)).mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(index).integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(pixels).save(data / str(index % 3) / f"{index:02d}.png")
    files = sorted(data.glob("*/*.png"))
    assert training_steps(recipe(**FLIPS), CONFIG)[1] == []
    images, _ = stacked(epoch_of(training(tmp_path, batch_size=6, **FLIPS), 1))
    order = torch.randperm(12, generator=named_generator(7, "order", 1)).tolist()
    flips = torch.rand(12, generator=named_generator(7, "flip", 1)) < 0.5
    upside_down = torch.rand(12, generator=named_generator(7, "vflip", 1)) < 0.3
    given: dict[str, Any] = {"scale": (1, 1), "ratio": (1, 1), "hflip": 0, "color_jitter": None}
    transform: Any = create_transform((3, 32, 32), is_training=True, interpolation="bilinear", normalize=False, **given)
    for index, image in zip(order, images, strict=True):
        expected = normalised(transform(Image.open(files[index])))
        expected = expected.flip(2) if flips[index] else expected
        expected = expected.flip(1) if upside_down[index] else expected
        torch.testing.assert_close(image, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "more",
    [
        {"train_interpolation": "random"},
        {"scale": [0.9, 1.0]},
        {"ratio": [0.75, 1.0]},
        {"train_crop_mode": "rkrc"},
        {"color_jitter": 0.4},
        {"aa": "rand-m9"},
        {"grayscale_prob": 0.1},
        {"gaussian_blur_prob": 0.1},
    ],
    ids=str,
)
def test_where_more_than_flips_is_random_pictures_are_transformed_one_by_one(more: dict[str, Any]) -> None:
    fixed, random_steps = training_steps(recipe(**FLIPS | more), CONFIG)
    assert not fixed
    assert len(random_steps) >= 3  # the crop and both flips
    augment = BatchAugmentation(recipe(**FLIPS | more), GREY, CPU, 4)
    pixels = torch.from_numpy(noise(4)).permute(0, 3, 1, 2)
    assert torch.equal(augment(pixels, torch.arange(4), 0), normaliser(GREY["mean"], GREY["std"], CPU)(pixels))


def test_without_augmentation_nothing_is_flipped() -> None:
    pixels = torch.from_numpy(noise(9)).permute(0, 3, 1, 2)
    augment = BatchAugmentation(recipe(**FLIPS | {"no_aug": True}), GREY, CPU, 9)
    assert torch.equal(augment(pixels, torch.arange(9), 0), normaliser(GREY["mean"], GREY["std"], CPU)(pixels))


@pytest.mark.parametrize("size", [32, 48])
def test_no_aug_is_the_picture_scaled_to_the_models_size(tmp_path: Path, size: int) -> None:
    files = write_folder(tmp_path, count=4, size=size)
    # what no_aug switches off may stand in the recipe
    images, _ = stacked(epoch_of(training(tmp_path, batch_size=6, no_aug=True, **HEAVY)))
    order = torch.randperm(12, generator=named_generator(7, "order", 0)).tolist()
    for index, image in zip(order, images, strict=True):
        scaled = Image.open(files[index]).resize((32, 32), Image.Resampling.BILINEAR)
        expected = normalised(torch.from_numpy(np.array(scaled)).permute(2, 0, 1))
        torch.testing.assert_close(image, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "options", [{}, {"color_jitter": 0.4, "reprob": 0.5}, HEAVY, RAND], ids=["pad4", "jitter", "heavy", "rand"]
)
def test_global_generators_are_left_alone(tmp_path: Path, options: dict[str, Any]) -> None:
    write_folder(tmp_path)

    def drawn() -> list[Any]:
        return [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]  # type: ignore[index]

    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    before = drawn()
    batches = training(tmp_path, **options).epoch(0)
    next(batches)
    assert drawn() == before, "also between two batches"
    list(batches)
    assert drawn() == before
