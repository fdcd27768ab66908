"""A target's process: what it answers, and how it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from sdzoo.deploy import benchmark_process
from sdzoo.deploy.benchmark_process import TargetProcess, time_calls
from sdzoo.deploy.benchmark_target import Opening
from sdzoo.deploy.predictor import model_predictor
from sdzoo.errors import InputError
from sdzoo.images import input_config

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 3, 32, 32), dtype=np.uint8)
needs_signals = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")


def opening(model: nn.Module, file: Path, kind: str, threads: int = 1, provider: str = "cpu") -> Opening:
    return Opening(kind, kind, file, threads, provider, input_config(model))


@pytest.fixture(scope="module")
def process(model: nn.Module, exported: Path) -> Iterator[TargetProcess]:
    with TargetProcess(opening(model, exported, "onnx")) as process:
        assert process.opened.provider == "CPUExecutionProvider"
        yield process


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/status")
    return not status.exists() or "Z (zombie)" not in status.read_text()


def test_it_computes_what_the_model_does(process: TargetProcess, model: nn.Module) -> None:
    ours, theirs = model_predictor(model).pixels(PIXELS), process.logits(PIXELS)
    assert np.abs(ours - theirs).max() <= 1e-4 * max(1, np.abs(ours).max())


def test_as_many_calls_as_asked(process: TargetProcess) -> None:
    turn = process.time(2, 7)
    assert len(turn.milliseconds) == 7
    assert min(turn.milliseconds) > 0


def test_memory_is_its_own_and_grows_with_the_batch(process: TargetProcess) -> None:
    """One activation of the first stage, 16 x 32 x 32 floats, is 1/16 MiB an image; the libraries do not count."""
    before, after = process.time(1, 1).peak_memory_mib, process.time(512, 1).peak_memory_mib
    if before is None or after is None:
        pytest.skip("this system does not say what memory a process held")
    assert before < 150
    assert after - before > 512 / 16


def test_eager_is_what_torch_saved(model: nn.Module, tmp_path: Path) -> None:
    torch.save(model, tmp_path / "eager.pt")
    with TargetProcess(opening(model, tmp_path / "eager.pt", "eager")) as process:
        assert process.opened.runtime == f"torch {torch.__version__}"
        np.testing.assert_allclose(process.logits(PIXELS), model_predictor(model).pixels(PIXELS), rtol=0, atol=1e-4)


def test_what_it_refuses_is_the_users_mistake(model: nn.Module, exported: Path, tmp_path: Path) -> None:
    (tmp_path / "damaged.onnx").write_bytes(exported.read_bytes()[:1000])
    with (
        TargetProcess(opening(model, tmp_path / "damaged.onnx", "onnx")) as process,
        pytest.raises(InputError, match=r"^onnx: .*damaged.onnx is no whole ONNX file"),
    ):
        process.time(1, 1)


def test_a_failure_says_which_target_and_why(model: nn.Module, tmp_path: Path) -> None:
    torch.save({"no": "model"}, tmp_path / "other.pt")
    with (
        TargetProcess(opening(model, tmp_path / "other.pt", "eager", threads=2)) as process,
        pytest.raises(ChildProcessError, match=r"^the process of eager, 2 threads, failed: AttributeError: .*dict"),
    ):
        process.time(1, 1)


@needs_signals
def test_a_killed_process_says_which_target_and_why(model: nn.Module, exported: Path) -> None:
    with TargetProcess(opening(model, exported, "onnx")) as process:
        assert process.opened
        os.kill(process._process.pid, signal.SIGKILL)
        process._process.wait()
        for ask in (lambda: process.time(1, 1), lambda: process.logits(PIXELS)):
            with pytest.raises(ChildProcessError, match=r"process of onnx, 1 thread, died: SIGKILL, .*memory"):
                ask()


def test_the_last_words_of_a_process_are_quoted(
    model: nn.Module, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = "import sys; print('first', file=sys.stderr); print('no library\\n', file=sys.stderr); sys.exit(7)"
    monkeypatch.setattr(benchmark_process, "COMMAND", command)
    with (
        TargetProcess(opening(model, exported, "onnx")) as process,
        pytest.raises(ChildProcessError, match=r"died: exit code 7: no library$"),
    ):
        process.time(1, 1)


def test_what_a_library_prints_is_no_answer(model: nn.Module, exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noisy = benchmark_process.COMMAND.replace("from sdzoo", "print('hello'); os.system('echo hello'); from sdzoo", 1)
    monkeypatch.setattr(benchmark_process, "COMMAND", noisy)
    with TargetProcess(opening(model, exported, "onnx")) as process:
        assert len(process.time(1, 2).milliseconds) == 2


def test_it_comes_to_rest_before_each_answer(
    model: nn.Module, exported: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Else its threads would still look for work while the next target is timed."""
    rests = tmp_path / "rests"
    noted = f"import sdzoo.deploy.benchmark_process as m; m._rest = lambda: print(file=open({str(rests)!r}, 'a'))"
    command = benchmark_process.COMMAND.replace("serve(", f"{noted}; serve(")
    monkeypatch.setattr(benchmark_process, "COMMAND", command)
    with TargetProcess(opening(model, exported, "onnx")) as process:
        for count in (1, 2):
            process.time(1, 1)
            assert len(rests.read_text().splitlines()) == count


def test_memory_of_a_gpu_is_not_the_process_s(
    model: nn.Module, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_gpu = "import sdzoo.deploy.benchmark_process as m; m.is_on_gpu = lambda provider: True; serve("
    monkeypatch.setattr(benchmark_process, "COMMAND", benchmark_process.COMMAND.replace("serve(", on_gpu))
    with TargetProcess(opening(model, exported, "onnx")) as process:
        assert process.time(1, 1).peak_memory_mib is None


def test_it_ends_with_its_context(model: nn.Module, exported: Path) -> None:
    with TargetProcess(opening(model, exported, "onnx")) as process:
        pid = process._process.pid
        assert alive(pid)
    assert not alive(pid)


SCRIPT = """
import signal, timm, sdzoo
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a script is started deaf to it
model = timm.create_model("sd_resnet20", pretrained=True).eval()
sdzoo.benchmark(model, ("eager", "folded"), (1,), (1,), samples=2000, progress=lambda text: print(text, flush=True))
"""


@needs_signals
@pytest.mark.parametrize("sent", ["SIGINT", "SIGKILL"])
def test_an_interrupt_ends_every_child(sent: str, tmp_path: Path) -> None:
    """Ctrl-C, which a terminal sends to the whole group; and a benchmark that is killed leaves none either."""
    script = tmp_path / "script.py"  # a plain one: no main that would be guarded
    script.write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    running = subprocess.Popen(
        [sys.executable, script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )
    try:
        assert running.stdout
        while "round 2/" not in (line := running.stdout.readline()):
            assert line, running.stderr and running.stderr.read()
        children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(running.pid)], capture_output=True, text=True)
        pids = [int(pid) for pid in children.stdout.split() if alive(int(pid))]
        assert len(pids) >= 2
        os.killpg(running.pid, getattr(signal, sent))
        _, errors = running.communicate(timeout=60)
        assert ("KeyboardInterrupt" in errors) == (sent == "SIGINT")
        assert errors.count("Traceback") == (sent == "SIGINT"), "a child was interrupted too"
        deadline = time.monotonic() + 60
        while any(map(alive, pids)):
            assert time.monotonic() < deadline, "a child was left"
            time.sleep(0.1)
    finally:
        running.kill()
        running.communicate()


@needs_signals
def test_a_terminals_interrupt_does_not_reach_it(process: TargetProcess) -> None:
    assert os.getsid(process._process.pid) == process._process.pid != os.getsid(0)


class Calls:
    """A predictor that takes a known time by a clock of its own: the n-th call n milliseconds."""

    def __init__(self) -> None:
        self.now_s, self.shapes = 0.0, list[tuple[int, ...]]()

    def __call__(self, images: Any) -> None:
        self.shapes.append(images.shape)
        self.now_s += len(self.shapes) / 1000


@pytest.mark.parametrize(("busy", "rests"), [(0, 1), (3, 4), (1000, benchmark_process.MOST_RESTS)])
def test_it_waits_as_long_as_its_threads_are_busy_but_not_for_ever(
    monkeypatch: pytest.MonkeyPatch, busy: int, rests: int
) -> None:
    used, slept = [0.0], list[float]()

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        used[0] += seconds if len(slept) <= busy else seconds / 100

    monkeypatch.setattr(benchmark_process.time, "sleep", sleep)
    monkeypatch.setattr(benchmark_process.time, "process_time", lambda: used[0])
    benchmark_process._rest()
    assert len(slept) == rests


def test_the_first_call_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: Any = Calls()
    monkeypatch.setattr(benchmark_process.time, "perf_counter", lambda: calls.now_s)
    assert time_calls(calls, (3, 4, 5), 2, 3) == pytest.approx([2, 3, 4])
    assert calls.shapes == [(2, 3, 4, 5)] * 4
