"""The first signal asks a run to stop where it can be resumed; the second acts at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def stop_on_signal() -> Iterator[threading.Event]:
    """Yield an event that the first SIGINT or SIGTERM sets; a second one acts at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    # The defaults, not what was there before: a shell starts what runs in the background with SIGINT ignored.
    at_once = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    before = {number: signal.getsignal(number) for number in at_once}

    def ask(number: int, _: Any) -> None:
        stop.set()
        signal.signal(number, at_once[signal.Signals(number)])

    for number in before:
        signal.signal(number, ask)
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
