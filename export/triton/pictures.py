"""From a picture to the array that an exported model takes, as its card says: the pixels are those of timm's transform.

Every kit holds this same file. It needs numpy and Pillow, and raises ValueError with one sentence for a wrong input.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
MODES = {1: "L", 3: "RGB"}
MIN_SIDE = 8
MAX_PIXELS = 64_000_000
KEYS = ("model", "file", "files", "input", "output", "preprocessing", "seal")

# Pillow warns of pictures from 89 megapixels on; the limit here is lower, and refuses.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def read_sealed(folder: str | Path, changed: Collection[str] = ()) -> dict[str, Any]:
    """Return the card of an exported folder, whose files are what it says.

    Args:
        folder: What ``sdzoo export`` wrote.
        changed: Names of files that are not compared, because they were changed on purpose.

    Raises:
        ValueError: if ``folder`` is no exported folder, or its card or one of its files is missing, damaged (by its
            sha256) or without sha256.
    """
    path = Path(folder) / "card.json"
    try:
        content = path.read_bytes()
        card = json.loads(content)
    except OSError:
        raise ValueError(f"{folder} holds no card.json; name a folder that `sdzoo export` wrote") from None
    except (ValueError, RecursionError):
        raise ValueError(f"{path} is damaged: it is not JSON") from None
    if not isinstance(card, dict) or card.get("format") != "sdzoo-2":
        raise ValueError(f'{path} is not of the format "sdzoo-2"')
    if missing := [key for key in KEYS if key not in card]:
        raise ValueError(f"{path} is damaged: it lacks {', '.join(missing)}")
    seal = str(card["seal"]).encode(errors="replace")
    if hashlib.sha256(content.replace(seal, b"0" * 64)).hexdigest().encode() != seal:
        raise ValueError(f"{path} is damaged: its sha256 is not the seal in it")
    if unnamed := sorted({card["file"], "labels.json"} - set(card["files"])):
        raise ValueError(f"{path} is damaged: it has no sha256 of {', '.join(unnamed)}")
    for name, sha256 in card["files"].items():
        file = path.parent / name
        if not file.is_file():
            raise ValueError(f"{file} is missing, which card.json names")
        if file.name not in changed and hashlib.sha256(file.read_bytes()).hexdigest() != sha256:
            raise ValueError(f"{file} is damaged: its sha256 is not the one in card.json")
    return card


def read_card(folder: str | Path) -> dict[str, Any]:
    """Return the card of an exported folder whose model classifies pictures, with ``labels.json`` as ``labels``.

    Raises:
        ValueError: as :func:`read_sealed`; or if the model has no classifier, or pictures are not cut as here.
    """
    card = read_sealed(folder)
    if (output := card["output"]["name"]) != "logits":
        raise ValueError(f"{folder} gives {output}: its model has no classifier, so there are no labels to name")
    if (crop_mode := card["preprocessing"]["crop_mode"]) != "center":
        raise ValueError(f'crop_mode is "{crop_mode}"; these pictures are only cut out of the "center"')
    return card | {"labels": json.loads((Path(folder) / "labels.json").read_bytes())}


def open_picture(source: str | Path | bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Return the decoded picture of a file, or of its content in bytes; its size is checked before it is decoded.

    Raises:
        ValueError: if it is missing, no picture, cut short, under 8 pixels on a side or over ``max_pixels``.
    """
    name = "the picture" if isinstance(source, bytes) else str(source)
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                allowed = f"at most {max_pixels:,} in all"
            elif min(width, height) < MIN_SIDE:
                allowed = f"at least {MIN_SIDE}x{MIN_SIDE}"
            else:
                image.load()
                return image
    except FileNotFoundError:
        raise ValueError(f"{name} does not exist") from None
    except UnidentifiedImageError:
        raise ValueError(f"{name} is not a picture ({', '.join(FORMATS)})") from None
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error and more at damaged files
        raise ValueError(f"{name} cannot be read: {' '.join(str(error).split())}") from None
    raise ValueError(f"{name} has {width}x{height} pixels; {allowed}")


def to_array(image: Image.Image, card: dict[str, Any]) -> NDArray[Any]:
    """Return what the model of ``card`` takes: float32 ``(C, H, W)``, normalised; in-graph: uint8 ``(H, W, C)``.

    A picture of other colours is converted first, transparency dropped. Then its shorter side becomes
    ``floor(size / crop_pct)``, antialiased, and the centre is cut out.

    Raises:
        ValueError: if the picture has more than 8 bits a channel, or is so long that it would not fit memory.
    """
    config = card["preprocessing"]
    channels, height, width = config["input_size"]
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"the picture has more than 8 bits a channel ({image.mode}); scale it to 8 first")
    size = _resized(image.size, (width, height), config["crop_pct"])
    if size[0] * size[1] > MAX_PIXELS:
        raise ValueError(f"the picture is {image.width}x{image.height} pixels: too long and narrow to be resized")
    image = image.convert(MODES[channels]).resize(size, Image.Resampling[config["interpolation"].upper()])
    left, top = round((size[0] - width) / 2), round((size[1] - height) / 2)
    pixels = np.asarray(image.crop((left, top, left + width, top + height))).reshape(height, width, channels)
    if config["where"] == "in-graph":
        return pixels
    mean, std = (np.asarray(config[name], np.float32) for name in ("mean", "std"))
    return np.ascontiguousarray(((pixels.astype(np.float32) / np.float32(255) - mean) / std).transpose(2, 0, 1))


def _resized(size: tuple[int, int], wanted: tuple[int, int], crop_pct: float) -> tuple[int, int]:
    """Return width and height after resizing, rounded as timm and torchvision round them."""
    goal = [math.floor(side / crop_pct) for side in wanted]
    if goal[0] == goal[1]:
        longer = int(goal[0] * max(size) / min(size))
        return (goal[0], longer) if size[0] <= size[1] else (longer, goal[0])
    ratio = min(side / target for side, target in zip(size, goal, strict=True))
    return round(size[0] / ratio), round(size[1] / ratio)


def softmax(logits: NDArray[Any]) -> NDArray[np.float64]:
    """Return the probabilities along the last axis.

    Raises:
        ValueError: if what the model gave is not finite.
    """
    if not np.isfinite(logits).all():
        raise ValueError("the model gives values that are not finite: it is damaged or untrained")
    odds = np.exp(np.asarray(logits, np.float64) - np.max(logits, axis=-1, keepdims=True))
    return odds / odds.sum(axis=-1, keepdims=True)
