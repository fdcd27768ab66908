"""Tiny data sets in the formats that are found on disks, and a recipe to read them by."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from sdzoo.training.data.loader import EvaluationData, TrainingData, open_training_data
from sdzoo.training.distributed import Shard
from sdzoo.training.recipe import Recipe, SdzooSettings

CONFIG: dict[str, Any] = {
    "input_size": (3, 32, 32),
    "mean": (0.5, 0.4, 0.3),
    "std": (0.2, 0.25, 0.3),
    "interpolation": "bilinear",
    "crop_pct": 1.0,
}
ALONE = Shard()
HEAVY: dict[str, Any] = {
    "train_crop_mode": None,
    "scale": [0.3, 1.0],
    "vflip": 0.5,
    "color_jitter": 0.4,
    "grayscale_prob": 0.3,
    "gaussian_blur_prob": 0.5,
    "reprob": 0.5,
    "recount": 2,
}
RAND: dict[str, Any] = {"aa": "rand-m9-mstd0.5-inc1", "reprob": 0.3, "remode": "rand"}


def recipe(**changes: Any) -> Recipe:
    held_out = changes.pop("held_out", 0)
    base: dict[str, Any] = {
        "model": "sd_resnet20",
        "num_classes": 3,
        "epochs": 2,
        "lr": 0.1,
        "warmup_epochs": 0,
        "batch_size": 4,
        "workers": 0,
        "seed": 7,
        "train_crop_mode": "pad4",
        "color_jitter": 0.0,
    }
    return Recipe(**base | changes, sdzoo=SdzooSettings(held_out=held_out))


def named_seed(*name: str | int) -> int:
    """Return the seed that a stream's name stands for: the first 63 bits of its sha256."""
    return int(hashlib.sha256(repr(name).encode()).hexdigest()[:16], 16) // 2


def named_generator(*name: str | int) -> torch.Generator:
    return torch.Generator().manual_seed(named_seed(*name))


def noise(count: int, seed: int = 0, size: int = 32) -> np.ndarray:
    """Return pictures ``(N, H, W, 3)``, each unlike any other."""
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), np.uint8)


def write_folder(root: Path, split: str = "train", count: int = 8, classes: int = 3, size: int = 32) -> list[Path]:
    """Write ``count`` PNG files a class and return them in the order of the data set."""
    files = []
    for label in range(classes):
        folder = root / split / f"c{label}"
        folder.mkdir(parents=True)
        for index, pixels in enumerate(noise(count, label + len(split), size)):
            files.append(folder / f"{index:04d}.png")
            Image.fromarray(pixels).save(files[-1], compress_level=1)
    return files


def pixels_of(file: Path) -> Tensor:
    return torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)


def normalised(pixels: Tensor) -> Tensor:
    mean, std = (torch.tensor(CONFIG[name]).view(-1, 1, 1) for name in ("mean", "std"))
    return (pixels.float() / 255 - mean) / std


def write_cifar(root: Path, name: str = "cifar10", count: int = 30) -> tuple[np.ndarray, list[int]]:
    """Write CIFAR's pickles, and return the pixels and labels of train and test, one after the other."""
    ten = name == "cifar10"
    folder = root / ("cifar-10-batches-py" if ten else "cifar-100-python")
    folder.mkdir(parents=True)
    pixels, labels = [], []
    for part, file in enumerate(
        [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"] if ten else ["train", "test"]
    ):
        data = noise(count, part).transpose(0, 3, 1, 2)
        numbers = [(7 * i + part) % (10 if ten else 100) for i in range(count)]
        content = {"data": data.reshape(count, -1), "labels" if ten else "fine_labels": numbers}
        (folder / file).write_bytes(pickle.dumps(content))
        pixels.append(data)
        labels += numbers
    key = "label_names" if ten else "fine_label_names"
    content = {key: [f"class {i}" for i in range(10 if ten else 100)]}
    (folder / ("batches.meta" if ten else "meta")).write_bytes(pickle.dumps(content))
    return np.concatenate(pixels), labels


@pytest.fixture
def any_md5(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torchvision take files that are there, whatever they hold."""
    for module in ("cifar", "svhn"):
        monkeypatch.setattr(f"torchvision.datasets.{module}.check_integrity", lambda path, *_: Path(path).is_file())


def write_shards(root: Path, counts: list[int], name: str = "train", info: bool = True) -> list[tuple[str, bytes, int]]:
    """Write WebDataset shards of PNG pictures, and timm's ``_info.json``; return key, picture and label of each."""
    root.mkdir(parents=True, exist_ok=True)
    written: list[tuple[str, bytes, int]] = []
    files = []
    for shard, count in enumerate(counts):
        files.append(f"x-{name}-{shard:04d}.tar")
        with tarfile.open(root / files[-1], "w") as tar:
            for index, pixels in enumerate(noise(count, 100 + shard)):
                content = io.BytesIO()
                Image.fromarray(pixels).save(content, "PNG")
                key, label = f"{shard:02d}{index:04d}", len(written) % 3
                written.append((key, content.getvalue(), label))
                for kind, data in (("png", content.getvalue()), ("cls", str(label).encode())):
                    member = tarfile.TarInfo(f"{key}.{kind}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    if info:
        split = {"name": name, "num_samples": sum(counts), "filenames": files, "shard_lengths": counts}
        path = root / "_info.json"
        splits = json.loads(path.read_text())["splits"] if path.is_file() else {}
        path.write_text(json.dumps({"splits": splits | {name: split}}))
    return written


def training(root: Path, shard: Shard = ALONE, /, **changes: Any) -> TrainingData:
    """Return the training data of ``made``, or of ``recipe(**changes)``, for a model of ``config``."""
    config, made = changes.pop("config", CONFIG), changes.pop("made", None)
    return open_training_data(made or recipe(**changes), root, config, shard, torch.device("cpu"))


def epoch_of(data: TrainingData, epoch: int = 0, start_step: int = 0) -> list[tuple[Tensor, Tensor]]:
    return list(data.epoch(epoch, start_step))


def stacked(batches: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches])


def all_of(data: EvaluationData) -> tuple[Tensor, Tensor]:
    return stacked(list(data.batches()))


def assert_same(one: list[tuple[Tensor, Tensor]], other: list[tuple[Tensor, Tensor]]) -> None:
    assert len(one) == len(other) > 0
    for (images, labels), (other_images, other_labels) in zip(one, other, strict=True):
        assert torch.equal(images, other_images)
        assert torch.equal(labels, other_labels)
