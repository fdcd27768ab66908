"""What can be wrong with the values of a recipe, each by itself and with the others."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from timm.data.auto_augment import augment_and_mix_transform, auto_augment_transform, rand_augment_transform
from timm.optim import get_optimizer_info, list_optimizers

from sdzoo.description import ARCHITECTURE
from sdzoo.errors import InputError, nearest
from sdzoo.gate import MODES
from sdzoo.images import INTERPOLATIONS
from sdzoo.registry import check_name
from sdzoo.schedule import SCHEDULES, is_probability
from sdzoo.training.data.names import IN_TWO, in_shards, is_known, known_datasets, same_split
from sdzoo.training.timm_keys import TIMM_KEYS

if TYPE_CHECKING:
    from sdzoo.training.recipe import Recipe

Faults = Iterator[tuple[tuple[str, ...], str]]  # the keys that each is about, and what is wrong

_BOUNDS: dict[str, tuple[str, ...]] = {
    "above 0": (
        *("epochs", "batch_size", "validation_batch_size", "grad_accum_steps", "num_classes", "input_size", "lr"),
        *("train_num_samples", "val_num_samples", "std", "clip_grad", "opt_eps", "decay_epochs", "decay_milestones"),
        *("scale", "ratio", "recount", "head_init_scale", "bce_pos_weight"),
    ),
    "at least 0": (
        *("workers", "weight_decay", "warmup_epochs", "warmup_lr", "min_lr", "decay_rate", "cooldown_epochs"),
        *("color_jitter", "mixup", "cutmix", "mixup_off_epoch", "seed", "sdzoo.held_out"),
        "sdzoo.survival_warmup_epochs",
    ),
    "in [0, 1)": ("drop", "drop_path", "drop_block", "momentum", "opt_betas", "smoothing", "bce_target_thresh"),
    "in [0, 1]": (
        *("hflip", "vflip", "color_jitter_prob", "grayscale_prob", "gaussian_blur_prob", "reprob", "cutmix_minmax"),
        *("mixup_prob", "mixup_switch_prob", "layer_decay_min_scale", "layer_decay_no_opt_scale", "model_ema_decay"),
    ),
    "in (0, 1]": ("crop_pct", "layer_decay"),
    "a finite number": ("mean", "head_init_bias"),
}
_WITHIN: dict[str, Callable[[float], bool]] = {
    "above 0": lambda value: 0 < value < math.inf,
    "at least 0": lambda value: 0 <= value < math.inf,
    "in [0, 1)": lambda value: 0 <= value < 1,
    "in [0, 1]": lambda value: 0 <= value <= 1,
    "in (0, 1]": lambda value: 0 < value <= 1,
    "a finite number": math.isfinite,
}
_CHOICES: dict[str, tuple[str | None, ...]] = {
    "interpolation": ("", *INTERPOLATIONS),
    "train_interpolation": ("", "random", *INTERPOLATIONS),
    "torchcompile": (None, "inductor", "aot_eager", "eager"),
    "amp_dtype": ("float16", "bfloat16"),
    "dist_bn": ("reduce", "broadcast", ""),
    "clip_mode": ("norm", "value", "agc"),
    "sched": ("cosine", "multistep", "step", "poly", "tanh", "constant"),
    "train_crop_mode": (None, "pad4", "rrc", "rkrc", "rkrr"),
    "remode": ("pixel", "rand", "const"),
    "mixup_mode": ("batch",),
    "sdzoo.trainable": ("all", "head"),
}
# What model_kwargs may hold: the architecture, which checkpoints keep, and these.
MODEL_KWARGS = (
    *ARCHITECTURE,
    *("drop_block_rate", "in_chans", "mode", "pretrained_cfg", "schedule", "survival_probs", "zero_init_last"),
)
_OWN_KEYS = {"num_classes": "num_classes", "drop_rate": "drop", "drop_path_rate": "drop_path"}
# Not among them: those that timm's defaults set, which a recipe that does not augment need not undo.
_AUGMENTATION = (
    *("train_crop_mode", "aa", "reprob", "vflip"),
    *("color_jitter_prob", "grayscale_prob", "gaussian_blur_prob"),
)
_LENGTHS = {"input_size": 3, "scale": 2, "ratio": 2, "cutmix_minmax": 2}


def faults_about(recipe: Recipe) -> Faults:
    """Yield each fault of ``recipe`` with the keys that it is about; those under ``sdzoo:`` as ``sdzoo.key``."""
    for rule in (_bounds, _choices, _lists, _model, _data, _optimizer, _schedule, _augmentation, _loss):
        yield from rule(recipe)


def _value(recipe: Recipe, key: str) -> Any:
    return getattr(recipe.sdzoo, key.removeprefix("sdzoo.")) if key.startswith("sdzoo.") else getattr(recipe, key)


def _bounds(recipe: Recipe) -> Faults:
    for bound, keys in _BOUNDS.items():
        for key in keys:
            value = _value(recipe, key)
            numbers = value if isinstance(value, list) else [] if value is None else [value]
            if not all(_WITHIN[bound](number) for number in numbers):
                yield (key,), f"{key} is {value}; {'each' if isinstance(value, list) else 'it'} must be {bound}"


def _choices(recipe: Recipe) -> Faults:
    for key, allowed in _CHOICES.items():
        value = _value(recipe, key)
        if value not in allowed:
            known = ", ".join('""' if name == "" else name for name in allowed if name is not None)
            yield (key,), f'{key} is "{value}"; implemented here: {known}'


def _lists(recipe: Recipe) -> Faults:
    for key, length in _LENGTHS.items():
        value = _value(recipe, key)
        if value is not None and len(value) != length:
            yield (key,), f"{key} is {value}; it must hold {length} numbers"
        elif key != "input_size" and value is not None and value[0] > value[1]:
            yield (key,), f"{key} is {value}; the smaller comes first"
    if recipe.decay_milestones != sorted(set(recipe.decay_milestones)):
        yield (
            ("decay_milestones",),
            f"decay_milestones are {recipe.decay_milestones}; each must be above the one before",
        )


def _model(recipe: Recipe) -> Faults:
    if recipe.model:
        try:
            check_name(recipe.model)
        except InputError as error:
            yield ("model",), str(error)
    for key in sorted(map(str, recipe.model_kwargs.keys() - MODEL_KWARGS)):
        has_its_own = f"; give it as {_OWN_KEYS[key]}" if key in _OWN_KEYS else nearest(key, MODEL_KWARGS)
        yield ("model_kwargs",), f"model_kwargs.{key}: unknown key{has_its_own}"
    for text in _survival_settings(recipe.model_kwargs):
        yield ("model_kwargs",), text
    for own, key in (("input_size", "in_chans"), ("drop_block", "drop_block_rate")):
        if _value(recipe, own) is not None and key in recipe.model_kwargs:
            yield (own, "model_kwargs"), f"model_kwargs.{key} is given, and {own} too; give it once, as {own}"
    if recipe.initial_checkpoint and not recipe.pretrained and not Path(recipe.initial_checkpoint).is_file():
        yield ("initial_checkpoint",), f"initial_checkpoint {recipe.initial_checkpoint} does not exist"
    if other := [module for module in recipe.device_modules or () if module != "sdzoo"]:
        yield ("device_modules",), f"device_modules names {', '.join(other)}; implemented here: sdzoo"
    if recipe.pretrained and recipe.initial_checkpoint:
        yield ("pretrained", "initial_checkpoint"), "pretrained and initial_checkpoint each name weights; give one"
    if recipe.epochs < recipe.sdzoo.survival_warmup_epochs < math.inf:
        wanted = recipe.sdzoo.survival_warmup_epochs
        text = f"sdzoo.survival_warmup_epochs is {wanted} of {recipe.epochs} epochs; it must not be more"
        yield ("epochs", "sdzoo.survival_warmup_epochs"), text


def _survival_settings(model_kwargs: Mapping[str, Any]) -> Iterator[str]:
    """Say what no model takes; whether there is a probability for each of its blocks, the model will say."""
    schedule, mode = model_kwargs.get("schedule"), model_kwargs.get("mode", MODES[0])
    if isinstance(schedule, str) and schedule not in SCHEDULES:
        known = f"{', '.join(SCHEDULES)}{nearest(schedule, SCHEDULES)}"
        yield f'model_kwargs.schedule is "{schedule}"; known: {known}'
    elif schedule is not None and not isinstance(schedule, (str, list)):
        yield f"model_kwargs.schedule is {schedule!r}; it must be a name or a list of numbers"
    for key, probs in (("schedule", schedule), ("survival_probs", model_kwargs.get("survival_probs"))):
        if isinstance(probs, list):
            wrong = [index for index, prob in enumerate(probs) if not is_probability(prob)]
            if wrong:
                more = f" ({len(wrong)} are wrong)" if len(wrong) > 1 else ""
                yield f"model_kwargs.{key}[{wrong[0]}] is {probs[wrong[0]]!r}; each must lie in (0, 1]{more}"
        elif key == "survival_probs" and probs is not None:
            yield f"model_kwargs.survival_probs is {probs!r}; it must be a list of numbers"
    if mode not in MODES:
        yield f"model_kwargs.mode is {mode!r}; it must be {' or '.join(MODES)}"


def _data(recipe: Recipe) -> Faults:
    dataset, train, val = recipe.dataset, recipe.train_split, recipe.val_split
    held_out, test = recipe.sdzoo.held_out, recipe.sdzoo.test_split
    shards, in_two = in_shards(dataset), dataset in IN_TWO
    about = ("dataset", "train_split", "val_split", "sdzoo.held_out", "sdzoo.test_split")
    if not is_known(dataset):
        yield ("dataset",), f'dataset is "{dataset}"; implemented here: {known_datasets()}'
    if not shards and (other := sorted(name for name in {train, val, test} if name and PurePath(name).name != name)):
        yield about, f"splits are names, not paths: {', '.join(other)}"
    elif in_two and train != "train":
        yield about, f'train_split is "{train}"; {dataset} has train and test'
    elif not val:
        yield about, "val_split is empty; the weights to keep are chosen by it"
    elif _names_a_test_set(val) or (in_two and val != train):
        instead = "" if shards else "; hold images out of training: val_split as train_split, sdzoo.held_out above 0"
        yield about, f'val_split is "{val}", the test set, which is never used for selection{instead}'
    elif same_split(val, train) and not held_out:
        yield about, f'val_split is "{val}", which is trained on; name another, or set sdzoo.held_out'
    elif val != train and held_out > 0:
        yield about, f'sdzoo.held_out is {held_out} of "{train}", but val_split is "{val}"; it must be "{train}" too'
    if shards and held_out > 0:
        yield about, f"sdzoo.held_out is {held_out}; {dataset} cannot be split by image"
    if in_two and test not in ("", "test"):
        yield about, f'sdzoo.test_split is "{test}"; {dataset} has train and test'
    elif test and (same_split(test, train) or same_split(test, val)):
        yield about, f'sdzoo.test_split is "{test}", which is trained on or chosen by'
    for key in ("train_num_samples", "val_num_samples"):
        if _value(recipe, key) is not None and not shards:
            yield ("dataset", key), f"{key} is for shards (dataset: wds/...), which do not say how many they hold"
    if recipe.dataset_download and not in_two:
        yield ("dataset", "dataset_download"), f"dataset_download is for {', '.join(IN_TWO)}"


def _names_a_test_set(split: str) -> bool:
    return re.search(r"(?<![a-z])test", split.lower()) is not None


def _optimizer(recipe: Recipe) -> Faults:
    name = recipe.opt.lower().removeprefix("lookahead_")
    known = [str(each) for each in list_optimizers()]
    if name not in known:
        yield ("opt",), f'opt is "{recipe.opt}", which timm does not have{nearest(name, known)}'
        return
    if twice := sorted(recipe.opt_kwargs.keys() & {"lr", "weight_decay", "momentum", "layer_decay", "opt"}):
        yield ("opt_kwargs",), f"opt_kwargs holds {', '.join(twice)}, which has a key of its own"
    info = get_optimizer_info(name)
    package = info.opt_class.partition(".")[0] if isinstance(info.opt_class, str) else ""
    if info.second_order:
        yield ("opt",), f'opt is "{recipe.opt}", which needs second-order gradients; not implemented here'
    elif name.startswith("kron"):
        yield ("opt",), f'opt is "{recipe.opt}", which draws and compiles on its own; not implemented here'
    elif package in ("apex", "bitsandbytes"):
        yield ("opt",), f'opt is "{recipe.opt}", which needs {package}; not implemented here'


def _schedule(recipe: Recipe) -> Faults:
    if 0 < recipe.lr < recipe.min_lr:
        yield ("lr", "min_lr"), f"min_lr is {recipe.min_lr}, above lr {recipe.lr}"
    if recipe.warmup_epochs >= recipe.epochs > 0:
        text = f"warmup_epochs is {recipe.warmup_epochs} of {recipe.epochs} epochs; it must be fewer"
        yield ("epochs", "warmup_epochs"), text


def _augmentation(recipe: Recipe) -> Faults:
    if recipe.aa:
        kinds = {"rand": rand_augment_transform, "augmix": augment_and_mix_transform}
        create = next((kinds[kind] for kind in kinds if recipe.aa.startswith(kind)), auto_augment_transform)
        try:
            create(recipe.aa, {"translate_const": 1, "img_mean": (0, 0, 0)})
        except Exception as error:  # timm asserts, looks up and converts what it finds between the dashes
            reason = " ".join(str(error).split()) or type(error).__name__
            yield ("aa",), f'aa is "{recipe.aa}", which timm cannot read: {reason}'
    if recipe.no_aug:
        for key in _AUGMENTATION:
            if _value(recipe, key) != TIMM_KEYS[key]:
                yield ("no_aug", key), f"{key} is set, but so is no_aug: it would never act"
    if recipe.mixes and recipe.batch_size % 2:
        yield ("batch_size", "mixup", "cutmix"), f"batch_size is {recipe.batch_size}; mixup and cutmix need an even one"


def _loss(recipe: Recipe) -> Faults:
    if recipe.bce_loss and not recipe.mixes and recipe.smoothing == 0:
        text = "bce_loss is set without mixup, cutmix or smoothing: timm would take the cross entropy; set one of them"
        yield ("bce_loss", "mixup", "cutmix", "cutmix_minmax", "smoothing"), text
    if not recipe.bce_loss:
        for key in ("bce_sum", "bce_target_thresh", "bce_pos_weight"):
            if _value(recipe, key) != TIMM_KEYS[key]:
                yield ("bce_loss", key), f"{key} is set without bce_loss"
