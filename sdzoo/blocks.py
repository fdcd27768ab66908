"""Residual blocks with a gate, the rule by which they load weights, and the parameter-free shortcut."""

from operator import attrgetter
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdzoo.errors import InputError
from sdzoo.fold import check_evaluation, fuse_conv_bn
from sdzoo.gate import Gate, with_zero_gradients


class PoolPadShortcut(nn.Module):
    """2x2 average pooling with stride 2, then zero channels appended at the end (the authors' code; no parameters)."""

    def __init__(self, in_chans: int, out_chans: int) -> None:
        super().__init__()
        self.new_chans = out_chans - in_chans

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(B, out_chans, ceil(H / 2), ceil(W / 2))``; ceil, as a stride-2 convolution has it."""
        x = F.avg_pool2d(x, 2, 2, ceil_mode=True, count_include_pad=False)
        return F.pad(x, (0, 0, 0, 0, 0, self.new_chans))


class ResidualBlock(nn.Module):
    """``out = act(shortcut(x) + b * branch(x))`` in training, ``act(shortcut(x) + p * branch(x))`` in evaluation.

    A subclass has ``gate``, ``shortcut`` and ``act`` and defines ``branch`` and ``fuse``. The input must be the output
    of a ReLU (of the stem or a block): a skipped block with an identity shortcut then is the identity.
    """

    #: The power of c by which each parameter is multiplied so that the branch's output is multiplied by c.
    branch_scale: ClassVar[dict[str, int]] = {}

    if TYPE_CHECKING:  # at run time TorchScript would trip over the annotations
        gate: Gate | None
        shortcut: nn.Module
        act: nn.Module

    def branch(self, x: Tensor) -> Tensor:
        """Return the residual branch of ``x``, unweighted."""
        raise TypeError("a residual block must define its branch")

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output ``(B, C', H', W')`` for ``x`` ``(B, C, H, W)``."""
        if self.gate is None:
            return self.act(self.shortcut(x) + self.branch(x))
        if self.gate.training and self.gate.mode == "batch":
            return self._gated(x)
        return self.act(self.shortcut(x) + self.gate(self.branch(x)))

    @torch.jit.unused
    def _gated(self, x: Tensor) -> Tensor:
        assert self.gate is not None
        if self.gate.draw():
            return self.act(self.shortcut(x) + self.branch(x))
        x = with_zero_gradients(x, self)
        if not isinstance(self.shortcut, nn.Identity):
            return self.act(self.shortcut(x))
        # An in-place activation would overwrite the output of the block before. The ReLU of a ReLU is nothing to do.
        return x if isinstance(self.act, nn.ReLU) else self.act(x.clone())

    @torch.no_grad()
    def scale_branch_(self, c: float) -> None:
        """Multiply the branch's output by ``c``, in place, exactly."""
        for name, power in self.branch_scale.items():
            attrgetter(name)(self).mul_(c**power)

    def set_survival_prob(self, p: float) -> None:
        """Set the survival probability and rescale the branch, so that the evaluation function stays as it is."""
        assert self.gate is not None
        p_old = self.gate.read()
        self.gate.set(p)
        if self.gate.p != p_old:
            self.scale_branch_(p_old / self.gate.p)
        self.gate.explicit = True

    def _load_from_state_dict(  # type: ignore[override]
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        """Keep the evaluation function that the weights had, whatever this block's survival probability.

        Weights without a survival probability count as p = 1. A block whose p was asked for explicitly keeps it, else
        it takes the weights' own; wherever the two differ, the weights are rescaled by p_old / p_new as they pass.
        """
        error_msgs = args[-1]
        block, key = prefix[:-1] or "the block", prefix + "gate.survival_prob"
        held = [name for name in state_dict if name.startswith(prefix)]
        own = self.state_dict()
        lacking = [name for name in self.branch_scale if prefix + name not in state_dict]
        if self.gate is None and any(name[len(prefix) :] not in own for name in held):
            error_msgs.append(f"{block} is folded; these weights are not: load them into the model, then fold it")
        elif held and self.gate is not None and lacking:
            error_msgs.append(
                f"{block}: the weights hold {len(held)} of its tensors but not {', '.join(lacking)}, so its evaluation"
                " function cannot be kept: load the whole block or nothing of it"
            )
            state_dict.pop(key, None)
        elif held and self.gate is not None:
            p, stored = self.gate.read(), state_dict.get(key, torch.ones(()))
            valid = stored.numel() == 1 and 0 < float(stored) <= 1  # else the gate reports it
            if valid and (key not in state_dict or self.gate.explicit):
                # Equal after rounding to the stored dtype is equal: a half-precision file holds p with three digits.
                same = float(torch.tensor(p, dtype=stored.dtype)) == float(stored)
                ratio = 1.0 if same else float(stored) / p
                assign = local_metadata.get("assign_to_params_buffers", False)
                for name, power in self.branch_scale.items():
                    weight = state_dict[prefix + name]
                    dtype = weight.dtype if assign else torch.promote_types(weight.dtype, own[name].dtype)
                    state_dict[prefix + name] = (weight.double() * ratio**power).to(dtype) if ratio != 1 else weight
                state_dict[key] = torch.tensor(p, device=state_dict[prefix + next(iter(self.branch_scale))].device)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


class BasicBlock(ResidualBlock):
    """conv3x3 - BN - ReLU - conv3x3 - BN, add, ReLU.

    Args:
        in_chans: Channels of the input.
        out_chans: Channels of the output; where they differ, the block halves the resolution.
        gate: The block's gate.
        act_layer: Activation, in both places.
        norm_layer: Normalisation with an affine ``weight`` and ``bias``.

    Raises:
        InputError: if the normalisation is not affine.
    """

    branch_scale: ClassVar[dict[str, int]] = {"bn2.weight": 1, "bn2.bias": 1}

    def __init__(
        self,
        in_chans: int,
        out_chans: int,
        gate: Gate,
        act_layer: type[nn.Module] = nn.ReLU,
        norm_layer: type[nn.Module] = nn.BatchNorm2d,
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
        if not all(isinstance(tensor, Tensor) for tensor in (self.bn2.weight, self.bn2.bias)):
            raise InputError("norm_layer has no affine weight and bias, by which a change of p rescales the branch")
        self.gate = gate
        self.shortcut = PoolPadShortcut(in_chans, out_chans) if grows else nn.Identity()
        self.act = act_layer(inplace=True)

    def branch(self, x: Tensor) -> Tensor:
        """Return the residual branch ``(B, out_chans, H', W')`` of ``x``, unweighted."""
        x = self.act1(self.bn1(self.conv1(x)))
        return self.bn2(self.conv2(x))

    def fuse(self) -> "BasicBlock":
        """Fold p and both BatchNorms into the convolutions, in place; return the block (timm's hook)."""
        if self.gate is not None:
            check_evaluation(self)
            conv1 = fuse_conv_bn(self.conv1, self.bn1)
            self.scale_branch_(self.gate.read())
            self.conv2, self.bn2 = fuse_conv_bn(self.conv2, self.bn2), nn.Identity().eval()
            self.conv1, self.bn1 = conv1, nn.Identity().eval()
            self.gate = None
        return self
