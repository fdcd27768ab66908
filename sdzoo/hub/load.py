"""Loading a published model, from the Hub or a folder: nothing that comes is trusted before it is checked.

``config.json`` first, then the sums, then weights of the size that the configured model has, by their sha256, by their
header, and only then as tensors. Never a pickle.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from torch import nn

from sdzoo.errors import InputError, shown
from sdzoo.hub.layout import CONFIG, MODEL, SUMS, Damaged, compare
from sdzoo.hub.model_config import MAX_CONFIG_BYTES, read_model_config
from sdzoo.hub.source import Repo, Source, once_more, open_source
from sdzoo.training.checkpoint import check_shapes, described_model, load_state, read_checkpoint
from sdzoo.weights.published import known

MAX_HEADER_BYTES = 16_000_000  # of the largest model it is 1.4 million
MAX_FILE_BYTES = 4_000_000_000
FROM_CACHE = ", from the cache as the Hub did not answer"
FLOATS, INTEGERS = ("F64", "F32", "F16", "BF16"), ("I64",)
SAID_TWICE = (
    *("arch", "num_classes", "in_chans", "labels", "mode", "model_kwargs"),
    *("input_size", "mean", "std", "interpolation", "crop_pct"),
)


@dataclass(frozen=True)
class Origin:
    """Where weights came from and how well they are known.

    Attributes:
        source: A repository at its commit, or a folder.
        sha256: Of ``model.safetensors``.
        knew_commit: Whether the user or sdzoo named the commit beforehand; always for a folder.
        knew_sha256: Who did the sha256, "you" or "sdzoo"; None: it came along with the files.
        says_all: Whether the weights say themselves what ``config.json`` says of the model, so that their sha256
            vouches for both; not for the licence, which only ``config.json`` names.
        cached: Whether the Hub could not be asked, and it is what the cache holds.
    """

    source: str
    sha256: str
    knew_commit: bool
    knew_sha256: str | None
    says_all: bool
    cached: bool

    @property
    def pinned(self) -> bool:
        """Whether all was known beforehand; else a check tells damage on the way, and nothing of who wrote it."""
        return self.knew_commit and self.knew_sha256 is not None and self.says_all

    def __str__(self) -> str:
        source = f"{self.source}{FROM_CACHE}" if self.cached else self.source
        if self.pinned:
            known = "you gave it" if self.knew_sha256 == "you" else "sdzoo knows it"
            return f"pinned: {source}, sha256 {self.sha256} as {known}; it is of the weights, not of licence and card"
        if not self.says_all:
            return f"unpinned (its weights do not say what {CONFIG} does, so no sha256 can pin it): {source}"
        checked = "its weights are those that you gave the sha256 of" if self.knew_sha256 else "damage on the way only"
        return f'unpinned ({checked}): {source}; to pin it: load_hub("{self.source}", sha256="{self.sha256}")'


def load_hub(
    name: str | Path,
    sha256: str | None = None,
    cache_dir: str | Path | None = None,
    api: HfApi | None = None,
    say: Callable[[str], None] = print,
) -> nn.Module:
    """Return a published model in evaluation mode, after everything that came was checked.

    Args:
        name: ``org/name``, ``org/name@v1.0`` or, to pin it, ``org/name@COMMIT``; or a folder of the same layout, also
            as ``local-dir:DIR``. Where there is a folder ``org/name``, it is meant; ``hub:org/name`` is on the Hub.
        sha256: What ``model.safetensors`` must have. Default: what sdzoo knows; else what ``SHA256SUMS`` says.
        cache_dir: Where what is downloaded lies; default: huggingface_hub's cache.
        api: Whom to ask (:func:`sdzoo.hub.remote.client`); default: HF_ENDPOINT, or else the public Hub.
        say: Called with one line: whether it was *pinned*, commit and sha256 known beforehand, or *unpinned*.

    Raises:
        InputError: if there is no such model, it may not be read, or anything about it is not as it must be.
        HubError: an OSError, if the Hub cannot be reached and the model is not in the cache.
    """
    model, origin = open_hub(name, sha256, cache_dir, api)
    say(str(origin))
    return model


def open_hub(
    name: str | Path, sha256: str | None = None, cache_dir: str | Path | None = None, api: HfApi | None = None
) -> tuple[nn.Module, Origin]:
    """Return what :func:`load_hub` does, and where it came from, and say nothing."""
    if sha256 is not None and not re.fullmatch("[0-9a-fA-F]{64}", sha256):
        raise InputError(f'sha256 is "{shown(sha256)}"; 64 hexadecimal digits')
    source = open_source(name, cache_dir, api)
    pin = known(source.name, source.commit) if isinstance(source, Repo) else None
    expected = sha256.lower() if sha256 else pin.sha256 if pin else None
    description, path, found = once_more(lambda again: _fetch(source, expected, again), source)
    model, says_all = _load(description, path, f"{MODEL} of {source}")
    source.remember()
    knew_commit = not isinstance(source, Repo) or source.pinned or pin is not None
    knew_sha256 = "you" if sha256 else "sdzoo" if pin else None
    cached = isinstance(source, Repo) and source.sizes is None
    return model, Origin(str(source), found, knew_commit, knew_sha256, says_all, cached)


def verify_hub(name: str | Path, cache_dir: str | Path | None = None, api: HfApi | None = None) -> str:
    """Compare a repository or a folder with its ``SHA256SUMS``, file by file, and return what was compared.

    Of a repository every file is fetched anew. Where the Hub does not answer, those in the cache are compared, and what
    is returned says so.

    Raises:
        Damaged: an InputError, naming the files that are changed, missing or not listed; and as :func:`load_hub`.
    """
    source = open_source(name, cache_dir, api)
    sums = once_more(lambda again: _compare(source, again), source)
    source.remember()
    cached = FROM_CACHE if isinstance(source, Repo) and source.sizes is None else ""
    return f"{source}{cached}: {len(sums)} files are what {SUMS} says"


def _compare(source: Source, again: bool) -> dict[str, str]:
    if (total := source.total_bytes()) > 3 * MAX_FILE_BYTES:
        raise InputError(f"{source} has {total:,} bytes; at most {3 * MAX_FILE_BYTES:,}")
    anew = source.can_come_again() and not again
    sums = source.sums(anew or again)
    names = source.names()
    there = set(sums) if names is None else names - {SUMS}
    differing = [name for name in sorted(sums.keys() & there) if _differs(source, name, sums[name], anew)]
    if again:
        differing = [name for name in differing if _differs(source, name, sums[name], True)]
    compare(sums, there, differing, str(source))
    return sums


def _differs(source: Source, name: str, sha256: str, again: bool) -> bool:
    try:
        source.checked(name, sha256, MAX_FILE_BYTES, again)
    except Damaged:
        return True
    return False


def _fetch(source: Source, expected: str | None, again: bool) -> tuple[dict[str, Any], Path, str]:
    """Return the description of the model, the path of its weights, and their sha256, fetched in this order."""
    config = source.file(CONFIG, MAX_CONFIG_BYTES, again)
    sums = source.sums(again)
    for name in (CONFIG, MODEL):
        if name not in sums:
            raise Damaged(f"{SUMS} of {source} does not list {name}")
    if expected and expected != sums[MODEL]:
        raise Damaged(f"{MODEL} of {source} has sha256 {sums[MODEL]}, says its {SUMS}; it should have {expected}")
    source.checked(CONFIG, sums[CONFIG], MAX_CONFIG_BYTES)
    try:
        description = read_model_config(config.read_bytes())
    except InputError as error:
        raise InputError(f"{source}: {error}") from None
    room = _numbers(_on_meta(description, str(source))) * 8 + MAX_HEADER_BYTES
    return description, source.checked(MODEL, sums[MODEL], min(room, MAX_FILE_BYTES), again), sums[MODEL]


def _shape(numbers: list[int]) -> tuple[int, ...]:
    shape = tuple(map(int, numbers))
    if len(shape) > 8 or not all(0 <= number < 1 << 63 for number in shape):
        raise ValueError
    return shape


def _on_meta(description: dict[str, Any], source: str) -> nn.Module:
    with torch.device("meta"):
        return described_model(description, source)


def _numbers(model: nn.Module) -> int:
    return sum(tensor.numel() for tensor in model.state_dict().values())


def _load(description: dict[str, Any], path: Path, source: str) -> tuple[nn.Module, bool]:
    """Return the model, and whether its weights say all of ``description``; what they do say must agree with it."""
    check_header(path, _on_meta(description, source), source)
    state, own = read_checkpoint(path)
    for name in SAID_TWICE:
        if name in own and (own[name] or None) != (description.get(name) or None):
            raise InputError(
                f"{source} says {name} is {own[name]!r:.120}; {CONFIG} says {description.get(name)!r:.120}"
            )
    model = described_model(description, source)
    load_state(model, state, source)
    return model.eval(), own.keys() >= set(SAID_TWICE)


def check_header(path: Path, model: nn.Module, source: str) -> None:
    """Check what a safetensors file says that it holds, before any of it is read, by a ``model`` on ``meta``.

    Raises:
        InputError: if the header is longer than the file or 16 MB, no JSON, or of other tensors than the model's.
    """
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(MAX_HEADER_BYTES, path.stat().st_size - 8):
            raise InputError(f"{source} is no whole safetensors file: its header claims {length:,} bytes")
        content = file.read(length)
    try:
        header = json.loads(content)
        header.pop("__metadata__", None)
        shapes = {name: _shape(tensor["shape"]) for name, tensor in header.items()}
        kinds = {name: tensor["dtype"] for name, tensor in header.items()}
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        raise InputError(f"{source} is no whole safetensors file: its header is not one") from None
    if strange := [name for name in shapes if not name.isprintable() or len(name) > 200]:
        raise InputError(f"{source}: {strange[0][:80]!r} is not the name of a tensor")
    check_shapes(model, shapes, source)
    for name, tensor in model.state_dict().items():
        allowed = FLOATS if tensor.is_floating_point() else INTEGERS
        if name in kinds and kinds[name] not in allowed:
            raise InputError(f"{source}: {name[:80]!r} is {str(kinds[name])[:20]!r}; {' or '.join(allowed)}")
