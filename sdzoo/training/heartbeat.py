"""Who of a run's processes is alive: slow is not dead, silent is.

A process that reads a large data set answers nobody for a while, and one that waits for it cannot know why. Beside its
work each therefore beats in the store through which ``torchrun`` made them meet, and listens to the others.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress

import torch.distributed as dist

BEAT_S = 2.0
SILENCE_S = 30.0  # then a process is given up; a machine that is itself held up meanwhile still leaves within a minute
LEFT = b"left"


class Heartbeat:
    """A process's beats, and its ear for those of the others.

    Args:
        rank: This process.
        world: How many there are; all must have made theirs before one starts.
        store: A connection of its own: a client answers one call at a time, and some wait long.
        lost: Called, in a thread, with the ranks that have been silent for ``SILENCE_S``.
    """

    def __init__(self, rank: int, world: int, store: dist.Store, lost: Callable[[list[int]], None]) -> None:
        self.store, self.lost = store, lost
        start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun's store outlives the processes
        self.keys = [f"sdzoo/{start}/{each}" for each in range(world)]
        self.own = self.keys[rank]
        self.others = [each for each in range(world) if each != rank]
        self.stopped = threading.Event()
        self.store.set(self.own, "0")

    def start(self) -> None:
        """Begin to beat and to listen."""
        self.heard = dict.fromkeys(self.others, time.monotonic())
        self.threads = [threading.Thread(target=work, daemon=True) for work in (self._beat, self._listen)]
        for thread in self.threads:
            thread.start()

    def stop(self, leaves: bool) -> None:
        """End; a process that ``leaves`` says so, and is not missed."""
        self.stopped.set()
        self.threads[0].join(BEAT_S)  # not for ever: the store may be what is gone
        if leaves and not self.threads[0].is_alive():
            with suppress(RuntimeError):
                self.store.set(self.own, LEFT.decode())

    def _beat(self) -> None:
        beats, before = 0, [b""] * len(self.keys)
        while not self.stopped.wait(BEAT_S):
            beats += 1
            with suppress(RuntimeError):  # a store that is gone is silent, as its process is
                self.store.set(self.own, str(beats))
                now = self.store.multi_get(self.keys)
                for rank in self.others:
                    if now[rank] != before[rank] or now[rank] == LEFT:
                        self.heard[rank] = time.monotonic()
                before = now

    def _listen(self) -> None:
        # A thread of its own: where the process that holds the store is stopped, asking it never returns.
        awake = time.monotonic()
        while not self.stopped.wait(BEAT_S):
            now = time.monotonic()
            if now - awake > SILENCE_S / 2:  # it was this process that was stopped, perhaps with all others
                self.heard = dict.fromkeys(self.others, now)
            awake = now
            if silent := [rank for rank in self.others if now - self.heard[rank] > SILENCE_S]:
                self.lost(silent)
                return
