from __future__ import annotations

import copy
import time
from typing import Any

import pytest
import timm
import torch
from nets import Net, calibrated, close, evaluate, plain_forward, random_images, randomise_batchnorm, stored_probs
from timm.layers import StdConv2d
from timm.utils.model import reparameterize_model
from torch import Tensor, nn

import sdzoo
from sdzoo.blocks import PoolPadShortcut
from sdzoo.errors import InputError
from sdzoo.fold import fuse_conv_bn
from sdzoo.gate import OpenGate

# What computes in a folded net; all else is a container.
ALLOWED = (nn.Conv2d, nn.ReLU, nn.Identity, nn.Linear, nn.AdaptiveAvgPool2d, nn.Flatten, nn.Dropout)
ALLOWED += (PoolPadShortcut, OpenGate)


def leaves(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if not list(module.children())]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_pair_folds_to_its_equation(groups: int, affine: bool, bias: bool) -> None:
    conv = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=groups, bias=bias).double()
    bn = nn.BatchNorm2d(6, eps=1e-2, affine=affine).double().eval()
    assert bn.running_mean is not None
    assert bn.running_var is not None
    bn.running_mean.normal_()
    bn.running_var.uniform_(0.5, 2)
    if affine:
        nn.init.uniform_(bn.weight, -1, 1)
        nn.init.normal_(bn.bias)
    folded = fuse_conv_bn(conv, bn)
    gamma, beta = (bn.weight, bn.bias) if affine else (torch.ones(6).double(), torch.zeros(6).double())
    sigma = torch.sqrt(bn.running_var + 1e-2)
    start = conv.bias if conv.bias is not None else 0
    close(conv.weight * (gamma / sigma)[:, None, None, None], folded.weight, tol=1e-12)
    assert folded.bias is not None
    close((start - bn.running_mean) * gamma / sigma + beta, folded.bias, tol=1e-12)
    x = random_images(2, 9, 4).double()
    close(bn(conv(x)), folded(x), tol=1e-12)


@pytest.mark.parametrize(
    ("conv", "norm", "message"),
    [
        (nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4), "cannot fold GroupNorm"),
        (nn.Linear(4, 4), nn.BatchNorm2d(4), "cannot fold Linear with BatchNorm2d"),
        (nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), "without running statistics"),
        (StdConv2d(4, 4, 3), nn.BatchNorm2d(4), "StdConv2d"),  # standardises its weight: a folded scale would be lost
    ],
)
def test_a_pair_that_has_no_such_equation_is_refused_by_class_name(
    conv: nn.Module, norm: nn.Module, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        fuse_conv_bn(conv.eval(), norm.eval())


def test_a_pair_in_training_is_refused() -> None:
    with pytest.raises(InputError, match=r"call model.eval\(\) first"):
        fuse_conv_bn(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4).train())


@pytest.mark.parametrize(("dtype", "tol"), [(torch.float32, 1e-4), (torch.float64, 1e-10)])
@pytest.mark.parametrize("arch", ["sd_resnet20", "sd_resnet110"])
def test_a_folded_net_computes_the_papers_evaluation(arch: str, dtype: torch.dtype, tol: float) -> None:
    model, images = calibrated(arch, images=random_images(8, 16)).to(dtype), random_images(4, 16).to(dtype)
    state, folded = model.state_dict(), sdzoo.fold(model)
    expected = plain_forward(state, images, stored_probs(state))
    ungated = plain_forward(state, images, [1.0] * len(stored_probs(state)))
    assert (expected - ungated).abs().max() > 0.01 * expected.abs().max()
    close(expected, evaluate(folded, images), tol=tol)


def test_1202_layers_fold() -> None:
    small = random_images(4, 8)
    model = calibrated("sd_resnet1202", images=small)
    before = time.perf_counter()
    folded = sdzoo.fold(model)
    assert time.perf_counter() - before < 60
    expected = evaluate(model, small)
    assert expected.std() > 0
    close(expected, evaluate(folded, small), tol=1e-4)
    assert sum(isinstance(module, nn.Conv2d) for module in folded.modules()) == 1201


def test_a_folded_net_holds_only_what_an_export_knows(source: Net) -> None:
    folded = sdzoo.fold(source)
    assert {type(module).__name__ for module in leaves(folded) if not isinstance(module, ALLOWED)} == set()
    assert all(conv.bias is not None for conv in leaves(folded) if isinstance(conv, nn.Conv2d))
    assert set(folded.state_dict()) == {
        f"{name}.{kind}"
        for name in ["conv1", "fc", *(f"layer{s}.{b}.conv{c}" for s in (1, 2, 3) for b in range(3) for c in (1, 2))]
        for kind in ("weight", "bias")
    }
    assert not list(folded.buffers())


def test_the_shortcut_is_not_weighted(source: Net, images: Tensor) -> None:
    for name, parameter in source.named_parameters():
        if "bn2" in name:
            nn.init.zeros_(parameter)
    without_branches = plain_forward(source.state_dict(), images, [0] * 9)
    close(without_branches, evaluate(sdzoo.fold(source), images), tol=1e-5)


def test_folding_leaves_its_argument_alone(source: Net, images: Tensor) -> None:
    before, logits = copy.deepcopy(source.state_dict()), evaluate(source, images)
    folded = sdzoo.fold(source)
    for parameter in folded.parameters():
        nn.init.zeros_(parameter)
    assert source.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in source.state_dict().items())
    assert torch.equal(evaluate(source, images), logits)


def test_folding_twice_is_folding_once(source: Net, images: Tensor) -> None:
    once = sdzoo.fold(source)
    assert torch.equal(evaluate(sdzoo.fold(once), images), evaluate(once, images))


@pytest.mark.parametrize("part", ["", "layer2.1", "bn1", "layer3.2.bn2", "layer1.0.gate"])
def test_training_mode_is_refused_also_of_a_part(part: str, source: Net) -> None:
    source.get_submodule(part).train()
    with pytest.raises(InputError, match=r"is in training mode.*: call model.eval\(\) first"):
        sdzoo.fold(source)


def test_a_norm_that_is_no_batchnorm_stays_with_p_in_its_affine(images: Tensor) -> None:
    model = timm.create_model("sd_resnet20", norm_layer="groupnorm1").eval()
    with pytest.warns(UserWarning, match="fold keeps 19 GroupNorm1"):
        folded = sdzoo.fold(model)
    close(evaluate(model, images), evaluate(folded, images), tol=1e-4)
    close(0.5 * model.state_dict()["layer3.2.bn2.weight"], folded.state_dict()["layer3.2.bn2.weight"], tol=1e-6)


@pytest.mark.parametrize(("dtype", "tol"), [(torch.float32, 1e-4), (torch.float64, 1e-10)])
def test_timms_reparameterize_folds_the_blocks_and_leaves_the_stem(
    dtype: torch.dtype, tol: float, source: Net, images: Tensor
) -> None:
    source, images = source.to(dtype), images.to(dtype)
    folded = reparameterize_model(source)
    close(evaluate(source, images), evaluate(folded, images), tol=tol)
    assert [name for name, module in folded.named_modules() if isinstance(module, nn.BatchNorm2d)] == ["bn1"]
    assert [name for name, module in source.named_modules() if isinstance(module, nn.BatchNorm2d)] != ["bn1"]
    completed = sdzoo.fold(folded)
    close(evaluate(source, images), evaluate(completed, images), tol=tol)
    assert not [module for module in completed.modules() if isinstance(module, nn.BatchNorm2d)]


def test_timms_reparameterize_refuses_training_mode(source: Net) -> None:
    with pytest.raises(InputError, match="training mode"):
        reparameterize_model(source.train())


@pytest.mark.parametrize("feature_cls", ["list", "dict"])
def test_a_feature_extractor_folds(feature_cls: str, source: Net, images: Tensor) -> None:
    model = timm.create_model("sd_resnet20", features_only=True, feature_cls=feature_cls).eval()
    model.load_state_dict({name: value for name, value in source.state_dict().items() if not name.startswith("fc.")})
    folded = sdzoo.fold(model)
    assert not [module for module in folded.modules() if isinstance(module, nn.BatchNorm2d)]
    with torch.no_grad():
        expected, out = source.forward_intermediates(images, intermediates_only=True), folded(images)
    for a, b in zip(expected, out.values() if isinstance(out, dict) else out, strict=True):
        close(a, b, tol=1e-4)


def test_a_folded_net_can_be_scripted(source: Net, images: Tensor) -> None:
    folded = sdzoo.fold(source)
    scripted = torch.jit.script(folded)
    close(evaluate(source, images), scripted(images), tol=1e-4)


@pytest.mark.parametrize("kwargs", [{"num_classes": 0}, {"num_classes": 0, "global_pool": ""}, {"mode": "sample"}])
def test_other_forms_of_the_model_fold(kwargs: dict[str, Any], images: Tensor) -> None:
    model = calibrated("sd_resnet20", **kwargs)
    close(evaluate(model, images), evaluate(sdzoo.fold(model), images), tol=1e-4)


def test_defaults_would_hide_a_wrong_fold(images: Tensor) -> None:
    # why the nets above are randomised: forgetting mu and beta changes nothing in a fresh BatchNorm
    conv, fresh, random = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4).eval(), nn.BatchNorm2d(4).eval()
    randomise_batchnorm(random)
    for bn, hidden in ((fresh, True), (random, False)):
        right, wrong = fuse_conv_bn(conv, bn), fuse_conv_bn(conv, bn)
        assert wrong.bias is not None
        nn.init.zeros_(wrong.bias)
        assert torch.allclose(right(images), wrong(images)) is hidden
