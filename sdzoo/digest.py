"""Digests that tell damage: of a file, of a file that holds its own, and of a model's weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, uint8

BLANK = "0" * 64


def file_sha256(path: str | Path) -> str:
    """Return the sha256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def sealed(content: bytes) -> bytes:
    """Return ``content`` with the one run of 64 zeros that it holds replaced by the sha256 of ``content``."""
    if content.count(BLANK.encode()) != 1:
        raise ValueError("there must be one place for the digest")
    return content.replace(BLANK.encode(), hashlib.sha256(content).hexdigest().encode())


def seal_holds(content: bytes, seal: str) -> bool:
    """Return whether ``seal`` stands in ``content`` and is the sha256 of ``content`` with zeros in its place."""
    opened = content.replace(seal.encode(), BLANK.encode())
    return opened != content and hashlib.sha256(opened).hexdigest() == seal


def state_sha256(state: Mapping[str, Tensor]) -> str:
    """Return the sha256 over name, dtype, shape and bytes of every tensor, sorted by name."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(uint8).numpy().tobytes())
    return digest.hexdigest()
