"""One training step with stochastic depth against constant depth and against timm's drop path, in the same network.

    python benchmarks/training_step.py
    python benchmarks/training_step.py --device cuda --model sd_resnet50 --amp-dtype bfloat16

In channels-last layout, the faster one, as the recipes have it. A sample is the sum of several steps with gates drawn
anew, so that it stands for the average step. The floor is the mean survival probability: what a step would cost if all
blocks cost the same, and stem, shortcuts, head and optimizer nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import timm
import torch
import torch.nn.functional as F
from interleaved import hardware, interleave, ratio
from timm.layers import DropPath
from torch import Tensor, nn

import sdzoo
from sdzoo.images import input_config
from sdzoo.residual import residual_blocks


def with_timm_drop_path(model: nn.Module, survival_probs: list[float]) -> nn.Module:
    """Put timm's DropPath at the end of every branch of a constant-depth ``model``, and return it."""
    blocks: list[Any] = [block for _, block in residual_blocks(model)]
    for block, p in zip(blocks, survival_probs, strict=True):
        branch, drop_path = block.branch, DropPath(1 - p)
        block.branch = lambda x, branch=branch, drop_path=drop_path: drop_path(branch(x))
    return model


def steps(model: nn.Module, images: Tensor, labels: Tensor, count: int, autocast: torch.autocast) -> Callable[[], None]:
    """Return a function that does ``count`` optimizer steps, and returns when the device has done them."""
    model.train().to(images.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=1e-4)

    def run() -> None:
        for _ in range(count):
            optimizer.zero_grad()
            with autocast:
                loss = F.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
        if images.is_cuda:
            torch.cuda.synchronize()

    return run


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sd_resnet110")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps a sample")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--amp-dtype", choices=("bfloat16",), help="mixed precision; otherwise float32, on a GPU with TF32"
    )
    arguments = parser.parse_args()

    torch.manual_seed(0)
    constant = timm.create_model(arguments.model, schedule="constant_depth")
    linear = {p: timm.create_model(arguments.model, drop_path_rate=1 - p) for p in (0.5, 0.2)}
    probs = {p: sdzoo.survival_probs(model) for p, model in linear.items()}
    models = {
        "constant depth": constant,
        "p_L = 0.5": linear[0.5],
        "p_L = 0.2": linear[0.2],
        "timm DropPath, p_L = 0.5": with_timm_drop_path(
            timm.create_model(arguments.model, schedule="constant_depth"), probs[0.5]
        ),
    }
    size = input_config(constant)["input_size"]
    device = torch.device(arguments.device)
    images = torch.randn(arguments.batch_size, *size, device=device).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (arguments.batch_size,), device=device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=arguments.amp_dtype is not None)
    seconds = interleave(
        {name: steps(model, images, labels, arguments.steps, autocast) for name, model in models.items()},
        arguments.rounds,
    )
    precision = arguments.amp_dtype or "float32"
    print(
        f"{arguments.model}, batch {arguments.batch_size}, {precision}, {arguments.steps} steps a sample, channels last"
    )
    print(f"{hardware(device)}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for name in models:
        print(f"{name:<26} {ratio(seconds, name, 'constant depth')}")
    for p, values in probs.items():
        print(f"floor at p_L = {p}: {sum(values) / len(values):.3f}")


if __name__ == "__main__":
    main()
