"""By which tensors a branch scales, told from what it ends in.

The norm, LayerScale or linear layer at the end is multiplied by c. A channel attention behind the norm reads the mean
of what it weights: the weights that read it are divided by c, so that its output stays as it was.
"""

from __future__ import annotations

from timm.layers import (
    Attention,
    CecaModule,
    Conv2dSame,
    DiffAttention,
    EcaModule,
    EffectiveSEModule,
    GlobalResponseNormMlp,
    GluMlp,
    GroupNorm,
    GroupNorm1,
    LayerNorm,
    LayerNorm2d,
    LayerScale,
    Mlp,
    RmsNorm,
    RmsNorm2d,
    SEModule,
    SwiGLU,
)
from timm.layers.norm_act import BatchNormAct2d, FrozenBatchNormAct2d, GroupNormAct, LayerNormAct2d, SyncBatchNormAct
from torch import nn
from torchvision.ops.misc import FrozenBatchNorm2d

from sdzoo.errors import InputError

Scale = dict[str, int]  # the power of c by which each tensor is multiplied so that the branch is multiplied by c

# By type and not isinstance: a subclass may compute something else of the same weights.
NORMS = (
    *(nn.BatchNorm2d, nn.SyncBatchNorm, FrozenBatchNorm2d, nn.GroupNorm, nn.LayerNorm, GroupNorm, GroupNorm1),
    *(LayerNorm, LayerNorm2d, RmsNorm, RmsNorm2d),
)
NORMS_WITH_ACT = (BatchNormAct2d, SyncBatchNormAct, FrozenBatchNormAct2d, GroupNormAct, LayerNormAct2d)
LINEARS = (nn.Linear, nn.Conv2d, Conv2dSame)
LAST_LINEAR: dict[type[nn.Module], str] = {
    Attention: "proj",
    DiffAttention: "proj",
    Mlp: "fc2",
    GluMlp: "fc2",
    SwiGLU: "fc2",
    GlobalResponseNormMlp: "fc2",
}
READS_THE_MEAN: dict[type[nn.Module], str] = {
    SEModule: "fc1.weight",
    EffectiveSEModule: "fc.weight",
    EcaModule: "conv.weight",
    CecaModule: "conv.weight",
}


def class_name(module: type[nn.Module]) -> str:
    """Return how errors name a class: ``resnet.Bottleneck``."""
    return f"{module.__module__.rpartition('.')[2]}.{module.__name__}"


def norm_scale(block: nn.Module, name: str) -> Scale:
    """Return the affine of the norm ``name`` of ``block``.

    Raises:
        InputError: naming the classes, if it is no norm whose affine comes last.
    """
    norm = block.get_submodule(name)
    comes_last = type(norm) in NORMS or (type(norm) in NORMS_WITH_ACT and isinstance(norm.act, nn.Identity))
    if not comes_last or getattr(norm, "weight", None) is None:
        raise _cannot_scale(block, name, norm)
    return _weight_and_bias(norm, name)


def gamma_scale(block: nn.Module, name: str) -> Scale:
    """Return gamma of the LayerScale ``name`` of ``block``.

    Raises:
        InputError: naming the classes, if it is none.
    """
    module = block.get_submodule(name)
    if type(module) is not LayerScale:
        raise _cannot_scale(block, name, module)
    return {f"{name}.gamma": 1}


def linear_scale(block: nn.Module, name: str) -> Scale:
    """Return weight and bias of the linear layer or convolution ``name`` of ``block``, or of the one that ends it.

    Raises:
        InputError: naming the classes, if it is neither.
    """
    module = block.get_submodule(name)
    if type(module) in LAST_LINEAR:
        return linear_scale(block, f"{name}.{LAST_LINEAR[type(module)]}")
    if type(module) not in LINEARS:
        raise _cannot_scale(block, name, module)
    return _weight_and_bias(module, name)


def attention_scale(block: nn.Module, name: str) -> Scale:
    """Return the inverse for what the channel attention ``name`` of ``block`` reads the mean with; nothing if none.

    Raises:
        InputError: naming the classes, if it is another kind of attention.
    """
    module = block._modules.get(name)
    if module is None or isinstance(module, nn.Identity):
        return {}
    if type(module) not in READS_THE_MEAN:
        raise _cannot_scale(block, name, module)
    return {f"{name}.{READS_THE_MEAN[type(module)]}": -1}


def _weight_and_bias(module: nn.Module, name: str) -> Scale:
    return {f"{name}.{part}": 1 for part in ("weight", "bias") if getattr(module, part, None) is not None}


def _cannot_scale(block: nn.Module, name: str, module: nn.Module) -> InputError:
    stock = next((cls for cls in type(block).__mro__ if cls.__module__.startswith("timm.")), type(block))
    kind = type(module).__name__
    return InputError(f"{class_name(stock)}: its branch ends in {kind} ({name}), which cannot be scaled exactly")
