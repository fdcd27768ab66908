"""Interleaved timing: candidates take turns, so that a busy machine slows all alike; ratios are of the same turn."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping

import torch

from sdzoo.hardware import processor


def interleave(candidates: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Return the seconds that each candidate took in each of ``rounds`` rounds, after one round that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for index in range(rounds + 1):
        for name, run in candidates.items():
            started = time.perf_counter()
            run()
            if index:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def ratio(seconds: Mapping[str, list[float]], name: str, base: str) -> str:
    """Return the median over rounds of ``name`` / ``base``, with the quartiles."""
    ratios = [a / b for a, b in zip(seconds[name], seconds[base], strict=True)]
    lower, median, upper = statistics.quantiles(ratios, n=4, method="inclusive")
    return f"{median:.3f} (quartiles {lower:.3f} - {upper:.3f}, {len(ratios)} rounds)"


def hardware(device: str | torch.device = "cpu") -> str:
    """Return the processor and the number of its cores that this machine has, and the GPU if ``device`` is one."""
    gpu = f"{torch.cuda.get_device_name(device)}; " if torch.device(device).type == "cuda" else ""
    return f"{gpu}{processor()}, {os.cpu_count()} cores"
