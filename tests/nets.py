"""Nets to test with, their function written down a second time, and the limit by which two functions are compared."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sdzoo
from sdzoo.blocks import BasicBlock
from sdzoo.gate import Gate

# timm.create_model promises an nn.Module, of which a type checker knows no attribute.
Net: TypeAlias = Any


def random_images(count: int = 4, size: int = 32, chans: int = 3, seed: int = 1) -> Tensor:
    """Return seeded noise ``(count, chans, size, size)`` in float32."""
    return torch.randn(count, chans, size, size, generator=torch.Generator().manual_seed(seed))


def randomise_batchnorm(model: nn.Module, seed: int = 0) -> None:
    """Give every BatchNorm weights, biases and statistics away from 1 and 0: with the defaults a wrong fold passes."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            with torch.no_grad():
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.bias.normal_(0, 0.2, generator=generator)
                module.running_mean.normal_(0, 0.2, generator=generator)
                module.running_var.uniform_(0.5, 2, generator=generator)


def calibrate(model: nn.Module, seed: int = 0, images: Tensor | None = None) -> Net:
    """Give ``model`` a random affine in every BatchNorm, then the statistics of a forward with all gates open.

    An untrained deep net overflows in evaluation without. Returns ``model``, in evaluation.
    """
    randomise_batchnorm(model, seed)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    if images is None:
        images = random_images(8, seed=seed + 100)
    for norm in norms:
        norm.momentum = 1.0
    model.train()
    with torch.no_grad(), sdzoo.fixed_gates(model, [1] * len(sdzoo.survival_probs(model))):
        model(images.to(next(model.parameters()).dtype))
    for norm in norms:
        norm.momentum = 0.1
    return model.eval()


def calibrated(arch: str = "sd_resnet20", seed: int = 0, images: Tensor | None = None, **kwargs: Any) -> Net:
    """Return the model ``arch``, seeded and calibrated, in evaluation."""
    torch.manual_seed(seed)
    return calibrate(timm.create_model(arch, **kwargs), seed, images)


@torch.no_grad()
def evaluate(model: nn.Module, images: Tensor) -> Tensor:
    """Return the output of ``model`` in evaluation; its mode is as before afterwards."""
    training = model.training
    out = model.eval()(images)
    model.train(training)
    return out


def close(reference: Tensor, other: Tensor, tol: float) -> None:
    """Assert ``max|a - b| <= tol * max(1, max|a|)``, all finite, and equal top-1 where the margin tells."""
    assert reference.shape == other.shape
    a, b = reference.detach().double(), other.detach().double()
    assert bool(a.isfinite().all()), "the reference is not finite"
    assert bool(b.isfinite().all()), "the other is not finite"
    allowed = tol * max(1.0, float(a.abs().max()))
    assert float((a - b).abs().max()) <= allowed
    if a.ndim == 2 and a.shape[1] > 1:
        best = a.sort(dim=1, descending=True).values
        clear = best[:, 0] - best[:, 1] > 2 * allowed
        assert torch.equal(a.argmax(1)[clear], b.argmax(1)[clear])


def block_names(names: Mapping[str, Any]) -> list[str]:
    """Return ``layer1.0 ... layer3.n``, input to output, from the keys of a state dict."""
    found = {match[0] for name in names if (match := re.match(r"layer\d+\.\d+", name))}
    return sorted(found, key=lambda name: [int(number) for number in re.findall(r"\d+", name)])


def plain_forward(
    state: Mapping[str, Tensor], images: Tensor, branch_weights: Sequence[float], training: bool = False
) -> Tensor:
    """Return the logits of a CIFAR ResNet: the paper's equations on a state dict, no module involved.

    Branch l is multiplied by ``branch_weights[l]`` (gates or survival probabilities); one of weight 0 is left out.
    """

    def norm(x: Tensor, name: str) -> Tensor:
        mean, var = state[f"{name}.running_mean"].clone(), state[f"{name}.running_var"].clone()
        return F.batch_norm(x, mean, var, state[f"{name}.weight"], state[f"{name}.bias"], training)

    x = F.relu(norm(F.conv2d(images, state["conv1.weight"], padding=1), "bn1"))
    for name, weight in zip(block_names(state), branch_weights, strict=True):
        conv1, conv2 = state[f"{name}.conv1.weight"], state[f"{name}.conv2.weight"]
        grows = len(conv1) != x.shape[1]
        shortcut = x
        if grows:
            assert x.shape[2] % 2 == x.shape[3] % 2 == 0
            shortcut = (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4
            shortcut = torch.cat([shortcut, torch.zeros_like(shortcut)], dim=1)
        if weight != 0:
            branch = F.relu(norm(F.conv2d(x, conv1, stride=2 if grows else 1, padding=1), f"{name}.bn1"))
            branch = norm(F.conv2d(branch, conv2, padding=1), f"{name}.bn2")
            shortcut = shortcut + weight * branch
        x = F.relu(shortcut)
    return x.mean((2, 3)) @ state["fc.weight"].T + state["fc.bias"]


def linear_decay_by_hand(blocks: int, final: float = 0.5) -> list[float]:
    """Return the paper's ``1 - l / L * (1 - p_L)``, rounded to float32 as the models keep it."""
    exact = [1 - layer * (1 - final) / blocks for layer in range(1, blocks + 1)]
    return torch.tensor(exact, dtype=torch.float64).float().double().tolist()


def without_probs(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state dict that stock software would have written: no survival probabilities."""
    return {name: value for name, value in state.items() if not name.endswith("survival_prob")}


def stored_probs(state: Mapping[str, Tensor]) -> list[float]:
    """Return the survival probabilities in a state dict, input to output."""
    return [float(state[f"{name}.gate.survival_prob"]) for name in block_names(state)]


def make_block(in_chans: int = 8, out_chans: int = 8, p: float = 0.3, **kwargs: Any) -> Net:
    """Return a block in training whose BatchNorms are randomised."""
    block = BasicBlock(in_chans, out_chans, Gate(p), **kwargs)
    randomise_batchnorm(block)
    return block.train()


def after_relu(chans: int = 8, size: int = 8, seed: int = 1) -> Tensor:
    """Return what a ReLU could have fed to a block: ``(4, chans, size, size)``, not negative."""
    return random_images(4, size, chans, seed).relu()


def plain_branch(block: BasicBlock, x: Tensor, training: bool) -> Tensor:
    """Return the residual branch of ``x``, unweighted, without calling a module of ``block``."""

    def norm(x: Tensor, bn: Any) -> Tensor:
        return F.batch_norm(x, bn.running_mean.clone(), bn.running_var.clone(), bn.weight, bn.bias, training)

    stride = 1 if block.conv1.in_channels == block.conv1.out_channels else 2
    x = F.relu(norm(F.conv2d(x, block.conv1.weight, stride=stride, padding=1), block.bn1))
    return norm(F.conv2d(x, block.conv2.weight, padding=1), block.bn2)
