"""Where a run stands; with the recipe, the data and the weights it is all that a checkpoint needs to go on."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass
class Progress:
    """The place of a run among its epochs and steps, and what its log says at the end of this epoch."""

    epoch: int = 0
    step: int = 0  # optimizer steps since the start of the run
    batch: int = 0  # optimizer steps done in this epoch
    left: bool = False  # whether they are all done and the processes' models made one: it remains to validate
    loss_sum: float = 0.0  # over those of them whose loss was finite, which under AMP not all need be
    losses: int = 0
    live_sum: int = 0
    gradient_sum: float = 0.0  # as for the loss
    gradients: int = 0
    data_s: float = 0.0  # over all sessions of the run: waiting for data,
    step_s: float = 0.0  # forward, backward and update,
    log_s: float = 0.0  # logs and checkpoints,
    validation_s: float = 0.0
    best_epoch: int = 0
    best_top1_percent: float = -1.0

    @property
    def seconds(self) -> float:
        """Seconds of training and validation, over all sessions of the run."""
        return self.data_s + self.step_s + self.log_s + self.validation_s

    @property
    def mean_loss(self) -> float:
        """Of this epoch's steps; NaN if none was finite."""
        return _mean(self.loss_sum, self.losses)

    @property
    def mean_gradient(self) -> float:
        """Of this epoch's steps: the mean magnitude in the first convolution; NaN if none was finite."""
        return _mean(self.gradient_sum, self.gradients)

    @property
    def mean_live_blocks(self) -> float:
        """Of this epoch's steps."""
        return _mean(self.live_sum, self.batch)

    def count(self, loss: float, live_blocks: int, gradient: float) -> None:
        """Count an optimizer step."""
        self.batch += 1
        self.step += 1
        self.live_sum += live_blocks
        if math.isfinite(loss):
            self.loss_sum += loss
            self.losses += 1
        if math.isfinite(gradient):
            self.gradient_sum += gradient
            self.gradients += 1

    def start_epoch(self) -> None:
        """Forget the steps of this epoch."""
        self.left = False
        self.batch = self.losses = self.gradients = self.live_sum = 0
        self.loss_sum = self.gradient_sum = 0.0


def _mean(total: float, count: int) -> float:
    return total / count if count else math.nan
