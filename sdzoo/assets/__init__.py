"""Ten real pictures, one a class of CIFAR-10: what the demo classifies and exports are verified on.

They are the first of each class of the test split of CIFAR-10 (Krizhevsky, 2009) as JPEG; chosen by position, not by
what a model says of them.
"""

from __future__ import annotations

from pathlib import Path


def pictures() -> dict[str, Path]:
    """Return the file of each picture, by class name."""
    return {file.stem: file for file in sorted(Path(__file__).parent.glob("*.jpg"))}
