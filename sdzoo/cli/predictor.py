"""What a command computes with: a model by name, a checkpoint, or an exported file or folder."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from sdzoo.cli.parser import positive
from sdzoo.errors import InputError

if TYPE_CHECKING:
    from torch import nn

    from sdzoo.deploy.predictor import Predictor

BUNDLED = "sd_resnet20.cifar10_jpeg"


def model_options(added: argparse.ArgumentParser, runs: bool) -> None:
    """Add what says how a model is opened and, if it ``runs``, where."""
    added.add_argument("--arch", help="name of the model in a checkpoint that does not say")
    if runs:
        added.add_argument(
            "--provider", default="auto", help="auto (a GPU if it can), cpu or cuda; for ONNX also tensorrt"
        )
        added.add_argument("--threads", type=positive, metavar="N", help="within one operator (default: the runtime's)")


def is_exported(name: str) -> bool:
    """Return whether ``name`` is an exported file or folder."""
    return name.endswith((".onnx", ".engine")) or Path(name).is_dir()


def open_predictor(arguments: argparse.Namespace) -> Predictor:
    """Return the predictor of ``arguments.model``.

    Raises:
        InputError: as opening it does, or if the provider is none of PyTorch's for a model that it computes.
    """
    import torch

    from sdzoo.deploy.predictor import model_predictor
    from sdzoo.deploy.runtime import load_predictor
    from sdzoo.deploy.session import check_threads
    from sdzoo.zoo import open_model

    convert = getattr(arguments, "convert", False)
    if is_exported(arguments.model):
        with warnings_on_one_line():
            return load_predictor(arguments.model, arguments.provider, arguments.threads, convert)
    device = torch_device(arguments)
    if arguments.threads:
        check_threads(arguments.threads)
        torch.set_num_threads(arguments.threads)
    return model_predictor(open_model(arguments.model, arguments.arch).to(device), convert)


def torch_device(arguments: argparse.Namespace) -> str:
    """Return what ``arguments.provider`` is for a model of PyTorch.

    Raises:
        InputError: if it is none, or is not there.
    """
    import torch

    provider: str = arguments.provider
    if provider == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if provider not in ("cpu", "cuda"):
        raise InputError(f'--provider "{provider}" is for exported files; {arguments.model} runs in PyTorch: cpu, cuda')
    if provider == "cuda" and not torch.cuda.is_available():
        raise InputError(f"--provider cuda: PyTorch {torch.__version__} finds no GPU here")
    return provider


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
    """Print what is warned of to a person, once, without the line of code that it comes from."""
    said: set[str] = set()

    def show(message: Warning | str, *_: object) -> None:
        if (text := f"warning: {message}") not in said:
            print(text, file=sys.stderr, flush=True)
        said.add(text)

    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = show
        yield
