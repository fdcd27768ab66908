"""Bytes that a training step keeps for its backward, with stochastic depth against constant depth.

    python benchmarks/activation_memory.py

Counted are the distinct storages that autograd saves in the forward: activations, and the weights that their gradients
need. The count is exact: only the gates, which are those of the first steps of a run of that seed, make it vary. The
floor is the mean survival probability: what it would be if every byte were a branch's, and all branches kept the same.
"""

from __future__ import annotations

import argparse
import statistics

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sdzoo
from sdzoo.images import input_config
from sdzoo.training.streams import stream


def saved_bytes(model: nn.Module, images: Tensor, labels: Tensor) -> int:
    """Return the bytes of the distinct storages that one forward saves for its backward."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        # The graph keeps it, so that no other storage gets its address; but a saved output must not keep its own graph.
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = F.cross_entropy(model(images), labels)
    assert loss.requires_grad
    return sum(storages.values())


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sd_resnet110")
    parser.add_argument("--final-survival-prob", type=float, default=0.5)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=42, help="the gates are those of a recipe's run of this seed")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    constant = timm.create_model(arguments.model, schedule="constant_depth").train()
    dropping = timm.create_model(arguments.model, drop_path_rate=1 - arguments.final_survival_prob).train()
    for model in (constant, dropping):
        model.to(memory_format=torch.channels_last)
    size = input_config(constant)["input_size"]
    images = torch.randn(arguments.batch_size, *size).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (arguments.batch_size,))
    probs = torch.tensor(sdzoo.survival_probs(dropping))
    whole = saved_bytes(constant, images, labels)
    ratios, live_blocks = [], []
    for step in range(arguments.steps):
        bits = (torch.rand(len(probs), generator=stream(arguments.seed, "gates", step)) < probs).tolist()
        with sdzoo.fixed_gates(dropping, bits):
            ratios.append(saved_bytes(dropping, images, labels) / whole)
        live_blocks.append(sum(bits))
    print(f"{arguments.model}, batch {arguments.batch_size}, channels last, torch {torch.__version__}")
    print(f"constant depth: {whole / 2**20:.0f} MiB saved for backward")
    print(
        f"p_L = {arguments.final_survival_prob}, {arguments.steps} steps: mean {statistics.mean(ratios):.3f}, "
        f"maximum {max(ratios):.3f}, minimum {min(ratios):.3f} of constant depth"
    )
    print(
        f"live blocks: mean {statistics.mean(live_blocks):.1f}, maximum {max(live_blocks)} of {len(probs)}; "
        f"floor {probs.mean():.3f}"
    )


if __name__ == "__main__":
    main()
