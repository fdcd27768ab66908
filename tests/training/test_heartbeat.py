"""Slow is not dead: a process is given up when it is silent, and only then."""

from __future__ import annotations

import queue
import socket
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from sdzoo.training import heartbeat
from sdzoo.training.heartbeat import Heartbeat


@pytest.fixture
def stores(monkeypatch: pytest.MonkeyPatch) -> list[dist.TCPStore]:
    """Three connections to one store; a heart beats every 50 ms and is given up after one second."""
    monkeypatch.setattr(heartbeat, "BEAT_S", 0.05)
    monkeypatch.setattr(heartbeat, "SILENCE_S", 1.0)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    master = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=5))
    return [master, *(dist.TCPStore("127.0.0.1", port, timeout=timedelta(seconds=5)) for _ in range(2))]


def beating(stores: list[dist.TCPStore]) -> tuple[list[Heartbeat], queue.Queue[tuple[int, list[int]]]]:
    said: queue.Queue[tuple[int, list[int]]] = queue.Queue()
    hearts = [
        Heartbeat(rank, 3, store, lambda silent, rank=rank: said.put((rank, silent)))
        for rank, store in enumerate(stores)
    ]
    for heart in hearts:
        heart.start()
    return hearts, said


def test_who_falls_silent_is_named_by_all_others_after_the_silence(stores: list[dist.TCPStore]) -> None:
    hearts, said = beating(stores)
    time.sleep(1.5)
    assert said.empty(), "all beat"
    hearts[1].stop(leaves=False)
    begun = time.monotonic()
    heard = [said.get(timeout=5) for _ in range(2)]
    assert sorted(heard) == [(0, [1]), (2, [1])]
    assert 0.9 < time.monotonic() - begun < 4
    for heart in (hearts[0], hearts[2]):
        heart.stop(leaves=True)


def test_who_leaves_is_not_missed(stores: list[dist.TCPStore]) -> None:
    hearts, said = beating(stores)
    hearts[2].stop(leaves=True)
    time.sleep(2)
    assert said.empty()
    for heart in hearts[:2]:
        heart.stop(leaves=True)
