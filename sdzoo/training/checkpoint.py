"""Checkpoints: what a run writes, and the only way weights from a file become a model.

Two kinds: ``*.safetensors`` holds weights and says in its header which model they are; ``*.pth`` also holds what a run
needs to go on. Neither is ever unpickled into anything but tensors and plain values.
"""

from __future__ import annotations

import io
import json
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from sdzoo.description import ARCHITECTURE, check_description
from sdzoo.digest import state_sha256
from sdzoo.errors import InputError, shown
from sdzoo.files import atomic_path
from sdzoo.gate import gates
from sdzoo.images import input_config
from sdzoo.registry import check_name

FORMAT = "sdzoo-1"


def describe(model: nn.Module, labels: tuple[str, ...]) -> dict[str, Any]:
    """Return what is needed, beside the state dict, to build ``model`` again and to feed it pictures."""
    config = input_config(model)
    created_with: dict[str, Any] = getattr(model, "_model_args", {})  # timm's record
    return {
        "format": FORMAT,
        "arch": model.pretrained_cfg["architecture"],  # type: ignore[index]
        "num_classes": model.num_classes,
        "in_chans": model.in_chans,
        "labels": list(labels),
        "mode": gates(model)[0].mode,
        "model_kwargs": {name: created_with[name] for name in ARCHITECTURE if name in created_with},
        **{name: config[name] for name in ("input_size", "mean", "std", "interpolation", "crop_pct")},
    }


def save_weights(path: Path, model: nn.Module, description: dict[str, Any]) -> None:
    """Write a safetensors file of ``model``, whole or not at all."""
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    description = description | {"state_sha256": state_sha256(state)}
    content = safetensors.torch.save(state, metadata={"sdzoo": json.dumps(description)})
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def save_run(path: Path, state: dict[str, Any]) -> None:
    """Write a resumable checkpoint, whole or not at all.

    timm's tools read it by their own keys: ``state_dict``, ``state_dict_ema``, ``optimizer``, ``epoch``, ``metric``.
    """
    content = io.BytesIO()  # written to a file, torch reports a full disk as an internal error
    torch.save(state, content)
    with atomic_path(path) as temporary:
        temporary.write_bytes(content.getbuffer())


def read_checkpoint(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the state dict in a checkpoint, and everything else it says (for safetensors: its description).

    Raises:
        InputError: if the file is missing, damaged, of another kind, or a pickle that would run code.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path} does not exist")
    if path.suffix == ".onnx":
        raise InputError(f"{path} is an ONNX file; name the model or the checkpoint that it came from")
    return _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickled(path, path)


def read_run(content: bytes, path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return what :func:`read_checkpoint` returns for the ``content`` of a file, called ``path`` in messages.

    Raises:
        InputError: as :func:`read_checkpoint`.
    """
    return _read_pickled(io.BytesIO(content), path)


def _read_pickled(file: Path | io.BytesIO, path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        if zipfile.is_zipfile(file) and (damaged := zipfile.ZipFile(file).testzip()):
            raise ValueError(f"{damaged} is damaged")
        if isinstance(file, io.BytesIO):
            file.seek(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch thinks of a stranger's pickle is said below
            content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        why = "damaged or holds more than tensors and plain values"
        raise InputError(f"{path} is {why}; it is not loaded, none of it ran") from None
    except Exception as error:  # a damaged pickle raises whatever its bytes happen to ask for
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path} is not a whole checkpoint: {reason}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}, not a checkpoint")
    state = content.pop("state_dict", content)
    for weights in (state, content.get("state_dict_ema", state)):
        named = isinstance(weights, dict) and all(isinstance(name, str) for name in weights)
        if not named or not weights or not all(isinstance(value, Tensor) for value in weights.values()):
            raise InputError(f"{path} holds no state dict")
    return state, content if content is not state else {}


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {}).get("sdzoo", "{}"))
        if not isinstance(header, dict):
            raise ValueError("its description is not a mapping")
        state = safetensors.torch.load_file(path)
    except (SafetensorError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is not a whole safetensors file: {shown(error, 200)}") from None
    expected, got = header.get("state_sha256"), state_sha256(state)
    if expected not in (None, got):
        raise InputError(f"{path} is damaged: sha256 of the weights {got}, its description says {shown(expected)}")
    return state, header


def load_model(path: str | Path, arch: str | None = None) -> nn.Module:
    """Return the model in a checkpoint, in evaluation mode: its moving average where there is one, as timm does.

    Args:
        path: A checkpoint that sdzoo wrote, or another one with ``arch``.
        arch: The model's name in timm, for files that do not say.

    Raises:
        InputError: as :func:`read_checkpoint`; or if the weights do not fit, with missing and unexpected keys.
    """
    state, description = read_checkpoint(path)
    state = description.get("state_dict_ema", state)
    arch = arch or description.get("arch")
    if not arch:
        raise InputError(f"{path} does not say which model it is; name it with --arch")
    model = described_model(description | {"arch": str(arch)}, str(path))
    load_state(model, state, str(path))
    return model.eval()


def described_model(description: Mapping[str, Any], source: str) -> nn.Module:
    """Return the model that a description is of, without its weights.

    Args:
        description: As :func:`describe` returns it; a stranger may have written it.
        source: What an error names.

    Raises:
        InputError: if it is not of a model of sdzoo.
    """
    try:
        check_name(description["arch"])
        check_description(description)
    except InputError as error:
        raise InputError(f"{source}: {error}") from None
    named = ("mean", "std", "interpolation", "crop_pct", "license")
    overlay: dict[str, Any] = {name: description[name] for name in named if name in description}
    overlay |= {"input_size": tuple(description["input_size"])} if "input_size" in description else {}
    overlay |= {"label_names": tuple(description["labels"]), "tag": ""} if "labels" in description else {}
    given = {name: description[name] for name in ("num_classes", "in_chans", "mode") if name in description}
    try:
        given |= description.get("model_kwargs", {})
        return timm.create_model(description["arch"], pretrained_cfg_overlay=overlay, **given)
    except Exception as error:  # whatever a network makes of arguments that are not its own
        raise InputError(f"{source} describes its model wrongly: {str(error).splitlines()[0]}") from None


def load_state(model: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Load a whole state dict into ``model``.

    Raises:
        InputError: listing missing, unexpected and misshapen tensors; the model is not usable then.
    """
    check_shapes(model, {name: tuple(tensor.shape) for name, tensor in state.items()}, source)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise InputError(f"{source}: {' '.join(str(error).split())}") from None


def check_shapes(model: nn.Module, shapes: Mapping[str, tuple[int, ...]], source: str) -> None:
    """Check that tensors of these ``shapes``, by name, are a whole state dict of ``model``, which may lie on ``meta``.

    Raises:
        InputError: listing missing, unexpected and misshapen tensors.
    """
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    missing = sorted(own.keys() - shapes.keys())
    unexpected = sorted(shapes.keys() - own.keys())
    differing = [name for name in sorted(own.keys() & shapes.keys()) if own[name] != shapes[name]]
    misshapen = [f"{name} {shapes[name]} for {own[name]}" for name in differing]
    # Weights of a constant-depth network hold no survival probability at all: the loading rule knows what to do.
    if not any(name.endswith("survival_prob") for name in shapes):
        missing = [name for name in missing if not name.endswith("survival_prob")]
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": misshapen}
    if faults := [f"{kind}: {_some(names)}" for kind, names in kinds.items() if names]:
        raise InputError(f"{source} does not fit {type(model).__name__}: {'; '.join(faults)}")


def _some(names: list[str], limit: int = 6) -> str:
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest
