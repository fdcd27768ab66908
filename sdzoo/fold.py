r"""Folding: a model in evaluation as convolutions, ReLUs and additions alone.

With ``y = gamma (W x - mu) / sigma + beta`` a convolution and its BatchNorm, and the branch's output weighted by p::

    W' = p gamma W / sigma        b' = p (beta - mu gamma / sigma)        sigma = sqrt(var + eps)

p is 1 for every pair but the last of a residual branch, and never touches the shortcut. Weighting the branch is the
block's own ``scale_branch_``; this module knows the pair. The arithmetic is in float64, whatever the model's dtype.
"""

from __future__ import annotations

import copy
import itertools
from typing import TypeVar

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from sdzoo.errors import InputError
from sdzoo.gate import Gate

Model = TypeVar("Model", bound=nn.Module)


@torch.no_grad()
def fuse_conv_bn(conv: nn.Module, bn: nn.Module) -> nn.Conv2d:
    """Return the convolution, with bias, that computes ``bn(conv(x))`` in evaluation.

    Raises:
        InputError: if the pair is not Conv2d and BatchNorm2d with running statistics, or is in training mode.
    """
    # By type and not isinstance: a subclass may standardise its weight or end in an activation.
    if type(conv) is not nn.Conv2d or type(bn) not in (nn.BatchNorm2d, nn.SyncBatchNorm):
        raise InputError(f"cannot fold {type(conv).__name__} with {type(bn).__name__}; only Conv2d with BatchNorm2d")
    assert isinstance(conv, nn.Conv2d)
    assert isinstance(bn, _BatchNorm)
    check_evaluation(bn)
    if bn.running_mean is None or bn.running_var is None:
        raise InputError("cannot fold a BatchNorm without running statistics")
    mu, var = bn.running_mean.double(), bn.running_var.double()
    gamma = torch.ones_like(mu) if bn.weight is None else bn.weight.double()
    beta = torch.zeros_like(mu) if bn.bias is None else bn.bias.double()
    scale = gamma / torch.sqrt(var + bn.eps)
    bias = torch.zeros_like(mu) if conv.bias is None else conv.bias.double()

    folded = copy.deepcopy(conv)
    folded.weight = nn.Parameter((conv.weight.double() * scale[:, None, None, None]).to(conv.weight.dtype))
    folded.bias = nn.Parameter((beta + (bias - mu) * scale).to(conv.weight.dtype))
    return folded


def check_evaluation(model: nn.Module) -> None:
    """Check that ``model`` and everything in it is in evaluation mode.

    Raises:
        InputError: naming the first part in training mode.
    """
    training = [name for name, module in model.named_modules() if module.training]
    if training:
        part = f" ({training[0]})" if training[0] else ""
        raise InputError(f"{type(model).__name__} is in training mode{part}: call model.eval() first")


def fold(model: Model) -> Model:
    """Return a new model that computes the evaluation function of ``model`` without BatchNorm and without gates.

    ``model`` is left alone. The result has no survival probabilities: they are in the weights.

    Raises:
        InputError: if ``model`` or a part of it is in training mode, or a BatchNorm has no convolution to fold into.
    """
    check_evaluation(model)
    folded = copy.deepcopy(model)
    for module in list(folded.modules()):
        if callable(fuse := getattr(module, "fuse", None)):
            fuse()
    _fuse_stem(folded)
    left = [name for name, module in folded.named_modules() if isinstance(module, (_BatchNorm, Gate))]
    if left:
        raise InputError(f"cannot fold {type(model).__name__}: no convolution to fold {', '.join(left)} into")
    return folded.eval()


def _fuse_stem(model: nn.Module) -> None:
    # A model's children stand in call order (timm's features_only relies on it), so a neighbour is what feeds the norm.
    children = list(model.named_children())
    for (conv_name, conv), (bn_name, bn) in itertools.pairwise(children):
        if isinstance(conv, nn.Conv2d) and isinstance(bn, _BatchNorm):
            setattr(model, conv_name, fuse_conv_bn(conv, bn))
            setattr(model, bn_name, nn.Identity())
