"""What the folder of a run says of it, read with care: every fault at once, with its file and line."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from sdzoo.errors import InputError

# The columns that are drawn, by whether a cell may be empty: an epoch may go without validation, a step without
# gradients. The first column counts up.
LOG = {"epoch": False, "step": False, "train_loss": False, "live_blocks": False, "val_top1_percent": True}
STEPS = {"step": False, "live_blocks": False}
GRADIENT = "first_conv_gradient"  # not in the logs of old runs
MAY_OVERFLOW = ("train_loss", GRADIENT)  # under AMP such a step is skipped, and the run goes on

Columns = Mapping[str, NDArray[np.float64]]


@dataclass(frozen=True)
class RunRecord:
    """What a run has written so far.

    Attributes:
        folder: Where.
        model: Its name.
        epochs: How many the recipe wants.
        log: A row an epoch: ``epoch``, ``step``, ``train_loss``, ``live_blocks``, and with NaN where there is none
            ``val_top1_percent`` and ``first_conv_gradient``.
        steps: A row an optimizer step: ``step``, ``live_blocks``; None if there is no such file.
        final_survival_prob: p_L; None if the run is not finished, or the model has no gates.
        test_top1_percent: None if not measured.
        finished: Whether there is a result.
    """

    folder: Path
    model: str
    epochs: int
    log: Columns
    steps: Columns | None
    final_survival_prob: float | None
    test_top1_percent: float | None
    finished: bool

    @property
    def best_epoch(self) -> int | None:
        """The first epoch whose validation error no other is below; None if no epoch was validated."""
        accuracy = self.log["val_top1_percent"]
        return None if np.isnan(accuracy).all() else int(self.log["epoch"][np.nanargmax(accuracy)])

    @property
    def best_val_error_percent(self) -> float:
        """Validation error of that epoch; NaN if there is none."""
        accuracy = self.log["val_top1_percent"]
        return math.nan if np.isnan(accuracy).all() else 100 - float(np.nanmax(accuracy))


def read_run(folder: str | Path) -> RunRecord:
    """Return what the run in ``folder`` has written so far.

    The last line of a table that has no end is one that an unfinished run is just writing: it is left out.

    Raises:
        InputError: with every fault: a file that is missing or damaged, a table without rows, a cell that is no number.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; name the folder of a run")
    if missing := [name for name in ("log.csv", "recipe.yaml") if not (folder / name).is_file()]:
        raise InputError(f"{folder} is not the folder of a run: it has no {', no '.join(missing)}")
    faults: list[str] = []
    recipe = _mapping(folder / "recipe.yaml", {"model": (str,), "epochs": (int,)}, faults)
    finished = (folder / "result.json").exists()
    result: dict[str, Any] = {}
    if finished:
        number_or_none = (int, float, type(None))
        wanted = {"final_survival_prob": number_or_none, "test_top1_percent": number_or_none}
        result = _mapping(folder / "result.json", wanted, faults)
    log = _table(folder / "log.csv", LOG | {GRADIENT: True}, finished, faults)
    steps = _table(folder / "steps.csv", STEPS, finished, faults) if (folder / "steps.csv").exists() else None
    if log and not log["epoch"].size:
        faults.append(f"{folder / 'log.csv'} has no rows: the run has not finished an epoch")
    if faults or log is None:
        raise InputError("; ".join(faults))
    p, top1 = result.get("final_survival_prob"), result.get("test_top1_percent")
    steps = steps if steps and steps["step"].size else None
    return RunRecord(folder, recipe["model"], recipe["epochs"], log, steps, p, top1, finished)


def _text(file: Path, faults: list[str]) -> str | None:
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        faults.append(f"cannot read {file}: {error.strerror}")
    except UnicodeDecodeError as error:
        faults.append(f"{file} is damaged: {error}")
    return None


def _mapping(file: Path, wanted: Mapping[str, tuple[type, ...]], faults: list[str]) -> dict[str, Any]:
    """Return what a YAML or JSON file holds, its ``wanted`` keys checked."""
    text = _text(file, faults)
    if text is None:
        return {}
    try:
        content = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        faults.append(f"{file} is damaged: {' '.join(str(error).split())}")
        return {}
    if not isinstance(content, dict):
        faults.append(f"{file} is damaged: it holds no mapping")
        return {}
    for name, types in wanted.items():
        value = content.get(name)
        number = isinstance(value, float)
        if name not in content:
            faults.append(f"{file} lacks {name}")
        elif isinstance(value, bool) or not isinstance(value, types) or (number and not math.isfinite(value)):
            faults.append(f"{file}: {name} is {value!r}")
    return content


def _table(file: Path, columns: Mapping[str, bool], finished: bool, faults: list[str]) -> Columns | None:
    """Return ``columns`` of a CSV file, NaN where a cell is empty; None if the file is damaged."""
    text = _text(file, faults)
    if text is None:
        return None
    if not finished:
        text = text[: text.rfind("\n") + 1]
    reader = csv.reader(io.StringIO(text, newline=""))
    header = next(reader, [])
    if missing := [name for name in columns if name not in header and name != GRADIENT]:
        faults.append(f"{file} lacks {', '.join(missing)}" if header else f"{file} is empty")
        return None
    rows: list[dict[str, float]] = []
    damaged: list[str] = []
    counter = next(iter(columns))
    try:
        for cells in reader:
            try:
                row = _row(header, cells, columns)
                if rows and row[counter] <= rows[-1][counter]:
                    raise ValueError(f"{counter} {row[counter]:g} stands after {rows[-1][counter]:g}")
                rows.append(row)
            except ValueError as error:
                damaged.append(f"line {reader.line_num}: {error}")
    except csv.Error as error:
        damaged.append(f"line {reader.line_num}: {error}")
    if damaged:
        more = f" (and {len(damaged) - 1} more lines)" if len(damaged) > 1 else ""
        faults.append(f"{file}, {damaged[0]}{more}")
        return None
    return {name: np.array([row[name] for row in rows], dtype=np.float64) for name in columns}


def _row(header: list[str], cells: list[str], columns: Mapping[str, bool]) -> dict[str, float]:
    if len(cells) != len(header):
        raise ValueError(f"{len(cells)} cells for {len(header)} columns")
    named, row = dict(zip(header, cells, strict=True)), {}
    for name, may_be_empty in columns.items():
        cell = named.get(name, "")
        try:
            row[name] = math.nan if may_be_empty and not cell else float(cell)
        except ValueError:
            raise ValueError(f"{name} is {cell!r}") from None
        if cell and name not in MAY_OVERFLOW and not math.isfinite(row[name]):
            raise ValueError(f"{name} is {cell!r}")
    return row
