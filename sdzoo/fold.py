r"""Folding: a model in evaluation without gates, and without BatchNorm.

With ``y = gamma (W x - mu) / sigma + beta`` a convolution and its BatchNorm, and the branch's output weighted by p::

    W' = p gamma W / sigma        b' = p (beta - mu gamma / sigma)        sigma = sqrt(var + eps)

p is 1 for every pair but the last of a residual branch, and never touches the shortcut. Weighting the branch is the
block's own ``scale_branch_``; this module knows the pair. A BatchNorm that no convolution feeds (the first of a
pre-activation block) becomes a scale and a shift per channel. The arithmetic is in float64, whatever the model's dtype.
"""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from typing import TypeVar

import torch
from timm.layers import BatchNormAct2d, SyncBatchNormAct
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sdzoo.errors import InputError

Model = TypeVar("Model", bound=nn.Module)

# By type and not isinstance: a subclass may normalise in another way, or standardise its weight.
BATCHNORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, BatchNormAct2d, SyncBatchNormAct)


class ScaleShift(nn.Module):
    """``act(weight * x + bias)`` per channel: what is left of a BatchNorm that no convolution feeds."""

    def __init__(self, weight: Tensor, bias: Tensor, act: nn.Module) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight[:, None, None])
        self.bias = nn.Parameter(bias[:, None, None])
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(B, C, H, W)`` for ``x`` ``(B, C, H, W)``."""
        return self.act(x * self.weight + self.bias)


def fuse_conv_bn(conv: nn.Module, bn: nn.Module) -> nn.Conv2d:
    """Return the convolution, with bias, that computes ``bn(conv(x))`` in evaluation, without bn's activation.

    Raises:
        InputError: if the pair is not Conv2d and BatchNorm2d with running statistics, or is in training mode.
    """
    if type(conv) is not nn.Conv2d:
        raise InputError(f"cannot fold {type(conv).__name__} with {type(bn).__name__}; only Conv2d with BatchNorm2d")
    scale, shift = scale_and_shift(bn)
    bias = torch.zeros_like(shift) if conv.bias is None else conv.bias.detach().double()
    folded = copy.deepcopy(conv)
    weight = conv.weight.detach().double() * scale[:, None, None, None]
    folded.weight = nn.Parameter(weight.to(conv.weight.dtype))
    folded.bias = nn.Parameter((bias * scale + shift).to(conv.weight.dtype))
    return folded


@torch.no_grad()
def scale_and_shift(bn: nn.Module) -> tuple[Tensor, Tensor]:
    """Return ``gamma / sigma`` and ``beta - mu gamma / sigma`` of a BatchNorm in evaluation, ``(C,)``, float64.

    Raises:
        InputError: if it is no BatchNorm2d with running statistics, or is in training mode.
    """
    if type(bn) not in BATCHNORMS:
        raise InputError(f"cannot fold {type(bn).__name__}; only BatchNorm2d")
    assert isinstance(bn, _BatchNorm)
    check_evaluation(bn)
    if bn.running_mean is None or bn.running_var is None:
        raise InputError("cannot fold a BatchNorm without running statistics")
    mu, var = bn.running_mean.double(), bn.running_var.double()
    gamma = torch.ones_like(mu) if bn.weight is None else bn.weight.double()
    beta = torch.zeros_like(mu) if bn.bias is None else bn.bias.double()
    scale = gamma / torch.sqrt(var + bn.eps)
    return scale, beta - mu * scale


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
    """Return a new model that computes the evaluation function of ``model`` without gates and without BatchNorm.

    ``model`` is left alone. The result has no survival probabilities: they are in the weights. Other norms stay, with p
    in the affine that ends the branch, and a warning counts them.

    Raises:
        InputError: if ``model`` or a part of it is in training mode, or a BatchNorm cannot be folded.
    """
    check_evaluation(model)
    folded = copy.deepcopy(model)
    for module in folded.modules():
        if callable(absorb := getattr(module, "absorb_gates_", None)):
            absorb()
    fold_batchnorms(folded)
    kept = Counter(type(module).__name__ for module in folded.modules() if _is_norm(module))
    if kept:
        names = ", ".join(f"{count} {name}" for name, count in kept.items())
        warnings.warn(f"fold keeps {names}: only BatchNorm becomes part of a convolution", stacklevel=2)
    return folded.eval()


def _is_norm(module: nn.Module) -> bool:
    has_tensors = any(True for _ in (*module.parameters(recurse=False), *module.buffers(recurse=False)))
    return has_tensors and "Norm" in type(module).__name__


def fold_batchnorms(model: nn.Module) -> None:
    """Replace every BatchNorm of ``model``, in evaluation and in place, by what it does to the convolution before it.

    Where no convolution feeds it alone, a :class:`ScaleShift` stays in its place.

    Raises:
        InputError: if one cannot be folded.
    """
    if not any(isinstance(module, _BatchNorm) for module in model.modules()):
        return
    graph = _BatchNormTracer().trace(model)
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    for node in graph.nodes:
        norm = model.get_submodule(node.target) if node.op == "call_module" else None
        if not isinstance(norm, _BatchNorm):
            continue
        act = getattr(norm, "act", nn.Identity()).eval()
        source = node.args[0]
        while _is_identity(model, source):
            source = source.args[0]
        conv = model.get_submodule(source.target) if source.op == "call_module" else None
        if type(conv) is nn.Conv2d and calls[source.target] == calls[node.target] == len(source.users) == 1:
            model.set_submodule(source.target, fuse_conv_bn(conv, norm))
            model.set_submodule(node.target, act)
        else:
            weight, bias = (tensor.to(_dtype(norm)) for tensor in scale_and_shift(norm))
            model.set_submodule(node.target, ScaleShift(weight, bias, act).eval())


def _is_identity(model: nn.Module, node: fx.Node) -> bool:
    is_module = node.op == "call_module" and isinstance(model.get_submodule(str(node.target)), nn.Identity)
    return is_module and len(node.users) == 1


class _BatchNormTracer(fx.Tracer):
    """Looks into a module only if there is a BatchNorm in it."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, _BatchNorm) or not any(isinstance(child, _BatchNorm) for child in m.modules())


def _dtype(norm: _BatchNorm) -> torch.dtype:
    return norm.weight.dtype if norm.weight is not None else torch.get_default_dtype()
