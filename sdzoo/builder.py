"""What the entrypoints of all families share: timm's builder, and whose survival settings count."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from timm.models import build_model_with_cfg, resolve_pretrained_cfg
from torch import nn

from sdzoo import weights
from sdzoo.stochastic_depth import refuse_lost_gates

SURVIVAL_SETTINGS = ("drop_path_rate", "schedule", "survival_probs")


def build(
    network: Callable[..., nn.Module],
    variant: str,
    pretrained: bool,
    features: tuple[int, ...],
    pretrained_filter_fn: Callable[..., Mapping[str, Any]] | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Return the network ``variant``, with the weights of its configuration if ``pretrained``.

    Args:
        network: Its class.
        variant: The registered name.
        pretrained: Load weights; those that ship are compared with the sha256 of their card first.
        features: The stages of ``features_only`` unless others are asked for.
        pretrained_filter_fn: timm's filter of a checkpoint's keys.
        kwargs: timm's and the network's own.

    Raises:
        InputError: if a weights file that ships is damaged, or the network refuses its arguments.
    """
    if pretrained:
        _leave_survival_to_the_weights(kwargs)
        cfg = resolve_pretrained_cfg(variant, kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay"))
        weights.check(cfg.file)
    model = build_model_with_cfg(
        network,
        variant,
        pretrained,
        feature_cfg={"out_indices": features},
        pretrained_filter_fn=pretrained_filter_fn,
        **kwargs,
    )
    if kwargs.get("features_only"):
        refuse_lost_gates(model)  # timm has put the stages into another model
    return model


def _leave_survival_to_the_weights(kwargs: dict[str, Any]) -> None:
    """Drop what a config.json says of survival unless the caller asks too: timm keeps half there, the weights all."""
    saved = kwargs.get("pretrained_model_args") or {}
    given = {name for name in SURVIVAL_SETTINGS if kwargs.get(name) is not None}
    from_config = {name for name in given if name in saved and kwargs[name] == saved[name]}
    asked = given - from_config
    if asked and "schedule" in from_config and kwargs["schedule"] in ("constant_depth", "stagewise"):
        del kwargs["schedule"]  # a rate or probabilities of one's own make another schedule of these
        from_config.discard("schedule")
    for name in from_config:
        if not asked or "survival_probs" in asked or name == "survival_probs":
            del kwargs[name]
