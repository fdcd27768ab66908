"""What the benchmark reports is what its processes did: figures, order of turns, parity, refusals."""

from __future__ import annotations

import dataclasses
import itertools
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
from sdzoo.deploy.benchmark import benchmark, remembered, take_turns
from sdzoo.deploy.benchmark_process import Opened, Turn
from sdzoo.deploy.benchmark_row import Row, as_text, spread
from sdzoo.deploy.benchmark_target import Given, Opening
from sdzoo.deploy.onnx_export import labels_of
from sdzoo.deploy.predictor import Predictor, model_predictor
from sdzoo.errors import InputError, ParityError

TARGETS = ["eager", "folded", "onnx"]


@pytest.fixture(scope="module")
def rows(model: nn.Module, exported: Path) -> list[Row]:
    """Return rows of three targets in real processes."""
    return benchmark(model, TARGETS[::-1], (3, 1), (1,), samples=3, onnx=exported)


def test_one_row_for_each_threads_batch_size_and_target(rows: list[Row]) -> None:
    assert [row.place for row in rows] == [(1, size, name) for size in (1, 3) for name in TARGETS]


def test_rows_name_what_ran_and_where(rows: list[Row]) -> None:
    assert [row.provider for row in rows] == ["PyTorch cpu", "PyTorch cpu", "CPUExecutionProvider"] * 2
    assert {row.runtime.partition(" ")[0] for row in rows} == {"torch", "onnxruntime"}
    assert f"torch {torch.__version__}" in {row.runtime for row in rows}
    assert {(row.model, row.input_size, row.samples, row.top1_percent) for row in rows} == {
        ("sd_resnet20", "3x32x32", 3, None)
    }


def test_figures_are_plausible(rows: list[Row], exported: Path) -> None:
    for row in rows:
        assert 0 < row.lower_quartile_ms <= row.median_ms <= row.upper_quartile_ms
        assert row.p99_ms is None
        assert row.peak_memory_mib is None or 1 < row.peak_memory_mib < 1000
        assert row.parity_kind == "logits"
        assert 0 <= row.parity <= row.parity_limit
    assert rows[2].file_mb == pytest.approx(exported.stat().st_size / 1e6, abs=1e-4)
    assert rows[2].parity > 0


def test_the_table_for_a_terminal(rows: list[Row]) -> None:
    row = dataclasses.replace(rows[0], model="m.t", samples=500, median_ms=4, lower_quartile_ms=3.5, p99_ms=9.25)
    row = dataclasses.replace(row, upper_quartile_ms=5, batch_size=8, peak_memory_mib=None, top1_percent=80.5)
    head, titles, line = as_text([row]).splitlines()
    assert head == f"m.t, 3x32x32, 500 samples; {row.device}; torch {torch.__version__}"
    assert titles.split()[:3] == ["target", "threads", "batch"]
    words = ["eager", "1", "8", "4.00", "3.50", "-", "5.00", "9.25", "2000", f"{row.file_mb:.2f}", "-"]
    assert line.split()[: len(words)] == words
    assert line.endswith("80.50  PyTorch cpu")
    head, titles, *lines = as_text([row, dataclasses.replace(row, device="H100")]).splitlines()
    assert head == f"m.t, 3x32x32, 500 samples; torch {torch.__version__}"
    assert titles.split()[-2:] == ["provider", "device"]
    assert [line.partition("  PyTorch cpu  ")[2] for line in lines] == [row.device, "H100"]
    loss = dataclasses.replace(row, parity=0.05, parity_limit=0.5, parity_kind="top1_loss_points")
    assert loss.compared == "0.05 of 0.5 points"


@pytest.mark.parametrize("count", [2, 7, 499, 500, 1234])
def test_median_quartiles_and_p99_are_numpys(count: int) -> None:
    calls = np.random.default_rng(count).lognormal(size=count)
    found = spread(calls.tolist())
    expected = np.percentile(calls, (50, 25, 75))
    np.testing.assert_allclose((found.median, found.lower, found.upper), expected, rtol=0, atol=6e-5)
    if count < 500:
        assert found.p99 is None
    else:
        assert found.p99 == pytest.approx(np.percentile(calls, 99), abs=6e-5)


class FakeProcess:
    """A target without process: each call takes ``base`` ms times the number of the call."""

    calls: list[tuple[str, int, int]] = []  # noqa: RUF012  all targets' in one order
    predictor: Predictor
    wrong: dict[str, float] = {}  # noqa: RUF012
    open: list[str] = []  # noqa: RUF012

    def __init__(self, opening: Opening) -> None:
        self.opening, self.opened = opening, Opened("runtime 1", "provider", "device")
        self.done = 0

    def time(self, batch_size: int, calls: int) -> Turn:
        self.calls.append((self.opening.name, batch_size, calls))
        base = {"eager": 1.0, "folded": 10.0, "onnx": 100.0}[self.opening.name]
        numbers = [self.done + n + 1 for n in range(calls)]
        self.done += calls
        return Turn([base * n for n in numbers], 10.0 * batch_size + self.done / 1000)

    def logits(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        return self.predictor.pixels(images) + np.float32(self.wrong.get(self.opening.name, 0))

    def __enter__(self) -> FakeProcess:
        self.open.append(self.opening.name)
        return self

    def __exit__(self, *_: object) -> None:
        self.open.remove(self.opening.name)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, model: nn.Module) -> Iterator[type[FakeProcess]]:
    fake: Any = type("Fake", (FakeProcess,), {"calls": [], "open": [], "wrong": {}})
    fake.predictor = model_predictor(model)
    monkeypatch.setattr(module, "TargetProcess", fake)
    yield fake
    assert fake.open == [], "a process was left"


def test_the_first_round_does_not_count(fake: Any, model: nn.Module, exported: Path) -> None:
    rows = benchmark(model, TARGETS, (2,), (1,), samples=5, onnx=exported)
    for row, base in zip(rows, (1, 10, 100), strict=True):
        assert row.median_ms == pytest.approx(4 * base)  # of calls 2 to 6
        assert (row.lower_quartile_ms, row.upper_quartile_ms) == pytest.approx((3 * base, 5 * base))
        assert row.images_per_s == pytest.approx(2 / (4 * base / 1000))
        assert row.peak_memory_mib == pytest.approx(20.006)


def test_targets_take_turns(fake: Any, model: nn.Module, exported: Path) -> None:
    """So that a machine that is busy for a while slows all alike; batches grow, since memory once taken stays."""
    said: list[str] = []
    benchmark(model, TARGETS, (4, 1), (1,), samples=23, onnx=exported, progress=said.append)
    rounds = [1, 3, 3, 3, 2, 2, 2, 2, 2, 2, 2]  # the first one warms up
    assert fake.calls == [(name, size, calls) for size in (1, 4) for calls in rounds for name in TARGETS]
    assert said.index("1 thread, batch 1, round 10/10") < said.index("1 thread, batch 4, round 1/10")
    assert said[-1].startswith("1 thread: comparing onnx on 10 real pictures")


def test_each_number_of_threads_has_processes_of_its_own(fake: Any, model: nn.Module, exported: Path) -> None:
    rows = benchmark(model, ("eager", "onnx"), (1,), (2, 1), samples=2, onnx=exported)
    assert [row.place for row in rows] == [(n, 1, name) for n, name in itertools.product((1, 2), ("eager", "onnx"))]
    assert len(fake.calls) == 2 * 2 * 3


def test_calls_of_one_number_are_of_one_round(fake: Any) -> None:
    openings = (Opening(name, "eager", Path(), 1, "cpu", {}) for name in ("eager", "folded"))
    turns = take_turns({opening.name: fake(opening) for opening in openings}, 1, 12)
    assert turns["eager"].milliseconds == [float(n) for n in range(2, 14)]
    assert turns["folded"].milliseconds == [10.0 * n for n in range(2, 14)]


def test_what_is_timed_is_compared(fake: Any, model: nn.Module, exported: Path) -> None:
    fake.wrong["onnx"] = 1.0
    with pytest.raises(ParityError, match=r"^onnx, 10 real pictures, .*differs by 1, allowed"):
        benchmark(model, TARGETS, (1,), (1,), samples=2, onnx=exported)


def test_parity_is_the_difference(fake: Any, model: nn.Module, exported: Path) -> None:
    fake.wrong["folded"] = 1e-5
    rows = benchmark(model, TARGETS, (1,), (1,), samples=2, onnx=exported)
    assert rows[0].parity == 0
    assert rows[1].parity == pytest.approx(1e-5, rel=0.1)


def test_top1_of_images_in_class_folders(fake: Any, source: Any, exported: Path, tmp_path: Path) -> None:
    """Of twelve dark pictures, all of one class to the model, those count that lie in its folder."""
    from PIL import Image

    fake.predictor = model_predictor(source)
    best = int(fake.predictor.pixels(np.zeros((1, 3, 32, 32), np.uint8)).argmax())
    names = labels_of(source)
    assert names
    for label, index in itertools.chain(((label, 0) for label in range(10)), ((best, n) for n in (1, 2))):
        (tmp_path / names[label]).mkdir(exist_ok=True)
        Image.new("RGB", (32, 32), (label, index, 0)).save(tmp_path / names[label] / f"{index}.png")  # no copies
    row = benchmark(source, ("eager",), (1,), (1,), samples=2, images=tmp_path)[0]
    assert row.top1_percent == 25.0  # 3 of 12


def test_fp16_and_int8_from_one_end_to_the_other(classifier: nn.Module, labelled: Path, calibration: Path) -> None:
    rows = benchmark(
        *(classifier, ("onnx-fp16", "onnx-int8"), (1,), (1,), 2),
        images=labelled,
        calibration=calibration,
        max_drop=20,
    )
    half, int8 = rows
    assert (half.target, half.parity_kind, half.top1_percent) == ("onnx-fp16", "logits", pytest.approx(100, abs=0.5))
    assert 1e-4 * half.parity_limit < half.parity <= half.parity_limit
    assert (int8.target, int8.parity_kind, int8.parity_limit) == ("onnx-int8", "top1_loss_points", 20)
    assert int8.top1_percent is not None
    assert int8.parity == pytest.approx(100 - int8.top1_percent)  # the model's own top-1 is 100 here
    assert 0 < int8.parity <= 20
    assert half.file_mb != int8.file_mb


def test_pictures_of_other_classes_are_refused(model: nn.Module, labelled: Path, tmp_path: Path) -> None:
    (tmp_path / "cat").symlink_to(labelled / "cat")
    with pytest.raises(InputError, match="are cat; the model's are airplane"):
        benchmark(model, ("eager",), images=tmp_path)


def test_a_batch_is_computed_once() -> None:
    calls: list[int] = []

    def logits(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        calls.append(len(images))
        return images.reshape(len(images), -1).astype(np.float32)

    compute = remembered(logits)
    a, b = torch.zeros(2, 1, 1, 1, dtype=torch.uint8), torch.ones(2, 1, 1, 1, dtype=torch.uint8)
    assert [compute(x).tolist() for x in (a, b, a)] == [[[0], [0]], [[1], [1]], [[0], [0]]]
    compute(torch.zeros(1, 2, 1, 1, dtype=torch.uint8))  # the same bytes
    assert calls == [2, 2, 1]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"samples": 1}, "samples is 1; quartiles need at least 2"),
        ({"batch_sizes": (1, 0)}, "batch sizes are 1, 0; give some, each at least 1"),
        ({"batch_sizes": ()}, "batch sizes are none"),
        ({"threads": ()}, "threads are none"),
        ({"threads": (100_000,)}, "threads is 100000; on this machine 1 to"),
        ({"onnx": "missing.onnx", "targets": ("onnx",)}, "missing.onnx does not exist"),
        ({"images": "missing"}, "missing is not a folder"),
    ],
)
def test_refusals(model: nn.Module, given: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        benchmark(model, **given)


@pytest.mark.parametrize(("is_cuda", "provider"), [(False, "cpu"), (True, "cuda")])
def test_all_targets_compute_where_the_model_is(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch, is_cuda: bool, provider: str
) -> None:
    given: list[Given] = []

    def choose(_: object, what: Given, __: object) -> list[str]:
        given.append(what)
        raise InputError("enough")

    monkeypatch.setattr(module, "choose", choose)
    monkeypatch.setattr(type(model), "parameters", lambda _: iter([SimpleNamespace(is_cuda=is_cuda)]))
    with pytest.raises(InputError, match="enough"):
        benchmark(model)
    assert [what.provider for what in given] == [provider]


def test_training_mode_is_refused(source: nn.Module) -> None:
    with pytest.raises(InputError, match="training mode"):
        benchmark(source.train())


def test_a_model_that_cannot_be_sent_is_refused(source: nn.Module) -> None:
    source.register_forward_hook(lambda *_: None)
    with pytest.raises(InputError, match="cannot be sent to a process of its own"):
        benchmark(source, ("eager",))


def test_the_model_and_the_threads_are_left_alone(source: nn.Module, fake: Any) -> None:
    fake.predictor = model_predictor(source)
    before, threads = {name: tensor.clone() for name, tensor in source.state_dict().items()}, torch.get_num_threads()
    benchmark(source, ("eager", "folded"), (1,), (1,), samples=2)
    assert torch.get_num_threads() == threads
    assert source.state_dict().keys() == before.keys()
    for name, tensor in source.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0, msg=name)
