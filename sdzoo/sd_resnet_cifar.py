"""ResNets for 32-pixel images whose blocks end in ReLU, registered with timm.

The paper's: 6n + 2 layers, three stages of n basic blocks at widths 16, 32 and 64 (He et al., 2015, section 4.2;
shortcuts as in the code of Huang et al., 2016). And ResNeXt-29 (Xie et al., 2017, section 5.3).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from timm.models import generate_default_cfgs, register_model, resolve_pretrained_cfg
from timm.models._features_fx import register_notrace_module
from timm.models.resnet import Bottleneck, downsample_conv
from torch import nn

from sdzoo import weights
from sdzoo.blocks import SHORTCUTS, BasicBlock
from sdzoo.builder import build
from sdzoo.cifar_resnet import CifarResNet, cifar_cfg
from sdzoo.errors import InputError, nearest

register_notrace_module(BasicBlock)  # tracing into it would freeze one draw of its gate

CIFAR10_LABELS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


class SDResNetCifar(CifarResNet):
    """The paper's network: 6n + 2 layers of basic blocks, shortcuts without parameters.

    Args:
        blocks_per_stage: n.
        shortcut: ``"pool"``, the authors'; or ``"subsample"``, which most published CIFAR weights were trained with:
            those load as they are, names included (:func:`from_literature_names`).
        kwargs: As :class:`CifarResNet`.

    Raises:
        InputError: if there is no such shortcut, and as :class:`CifarResNet` does.
    """

    init_mode: ClassVar[str] = "fan_in"

    def __init__(self, blocks_per_stage: int, shortcut: str = "pool", **kwargs: Any) -> None:
        if shortcut not in SHORTCUTS:
            known = ", ".join(SHORTCUTS)
            raise InputError(f'shortcut is "{shortcut}"; known: {known}{nearest(str(shortcut), SHORTCUTS)}')
        super().__init__(blocks_per_stage, (16, 32, 64), shortcut=shortcut, **kwargs)
        self.shortcut = shortcut

    def block(self, in_chans: int, out_chans: int, stride: int, act: Any, norm: Any, **kwargs: Any) -> nn.Module:
        """Return a basic block without a gate."""
        return BasicBlock(in_chans, out_chans, None, act, norm, **kwargs)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:  # type: ignore[override]
        renamed = from_literature_names({name.removeprefix(prefix): name for name in state_dict})
        if f"{prefix}linear.weight" in state_dict and self.shortcut != "subsample":
            args[-1].append(
                'the weights name their classifier "linear", as those of networks with subsampling shortcuts do:'
                ' create the model with shortcut="subsample"'
            )
        elif self.shortcut == "subsample":
            for name, old in renamed.items():
                state_dict[prefix + name] = state_dict.pop(old)
        super()._load_from_state_dict(state_dict, prefix, *args)


def from_literature_names(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``state_dict`` with the names of this family.

    The CIFAR ResNets in circulation name all else alike (``conv1, bn1, layer{1,2,3}.i.{conv1,bn1,conv2,bn2}``); their
    classifier is ``linear`` and here it is ``fc``.
    """
    return {("fc" + name[6:] if name.startswith("linear.") else name): value for name, value in state_dict.items()}


class SDResNeXtCifar(CifarResNet):
    """ResNeXt-29 for 32-pixel images: aggregated bottlenecks, projecting shortcuts."""

    stem_width: ClassVar[int] = 64

    def block(self, in_chans: int, out_chans: int, stride: int, act: Any, norm: Any, **kwargs: Any) -> nn.Module:
        """Return timm's bottleneck."""
        dd: dict[str, Any] = {name: kwargs.get(name) for name in ("device", "dtype")}
        project = stride != 1 or in_chans != out_chans
        shortcut = downsample_conv(in_chans, out_chans, 1, stride, norm_layer=norm, **dd) if project else None
        return Bottleneck(in_chans, out_chans // 4, stride, shortcut, act_layer=act, norm_layer=norm, **kwargs)


default_cfgs = generate_default_cfgs(
    {
        "sd_resnet20.cifar10_jpeg": cifar_cfg(
            file=str(weights.path("sd_resnet20.cifar10_jpeg")), label_names=CIFAR10_LABELS
        ),
        "sd_resnet32": cifar_cfg(),
        "sd_resnet44": cifar_cfg(),
        "sd_resnet56": cifar_cfg(),
        "sd_resnet110": cifar_cfg(),
        "sd_resnet152_cifar": cifar_cfg(),
        "sd_resnet1202": cifar_cfg(),
        "sd_resnext29_8x64": cifar_cfg(),
    }
)


def _rename(state_dict: Mapping[str, Any], model: SDResNetCifar) -> Mapping[str, Any]:
    # Left as they are, literature's names are refused by a network with the other shortcuts.
    return from_literature_names(state_dict) if model.shortcut == "subsample" else state_dict


def _create(variant: str, blocks_per_stage: int, pretrained: bool, **kwargs: Any) -> nn.Module:
    if pretrained and kwargs.get("shortcut", "pool") != "pool":
        cfg = resolve_pretrained_cfg(variant, kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay"))
        if weights.ship_at(cfg.file):
            raise InputError(f'the weights that ship for {variant} were trained with shortcut="pool"')
    return build(
        SDResNetCifar,
        variant,
        pretrained,
        (0, 1, 2),
        _rename,
        blocks_per_stage=blocks_per_stage,
        **kwargs,
    )


@register_model
def sd_resnet20(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Return the 20-layer network, 9 blocks."""
    return _create("sd_resnet20", 3, pretrained, **kwargs)


@register_model
def sd_resnet32(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Return the 32-layer network, 15 blocks."""
    return _create("sd_resnet32", 5, pretrained, **kwargs)


@register_model
def sd_resnet44(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Return the 44-layer network, 21 blocks."""
    return _create("sd_resnet44", 7, pretrained, **kwargs)


@register_model
def sd_resnet56(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Return the 56-layer network, 27 blocks."""
    return _create("sd_resnet56", 9, pretrained, **kwargs)


@register_model
def sd_resnet110(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Return the 110-layer network, 54 blocks: the paper's main one."""
    return _create("sd_resnet110", 18, pretrained, **kwargs)


@register_model
def sd_resnet152_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Return the 152-layer network, 75 blocks: the paper's for SVHN."""
    return _create("sd_resnet152_cifar", 25, pretrained, **kwargs)


@register_model
def sd_resnet1202(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Return the 1202-layer network, 600 blocks."""
    return _create("sd_resnet1202", 200, pretrained, **kwargs)


@register_model
def sd_resnext29_8x64(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Return ResNeXt-29, 8 groups of 64 channels, 9 blocks."""
    widths = {"blocks_per_stage": 3, "widths": (256, 512, 1024), "cardinality": 8, "base_width": 64}
    return build(SDResNeXtCifar, "sd_resnext29_8x64", pretrained, (0, 1, 2), **(widths | kwargs))
