"""What the tests of the models share: one calibrated net, and images for it."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable

import pytest
import torch
from nets import Net, calibrated, random_images
from torch import Tensor, nn

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # tests that import onnxruntime before sdzoo does

if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):  # they share the cores, with what they start
    threads = max(1, (os.cpu_count() or 1) // workers)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def _master() -> Net:
    return calibrated("sd_resnet20", drop_path_rate=0.7)


@pytest.fixture
def source(_master: Net) -> Net:
    """Return a calibrated ``sd_resnet20`` in evaluation, p falling to 0.3, which is not the default."""
    return copy.deepcopy(_master)


@pytest.fixture
def images() -> Tensor:
    """Return four 32-pixel images of noise."""
    return random_images()


@pytest.fixture
def conv_calls() -> Callable[[nn.Module], dict[str, int]]:
    """Return a counter: from when it is applied to a model, its dict holds how often each convolution was called."""

    def count(model: nn.Module) -> dict[str, int]:
        calls = {name: 0 for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}

        def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
            def called(_module: nn.Module, _inputs: tuple[Tensor, ...], _output: Tensor) -> None:
                calls[name] += 1

            return called

        for name in calls:
            model.get_submodule(name).register_forward_hook(hook(name))
        return calls

    return count


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
