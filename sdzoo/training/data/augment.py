"""Augmentation: what a sample gets follows from seed, epoch and the sample, whatever batch, rank or worker it is in."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import posterize as timm_posterize
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from sdzoo.training.recipe import Recipe
from sdzoo.training.streams import stream, stream_seed

PAD = 4
Step = Callable[[Any], Any]  # from a PIL image to a PIL image


@contextmanager
def own_generators() -> Iterator[Callable[[int], None]]:
    """Yield a function that seeds Python's, numpy's and torch's global CPU generators; they are put back at the end.

    timm's augmentation draws from all three and takes no generator, so that seeding them is the only way; dropout and
    whatever else draws from them must not notice.
    """
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()

    def seed(value: int) -> None:
        random.seed(value)
        np.random.seed(value % 2**32)
        torch.default_generator.manual_seed(value)  # torch.manual_seed would also queue seeds for a GPU

    try:
        yield seed
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


def only_flips(recipe: Recipe) -> bool:
    """Return whether all that is random of ``recipe``'s transform are flips, which are then done to whole batches.

    timm's random crop is the whole picture at scale and ratio 1, or its largest square; of one that is almost square it
    draws which rows or columns to leave out, and of a set that fits into memory that is drawn once, not in every epoch.
    """
    if recipe.no_aug or recipe.train_crop_mode not in (None, "rrc"):
        return False
    colours = recipe.color_jitter or recipe.grayscale_prob or recipe.gaussian_blur_prob or recipe.aa
    return recipe.scale == recipe.ratio == [1.0, 1.0] and recipe.train_interpolation != "random" and not colours


def training_steps(recipe: Recipe, data_config: dict[str, Any]) -> tuple[list[Step], list[Step]]:
    """Return what a picture goes through on its own, one after the other: first what is fixed, then what is random.

    By timm's ``create_transform``; where there is a fixed part it leaves a picture of the model's input size, and the
    random part may be empty.
    """
    interpolation = "" if recipe.no_aug else recipe.train_interpolation
    pad4 = recipe.train_crop_mode == "pad4"
    options: dict[str, Any] = {
        "input_size": data_config["input_size"],
        "is_training": True,
        "interpolation": interpolation or data_config["interpolation"],
        "mean": tuple(data_config["mean"]),
        "normalize": False,
    }
    if recipe.no_aug:
        return _without_tensor(create_transform(**options, no_aug=True)), []
    options |= {
        "train_crop_mode": None if pad4 else recipe.train_crop_mode,
        "scale": recipe.scale,
        "ratio": recipe.ratio,
        "hflip": recipe.hflip,
        "vflip": recipe.vflip,
        "color_jitter": recipe.color_jitter or None,  # 0 would be a step that changes nothing
        "color_jitter_prob": recipe.color_jitter_prob,
        "grayscale_prob": recipe.grayscale_prob or 0.0,
        "gaussian_blur_prob": recipe.gaussian_blur_prob or 0.0,
        "auto_augment": recipe.aa,
    }
    made: Any = create_transform(**options, separate=True)
    crops, colours, _ = made
    for step in colours.transforms:
        for op in (*getattr(step, "ops", ()), *itertools.chain(*getattr(step, "policy", ()))):
            if op.aug_fn is timm_posterize:
                op.aug_fn = posterize
    if pad4:
        return evaluation_steps(data_config), list(colours.transforms)
    if only_flips(recipe):
        return list(crops.transforms[:1]), []
    return [], [*crops.transforms, *colours.transforms]


def posterize(image: Image.Image, bits_to_keep: int, **_: Any) -> Image.Image:
    """Return timm's posterised image, also where RandAugment keeps 0 bits: black, which Pillow 13 refuses to make."""
    return image.point(lambda _: 0) if bits_to_keep < 1 else timm_posterize(image, bits_to_keep)


def evaluation_steps(data_config: dict[str, Any]) -> list[Step]:
    """Return timm's evaluation resize and crop."""
    names = ("input_size", "interpolation", "crop_pct", "crop_mode")
    given = {name: data_config[name] for name in names if data_config.get(name) is not None}
    return _without_tensor(create_transform(**given, mean=tuple(data_config["mean"]), normalize=False))


def _without_tensor(transform: Any) -> list[Step]:
    return list(transform.transforms[:-1])


def normaliser(mean: Iterable[float], std: Iterable[float], device: torch.device) -> Callable[[Tensor], Tensor]:
    """Return the function from uint8 images to ``(x / 255 - mean) / std``, on ``device``."""
    shift = torch.tensor([m * 255 for m in mean], device=device).view(1, -1, 1, 1)
    scale = torch.tensor([s * 255 for s in std], device=device).view(1, -1, 1, 1)
    return lambda images: (images.to(device, non_blocking=True).float() - shift) / scale


def pad_crop_flip(images: Tensor, offsets: Tensor, flips: Tensor) -> Tensor:
    """Return each of ``images`` ``(B, C, H, W)`` shifted and mirrored: the paper's augmentation.

    Args:
        images: Normalised images; what is shifted in is zero, the mean and not black.
        offsets: ``(B, 2)`` in 0..8: rows and columns into the image padded by 4; 4 is no shift.
        flips: ``(B,)`` bool: mirror left to right.
    """
    batch, _, height, width = images.shape
    padded = F.pad(images, (PAD, PAD, PAD, PAD)).permute(0, 2, 3, 1)
    rows = offsets[:, 0, None] + torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device).expand(batch, width)
    columns = offsets[:, 1, None] + torch.where(flips[:, None], columns.flip(1), columns)
    sample = torch.arange(batch, device=images.device)[:, None, None]
    return padded[sample, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


class BatchAugmentation:
    """What is done to a whole batch on the device: normalise; for pad4 shift; mirror where all can be; erase."""

    def __init__(self, recipe: Recipe, data_config: dict[str, Any], device: torch.device, count: int | None) -> None:
        """Take ``count`` samples as numbered 0, 1, ...; None if their keys are hashes of their content."""
        self.recipe, self.count = recipe, count
        self.normalise = normaliser(data_config["mean"], data_config["std"], device)
        self.shifts = recipe.train_crop_mode == "pad4" and not recipe.no_aug
        self.flips = self.shifts or only_flips(recipe)
        self.erase = None
        if recipe.reprob > 0 and not recipe.no_aug:
            # The noise is made on the CPU: the same whatever the device.
            self.erase = RandomErasing(recipe.reprob, mode=recipe.remode, max_count=recipe.recount, device="cpu")
        self._drawn: tuple[int, list[Tensor]] = (-1, [])

    def __call__(self, images: Tensor, keys: Tensor, epoch: int) -> Tensor:
        """Return float images of uint8 ones ``(B, C, H, W)``, the samples called ``keys`` ``(B,)``."""
        result = self.normalise(images)
        if self.flips:
            offsets, flips, upside_down = (draw.to(result.device) for draw in self._draws(keys, epoch))
            if self.recipe.vflip:
                result = torch.where(upside_down[:, None, None, None], result.flip(2), result)
            if self.shifts:
                result = pad_crop_flip(result, offsets, flips)
            else:
                result = torch.where(flips[:, None, None, None], result.flip(3), result)
        if self.erase is not None:
            with own_generators() as seed:
                for image, key in zip(result, keys.tolist(), strict=True):
                    seed(stream_seed(self.recipe.seed, "erase", epoch, key))
                    self.erase(image)
        return result

    def _draws(self, keys: Tensor, epoch: int) -> list[Tensor]:
        """Return offsets ``(B, 2)`` and two flips ``(B,)``: rows of one table an epoch, which costs nothing a step."""
        if self.count is None:
            drawn = [self._table(1, epoch, key) for key in keys.tolist()]
            return [torch.cat(parts) for parts in zip(*drawn, strict=True)]
        if self._drawn[0] != epoch:
            self._drawn = epoch, self._table(self.count, epoch)
        return [table[keys] for table in self._drawn[1]]

    def _table(self, count: int, epoch: int, *key: int) -> list[Tensor]:
        def named(what: str) -> torch.Generator:
            return stream(self.recipe.seed, what, epoch, *key)

        offsets = torch.randint(0, 2 * PAD + 1, (count, 2), generator=named("crop"))
        flips = torch.rand(count, generator=named("flip")) < self.recipe.hflip
        upside_down = torch.rand(count, generator=named("vflip")) < self.recipe.vflip
        return [offsets, flips, upside_down]
