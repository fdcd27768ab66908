"""SIGINT and SIGTERM ask a run to stop where it can be resumed; a second Ctrl-C acts at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def stop_on_signal() -> Iterator[threading.Event]:
    """Yield an event that SIGINT and SIGTERM set; a SIGINT after either acts at once.

    A SIGTERM never does: a cluster may send it to ``torchrun``, which hands it on, and to its processes as well.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(number: int, _: Any) -> None:
        if number == signal.SIGINT and stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Terminated(BaseException):
    """No Exception: what reads pictures takes those for faults of the picture."""


@contextmanager
def sigterm_raises(error: Exception) -> Iterator[None]:
    """Let SIGTERM in the main thread raise ``error`` from the ``with``: else the process would end without a word."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def terminate(*_: Any) -> None:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    except _Terminated:
        raise error from None
    finally:
        signal.signal(signal.SIGTERM, before)
