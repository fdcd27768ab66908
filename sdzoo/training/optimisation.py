"""What a recipe says of loss, optimizer and learning rate, as timm makes them."""

from __future__ import annotations

from typing import Any

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn
from torch.optim import Optimizer

from sdzoo.errors import InputError
from sdzoo.training.recipe import Recipe

# Of what an optimizer keeps beside its state, what recipes set; the rest are its own counters, and the step's rate.
SETTINGS = {"initial_lr", "lr_scale", "weight_decay", "momentum", "nesterov", "betas", "eps"}


def criterion_settings(recipe: Recipe, soft_targets: bool) -> dict[str, Any]:
    """Return the arguments of timm's ``create_classification_loss``."""
    if not recipe.bce_loss:
        return {"smoothing": recipe.smoothing, "soft_targets": soft_targets}
    return {
        "loss_type": "bce",
        "smoothing": recipe.smoothing,
        "soft_targets": soft_targets,
        "bce_sum": recipe.bce_sum,
        "bce_target_thresh": recipe.bce_target_thresh,
        "pos_weight": recipe.bce_pos_weight,
    }


def create_optimizer(recipe: Recipe, model: nn.Module) -> Optimizer:
    """Return the optimizer of the trainable parameters of ``model``.

    Raises:
        InputError: if the optimizer refuses its settings.
    """
    given: dict[str, Any] = {"eps": recipe.opt_eps, "betas": recipe.opt_betas}
    try:
        return create_optimizer_v2(
            model,
            opt=recipe.opt,
            lr=recipe.lr,
            weight_decay=recipe.weight_decay,
            momentum=recipe.momentum,
            layer_decay=recipe.layer_decay,
            layer_decay_min_scale=recipe.layer_decay_min_scale,
            layer_decay_no_opt_scale=recipe.layer_decay_no_opt_scale,
            **{name: value for name, value in given.items() if value is not None},
            **recipe.opt_kwargs,
        )
    except (TypeError, ValueError, AssertionError) as error:
        raise InputError(f"opt, opt_kwargs: {error}") from None


def restore_optimizer(optimizer: Optimizer, state: dict[str, Any]) -> bool:
    """Load the ``state`` of an optimizer of the same kind, but for its settings, and return True.

    If its groups are others, nothing is loaded, and False returned.
    """
    groups = optimizer.state_dict()["param_groups"]
    if [group["params"] for group in groups] != [group["params"] for group in state["param_groups"]]:
        return False
    optimizer.load_state_dict(state)
    for group, own in zip(optimizer.param_groups, groups, strict=True):
        group.update({name: own[name] for name in own.keys() & SETTINGS})
    return True


def create_scheduler(recipe: Recipe, optimizer: Optimizer, steps: int) -> tuple[Scheduler, int]:
    """Return the learning rate's schedule and the epochs to train, those of warm-up and cool-down included.

    Args:
        recipe: What is asked for.
        optimizer: The optimizer whose learning rates it sets.
        steps: Optimizer steps an epoch.
    """
    scheduler, epochs = create_scheduler_v2(
        optimizer,
        sched=recipe.sched,
        num_epochs=recipe.epochs,
        warmup_epochs=recipe.warmup_epochs,
        warmup_lr=recipe.warmup_lr,
        warmup_prefix=recipe.warmup_prefix,
        cooldown_epochs=recipe.cooldown_epochs,
        min_lr=recipe.min_lr,
        decay_epochs=recipe.decay_epochs,
        decay_milestones=recipe.decay_milestones,
        decay_rate=recipe.decay_rate,
        step_on_epochs=not recipe.sched_on_updates,
        updates_per_epoch=steps,
    )
    assert scheduler is not None
    return scheduler, epochs


def create_scaler(recipe: Recipe, device: torch.device) -> torch.amp.GradScaler:
    """Return the scaler of the loss: at work with float16, else without effect."""
    return torch.amp.GradScaler(device.type, enabled=recipe.amp and recipe.amp_dtype == "float16")
