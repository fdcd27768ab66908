"""From a recipe to the model that it trains."""

from __future__ import annotations

from typing import Any

import timm
from torch import nn

from sdzoo.description import ARCHITECTURE
from sdzoo.errors import InputError
from sdzoo.registry import check_name
from sdzoo.training.recipe import Recipe

# What model_kwargs may hold beside the architecture, which checkpoints keep.
MODEL_KWARGS = ("drop_block_rate", "in_chans", "mode", "pretrained_cfg", "schedule", "survival_probs", "zero_init_last")


def create_model(recipe: Recipe) -> nn.Module:
    """Return the model that ``recipe`` names, newly initialised or pretrained.

    Raises:
        InputError: if there is no such model, or it refuses what the recipe says of it.
    """
    check_name(recipe.model)
    given: dict[str, Any] = {"num_classes": recipe.num_classes} if recipe.num_classes is not None else {}
    overlay = {
        name: getattr(recipe, name) for name in ("mean", "std", "interpolation", "crop_pct") if getattr(recipe, name)
    }
    keywords = {**given, "drop_rate": recipe.drop, "drop_path_rate": recipe.drop_path}
    allowed = (*ARCHITECTURE, *MODEL_KWARGS)
    if other := sorted(recipe.model_kwargs.keys() - set(allowed)):
        raise InputError(f"model_kwargs holds {', '.join(other)}; allowed: {', '.join(sorted(allowed))}")
    if twice := sorted(keywords.keys() & recipe.model_kwargs.keys()):
        raise InputError(f"model_kwargs holds {', '.join(twice)}, which has a key of its own")
    try:
        model = timm.create_model(
            recipe.model,
            pretrained=recipe.pretrained,
            pretrained_cfg_overlay=overlay,
            **keywords,
            **recipe.model_kwargs,
        )
    except InputError:
        raise
    except (TypeError, RuntimeError, KeyError, ValueError, AssertionError) as error:
        raise InputError(f"model, model_kwargs: {type(error).__name__}: {str(error).splitlines()[0]}") from None
    for name in ("mean", "std"):
        values = getattr(recipe, name)
        if values and len(values) != model.in_chans:
            raise InputError(f"{name} has {len(values)} numbers, the model {model.in_chans} channels")
    return model
