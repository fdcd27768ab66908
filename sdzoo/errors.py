"""The two kinds of failure a caller can act on."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """What was asked for cannot be done: the message says what was got, what is allowed, and where."""


class ParityError(RuntimeError):
    """Two things that must compute the same function do not."""


def shown(value: object, limit: int = 80) -> str:
    """Return what a stranger wrote as it may go to a terminal: printable, in one line, at most ``limit`` characters."""
    text = str(value)
    plain = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:limit])
    return plain[:limit] + ("..." if len(plain) > limit or len(text) > limit else "")


def shown_names(names: Iterable[str], most: int = 10) -> str:
    """Return the first ``most`` of ``names``, sorted and each as :func:`shown`, and how many more there are."""
    ordered = sorted(names)
    return ", ".join(map(shown, ordered[:most])) + f" and {len(ordered) - most} more" * (len(ordered) > most)


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``"; nearest: x"`` for the known name closest to ``name``, or ``""`` if none is close."""
    close = difflib.get_close_matches(name, list(known), n=5, cutoff=0.6)
    if not close:
        return ""
    # Among equally close ones, that which begins alike: sd_resnet21 is rather sd_resnet20 than sd_resnet32.
    return f"; nearest: {max(close, key=lambda other: (_likeness(other, name), _common_start(other, name)))}"


def _likeness(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one, other).ratio()


def _common_start(one: str, other: str) -> int:
    return next(
        (index for index, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(map(len, (one, other)))
    )
