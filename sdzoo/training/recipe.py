"""Recipes: YAML files whose keys are those of timm's ``train.py``, checked before anything runs."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import sys
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from timm.optim import list_optimizers

from sdzoo.errors import InputError, nearest
from sdzoo.images import INTERPOLATIONS


@dataclass(frozen=True)
class Recipe:
    """How one model is trained. Names and meanings are timm's; a default here is what leaving the key out means."""

    model: str
    epochs: int
    lr: float
    pretrained: bool = False
    num_classes: int | None = None
    drop_path: float | None = None
    drop: float = 0.0
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    device_modules: list[str] = field(default_factory=list)

    dataset: str = ""
    train_split: str = "train"
    val_split: str = "val"
    mean: list[float] | None = None
    std: list[float] | None = None
    interpolation: str = ""
    crop_pct: float | None = None

    batch_size: int = 128
    validation_batch_size: int | None = None
    channels_last: bool = False
    seed: int = 42

    opt: str = "sgd"
    opt_kwargs: dict[str, Any] = field(default_factory=dict)
    momentum: float = 0.9
    weight_decay: float = 2e-5
    clip_grad: float | None = None

    sched: str = "cosine"
    sched_on_updates: bool = False
    warmup_epochs: int = 0
    warmup_lr: float = 1e-5
    min_lr: float = 0.0
    decay_milestones: list[int] = field(default_factory=list)
    decay_rate: float = 0.1

    no_aug: bool = False
    train_crop_mode: str | None = None
    hflip: float = 0.5
    color_jitter: float = 0.0
    smoothing: float = 0.0

    def faults(self) -> list[str]:
        """Return what is wrong with the values, one line each."""
        found = []
        for name in ("epochs", "batch_size", "validation_batch_size", "num_classes", "lr", "crop_pct", "clip_grad"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                found.append(f"{name} is {value}; it must be above 0")
        for name in ("warmup_epochs", "warmup_lr", "min_lr", "weight_decay", "decay_rate"):
            if not 0 <= getattr(self, name) < math.inf:
                found.append(f"{name} is {getattr(self, name)}; it must be at least 0")
        for value in self.std or ():
            if not 0 < value < math.inf:
                found.append(f"std holds {value}; each must be above 0")
        for name in ("drop_path", "drop", "smoothing", "momentum"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                found.append(f"{name} is {value}; it must lie in [0, 1)")
        if not 0 <= self.hflip <= 1:
            found.append(f"hflip is {self.hflip}; it must lie in [0, 1]")
        if self.crop_pct is not None and self.crop_pct > 1:
            found.append(f"crop_pct is {self.crop_pct}; it must lie in (0, 1]")
        if 0 < self.lr < self.min_lr:
            found.append(f"min_lr is {self.min_lr}, above lr {self.lr}")
        if self.warmup_epochs >= self.epochs > 0:
            found.append(f"warmup_epochs is {self.warmup_epochs} of {self.epochs} epochs; it must be fewer")
        if any(milestone < 1 for milestone in self.decay_milestones):
            found.append(f"decay_milestones are {self.decay_milestones}; each must be at least 1")
        if any(not math.isfinite(value) for value in self.mean or ()):
            found.append(f"mean is {self.mean}; each must be finite")
        if other := [module for module in self.device_modules if module != "sdzoo"]:
            found.append(f"device_modules names {', '.join(other)}; implemented here: sdzoo")
        known = [str(name) for name in list_optimizers()]
        if self.opt not in known:
            found.append(f'opt is "{self.opt}", which timm does not have{nearest(self.opt, known)}')
        if self.interpolation and self.interpolation not in INTERPOLATIONS:
            found.append(f'interpolation is "{self.interpolation}"; known: {", ".join(INTERPOLATIONS)}')
        if self.dataset:
            found.append(f'dataset is "{self.dataset}"; implemented here: "" (a folder of class folders)')
        if self.color_jitter:
            found.append(f"color_jitter is {self.color_jitter}; implemented here: 0")
        if not self.no_aug and self.train_crop_mode != "pad4":
            found.append(f'train_crop_mode is "{self.train_crop_mode}"; implemented here: pad4 (or no_aug: true)')
        if self.sched not in ("cosine", "multistep", "constant"):
            found.append(f'sched is "{self.sched}"; implemented here: cosine, multistep, constant')
        return found

    def to_yaml(self) -> str:
        """Return every key with its value, as YAML that loads back to an equal recipe."""
        return yaml.dump(dataclasses.asdict(self), Dumper=_Dumper, sort_keys=False)


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-4 as a number, as YAML 1.2 and everyone else does, and refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        if not isinstance(node, yaml.MappingNode):
            raise yaml.constructor.ConstructorError(None, None, f"expected a mapping, found {node.id}", node.start_mark)
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if twice := {str(key) for key in keys if keys.count(key) > 1}:
            raise yaml.constructor.ConstructorError(None, None, f"given twice: {', '.join(sorted(twice))}")
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes what _Loader would read as a number."""


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
    )


def find_recipe(name: str | Path) -> Path:
    """Return the file of a recipe: a path, or the name of one that ships with sdzoo.

    Raises:
        InputError: listing the names that ship, if there is neither such a file nor such a name.
    """
    path = Path(name)
    if path.is_file():
        return path
    folder = recipes_folder()
    shipped = {file.stem: file for file in sorted(folder.glob("*.yaml"))}
    if str(name) in shipped:
        return shipped[str(name)]
    raise InputError(f'"{name}" is neither a file nor a recipe that ships; those are: {", ".join(shipped)}')


def recipes_folder() -> Path:
    """Return the folder of the recipes that ship: in the wheel ``sdzoo/recipes``, in a checkout ``recipes``."""
    package = Path(__file__).parents[1]
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def load_recipe(path: str | Path) -> Recipe:
    """Return the recipe in a YAML file.

    Raises:
        InputError: with every fault at once: unknown keys (and the nearest known), wrong types, values out of range.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not YAML: {error}") from None
    try:
        values = yaml.load(text, _Loader)
    except Exception as error:  # PyYAML lets the errors of int(), datetime() and its own slips through
        raise InputError(f"{path} is not YAML: {' '.join(str(error).split()) or type(error).__name__}") from None
    if not isinstance(values, dict) or not values:
        got = "empty" if values is None or values == {} else f"a {type(values).__name__}"
        raise InputError(f"{path} is {got}; a recipe is a mapping of keys to values")
    types_of_keys = typing.get_type_hints(Recipe)
    faults, taken = [], {}
    for key, value in values.items():
        if key not in types_of_keys:
            close = difflib.get_close_matches(str(key), types_of_keys, n=1)
            faults.append(f"{key}: unknown key" + (f"; nearest: {close[0]}" if close else ""))
        else:
            try:
                taken[key] = _typed(value, types_of_keys[key])
            except (TypeError, OverflowError):
                wanted = getattr(types_of_keys[key], "__name__", str(types_of_keys[key])).replace("typing.", "")
                faults.append(f"{key}: {value!r} is not {wanted}")
    required = [f.name for f in dataclasses.fields(Recipe) if _required(f)]
    faults += [f"{key}: missing" for key in required if key not in values]
    # What is missing or mistyped is said already; the other values are checked all the same.
    faults += Recipe(**{"model": "", "epochs": sys.maxsize, "lr": 1e9} | taken).faults()
    if faults:
        raise InputError(f"{path}: " + "; ".join(faults))
    return Recipe(**taken)


def _required(f: dataclasses.Field[Any]) -> bool:
    return f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING


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
