"""What must stay the same for a resumed run to be the undisturbed one to the bit."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import PIL
import timm
import torch
import torchvision

from sdzoo import __version__
from sdzoo.hardware import processor
from sdzoo.training.distributed import Processes
from sdzoo.training.recipe import Recipe


def environment(recipe: Recipe, team: Processes) -> dict[str, Any]:
    """Return versions, machine, threads, processes, workers and compiler of this run, as plain values.

    What differs between its processes is a list, by rank; each must call it, in the same order.
    """
    everyones = team.gather(_own(recipe, team))
    first = everyones[0]
    return {
        name: first[name] if all(own[name] == first[name] for own in everyones) else [own[name] for own in everyones]
        for name in first
    }


def _own(recipe: Recipe, team: Processes) -> dict[str, Any]:
    device = team.device
    system = f"{platform.system()} {platform.machine()}"
    return {
        "sdzoo": __version__,
        "python": platform.python_version(),
        **{module.__name__: str(module.__version__) for module in (torch, torchvision, timm, np, PIL)},
        "machine": f"{processor()}, {torch.backends.cpu.get_cpu_capability()}, {system}",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "world": team.shard.world,
        "workers": recipe.workers,
        "compile": recipe.torchcompile or "no",
    }


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Let a GPU compute the same bits every time, which costs some speed; a CPU does so anyway.

    Where an operation has no deterministic form, torch warns and names it: then a resumed run is not exact.
    """
    if device.type != "cuda":
        yield
        return
    cudnn: Any = torch.backends.cudnn
    memory: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    before_cudnn, before_fill = (cudnn.deterministic, cudnn.benchmark), memory.fill_uninitialized_memory
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when a process first multiplies matrices
    torch.use_deterministic_algorithms(True, warn_only=True)
    cudnn.deterministic, cudnn.benchmark = True, False
    memory.fill_uninitialized_memory = False  # a kernel for every new tensor; nothing reads one before it is written
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        cudnn.deterministic, cudnn.benchmark = before_cudnn
        memory.fill_uninitialized_memory = before_fill


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return what differs between two environments, as ``name: before -> now``."""
    names = [*before, *(name for name in now if name not in before)]
    return [f"{name}: {before.get(name)} -> {now.get(name)}" for name in names if before.get(name) != now.get(name)]
