"""The processes of one run: who they are, and what they tell each other.

``torchrun`` starts them and says in the environment which is which; a run that it did not start is one process.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from sdzoo.errors import InputError
from sdzoo.training import heartbeat

T = TypeVar("T")

# A process that died is noticed at once by those that wait for it, by its closed connection; one that was stopped, or
# whose machine is gone, by its heartbeat. What is left is one that beats and never comes: it is given up after this.
PATIENCE = timedelta(minutes=10)
DATA_PATIENCE = timedelta(hours=6)  # and while data is fetched and read after this


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
    patient: Any = None  # a group of all processes, on gloo, in which one may wait long

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
        return {name: value for each in self.gather(part) for name, value in each.items()}

    def gather(self, own: T) -> list[T]:
        """Return what each process calls it with, by rank; each must call it, in the same order."""
        if not self.many:
            return [own]
        everyones: list[Any] = [None] * self.shard.world
        with lost_processes_named(self.shard):
            dist.all_gather_object(everyones, own, group=self.patient)
        return everyones

    def from_leader(self, content: bytes | None) -> bytes | None:
        """Return the first process's ``content``, or None if it has none; each must call it, in the same order."""
        if not self.many:
            return content
        with lost_processes_named(self.shard):
            size = torch.tensor([-1 if content is None else len(content)])
            dist.broadcast(size, 0, group=self.patient)
            if size < 0:
                return None
            data = torch.empty(int(size), dtype=torch.uint8)
            if self.leads and content:
                data = torch.frombuffer(bytearray(content), dtype=torch.uint8)
            if len(data):
                dist.broadcast(data, 0, group=self.patient)
        return content if self.leads else data.numpy().tobytes()

    def meet(self) -> None:
        """Wait, however long, until all processes are here."""
        if self.many:
            with lost_processes_named(self.shard):
                dist.barrier(self.patient)

    @contextmanager
    def leader_first(self) -> Iterator[None]:
        """Let the first process through the ``with`` before the others: it fetches what all then find."""
        if not self.leads:
            self.meet()
        try:
            yield
        finally:  # also if it failed: then the others find out why
            if self.leads:
                self.meet()


def this_shard() -> Shard:
    """Return which process this is, by what ``torchrun`` says in the environment; where it says nothing, the only one.

    Raises:
        InputError: if the environment says half of it, or what cannot be.
    """
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    said = {name: os.environ.get(name, "") for name in names}
    if not (said["RANK"] or said["WORLD_SIZE"]):
        return Shard()
    rank, world, port = (int(said[name]) if said[name].isdecimal() else -1 for name in (*names[:2], "MASTER_PORT"))
    meets = world == 1 or (said["MASTER_ADDR"] and 0 < port < 2**16)
    if not (0 <= rank < world and meets):
        here = ", ".join(f"{name}={value}" if value else f"no {name}" for name, value in said.items())
        raise InputError(f"the environment has {here}: no process of a run; torchrun sets these, or leave them unset")
    return Shard(rank, world)


@contextmanager
def processes(device: str | None = None, advice: str = "") -> Iterator[Processes]:
    """Join the other processes of this run, if there are any, for the time of the ``with``.

    If one of them falls silent, this process ends with code 1 and one line: what it waits for may never return.

    Args:
        device: ``cpu``, ``cuda``, ``cuda:1``, ...; default: cuda if there is one. Of several processes, each takes the
            card of its local rank.
        advice: What that line ends with on the first process.

    Raises:
        InputError: if there is no such device.
        LostProcess: if the others cannot be reached.
    """
    shard = this_shard()
    chosen = _device(device or ("cuda" if torch.cuda.is_available() else "cpu"), shard)
    if shard.world == 1:
        yield Processes(shard, chosen)
        return

    def lost(silent: list[int]) -> None:
        which = ", ".join(map(str, silent))
        message = _gone(shard, f"nothing was heard of rank {which} for {heartbeat.SILENCE_S:.0f} s")
        more = f"; {advice}" if advice and shard.rank == 0 else ""
        print(f"sdzoo: {message}{more}", file=sys.stderr, flush=True)
        os._exit(1)

    with lost_processes_named(shard):
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=PATIENCE)
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=PATIENCE
        )
        beating = heartbeat.Heartbeat(shard.rank, shard.world, store, lost)
        patient = dist.new_group(backend="gloo", timeout=DATA_PATIENCE)
    beating.start()
    finished = False
    try:
        yield Processes(shard, chosen, patient)
        finished = True
    finally:
        beating.stop(leaves=finished)
        dist.destroy_process_group()


def _device(name: str, shard: Shard) -> torch.device:
    if name == "cuda":  # a card needs its number before it can be made the current one
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
            why = "it did not answer in time" if "imed out" in text else "its connection is closed"
            raise LostProcess(_gone(shard, why)) from error
        raise


def _gone(shard: Shard, why: str) -> str:
    return f"rank {shard.rank} of {shard.world}: another process of this run is gone: {why}"
