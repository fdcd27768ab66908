"""CIFAR-10, CIFAR-100 and SVHN, through torchvision's readers."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.datasets import CIFAR10, CIFAR100, SVHN

from sdzoo.errors import InputError
from sdzoo.extras import require

Arrays = tuple[Tensor, Tensor, tuple[str, ...]]  # pixels (N, C, H, W) uint8, labels (N,) int64, class names


def read_cifar(dataset: str, data_dir: Path, split: str, download: bool) -> Arrays:
    """Return ``train`` (50 000 images) or ``test`` (10 000) of CIFAR-10 or CIFAR-100.

    Raises:
        InputError: if the set is missing, damaged, or ``split`` is another name.
    """
    _check_split(dataset, split)
    kind = CIFAR10 if dataset == "torch/cifar10" else CIFAR100
    where = (dataset, data_dir, kind.url, download)
    data = _open(lambda: kind(str(data_dir), train=split == "train", download=download), *where)
    pixels = torch.from_numpy(np.ascontiguousarray(data.data.transpose(0, 3, 1, 2)))
    return pixels, torch.tensor(data.targets), tuple(data.classes)


def read_svhn(dataset: str, data_dir: Path, split: str, download: bool) -> Arrays:
    """Return SVHN: ``train`` is train and extra together (604 388 images), as in the paper; ``test`` is 26 032.

    Raises:
        InputError: if the set is missing, damaged, or ``split`` is another name.
        MissingExtra: if scipy is not installed.
    """
    _check_split(dataset, split)
    require("scipy")
    pixels, labels = [], []
    for part in ("train", "extra") if split == "train" else ("test",):
        url = SVHN.split_list[part][0]
        where = (dataset, data_dir, url, download)
        data = _open(lambda part=part: SVHN(str(data_dir), split=part, download=download), *where)
        pixels.append(torch.from_numpy(data.data))
        labels.append(torch.from_numpy(data.labels).view(-1))
    return torch.cat(pixels).contiguous(), torch.cat(labels), tuple("0123456789")


READERS: dict[str, Callable[[str, Path, str, bool], Arrays]] = {
    "torch/cifar10": read_cifar,
    "torch/cifar100": read_cifar,
    "torch/svhn": read_svhn,
}


def _check_split(dataset: str, split: str) -> None:
    # timm would take any other name, also "validation" and "train[:45000]", for the test set
    if split not in ("train", "test"):
        raise InputError(f'split "{split}" of {dataset}; allowed: train, test (held_out keeps a part of train back)')


def _open(make: Callable[[], Any], dataset: str, data_dir: Path, url: str, download: bool) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what numpy thinks of these old files is nothing to act on
            return make()
    except Exception as error:  # missing, damaged, no network; half a pickle raises whatever its bytes ask for
        why = (str(error).splitlines() or [type(error).__name__])[0]
        why = why.removesuffix(" You can use download=True to download it")  # torchvision's, and no key of a recipe
        if download:
            raise InputError(f"{dataset} cannot be read in {data_dir}, nor downloaded from {url} ({why})") from None
        raise InputError(
            f"{dataset} cannot be read in {data_dir} ({why}); a run with dataset_download: true fetches it, a dry run "
            f"does not; or get it from {url}"
        ) from None
