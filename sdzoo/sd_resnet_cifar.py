"""The paper's ResNets for 32-pixel images, registered with timm.

6n + 2 layers: a 3x3 convolution to 16 channels, three stages of n basic blocks at widths 16, 32 and 64, global average
pooling, a linear classifier (He et al., 2015, section 4.2; shortcuts as in the code of Huang et al., 2016).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, cast

import torch
from timm.layers import create_classifier, get_act_layer, get_norm_layer
from timm.models import (
    build_model_with_cfg,
    checkpoint_seq,
    generate_default_cfgs,
    register_model,
    resolve_pretrained_cfg,
)
from timm.models._features import feature_take_indices
from timm.models._features_fx import register_notrace_module
from torch import Tensor, nn

from sdzoo import weights
from sdzoo.blocks import BasicBlock
from sdzoo.gate import Gate
from sdzoo.schedule import resolve_survival_probs

register_notrace_module(BasicBlock)  # tracing into it would freeze one draw of its gate

STAGES = ("layer1", "layer2", "layer3")
WIDTHS = (16, 32, 64)

CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2470, 0.2435, 0.2616)
CIFAR10_LABELS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


class SDResNetCifar(nn.Module):
    """A CIFAR ResNet with stochastic depth.

    Args:
        blocks_per_stage: n; the network has 6n + 2 layers.
        num_classes: Classes of the linear classifier; 0 for none.
        in_chans: Channels of the input image.
        global_pool: timm's pooling type; ``""`` with ``num_classes=0`` leaves the feature map.
        drop_rate: Dropout before the classifier.
        drop_path_rate: timm's word for 1 - p_L.
        schedule: ``linear_decay`` (default), ``uniform`` or ``constant_depth``.
        survival_probs: p_l of every block, instead of the two above. If none of the three is given, a checkpoint's own
            probabilities replace the default (linear decay to 0.5); else the given ones stay and the weights are
            rescaled as they load, so that the evaluation function is the checkpoint's.
        mode: ``"batch"`` skips whole blocks per mini-batch; ``"sample"`` masks per sample.
        act_layer: Activation.
        norm_layer: Normalisation, with an affine weight and bias.

    Raises:
        InputError: on survival settings that contradict each other or leave (0, 1].
    """

    def __init__(
        self,
        blocks_per_stage: int,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float | None = None,
        schedule: str | None = None,
        survival_probs: Sequence[float] | None = None,
        mode: str = "batch",
        act_layer: str | type[nn.Module] = nn.ReLU,
        norm_layer: str | type[nn.Module] = nn.BatchNorm2d,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        act, norm = cast(type[nn.Module], get_act_layer(act_layer)), cast(type[nn.Module], get_norm_layer(norm_layer))
        probs, explicit = resolve_survival_probs(3 * blocks_per_stage, drop_path_rate, schedule, survival_probs)
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.grad_checkpointing = False

        self.conv1 = nn.Conv2d(in_chans, WIDTHS[0], 3, padding=1, bias=False, **dd)
        self.bn1 = norm(WIDTHS[0], **dd)
        self.act1 = act(inplace=True)
        p_of_blocks = iter(probs)

        def stage(in_chans: int, width: int) -> nn.Sequential:
            widths = [in_chans] + [width] * blocks_per_stage
            return nn.Sequential(
                *(
                    BasicBlock(a, b, Gate(next(p_of_blocks), mode, explicit, device), act, norm, **dd)
                    for a, b in itertools.pairwise(widths)
                )
            )

        self.layer1 = stage(WIDTHS[0], WIDTHS[0])
        self.layer2 = stage(WIDTHS[0], WIDTHS[1])
        self.layer3 = stage(WIDTHS[1], WIDTHS[2])
        self.feature_info = [
            {"num_chs": width, "reduction": 2**index, "module": name}
            for index, (name, width) in enumerate(zip(STAGES, WIDTHS, strict=True))
        ]
        self.num_features = self.head_hidden_size = WIDTHS[-1]
        self.global_pool, fc = self._classifier(num_classes, global_pool, **dd)
        self.head_drop = nn.Dropout(drop_rate)
        self.fc = fc
        self.init_weights()

    def init_weights(self) -> None:
        """Draw convolutions from Kaiming's normal distribution (fan-in, ReLU gain), as the authors' code does."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")

    def _load_from_state_dict(self, state_dict: dict[str, Any], *args: Any) -> None:  # type: ignore[override]
        # Weights without any survival probability count as p = 1; that of a single block was lost.
        blocks = [name.removesuffix("bn2.weight") for name in state_dict if name.endswith(".bn2.weight")]
        lacking = [block for block in blocks if f"{block}gate.survival_prob" not in state_dict]
        if lacking and len(lacking) < len(blocks):
            args[-1].append(f"survival probabilities are missing for {', '.join(lacking)} and there for the others")
        super()._load_from_state_dict(state_dict, *args)

    def _classifier(self, num_classes: int, global_pool: str, **dd: Any) -> tuple[nn.Module, nn.Module]:
        return cast(Any, create_classifier(self.num_features, num_classes, pool_type=global_pool, **dd))

    def _stages(self) -> list[nn.Sequential]:
        return [self.layer1, self.layer2, self.layer3]

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Return timm's parameter groups for layer decay: by stage if ``coarse``, else by block."""
        return {"stem": r"^conv1|bn1", "blocks": r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)"}

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

        ``norm`` is timm's and has no effect: the stages end in ReLU.
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
                intermediates.append(x)
        return intermediates if intermediates_only else (x, intermediates)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Empty the stages after the last of ``indices``, and the head if ``prune_head``; return the kept indices."""
        take, last = feature_take_indices(len(STAGES), indices)
        for name in STAGES[last + 1 :]:
            setattr(self, name, nn.Sequential())
        self.num_features = self.head_hidden_size = WIDTHS[last]
        if prune_head:
            self.reset_classifier(0, "")
        return take

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the feature map ``(B, 64, H / 4, W / 4)`` of images ``(B, C, H, W)``."""
        x = self.act1(self.bn1(self.conv1(x)))
        if self.grad_checkpointing and self.training and not torch.jit.is_scripting():
            for stage in self._stages():
                x = checkpoint_seq(stage, x)
            return x
        return self.layer3(self.layer2(self.layer1(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits ``(B, num_classes)`` of a feature map, or the pooled features if ``pre_logits``."""
        x = self.head_drop(self.global_pool(x))
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``(B, num_classes)`` of normalised images ``(B, C, H, W)``."""
        return self.forward_head(self.forward_features(x))


def _cfg(**kwargs: Any) -> dict[str, Any]:
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


default_cfgs = generate_default_cfgs(
    {
        "sd_resnet20.cifar10_jpeg": _cfg(
            file=str(weights.path("sd_resnet20.cifar10_jpeg")), label_names=CIFAR10_LABELS
        ),
        "sd_resnet32": _cfg(),
        "sd_resnet44": _cfg(),
        "sd_resnet56": _cfg(),
        "sd_resnet110": _cfg(),
        "sd_resnet152_cifar": _cfg(),
        "sd_resnet1202": _cfg(),
    }
)


def _create(variant: str, blocks_per_stage: int, pretrained: bool, **kwargs: Any) -> nn.Module:
    if pretrained:
        _leave_survival_to_the_weights(kwargs)
        cfg = resolve_pretrained_cfg(variant, kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay"))
        weights.check(cfg.file)
    return build_model_with_cfg(
        SDResNetCifar,
        variant,
        pretrained,
        feature_cfg={"out_indices": (0, 1, 2)},
        blocks_per_stage=blocks_per_stage,
        **kwargs,
    )


def _leave_survival_to_the_weights(kwargs: dict[str, Any]) -> None:
    """Drop what a config.json says of survival unless the caller asks too: timm keeps half there, the weights all."""
    saved = kwargs.get("pretrained_model_args") or {}
    given = {name for name in ("drop_path_rate", "schedule", "survival_probs") if kwargs.get(name) is not None}
    from_config = {name for name in given if name in saved and kwargs[name] == saved[name]}
    asked = given - from_config
    if asked and kwargs.get("schedule") == "constant_depth" and "schedule" in from_config:
        del kwargs["schedule"]  # no constant depth has a rate or probabilities of its own
        from_config.discard("schedule")
    for name in from_config:
        if not asked or "survival_probs" in asked or name == "survival_probs":
            del kwargs[name]


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
