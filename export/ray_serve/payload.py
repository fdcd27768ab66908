"""From a request to the arrays that the model takes: whatever can be wrong with it is refused here, in one sentence."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from model import Model
from numpy.typing import NDArray
from pictures import open_picture, to_array

PICTURE_TYPES = ("image/jpeg", "image/png")
SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")  # no other of Pillow's decoders meets what a stranger sends


class Refused(Exception):
    """What is wrong with a request; ``status`` is its HTTP status."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(" ".join(message.split()))
        self.status = status


@dataclass(frozen=True)
class Limits:
    """What one request may ask for; the keys of ``limits`` in config.yaml."""

    body_bytes: int
    images: int
    image_bytes: int
    pixels: int  # of all its pictures together


def wanted(query: Mapping[str, str], classes: int) -> tuple[int, bool]:
    """Return ``k`` and whether the logits are asked for, from the query of the URL."""
    if unknown := sorted(set(query) - {"k", "logits"}):
        raise Refused(f"{unknown[0]!r} is no parameter; known: k, logits")
    k, logits = query.get("k", str(min(5, classes))), query.get("logits", "false")
    if not k.isascii() or not k.isdigit() or len(k) > 9 or not 1 <= int(k) <= classes:
        raise Refused(f"k is {k[:20]!r}; a whole number from 1 to {classes}, the number of classes")
    if logits not in ("true", "false"):
        raise Refused(f"logits is {logits[:20]!r}; true or false")
    return int(k), logits == "true"


def arrays(content_type: str, body: bytes, model: Model, limits: Limits) -> list[NDArray[Any]]:
    """Return the images of a request, each an array that ``model`` takes.

    Args:
        content_type: ``image/jpeg`` or ``image/png``: the body is one picture. ``application/json``: the body is
            ``{"image": base64}``, ``{"images": [base64, ...]}`` or ``{"array": numbers}``, one image or a batch as the
            model takes them.
        body: Of the request.
        model: What the arrays are for.
        limits: What is refused.

    Raises:
        Refused: if the request is not of this form, beyond a limit, or holds no picture.
    """
    kind = content_type.partition(";")[0].strip().lower()
    if not body:
        raise Refused("the body is empty: send a picture or JSON")
    if kind in PICTURE_TYPES:
        return _pictures({"the picture": body}, model, limits)
    if kind != "application/json":
        raise Refused(f"content type {kind[:60]!r}; known: application/json, {', '.join(PICTURE_TYPES)}", 415)
    name, value = _field(body)
    if name == "array":
        return _batch(value, model, limits)
    values = [value] if name == "image" else value
    if not isinstance(values, list) or not values:
        raise Refused("images is no list of base64 pictures")
    _check_count(len(values), limits)
    named = {f"picture {i}": value for i, value in enumerate(values)}
    return _pictures({name: _decoded(value, name, limits) for name, value in named.items()}, model, limits)


def _field(body: bytes) -> tuple[str, Any]:
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):  # UnicodeDecodeError is a ValueError
        raise Refused("the body is not JSON") from None
    if not isinstance(content, dict) or len(content) != 1 or not set(content) <= {"image", "images", "array"}:
        raise Refused('the JSON is an object of one field: "image" (base64), "images" (a list) or "array"')
    return content.popitem()


def _check_count(count: int, limits: Limits) -> None:
    if count > limits.images:
        raise Refused(f"{count} images in one request; at most {limits.images}", 413)


def _decoded(value: Any, name: str, limits: Limits) -> bytes:
    if not isinstance(value, str):
        raise Refused(f"{name} is no base64 text")
    _check_bytes(len(value) * 3 // 4 - 2, name, limits)
    try:
        return base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError):
        raise Refused(f"{name} is not valid base64") from None


def _check_bytes(size: int, name: str, limits: Limits) -> None:
    if size > limits.image_bytes:
        raise Refused(f"{name} has {size} bytes; at most {limits.image_bytes}", 413)


def _pictures(named: Mapping[str, bytes], model: Model, limits: Limits) -> list[NDArray[Any]]:
    prepared, left = [], limits.pixels
    for name, data in named.items():
        _check_bytes(len(data), name, limits)
        if not data.startswith(SIGNATURES):
            raise Refused(f"{name} is neither JPEG nor PNG", 415)
        try:
            picture = open_picture(data, max_pixels=left)
            prepared.append(to_array(picture, model.card))
        except ValueError as error:
            raise Refused(str(error).replace("the picture", name, 1)) from None
        left -= picture.width * picture.height
    return prepared


def _batch(value: Any, model: Model, limits: Limits) -> list[NDArray[Any]]:
    try:
        numbers = np.array(value)
    except (ValueError, OverflowError):  # rows of different lengths
        numbers = np.array(None)
    shape = tuple(model.input_shape)
    if numbers.dtype.kind not in "iuf" or shape not in (numbers.shape, numbers.shape[1:]):
        got = numbers.shape if numbers.dtype.kind in "iuf" else "no regular array of numbers"
        raise Refused(f"array is {got}; numbers of shape {shape}, or a batch of such")
    batch = numbers if numbers.ndim > len(shape) else numbers[None]
    _check_count(len(batch), limits)
    if model.dtype == np.uint8 and (batch.dtype.kind == "f" or batch.min() < 0 or batch.max() > 255):
        raise Refused("array holds something else than whole numbers from 0 to 255")
    if not (np.abs(batch) <= np.finfo(np.float32).max).all():
        raise Refused("array holds values that are not finite in float32")
    return list(batch.astype(model.dtype))
