"""Top-1, top-5 and loss on a data set, of a model in training or of anything that predicts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from sdzoo.errors import InputError
from sdzoo.training.data.loader import EvaluationData, open_split
from sdzoo.training.data.names import in_shards
from sdzoo.training.data.sources import HeldOut, open_source
from sdzoo.training.distributed import Processes


class Stopped(Exception):
    """The evaluation was asked to stop."""


@dataclass(frozen=True)
class Evaluation:
    """What :func:`evaluate` measured, on how many images, and which corrupt ones were left out."""

    top1_percent: float
    top5_percent: float
    loss: float
    images: int
    corrupt: tuple[str, ...] = ()


@dataclass(frozen=True)
class DataSplit:
    """A split of a data set on the disk."""

    data_dir: str | Path
    split: str
    dataset: str = ""
    skip_corrupt: bool = False

    def __str__(self) -> str:
        return f"{self.dataset} {self.split} in {self.data_dir}" if self.dataset else f"{self.data_dir}/{self.split}"


@torch.inference_mode()
def evaluate(
    model: Callable[[Tensor], Tensor],
    data: EvaluationData,
    team: Processes | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Evaluation:
    """Return accuracy and mean cross-entropy of ``model`` on all of ``data``.

    Args:
        model: From normalised images to logits; a module is put into evaluation and back.
        data: The images; of several processes, each has its part.
        team: The processes that share the data, whose results are added up.
        stop: Asked before every batch whether to go on no further.

    Raises:
        InputError: if the data has another number of classes than the model, or no images.
        Stopped: on every process, if one was to stop.
    """
    modes = {module: module.training for module in model.modules()} if isinstance(model, nn.Module) else {}
    if isinstance(model, nn.Module):
        model.eval()
    loss, top1, top5, images, stopped = 0.0, 0.0, 0.0, 0.0, 0.0
    hidden = None if team is None or team.leads else True
    try:
        for batch, labels in tqdm(data.batches(), desc="evaluating", unit="batch", leave=False, disable=hidden):
            if stop():
                stopped = 1.0
                break
            logits = model(batch).float()
            if len(data.classes) != logits.shape[1]:
                raise InputError(f"the data has {len(data.classes)} classes, the model {logits.shape[1]}")
            labels = labels.to(logits.device)
            loss += F.cross_entropy(logits, labels, reduction="sum").item()
            hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
            top1 += int(hits[:, 0].sum())
            top5 += int(hits.any(dim=1).sum())
            images += len(labels)
    finally:
        for module, training in modes.items():
            module.training = training
    if team is not None:
        loss, top1, top5, images, stopped = team.total(loss, top1, top5, images, stopped)
    if stopped:
        raise Stopped
    if not images:
        raise InputError("there are no images to evaluate on")
    return Evaluation(100 * top1 / images, 100 * top5 / images, loss / images, int(images), tuple(data.corrupt))


def evaluate_predictor(
    predictor: Callable[[NDArray[np.float32]], NDArray[np.float32]],
    labels: list[str] | None,
    config: dict[str, Any],
    split: DataSplit,
) -> Evaluation:
    """Return what ``predictor`` reaches on a split.

    Args:
        predictor: From normalised arrays ``(B, C, H, W)`` to logits.
        labels: Its class names, which must be those of the data; None if it has none.
        config: Its timm data config: input size, mean, std, interpolation, crop.
        split: What to measure on.

    Raises:
        InputError: if the data cannot be read, or are of other classes.
    """
    data = _open(split, config, len(labels) if labels else None)
    if labels and tuple(labels) != data.classes and not in_shards(split.dataset):  # whose classes have no names
        raise InputError(f"the classes of {split} are not the model's: {', '.join(data.classes)}; {', '.join(labels)}")
    return evaluate(lambda images: torch.from_numpy(predictor(images.numpy())), data)


def recalibration_data(config: dict[str, Any], split: DataSplit, number: int, seed: int = 0) -> EvaluationData:
    """Return ``number`` images of ``split``, chosen and mixed by ``seed``, normalised and not augmented, in batches.

    Mixed, for BatchNorm takes the statistics of a batch: of one class they would be that class's.

    Raises:
        InputError: if there are fewer, or the split cannot be drawn from.
    """
    if in_shards(split.dataset):
        raise InputError(f"--recalibrate-bn {number}: {split.dataset} is read from end to end, not by image")
    there = len(open_source(split.dataset, split.data_dir, split.split, config["input_size"][0]))
    if number > there:
        raise InputError(f"--recalibrate-bn {number}: {split} has {there} images")
    return _open(split, config, None, None if number == there else HeldOut(number, seed), seed)


def _open(
    split: DataSplit,
    config: dict[str, Any],
    num_classes: int | None,
    held_out: HeldOut | None = None,
    order_seed: int | None = None,
) -> EvaluationData:
    return open_split(
        split.dataset,
        split.data_dir,
        split.split,
        config,
        skip_corrupt=split.skip_corrupt,
        num_classes=num_classes,
        held_out=held_out,
        order_seed=order_seed,
    )
