"""Random streams named by what they are for, so that each is the same whenever and wherever it is drawn.

Seeds are hashed, never added: ``seed + step`` would make neighbouring seeds overlap.
"""

from __future__ import annotations

import hashlib

import torch


def stream_seed(*name: str | int) -> int:
    """Return a 63-bit seed for the stream called ``name``, such as ``(seed, "gates", step)``."""
    digest = hashlib.sha256(repr(name).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def stream(*name: str | int) -> torch.Generator:
    """Return a CPU generator at the start of the stream called ``name``."""
    return torch.Generator().manual_seed(stream_seed(*name))
