"""What the first process of a run tells of it on its way: of each step, and of each epoch."""

from __future__ import annotations

from typing import Any

from sdzoo.training.history import History
from sdzoo.training.profiling import tensorboard_writer
from sdzoo.training.progress import Progress
from sdzoo.training.run_folder import RunFolder, StepLog
from sdzoo.training.step import Step

STEP_CURVES = ("loss", "lr", "live_blocks", "first_conv_gradient")
EPOCH_CURVES = ("val_loss", "val_top1_percent", "train_loss", "live_blocks", "first_conv_gradient")


class Logs:
    """The logs in a run's folder, open from where the run stands; TensorBoard's are there if asked for."""

    def __init__(self, folder: RunFolder, history: History, tensorboard: bool) -> None:
        self._folder = folder
        folder.write_log(history.rows)
        self._steps = StepLog(folder.steps, history.progress)
        self._board = tensorboard_writer(folder.path, history.progress.step) if tensorboard else None

    def step(self, progress: Progress, step: Step) -> None:
        """Add an optimizer step, which ``progress`` counts already."""
        self._steps.add(
            progress.step, progress.epoch + 1, step.lr, step.loss, step.live_blocks, step.first_conv_gradient
        )
        self._draw("step", {name: getattr(step, name) for name in STEP_CURVES}, progress.step)

    def epoch(self, history: History, top1_percent: float, epochs: int, blocks: int) -> None:
        """Add the epoch that has just ended with ``top1_percent`` on val, of ``epochs`` in all, and print it."""
        self._folder.write_log(history.rows)
        row, progress = history.rows[-1], history.progress
        self._draw("epoch", {name: row[name] for name in EPOCH_CURVES}, progress.step)
        best = f"best {progress.best_top1_percent:.2f} % at {progress.best_epoch}"
        print(
            f"epoch {row['epoch']}/{epochs}: loss {row['train_loss']:.3f}, "
            f"val top-1 {top1_percent:.2f} % ({best}), "
            f"live blocks {row['live_blocks']:.2f} of {blocks}, {row['seconds']:.0f} s",
            flush=True,
        )

    def _draw(self, group: str, values: dict[str, Any], step: int) -> None:
        if self._board:
            for name, value in values.items():
                self._board.add_scalar(f"{group}/{name}", value, step)

    def flush(self) -> None:
        """Bring all steps to the disk.

        Raises:
            OSError: naming the file, as on a full disk.
        """
        self._steps.flush()

    def close(self) -> None:
        """Close all files."""
        if self._board:
            self._board.close()
        self._steps.close()
