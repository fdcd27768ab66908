"""Small-image data sets held in memory as uint8, augmented as whole batches on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.data.readers.reader_image_folder import ReaderImageFolder
from torch import Tensor
from tqdm import tqdm

from sdzoo.errors import InputError
from sdzoo.images import open_image, resizer
from sdzoo.training.streams import stream

PAD = 4
MEMORY_LIMIT_GIB = 8


@dataclass(frozen=True)
class ImageSet:
    """Images ``(N, C, H, W)`` as uint8, labels ``(N,)`` as int64, and the class names that the labels index."""

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)


def load_image_set(data_dir: str | Path, split: str, data_config: dict[str, Any]) -> ImageSet:
    """Return the images of ``data_dir/split/<class>/*``, resized and cropped as timm's evaluation does.

    Args:
        data_dir: Folder with one folder a split.
        split: Name of the split's folder.
        data_config: timm's, of the model: ``input_size``, ``interpolation``, ``crop_pct``.

    Raises:
        InputError: if the folder is missing or holds no images, an image is damaged, or they do not fit into memory.
    """
    folder = Path(data_dir) / split
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; expected {data_dir}/{split}/<class>/<image>")
    try:
        reader = ReaderImageFolder(str(folder))
    except RuntimeError:
        raise InputError(f"{folder} holds no images; expected {folder}/<class>/<image>") from None
    in_chans, height, width = data_config["input_size"]
    size_gib = len(reader) * in_chans * height * width / 2**30
    if size_gib > MEMORY_LIMIT_GIB:
        raise InputError(f"{folder} would take {size_gib:.1f} GiB of memory; at most {MEMORY_LIMIT_GIB}")
    resize = resizer(data_config)
    images = np.empty((len(reader), in_chans, height, width), dtype=np.uint8)
    labels = np.empty(len(reader), dtype=np.int64)
    for index in tqdm(range(len(reader)), desc=f"reading {split}", unit="image", leave=False, disable=None):
        file, labels[index] = reader[index]
        file.close()
        images[index] = resize(open_image(file.name, in_chans, convert=True))
    classes = sorted(reader.class_to_idx, key=reader.class_to_idx.__getitem__)
    return ImageSet(torch.from_numpy(images), torch.from_numpy(labels), tuple(classes))


def normaliser(mean: Iterable[float], std: Iterable[float], device: torch.device) -> Callable[[Tensor], Tensor]:
    """Return the function from uint8 images to ``(x / 255 - mean) / std``, on ``device``."""
    shift = torch.tensor([m * 255 for m in mean], device=device).view(1, -1, 1, 1)
    scale = torch.tensor([s * 255 for s in std], device=device).view(1, -1, 1, 1)
    return lambda images: (images.to(device, non_blocking=True).float() - shift) / scale


def pad_crop_flip(images: Tensor, offsets: Tensor, flips: Tensor) -> Tensor:
    """Return each of ``images`` ``(B, C, H, W)`` shifted and mirrored: the paper's augmentation.

    Args:
        images: Normalised images; what is shifted in is zero, the mean and not black.
        offsets: ``(B, 2)`` in 0..8: rows and columns into the image padded by 4; 4 is no shift.
        flips: ``(B,)`` bool: mirror left to right.
    """
    batch, _, height, width = images.shape
    padded = F.pad(images, (PAD, PAD, PAD, PAD)).permute(0, 2, 3, 1)
    rows = offsets[:, 0, None] + torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device).expand(batch, width)
    columns = offsets[:, 1, None] + torch.where(flips[:, None], columns.flip(1), columns)
    sample = torch.arange(batch, device=images.device)[:, None, None]
    return padded[sample, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


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
    """Yield the batches ``start``, ``start + 1``, ... of an epoch: normalised images and labels; the last partial one
    is left out.

    Order and augmentation follow from seed and epoch alone, an image's augmentation from its index: whatever the batch
    it stands in, and wherever an interrupted epoch goes on.
    """
    order = torch.randperm(len(data), generator=stream(seed, "order", epoch))
    offsets = torch.randint(0, 2 * PAD + 1, (len(data), 2), generator=stream(seed, "crop", epoch))
    flips = torch.rand(len(data), generator=stream(seed, "flip", epoch)) < hflip
    for batch in range(start, len(data) // batch_size):
        chosen = order[batch * batch_size : (batch + 1) * batch_size]
        images = normalise(data.images[chosen])
        device = images.device
        if augment:
            images = pad_crop_flip(images, offsets[chosen].to(device), flips[chosen].to(device))
        yield images, data.labels[chosen].to(device)
