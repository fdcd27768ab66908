"""Targets timed for a ratio: each in a process of its own, in turn, as ``sdzoo bench`` does it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import timm
import torch
from interleaved import hardware, ratio

import sdzoo
from sdzoo.deploy.benchmark import take_turns
from sdzoo.deploy.benchmark_process import TargetProcess
from sdzoo.deploy.benchmark_target import Opening


def print_ratios(
    files: dict[str, Path], config: dict[str, Any], pairs: Sequence[tuple[str, str]], batch_sizes: Sequence[int],
    threads: int, samples: int,
) -> None:  # fmt: skip
    """Print the median of each target, and for each pair by how much the second is faster than the first.

    Args:
        files: By target; ``.onnx`` for ONNX Runtime, else what ``torch.save`` wrote.
        config: timm's data config of the model.
        pairs: Of targets: the slower, the faster.
        batch_sizes: Images a call.
        threads: Within one operator.
        samples: Timed calls of each target for each batch size.
    """
    kinds = {target: "onnx" if file.suffix == ".onnx" else "eager" for target, file in files.items()}
    openings = [Opening(target, kinds[target], file, threads, "cpu", config) for target, file in files.items()]
    with ExitStack() as stack:
        processes = {o.name: stack.enter_context(TargetProcess(o)) for o in openings}
        for size in batch_sizes:
            turns = take_turns(processes, size, samples)
            took = {target: turn.milliseconds for target, turn in turns.items()}
            for target in files:
                provider = processes[target].opened.provider
                print(f"batch {size:>3}  {target:<21} {provider:<21} {statistics.median(took[target]):9.2f} ms")
            for slower, faster in pairs:
                print(f"batch {size:>3}  {slower} / {faster}: {ratio(took, slower, faster)}", flush=True)


def differ(
    files: dict[str, Path], config: dict[str, Any], pixels: np.ndarray, pairs: Sequence[tuple[str, str]]
) -> None:
    """Print how far the logits of the pairs are apart on uint8 images, so that a ratio is one of equal functions."""
    for first, second in pairs:
        a, b = (_logits(files[name], config, pixels) for name in (first, second))
        print(
            f"{second} against {first}: max |difference| {np.abs(a - b).max():.2g}, max |logit| {np.abs(a).max():.2g}"
        )


def _logits(file: Path, config: dict[str, Any], pixels: np.ndarray) -> np.ndarray:
    kind = "onnx" if file.suffix == ".onnx" else "eager"
    with TargetProcess(Opening(file.stem, kind, file, 1, "cpu", config)) as process:
        return process.logits(pixels)


def versions() -> str:
    """Return hardware and versions, for the first line of a benchmark."""
    modules = {"sdzoo": sdzoo, "torch": torch, "timm": timm, "onnx": onnx, "onnxruntime": onnxruntime}
    return f"{hardware()}; " + ", ".join(f"{name} {module.__version__}" for name, module in modules.items())
