"""What the engine imports until it iterates over TrainingData and EvaluationData."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdzoo.training.data.augment import PAD, evaluation_steps, pad_crop_flip
from sdzoo.training.data.corrupt import refuse
from sdzoo.training.data.image_set import read_images
from sdzoo.training.data.order import micro_batches
from sdzoo.training.data.sources import open_source
from sdzoo.training.distributed import Shard
from sdzoo.training.streams import stream


@dataclass(frozen=True)
class ImageSet:
    """Images ``(N, C, H, W)`` as uint8, labels ``(N,)`` as int64, and the class names that the labels index."""

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)


def load_image_set(data_dir: str | Path, split: str, data_config: dict[str, Any]) -> ImageSet:
    """Return the images of ``data_dir/split/<class>/*``, resized and cropped as timm's evaluation does."""
    config = {"mean": (0.5,) * data_config["input_size"][0], **data_config}
    source = open_source("", data_dir, split, data_config["input_size"][0])
    read, corrupt = read_images(source, evaluation_steps(config), data_config["input_size"], None, 0, split)
    refuse(corrupt)
    return ImageSet(read.pixels, read.labels, read.classes)


def training_batches(
    data: ImageSet,
    normalise: Callable[[Tensor], Tensor],
    batch_size: int,
    seed: int,
    epoch: int,
    start: int = 0,
    augment: bool = True,
    hflip: float = 0.5,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the batches ``start``, ``start + 1``, ... of an epoch: normalised images and labels."""
    offsets = torch.randint(0, 2 * PAD + 1, (len(data), 2), generator=stream(seed, "crop", epoch))
    flips = torch.rand(len(data), generator=stream(seed, "flip", epoch)) < hflip
    for chosen in micro_batches(len(data), seed, epoch, batch_size, 1, Shard(), start):
        images = normalise(data.images[chosen])
        device = images.device
        if augment:
            images = pad_crop_flip(images, offsets[chosen].to(device), flips[chosen].to(device))
        yield images, data.labels[chosen].to(device)
