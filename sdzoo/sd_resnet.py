"""ResNets for 224-pixel images: timm's ResNet with gates around its own blocks, registered with timm.

The weights are timm's of the same network, from the Hub; they load through the rule of all weights without survival
probabilities, so the evaluation function is the stock model's, whatever the schedule.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from timm.models import DefaultCfg, register_model
from timm.models import resnet as timm_resnet
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import nn

from sdzoo.builder import SURVIVAL_SETTINGS, build
from sdzoo.errors import InputError
from sdzoo.gate import gates
from sdzoo.stochastic_depth import add_gates, remove_gates

PREFIX = "sd_"
NETWORKS: dict[str, dict[str, Any]] = {
    "resnet18": {"block": BasicBlock, "layers": (2, 2, 2, 2)},
    "resnet34": {"block": BasicBlock, "layers": (3, 4, 6, 3)},
    "resnet50": {"block": Bottleneck, "layers": (3, 4, 6, 3)},
    "resnet101": {"block": Bottleneck, "layers": (3, 4, 23, 3)},
    "resnet152": {"block": Bottleneck, "layers": (3, 8, 36, 3)},
    "resnext50_32x4d": {"block": Bottleneck, "layers": (3, 4, 6, 3), "cardinality": 32, "base_width": 4},
    "wide_resnet50_2": {"block": Bottleneck, "layers": (3, 4, 6, 3), "base_width": 128},
    "seresnet50": {"block": Bottleneck, "layers": (3, 4, 6, 3), "block_args": {"attn_layer": "se"}},
}


class SDResNet(ResNet):
    """timm's ResNet with stochastic depth: a dropped block is not computed.

    Args:
        args: timm's.
        drop_path_rate: timm's word for 1 - p_L.
        schedule: ``linear_decay`` (default), ``uniform`` or ``constant_depth``; ``stagewise`` with four
            ``survival_probs``; or p_l of every block.
        survival_probs: p_l of every block, instead of the two above. If none of the three is given, a checkpoint's own
            probabilities replace the default (linear decay to 0.5); else the given ones stay and the weights are
            rescaled as they load, so that the evaluation function is the checkpoint's.
        mode: ``"batch"`` skips whole blocks per mini-batch; ``"sample"`` masks per sample.
        kwargs: timm's.

    Raises:
        InputError: on survival settings that contradict each other or leave (0, 1].
    """

    def __init__(
        self,
        *args: Any,
        drop_path_rate: float | None = None,
        schedule: str | Sequence[float] | None = None,
        survival_probs: Sequence[float] | None = None,
        mode: str = "batch",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        add_gates(self, drop_path_rate, schedule, survival_probs, mode)


def to_timm(model: nn.Module) -> nn.Module:
    """Return a plain timm model with the evaluation function of ``model``: p is in the last norm of each branch.

    Its checkpoint loads where sdzoo is not installed. It trains at constant depth. ``model`` is left alone.

    Raises:
        InputError: if ``model`` is in training mode, has no gates, or has blocks that timm does not have.
    """
    gates(model)
    if type(model) is not SDResNet and any(cls.__module__.startswith("sdzoo.") for cls in type(model).__mro__):
        raise InputError(f"timm has no network like sdzoo's own {type(model).__name__}")
    stock: Any = copy.deepcopy(model)
    remove_gates(stock)
    if type(model) is SDResNet:
        stock.__class__ = ResNet
        created_with = getattr(stock, "_model_args", {})  # timm's record, which goes into config.json
        stock._model_args = {name: v for name, v in created_with.items() if name not in (*SURVIVAL_SETTINGS, "mode")}
        cfg = getattr(stock, "pretrained_cfg", {})
        stock.pretrained_cfg = {**cfg, "architecture": str(cfg.get("architecture")).removeprefix(PREFIX)} if cfg else {}
        stock.default_cfg = stock.pretrained_cfg
    return stock


def _with_timms_weights(name: str) -> DefaultCfg:
    """Return the configurations of timm's network ``name``: their weights are those of timm's Hub repositories."""
    stock: DefaultCfg = timm_resnet.default_cfgs[name]
    cfgs = {
        tag: replace(cfg, url=None, hf_hub_id=f"timm/{name}.{tag}", hf_hub_filename="model.safetensors")
        for tag, cfg in stock.cfgs.items()
        if cfg.hf_hub_id
    }
    return DefaultCfg(tags=type(stock.tags)(tag for tag in stock.tags if tag in cfgs), cfgs=cfgs, is_pretrained=True)


default_cfgs = {PREFIX + name: _with_timms_weights(name) for name in NETWORKS}


def _create(name: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    return build(SDResNet, PREFIX + name, pretrained, (0, 1, 2, 3, 4), **(NETWORKS[name] | kwargs))


@register_model
def sd_resnet18(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Return ResNet-18, 8 basic blocks."""
    return _create("resnet18", pretrained, **kwargs)


@register_model
def sd_resnet34(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Return ResNet-34, 16 basic blocks."""
    return _create("resnet34", pretrained, **kwargs)


@register_model
def sd_resnet50(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Return ResNet-50, 16 bottlenecks."""
    return _create("resnet50", pretrained, **kwargs)


@register_model
def sd_resnet101(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Return ResNet-101, 33 bottlenecks."""
    return _create("resnet101", pretrained, **kwargs)


@register_model
def sd_resnet152(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Return ResNet-152, 50 bottlenecks."""
    return _create("resnet152", pretrained, **kwargs)


@register_model
def sd_resnext50_32x4d(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Return ResNeXt-50, 32 groups of 4 channels, 16 bottlenecks."""
    return _create("resnext50_32x4d", pretrained, **kwargs)


@register_model
def sd_wide_resnet50_2(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Return Wide ResNet-50-2, 16 bottlenecks of twice the inner width."""
    return _create("wide_resnet50_2", pretrained, **kwargs)


@register_model
def sd_seresnet50(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Return SE-ResNet-50, 16 bottlenecks that end in squeeze and excitation."""
    return _create("seresnet50", pretrained, **kwargs)
