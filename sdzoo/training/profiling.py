"""What a run writes for TensorBoard and of the time that its steps take."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

WAITED = 10  # steps before those that are profiled: the first ones are no measure of the others


def tensorboard_writer(folder: Path, step: int) -> Any:
    """Return TensorBoard's writer; what follows ``step`` in earlier files is hidden."""
    from torch.utils.tensorboard.writer import SummaryWriter

    return SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)


@contextmanager
def profiler_into(folder: Path) -> Iterator[Any]:
    """Profile ten steps, after ten others; write what took how long, and a trace for a browser.

    A run that ends among the ten leaves what there is; one that ends before them is told that there is nothing.
    """
    written = False

    def write(profile: torch.profiler.profile) -> None:
        nonlocal written
        table = profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=30)
        (folder / "profile.txt").write_text(table, encoding="utf-8")
        profile.export_chrome_trace(str(folder / "trace.json"))
        written = True
        tqdm.write(f"wrote {folder / 'profile.txt'} and {folder / 'trace.json'}")

    schedule = torch.profiler.schedule(wait=WAITED - 2, warmup=2, active=10, repeat=1)
    try:
        with torch.profiler.profile(schedule=schedule, on_trace_ready=write) as profile:
            yield profile
    finally:
        if not written:
            tqdm.write(f"no profile was written: it begins after {WAITED} steps, and this run took no more")
