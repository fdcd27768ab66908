"""Top-1, top-5 and loss on an image set, of a model in training or of anything that predicts."""

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
from sdzoo.training.data import ImageSet, load_image_set, normaliser


@dataclass(frozen=True)
class Evaluation:
    """What :func:`evaluate` measured."""

    top1_percent: float
    top5_percent: float
    loss: float
    images: int


@torch.inference_mode()
def evaluate(
    model: Callable[[Tensor], Tensor],
    data: ImageSet,
    normalise: Callable[[Tensor], Tensor],
    batch_size: int = 250,
) -> Evaluation:
    """Return accuracy and mean cross-entropy of ``model`` on all of ``data``.

    Args:
        model: From normalised images to logits; a module is put into evaluation and back.
        data: Images and labels.
        normalise: From uint8 images to what ``model`` takes, on its device.
        batch_size: Images a call.

    Raises:
        InputError: if the data has more classes than the model.
    """
    modes = {module: module.training for module in model.modules()} if isinstance(model, nn.Module) else {}
    if isinstance(model, nn.Module):
        model.eval()
    total_loss, top1, top5 = 0.0, 0, 0
    try:
        for start in tqdm(range(0, len(data), batch_size), desc="evaluating", unit="batch", leave=False, disable=None):
            logits = model(normalise(data.images[start : start + batch_size])).float()
            if len(data.classes) > logits.shape[1]:
                raise InputError(f"the data has {len(data.classes)} classes, the model {logits.shape[1]}")
            labels = data.labels[start : start + batch_size].to(logits.device)
            total_loss += F.cross_entropy(logits, labels, reduction="sum").item()
            hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
            top1 += int(hits[:, 0].sum())
            top5 += int(hits.any(dim=1).sum())
    finally:
        for module, training in modes.items():
            module.training = training
    return Evaluation(100 * top1 / len(data), 100 * top5 / len(data), total_loss / len(data), len(data))


def evaluate_predictor(
    predictor: Callable[[NDArray[np.float32]], NDArray[np.float32]],
    labels: list[str] | None,
    config: dict[str, Any],
    data_dir: str | Path,
    split: str,
) -> Evaluation:
    """Return what ``predictor`` reaches on the images of ``data_dir/split/<class>/*``.

    Args:
        predictor: From normalised arrays ``(B, C, H, W)`` to logits.
        labels: Its class names, which must be those of the data; None if it has none.
        config: Its timm data config: input size, mean, std, interpolation, crop.
        data_dir: Folder with one folder a split.
        split: Name of the split's folder.

    Raises:
        InputError: if the data cannot be read, or are of other classes.
    """
    data = load_image_set(data_dir, split, config)
    if labels and tuple(labels) != data.classes:
        raise InputError(
            f"the classes of {data_dir}/{split} are not the model's: {', '.join(data.classes)}; {', '.join(labels)}"
        )
    normalise = normaliser(config["mean"], config["std"], torch.device("cpu"))
    return evaluate(lambda images: torch.from_numpy(predictor(images.numpy())), data, normalise)
