"""The two kinds of failure a caller can act on."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """What was asked for cannot be done: the message says what was got, what is allowed, and where."""


class ParityError(RuntimeError):
    """Two things that must compute the same function do not."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``"; nearest: x"`` for the known name closest to ``name``, or ``""`` if none is close."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; nearest: {close[0]}" if close else ""
