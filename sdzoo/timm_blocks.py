"""timm's residual blocks with a gate: each keeps its class, its modules and the names of its weights.

For each known class: the branch as timm computes it, and by which tensors it scales. A norm, LayerScale or linear layer
that ends the branch is multiplied by c; an attention that follows it reads the branch's mean, and what reads it is
divided by c, so that its output stays as it was.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

from timm.layers import (
    Attention,
    CecaModule,
    Conv2dSame,
    DiffAttention,
    DropPath,
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
from timm.models import convnext, regnet, resnet, resnetv2, vision_transformer
from timm.models._features_fx import register_notrace_module
from torch import Tensor, nn
from torchvision.ops.misc import FrozenBatchNorm2d

from sdzoo.errors import InputError
from sdzoo.gate import Gate
from sdzoo.residual import OneBranchBlock, ResidualBlock, Scale, TwoBranchBlock

# By type and not isinstance: a subclass may compute something else of the same weights.
NORMS = (
    *(nn.BatchNorm2d, nn.SyncBatchNorm, FrozenBatchNorm2d, nn.GroupNorm, nn.LayerNorm, GroupNorm, GroupNorm1),
    *(LayerNorm, LayerNorm2d, RmsNorm, RmsNorm2d),
)
NORMS_WITH_ACT = (BatchNormAct2d, SyncBatchNormAct, FrozenBatchNormAct2d, GroupNormAct, LayerNormAct2d)
LINEARS = (nn.Linear, nn.Conv2d, Conv2dSame)
READS_THE_MEAN = {
    SEModule: "fc1.weight",
    EffectiveSEModule: "fc.weight",
    EcaModule: "conv.weight",
    CecaModule: "conv.weight",
}
ENDS_IN: dict[type[nn.Module], str] = {
    Attention: "proj",
    DiffAttention: "proj",
    Mlp: "fc2",
    GluMlp: "fc2",
    SwiGLU: "fc2",
    GlobalResponseNormMlp: "fc2",
}


def _affine(block: nn.Module, name: str) -> Scale:
    norm = block.get_submodule(name)
    linear_end = type(norm) in NORMS or (type(norm) in NORMS_WITH_ACT and isinstance(norm.act, nn.Identity))
    if not linear_end or getattr(norm, "weight", None) is None:
        raise _cannot_scale(block, name, norm)
    return _weight_and_bias(norm, name)


def _linear(block: nn.Module, name: str) -> Scale:
    module = block.get_submodule(name)
    if type(module) in ENDS_IN:
        return _linear(block, f"{name}.{ENDS_IN[type(module)]}")
    if type(module) not in LINEARS:
        raise _cannot_scale(block, name, module)
    return _weight_and_bias(module, name)


def _attention(block: nn.Module, name: str) -> Scale:
    module = block._modules.get(name)
    if module is None or isinstance(module, nn.Identity):
        return {}
    if type(module) not in READS_THE_MEAN:
        raise _cannot_scale(block, name, module)
    return {f"{name}.{READS_THE_MEAN[type(module)]}": -1}


def _weight_and_bias(module: nn.Module, name: str) -> Scale:
    return {f"{name}.{part}": 1 for part in ("weight", "bias") if getattr(module, part, None) is not None}


def _cannot_scale(block: nn.Module, name: str, module: nn.Module) -> InputError:
    stock = class_name(_stock(block))
    return InputError(f"{stock}: its branch ends in {type(module).__name__} ({name}), which cannot be scaled exactly")


def _stock(block: nn.Module) -> type[nn.Module]:
    return next(stock for stock, gated in GATED.items() if gated is type(block))


def class_name(block: type[nn.Module]) -> str:
    """Return how errors name a class: ``resnet.Bottleneck``."""
    return f"{block.__module__.rpartition('.')[2]}.{block.__name__}"


class _ResNetBlock(OneBranchBlock):
    last_norm: ClassVar[str]

    if TYPE_CHECKING:
        aa: Any
        se: Any

    def shortcut(self, x: Tensor) -> Tensor:
        """Return the shortcut of ``x``."""
        if self.downsample is not None:
            x = self.downsample(x)
        return x

    def branch_scale(self, gate: str = "gate") -> Scale:
        """Return the affine of the last norm, and the inverse for what the attention after it reads."""
        return {**_affine(self, self.last_norm), **_attention(self, "se")}


class GatedBasicBlock(_ResNetBlock, resnet.BasicBlock):
    """timm's ``resnet.BasicBlock`` with a gate."""

    last_norm: ClassVar[str] = "bn2"
    act_name: ClassVar[str | None] = "act2"

    def branch(self, x: Tensor) -> Tensor:
        """Return the residual branch of ``x``, unweighted."""
        x = self.aa(self.act1(self.drop_block(self.bn1(self.conv1(x)))))
        x = self.bn2(self.conv2(x))
        if self.se is not None:
            x = self.se(x)
        return x

    def act(self, x: Tensor) -> Tensor:
        """Return the activation of the sum."""
        return self.act2(x)


class GatedBottleneck(_ResNetBlock, resnet.Bottleneck):
    """timm's ``resnet.Bottleneck`` with a gate."""

    last_norm: ClassVar[str] = "bn3"
    act_name: ClassVar[str | None] = "act3"

    def branch(self, x: Tensor) -> Tensor:
        """Return the residual branch of ``x``, unweighted."""
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.aa(self.act2(self.drop_block(self.bn2(self.conv2(x)))))
        x = self.bn3(self.conv3(x))
        if self.se is not None:
            x = self.se(x)
        return x

    def act(self, x: Tensor) -> Tensor:
        """Return the activation of the sum."""
        return self.act3(x)


class GatedRegNetBottleneck(OneBranchBlock, regnet.Bottleneck):
    """timm's ``regnet.Bottleneck`` with a gate."""

    act_name: ClassVar[str | None] = "act3"

    def branch(self, x: Tensor) -> Tensor:
        """Return the residual branch of ``x``, unweighted."""
        return self.conv3(self.se(self.conv2(self.conv1(x))))

    def shortcut(self, x: Tensor) -> Tensor:
        """Return the shortcut of ``x``."""
        return self.downsample(x)

    def act(self, x: Tensor) -> Tensor:
        """Return the activation of the sum."""
        return self.act3(x)

    def branch_scale(self, gate: str = "gate") -> Scale:
        """Return the affine of the last norm."""
        return _affine(self, "conv3.bn")


class _PreActBlock(OneBranchBlock):
    """``shortcut(x) + branch(x)``; a projecting shortcut reads the first norm too, which then always runs."""

    act_name: ClassVar[str | None] = None
    last_conv: ClassVar[str]

    if TYPE_CHECKING:
        norm1: Any

    def entry(self, x: Tensor) -> Tensor:
        """Return the first norm of ``x`` if the shortcut projects it."""
        if self.downsample is not None:
            x = self.norm1(x)
        return x

    def shortcut(self, x: Tensor) -> Tensor:
        """Return the shortcut of the block's entry."""
        if self.downsample is not None:
            x = self.downsample(x)
        return x

    def act(self, x: Tensor) -> Tensor:
        """Return ``x``."""
        return x

    def branch_scale(self, gate: str = "gate") -> Scale:
        """Return the last convolution."""
        return _linear(self, self.last_conv)

    def branch_parameters(self, gate: str = "gate") -> Iterator[nn.Parameter]:
        """Yield the parameters of the branch; the first norm belongs to it if the shortcut does not read it."""
        for name, child in self.named_children():
            if name != "downsample" and (name != "norm1" or self.downsample is None):
                yield from child.parameters()


class GatedRegNetPreBottleneck(OneBranchBlock, regnet.PreBottleneck):
    """timm's ``regnet.PreBottleneck`` with a gate; its shortcut always reads the first norm."""

    shortcut_names: ClassVar[tuple[str, ...]] = ("downsample", "norm1")
    act_name: ClassVar[str | None] = None

    def entry(self, x: Tensor) -> Tensor:
        """Return the first norm of ``x``."""
        return self.norm1(x)

    def branch(self, x: Tensor) -> Tensor:
        """Return the residual branch of the block's entry, unweighted."""
        x = self.se(self.conv2(self.norm2(self.conv1(x))))
        return self.conv3(self.norm3(x))

    def shortcut(self, x: Tensor) -> Tensor:
        """Return the shortcut of the block's entry."""
        return self.downsample(x)

    def act(self, x: Tensor) -> Tensor:
        """Return ``x``."""
        return x

    def branch_scale(self, gate: str = "gate") -> Scale:
        """Return the last convolution."""
        return _linear(self, "conv3")


class GatedPreActBasic(_PreActBlock, resnetv2.PreActBasic):
    """timm's ``resnetv2.PreActBasic`` with a gate."""

    last_conv: ClassVar[str] = "conv2"

    def branch(self, x: Tensor) -> Tensor:
        """Return the residual branch of the block's entry, unweighted."""
        if self.downsample is None:
            x = self.norm1(x)
        return self.conv2(self.norm2(self.conv1(x)))


class GatedPreActBottleneck(_PreActBlock, resnetv2.PreActBottleneck):
    """timm's ``resnetv2.PreActBottleneck`` with a gate."""

    last_conv: ClassVar[str] = "conv3"

    def branch(self, x: Tensor) -> Tensor:
        """Return the residual branch of the block's entry, unweighted."""
        if self.downsample is None:
            x = self.norm1(x)
        return self.conv3(self.norm3(self.conv2(self.norm2(self.conv1(x)))))


class GatedResNetV2Bottleneck(OneBranchBlock, resnetv2.Bottleneck):
    """timm's ``resnetv2.Bottleneck``, which is not pre-activation, with a gate."""

    act_name: ClassVar[str | None] = "act3"

    def branch(self, x: Tensor) -> Tensor:
        """Return the residual branch of ``x``, unweighted."""
        x = self.norm1(self.conv1(x))
        x = self.norm2(self.conv2(x))
        return self.norm3(self.conv3(x))

    def shortcut(self, x: Tensor) -> Tensor:
        """Return the shortcut of ``x``."""
        if self.downsample is not None:
            x = self.downsample(x)
        return x

    def act(self, x: Tensor) -> Tensor:
        """Return the activation of the sum."""
        return self.act3(x)

    def branch_scale(self, gate: str = "gate") -> Scale:
        """Return the affine of the last norm."""
        return _affine(self, "norm3")


class GatedConvNeXtBlock(OneBranchBlock, convnext.ConvNeXtBlock):
    """timm's ``ConvNeXtBlock`` with a gate."""

    act_name: ClassVar[str | None] = None

    def branch(self, x: Tensor) -> Tensor:
        """Return the residual branch of ``x``, unweighted."""
        x = self.conv_dw(x)
        if self.use_conv_mlp:
            x = self.mlp(self.norm(x))
        else:
            x = self.mlp(self.norm(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        if self.gamma is not None:
            x = x.mul(self.gamma.reshape(1, -1, 1, 1))
        return x

    def act(self, x: Tensor) -> Tensor:
        """Return ``x``."""
        return x

    def branch_scale(self, gate: str = "gate") -> Scale:
        """Return LayerScale's gamma if there is one, else the last linear layer."""
        return {"gamma": 1} if self.gamma is not None else _linear(self, "mlp")


class GatedBlock(TwoBranchBlock, vision_transformer.Block):
    """timm's transformer ``Block`` with a gate for each branch."""

    branch_names: ClassVar[dict[str, tuple[str, ...]]] = {
        "gate1": ("norm1", "attn", "ls1"),
        "gate2": ("norm2", "mlp", "ls2"),
    }

    def branch1(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Return the attention branch of ``x``, unweighted."""
        return self.ls1(self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal))

    def branch2(self, x: Tensor) -> Tensor:
        """Return the MLP branch of ``x``, unweighted."""
        return self.ls2(self.mlp(self.norm2(x)))

    def branch_scale(self, gate: str = "gate1") -> Scale:
        """Return LayerScale's gamma if there is one, else the last linear layer."""
        _, linear, layer_scale = self.branch_names[gate]
        return {f"{layer_scale}.gamma": 1} if type(getattr(self, layer_scale)) is LayerScale else _linear(self, linear)


class GatedResPostBlock(TwoBranchBlock, vision_transformer.ResPostBlock):
    """timm's ``ResPostBlock`` with a gate for each branch."""

    branch_names: ClassVar[dict[str, tuple[str, ...]]] = {"gate1": ("attn", "norm1"), "gate2": ("mlp", "norm2")}

    def branch1(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Return the attention branch of ``x``, unweighted."""
        return self.norm1(self.attn(x, attn_mask=attn_mask, is_causal=is_causal))

    def branch2(self, x: Tensor) -> Tensor:
        """Return the MLP branch of ``x``, unweighted."""
        return self.norm2(self.mlp(x))

    def branch_scale(self, gate: str = "gate1") -> Scale:
        """Return the affine of the last norm."""
        return _affine(self, self.branch_names[gate][-1])


GATED: dict[type[nn.Module], type[ResidualBlock]] = {
    resnet.BasicBlock: GatedBasicBlock,
    resnet.Bottleneck: GatedBottleneck,
    regnet.Bottleneck: GatedRegNetBottleneck,
    regnet.PreBottleneck: GatedRegNetPreBottleneck,
    resnetv2.PreActBasic: GatedPreActBasic,
    resnetv2.PreActBottleneck: GatedPreActBottleneck,
    resnetv2.Bottleneck: GatedResNetV2Bottleneck,
    convnext.ConvNeXtBlock: GatedConvNeXtBlock,
    vision_transformer.Block: GatedBlock,
    vision_transformer.ResPostBlock: GatedResPostBlock,
}
for _gated in GATED.values():
    register_notrace_module(_gated)  # tracing into it would freeze one draw of its gate


def is_residual(block: nn.Module) -> bool:
    """Return whether ``block``, of a known class, has a shortcut: RegNet's may have none."""
    return not (isinstance(block, (regnet.Bottleneck, regnet.PreBottleneck)) and block.downsample is None)


def become_gated(block: nn.Module, **gate: Any) -> ResidualBlock:
    """Make ``block``, of a class in ``GATED``, its gated subclass, in place; its DropPath goes.

    Args:
        block: The block.
        gate: Arguments of its gates.
    """
    block.__class__ = GATED[type(block)]
    assert isinstance(block, ResidualBlock)
    drop_timms_drop_path(block)
    for name in block.gate_names:
        setattr(block, name, Gate(**gate).train(block.training))
    return block


def drop_timms_drop_path(block: nn.Module) -> None:
    """Replace timm's own DropPath in ``block`` by nothing, in place."""
    for name, module in block.named_children():
        if isinstance(module, DropPath):
            setattr(block, name, nn.Identity())


def become_stock(block: ResidualBlock) -> None:
    """Make a gated block of timm's class again, in place: its branch counts in full."""
    for name in block.gate_names:
        delattr(block, name)
    block.__class__ = _stock(block)  # type: ignore[assignment]
