"""Where samples come from: a split of a named data set as something that can be indexed."""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sdzoo.errors import InputError, nearest
from sdzoo.image_folder import read_image_folder
from sdzoo.images import MODE_OF_CHANNELS, check_image, open_image
from sdzoo.training.data.names import DATASETS, FOLDER, IMAGENET, known_datasets, same_split, synonyms
from sdzoo.training.data.order import held_out
from sdzoo.training.data.torch_sets import READERS


class Source(ABC):
    """Samples by index: a picture, its label, its name."""

    def __init__(self, labels: Tensor, classes: tuple[str, ...], in_chans: int) -> None:
        self.labels, self.classes, self.in_chans = labels, classes, in_chans

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def name(self, index: int) -> str:
        """Return what messages call a sample."""

    @abstractmethod
    def image(self, index: int) -> Image.Image:
        """Return a sample's picture, decoded; whatever its bytes make the decoder raise is let through."""

    @abstractmethod
    def subset(self, indices: Tensor) -> Source:
        """Return the samples at ``indices``, in that order."""

    @abstractmethod
    def sha256(self, contents: bool = True) -> str:
        """Return a digest of what identifies the samples; those in files by what the files hold if ``contents``."""


class FolderSource(Source):
    """Pictures in files, opened when they are asked for."""

    def __init__(
        self, root: Path, files: np.ndarray, labels: Tensor, classes: tuple[str, ...], in_chans: int = 3
    ) -> None:
        super().__init__(labels, classes, in_chans)
        # One array of bytes: a million Python strings would be copied into every worker, reference count by count.
        self.root, self.files = root, files

    def name(self, index: int) -> str:
        return os.path.join(self.root, os.fsdecode(self.files[index]))

    def image(self, index: int) -> Image.Image:
        return open_image(self.name(index), self.in_chans, convert=True)

    def subset(self, indices: Tensor) -> FolderSource:
        return FolderSource(self.root, self.files[indices.numpy()], self.labels[indices], self.classes, self.in_chans)

    def sha256(self, contents: bool = True) -> str:
        """Return a digest of names, labels and, if ``contents``, what the files hold, else their sizes alone.

        Of sizes alone, pictures that others of the same size have replaced go unnoticed.
        """
        digest = hashlib.sha256()
        for index, (file, label) in enumerate(zip(self.files, self.labels.tolist(), strict=True)):
            try:
                if contents:
                    held = hashlib.sha256(Path(self.name(index)).read_bytes()).digest()
                else:
                    held = b"%d" % os.stat(self.name(index)).st_size
            except OSError:
                held = b"-1"  # what cannot be read is the decoder's to say
            digest.update(b"%d %d %s %s\n" % (label, len(file), file, held))
        return digest.hexdigest()


class ArraySource(Source):
    """Pictures held in memory: uint8 ``(N, C, H, W)``."""

    def __init__(
        self, pixels: Tensor, labels: Tensor, classes: tuple[str, ...], in_chans: int = 3, called: str = "image"
    ) -> None:
        super().__init__(labels, classes, in_chans)
        self.pixels, self.called = pixels, called

    def name(self, index: int) -> str:
        return f"{self.called}[{index}]"

    def image(self, index: int) -> Image.Image:
        pixels = self.pixels[index].numpy()
        image = Image.fromarray(pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0)))
        return check_image(image, self.in_chans, True, self.name(index))

    def subset(self, indices: Tensor) -> ArraySource:
        return ArraySource(self.pixels[indices], self.labels[indices], self.classes, self.in_chans, self.called)

    def sha256(self, contents: bool = True) -> str:
        """Return a digest of pixels and labels, always: they are at hand."""
        digest = hashlib.sha256(repr(tuple(self.pixels.shape)).encode())
        for part in (self.pixels, self.labels):
            digest.update(part.contiguous().numpy().data)
        return digest.hexdigest()


@dataclass(frozen=True)
class HeldOut:
    """How many samples of a split are kept for validation, and the seed that chooses them."""

    number: int
    seed: int

    def training(self, source: Source, split: str) -> Source:
        """Return what is left of ``source`` to train on."""
        return self._part(source, split, 0)

    def validation(self, source: Source, split: str) -> Source:
        """Return what is held out of ``source``; all of it if nothing is."""
        return self._part(source, split, 1)

    def _part(self, source: Source, split: str, part: int) -> Source:
        if not self.number:
            return source
        if self.number >= len(source):
            raise InputError(f"held_out is {self.number}; {split} has {len(source)} images")
        return source.subset(held_out(len(source), self.number, self.seed)[part])


def open_source(dataset: str, data_dir: str | Path, split: str, in_chans: int = 3, download: bool = False) -> Source:
    """Return a split of a data set by timm's name for it.

    Args:
        dataset: One of ``DATASETS`` but those of WebDataset.
        data_dir: The folder that holds the data set.
        split: The split's name; only names of this data set are taken.
        in_chans: Channels that the model takes, 1 or 3; pictures of other colour modes are converted.
        download: Let torchvision fetch what is missing.

    Raises:
        InputError: if there is no such data set or split; what to do about it is said.
    """
    if in_chans not in MODE_OF_CHANNELS:
        raise InputError(
            f"the model takes {in_chans} channels; pictures have {' or '.join(map(str, MODE_OF_CHANNELS))}"
        )
    if dataset == FOLDER:
        return _folder(_split_folder(Path(data_dir), split), in_chans)
    if dataset == IMAGENET:
        return _imagenet(Path(data_dir), split, in_chans)
    if dataset not in READERS:
        known = f"{known_datasets()}{nearest(dataset, DATASETS[1:])}"
        raise InputError(f'dataset is "{dataset}"; implemented here: {known}')
    pixels, labels, classes = READERS[dataset](dataset, Path(data_dir), split, download)
    return ArraySource(pixels, labels, classes, in_chans, f"{dataset} {split}")


def _split_folder(data_dir: Path, split: str) -> Path:
    found = [data_dir / name for name in synonyms(split) if (data_dir / name).is_dir()]
    if not split or not found:
        raise InputError(f"{data_dir / split} is not a folder; expected {data_dir}/{split}/<class>/<image>")
    return found[0]


def _folder(folder: Path, in_chans: int) -> FolderSource:
    found = read_image_folder(folder)
    files = np.array([os.fsencode(file) for file in found.files])
    return FolderSource(folder, files, torch.tensor(found.labels), found.classes, in_chans)


def _imagenet(data_dir: Path, split: str, in_chans: int) -> FolderSource:
    """Return ImageNet as torchvision leaves it unpacked; its classes are the WordNet ids, as in a plain folder."""
    if split != "train" and not same_split(split, "val"):
        raise InputError(f'split "{split}" of torch/imagenet; allowed: train, val')
    name = "train" if split == "train" else "val"
    if not (data_dir / name).is_dir():
        unpack = f"python -c \"from torchvision.datasets import ImageNet; ImageNet('{data_dir}', '{name}')\""
        raise InputError(
            f"torch/imagenet: {data_dir / name} is not a folder; with the archives of image-net.org in {data_dir}, "
            f"this unpacks them: {unpack}"
        )
    return _folder(data_dir / name, in_chans)
