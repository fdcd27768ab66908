"""The basic block of the paper's networks and its shortcuts, which have no parameters."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdzoo.branch_ends import Scale, norm_scale
from sdzoo.gate import Gate, OpenGate
from sdzoo.residual import OneBranchBlock


class PoolPadShortcut(nn.Module):
    """2x2 average pooling with stride 2, then zero channels appended at the end (the authors' code; no parameters)."""

    def __init__(self, in_chans: int, out_chans: int) -> None:
        super().__init__()
        self.new_chans = out_chans - in_chans

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(B, out_chans, ceil(H / 2), ceil(W / 2))``; ceil, as a stride-2 convolution has it."""
        x = F.avg_pool2d(x, 2, 2, ceil_mode=True, count_include_pad=False)
        return F.pad(x, (0, 0, 0, 0, 0, self.new_chans))


class SubsampleShortcut(nn.Module):
    """Every second pixel, then zero channels on both sides: option A of He et al., 2015, as most CIFAR nets have it."""

    def __init__(self, in_chans: int, out_chans: int) -> None:
        super().__init__()
        self.before = (out_chans - in_chans) // 2
        self.after = out_chans - in_chans - self.before

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(B, out_chans, ceil(H / 2), ceil(W / 2))``."""
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.before, self.after))


SHORTCUTS: dict[str, type[nn.Module]] = {"pool": PoolPadShortcut, "subsample": SubsampleShortcut}


class BasicBlock(OneBranchBlock):
    """conv3x3 - BN - ReLU - conv3x3 - BN, add, ReLU.

    Args:
        in_chans: Channels of the input.
        out_chans: Channels of the output; where they differ, the block halves the resolution.
        gate: The block's gate; without one the branch counts in full.
        act_layer: Activation, in both places.
        norm_layer: Normalisation with an affine ``weight`` and ``bias``.
        shortcut: ``"pool"`` or ``"subsample"``, where the block halves the resolution.
    """

    def __init__(
        self,
        in_chans: int,
        out_chans: int,
        gate: Gate | None = None,
        act_layer: type[nn.Module] = nn.ReLU,
        norm_layer: type[nn.Module] = nn.BatchNorm2d,
        shortcut: str = "pool",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__()
        grows = in_chans != out_chans
        self.conv1 = nn.Conv2d(in_chans, out_chans, 3, stride=2 if grows else 1, padding=1, bias=False, **dd)
        self.bn1 = norm_layer(out_chans, **dd)
        self.act1 = act_layer(inplace=True)
        self.conv2 = nn.Conv2d(out_chans, out_chans, 3, padding=1, bias=False, **dd)
        self.bn2 = norm_layer(out_chans, **dd)
        self.gate = gate or OpenGate()
        self.shortcut = SHORTCUTS[shortcut](in_chans, out_chans) if grows else nn.Identity()
        self.act = act_layer(inplace=True)

    def branch_scale(self, gate: str = "gate") -> Scale:
        """Return the affine of the last norm."""
        return norm_scale(self, "bn2")

    def branch(self, x: Tensor) -> Tensor:
        """Return the residual branch ``(B, out_chans, H', W')`` of ``x``, unweighted."""
        x = self.act1(self.bn1(self.conv1(x)))
        return self.bn2(self.conv2(x))
