"""What makes runs comparable to the bit."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from sdzoo.training.distributed import Processes, Shard
from sdzoo.training.environment import deterministic, differences, environment
from sdzoo.training.recipe import Recipe


def flags() -> tuple[bool, ...]:
    cudnn = torch.backends.cudnn
    memory: Any = torch.utils.deterministic
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    fills = memory.fill_uninitialized_memory
    return torch.are_deterministic_algorithms_enabled(), warns, cudnn.deterministic, cudnn.benchmark, fills


def test_on_a_gpu_operations_are_deterministic_while_a_run_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = flags()
    with deterministic(torch.device("cuda")):
        assert flags() == (True, True, True, False, False)
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert flags() == before


def test_on_the_cpu_nothing_is_changed() -> None:
    before = flags()
    with deterministic(torch.device("cpu")):
        assert flags() == before


class Three(Processes):
    """The first of three processes, the last of which has another torch."""

    def gather(self, own: Any) -> Any:
        return [own, own, own | {"torch": "2.0"}]


def test_what_differs_between_processes_is_a_list_by_rank() -> None:
    recipe = Recipe(model="sd_resnet20", epochs=1, lr=0.1)
    alone = environment(recipe, Processes(Shard(), torch.device("cpu")))
    three = environment(recipe, Three(Shard(0, 3), torch.device("cpu")))
    assert three == alone | {"world": 3, "torch": [torch.__version__, torch.__version__, "2.0"]}
    before = three | {"torch": torch.__version__}
    assert differences(before, three) == [f"torch: {torch.__version__} -> {three['torch']}"]
