"""timm's own networks to test against: randomised, and with the branches of their blocks weighted by hand."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

import timm
import torch
from nets import Net, random_images
from timm.models import convnext, regnet, resnet, resnetv2, vision_transformer
from timm.models.vision_transformer import ResPostBlock, VisionTransformer
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

# What timm multiplies a branch with, for each of its blocks.
DROP_PATHS: dict[type[nn.Module], tuple[str, ...]] = {
    resnet.BasicBlock: ("drop_path",),
    resnet.Bottleneck: ("drop_path",),
    regnet.Bottleneck: ("drop_path",),
    regnet.PreBottleneck: ("drop_path",),
    resnetv2.PreActBasic: ("drop_path",),
    resnetv2.PreActBottleneck: ("drop_path",),
    resnetv2.Bottleneck: ("drop_path",),
    convnext.ConvNeXtBlock: ("drop_path",),
    vision_transformer.Block: ("drop_path1", "drop_path2"),
    vision_transformer.ResPostBlock: ("drop_path1", "drop_path2"),
}


# What runs, and what learns, when the branch is skipped.
ALWAYS: dict[type[nn.Module], tuple[str, ...]] = {
    resnet.BasicBlock: ("downsample", "act2"),
    resnet.Bottleneck: ("downsample", "act3"),
    regnet.Bottleneck: ("downsample", "act3"),
    regnet.PreBottleneck: ("downsample", "norm1"),
    resnetv2.PreActBasic: ("downsample", "norm1"),
    resnetv2.PreActBottleneck: ("downsample", "norm1"),
    resnetv2.Bottleneck: ("downsample", "act3"),
    convnext.ConvNeXtBlock: ("shortcut",),
    vision_transformer.Block: (),
    vision_transformer.ResPostBlock: (),
}


class Times(nn.Module):
    """Multiplies a branch by a number, and remembers it as it came."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = weight
        self.branch: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Return ``weight * x``."""
        self.branch = x.detach().clone()
        return x * self.weight


def timm_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return timm's residual blocks with their names; RegNet's without shortcut add nothing to anything."""
    regnets = (regnet.Bottleneck, regnet.PreBottleneck)
    return [
        (name, module)
        for name, module in model.named_modules()
        if type(module) in DROP_PATHS and not (isinstance(module, regnets) and module.downsample is None)
    ]


def always_used(block: Net) -> tuple[str, ...]:
    """Return the parts of timm's ``block`` that a skipped branch leaves at work."""
    if isinstance(block, (resnetv2.PreActBasic, resnetv2.PreActBottleneck)) and block.downsample is None:
        return ()
    return ALWAYS[type(block)]


def branch_parts(block: nn.Module) -> list[set[str]]:
    """Return the parts of each branch of timm's ``block``."""
    if len(DROP_PATHS[type(block)]) == 2:
        return [{"norm1", "attn", "ls1"}, {"norm2", "mlp", "ls2"}]
    names = {name for name, _ in block.named_children()}
    return [names - {*always_used(block), *DROP_PATHS[type(block)]}]


def weighted(model: nn.Module, weights: Sequence[float]) -> Net:
    """Return timm's network with each branch multiplied by its weight, in training too, in the place of DropPath."""
    copied, left = copy.deepcopy(model), list(weights)
    for module in copied.modules():
        if isinstance(module, timm.layers.DropPath):
            module.drop_prob = 0.0
    for _, block in timm_blocks(copied):
        for name in DROP_PATHS[type(block)]:
            setattr(block, name, Times(left.pop(0)))
    assert not left
    return copied


def branches(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Return the output of every branch of timm's ``model``, unweighted, for the input ``x``."""
    gates = sum(len(DROP_PATHS[type(block)]) for _, block in timm_blocks(model))
    copied = weighted(model, [1.0] * gates)
    with torch.no_grad():
        copied(x)
    found = [module.branch for module in copied.modules() if isinstance(module, Times)]
    return [branch for branch in found if branch is not None]


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> Net:
    """Give every affine, bias, statistic, LayerScale and attention weight of ``model`` a random value; return it."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        kind = name.rpartition(".")[2]
        if tensor.ndim >= 2 and kind == "weight":
            tensor.normal_(0, (1.5 / tensor[0].numel()) ** 0.5, generator=generator)
        elif kind in ("weight", "gamma", "running_var"):
            tensor.uniform_(0.5, 1.5, generator=generator)
        elif kind in ("bias", "running_mean"):
            tensor.normal_(0, 0.2, generator=generator)
    return model


@torch.no_grad()
def trained_like(model: nn.Module, images: Tensor, seed: int = 0) -> Net:
    """Randomise ``model`` and give its BatchNorms statistics near those of ``images``; return it, in evaluation."""
    randomise(model, seed)
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    for norm in norms:
        norm.momentum = 1.0
    model.train()(images)
    generator = torch.Generator().manual_seed(seed)
    for norm in norms:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        norm.momentum = 0.1
        norm.running_var.mul_(torch.empty_like(norm.running_var).uniform_(0.8, 1.25, generator=generator)).add_(0.05)
        norm.running_mean.add_(torch.empty_like(norm.running_mean).normal_(0, 0.1, generator=generator))
    return model.eval()


def res_post_vit(**kwargs: Any) -> Net:
    """Return a small vision transformer of ``ResPostBlock``."""
    settings: dict[str, Any] = {"img_size": 64, "patch_size": 16, "embed_dim": 32, "depth": 3, "num_heads": 2}
    return VisionTransformer(block_fn=ResPostBlock, num_classes=10, **(settings | kwargs))  # type: ignore[arg-type]


def tiny_vit(**kwargs: Any) -> Net:
    """Return a small vision transformer of ``Block``."""
    settings: dict[str, Any] = {"img_size": 64, "patch_size": 16, "embed_dim": 32, "depth": 3, "num_heads": 2}
    return VisionTransformer(num_classes=10, **(settings | kwargs))


def _of_timm(name: str, **kwargs: Any) -> Callable[..., Net]:
    return partial(timm.create_model, name, num_classes=10, **kwargs)


def _narrow_regnet(name: str, narrow: dict[str, Any], **kwargs: Any) -> Net:
    cfg = dataclasses.replace(regnet.model_cfgs[name], **narrow)
    return regnet.RegNet(cfg, num_classes=10, **kwargs)


NARROW = {"channels": (16, 32, 64, 128)}  # a quarter of the width
TINY = {"img_size": 64, "embed_dim": 48}

#: Every family, with the number of its residual blocks and of its gates.
NETS: Mapping[str, tuple[Callable[..., Net], int, int]] = {
    "resnet18": (_of_timm("resnet18", channels=(64, 32, 32, 64)), 8, 8),
    "resnet26t": (_of_timm("resnet26t", **NARROW), 8, 8),
    "resnet50": (_of_timm("resnet50", **NARROW), 16, 16),
    "resnext50_32x4d": (_of_timm("resnext50_32x4d", **NARROW), 16, 16),
    "seresnet50": (_of_timm("seresnet50", **NARROW), 16, 16),
    "ecaresnet26t": (_of_timm("ecaresnet26t", **NARROW), 8, 8),
    "resnetv2_18": (_of_timm("resnetv2_18", **NARROW), 8, 8),
    "resnetv2_50d": (_of_timm("resnetv2_50d", channels=(32, 64, 128, 256)), 16, 16),
    "regnety_002": (_of_timm("regnety_002"), 13, 13),
    "regnetv_040": (partial(_narrow_regnet, "regnetv_040", {"w0": 16, "wa": 6, "group_size": 4}), 22, 22),
    "regnetz_005": (partial(_narrow_regnet, "regnetz_005", {"wa": 8, "num_features": 0}), 17, 17),
    "convnext_atto": (_of_timm("convnext_atto", dims=(16, 32, 64, 128)), 12, 12),
    "convnextv2_atto": (_of_timm("convnextv2_atto", dims=(16, 32, 64, 128)), 12, 12),
    "vit_tiny_patch16_224": (_of_timm("vit_tiny_patch16_224", **TINY), 12, 24),
    "deit_tiny_patch16_224": (_of_timm("deit_tiny_patch16_224", **TINY), 12, 24),
    "deit_tiny_distilled_patch16_224": (_of_timm("deit_tiny_distilled_patch16_224", **TINY), 12, 24),
    "deit3_small_patch16_224": (_of_timm("deit3_small_patch16_224", **TINY), 12, 24),
    "pit_ti_224": (_of_timm("pit_ti_224", img_size=64), 12, 24),
    "vit_small_r26_s32_224": (_of_timm("vit_small_r26_s32_224", **TINY), 20, 32),
    "res_post_vit": (res_post_vit, 3, 6),
}


@lru_cache(maxsize=3)
def _master(name: str) -> Net:
    torch.manual_seed(0)
    return trained_like(NETS[name][0](drop_path_rate=0.4).double(), random_images(4, 64, seed=2).double())


def stock(name: str) -> Net:
    """Return timm's network ``name``, like a trained one, with a DropPath of its own; in float64, in evaluation."""
    return copy.deepcopy(_master(name))
