"""From a picture to the array a model takes: opened, checked, resized, normalised, in one place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from timm.data import create_transform, resolve_data_config
from torch import nn

from sdzoo.errors import InputError

MODE_OF_CHANNELS = {1: "L", 3: "RGB"}
MIN_SIDE = 8
MAX_PIXELS = 64_000_000  # a decoded picture takes three bytes for each
# What Pillow says to damaged files; of sizes that are no longer plausible it may warn, which a caller may have made an
# error.
UNDECODABLE = (
    *(OSError, SyntaxError, ValueError, NotImplementedError),
    *(Image.DecompressionBombError, Image.DecompressionBombWarning),
)
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
COLOUR_MODES = {"L": "grey (L)", "RGB": "RGB", "RGBA": "transparent (RGBA)", "P": "of a palette (P)"}


def open_image(path: str | Path, in_chans: int = 3, convert: bool = False) -> Image.Image:
    """Return the decoded picture at ``path``, as RGB (``in_chans`` 3) or grey (1).

    Args:
        path: An image file of any format that Pillow reads.
        in_chans: Channels that the model takes.
        convert: Convert a picture of another colour mode instead of refusing it; transparency is dropped.

    Raises:
        InputError: if the file is missing, no image, truncated, of another colour mode, under 8 pixels on a side, or of
            more than 64 million pixels, which is seen before they are decoded.
    """
    try:
        image = Image.open(path)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except IsADirectoryError:
        raise InputError(f"{path} is a folder; name an image file") from None
    except UnidentifiedImageError:
        raise InputError(f"{path} is not an image that can be read") from None
    except UNDECODABLE as error:
        raise InputError(f"{path} cannot be decoded: {error}") from None
    with image:
        return check_image(image, in_chans, convert, str(path))


def check_image(image: Image.Image, in_chans: int = 3, convert: bool = False, name: str = "the image") -> Image.Image:
    """Return ``image``, decoded, in the colour mode that ``in_chans`` asks for; ``name`` is what an error calls it.

    Raises:
        InputError: as :func:`open_image`.
    """
    if image.width * image.height > MAX_PIXELS:
        raise InputError(
            f"{name} is {image.width}x{image.height} pixels, {image.width * image.height / 1e6:.0f} million; at most "
            f"{MAX_PIXELS / 1e6:.0f} million"
        )
    try:
        image.load()
    except UNDECODABLE as error:
        raise InputError(f"{name} cannot be decoded: {error}") from None
    mode = MODE_OF_CHANNELS.get(in_chans)
    if mode is None:
        raise InputError(f"a model with {in_chans} input channels takes arrays, not pictures ({name})")
    if min(image.size) < MIN_SIDE:
        raise InputError(f"{name} is {image.width}x{image.height} pixels; at least {MIN_SIDE}x{MIN_SIDE}")
    if image.mode.startswith(("I", "F")):
        raise InputError(f"{name} has more than 8 bits a channel ({image.mode}); scale it to 8 first")
    if image.mode != mode:
        if not convert:
            got = COLOUR_MODES.get(image.mode, image.mode)
            raise InputError(
                f"{name} is {got}; the model takes {COLOUR_MODES[mode]}: convert it, or allow it (--convert)"
            )
        return image.convert(mode)
    return image


def input_config(model: nn.Module, **overrides: Any) -> dict[str, Any]:
    """Return timm's data config of ``model``: input_size ``(C, H, W)``, mean, std, interpolation, crop_pct, crop_mode.

    Where the model's channels are not those of its mean and std, each channel takes their average.
    """
    config = resolve_data_config(overrides, model=model)
    in_chans = getattr(model, "in_chans", config["input_size"][0])
    config["input_size"] = (in_chans, *config["input_size"][1:])
    for name in ("mean", "std"):
        if len(config[name]) != in_chans:
            config[name] = (sum(config[name]) / len(config[name]),) * in_chans
    return config


def resizer(config: dict[str, Any]) -> Callable[[Image.Image], NDArray[np.uint8]]:
    """Return timm's evaluation resize and centre crop, from a picture to uint8 ``(C, H, W)``.

    It raises InputError for a picture so narrow that, its shorter side resized, it has more than 64 million pixels.
    """
    names = ("input_size", "interpolation", "crop_pct", "crop_mode")
    given = {name: config[name] for name in names if config.get(name) is not None}
    transform: Any = create_transform(**given, is_training=False, use_prefetcher=True)
    shorter = max(config["input_size"][1:]) / (config.get("crop_pct") or 1)

    def resize(image: Image.Image) -> NDArray[np.uint8]:
        if shorter**2 * max(image.size) / min(image.size) > MAX_PIXELS:
            raise InputError(f"a picture of {image.width}x{image.height} pixels is too long and narrow to be resized")
        return np.asarray(transform(image))

    return resize


def normalise(images: NDArray[np.uint8], config: dict[str, Any]) -> NDArray[np.float32]:
    """Return ``(images / 255 - mean) / std`` for uint8 ``(B, C, H, W)``, in float32."""
    mean, std = (np.asarray(config[name], np.float32).reshape(1, -1, 1, 1) for name in ("mean", "std"))
    return ((images.astype(np.float32) / np.float32(255) - mean) / std).astype(np.float32, copy=False)


def denormalise(images: NDArray[np.float32], config: dict[str, Any]) -> NDArray[np.uint8]:
    """Return the uint8 ``(B, C, H, W)`` of which ``images`` are :func:`normalise`'s result."""
    mean, std = (np.asarray(config[name], np.float32).reshape(1, -1, 1, 1) for name in ("mean", "std"))
    return ((images * std + mean) * 255).round().clip(0, 255).astype(np.uint8)
