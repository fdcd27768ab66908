"""The names of sdzoo's models and of the weights that ship."""

from __future__ import annotations

import timm

from sdzoo.errors import InputError, nearest

PATTERN = "sd_resnet*"


def models() -> list[str]:
    """Return the names of sdzoo's models, smallest first."""
    return timm.list_models(PATTERN)


def tags(model: str) -> list[str]:
    """Return the tags of the weights that ship for ``model``."""
    return [name.partition(".")[2] for name in timm.list_pretrained(model)]


def check_name(name: str) -> None:
    """Check that ``name`` is one of sdzoo's models, and if it has a tag, one with these weights.

    Raises:
        InputError: naming the nearest.
    """
    model, _, tag = name.partition(".")
    if model not in models():
        raise InputError(f'"{model}" is not a model{nearest(model, models())}')
    if tag and tag not in tags(model):
        known = f"it has: {', '.join(tags(model))}" if tags(model) else "it has none"
        raise InputError(f'{model} has no weights "{tag}"; {known}{nearest(tag, tags(model))}')
