"""Images held in memory as uint8, at the size that the model takes."""

from __future__ import annotations

from typing import Any

import torch
from tqdm import tqdm

from sdzoo.training.data.augment import Step
from sdzoo.training.data.sources import ArraySource, FolderSource, Source
from sdzoo.training.data.streaming import Samples, Stream, transform_of

MEMORY_LIMIT_GIB = 8
CHUNK = 64
WORTH_WORKERS = 5000  # images; below, starting processes costs more than it saves


def size_gib(count: int, input_size: tuple[int, int, int]) -> float:
    """Return what ``count`` images take in memory."""
    channels, height, width = input_size
    return count * channels * height * width / 2**30


def fits(count: int, input_size: tuple[int, int, int]) -> bool:
    """Return whether ``count`` images may be held in memory."""
    return size_gib(count, input_size) <= MEMORY_LIMIT_GIB


def read_images(
    source: Source,
    steps: list[Step],
    input_size: tuple[int, int, int],
    seed: int | None,
    workers: int,
    called: str,
    show: bool = True,
) -> tuple[ArraySource, dict[str, str]]:
    """Return all of ``source`` in memory, each picture taken through ``steps``, and why some could not be.

    Those are substituted, as in :class:`Samples`, or where ``seed`` is None left out.
    """
    if isinstance(source, ArraySource) and _unchanged(source, steps, input_size):
        return source, {}
    images = torch.empty((len(source), *input_size), dtype=torch.uint8)
    labels = torch.empty(len(source), dtype=torch.int64)
    corrupt: dict[str, str] = {}
    filled = 0
    workers = workers if isinstance(source, FolderSource) and len(source) >= WORTH_WORKERS else 0
    stream = Stream(Samples(source, steps, seed), workers)
    progress = tqdm(
        total=len(source), desc=f"reading {called} images", unit="image", leave=False, disable=None if show else True
    )
    with progress:
        for batch in stream.batches(0, torch.arange(len(source)).split(CHUNK)):
            corrupt.update(batch.corrupt)
            count = len(batch.labels)
            if count:
                images[filled : filled + count], labels[filled : filled + count] = batch.images, batch.labels
            filled += count
            progress.update(CHUNK)
    return ArraySource(images[:filled], labels[:filled], source.classes, input_size[0], called), corrupt


def _unchanged(source: ArraySource, steps: list[Any], input_size: tuple[int, int, int]) -> bool:
    """Return whether pictures come out of ``steps`` as they are: noise of their size does, if nothing is resized."""
    if tuple(source.pixels.shape[1:]) != tuple(input_size):
        return False
    noise = torch.randint(0, 256, (1, *input_size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    picture = ArraySource(noise, source.labels[:1], source.classes, source.in_chans).image(0)
    return torch.equal(transform_of(steps)(picture), noise[0])
