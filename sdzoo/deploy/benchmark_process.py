"""One target in a process of its own, so that its threads, its heap and its memory are nobody else's.

The process is a fresh interpreter, not a copy of this one: it runs no script of the user's again, and a terminal's
Ctrl-C does not reach it. It answers requests one by one and ends when there is nobody left to ask.
"""

from __future__ import annotations

import os
import pickle
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from sdzoo.deploy.benchmark_target import Opening, device_name, import_runtime, is_on_gpu, open_target
from sdzoo.deploy.predictor import Predictor
from sdzoo.errors import InputError

# What libraries print goes to the errors' file; the answers have the standard output to themselves.
COMMAND = (
    "import os; answers = os.dup(1); os.dup2(2, 1); from sdzoo.deploy.benchmark_process import serve; serve(answers)"
)
REST_S, MOST_RESTS = 0.01, 30


@dataclass(frozen=True)
class Opened:
    """What computes a target: runtime and version, provider, device."""

    runtime: str
    provider: str
    device: str


@dataclass(frozen=True)
class Turn:
    """The calls of one turn, and the most memory that the process has held so far, above its libraries'.

    None where the system does not say, and on a GPU, whose memory is not the process's.
    """

    milliseconds: list[float]
    peak_memory_mib: float | None


class TargetProcess:
    """A target that is being opened in a process of its own; as a context, the process ends with it."""

    def __init__(self, opening: Opening) -> None:
        self.opening = opening
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  closed with the process
        own_group: dict[str, Any] = {"start_new_session": True}
        if os.name == "nt":
            own_group = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}  # type: ignore[attr-defined]
        self._process = subprocess.Popen(
            [sys.executable, "-c", COMMAND],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
            **own_group,
        )
        self._opened: Opened | None = None
        try:
            self._send(opening)
        except ChildProcessError:
            self.close()
            raise

    @property
    def opened(self) -> Opened:
        """Wait until the target is open, and return what computes it.

        Raises:
            InputError: if it cannot be opened here.
            ChildProcessError: naming the target, if its process fails.
        """
        if self._opened is None:
            self._opened = cast(Opened, self._receive())
        return self._opened

    def time(self, batch_size: int, calls: int) -> Turn:
        """Return what ``calls`` calls took, after one that is not counted."""
        return self._ask("time", (batch_size, calls))

    def logits(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return what the target computes of uint8 ``(B, C, H, W)``."""
        return self._ask("logits", images)

    def __enter__(self) -> TargetProcess:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        self._process.kill()  # it holds nothing that would be lost
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe
            with suppress(BrokenPipeError):  # a request that was never read
                pipe.close()
        self._errors.close()

    def _ask(self, what: str, argument: Any) -> Any:
        assert self.opened
        self._send((what, argument))
        return self._receive()

    def _send(self, request: Any) -> None:
        assert self._process.stdin
        try:
            pickle.dump(request, self._process.stdin)
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._death() from None

    def _receive(self) -> Any:
        assert self._process.stdout
        try:
            kind, value = pickle.load(self._process.stdout)
        except (EOFError, pickle.UnpicklingError):
            raise self._death() from None
        if kind == "refused":
            raise InputError(f"{self.opening.name}: {value}")
        if kind == "failed":
            raise ChildProcessError(f"{self._who} failed: {value}")
        return value

    @property
    def _who(self) -> str:
        threads = self.opening.threads
        return f"the process of {self.opening.name}, {threads} thread{'s' if threads > 1 else ''},"

    def _death(self) -> ChildProcessError:
        code = self._process.wait()
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors.read().decode(errors="replace").splitlines() if line.strip()]
        reason = f"exit code {code}"
        if code < 0:
            named = signal.Signals(-code).name if -code in {*signal.Signals} else f"signal {-code}"
            memory = ", as happens where memory runs out" if -code == getattr(signal, "SIGKILL", None) else ""
            reason = f"{named}{memory}"
        return ChildProcessError(f"{self._who} died: {reason}{': ' + lines[-1] if lines else ''}")


def serve(answers: int) -> None:
    """Open the target that the standard input names, and answer what is asked of it there until it ends."""
    with open(answers, "wb") as out:

        def answer(kind: str, value: Any) -> None:
            pickle.dump((kind, value), out)
            out.flush()

        try:
            opening: Opening = pickle.load(sys.stdin.buffer)
            runtime = import_runtime(opening.kind)
            before = _memory_mib("VmRSS")
            predictor = open_target(opening)
            before = None if is_on_gpu(predictor.provider) else before
            answer("opened", Opened(runtime, predictor.provider, device_name(predictor.provider)))
            while True:
                what, argument = pickle.load(sys.stdin.buffer)
                result: Any
                if what == "time":
                    milliseconds = time_calls(predictor, opening.config["input_size"], *argument)
                    peak = _memory_mib("VmHWM")
                    result = Turn(milliseconds, None if before is None or peak is None else round(peak - before, 1))
                else:
                    result = predictor.pixels(argument, opening.config)
                _rest()
                answer("done", result)
        except (EOFError, BrokenPipeError):  # nobody is left to ask
            return
        except InputError as error:
            answer("refused", str(error))
        except Exception as error:
            answer("failed", f"{type(error).__name__}: {' '.join(str(error).split())}")


def time_calls(predictor: Predictor, input_size: Sequence[int], batch_size: int, calls: int) -> list[float]:
    """Return the milliseconds of ``calls`` calls on seeded noise, after one that is not counted."""
    images = np.random.default_rng(0).standard_normal((batch_size, *input_size), dtype=np.float32)
    predictor(images)
    milliseconds = []
    for _ in range(calls):
        started = time.perf_counter()
        predictor(images)
        milliseconds.append((time.perf_counter() - started) * 1000)
    return milliseconds


def _rest() -> None:
    """Wait until this process's threads have stopped looking for work, which they do for a while after each call."""
    for _ in range(MOST_RESTS):
        before = time.process_time()
        time.sleep(REST_S)
        if time.process_time() - before < REST_S / 10:
            return


def _memory_mib(entry: str) -> float | None:
    """Return ``VmRSS``, the memory that this process holds, or ``VmHWM``, the most it held; None unless on Linux."""
    status = Path("/proc/self/status")
    found = re.search(rf"^{entry}:\s+(\d+) kB$", status.read_text(), re.M) if status.exists() else None
    return int(found[1]) / 1024 if found else None
