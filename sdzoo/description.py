"""What a file says of the model in it, checked before anything is built from it: the file may be a stranger's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sdzoo.errors import InputError
from sdzoo.gate import MODES
from sdzoo.images import INTERPOLATIONS

# Arguments of a model that change what it computes, though its weights may keep names and shapes.
ARCHITECTURE = (
    *("shortcut", "widths", "act_layer", "norm_layer", "global_pool", "block_args", "cardinality", "base_width"),
    *("stem_type", "stem_width", "replace_stem_pool", "block_reduce_first", "down_kernel_size", "avg_down"),
    "output_stride",
)
MAX_CLASSES = 100_000
MAX_SIDE = 4096


def check_description(description: Mapping[str, Any]) -> None:
    """Check the values that ``description`` holds, by name; it need not hold all, and may hold others.

    Raises:
        InputError: naming the first value that no model of sdzoo could have written.
    """
    in_chans = description["input_size"][0] if _numbers(3)(description.get("input_size")) else 3
    labels_fit = (None, 0, description.get("num_classes", 10))
    rules: dict[str, Callable[[Any], bool]] = {
        "arch": lambda v: isinstance(v, str),
        "num_classes": lambda v: type(v) is int and 0 <= v <= MAX_CLASSES,
        "input_size": lambda v: _numbers(3)(v) and all(type(n) is int and 1 <= n <= MAX_SIDE for n in v),
        "in_chans": lambda v: type(v) is int and v == in_chans,
        "mean": _numbers(in_chans),
        "std": lambda v: _numbers(in_chans)(v) and all(n > 0 for n in v),
        "interpolation": lambda v: isinstance(v, str) and v in INTERPOLATIONS,
        "crop_pct": lambda v: type(v) in (int, float) and 0 < v <= 1,
        "crop_mode": lambda v: v in ("center", "squash", "border"),
        "mode": lambda v: v in MODES,
        "license": lambda v: isinstance(v, str) and v.isprintable() and len(v) <= 100,
        "labels": lambda v: v is None or (_list(v) and all(isinstance(n, str) for n in v) and len(v) in labels_fit),
        "model_kwargs": lambda v: isinstance(v, dict) and all(k in ARCHITECTURE and _plain(w) for k, w in v.items()),
        "precision": lambda v: v in ("fp32", "fp16", "int8"),
        "preprocess": lambda v: v in ("client", "in-graph"),
        "survival_probs": lambda v: _list(v) and all(type(p) in (int, float) and 0 < p <= 1 for p in v),
    }
    for name, rule in rules.items():
        if name in description and not rule(description[name]):
            raise InputError(f"it describes its model wrongly: {name} is {str(description[name])[:80]!r}")


def _plain(value: object) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and not isinstance(item, dict) and _plain(item) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return all(type(n) is int and _plain(n) for n in value)
    return isinstance(value, (str, bool)) or (type(value) is int and 0 < value <= MAX_SIDE)


def _list(value: object) -> bool:
    return isinstance(value, (list, tuple))


def _numbers(count: int) -> Callable[[Any], bool]:
    return lambda v: _list(v) and len(v) == count and all(type(n) in (int, float) and abs(n) < 1e9 for n in v)
