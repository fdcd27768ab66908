"""What a recipe may hold, and what is said of what it may not."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from timm.data import create_transform
from timm.optim import list_optimizers

from sdzoo.errors import InputError
from sdzoo.training.recipe import Recipe, SdzooSettings, recipe_from
from sdzoo.training.timm_keys import TIMM_KEYS

MINIMAL = {"model": "sd_resnet20", "epochs": 3, "lr": 0.1, "warmup_epochs": 0}


def refused(**values: Any) -> str:
    """Return the error that ``MINIMAL`` with ``values`` gives; one line."""
    with pytest.raises(InputError) as caught:
        recipe_from(MINIMAL | values)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_timms_keys() -> None:
    assert len(TIMM_KEYS) == 173
    # a few, as train.py has them
    wanted = {"sched": "cosine", "warmup_epochs": 5, "smoothing": 0.1, "color_jitter": 0.4, "val_split": "validation"}
    assert {key: TIMM_KEYS[key] for key in wanted} == wanted
    assert TIMM_KEYS["decay_milestones"] == [90, 180, 270]


@pytest.mark.parametrize("field", dataclasses.fields(Recipe), ids=lambda field: field.name)
def test_every_key_is_timms_with_its_default(field: dataclasses.Field[Any]) -> None:
    """A recipe means the same under timm's train.py, in what it says and in what it leaves out."""
    if field.name in ("model", "epochs", "lr"):
        assert field.default is field.default_factory is dataclasses.MISSING
    elif field.name != "sdzoo":
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        assert default == TIMM_KEYS[field.name]
        assert type(default) in (type(TIMM_KEYS[field.name]), float)  # timm writes some of its floats as 0


def test_sdzoos_own_settings_are_none_of_timms() -> None:
    assert not {field.name for field in dataclasses.fields(SdzooSettings)} & TIMM_KEYS.keys()
    assert "sdzoo" not in TIMM_KEYS


def test_settings_of_sdzoo() -> None:
    settings = {"held_out": 5000, "test_split": "test", "survival_warmup_epochs": 2, "trainable": "head"}
    recipe = recipe_from(MINIMAL | {"val_split": "train", "sdzoo": settings})
    assert recipe.sdzoo == SdzooSettings(5000, "test", 2.0, "head")
    assert recipe_from(MINIMAL).sdzoo == SdzooSettings(0, "", 0.0, "all")


IMPLEMENTED = {field.name for field in dataclasses.fields(Recipe)}


@pytest.mark.parametrize("key", sorted(TIMM_KEYS.keys() - IMPLEMENTED))
def test_timms_other_keys_are_refused_as_such(key: str) -> None:
    assert refused(**{key: TIMM_KEYS[key]}) == f"{key}: timm's key, not implemented here"


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("batchsize", "batch_size"),
        ("weight-decay", "weight_decay"),
        ("label_smoothing", "smoothing"),
        ("log_wanb", "log_wandb"),
        ("sd_zoo", "sdzoo"),
    ],
)
def test_unknown_key(key: str, nearest: str) -> None:
    assert refused(**{key: 1}) == f"{key}: unknown key; nearest: {nearest}"


def test_unknown_keys_that_are_near_to_nothing_or_stand_elsewhere() -> None:
    assert refused(zzzzzz=1) == "zzzzzz: unknown key"
    assert refused(held_out=1) == "held_out: unknown key; it stands under sdzoo:"
    assert refused(sdzoo={"heldout": 1}) == "sdzoo.heldout: unknown key; nearest: held_out"


@pytest.mark.parametrize("value", [3, None, [1], "held_out"])
def test_settings_of_sdzoo_are_a_mapping(value: Any) -> None:
    assert refused(sdzoo=value) == f"sdzoo: {value!r} is not a mapping"


def test_every_fault_is_said_once() -> None:
    message = refused(
        model=5,
        batch_size=1.5,
        train_crop_mode=5,
        hflip=1.5,
        smoothing=-0.1,
        zzzzzz=1,
        log_wandb=True,
        opt="adamw2",
        sdzoo={"held_out": "many", "trainable": "tail", "x": 1},
    )
    faults = (
        "model: 5 is not str",
        "batch_size: 1.5 is not int",
        "train_crop_mode: 5 is not str | None",
        "hflip is 1.5; it must be in [0, 1]",
        "smoothing is -0.1; it must be in [0, 1)",
        "zzzzzz: unknown key",
        "log_wandb: timm's key, not implemented here",
        'opt is "adamw2", which timm does not have; nearest: adamw',
        "sdzoo.held_out: 'many' is not int",
        'sdzoo.trainable is "tail"; implemented here: all, head',
        "sdzoo.x: unknown key",
    )
    assert sorted(message.split("; ")) == sorted("; ".join(faults).split("; "))


@pytest.mark.parametrize("missing", ["model", "epochs", "lr"])
def test_required_key(missing: str) -> None:
    values = {key: value for key, value in MINIMAL.items() if key != missing}
    with pytest.raises(InputError, match=f"^{missing}: missing$"):
        recipe_from(values)


def test_what_hangs_on_a_mistyped_value_is_not_judged() -> None:
    message = refused(lr="fast", min_lr=5.0, epochs=1.5, warmup_epochs=9)
    assert message == "epochs: 1.5 is not int; lr: 'fast' is not float"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_classes", "ten"),
        ("num_classes", 10.0),
        ("num_classes", True),
        ("drop_path", "yes"),
        ("drop_path", True),
        ("pretrained", 1),
        ("pretrained", "true"),
        ("batch_size", [128]),
        ("seed", 1e3),
        ("seed", None),
        ("mean", 0.5),
        ("mean", [0.5, "half", 0.5]),
        ("model_kwargs", [1]),
        ("device_modules", "sdzoo"),
        ("decay_milestones", [1.5]),
        ("interpolation", 3),
        ("weight_decay", {}),
        ("weight_decay", 10**400),
        ("clip_grad", "none"),
        ("scale", 0.5),
        ("input_size", [3, 32.0, 32]),
        ("aa", True),
        ("amp", "bfloat16"),
    ],
)
def test_wrong_type(key: str, value: Any) -> None:
    assert refused(**{key: value}).startswith(f"{key}: {value!r} is not ")


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("epochs", 0),
        ("batch_size", -1),
        ("grad_accum_steps", 0),
        ("lr", 0.0),
        ("lr", NAN),
        ("lr", INF),
        ("drop_path", 1.0),
        ("drop_path", NAN),
        ("momentum", -1.0),
        ("opt_betas", [0.9, 1.0]),
        ("weight_decay", NAN),
        ("validation_batch_size", 0),
        ("num_classes", -1),
        ("input_size", [3, 0, 32]),
        ("warmup_epochs", -1),
        ("decay_epochs", 0.0),
        ("decay_milestones", [0, 2]),
        ("crop_pct", 0.0),
        ("crop_pct", 1.5),
        ("std", [0.2, 0.0, 0.2]),
        ("mean", [0.2, INF, 0.2]),
        ("layer_decay", 0.0),
        ("workers", -1),
        ("seed", -1),
        ("scale", [0.0, 1.0]),
        ("reprob", 1.5),
        ("recount", 0),
        ("mixup", -0.2),
        ("cutmix_minmax", [0.2, 1.2]),
        ("mixup_prob", 2.0),
        ("model_ema_decay", 1.1),
        ("bce_target_thresh", 1.0),
    ],
)
def test_value_out_of_range(key: str, value: Any) -> None:
    assert f"{key} is {value}; " in refused(**{key: value})


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("sched", "onecycle", "cosine, multistep, step, poly, tanh, constant"),
        ("sched", "plateau", "cosine, multistep, step, poly, tanh, constant"),
        ("train_crop_mode", "pad8", "pad4, rrc, rkrc, rkrr"),
        ("clip_mode", "max", "norm, value, agc"),
        ("remode", "noise", "pixel, rand, const"),
        ("mixup_mode", "elem", "batch"),
        ("amp_dtype", "float8", "float16, bfloat16"),
        ("dist_bn", "sum", 'reduce, broadcast, ""'),
        ("torchcompile", "tensorrt", "inductor, aot_eager, eager"),
        ("interpolation", "random", '"", nearest, bilinear, bicubic, box, hamming, lanczos'),
        ("train_interpolation", "cubic", '"", random, nearest, bilinear, bicubic, box, hamming, lanczos'),
    ],
)
def test_one_of_a_few(key: str, value: str, allowed: str) -> None:
    assert refused(**{key: value}) == f'{key} is "{value}"; implemented here: {allowed}'


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        ({"scale": [1.0]}, "scale is [1.0]; it must hold 2 numbers"),
        ({"ratio": [1.3, 0.7]}, "ratio is [1.3, 0.7]; the smaller comes first"),
        ({"input_size": [32, 32]}, "input_size is [32, 32]; it must hold 3 numbers"),
        ({"decay_milestones": [5, 2]}, "decay_milestones are [5, 2]; each must be above the one before"),
        ({"min_lr": 0.2}, "min_lr is 0.2, above lr 0.1"),
        ({"warmup_epochs": 3}, "warmup_epochs is 3 of 3 epochs; it must be fewer"),
        ({"device_modules": ["sdzoo", "os"]}, "device_modules names os; implemented here: sdzoo"),
        (
            {"pretrained": True, "initial_checkpoint": "x.pth"},
            "pretrained and initial_checkpoint each name weights; give one",
        ),
        (
            {"sdzoo": {"survival_warmup_epochs": 4}},
            "sdzoo.survival_warmup_epochs is 4.0 of 3 epochs; it must not be more",
        ),
        ({"aa": "rand-q7"}, 'aa is "rand-q7", which timm cannot read: Unknown RandAugment config section'),
        ({"mixup": 0.2, "batch_size": 33}, "batch_size is 33; mixup and cutmix need an even one"),
        ({"bce_sum": True}, "bce_sum is set without bce_loss"),
        (
            {"bce_loss": True, "smoothing": 0.0},
            "bce_loss is set without mixup, cutmix or smoothing: timm would take the cross entropy; set one of them",
        ),
    ],
)
def test_values_that_do_not_go_together(values: dict[str, Any], fault: str) -> None:
    assert refused(**values) == fault


@pytest.mark.parametrize("aa", ["rand-m9-mstd0.5-inc1", "augmix-m5-w4-d2", "original-mstd0.5", "v0", "3a", ""])
def test_policies_of_timm(aa: str) -> None:
    assert recipe_from(MINIMAL | {"aa": aa}).aa == aa


@pytest.mark.parametrize("opt", ["sgd", "SGD", "momentum", "adamw", "lamb", "lookahead_sgd", "lookahead_radam"])
def test_optimizers_of_timm(opt: str) -> None:
    assert recipe_from(MINIMAL | {"opt": opt}).opt == opt


@pytest.mark.parametrize(
    ("opt", "why"),
    [
        ("adahessian", "which needs second-order gradients; not implemented here"),
        ("lookahead_adahessian", "which needs second-order gradients; not implemented here"),
        ("kron", "which draws and compiles on its own; not implemented here"),
        ("kronw", "which draws and compiles on its own; not implemented here"),
        ("fusedsgd", "which needs apex; not implemented here"),
        ("bnbadam8bit", "which needs bitsandbytes; not implemented here"),
        ("lbfgs", "which timm does not have"),
        ("sgdd", "which timm does not have; nearest: sgd"),
        ("lookahead_", "which timm does not have"),
        ("ahead_sgd", "which timm does not have"),
    ],
)
def test_optimizers_that_are_refused_by_name(opt: str, why: str) -> None:
    assert refused(opt=opt).startswith(f'opt is "{opt}", {why}')


def test_most_of_timms_optimizers_are_taken() -> None:
    taken = [name for name in list_optimizers() if not Recipe("sd_resnet20", 9, 0.1, opt=str(name)).faults()]
    assert len(taken) > 60


CIFAR = {"dataset": "torch/cifar10", "val_split": "train", "sdzoo": {"held_out": 5000, "test_split": "test"}}


@pytest.mark.parametrize(
    "values",
    [
        CIFAR,
        CIFAR | {"dataset": "torch/cifar100", "dataset_download": True},
        CIFAR | {"dataset": "torch/svhn"},
        {"train_split": "train", "val_split": "val", "sdzoo": {"test_split": "test"}},
        {"dataset": "torch/imagenet"},
        {"dataset": "wds/shards", "train_split": "a-{00..09}.tar", "val_split": "b-00.tar", "train_num_samples": 100},
        {"train_split": "all", "val_split": "all", "sdzoo": {"held_out": 7}},
        {"val_split": "latest"},
    ],
)
def test_data_sets_and_their_splits(values: dict[str, Any]) -> None:
    assert recipe_from(MINIMAL | values).dataset == values.get("dataset", "")


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        ({"dataset": "torch/mnist"}, 'dataset is "torch/mnist"; implemented here: ""'),
        ({"dataset": "hfds/x"}, 'dataset is "hfds/x"; implemented here: ""'),
        (CIFAR | {"sdzoo": {}}, 'val_split is "train", which is trained on; name another, or set sdzoo.held_out'),
        # timm reads each of these as the test set
        (CIFAR | {"val_split": "validation"}, 'val_split is "validation", the test set, which is never used for sel'),
        (CIFAR | {"val_split": "train[:45000]"}, 'val_split is "train[:45000]", the test set, which is never used'),
        (CIFAR | {"train_split": "training"}, 'train_split is "training"; torch/cifar10 has train and test'),
        (CIFAR | {"sdzoo": {"held_out": 9, "test_split": "val"}}, 'sdzoo.test_split is "val"; torch/cifar10 has train'),
        ({"val_split": "test"}, 'val_split is "test", the test set, which is never used for selection'),
        ({"val_split": "Testing"}, 'val_split is "Testing", the test set, which is never used for selection'),
        ({"dataset": "wds/x", "val_split": "my-test-0.tar"}, 'val_split is "my-test-0.tar", the test set'),
        ({"val_split": ""}, "val_split is empty"),
        ({"val_split": "train"}, 'val_split is "train", which is trained on'),
        ({"val_split": "training"}, 'val_split is "training", which is trained on'),
        (
            {"sdzoo": {"held_out": 5}},
            'sdzoo.held_out is 5 of "train", but val_split is "validation"; it must be "train"',
        ),
        ({"sdzoo": {"held_out": -5}}, "sdzoo.held_out is -5; it must be at least 0"),
        ({"val_split": "val", "sdzoo": {"test_split": "validation"}}, 'sdzoo.test_split is "validation", which is tr'),
        ({"sdzoo": {"test_split": "train"}}, 'sdzoo.test_split is "train", which is trained on or chosen by'),
        (
            {"dataset": "wds/x", "val_split": "train", "sdzoo": {"held_out": 5}},
            "sdzoo.held_out is 5; wds/x cannot be split by image",
        ),
        ({"train_num_samples": 5}, "train_num_samples is for shards (dataset: wds/...)"),
        ({"dataset_download": True}, "dataset_download is for torch/cifar10, torch/cifar100, torch/svhn"),
    ],
)
def test_data_that_is_refused(values: dict[str, Any], fault: str) -> None:
    assert refused(**values).startswith(fault)


def test_faults_of_a_recipe_made_in_python() -> None:
    bad = Recipe("sd_resnet20", 9, -1.0, hflip=2.0)
    assert len(bad.faults()) == 2
    assert bad.faults(unknown=["lr"]) == ["hflip is 2.0; it must be in [0, 1]"]


def test_values_inside_model_kwargs_are_judged_with_the_others() -> None:
    message = refused(
        smoothing=3.0, model_kwargs={"schedule": "lineer", "survival_probs": [0.5, 2.0, 0], "mode": "image", "depth": 3}
    )
    faults = (
        "smoothing is 3.0; it must be in [0, 1)",
        "model_kwargs.depth: unknown key",
        'model_kwargs.schedule is "lineer"; known: linear_decay, linear, uniform, constant_depth, stagewise; nearest: '
        "linear",
        "model_kwargs.survival_probs[1] is 2.0; each must lie in (0, 1] (2 are wrong)",
        "model_kwargs.mode is 'image'; it must be batch or sample",
    )
    assert sorted(message.split("; ")) == sorted("; ".join(faults).split("; "))
    assert "model_kwargs.schedule is 3; it must be a name" in refused(model_kwargs={"schedule": 3})
    assert "model_kwargs.survival_probs is 'all'; it must be a list" in refused(model_kwargs={"survival_probs": "all"})


@pytest.mark.parametrize(
    "model_kwargs",
    [
        *({"schedule": name} for name in ("linear_decay", "linear", "uniform", "constant_depth")),
        {"schedule": "stagewise", "survival_probs": [1, 0.8, 0.6]},
        {"schedule": [0.5] * 9, "mode": "sample"},
        {"survival_probs": [0.5] * 9},
    ],
)
def test_survival_settings_that_models_take(model_kwargs: dict[str, Any]) -> None:
    assert recipe_from(MINIMAL | {"model_kwargs": model_kwargs}).model_kwargs == model_kwargs


@pytest.mark.parametrize("mode", ["pad4", "rrc"])
def test_a_crop_without_augmentation_is_refused_as_timm_would_ignore_it(mode: str) -> None:
    """timm's transforms look at train_crop_mode only if they augment; so no recipe with pad4 runs there."""
    said = "train_crop_mode is set, but so is no_aug: it would never act"
    assert refused(no_aug=True, train_crop_mode=mode) == said
    transform = create_transform(32, is_training=True, no_aug=True, train_crop_mode="pad4")
    assert "Crop" in str(transform)
    with pytest.raises(AssertionError):
        create_transform(32, is_training=True, train_crop_mode="pad4")


def test_what_has_a_key_of_its_own_is_given_once() -> None:
    said = refused(input_size=[3, 32, 32], drop_block=0.1, model_kwargs={"in_chans": 3, "drop_block_rate": 0.1})
    assert said == (
        "model_kwargs.in_chans is given, and input_size too; give it once, as input_size; "
        "model_kwargs.drop_block_rate is given, and drop_block too; give it once, as drop_block"
    )
    assert "model_kwargs.num_classes: unknown key; give it as num_classes" in refused(model_kwargs={"num_classes": 3})


def test_mixes() -> None:
    base = Recipe("sd_resnet20", 9, 0.1)
    assert not base.mixes
    for values in ({"mixup": 0.2}, {"cutmix": 1.0}, {"cutmix_minmax": [0.2, 0.8]}):
        assert dataclasses.replace(base, **values).mixes  # type: ignore[arg-type]
