"""From a recipe to the model that it trains."""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import Tensor, nn

from sdzoo.errors import InputError
from sdzoo.training.checkpoint import load_state, read_checkpoint
from sdzoo.training.recipe import Recipe


def create_model(recipe: Recipe) -> nn.Module:
    """Return the model that ``recipe`` names, with its first weights; all but the head is frozen if it says so.

    Args:
        recipe: One without faults.

    Raises:
        InputError: if the model refuses what the recipe says of it, or the checkpoint does not fit.
    """
    names = ("mean", "std", "interpolation", "crop_pct")
    overlay = {name: getattr(recipe, name) for name in names if getattr(recipe, name)}
    keywords: dict[str, Any] = {"drop_rate": recipe.drop, "drop_path_rate": recipe.drop_path}
    if recipe.num_classes is not None:
        keywords["num_classes"] = recipe.num_classes
    if recipe.drop_block is not None:
        keywords["drop_block_rate"] = recipe.drop_block
    if recipe.input_size is not None:
        overlay["input_size"], keywords["in_chans"] = tuple(recipe.input_size), recipe.input_size[0]
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
    if recipe.initial_checkpoint:
        _load_weights(model, recipe.initial_checkpoint, new_head=recipe.num_classes is not None)
    _start_head(model, recipe)
    return model


def enter_training(model: nn.Module, recipe: Recipe) -> None:
    """Put what ``recipe`` trains of ``model`` into training mode, and the rest, if it is frozen, into evaluation mode.

    In evaluation mode the gates are off and the statistics of BatchNorm stay as they are.
    """
    model.train()
    if recipe.sdzoo.trainable == "head":
        classifier = _classifier(model)[1]
        for child in model.children():
            if child is not classifier and child.state_dict():  # dropout before the classifier belongs to the head
                child.eval()


def _load_weights(model: nn.Module, path: str, new_head: bool) -> None:
    """Load a checkpoint, as timm does: the averaged weights if there are any; with ``new_head`` a classifier that fits.

    Through ``load_state_dict``, so that survival probabilities are taken or rescaled by the rule for all weights.
    """
    state, rest = read_checkpoint(path)
    averaged = rest.get("state_dict_ema")
    if isinstance(averaged, dict) and averaged and all(isinstance(value, Tensor) for value in averaged.values()):
        state = averaged
    if new_head:
        name, classifier = _classifier(model)
        fresh = classifier.state_dict(prefix=f"{name}.")
        other_size = {key for key in fresh if key in state and state[key].shape != fresh[key].shape}
        state = state | {key: fresh[key] for key in other_size}
    load_state(model, state, path)


def _start_head(model: nn.Module, recipe: Recipe) -> None:
    name, classifier = _classifier(model)
    if recipe.head_init_scale is not None or recipe.head_init_bias is not None or recipe.sdzoo.trainable == "head":
        if not isinstance(classifier, nn.Linear):
            raise InputError("head_init_scale, head_init_bias, sdzoo.trainable: the model has no classifier")
        with torch.no_grad():
            if recipe.head_init_scale is not None:
                classifier.weight.mul_(recipe.head_init_scale)
                classifier.bias.mul_(recipe.head_init_scale)
            if recipe.head_init_bias is not None:
                classifier.bias.fill_(recipe.head_init_bias)
    if recipe.sdzoo.trainable == "head":
        for parameter_name, parameter in model.named_parameters():
            parameter.requires_grad = parameter_name.startswith(f"{name}.")


def _classifier(model: nn.Module) -> tuple[str, nn.Module]:
    found = model.get_classifier()  # type: ignore[operator]
    return next((name, module) for name, module in model.named_modules() if module is found)
