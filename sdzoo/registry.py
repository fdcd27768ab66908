"""The names of sdzoo's models and of their weights."""

from __future__ import annotations

import re
from collections.abc import Sequence

import timm

from sdzoo.errors import InputError, nearest


def models(patterns: Sequence[str] = (), pretrained: bool = False) -> list[str]:
    """Return the names of sdzoo's models in timm's order: those that its package registered, whatever they are called.

    Args:
        patterns: Wildcards as of ``timm.list_models``; a model is listed if one of them matches. None: all.
        pretrained: Only those with weights, as ``model.tag``.

    Raises:
        InputError: if a pattern matches nothing, naming the nearest.
    """
    for pattern in patterns:
        if not _listed([pattern], pretrained=False) and not _listed([pattern], pretrained):
            raise InputError(f'"{pattern}" matches no model{nearest(re.sub(r"[*?]", "", pattern), _listed())}')
        if not _listed([pattern], pretrained):
            raise InputError(f'"{pattern}" matches no model with weights; sdzoo list --pretrained shows those')
    return _listed(patterns, pretrained)


def _listed(patterns: Sequence[str] = (), pretrained: bool = False) -> list[str]:
    names = timm.list_models(list(patterns), pretrained=pretrained)
    return [name for name in names if timm.models.model_entrypoint(name).__module__.split(".")[0] == __package__]


def tags(model: str) -> list[str]:
    """Return the tags of the weights that there are for ``model``, in the package or on the Hub."""
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
