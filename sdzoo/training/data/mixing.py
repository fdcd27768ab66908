"""Mixup and cutmix by timm's Mixup, the same however a global batch is spread over ranks and micro-batches."""

from __future__ import annotations

import torch
from timm.data import Mixup
from torch import Tensor

from sdzoo.errors import InputError
from sdzoo.training.data.augment import own_generators
from sdzoo.training.recipe import Recipe
from sdzoo.training.streams import stream_seed


class Mixing:
    """Mixes each sample of a global batch of G with the one G / 2 further on.

    Rank r of w holds every w-th sample, so the partner of its sample l is its own sample l + B / 2: all that is drawn
    (once a step, in timm's mode "batch") is how.
    """

    def __init__(self, recipe: Recipe, num_classes: int) -> None:
        self.recipe = recipe
        self.mixup = Mixup(
            mixup_alpha=recipe.mixup,
            cutmix_alpha=recipe.cutmix,
            cutmix_minmax=recipe.cutmix_minmax,
            prob=recipe.mixup_prob,
            switch_prob=recipe.mixup_switch_prob,
            mode="batch",
            label_smoothing=recipe.smoothing,
            num_classes=num_classes,
        )

    def active(self, epoch: int) -> bool:
        """Return whether the batches of ``epoch`` (from 0) are mixed."""
        off = self.recipe.mixup_off_epoch
        return self.recipe.mixes and not (off and epoch >= off)

    def __call__(self, images: Tensor, labels: Tensor, step: int, epoch: int) -> tuple[Tensor, Tensor]:
        """Return mixed images ``(B, C, H, W)`` and soft targets ``(B, classes)``, smoothed, in the batch's order.

        From ``mixup_off_epoch`` on, images are as they are and targets only smoothed.

        Args:
            images: A micro-batch of one rank; left as it is.
            labels: Its class indices ``(B,)``.
            step: The optimizer step since the start of the run.
            epoch: The epoch, from 0.

        Raises:
            InputError: if the batch is odd: its middle sample would have no partner.
        """
        if len(labels) % 2:
            raise InputError(f"batch_size is {len(labels)}; mixup and cutmix need an even one")
        half = len(labels) // 2
        # timm pairs i with B - 1 - i; with the second half reversed, these are l and l + B / 2. Again, it is undone.
        order = torch.cat([torch.arange(half), torch.arange(len(labels) - 1, half - 1, -1)]).to(labels.device)
        self.mixup.mixup_enabled = self.active(epoch)
        with own_generators() as seed:
            seed(stream_seed(self.recipe.seed, "mixup", step))
            mixed, targets = self.mixup(images[order], labels[order])
        return mixed[order], targets[order]
