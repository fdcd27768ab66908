"""Inference latency of one model three ways, measured in turn so that a busy machine slows all alike."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from sdzoo.deploy.onnx_export import export_onnx
from sdzoo.deploy.predictor import Predictor, model_predictor
from sdzoo.deploy.runtime import load_predictor
from sdzoo.deploy.session import check_threads
from sdzoo.errors import InputError
from sdzoo.fold import fold


@dataclass(frozen=True)
class Timing:
    """Latency of one target at one batch size: median and quartiles over ``runs`` calls."""

    target: str
    provider: str
    threads: int
    batch_size: int
    runs: int
    median_ms: float
    lower_quartile_ms: float
    upper_quartile_ms: float

    @property
    def images_per_s(self) -> float:
        """Throughput at the median."""
        return self.batch_size / self.median_ms * 1000


def benchmark(
    model: nn.Module,
    batch_sizes: tuple[int, ...] = (1, 32),
    runs: int = 15,
    threads: int | None = None,
    onnx: str | Path | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Timing]:
    """Return the latency of ``model`` eager, folded and in ONNX Runtime, on noise of its input size.

    Args:
        model: In evaluation mode, on the CPU for comparable threads.
        batch_sizes: Images a call.
        runs: Timed calls for each row, in ``runs`` rounds over all targets, each after one that is not counted.
        threads: For PyTorch and ONNX Runtime alike; default: PyTorch's current number.
        onnx: The exported model, if there is one already; else it is exported (and verified) to a temporary file.
        progress: Called with what is being measured.

    Raises:
        InputError: if ``runs`` is below 2, and as :func:`fold`, :func:`export_onnx` and :func:`load_predictor`.
    """
    if runs < 2:
        raise InputError(f"runs is {runs}; quartiles need at least 2")
    threads = torch.get_num_threads() if threads is None else threads
    check_threads(threads)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with tempfile.TemporaryDirectory() as folder:
            if onnx is None:
                progress("exporting")
                onnx = Path(folder) / "model.onnx"
                export_onnx(model, onnx)
            targets = {
                "PyTorch eager": model_predictor(model),
                "PyTorch folded": model_predictor(fold(model)),
                "ONNX Runtime": load_predictor(onnx, threads=threads),
            }
            return [row for size in batch_sizes for row in _time(targets, size, runs, threads, progress)]
    finally:
        torch.set_num_threads(before)


def _time(
    targets: dict[str, Predictor], batch_size: int, runs: int, threads: int, progress: Callable[[str], None]
) -> list[Timing]:
    samples: dict[str, list[float]] = {name: [] for name in targets}
    for index in range(runs):
        progress(f"batch {batch_size}, round {index + 1}/{runs}")
        for name, predictor in targets.items():
            shape = (batch_size, *predictor.config["input_size"])
            images = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
            predictor(images)
            started = time.perf_counter()
            predictor(images)
            samples[name].append((time.perf_counter() - started) * 1000)
    rows = []
    for name, predictor in targets.items():
        lower, median, upper = statistics.quantiles(samples[name], n=4, method="inclusive")
        rows.append(Timing(name, predictor.provider, threads, batch_size, runs, median, lower, upper))
    return rows
