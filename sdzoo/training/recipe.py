"""Recipes: how one model is trained, in the keys of timm's ``train.py``, checked before anything runs."""

from __future__ import annotations

import dataclasses
import sys
import types
import typing
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from sdzoo.errors import InputError, nearest
from sdzoo.training.recipe_faults import faults_about
from sdzoo.training.recipe_yaml import dump_yaml
from sdzoo.training.timm_keys import TIMM_KEYS


@dataclass(frozen=True)
class SdzooSettings:
    """What timm's ``train.py`` has no key for: it would ignore these, so they stand apart, under ``sdzoo:``."""

    held_out: int = 0  # images of train_split kept for validation, chosen by seed; val_split then equals train_split
    test_split: str = ""  # measured once, at the end, with the weights that did best on validation
    survival_warmup_epochs: float = 0.0  # over which the survival probabilities fall from 1 to the model's
    trainable: str = "all"  # or "head": the classifier alone, the backbone as in evaluation


@dataclass(frozen=True)
class Recipe:
    """How one model is trained. Names, meanings and defaults are timm's; model, epochs and lr must be given."""

    model: str
    epochs: int
    lr: float
    pretrained: bool = False
    initial_checkpoint: str = ""
    num_classes: int | None = None
    input_size: list[int] | None = None
    drop: float = 0.0
    drop_path: float | None = None  # 1 - p_L
    drop_block: float | None = None
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    head_init_scale: float | None = None
    head_init_bias: float | None = None
    grad_checkpointing: bool = False
    device_modules: list[str] | None = None

    data_dir: str | None = None
    dataset: str = ""
    train_split: str = "train"
    val_split: str = "validation"
    train_num_samples: int | None = None
    val_num_samples: int | None = None
    dataset_download: bool = False
    mean: list[float] | None = None
    std: list[float] | None = None
    interpolation: str = ""
    crop_pct: float | None = None

    batch_size: int = 128
    validation_batch_size: int | None = None
    grad_accum_steps: int = 1
    workers: int = 4
    pin_mem: bool = False
    seed: int = 42
    channels_last: bool = False
    torchcompile: str | None = None
    amp: bool = False
    amp_dtype: str = "float16"
    sync_bn: bool = False
    dist_bn: str = "reduce"

    opt: str = "sgd"
    opt_eps: float | None = None
    opt_betas: list[float] | None = None
    momentum: float = 0.9
    weight_decay: float = 2e-5
    clip_grad: float | None = None
    clip_mode: str = "norm"
    layer_decay: float | None = None
    layer_decay_min_scale: float = 0.0
    layer_decay_no_opt_scale: float | None = None
    opt_kwargs: dict[str, Any] = field(default_factory=dict)

    sched: str = "cosine"
    sched_on_updates: bool = False
    warmup_lr: float = 1e-5
    min_lr: float = 0.0
    decay_milestones: list[int] = field(default_factory=lambda: [90, 180, 270])
    decay_epochs: float = 90.0
    decay_rate: float = 0.1
    warmup_epochs: int = 5
    warmup_prefix: bool = False
    cooldown_epochs: int = 0

    no_aug: bool = False
    train_crop_mode: str | None = None  # pad4: shifted by up to 4 pixels, the only value that timm has not
    scale: list[float] = field(default_factory=lambda: [0.08, 1.0])
    ratio: list[float] = field(default_factory=lambda: [3 / 4, 4 / 3])
    hflip: float = 0.5
    vflip: float = 0.0
    color_jitter: float = 0.4
    color_jitter_prob: float | None = None
    grayscale_prob: float | None = None
    gaussian_blur_prob: float | None = None
    aa: str | None = None
    train_interpolation: str = "random"
    reprob: float = 0.0
    remode: str = "pixel"
    recount: int = 1
    mixup: float = 0.0
    cutmix: float = 0.0
    cutmix_minmax: list[float] | None = None
    mixup_prob: float = 1.0
    mixup_switch_prob: float = 0.5
    mixup_mode: str = "batch"
    mixup_off_epoch: int = 0

    smoothing: float = 0.1
    bce_loss: bool = False
    bce_sum: bool = False
    bce_target_thresh: float | None = None
    bce_pos_weight: float | None = None
    model_ema: bool = False
    model_ema_decay: float = 0.9998
    model_ema_warmup: bool = False

    sdzoo: SdzooSettings = field(default_factory=SdzooSettings)

    @property
    def mixes(self) -> bool:
        """True if the images of a batch are mixed with each other."""
        return self.mixup > 0 or self.cutmix > 0 or self.cutmix_minmax is not None

    def faults(self, unknown: Collection[str] = ()) -> list[str]:
        """Return what is wrong with the values, one line each; nothing that hangs on a key in ``unknown``."""
        return [text for keys, text in faults_about(self) if not set(keys) & set(unknown)]

    def to_yaml(self) -> str:
        """Return every key with its value, as YAML that loads back to an equal recipe."""
        return dump_yaml(dataclasses.asdict(self))


def recipe_from(values: Mapping[Any, Any]) -> Recipe:
    """Return the recipe that ``values``, keys and what they are set to, describe.

    Raises:
        InputError: with every fault at once: keys unknown or not implemented, wrong types, values out of range.
    """
    faults: list[str] = []
    given = dict(values)
    settings = given.pop("sdzoo", {})
    if not isinstance(settings, dict):
        faults.append(f"sdzoo: {settings!r} is not a mapping")
        settings = {}
    own = _take(SdzooSettings, settings, faults, "sdzoo.")
    taken = _take(Recipe, given, faults)
    required = [f.name for f in dataclasses.fields(Recipe) if f.default is f.default_factory is dataclasses.MISSING]
    faults += [f"{key}: missing" for key in required if key not in values]
    # What is missing or mistyped is said already; the other values are checked all the same.
    unknown = {*required, *given} - taken.keys() | {f"sdzoo.{key}" for key in settings if key not in own}
    checked = Recipe(**{"model": "", "epochs": sys.maxsize, "lr": 1.0} | taken, sdzoo=SdzooSettings(**own))
    faults += checked.faults(unknown)
    if faults:
        raise InputError("; ".join(faults))
    return checked


def _take(kind: type, values: Mapping[Any, Any], faults: list[str], prefix: str = "") -> dict[str, Any]:
    """Return those of ``values`` that are of the types that ``kind`` wants; say of the others why not."""
    wanted, taken = typing.get_type_hints(kind), {}
    for key, value in values.items():
        if key not in wanted:
            faults.append(f"{prefix}{key}: {_why_unknown(str(key), wanted, prefix)}")
            continue
        try:
            taken[key] = _typed(value, wanted[key])
        except (TypeError, OverflowError):
            name = wanted[key].__name__ if isinstance(wanted[key], type) else str(wanted[key]).replace("typing.", "")
            faults.append(f"{prefix}{key}: {value!r} is not {name}")
    return taken


def _why_unknown(key: str, known: Mapping[str, Any], prefix: str) -> str:
    if prefix:
        return "unknown key" + nearest(key, known)
    if key in TIMM_KEYS:
        return "timm's key, not implemented here"
    if key in typing.get_type_hints(SdzooSettings):
        return "unknown key; it stands under sdzoo:"
    return "unknown key" + nearest(key, [*TIMM_KEYS, "sdzoo"])


def _typed(value: Any, wanted: Any) -> Any:
    """Return ``value`` if it is of the annotated type (an int where a float is wanted becomes one), else TypeError."""
    if isinstance(wanted, types.UnionType):
        options = typing.get_args(wanted)
        if value is None and type(None) in options:
            return None
        return _typed(value, next(option for option in options if option is not type(None)))
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    if origin is list and isinstance(value, list):
        return [_typed(item, arguments[0]) for item in value]
    if origin is dict and isinstance(value, dict):
        return value
    if wanted is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if isinstance(wanted, type) and type(value) is wanted:
        return value
    raise TypeError
