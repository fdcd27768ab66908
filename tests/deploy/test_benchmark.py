from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from sdzoo.deploy import benchmark as module
from sdzoo.deploy.benchmark import Timing, benchmark
from sdzoo.errors import InputError

TARGETS = ["PyTorch eager", "PyTorch folded", "ONNX Runtime"]


@pytest.fixture(scope="module")
def rows(model: nn.Module, exported: Path) -> list[Timing]:
    return benchmark(model, batch_sizes=(1, 3), runs=3, threads=1, onnx=exported)


def test_one_row_for_each_target_and_batch_size(rows: list[Timing]) -> None:
    assert [(row.batch_size, row.target) for row in rows] == [(size, name) for size in (1, 3) for name in TARGETS]


def test_rows_name_what_ran_and_how(rows: list[Timing]) -> None:
    assert [row.provider for row in rows] == ["PyTorch cpu", "PyTorch cpu", "CPUExecutionProvider"] * 2
    assert {(row.threads, row.runs) for row in rows} == {(1, 3)}


def test_quartiles_enclose_the_median(rows: list[Timing]) -> None:
    for row in rows:
        assert 0 < row.lower_quartile_ms <= row.median_ms <= row.upper_quartile_ms


def test_throughput_is_images_by_seconds() -> None:
    row = Timing("target", "provider", 1, 32, 5, median_ms=8.0, lower_quartile_ms=7.0, upper_quartile_ms=9.0)
    assert row.images_per_s == pytest.approx(4000)


class FakeTime:
    """A clock, and predictors that take a known time by it: the n-th call of a target takes ``base * n`` ms."""

    def __init__(self) -> None:
        self.now_ms = 0.0
        self.calls: list[tuple[str, int]] = []

    def predictor(self, name: str, base: float) -> Any:
        def predict(images: NDArray[np.float32]) -> None:
            self.calls.append((name, len(images)))
            self.now_ms += base * sum(call[0] == name for call in self.calls)

        predict.config = {"input_size": (3, 32, 32)}  # type: ignore[attr-defined]
        predict.provider = name  # type: ignore[attr-defined]
        return predict


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeTime:
    clock = FakeTime()
    models: Iterator[Any] = iter([clock.predictor("eager", 1), clock.predictor("folded", 10)])
    monkeypatch.setattr(module, "model_predictor", lambda _: next(models))
    monkeypatch.setattr(module, "load_predictor", lambda *_, **__: clock.predictor("onnx", 100))
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: clock.now_ms / 1000))
    assert time.perf_counter() > 0
    return clock


def test_figures_are_median_and_quartiles_of_the_calls_that_count(clock: FakeTime, model: nn.Module) -> None:
    """Calls 2, 4, 6, 8, 10 of each target count: the one before each warms up."""
    rows = benchmark(model, batch_sizes=(2,), runs=5, onnx="not opened")
    for row, base in zip(rows, (1, 10, 100), strict=True):
        assert row.median_ms == pytest.approx(6 * base)
        assert row.lower_quartile_ms == pytest.approx(4 * base)
        assert row.upper_quartile_ms == pytest.approx(8 * base)
        assert row.images_per_s == pytest.approx(2 / (6 * base / 1000))


def test_targets_take_turns(clock: FakeTime, model: nn.Module) -> None:
    """So that a machine that is busy for a while slows all alike."""
    benchmark(model, batch_sizes=(1, 4), runs=2, onnx="not opened")
    turn = ["eager", "eager", "folded", "folded", "onnx", "onnx"]
    assert clock.calls == [(name, size) for size in (1, 4) for name in turn * 2]


@pytest.mark.parametrize("runs", [1, 0, -1])
def test_too_few_runs_for_quartiles(model: nn.Module, runs: int) -> None:
    with pytest.raises(InputError, match=f"runs is {runs}; .* at least 2"):
        benchmark(model, runs=runs)


def test_threads_are_set_while_it_measures_and_restored(model: nn.Module, exported: Path) -> None:
    before, seen = torch.get_num_threads(), set[int]()
    hook = model.register_forward_hook(lambda *_: seen.add(torch.get_num_threads()))
    try:
        torch.set_num_threads(2)
        rows = benchmark(model, batch_sizes=(1,), runs=2, threads=1, onnx=exported)
        assert torch.get_num_threads() == 2
        assert benchmark(model, batch_sizes=(1,), runs=2, onnx=exported)[0].threads == 2
    finally:
        hook.remove()
        torch.set_num_threads(before)
    assert rows[0].threads == 1
    assert seen == {1, 2}


def test_threads_are_restored_after_a_failure(model: nn.Module, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    with pytest.raises(InputError, match="does not exist"):
        benchmark(model, threads=before + 1, onnx=tmp_path / "missing.onnx")
    assert torch.get_num_threads() == before


def test_without_a_file_the_model_is_exported_and_the_file_goes_again(
    model: nn.Module, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Path] = []

    def export(_: nn.Module, path: Path) -> None:
        written.append(path)
        path.write_bytes(exported.read_bytes())

    monkeypatch.setattr(module, "export_onnx", export)
    said: list[str] = []
    benchmark(model, batch_sizes=(1, 2), runs=2, threads=1, progress=said.append)
    assert len(written) == 1
    assert not written[0].parent.exists()
    assert said == ["exporting", *(f"batch {size}, round {index}/2" for size in (1, 2) for index in (1, 2))]


def test_training_mode_is_refused(source: nn.Module) -> None:
    with pytest.raises(InputError, match="training mode"):
        benchmark(source.train())


def test_the_model_is_left_alone(source: nn.Module, exported: Path) -> None:
    before = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    benchmark(source, batch_sizes=(1,), runs=2, threads=1, onnx=exported)
    assert source.state_dict().keys() == before.keys()
    for name, tensor in source.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0, msg=name)
