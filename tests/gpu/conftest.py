"""Tests here are skipped where there is no GPU; ``make test-gpu`` runs them where there is one."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def pytest_runtest_setup() -> None:
    """Skip each test of this folder where there is no GPU."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU: make test-gpu")


@pytest.fixture
def training_runs(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the benchmarks' module that writes data and recipes, and runs ``sdzoo train`` in processes of its own."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("training_runs")


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Compute in full float32, here and in processes that are started: TF32 has ten bits of mantissa."""
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False  # of matrix products it is the default
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture
def train(training_runs: Any, tmp_path: Path) -> Callable[..., Path]:
    """Return a function that runs ``sdzoo train`` on the GPU, ten steps an epoch, and returns the run's folder."""
    batch_size = 128

    def train(name: str, processes: int = 1, steps: int = 10, **keys: Any) -> Path:
        data = tmp_path / f"data of {steps} steps"
        if not data.exists():
            training_runs.noise_pictures(data, steps * batch_size)
        settings = {"model": "sd_resnet56", "drop_path": 0.5, "train_crop_mode": "pad4", "epochs": 1, "seed": 42}
        settings |= {"batch_size": batch_size // processes} | keys
        recipe = training_runs.write_recipe(tmp_path / f"{name}.yaml", **settings)
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command = ["-m", "sdzoo", "train", recipe, "--data-dir", data, "-o", tmp_path / name, "--device", "cuda"]
        training_runs.run([sys.executable, *(torchrun if processes > 1 else []), *command], threads=4)
        return tmp_path / name

    return train
