"""timm's residual blocks with gates: each keeps its modules, their names and, as a subclass, its class.

The branch of each is written as timm computes it; the tests compare the two.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

from timm.layers import DropPath
from timm.models import convnext, regnet, resnet, resnetv2, vision_transformer
from timm.models._features_fx import register_notrace_module
from torch import Tensor, nn

from sdzoo.branch_ends import Scale, attention_scale, gamma_scale, linear_scale, norm_scale
from sdzoo.gate import Gate
from sdzoo.residual import OneBranchBlock, ResidualBlock, TwoBranchBlock


class _Projected(OneBranchBlock):
    """The shortcut is ``downsample`` if there is one."""

    def shortcut(self, x: Tensor) -> Tensor:
        """Return the shortcut of ``x``."""
        if self.downsample is not None:
            x = self.downsample(x)
        return x


class _EndsInAct3(_Projected):
    act_name: ClassVar[str | None] = "act3"

    if TYPE_CHECKING:
        act3: Any

    def act(self, x: Tensor) -> Tensor:
        """Return the activation of the sum."""
        return self.act3(x)


class _EndsInSum(OneBranchBlock):
    act_name: ClassVar[str | None] = None

    def act(self, x: Tensor) -> Tensor:
        """Return ``x``."""
        return x


class GatedBasicBlock(_Projected, resnet.BasicBlock):
    """timm's ``resnet.BasicBlock`` with a gate."""

    act_name: ClassVar[str | None] = "act2"

    if TYPE_CHECKING:
        aa: Any
        se: Any

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

    def branch_scale(self, gate: str = "gate") -> Scale:
        """Return the affine of the last norm, and the inverse for what the attention after it reads."""
        return {**norm_scale(self, "bn2"), **attention_scale(self, "se")}


class GatedBottleneck(_EndsInAct3, resnet.Bottleneck):
    """timm's ``resnet.Bottleneck`` with a gate."""

    if TYPE_CHECKING:
        aa: Any
        se: Any

    def branch(self, x: Tensor) -> Tensor:
        """Return the residual branch of ``x``, unweighted."""
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.aa(self.act2(self.drop_block(self.bn2(self.conv2(x)))))
        x = self.bn3(self.conv3(x))
        if self.se is not None:
            x = self.se(x)
        return x

    def branch_scale(self, gate: str = "gate") -> Scale:
        """Return the affine of the last norm, and the inverse for what the attention after it reads."""
        return {**norm_scale(self, "bn3"), **attention_scale(self, "se")}


class GatedRegNetBottleneck(_EndsInAct3, regnet.Bottleneck):
    """timm's ``regnet.Bottleneck`` with a gate."""

    def branch(self, x: Tensor) -> Tensor:
        """Return the residual branch of ``x``, unweighted."""
        return self.conv3(self.se(self.conv2(self.conv1(x))))

    def branch_scale(self, gate: str = "gate") -> Scale:
        """Return the affine of the last norm."""
        return norm_scale(self, "conv3.bn")


class GatedRegNetPreBottleneck(_Projected, _EndsInSum, regnet.PreBottleneck):
    """timm's ``regnet.PreBottleneck`` with a gate; its shortcut always reads the first norm."""

    shortcut_names: ClassVar[tuple[str, ...]] = ("downsample", "norm1")

    def entry(self, x: Tensor) -> Tensor:
        """Return the first norm of ``x``."""
        return self.norm1(x)

    def branch(self, x: Tensor) -> Tensor:
        """Return the residual branch of the block's entry, unweighted."""
        x = self.se(self.conv2(self.norm2(self.conv1(x))))
        return self.conv3(self.norm3(x))

    def branch_scale(self, gate: str = "gate") -> Scale:
        """Return the last convolution."""
        return linear_scale(self, "conv3")


class _PreActBlock(_Projected, _EndsInSum):
    """``shortcut(x) + branch(x)``; a projecting shortcut reads the first norm too, which then always runs."""

    if TYPE_CHECKING:
        norm1: Any

    def entry(self, x: Tensor) -> Tensor:
        """Return the first norm of ``x`` if the shortcut projects it, else ``x``."""
        if self.downsample is not None:
            x = self.norm1(x)
        return x

    def branch_parameters(self, gate: str = "gate") -> Iterator[nn.Parameter]:
        """Yield the parameters of the branch; the first norm belongs to it if the shortcut does not read it."""
        for name, child in self.named_children():
            if name != "downsample" and (name != "norm1" or self.downsample is None):
                yield from child.parameters()


class GatedPreActBasic(_PreActBlock, resnetv2.PreActBasic):
    """timm's ``resnetv2.PreActBasic`` with a gate."""

    def branch(self, x: Tensor) -> Tensor:
        """Return the residual branch of the block's entry, unweighted."""
        if self.downsample is None:
            x = self.norm1(x)
        return self.conv2(self.norm2(self.conv1(x)))

    def branch_scale(self, gate: str = "gate") -> Scale:
        """Return the last convolution."""
        return linear_scale(self, "conv2")


class GatedPreActBottleneck(_PreActBlock, resnetv2.PreActBottleneck):
    """timm's ``resnetv2.PreActBottleneck`` with a gate."""

    def branch(self, x: Tensor) -> Tensor:
        """Return the residual branch of the block's entry, unweighted."""
        if self.downsample is None:
            x = self.norm1(x)
        return self.conv3(self.norm3(self.conv2(self.norm2(self.conv1(x)))))

    def branch_scale(self, gate: str = "gate") -> Scale:
        """Return the last convolution."""
        return linear_scale(self, "conv3")


class GatedResNetV2Bottleneck(_EndsInAct3, resnetv2.Bottleneck):
    """timm's ``resnetv2.Bottleneck``, which is not pre-activation, with a gate."""

    def branch(self, x: Tensor) -> Tensor:
        """Return the residual branch of ``x``, unweighted."""
        x = self.norm2(self.conv2(self.norm1(self.conv1(x))))
        return self.norm3(self.conv3(x))

    def branch_scale(self, gate: str = "gate") -> Scale:
        """Return the affine of the last norm."""
        return norm_scale(self, "norm3")


class GatedConvNeXtBlock(_EndsInSum, convnext.ConvNeXtBlock):
    """timm's ``ConvNeXtBlock`` with a gate."""

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

    def branch_scale(self, gate: str = "gate") -> Scale:
        """Return LayerScale's gamma if there is one, else the last linear layer."""
        return {"gamma": 1} if self.gamma is not None else linear_scale(self, "mlp")


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
        is_last = isinstance(getattr(self, layer_scale), nn.Identity)
        return linear_scale(self, linear) if is_last else gamma_scale(self, layer_scale)


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
        return norm_scale(self, self.branch_names[gate][-1])


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
STOCK = {gated: stock for stock, gated in GATED.items()}
for _gated in STOCK:
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
            setattr(block, name, nn.Identity().train(module.training))


def become_stock(block: ResidualBlock) -> None:
    """Make a gated block of timm's class again, in place: its branch counts in full."""
    for name in block.gate_names:
        delattr(block, name)
    block.__class__ = STOCK[type(block)]  # type: ignore[assignment]
