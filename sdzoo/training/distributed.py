"""The processes of one run: who they are, and what they tell each other.

``torchrun`` starts them and says in the environment which is which; a run that it did not start is one process.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from sdzoo.errors import InputError

# A process that waits this long for another gives it up; one that died is noticed at once, by its closed connection.
PATIENCE = timedelta(seconds=50)
DOWNLOAD_PATIENCE = timedelta(hours=6)


class LostProcess(RuntimeError):
    """Another process of the run has died, or does not answer."""


@dataclass(frozen=True)
class Shard:
    """Which part of every global batch a process takes: samples ``rank::world``."""

    rank: int = 0
    world: int = 1


@dataclass(frozen=True)
class Processes:
    """This process among those of its run."""

    shard: Shard
    device: torch.device
    patient: Any = None  # a group of all processes, in which one may wait long

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.shard.rank == 0

    @property
    def many(self) -> bool:
        """Whether there are others."""
        return self.shard.world > 1

    def total(self, *values: float) -> list[float]:
        """Return the sums over all processes; each must call it, in the same order."""
        if not self.many:
            return [float(value) for value in values]
        sums = torch.tensor(values, dtype=torch.float64, device=self.device)
        with lost_processes_named(self.shard):
            dist.all_reduce(sums)
        return sums.tolist()

    def union(self, part: dict[str, str]) -> dict[str, str]:
        """Return the entries of all processes' ``part``; each must call it, in the same order."""
        if not self.many:
            return part
        parts: list[Any] = [None] * self.shard.world
        with lost_processes_named(self.shard):
            dist.all_gather_object(parts, part, group=self.patient)
        return {name: value for each in parts for name, value in each.items()}

    @contextmanager
    def leader_first(self) -> Iterator[None]:
        """Let the first process through the ``with`` before the others: it fetches what all then find."""
        with lost_processes_named(self.shard):
            if self.many and not self.leads:
                dist.barrier(self.patient)
            try:
                yield
            finally:  # also if it failed: then the others find out why
                if self.many and self.leads:
                    dist.barrier(self.patient)


@contextmanager
def processes(device: str | None = None) -> Iterator[Processes]:
    """Join the other processes of this run, if there are any, for the time of the ``with``.

    Args:
        device: ``cpu``, ``cuda``, ``cuda:1``, ...; default: cuda if there is one. Of several processes, each takes the
            card of its local rank.

    Raises:
        InputError: if there is no such device.
        LostProcess: if the others cannot be reached.
    """
    shard = Shard(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))
    chosen = _device(device or ("cuda" if torch.cuda.is_available() else "cpu"), shard)
    if shard.world == 1:
        yield Processes(shard, chosen)
        return
    with lost_processes_named(shard):
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=PATIENCE)
        patient = dist.new_group(backend="gloo", timeout=DOWNLOAD_PATIENCE)
    try:
        yield Processes(shard, chosen, patient)
    finally:
        dist.destroy_process_group()


def _device(name: str, shard: Shard) -> torch.device:
    if shard.world > 1 and name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', shard.rank)}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f'device "{name}" cannot be had: {str(error).splitlines()[0]}') from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


@contextmanager
def lost_processes_named(shard: Shard) -> Iterator[None]:
    """Turn what the communication library says of a dead or silent process into :class:`LostProcess`."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if shard.world > 1 and (isinstance(error, dist.DistError) or "gloo" in text or "Connection" in text):
            raise LostProcess(
                f"rank {shard.rank} of {shard.world}: another process of this run is gone: {text.splitlines()[0]}"
            ) from error
        raise
