"""What timm, and software written for its models, expects of every model.

The nets are calibrated; images are small. Expensive checks of big nets are in the slow tier.
"""

from __future__ import annotations

import copy
import io
import itertools
import math
import pickle
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import timm.data
import torch
import torch.nn.functional as F
from nets import Net, calibrated, close, evaluate, linear_decay_by_hand, random_images
from PIL import Image
from timm.models import group_parameters
from timm.models._features_fx import create_feature_extractor
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from timm.utils.model import reparameterize_model
from torch import Tensor, nn

import sdzoo
from sdzoo.residual import residual_blocks

CIFAR = (16, 32, 64)
BASIC, BOTTLENECK = (64, 64, 128, 256, 512), (64, 256, 512, 1024, 2048)
# name: channels of each level of features, blocks of each stage; the 224-pixel family has the stem as a level too
ZOO: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "sd_resnet20": (CIFAR, (3, 3, 3)),
    "sd_resnet32": (CIFAR, (5, 5, 5)),
    "sd_resnet44": (CIFAR, (7, 7, 7)),
    "sd_resnet56": (CIFAR, (9, 9, 9)),
    "sd_resnet110": (CIFAR, (18, 18, 18)),
    "sd_resnet152_cifar": (CIFAR, (25, 25, 25)),
    "sd_resnet1202": (CIFAR, (200, 200, 200)),
    "sd_resnext29_8x64": ((256, 512, 1024), (3, 3, 3)),
    "sd_resnetv2_164": ((64, 128, 256), (18, 18, 18)),
    "sd_resnetv2_1001": ((64, 128, 256), (111, 111, 111)),
    "sd_wide_resnet16_4": ((64, 128, 256), (2, 2, 2)),
    "sd_wide_resnet28_10": ((160, 320, 640), (4, 4, 4)),
    "sd_resnet18": (BASIC, (2, 2, 2, 2)),
    "sd_resnet34": (BASIC, (3, 4, 6, 3)),
    "sd_resnet50": (BOTTLENECK, (3, 4, 6, 3)),
    "sd_resnet101": (BOTTLENECK, (3, 4, 23, 3)),
    "sd_resnet152": (BOTTLENECK, (3, 8, 36, 3)),
    "sd_resnext50_32x4d": (BOTTLENECK, (3, 4, 6, 3)),
    "sd_wide_resnet50_2": (BOTTLENECK, (3, 4, 6, 3)),
    "sd_seresnet50": (BOTTLENECK, (3, 4, 6, 3)),
}
PREACT = ("sd_resnetv2_164", "sd_resnetv2_1001", "sd_wide_resnet16_4", "sd_wide_resnet28_10")
NAMES = timm.list_models("sd_*")
DEEP = ("sd_resnet1202", "sd_resnetv2_1001")
BIG = (*DEEP, "sd_wide_resnet28_10", "sd_resnext29_8x64", "sd_resnet101", "sd_resnet152")
BIG += ("sd_resnext50_32x4d", "sd_wide_resnet50_2")
SMALL = ("sd_resnet20", "sd_wide_resnet16_4", "sd_resnet18", "sd_seresnet50")
FAMILIES = ("sd_resnet20", "sd_wide_resnet16_4", "sd_resnet18")


def each(argument: str, slow: Collection[str] = (), names: Collection[str] = NAMES) -> pytest.MarkDecorator:
    """Run a test with each net; in the slow tier with those of ``slow``."""
    params = [pytest.param(name, marks=[pytest.mark.slow] if name in slow else []) for name in names]
    scope = "module" if argument == "shared" else "function"
    return pytest.mark.parametrize(argument, params, indirect=argument == "shared", scope=scope)


every_name = each("name", slow=DEEP)
every_net = each("shared", slow=DEEP)
big_nets_slow = each("shared", slow=BIG)
small_nets_fast = each("shared", slow=set(NAMES) - set(SMALL))
small_names_fast = each("name", slow=set(NAMES) - set(SMALL))
one_of_each_family = each("shared", names=FAMILIES)
every_feature_class = pytest.mark.parametrize("feature_cls", ["list", "dict", "hook", "getter", "fx"])
tracing_warns = pytest.mark.filterwarnings("ignore:The nodes obtained by tracing the model in train mode:UserWarning")


def make(name: str) -> Net:
    return calibrated(name, images=random_images(8, 8 if len(ZOO[name][0]) == 3 else 64))


@pytest.fixture(scope="module")
def shared(request: pytest.FixtureRequest) -> Net:
    """Return a calibrated net in evaluation, for all tests that leave it as it is."""
    return make(request.param)


@pytest.fixture
def net(shared: Net) -> Net:
    """Return a net of one's own."""
    return copy.deepcopy(shared)


def name_of(net: Net) -> str:
    return net.default_cfg["architecture"]


def images_for(net: Net, count: int = 2, chans: int = 3, seed: int = 1) -> Tensor:
    return random_images(count, 8 if len(net.feature_info) == 3 else 64, chans, seed)


def step(net: Net, images: Tensor, seed: int) -> Tensor:
    """Forward and backward in training with the draws of ``seed``; return the logits."""
    net.zero_grad()
    torch.manual_seed(seed)
    out = net(images)
    F.cross_entropy(out, torch.arange(len(images))).backward()
    return out.detach()


def gradients(net: Net) -> dict[str, Tensor]:
    found = {name: parameter.grad for name, parameter in net.named_parameters()}
    assert [name for name, grad in found.items() if grad is None] == []
    return {name: grad.clone() for name, grad in found.items() if grad is not None}


def test_every_registered_model_is_tested() -> None:
    assert set(NAMES) == set(ZOO)
    assert timm.list_models(["sd_*"], module="sd_resnet") == [name for name in NAMES if len(ZOO[name][1]) == 4]
    for name in NAMES:
        assert timm.is_model(name)


# --- forward


@every_net
def test_forward_is_finite_repeatable_and_draws_nothing(shared: Net) -> None:
    images, before = images_for(shared), torch.get_rng_state()
    with torch.no_grad():
        out = shared(images)
        assert out.shape == (2, shared.num_classes)
        assert bool(out.isfinite().all())
        assert out.std() > 0
        assert torch.equal(out, shared(images))
        features = shared.forward_features(images)
        assert features.shape[1] == shared.num_features
        pooled = shared.forward_head(features, pre_logits=True)
        assert pooled.shape == (2, shared.head_hidden_size)
        close(features.mean((2, 3)), pooled, tol=1e-6)
        close(pooled @ shared.fc.weight.T + shared.fc.bias, out, tol=1e-5)
    assert torch.equal(torch.get_rng_state(), before)


@every_name
def test_attributes_that_timm_reads(name: str) -> None:
    channels, blocks = ZOO[name]
    model: Net = timm.create_model(name, num_classes=7, in_chans=5, drop_rate=0.1, device="meta")
    assert (model.num_classes, model.in_chans, model.drop_rate) == (7, 5, 0.1)
    assert model.num_features == model.head_hidden_size == channels[-1]
    assert model.grad_checkpointing is False
    model.set_grad_checkpointing()
    assert model.grad_checkpointing is True
    model.set_grad_checkpointing(False)
    assert model.grad_checkpointing is False
    assert getattr(model, "no_weight_decay", set)() == set()
    assert model.conv1.in_channels == 5
    assert sdzoo.survival_probs(model) == pytest.approx(linear_decay_by_hand(sum(blocks)), abs=1e-7)
    assert not any("survival" in key for key, _ in model.named_parameters())


@every_name
def test_arguments_that_nothing_takes_are_refused_by_name(name: str) -> None:
    with pytest.raises(TypeError, match="schedul"):
        timm.create_model(name, device="meta", schedul="uniform")
    with pytest.raises(ValueError, match=r'mode is "bach".*nearest: batch'):
        timm.create_model(name, device="meta", mode="bach")
    with pytest.raises(ValueError, match=f"{sum(ZOO[name][1])}"):
        timm.create_model(name, device="meta", survival_probs=[0.5])


@every_name
def test_dtype_and_device_at_creation(name: str) -> None:
    model: Net = timm.create_model(name, device="meta", dtype=torch.bfloat16)
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    for key, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            assert tensor.dtype == (torch.float32 if key.endswith("survival_prob") else torch.bfloat16), key
    with torch.device("meta"):
        other: Net = timm.create_model(name)
    assert all(tensor.is_meta for tensor in other.state_dict().values())


@one_of_each_family
def test_double_precision_at_creation_computes(shared: Net) -> None:
    model: Net = timm.create_model(name_of(shared), dtype=torch.float64, device="cpu")
    model.load_state_dict(shared.state_dict())
    close(evaluate(shared, images_for(shared)), evaluate(model, images_for(shared).double()), tol=1e-4)


# --- training


@every_net
def test_every_parameter_has_a_finite_gradient_after_one_backward(net: Net) -> None:
    net.train()
    drawn: list[bool] = []
    for seed in (2, 3) if name_of(net) not in BIG else (2,):
        step(net, images_for(net), seed)
        assert [name for name, grad in gradients(net).items() if not bool(grad.isfinite().all())] == []
        live = sdzoo.live_blocks(net)
        for (name, block), is_live in zip(residual_blocks(net), live, strict=True):
            assert bool(block.get_parameter("conv2.weight").grad.any()) is is_live, name  # type: ignore[union-attr]
        drawn += live
    assert any(drawn) and not all(drawn)


@big_nets_slow
def test_gradient_checkpointing_recomputes_the_same_draws(
    net: Net, conv_calls: Callable[[nn.Module], dict[str, int]]
) -> None:
    twin, images = copy.deepcopy(net).train(), images_for(net)
    net.train()
    twin.set_grad_checkpointing()
    calls = conv_calls(twin)
    for seed in range(3 if name_of(net) in FAMILIES else 1):
        calls.update(dict.fromkeys(calls, 0))
        assert torch.equal(step(net, images, seed), step(twin, images, seed))
        live = sdzoo.live_blocks(net)
        assert sdzoo.live_blocks(twin) == live
        assert not all(live)
        for (name, _), is_live in zip(residual_blocks(twin), live, strict=True):
            assert calls[f"{name}.conv1"] == 2 * is_live, name  # once forward, once in the backward
        expected = gradients(net)
        for name, grad in gradients(twin).items():
            close(expected[name], grad, tol=1e-6)
    with torch.no_grad():
        torch.manual_seed(0)
        final, _ = twin.forward_intermediates(images, norm=True)
        torch.manual_seed(0)
        assert torch.equal(final, twin.forward_features(images))


@one_of_each_family
def test_gradient_checkpointing_recomputes_the_same_masks_per_sample(shared: Net) -> None:
    results = []
    for checkpointing in (False, True):
        model: Net = timm.create_model(name_of(shared), mode="sample")
        model.load_state_dict(shared.state_dict())
        model.train().set_grad_checkpointing(checkpointing)
        out = step(model, images_for(shared, 4), seed=5)
        results.append([out, *gradients(model).values()])
    for plain, recomputed in zip(*results, strict=True):
        close(plain, recomputed, tol=1e-6)


@one_of_each_family
def test_features_of_a_block_are_not_overwritten_by_what_follows(net: Net) -> None:
    kept: list[Tensor] = []
    copies: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: tuple[Tensor, ...], out: Tensor) -> None:
        kept.append(out)
        copies.append(out.detach().clone())

    blocks = residual_blocks(net)
    for _, block in blocks:
        block.register_forward_hook(keep)
    net.train()
    bits = [index % 3 == 0 for index in range(len(blocks))]
    with sdzoo.fixed_gates(net, bits):
        net(images_for(net))
    assert len(kept) == len(blocks)
    assert all(torch.equal(a, b) for a, b in zip(kept, copies, strict=True))


# --- the configuration


@every_name
def test_the_default_cfg_names_what_is_there(name: str) -> None:
    model: Net = timm.create_model(name, device="meta")
    cfg = model.default_cfg
    assert cfg["architecture"] == name
    features = model.forward_features(torch.empty(1, *cfg["input_size"], device="meta"))
    assert tuple(features.shape[2:]) == cfg["pool_size"]
    first, classifier = (model.get_submodule(cfg[key]) for key in ("first_conv", "classifier"))
    assert isinstance(first, nn.Conv2d)
    assert first is next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    assert (first.in_channels, first.weight.shape[1]) == (cfg["input_size"][0], cfg["input_size"][0])
    assert isinstance(classifier, nn.Linear)
    assert classifier is model.get_classifier()
    assert classifier.out_features == model.num_classes == cfg["num_classes"]


@pytest.mark.parametrize("name", timm.list_models("sd_*", include_tags=True))
def test_every_configuration_is_whole(name: str) -> None:
    cfg = timm.get_pretrained_cfg(name)
    assert cfg is not None
    arch, _, tag = name.partition(".")
    assert (cfg.first_conv, cfg.classifier) == ("conv1", "fc")
    assert cfg.interpolation and cfg.pool_size and 0 < cfg.crop_pct <= 1
    assert len(cfg.mean) == len(cfg.std) == 3
    assert all(0 < value < 1 for value in (*cfg.mean, *cfg.std))
    if len(ZOO[arch][1]) == 3:
        assert (cfg.input_size, cfg.pool_size, cfg.crop_pct, cfg.num_classes) == ((3, 32, 32), (8, 8), 1.0, 10)
        assert cfg.license == "apache-2.0"
        assert cfg.hf_hub_id is None and cfg.url in (None, "")
        assert (cfg.file is not None) is bool(tag)
        return
    assert cfg.input_size[1] == cfg.input_size[2] in range(32 * cfg.pool_size[0] - 31, 32 * cfg.pool_size[0] + 1)
    assert cfg.hf_hub_id == f"timm/{name.removeprefix('sd_')}"
    assert cfg.hf_hub_filename == "model.safetensors"
    stock = timm.get_pretrained_cfg(name.removeprefix("sd_"))
    assert stock is not None
    for field in ("input_size", "mean", "std", "crop_pct", "interpolation", "num_classes", "license", "label_offset"):
        assert getattr(cfg, field, None) == getattr(stock, field, None), field


@pytest.mark.parametrize("name", [name for name in NAMES if len(ZOO[name][1]) == 3])
def test_images_of_32_pixels_are_evaluated_as_they_are(name: str) -> None:
    cfg = timm.get_pretrained_cfg(name)
    assert cfg is not None
    transform: Any = timm.data.create_transform(**timm.data.resolve_data_config(pretrained_cfg=cfg.to_dict()))
    pixels = torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = (pixels.permute(2, 0, 1) / 255 - torch.tensor(cfg.mean)[:, None, None]) / torch.tensor(cfg.std)[
        :, None, None
    ]
    close(expected, transform(Image.fromarray(pixels.numpy())), tol=1e-5)


# --- the head


@every_net
def test_reset_classifier(shared: Net) -> None:
    model, images = copy.copy(shared), images_for(shared)  # a copy that shares all but the head
    model._modules = dict(shared._modules)
    with torch.no_grad():
        features = shared.forward_features(images)
        model.reset_classifier(0)
        assert isinstance(model.get_classifier(), nn.Identity)
        close(features.mean((2, 3)), model(images), tol=1e-6)
        model.reset_classifier(0, "")
        assert torch.equal(model(images), features)
        assert (model.num_classes, model.num_features) == (0, features.shape[1])
        for pool, reduce in (
            ("max", lambda x: x.amax((2, 3))),
            ("catavgmax", lambda x: torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1)),
            ("avg", lambda x: x.mean((2, 3))),
        ):
            model.reset_classifier(5, pool)
            assert model.num_classes == 5
            close(reduce(features) @ model.fc.weight.T + model.fc.bias, model(images), tol=1e-5)
        model.reset_classifier(3)
        assert model.global_pool.pool_type == "avg"  # as it was
        assert model(images).shape == (2, 3)


@one_of_each_family
def test_head_hidden_size_is_what_the_classifier_reads(net: Net) -> None:
    images = images_for(net)
    for pool, factor in (("catavgmax", 2), ("max", 1)):
        net.reset_classifier(5, pool)
        assert net.head_hidden_size == factor * net.num_features
        assert net.forward_head(net.forward_features(images), pre_logits=True).shape == (2, net.head_hidden_size)
    created: Net = timm.create_model(name_of(net), global_pool="catavgmax", device="meta")
    assert created.head_hidden_size == created.fc.in_features == 2 * created.num_features


@one_of_each_family
def test_a_new_classifier_has_the_dtype_and_the_mode_of_the_net(net: Net) -> None:
    net.double().reset_classifier(2, "avg")
    assert evaluate(net, images_for(net).double()).shape == (2, 2)
    net.train().reset_classifier(3)
    assert all(module.training for module in net.modules())


@every_name
def test_no_classes_and_no_pooling_at_creation(name: str) -> None:
    images = torch.empty(2, 3, 64, 64, device="meta")
    pooled: Net = timm.create_model(name, num_classes=0, device="meta")
    assert isinstance(pooled.get_classifier(), nn.Identity)
    assert pooled(images).shape == (2, ZOO[name][0][-1])
    bare: Net = timm.create_model(name, num_classes=0, global_pool="", device="meta")
    side = 16 if len(ZOO[name][1]) == 3 else 2
    assert bare(images).shape == (2, ZOO[name][0][-1], side, side)


@pytest.mark.parametrize(
    ("global_pool", "pooled"),
    [
        ("avg", lambda x: x.mean((2, 3))),
        ("max", lambda x: x.amax((2, 3))),
        ("avgmax", lambda x: (x.mean((2, 3)) + x.amax((2, 3))) / 2),
        ("catavgmax", lambda x: torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1)),
    ],
)
@pytest.mark.parametrize("name", ["sd_resnet20", "sd_wide_resnet16_4"])
def test_every_pooling(name: str, global_pool: str, pooled: Callable[[Tensor], Tensor], images: Tensor) -> None:
    model: Net = timm.create_model(name, global_pool=global_pool).eval()
    with torch.no_grad():
        features = model.forward_features(images)
        expected = pooled(features) @ model.fc.weight.T + model.fc.bias
    close(expected, evaluate(model, images), tol=1e-5)


@one_of_each_family
def test_dropout_acts_before_the_classifier_in_training_only(shared: Net) -> None:
    model: Net = timm.create_model(name_of(shared), drop_rate=0.5, schedule="constant_depth")
    seen: list[Tensor] = []
    model.fc.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0]))
    images = images_for(shared, 8)
    model.train()(images)
    assert 0.3 < (seen[-1] == 0).float().mean() < 0.8
    model.eval()(images)
    assert (seen[-1] == 0).float().mean() < 0.25


# --- pretrained


@small_nets_fast
def test_weights_by_file_fit_other_classes_channels_and_features(shared: Net, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    safetensors.torch.save_file(shared.state_dict(), file)
    try:

        def pretrained(**kwargs: Any) -> Net:
            overlay = {"file": str(file)}
            return timm.create_model(name_of(shared), pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)

        grey, images = images_for(shared, chans=1), images_for(shared)
        model = pretrained(in_chans=1)
        close(shared.conv1.weight.sum(1, keepdim=True), model.conv1.weight, tol=1e-6)
        close(evaluate(shared, grey.expand(-1, 3, -1, -1)), evaluate(model, grey), tol=1e-4)
        model = pretrained(in_chans=4, num_classes=5)
        close(0.75 * shared.conv1.weight[:, [0, 1, 2, 0]], model.conv1.weight, tol=1e-6)
        assert evaluate(model, images_for(shared, chans=4)).shape == (2, 5)
        model = pretrained(num_classes=0)
        with torch.no_grad():
            close(shared.forward_features(images).mean((2, 3)), evaluate(model, images), tol=1e-6)
            features = pretrained(features_only=True).eval()(images)
            for a, b in zip(shared.forward_intermediates(images)[1], features, strict=True):
                close(a, b, tol=1e-6)
    finally:
        file.unlink()  # pytest keeps folders


@small_nets_fast
def test_a_saved_folder_gives_the_model_back(shared: Net, tmp_path: Path) -> None:
    timm.models.save_for_hf(shared, str(tmp_path), safe_serialization=True)
    try:
        back = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    finally:
        (tmp_path / "model.safetensors").unlink()
    assert type(back) is type(shared)
    assert torch.equal(evaluate(back, images_for(shared)), evaluate(shared, images_for(shared)))


@small_nets_fast
def test_a_pickled_net_is_the_same(shared: Net) -> None:
    again: Net = pickle.loads(pickle.dumps(shared))
    images = images_for(shared)
    assert torch.equal(evaluate(again, images), evaluate(shared, images))
    twin = copy.deepcopy(shared).train()
    assert torch.equal(step(again.train(), images, seed=7), step(twin, images, seed=7))
    assert sdzoo.live_blocks(again) == sdzoo.live_blocks(twin)


# --- features


def feature_maps(model: Net, images: Tensor) -> list[Tensor]:
    out = model(images)
    return list(out.values()) if isinstance(out, dict) else list(out)


@every_name
def test_features_have_the_channels_and_reductions_they_say(name: str) -> None:
    channels, blocks = ZOO[name]
    with torch.device("meta"):
        model: Net = timm.create_model(name, features_only=True)
    reductions = [2**level for level in range(len(channels))] if len(blocks) == 3 else [2, 4, 8, 16, 32]
    assert len(channels) >= 3
    assert model.feature_info.channels() == list(channels)
    assert model.feature_info.reduction() == reductions
    maps = feature_maps(model.eval(), torch.empty(2, 3, 96, 64, device="meta"))
    for feature, chans, reduction in zip(maps, channels, reductions, strict=True):
        assert feature.shape == (2, chans, 96 // reduction, 64 // reduction)


@every_feature_class
@each("shared", slow=set(NAMES) - set(FAMILIES))
@tracing_warns
def test_every_feature_class_gives_the_stages_and_draws_gates(feature_cls: str, shared: Net) -> None:
    model: Net = timm.create_model(name_of(shared), features_only=True, feature_cls=feature_cls)
    inner = model.get_submodule({"hook": "body", "getter": "model", "fx": "graph_module"}.get(feature_cls, ""))
    state, images = shared.state_dict(), images_for(shared)
    inner.load_state_dict({key: state[key] for key in inner.state_dict()})
    with torch.no_grad():
        expected = shared.forward_intermediates(images, intermediates_only=True)
        for a, b in zip(expected, feature_maps(model.eval(), images), strict=True):
            close(a, b, tol=1e-6)
        model.train()
        sums = {tuple(float(feature.sum()) for feature in feature_maps(model, images)) for _ in range(6)}
    assert len(sums) > 1, "the same gates six times"


@pytest.mark.parametrize("out_indices", [(0,), (1, 2), (-1,), (0, -2)])
@one_of_each_family
def test_features_only_gives_the_levels_asked_for(out_indices: tuple[int, ...], shared: Net) -> None:
    name = name_of(shared)
    model: Net = timm.create_model(name, features_only=True, out_indices=out_indices).eval()
    expected = [ZOO[name][0][index] for index in out_indices]
    assert [feature.shape[1] for feature in model(images_for(shared))] == expected
    assert model.feature_info.channels() == expected


def stage_calls(net: Net) -> dict[str, int]:
    calls = {name: 0 for name, _ in net.named_children() if name.startswith("layer")}

    def hook(name: str) -> Callable[..., None]:
        def called(*_: Any) -> None:
            calls[name] += 1

        return called

    for name in calls:
        net.get_submodule(name).register_forward_pre_hook(hook(name))
    return calls


@every_net
def test_forward_intermediates_are_the_stages(shared: Net) -> None:
    images, name = images_for(shared), name_of(shared)
    channels = ZOO[name][0]
    levels = len(channels)
    with torch.no_grad():
        features = shared.forward_features(images)
        final, maps = shared.forward_intermediates(images)
        assert torch.equal(final, features)
        assert [tuple(m.shape[1:]) for m in maps] == [
            (chans, images.shape[2] // info["reduction"], images.shape[3] // info["reduction"])
            for chans, info in zip(channels, shared.feature_info, strict=True)
        ]
        assert torch.equal(maps[-1], features) is (name not in PREACT)
        _, normed = shared.forward_intermediates(images, norm=True)
        assert torch.equal(normed[-1], features)
        assert all(torch.equal(a, b) for a, b in zip(maps[:-1], normed[:-1], strict=True))
        (last,) = shared.forward_intermediates(images, 1, intermediates_only=True)
        assert torch.equal(last, maps[-1])
        some = shared.forward_intermediates(images, [0, levels - 2], intermediates_only=True)
        assert all(torch.equal(a, b) for a, b in zip(some, [maps[0], maps[-2]], strict=True))
        calls = stage_calls(shared)
        try:
            for level in range(levels):
                calls.update(dict.fromkeys(calls, 0))
                _, (early,) = shared.forward_intermediates(images, [level], stop_early=True)
                assert torch.equal(early, maps[level])
                stages = level + (levels == 3)  # the stem is the first level of the others
                assert list(calls.values()) == [1] * stages + [0] * (len(calls) - stages)
        finally:
            for stage in calls:
                shared.get_submodule(stage)._forward_pre_hooks.clear()
    with pytest.raises((ValueError, AssertionError), match=r"NLC|NCHW"):
        shared.forward_intermediates(images, output_fmt="NLC")


@every_net
def test_pruned_layers_are_gone(shared: Net) -> None:
    images, name = images_for(shared), name_of(shared)
    channels, blocks = ZOO[name]
    levels = len(channels)
    with torch.no_grad():
        features, maps = shared.forward_intermediates(images)
        for level in range(levels):
            model = copy.copy(shared)
            model._modules = dict(shared._modules)
            assert model.prune_intermediate_layers([level]) == [level]
            assert torch.equal(model(images), maps[level] if level < levels - 1 else features)
            assert model.num_features == channels[level]
            stages = level + (levels == 3)
            if stages:
                assert len(sdzoo.survival_probs(model)) == sum(blocks[:stages])
            assert [len(model.get_submodule(f"layer{i + 1}")) > 0 for i in range(len(blocks))] == [
                i < stages for i in range(len(blocks))
            ]
        model = copy.copy(shared)
        model._modules = dict(shared._modules)
        assert model.prune_intermediate_layers(2) == [levels - 2, levels - 1]
        assert torch.equal(model(images), features)
        model = copy.copy(shared)
        model._modules = dict(shared._modules)
        model.prune_intermediate_layers(1, prune_head=False)
        assert torch.equal(model(images), shared(images))


# --- optimizers and averages


def expected_groups(net: Net, coarse: bool) -> dict[str, int]:
    """Say by hand to which group each parameter belongs: stem, blocks or stages, classifier."""
    blocks = ZOO[name_of(net)][1]
    starts = [1, *itertools.accumulate(blocks, initial=1)][1:]
    last = len(blocks) if coarse else sum(blocks)

    def group(name: str) -> int:
        if match := re.match(r"layer(\d+)\.(\d+)\.", name):
            stage, block = int(match[1]), int(match[2])
            return stage if coarse else starts[stage - 1] + block
        return {"conv1": 0, "bn1": 0, "norm": last, "fc": last + 1}[name.partition(".")[0]]

    return {name: group(name) for name, _ in net.named_parameters()}


@pytest.mark.parametrize("coarse", [False, True])
@every_net
def test_every_parameter_is_in_the_group_of_its_depth(coarse: bool, shared: Net) -> None:
    grouped = group_parameters(shared, shared.group_matcher(coarse))
    names = [name for group in grouped.values() for name in group]
    assert sorted(names) == sorted(name for name, _ in shared.named_parameters())
    assert {name: index for index, group in grouped.items() for name in group} == expected_groups(shared, coarse)


@every_net
def test_layer_decay_falls_towards_the_input(shared: Net) -> None:
    optimizer = create_optimizer_v2(shared, opt="sgd", lr=0.1, layer_decay=0.7, weight_decay=0.05)
    scales = {parameter: group["lr_scale"] for group in optimizer.param_groups for parameter in group["params"]}
    decays = {parameter: group["weight_decay"] for group in optimizer.param_groups for parameter in group["params"]}
    expected = expected_groups(shared, coarse=False)
    assert len(scales) == len(expected)
    for name, parameter in shared.named_parameters():
        assert math.isclose(scales[parameter], 0.7 ** (max(expected.values()) - expected[name])), name
        assert decays[parameter] == (0.05 if parameter.ndim > 1 else 0), name
    scheduler, _ = create_scheduler_v2(optimizer, sched="cosine", num_epochs=10)
    assert scheduler is not None


@one_of_each_family
def test_every_parameter_decays_if_asked(shared: Net) -> None:
    optimizer = create_optimizer_v2(shared, opt="sgd", lr=0.1, weight_decay=0.1, filter_bias_and_bn=False)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.1}


@small_nets_fast
def test_an_average_of_weights_is_weighted_by_the_same_probabilities(net: Net) -> None:
    probs = [0.9 - 0.37 * index / len(residual_blocks(net)) for index in range(len(residual_blocks(net)))]
    sdzoo.set_survival(net, probs)
    stored = {key: value.clone() for key, value in net.state_dict().items() if key.endswith("survival_prob")}
    ema, images = ModelEmaV3(net, decay=0.9), images_for(net)
    average = {key: value.clone() for key, value in net.state_dict().items()}
    sgd = torch.optim.SGD(net.train().parameters(), lr=0.01)
    for seed in range(3):
        step(net, images, seed)
        sgd.step()
        ema.update(net)
        for key, value in net.state_dict().items():
            average[key] = 0.9 * average[key] + 0.1 * value if value.is_floating_point() else value.clone()
    state = ema.module.state_dict()
    assert all(torch.equal(state[key], value) for key, value in stored.items())
    assert sdzoo.survival_probs(ema.module) == sdzoo.survival_probs(net)
    by_hand: Net = timm.create_model(name_of(net))
    by_hand.load_state_dict({**average, **stored})
    close(evaluate(by_hand, images), evaluate(ema.module, images), tol=1e-4)
    assert not torch.equal(evaluate(net, images), evaluate(ema.module, images))


@one_of_each_family
def test_an_average_follows_probabilities_that_change_in_both(net: Net) -> None:
    ema, probs = ModelEmaV3(net, decay=0.9), [0.9] * len(residual_blocks(net))
    expected = evaluate(net, images_for(net))
    for model in (net, ema.module):
        sdzoo.set_survival(model, probs)
    for _ in range(3):
        ema.update(net)
        assert sdzoo.survival_probs(ema.module) == probs
        close(expected, evaluate(ema.module, images_for(net)), tol=1e-4)


@small_nets_fast
def test_reparameterized_computes_the_evaluation_function(shared: Net) -> None:
    images = images_for(shared)
    before = {key: value.clone() for key, value in shared.state_dict().items()}
    expected = evaluate(shared, images)
    fused = reparameterize_model(shared)
    close(expected, evaluate(fused, images), tol=1e-4)
    assert residual_blocks(fused) == []
    # timm fuses children only: what stands at the root stays
    norms = [name for name, module in fused.named_modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms == (["norm"] if name_of(shared) in PREACT else ["bn1"])
    assert len(residual_blocks(shared)) == sum(ZOO[name_of(shared)][1])
    assert all(torch.equal(value, before[key]) for key, value in shared.state_dict().items())
    assert torch.equal(evaluate(shared, images), expected)


# --- tracing: last, because what TorchScript leaves in memory slows down all that follows


@every_net
def test_feature_extraction_by_fx_in_evaluation(shared: Net) -> None:
    extractor: Any = create_feature_extractor(shared, {"fc": "logits", "layer2": "features"}).eval()
    level = 1 if len(shared.feature_info) == 3 else 2
    for images in (images_for(shared), images_for(shared, 3, seed=2)):
        with torch.no_grad():
            out = extractor(images)
            assert torch.equal(out["logits"], shared(images))
            assert torch.equal(out["features"], shared.forward_intermediates(images, [level])[1][0])


@big_nets_slow
@tracing_warns
def test_fx_trace_in_training_goes_on_drawing(net: Net) -> None:
    extractor: Any = create_feature_extractor(net.train(), ["fc"]).train()
    images, draws = images_for(net), set()
    for seed in (1, 2, 3):
        with torch.no_grad():
            torch.manual_seed(seed)
            out = extractor(images)["fc"]
            draws.add(tuple(sdzoo.live_blocks(extractor)))
            torch.manual_seed(seed)
            assert torch.equal(net(images), out)
    assert len(draws) > 1
    extractor(images)["fc"].sum().backward()
    gradients(extractor)


@small_names_fast
def test_plain_fx_trace_in_evaluation(name: str) -> None:
    model = make(name)
    traced: Any = torch.fx.symbolic_trace(model)
    for images in (images_for(model), images_for(model, 3, seed=2)):
        close(evaluate(model, images), evaluate(traced, images), tol=1e-6)


@each("name", names=FAMILIES)
def test_plain_fx_trace_in_training_raises_or_goes_on_drawing(name: str) -> None:
    model = make(name).train()
    images = images_for(model)
    try:
        traced: Any = torch.fx.symbolic_trace(model)
    except (TypeError, ValueError, RuntimeError):
        return
    with torch.no_grad():
        assert len({float(traced(images).sum()) for _ in range(8)}) > 1, "one draw, frozen"


@small_names_fast
def test_jit_trace_in_evaluation(name: str) -> None:
    model = make(name)
    traced: Any = torch.jit.trace(model, images_for(model))
    other = images_for(model, seed=2)
    with torch.no_grad():
        close(model(other), traced(other), tol=1e-6)


@each("name", names=FAMILIES)
def test_torchscript_in_training_raises_and_does_not_freeze_a_draw(name: str) -> None:
    model = make(name)
    scripted = torch.jit.script(model.train())
    with pytest.raises(torch.jit.Error, match=r"not compiled|unused|ignore"):
        scripted(images_for(model))


@small_names_fast
def test_torchscript_in_evaluation(name: str) -> None:
    model, file = make(name), io.BytesIO()
    scripted = torch.jit.script(model)
    torch.jit.save(scripted, file)
    file.seek(0)
    loaded = torch.jit.load(file)
    for count in (2, 3):
        images = images_for(model, count)
        with torch.no_grad():
            expected = model(images)
            close(expected, scripted(images), tol=1e-6)
            close(expected, loaded(images), tol=1e-6)
