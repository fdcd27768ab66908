"""What a run remembers and its checkpoint keeps: where it stands, what each epoch came to, what was unusual."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sdzoo.training.evaluate import Evaluation
from sdzoo.training.progress import Progress
from sdzoo.training.run_folder import EPOCH_COLUMNS


@dataclass
class History:
    """All that a run is, besides its weights and what tells it from others.

    Attributes:
        progress: Where it stands.
        rows: Of the log, one an epoch that is done.
        trained_in: The environments that it was trained in, each other than the one before.
        forced: From which epochs on, and against what, it was forced to go on.
        corrupt: The images that could not be read, and why.
    """

    progress: Progress = field(default_factory=Progress)
    rows: list[dict[str, Any]] = field(default_factory=list)
    trained_in: list[dict[str, Any]] = field(default_factory=list)
    forced: list[str] = field(default_factory=list)
    corrupt: dict[str, str] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """Return plain values, for a checkpoint."""
        return {
            "progress": dataclasses.asdict(self.progress),
            "rows": self.rows,
            "environment": self.trained_in,
            "forced": self.forced,
            "corrupt": self.corrupt,
        }

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> History:
        """Return the history in a checkpoint.

        Raises:
            KeyError, TypeError, ValueError: if it is not a whole one.
        """
        return cls(
            Progress(**{field.name: record["progress"][field.name] for field in dataclasses.fields(Progress)}),
            [{name: row[name] for name in EPOCH_COLUMNS} for row in record["rows"]],
            list(record["environment"]),
            list(record.get("forced", [])),
            dict(record.get("corrupt", {})),
        )

    def end_epoch(self, lr: float, validation: Evaluation) -> bool:
        """Add the row of the epoch whose last step had rate ``lr``, start the next, return if it is the best so far."""
        progress = self.progress
        self.rows.append(
            {
                "epoch": progress.epoch + 1,
                "step": progress.step,
                "lr": lr,
                "train_loss": round(progress.mean_loss, 5),
                "live_blocks": round(progress.mean_live_blocks, 3),
                "seconds": round(progress.seconds, 1),
                "val_loss": round(validation.loss, 5),
                "val_top1_percent": round(validation.top1_percent, 3),
                "first_conv_gradient": float(f"{progress.mean_gradient:.6g}"),
            }
        )
        is_best = validation.top1_percent > progress.best_top1_percent
        if is_best:
            progress.best_epoch, progress.best_top1_percent = progress.epoch + 1, validation.top1_percent
        progress.epoch += 1
        progress.start_epoch()
        return is_best
