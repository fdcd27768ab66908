"""What models cost, and how one is opened by name or by file."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from pathlib import Path

import timm
import torch
from torch import nn

from sdzoo import weights
from sdzoo.deploy.card import CARD
from sdzoo.errors import InputError
from sdzoo.hub.load import load_hub
from sdzoo.hub.source import FOLDER, HUB
from sdzoo.images import input_config
from sdzoo.macs import count_macs, gates_of
from sdzoo.registry import check_name, models, tags
from sdzoo.training.checkpoint import load_model

SUFFIXES = (".safetensors", ".pth", ".pt", ".tar", ".onnx")


@dataclass(frozen=True)
class Summary:
    """What a model is made of; MACs are multiply-accumulates of one image in evaluation.

    ``training_macs`` are those of its forward in training, on average: a dropped branch costs nothing.
    """

    name: str
    input_size: tuple[int, int, int]
    parameters: int
    macs: int
    training_macs: float
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

    @property
    def bundled(self) -> tuple[str, ...]:
        """Those of the weights that ship with sdzoo; the others are on the Hub."""
        return tuple(name for name in self.weights if weights.path(name).is_file())


def summarise(name: str) -> Summary:
    """Return what the model ``name`` is made of, with the default schedule (linear decay to 0.5).

    What is published, ``hub:org/name`` or ``local-dir:DIR``, is loaded (:func:`sdzoo.load_hub`), with its own schedule.

    Raises:
        InputError: if there is no such model.
        OSError: if it is on the Hub and cannot be fetched.
    """
    if name.startswith((HUB, FOLDER)):
        model = load_hub(name)
        return _summary(name, model, input_config(model)["input_size"], ())
    check_name(name)
    cfg = timm.models.get_pretrained_cfg(name)
    assert cfg is not None
    return replace(_measured(name.partition(".")[0], cfg.input_size, cfg.num_classes), name=name)


@functools.cache
def _measured(name: str, input_size: tuple[int, int, int], num_classes: int) -> Summary:
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=num_classes)
    return _summary(name, model, input_size, tuple(f"{name}.{tag}" for tag in tags(name)))


def _summary(name: str, model: nn.Module, input_size: tuple[int, int, int], weights: tuple[str, ...]) -> Summary:
    probs = [own[0].read() for module in model.modules() if (own := gates_of(module))]
    macs = count_macs(model, input_size)
    return Summary(
        name=name,
        input_size=input_size,
        parameters=sum(p.numel() for p in model.parameters()),
        macs=macs.evaluation,
        training_macs=macs.training,
        layers=sum(isinstance(module, (nn.Conv2d, nn.Linear)) for module in model.modules()),
        survival_probs=tuple(probs),
        weights=weights,
    )


def open_model(name_or_file: str, arch: str | None = None, need_weights: bool = True) -> nn.Module:
    """Return a model in evaluation mode: by name with its weights (on the Hub unless they ship), or from a file.

    Args:
        name_or_file: ``sd_resnet20``, ``sd_resnet20.cifar10_jpeg``, a ``.safetensors`` or ``.pth`` file, or what is
            published: ``hub:org/name``, ``hub:org/name@v1.0``, ``local-dir:DIR`` (:func:`sdzoo.load_hub`).
        arch: The model's name, for a file that does not say.
        need_weights: Refuse a model without weights; else it is untrained unless its weights ship.

    Raises:
        InputError: if there is no such model or file, the file is damaged or does not fit, or there are no weights.
        OSError: if the weights are on the Hub and cannot be fetched.
    """
    published = name_or_file.startswith((HUB, FOLDER))
    if not published and (Path(name_or_file).suffix in SUFFIXES or Path(name_or_file).is_file()):
        return load_model(name_or_file, arch)
    if arch:
        raise InputError(
            f"--arch {arch} is for a checkpoint that does not say which model it is, not for {name_or_file}"
        )
    if published:
        return load_hub(name_or_file)
    try:
        check_name(name_or_file)
    except InputError as error:
        raise InputError(_no_model(name_or_file, str(error))) from None
    model = name_or_file.partition(".")[0]
    pretrained = any(need_weights or weights.path(f"{model}.{tag}").is_file() for tag in tags(model))
    if need_weights and not pretrained:
        bundled = ", ".join(name for name in models(pretrained=True) if weights.path(name).is_file())
        raise InputError(
            f"{name_or_file} has no weights: give a checkpoint that you trained, or a model that has some: {bundled}, "
            "and what else sdzoo list --pretrained shows"
        )
    try:
        return timm.create_model(name_or_file, pretrained=pretrained).eval()
    except OSError as error:
        said = " ".join(str(error).split())
        raise OSError(f"the weights of {name_or_file} cannot be fetched from the Hub: {said}") from None


def _no_model(name: str, unknown: str) -> str:
    if not name or not Path(name).is_dir():
        return f'there is no file or folder "{name}", and {unknown}'
    if (Path(name) / CARD).is_file():
        return f"{name} is an exported folder; name the model or the checkpoint that it came from"
    return f"{name} is a folder; name a model or a checkpoint"
