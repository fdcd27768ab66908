"""What makes runs comparable to the bit."""

from __future__ import annotations

import os

import pytest
import torch

from sdzoo.training.environment import deterministic


def flags() -> tuple[bool, ...]:
    cudnn = torch.backends.cudnn
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    return torch.are_deterministic_algorithms_enabled(), warns, cudnn.deterministic, cudnn.benchmark


def test_on_a_gpu_operations_are_deterministic_while_a_run_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = flags()
    with deterministic(torch.device("cuda")):
        assert flags() == (True, True, True, False)
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert flags() == before


def test_on_the_cpu_nothing_is_changed() -> None:
    before = flags()
    with deterministic(torch.device("cpu")):
        assert flags() == before
