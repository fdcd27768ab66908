"""Pre-activation ResNets for 32-pixel images, registered with timm.

ResNet-164 and 1001 (He et al., "Identity Mappings in Deep Residual Networks", 2016) of bottlenecks, Wide ResNets
(Zagoruyko and Komodakis, 2016) of basic blocks. The stride is on the 3x3 convolution, as in all of timm's bottlenecks.
"""

from __future__ import annotations

from typing import Any, ClassVar, cast

from timm.layers import create_conv2d, get_norm_act_layer
from timm.models import generate_default_cfgs, register_model
from timm.models.resnetv2 import DownsampleConv, PreActBasic, PreActBottleneck
from torch import nn

from sdzoo.builder import build
from sdzoo.cifar_resnet import CifarResNet, cifar_cfg


class SDResNetV2Cifar(CifarResNet):
    """A pre-activation network of timm's bottlenecks: 9n + 2 layers."""

    block_class: ClassVar[Any] = PreActBottleneck

    def block(self, in_chans: int, out_chans: int, stride: int, act: Any, norm: Any, **kwargs: Any) -> nn.Module:
        """Return timm's pre-activation block, whose shortcut projects where the shape changes."""
        project = stride != 1 or in_chans != out_chans
        return self.block_class(
            in_chans,
            out_chans,
            stride=stride,
            conv_layer=create_conv2d,
            norm_layer=get_norm_act_layer(norm, act_layer=act),
            proj_layer=DownsampleConv if project else None,
            **kwargs,
        )

    def stem_end(self, act: Any, norm: Any, **dd: Any) -> tuple[nn.Module, nn.Module]:
        """Return nothing: the blocks begin with a norm and an activation."""
        return nn.Identity(), nn.Identity()

    def body_end(self, act: Any, norm: Any, **dd: Any) -> nn.Module:
        """Return the norm and activation of the last sum."""
        return cast(Any, get_norm_act_layer(norm, act_layer=act))(self.widths[-1], **dd)


class SDWideResNet(SDResNetV2Cifar):
    """A Wide ResNet: pre-activation basic blocks, 6n + 4 layers."""

    block_class: ClassVar[Any] = PreActBasic


default_cfgs = generate_default_cfgs(
    {
        "sd_resnetv2_164": cifar_cfg(),
        "sd_resnetv2_1001": cifar_cfg(),
        "sd_wide_resnet16_4": cifar_cfg(),
        "sd_wide_resnet28_10": cifar_cfg(),
    }
)


def _create(
    network: type[SDResNetV2Cifar], variant: str, blocks: int, width: int, pretrained: bool, **kwargs: Any
) -> nn.Module:
    widths = {"blocks_per_stage": blocks, "widths": (width, 2 * width, 4 * width)}
    return build(network, variant, pretrained, (0, 1, 2), **(widths | kwargs))


@register_model
def sd_resnetv2_164(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Return the 164-layer pre-activation network, 54 bottlenecks."""
    return _create(SDResNetV2Cifar, "sd_resnetv2_164", 18, 64, pretrained, **kwargs)


@register_model
def sd_resnetv2_1001(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Return the 1001-layer pre-activation network, 333 bottlenecks."""
    return _create(SDResNetV2Cifar, "sd_resnetv2_1001", 111, 64, pretrained, **kwargs)


@register_model
def sd_wide_resnet16_4(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Return Wide ResNet 16-4, 6 basic blocks."""
    return _create(SDWideResNet, "sd_wide_resnet16_4", 2, 64, pretrained, **kwargs)


@register_model
def sd_wide_resnet28_10(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Return Wide ResNet 28-10, 12 basic blocks."""
    return _create(SDWideResNet, "sd_wide_resnet28_10", 4, 160, pretrained, **kwargs)
