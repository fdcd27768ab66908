"""What a command computes with: a model by name, a checkpoint, or an exported file or folder."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from sdzoo.errors import InputError

if TYPE_CHECKING:
    from torch import nn

    from sdzoo.deploy.predictor import Predictor

BUNDLED = "sd_resnet20.cifar10_jpeg"


def model_options(added: argparse.ArgumentParser, runs: bool) -> None:
    """Add what says how a model is opened and, if it ``runs``, where."""
    added.add_argument("--arch", help="name of the model in a checkpoint that does not say")
    if runs:
        added.add_argument("--provider", default="auto", help="for ONNX: auto, cpu, cuda or tensorrt")


def is_exported(name: str) -> bool:
    """Return whether ``name`` is an exported file or folder."""
    return name.endswith((".onnx", ".engine")) or Path(name).is_dir()


def open_predictor(arguments: argparse.Namespace) -> Predictor:
    """Return the predictor of ``arguments.model``.

    Raises:
        InputError: as opening it does, or if a provider was named for a model of PyTorch.
    """
    from sdzoo.deploy.predictor import model_predictor
    from sdzoo.deploy.runtime import load_predictor
    from sdzoo.zoo import open_model

    convert = getattr(arguments, "convert", False)
    if is_exported(arguments.model):
        with warnings_on_one_line():
            return load_predictor(arguments.model, arguments.provider, convert=convert)
    if arguments.provider not in ("auto", "cpu"):
        raise InputError(f"--provider is for exported files; {arguments.model} runs in PyTorch")
    return model_predictor(open_model(arguments.model, arguments.arch), convert)


def open_operand(name: str, arch: str | None) -> nn.Module | str:
    """Return one side of a comparison: a model by name, checkpoint or ``folded:`` either; an exported path as it is.

    Raises:
        InputError: as opening it does.
    """
    from sdzoo.fold import fold
    from sdzoo.zoo import open_model

    if is_exported(name):
        return name
    prefix, folded, source = name.rpartition("folded:")
    return fold(open_model(source, arch)) if folded and not prefix else open_model(name, arch)


@contextmanager
def warnings_on_one_line() -> Iterator[None]:
    """Print what is warned of to a person, without the line of code that it comes from."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always", UserWarning)
        try:
            yield
        finally:
            for warning in seen:
                print(f"warning: {warning.message}", file=sys.stderr)
