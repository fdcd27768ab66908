"""Top-1 and loss of a model on an image set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from sdzoo.errors import InputError
from sdzoo.train.data import ImageSet


@dataclass(frozen=True)
class Evaluation:
    """What :func:`evaluate` measured."""

    top1_percent: float
    top5_percent: float
    loss: float
    images: int


@torch.inference_mode()
def evaluate(
    model: nn.Module, data: ImageSet, normalise: Callable[[Tensor], Tensor], batch_size: int = 250
) -> Evaluation:
    """Return accuracy and mean cross-entropy of ``model`` on all of ``data``; its training mode is restored.

    Raises:
        InputError: if the data has more classes than the model.
    """
    was_training = model.training
    model.eval()
    total_loss, top1, top5 = 0.0, 0, 0
    try:
        for start in tqdm(range(0, len(data), batch_size), desc="evaluating", leave=False, disable=None):
            logits = model(normalise(data.images[start : start + batch_size])).float()
            if len(data.classes) > logits.shape[1]:
                raise InputError(f"the data has {len(data.classes)} classes, the model {logits.shape[1]}")
            labels = data.labels[start : start + batch_size].to(logits.device)
            total_loss += F.cross_entropy(logits, labels, reduction="sum").item()
            best = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
            top1 += int(best[:, 0].sum())
            top5 += int(best.any(dim=1).sum())
    finally:
        model.train(was_training)
    return Evaluation(100 * top1 / len(data), 100 * top5 / len(data), total_loss / len(data), len(data))
