"""What the networks for 32-pixel images share: three stages of residual blocks between a 3x3 stem and a classifier."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, ClassVar, cast

import torch
from timm.layers import create_classifier, get_act_layer, get_norm_layer
from timm.models import checkpoint_seq
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from sdzoo.stochastic_depth import add_gates

STAGES = ("layer1", "layer2", "layer3")

CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2470, 0.2435, 0.2616)


class CifarResNet(nn.Module):
    """A residual network for 32-pixel images with stochastic depth. A subclass says what a block is.

    Args:
        blocks_per_stage: Blocks of each of the three stages.
        widths: Channels of each stage.
        num_classes: Classes of the linear classifier; 0 for none.
        in_chans: Channels of the input image.
        global_pool: timm's pooling type; ``""`` with ``num_classes=0`` leaves the feature map.
        drop_rate: Dropout before the classifier.
        drop_path_rate: timm's word for 1 - p_L.
        schedule: ``linear_decay`` (default), ``uniform`` or ``constant_depth``; ``stagewise`` with three
            ``survival_probs``; or p_l of every block.
        survival_probs: p_l of every block, instead of the two above. If none of the three is given, a checkpoint's own
            probabilities replace the default (linear decay to 0.5); else the given ones stay and the weights are
            rescaled as they load, so that the evaluation function is the checkpoint's.
        mode: ``"batch"`` skips whole blocks per mini-batch; ``"sample"`` masks per sample.
        act_layer: Activation.
        norm_layer: Normalisation, with an affine weight and bias.
        block_args: What else the blocks take.

    Raises:
        InputError: on survival settings that contradict each other or leave (0, 1].
    """

    stem_width: ClassVar[int] = 16
    init_mode: ClassVar[str] = "fan_out"

    def __init__(
        self,
        blocks_per_stage: int,
        widths: tuple[int, int, int],
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float | None = None,
        schedule: str | Sequence[float] | None = None,
        survival_probs: Sequence[float] | None = None,
        mode: str = "batch",
        act_layer: str | type[nn.Module] = nn.ReLU,
        norm_layer: str | type[nn.Module] = nn.BatchNorm2d,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **block_args: Any,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        act, norm = cast(Any, get_act_layer(act_layer)), cast(Any, get_norm_layer(norm_layer))
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.widths = widths
        self.grad_checkpointing = False

        self.conv1 = nn.Conv2d(in_chans, self.stem_width, 3, padding=1, bias=False, **dd)
        self.bn1, self.act1 = self.stem_end(act, norm, **dd)

        def stage(in_width: int, width: int, stride: int) -> nn.Sequential:
            chans = [in_width] + [width] * blocks_per_stage
            strides = [stride] + [1] * (blocks_per_stage - 1)
            steps = zip(itertools.pairwise(chans), strides, strict=True)
            return nn.Sequential(*(self.block(a, b, s, act, norm, **block_args, **dd) for (a, b), s in steps))

        self.layer1 = stage(self.stem_width, widths[0], 1)
        self.layer2 = stage(widths[0], widths[1], 2)
        self.layer3 = stage(widths[1], widths[2], 2)
        self.norm = self.body_end(act, norm, **dd)
        self.feature_info = [
            {"num_chs": width, "reduction": 2**index, "module": name}
            for index, (name, width) in enumerate(zip(STAGES, widths, strict=True))
        ]
        self.num_features = widths[-1]
        self.global_pool, fc = self._classifier(num_classes, global_pool, **dd)
        self.head_drop = nn.Dropout(drop_rate)
        self.fc = fc
        self.init_weights()
        add_gates(self, drop_path_rate, schedule, survival_probs, mode)

    def block(self, in_chans: int, out_chans: int, stride: int, act: Any, norm: Any, **kwargs: Any) -> nn.Module:
        """Return a residual block without gates."""
        raise NotImplementedError

    def stem_end(self, act: Any, norm: Any, **dd: Any) -> tuple[nn.Module, nn.Module]:
        """Return what follows the stem's convolution: a norm and an activation."""
        return norm(self.stem_width, **dd), act(inplace=True)

    def body_end(self, act: Any, norm: Any, **dd: Any) -> nn.Module:
        """Return what follows the last block: nothing."""
        return nn.Identity()

    def init_weights(self) -> None:
        """Draw convolutions from Kaiming's normal distribution (ReLU gain), as the authors' code does."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode=cast(Any, self.init_mode), nonlinearity="relu")

    def _classifier(self, num_classes: int, global_pool: str, **dd: Any) -> tuple[nn.Module, nn.Module]:
        pool, fc = cast(Any, create_classifier(self.num_features, num_classes, pool_type=global_pool, **dd))
        self.head_hidden_size = self.num_features * pool.feat_mult()
        return pool, fc

    def _stages(self) -> list[nn.Sequential]:
        return [self.layer1, self.layer2, self.layer3]

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return timm's parameter groups for layer decay: by stage if ``coarse``, else by block."""
        blocks = r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)"
        return {"stem": r"^conv1|bn1", "blocks": [(blocks, None), (r"^norm", (99999,))]}

    def no_weight_decay(self) -> set[str]:
        """Return the parameters that this model exempts from weight decay: none, as in the authors' code.

        timm's optimizers exempt biases and norms all the same, unless created with ``filter_bias_and_bn=False``.
        """
        return set()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward pass, under the same gates, instead of keeping their activations."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """Return the linear classifier, or ``nn.Identity`` if there is none."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new one for ``num_classes`` (0: none), and the pooling if one is named."""
        self.num_classes = num_classes
        like = next(self.parameters())
        pool = cast(str, self.global_pool.pool_type) if global_pool is None else global_pool
        self.global_pool, self.fc = self._classifier(num_classes, pool, device=like.device, dtype=like.dtype)
        self.global_pool.train(self.training)
        self.fc.train(self.training)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return the final feature map and the outputs of the stages ``indices`` (the last n if an int, None: all).

        ``norm`` applies the norm of a pre-activation network to its last stage's output.
        """
        if output_fmt != "NCHW":
            raise ValueError(f'output_fmt is "{output_fmt}"; only NCHW')
        take, last = feature_take_indices(len(STAGES), indices)
        intermediates = []
        x = self.act1(self.bn1(self.conv1(x)))
        stages = self._stages()
        for index, stage in enumerate(stages[: last + 1] if stop_early else stages):
            x = checkpoint_seq(stage, x) if self.grad_checkpointing and self.training else stage(x)
            if index in take:
                intermediates.append(self.norm(x) if norm and index == len(STAGES) - 1 else x)
        if intermediates_only:
            return intermediates
        return (x if stop_early and last < len(STAGES) - 1 else self.norm(x)), intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Empty the stages after the last of ``indices``, and the head if ``prune_head``; return the kept indices."""
        take, last = feature_take_indices(len(STAGES), indices)
        for name in STAGES[last + 1 :]:
            setattr(self, name, nn.Sequential())
        self.num_features = self.widths[last]
        self.head_hidden_size = self.num_features * cast(Any, self.global_pool).feat_mult()
        if prune_norm or last < len(STAGES) - 1:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return take

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the feature map ``(B, widths[2], H / 4, W / 4)`` of images ``(B, C, H, W)``."""
        x = self.act1(self.bn1(self.conv1(x)))
        if self.grad_checkpointing and self.training and not torch.jit.is_scripting():
            for stage in self._stages():
                x = checkpoint_seq(stage, x)
        else:
            x = self.layer3(self.layer2(self.layer1(x)))
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits ``(B, num_classes)`` of a feature map, or the pooled features if ``pre_logits``."""
        x = self.head_drop(self.global_pool(x))
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``(B, num_classes)`` of normalised images ``(B, C, H, W)``."""
        return self.forward_head(self.forward_features(x))


def cifar_cfg(**kwargs: Any) -> dict[str, Any]:
    """Return timm's configuration of a network for CIFAR-10."""
    return {
        "num_classes": 10,
        "input_size": (3, 32, 32),
        "pool_size": (8, 8),
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "mean": CIFAR10_MEAN,
        "std": CIFAR10_STD,
        "first_conv": "conv1",
        "classifier": "fc",
        "license": "apache-2.0",
        **kwargs,
    }
