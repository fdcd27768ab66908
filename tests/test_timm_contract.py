"""What timm, and software written for its models, expects of every model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from nets import Net, close, evaluate, random_images
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

import sdzoo

WIDTHS = (16, 32, 64)


def create(**kwargs: Any) -> Net:
    return timm.create_model("sd_resnet20", **kwargs)


@pytest.mark.parametrize("name", timm.list_models(module="sd_resnet_cifar"))
def test_the_default_cfg_fits_32_pixels(name: str) -> None:
    cfg = timm.get_pretrained_cfg(name)
    assert cfg is not None
    assert cfg.input_size == (3, 32, 32)
    assert cfg.pool_size == (8, 8)
    assert cfg.crop_pct == 1.0
    assert cfg.num_classes == 10
    assert (cfg.first_conv, cfg.classifier) == ("conv1", "fc")
    assert cfg.license == "apache-2.0"
    assert cfg.interpolation
    with torch.device("meta"):
        model: Net = timm.create_model(name)
    assert model.fc is model.get_classifier()
    assert isinstance(model.conv1, nn.Conv2d)


def test_attributes_that_timm_reads() -> None:
    model = create(num_classes=7, in_chans=5, drop_rate=0.1)
    assert (model.num_classes, model.in_chans, model.drop_rate) == (7, 5, 0.1)
    assert model.num_features == model.head_hidden_size == 64
    assert model.grad_checkpointing is False
    model.set_grad_checkpointing()
    assert model.grad_checkpointing is True
    assert model.no_weight_decay() == set()


@pytest.mark.parametrize(("num_classes", "in_chans"), [(10, 3), (100, 3), (7, 1), (1, 5)])
def test_classes_and_channels(num_classes: int, in_chans: int) -> None:
    model = create(num_classes=num_classes, in_chans=in_chans)
    assert evaluate(model, random_images(2, 32, in_chans)).shape == (2, num_classes)


def test_forward_is_the_head_of_the_features(source: Net, images: Tensor) -> None:
    with torch.no_grad():
        features = source.forward_features(images)
        pooled = source.forward_head(features, pre_logits=True)
        assert features.shape == (4, 64, 8, 8)
        close(features.mean((2, 3)), pooled, tol=1e-6)
        close(pooled @ source.fc.weight.T + source.fc.bias, source.forward_head(features), tol=1e-5)
        assert torch.equal(source.forward_head(features), source(images))


def test_no_classes_give_pooled_features(source: Net, images: Tensor) -> None:
    model = create(num_classes=0)
    model.load_state_dict(source.state_dict(), strict=False)
    assert isinstance(model.get_classifier(), nn.Identity)
    with torch.no_grad():
        close(source.forward_features(images).mean((2, 3)), evaluate(model, images), tol=1e-6)


@pytest.mark.parametrize(
    ("global_pool", "pooled"),
    [
        ("avg", lambda x: x.mean((2, 3))),
        ("max", lambda x: x.amax((2, 3))),
        ("avgmax", lambda x: (x.mean((2, 3)) + x.amax((2, 3))) / 2),
        ("catavgmax", lambda x: torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1)),
    ],
)
def test_every_pooling(global_pool: str, pooled: Callable[[Tensor], Tensor], images: Tensor) -> None:
    model = create(global_pool=global_pool).eval()
    with torch.no_grad():
        expected = pooled(model.forward_features(images)) @ model.fc.weight.T + model.fc.bias
    close(expected, evaluate(model, images), tol=1e-5)


def test_reset_classifier(images: Tensor) -> None:
    model = create()
    model.reset_classifier(5)
    assert evaluate(model, images).shape == (4, 5)
    assert model.num_classes == 5
    model.reset_classifier(4, "max")
    assert evaluate(model, images).shape == (4, 4)
    model.reset_classifier(3)
    assert model.global_pool.pool_type == "max"  # as it was
    model.reset_classifier(0)
    assert evaluate(model, images).shape == (4, 64)
    model.reset_classifier(0, "")
    assert evaluate(model, images).shape == (4, 64, 8, 8)
    assert model.num_classes == 0
    model.double().reset_classifier(2, "avg")
    assert evaluate(model, images.double()).shape == (4, 2)


def test_neither_pooling_nor_classes_leave_the_feature_map(images: Tensor) -> None:
    model = create(num_classes=0, global_pool="")
    assert torch.equal(evaluate(model, images), model.eval().forward_features(images))


def test_dropout_acts_before_the_classifier_in_training_only(images: Tensor) -> None:
    model = create(drop_rate=0.5, schedule="constant_depth")
    seen: list[Tensor] = []
    model.fc.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0]))
    model.train()(images)
    assert 0.3 < (seen[-1] == 0).float().mean() < 0.7
    model.eval()(images)
    assert (seen[-1] == 0).float().mean() < 0.1


@pytest.mark.parametrize("feature_cls", ["list", "dict", "hook", "getter", "fx"])
@pytest.mark.filterwarnings("ignore:The nodes obtained by tracing the model in train mode:UserWarning")
def test_features_only_gives_a_map_for_each_stage(feature_cls: str, images: Tensor) -> None:
    model = create(features_only=True, feature_cls=feature_cls)
    assert model.feature_info.channels() == list(WIDTHS)
    assert model.feature_info.reduction() == [1, 2, 4]
    for training in (False, True):
        out = model.train(training)(images)
        features = list(out.values()) if isinstance(out, dict) else out
        assert [tuple(feature.shape) for feature in features] == [(4, 16, 32, 32), (4, 32, 16, 16), (4, 64, 8, 8)]


@pytest.mark.parametrize("out_indices", [(0,), (1, 2), (-1,)])
def test_features_only_gives_the_stages_asked_for(out_indices: tuple[int, ...], images: Tensor) -> None:
    model = create(features_only=True, out_indices=out_indices).eval()
    assert [feature.shape[1] for feature in model(images)] == [WIDTHS[index] for index in out_indices]


@pytest.mark.parametrize("feature_cls", ["list", "dict", "hook", "getter", "fx"])
@pytest.mark.filterwarnings("ignore:The nodes obtained by tracing the model in train mode:UserWarning")
def test_features_only_draws_gates_in_every_training_step(feature_cls: str, images: Tensor) -> None:
    model = create(features_only=True, feature_cls=feature_cls, schedule="uniform").train()
    sums = set()
    with torch.no_grad():
        for _ in range(6):
            out = model(images[:, :, :8, :8])
            features = list(out.values()) if isinstance(out, dict) else out
            sums.add(tuple(float(feature.sum()) for feature in features))
    assert len(sums) > 1, "the same gates six times"


def test_forward_intermediates_are_the_stages(source: Net, images: Tensor) -> None:
    with torch.no_grad():
        final, stages = source.forward_intermediates(images)
        assert torch.equal(final, source.forward_features(images))
        assert torch.equal(stages[-1], final)
        assert [stage.shape[1] for stage in stages] == list(WIDTHS)
        (last,) = source.forward_intermediates(images, 1, intermediates_only=True)
        assert torch.equal(last, final)
        early, (first,) = source.forward_intermediates(images, [0], stop_early=True)
        assert torch.equal(early, first)
        assert torch.equal(first, stages[0])
    with pytest.raises(ValueError, match="NLC"):
        source.forward_intermediates(images, output_fmt="NLC")


def test_pruned_layers_are_gone(source: Net, images: Tensor) -> None:
    with torch.no_grad():
        expected = source.forward_intermediates(images, intermediates_only=True)[1]
    assert source.prune_intermediate_layers(2) == [1, 2]
    assert source.prune_intermediate_layers([1]) == [1]
    assert torch.equal(evaluate(source, images), expected)
    assert len(sdzoo.survival_probs(source)) == 6
    assert source.num_features == 32


@pytest.mark.parametrize(("coarse", "groups"), [(False, 1 + 9 + 1), (True, 1 + 3 + 1)])
def test_every_parameter_is_in_a_group(coarse: bool, groups: int) -> None:
    from timm.models import group_parameters

    model = create()
    grouped = group_parameters(model, model.group_matcher(coarse))
    assert len(grouped) == groups
    assert sorted(name for names in grouped.values() for name in names) == sorted(
        name for name, _ in model.named_parameters()
    )


def test_layer_decay_falls_towards_the_input() -> None:
    optimizer = create_optimizer_v2(create(), opt="sgd", lr=0.1, layer_decay=0.5)
    scales = [group["lr_scale"] for group in optimizer.param_groups]
    assert min(scales) == pytest.approx(0.5**10)
    assert max(scales) == 1.0


def test_every_parameter_decays_if_asked(source: Net) -> None:
    optimizer = create_optimizer_v2(source, opt="sgd", lr=0.1, weight_decay=0.1, filter_bias_and_bn=False)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.1}


def test_torchscript_in_evaluation(source: Net, images: Tensor) -> None:
    scripted = torch.jit.script(source)
    with torch.no_grad():
        close(evaluate(source, images), scripted(images), tol=1e-6)


def test_jit_trace_in_evaluation(source: Net, images: Tensor) -> None:
    with torch.no_grad():
        traced: Any = torch.jit.trace(source, images)
        close(evaluate(source, images), traced(images), tol=1e-6)


def test_fx_trace_in_evaluation(source: Net, images: Tensor) -> None:
    traced: Any = torch.fx.symbolic_trace(source)
    with torch.no_grad():
        close(evaluate(source, images), traced(images), tol=1e-6)
    other = copy.deepcopy(images).flip(0)[:2]
    with torch.no_grad():
        close(evaluate(source, other), traced(other), tol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_and_device_at_creation(dtype: torch.dtype) -> None:
    model = create(dtype=dtype, device="cpu")
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert model.layer1[0].gate.survival_prob.dtype == torch.float32
    meta = create(device="meta")
    assert all(tensor.is_meta for tensor in meta.state_dict().values())


def test_features_of_a_block_are_not_overwritten_by_what_follows(source: Net, images: Tensor) -> None:
    kept: list[Tensor] = []
    copies: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: tuple[Tensor, ...], out: Tensor) -> None:
        kept.append(out)
        copies.append(out.detach().clone())

    for stage in (source.layer1, source.layer2, source.layer3):
        for block in stage:
            block.register_forward_hook(keep)
    source.train()
    with sdzoo.fixed_gates(source, [1, 0, 0, 0, 1, 0, 1, 0, 0]):
        source(images)
    assert len(kept) == 9
    assert all(torch.equal(a, b) for a, b in zip(kept, copies, strict=True))
