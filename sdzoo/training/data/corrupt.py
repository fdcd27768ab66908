"""Images that cannot be used: substituted and counted in training, never passed over in silence."""

from __future__ import annotations

from PIL import Image

from sdzoo.errors import InputError
from sdzoo.training.data.sources import Source
from sdzoo.training.streams import stream_seed

MOST = 100
PER_IMAGES = 1000  # one of so many: 0.1 %
ATTEMPTS = 1000  # within the limits on corrupt images, a second attempt is already rare
SHOWN = 5


class CorruptImage(Exception):
    """An image that cannot be decoded, or that no model takes."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name, self.reason = name, reason


class CorruptImages:
    """The corrupt images found so far in ``count`` of training, which may only be few."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.found: dict[str, str] = {}

    def add(self, found: dict[str, str]) -> None:
        """Take note of more of them, name and reason.

        Raises:
            InputError: if they are now more than 0.1 % of the set, or more than 100.
        """
        self.found.update(found)
        check_few(self.found, self.count)


def check_few(found: dict[str, str], count: int) -> None:
    """Check that the corrupt images of a training set are few; ranks that see different ones may sum them up first.

    Raises:
        InputError: naming some of them, if they are more than 0.1 % of ``count``, or more than 100.
    """
    if too_many(found, count):
        raise InputError(
            f"{len(found)} of {count} training images cannot be used; at most {1 / PER_IMAGES:.1%} and at most {MOST} "
            f"are replaced by others: {some(found)}"
        )


def too_many(found: dict[str, str], count: int) -> bool:
    """Return whether :func:`check_few` would raise."""
    return len(found) > MOST or len(found) * PER_IMAGES > count


def refuse(found: dict[str, str]) -> None:
    """Raise for any corrupt image: what is evaluated is the whole split, or what was left out is said.

    Raises:
        InputError: naming them.
    """
    if found:
        raise InputError(f"{some(found)}; an evaluation leaves no image out unless told to (skip corrupt)")


def some(found: dict[str, str]) -> str:
    """Return the first few reasons, which name their images."""
    reasons = [reason if name in reason else f"{name}: {reason}" for name, reason in found.items()]
    more = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return "; ".join(reasons[:SHOWN]) + more


def read(source: Source, index: int) -> Image.Image:
    """Return a sample's picture.

    Raises:
        CorruptImage: if it cannot be decoded, has more than 8 bits a channel, or is too small.
    """
    try:
        return source.image(index)
    except MemoryError:
        raise
    except Exception as error:  # a damaged file raises whatever its bytes happen to ask for
        raise CorruptImage(source.name(index), reason(error)) from None


def reason(error: Exception) -> str:
    """Return one line that says what was wrong."""
    return " ".join(str(error).split()) or type(error).__name__


def read_or_substitute(source: Source, index: int, seed: int, found: dict[str, str]) -> tuple[Image.Image, int]:
    """Return the picture at ``index`` and ``index``; where that one is corrupt, another one and its index.

    Which one follows from ``seed`` and ``index`` alone. What was corrupt is added to ``found``.

    Raises:
        CorruptImage: if they have become too many, or no substitute can be read either.
    """
    taken = index
    for attempt in range(ATTEMPTS):
        try:
            return read(source, taken), taken
        except CorruptImage as error:
            found[error.name] = error.reason
            if too_many(found, len(source)) or attempt + 1 == ATTEMPTS:
                raise
            taken = stream_seed(seed, "substitute", index, attempt) % len(source)
    raise AssertionError
