"""What must stay the same for a resumed run to be the undisturbed one to the bit."""

from __future__ import annotations

import platform
from typing import Any

import numpy as np
import PIL
import timm
import torch
import torchvision

from sdzoo import __version__
from sdzoo.training.distributed import Processes
from sdzoo.training.recipe import Recipe


def environment(recipe: Recipe, team: Processes) -> dict[str, Any]:
    """Return versions, machine, threads, processes, workers and compiler of this run, as plain values."""
    device = team.device
    return {
        "sdzoo": __version__,
        "python": platform.python_version(),
        **{module.__name__: str(module.__version__) for module in (torch, torchvision, timm, np, PIL)},
        "machine": f"{platform.system()} {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "world": team.shard.world,
        "workers": recipe.workers,
        "compile": recipe.torchcompile or "no",
    }


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return what differs between two environments, as ``name: before -> now``."""
    names = [*before, *(name for name in now if name not in before)]
    return [f"{name}: {before.get(name)} -> {now.get(name)}" for name in names if before.get(name) != now.get(name)]
