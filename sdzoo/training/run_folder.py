"""The folder of one run: what lies in it, that one process at a time writes it, and that logs end where it does."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from sdzoo.digest import BLANK, sealed
from sdzoo.errors import InputError
from sdzoo.files import atomic_path
from sdzoo.training.progress import Progress

EPOCH_COLUMNS: tuple[str, ...] = (
    "epoch",
    "step",
    "lr",
    "train_loss",
    "live_blocks",
    "seconds",
    "val_loss",
    "val_top1_percent",
    "first_conv_gradient",
)
STEP_COLUMNS: tuple[str, ...] = ("step", "epoch", "lr", "loss", "live_blocks", "first_conv_gradient")


class RunFolder:
    """Names and writers of a run's files; each file is whole or as it was before."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.last = path / "last.pth"
        self.best = path / "best.safetensors"
        self.log = path / "log.csv"
        self.steps = path / "steps.csv"
        self.recipe = path / "recipe.yaml"
        self.result = path / "result.json"

    def check(self, resume: bool) -> None:
        """Check that a run may start here, or with ``resume`` go on.

        Raises:
            InputError: if there is a run and ``resume`` was not asked for, or results of one without last.pth.
        """
        if self.last.exists() and not resume:
            raise InputError(f"{self.path} already holds a run; resume it, or name another folder")
        if not self.last.exists() and (self.best.exists() or self.epochs_logged()):
            if resume and self.epochs_logged() == 0:
                return  # it was killed before its first checkpoint
            raise InputError(f"{self.path} holds results of a run, but no last.pth to resume; name another folder")

    def epochs_logged(self) -> int:
        """Return the number of epochs in the log."""
        return max(0, len(self.log.read_text(encoding="utf-8").splitlines()) - 1) if self.log.is_file() else 0

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Create the folder and keep other processes from it; the lock ends with its process, however that ends.

        What a process that was killed had begun to write, and not renamed yet, is removed.

        Raises:
            InputError: if the folder cannot be made, or another process trains in it.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.path / ".lock", timeout=0)
            lock.acquire()
        except Timeout:
            raise InputError(f"{self.path} is in use by another process") from None
        except OSError as error:
            raise InputError(f"cannot create {self.path}: {error.strerror}") from None
        try:
            for file in (self.last, self.best, self.log, self.steps, self.recipe, self.result):
                for half_written in self.path.glob(f".{file.name}.*{file.suffix}"):
                    half_written.unlink()
            yield
        finally:
            lock.release()

    def refuse_if_in_use(self) -> None:
        """Raise InputError if another process trains in the folder, before anything slow is done."""
        if (self.path / ".lock").is_file():
            with self.locked():
                pass

    def write_log(self, rows: Sequence[dict[str, Any]]) -> None:
        """Write the log of all epochs done."""
        text = io.StringIO()
        writer = csv.DictWriter(text, EPOCH_COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        self._write(self.log, text.getvalue())

    def write_recipe(self, text: str) -> None:
        """Write the recipe as YAML."""
        self._write(self.recipe, text)

    def write_result(self, result: dict[str, Any]) -> None:
        """Write what came out, sealed: a figure that is changed later is seen."""
        self._write(self.result, sealed((json.dumps(result | {"seal": BLANK}, indent=1) + "\n").encode()).decode())

    @staticmethod
    def _write(path: Path, text: str) -> None:
        with atomic_path(path) as temporary:
            temporary.write_text(text, encoding="utf-8")


def _is_done(row: str, progress: Progress) -> bool:
    """Return whether a row of the steps is of what is done.

    A run that was forced onto other data counts its steps as if it had always had that: those beyond its count go.
    """
    cells = row.split(",")
    if not (len(cells) == len(STEP_COLUMNS) and cells[0].isdecimal() and cells[1].isdecimal()):
        return False
    step, epoch = int(cells[0]), int(cells[1])
    begun = progress.step - progress.batch
    return step <= progress.step and (epoch <= progress.epoch or (epoch == progress.epoch + 1 and begun < step))


class StepLog:
    """``steps.csv``, a row an optimizer step; what follows the checkpoint from which a run goes on is cut."""

    def __init__(self, path: Path, progress: Progress) -> None:
        """Open the log, leaving the rows of the epochs that are done and of this one's steps."""
        kept = [",".join(STEP_COLUMNS) + "\n"]
        if progress.step and path.is_file():
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)[1:]
            kept += [line for line in lines if line.endswith("\n") and _is_done(line, progress)]
        with atomic_path(path) as temporary:
            temporary.write_text("".join(kept), encoding="utf-8")
        self._path = path
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115  closed by close()

    def add(self, *values: int | float) -> None:
        """Add a row, in the order of the columns.

        Raises:
            OSError: naming the file, as on a full disk.
        """
        row = ",".join(f"{value:.6g}" if isinstance(value, float) else str(value) for value in values)
        with self._named_errors():
            self._file.write(f"{row}\n")

    def flush(self) -> None:
        """Bring all rows to the disk: a checkpoint must not know of steps that the log does not.

        Raises:
            OSError: naming the file, as on a full disk.
        """
        with self._named_errors():
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; rows that no checkpoint knows of may be lost."""
        with suppress(OSError):
            self._file.close()

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(f"cannot write {self._path}: {error.strerror}") from error
