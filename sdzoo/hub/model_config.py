"""What a ``config.json`` of timm's says of the model beside it, checked as a stranger's before anything else is read.

The survival settings in it are not used: the weights hold the probabilities.
"""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

from timm.models import PretrainedCfg

from sdzoo.builder import SURVIVAL_SETTINGS
from sdzoo.description import ARCHITECTURE, check_description
from sdzoo.errors import InputError
from sdzoo.hub.layout import CONFIG
from sdzoo.registry import check_name

MAX_CONFIG_BYTES = 16_000_000  # the names of 100,000 classes take some

KEYS = {
    *("architecture", "num_classes", "num_features", "global_pool"),
    *("label_names", "label_descriptions", "model_args", "pretrained_cfg"),
}
SOURCES = {"url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source", "architecture", "label_offset"}
CFG_KEYS = {field.name for field in dataclasses.fields(PretrainedCfg)} - SOURCES
OF_CFG = ("input_size", "mean", "std", "interpolation", "crop_pct", "license")
MODEL_ARGS = {*ARCHITECTURE, *SURVIVAL_SETTINGS, "mode", "drop_rate", "num_classes", "in_chans"}


def read_model_config(content: bytes) -> dict[str, Any]:
    """Return the description (:func:`sdzoo.training.checkpoint.describe`) of the model that ``config.json`` is of.

    Args:
        content: Of the file.

    Raises:
        InputError: if it is too large, no JSON, holds what is not known, is not of a model of sdzoo, has over 100,000
            classes, contradicts itself, or a value is of another type than timm writes.
    """
    try:
        return _described(_parsed(content))
    except InputError as error:
        raise InputError(f"{CONFIG}: {error}") from None


def _parsed(content: bytes) -> dict[str, Any]:
    if len(content) > MAX_CONFIG_BYTES:
        raise InputError(f"it has {len(content):,} bytes; at most {MAX_CONFIG_BYTES:,}")
    try:
        config = json.loads(content.decode(), parse_constant=_no_constant, object_pairs_hook=_each_once)
    except (ValueError, RecursionError) as error:  # bytes that are no UTF-8 raise a ValueError too
        raise InputError(f"it is not JSON: {str(error)[:100]}") from None
    if not isinstance(config, dict):
        raise InputError("it holds no mapping")
    return config


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        raise ValueError("a key stands in it twice")
    return mapping


def _described(config: dict[str, Any]) -> dict[str, Any]:
    cfg, arguments = (_mapping(config.get(name, {}), name) for name in ("pretrained_cfg", "model_args"))
    _check_keys(config, KEYS, "")
    _check_keys(cfg, CFG_KEYS, "pretrained_cfg.")
    _check_keys(arguments, MODEL_ARGS, "model_args.")
    described = config.pop("label_descriptions", None) or cfg.pop("label_descriptions", None) or {}
    _check_plain(_mapping(described, "label_descriptions"), "label_descriptions.")
    arch = config.get("architecture")
    if not isinstance(arch, str) or not re.fullmatch(r"\w+", arch, re.ASCII):
        raise InputError(f"architecture is {_shown(arch)}, not the name of a model")
    check_name(arch)
    labels = config.get("label_names") or cfg.get("label_names")
    if labels and not (isinstance(labels, list) and all(map(_is_name, labels))):
        raise InputError(f"label_names is {_shown(labels)}, not a list of names")
    _check_plain({name: value for name, value in config.items() if name not in ("pretrained_cfg", "model_args")}, "")
    _check_plain(cfg, "pretrained_cfg.")
    if cfg.get("custom_load"):
        raise InputError("pretrained_cfg.custom_load is set; only safetensors files of sdzoo's models are loaded")
    if cfg.get("crop_mode", "center") != "center":
        raise InputError(f"pretrained_cfg.crop_mode is {_shown(cfg['crop_mode'])}; sdzoo's models know center")
    size = cfg.get("input_size")
    description = {
        "arch": arch,
        "num_classes": _agreed("num_classes", config, cfg, arguments),
        "in_chans": _agreed("in_chans", {"in_chans": size[0] if isinstance(size, list) and size else 3}, arguments),
        "model_kwargs": {name: value for name, value in arguments.items() if name in ARCHITECTURE},
        **{name: cfg[name] for name in OF_CFG if cfg.get(name) is not None},
        **({"mode": arguments["mode"]} if "mode" in arguments else {}),
        **({"labels": labels} if labels else {}),
    }
    check_description(description)
    return description


def _mapping(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{name} is {_shown(value)}, not a mapping")
    return value


def _check_keys(mapping: dict[str, Any], known: set[str], prefix: str) -> None:
    if unknown := sorted(mapping.keys() - known):
        raise InputError(f"{prefix}{unknown[0][:80]!r} is not known; known: {', '.join(sorted(known))}")


def _check_plain(mapping: dict[str, Any], prefix: str) -> None:
    for name, value in mapping.items():
        parts = value if isinstance(value, list) else [value]
        if not all(part is None or isinstance(part, (str, bool, int, float)) for part in parts):
            raise InputError(f"{prefix}{name} is {_shown(value)}, not a plain value or a list of them")


def _agreed(name: str, *places: dict[str, Any]) -> Any:
    said = [place[name] for place in places if name in place]
    if not said or any(value != said[0] for value in said):
        raise InputError(f"{name} is {' and '.join(map(_shown, said)) or 'not said'}")
    return said[0]


def _is_name(value: object) -> bool:
    return isinstance(value, str) and value.isprintable()  # it will be printed to a terminal


def _shown(value: object) -> str:
    return repr(str(value)[:80])
