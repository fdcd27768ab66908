"""What models cost, and how one is opened by name or by file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sdzoo.errors import InputError
from sdzoo.images import input_config
from sdzoo.registry import PATTERN, check_name, tags
from sdzoo.survival import survival_probs
from sdzoo.training.checkpoint import load_model


@dataclass(frozen=True)
class Summary:
    """What a model is made of; MACs are multiply-accumulates of one image in evaluation."""

    name: str
    input_size: tuple[int, int, int]
    parameters: int
    macs: int
    layers: int
    survival_probs: tuple[float, ...]
    weights: tuple[str, ...]

    @property
    def blocks(self) -> int:
        """Residual blocks."""
        return len(self.survival_probs)

    @property
    def expected_live_blocks(self) -> float:
        """Blocks that a training step computes on average: the sum of the survival probabilities."""
        return sum(self.survival_probs)


def summarise(name: str) -> Summary:
    """Return what the model ``name`` is made of, with the default schedule (linear decay to 0.5).

    Raises:
        InputError: if there is no such model.
    """
    check_name(name)
    model_name = name.partition(".")[0]
    with torch.device("meta"):
        model = timm.create_model(name).eval()
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        size = input_config(model)["input_size"]
        model(torch.zeros(1, *size))
    return Summary(
        name=name,
        input_size=size,
        parameters=sum(p.numel() for p in model.parameters()),
        macs=counter.get_total_flops() // 2,
        layers=sum(isinstance(module, (nn.Conv2d, nn.Linear)) for module in model.modules()),
        survival_probs=tuple(survival_probs(model)),
        weights=tuple(f"{model_name}.{tag}" for tag in tags(model_name)),
    )


def open_model(name_or_file: str, arch: str | None = None, need_weights: bool = True) -> nn.Module:
    """Return a model in evaluation mode: by name with the weights that ship, or from a checkpoint file.

    Args:
        name_or_file: ``sd_resnet20``, ``sd_resnet20.cifar10_jpeg``, or a ``.safetensors`` or ``.pth`` file.
        arch: The model's name, for a file that does not say.
        need_weights: Refuse a model without weights; else it is returned untrained.

    Raises:
        InputError: if there is no such model or file, the file is damaged or does not fit, or there are no weights.
    """
    if Path(name_or_file).suffix in (".safetensors", ".pth", ".pt", ".tar", ".onnx") or Path(name_or_file).is_file():
        return load_model(name_or_file, arch)
    if arch:
        raise InputError(
            f"--arch {arch} is for a checkpoint that does not say which model it is, not for {name_or_file}"
        )
    if Path(name_or_file).name != name_or_file:
        raise InputError(f"{name_or_file} is neither a file nor a model")
    check_name(name_or_file)
    pretrained = bool(tags(name_or_file.partition(".")[0]))
    if need_weights and not pretrained:
        with_weights = ", ".join(timm.list_pretrained(PATTERN))
        raise InputError(f"{name_or_file} has no weights: give a checkpoint that you trained, or one of {with_weights}")
    return timm.create_model(name_or_file, pretrained=pretrained).eval()
