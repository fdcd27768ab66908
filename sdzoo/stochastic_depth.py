"""Stochastic depth for networks made of known residual blocks: gates in, gates out.

What every family of sdzoo and :func:`add_stochastic_depth` share: which blocks there are, and how they get their gates.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from sdzoo.branch_ends import class_name
from sdzoo.errors import InputError
from sdzoo.gate import Gate
from sdzoo.residual import ResidualBlock, residual_blocks
from sdzoo.schedule import DEFAULT_FINAL_SURVIVAL_PROB, is_probability, resolve_survival_probs
from sdzoo.timm_blocks import GATED, STOCK, become_gated, become_stock, drop_timms_drop_path, is_residual

Model = TypeVar("Model", bound=nn.Module)

KNOWN = ", ".join(map(class_name, GATED))


def add_gates(
    model: nn.Module,
    drop_path_rate: float | None = None,
    schedule: str | Sequence[float] | None = None,
    survival_probs: Sequence[float] | None = None,
    mode: str = "batch",
) -> None:
    """Give every residual block of ``model`` its gates, in place; the weights stay, so they are trained with gates.

    Args:
        model: A network of sdzoo's or timm's residual blocks without gates.
        drop_path_rate: timm's word for 1 - p_L.
        schedule: As in :func:`sdzoo.schedule.resolve_survival_probs`.
        survival_probs: p_l of every block, input to output.
        mode: ``"batch"`` or ``"sample"``.

    Raises:
        InputError: if the settings contradict each other or leave (0, 1], or a block cannot have gates.
    """
    blocks = _blocks_without_gates(model)
    _check_scalable(model, blocks)
    stages = [len(list(stage)) for _, stage in groupby(name.rpartition(".")[0] for name, _ in blocks)]
    probs, explicit = resolve_survival_probs(len(blocks), drop_path_rate, schedule, survival_probs, stages)
    for (_, block), p in zip(blocks, probs, strict=True):
        device = next(block.parameters()).device
        if isinstance(block, ResidualBlock):
            for name in block.gate_names:
                setattr(block, name, Gate(p, mode, explicit, device))
        else:
            become_gated(block, survival_prob=p, mode=mode, explicit=explicit, device=device)
    refuse_lost_gates(model)


def refuse_lost_gates(model: nn.Module) -> None:
    """Make ``model`` refuse weights in which some blocks have survival probabilities and others lost theirs."""
    model.register_load_state_dict_pre_hook(_check_no_gate_is_lost)


def add_stochastic_depth(
    model: Model,
    final_survival_prob: float = DEFAULT_FINAL_SURVIVAL_PROB,
    schedule: str | Sequence[float] = "linear",
    mode: str = "batch",
) -> Model:
    """Return a new model of the same class whose residual branches are skipped in training; ``model`` is left alone.

    In evaluation it computes what ``model`` does: each branch is weighted by p and its weights are divided by p. The
    model's own ``DropPath`` is replaced. The two branches of a transformer block share p and draw independently. What
    has no ``drop_path`` of timm's is not taken for a residual block, and stays as it is.

    Args:
        model: A timm model made of known residual blocks: those of ResNet (ResNeXt, SE, ECA), ResNetV2, RegNet,
            ConvNeXt, and the vision transformers that use timm's ``Block`` or ``ResPostBlock`` (DeiT).
        final_survival_prob: p_L, in (0, 1].
        schedule: ``"linear"``, ``"uniform"``, ``"constant_depth"``, or p_l of every block, input to output.
        mode: ``"batch"`` skips whole branches per mini-batch; ``"sample"`` masks per sample.

    Raises:
        InputError: if the model has gates already, has residual blocks of unknown classes or branches that cannot be
            scaled exactly, each named by its class; or the schedule is wrong.
    """
    if hasattr(model, "_orig_mod"):
        raise InputError("the model is compiled: add stochastic depth to the one that was, then compile the result")
    if not isinstance(model, nn.Module):
        raise InputError(f"{model!r:.80} is not a model: create it first, with timm.create_model")
    if schedule is None or (isinstance(schedule, str) and schedule == "stagewise"):
        raise InputError(f"schedule is {schedule}; it must be linear, uniform, constant_depth, or p_l of every block")
    if not is_probability(final_survival_prob):
        raise InputError(f"final_survival_prob is {final_survival_prob!r}; it must lie in (0, 1]")
    drop_path_rate = None
    if isinstance(schedule, str) and schedule != "constant_depth":
        drop_path_rate = 1 - float(final_survival_prob)
    elif final_survival_prob != DEFAULT_FINAL_SURVIVAL_PROB:
        raise InputError(f"final_survival_prob is {final_survival_prob}, but the schedule already says every p_l")
    _check_scalable(model, _blocks_without_gates(model))  # before the copy, which some of what it refuses cannot be
    gated = copy.deepcopy(model)
    add_gates(gated, drop_path_rate, schedule, mode=mode)
    for module in gated.modules():
        if type(module) in GATED:
            drop_timms_drop_path(module)  # of a block without shortcut: it has nothing to drop
    for _, block in residual_blocks(gated):
        for name in block.gate_names:
            gate: Gate = getattr(block, name)
            block.scale_branch_(1 / gate.p, name)
            gate.explicit = True
    return gated


def remove_gates(model: nn.Module) -> None:
    """Make timm's blocks of ``model`` stock again, in place, p in the weights of their branches.

    Raises:
        InputError: if a part of it is in training mode, or a block is sdzoo's own.
    """
    for name, block in residual_blocks(model):
        if type(block) not in STOCK:
            raise InputError(f"{name} is sdzoo's own {type(block).__name__}: timm has no such block")
    for _, block in residual_blocks(model):
        block.absorb_gates_()
        become_stock(block)
    for key, hook in list(model._load_state_dict_pre_hooks.items()):
        if getattr(hook, "hook", None) is _check_no_gate_is_lost:
            del model._load_state_dict_pre_hooks[key]


def _blocks_without_gates(model: nn.Module) -> list[tuple[str, nn.Module]]:
    if any(isinstance(module, Gate) for module in model.modules()):
        raise InputError(
            f"{type(model).__name__} has gates already: change them with sdzoo.set_survival(model, probs), which keeps"
            " its evaluation function"
        )
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, ResidualBlock) or (type(module) in GATED and is_residual(module))
    ]
    unknown = sorted({_owner(model, name) for name, module in model.named_modules() if _is_unknown_residual(module)})
    folded = [name for name, module in found if type(module) in STOCK or _is_folded(module)]
    if folded:
        raise InputError(f"{type(model).__name__} is folded ({folded[0]}): add stochastic depth, then fold")
    if unknown or not found:
        parts = sorted({class_name(type(m)) for m in model.modules() if not type(m).__module__.startswith("torch.")})
        made_of = f", being made of {', '.join(parts[:8])}" if parts else ""
        what = f"residual blocks of unknown class: {', '.join(unknown)}" if unknown else f"no residual block{made_of}"
        raise InputError(f"{type(model).__name__} has {what}; known are {KNOWN}")
    return found


def _is_unknown_residual(module: nn.Module) -> bool:
    # timm's residual blocks, and nothing else, have a drop_path, if only as None or Identity.
    if isinstance(module, ResidualBlock) or type(module) in GATED:
        return False
    members = {**vars(module), **module._modules}
    return any(name.startswith("drop_path") and _is_module_or_none(value) for name, value in members.items())


def _is_folded(block: nn.Module) -> bool:
    return isinstance(block, ResidualBlock) and isinstance(getattr(block, "bn2", None), nn.Identity)


def _owner(model: nn.Module, name: str) -> str:
    while type(model.get_submodule(name)).__module__.startswith("torch.nn.") and name:
        name = name.rpartition(".")[0]
    return class_name(type(model.get_submodule(name)))


def _is_module_or_none(value: Any) -> bool:
    return value is None or isinstance(value, nn.Module)


def _check_scalable(model: nn.Module, blocks: Sequence[tuple[str, nn.Module]]) -> None:
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    uses = Counter(_memory(tensor) for _, tensor in tensors)
    for name, block in blocks:
        probe = copy.copy(block)
        probe.__class__ = GATED.get(type(block), type(block))
        assert isinstance(probe, ResidualBlock)
        for path in (path for gate in probe.gate_names for path in probe.branch_scale(gate)):
            owner, tensor_name = block.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]
            tensor = {**owner._parameters, **owner._buffers}.get(tensor_name)
            plain = tensor is not None and not is_parametrized(owner)
            if tensor is None or not plain or uses[_memory(tensor)] > 1:
                fault = "shared" if plain else "parametrised"
                raise InputError(f"{class_name(type(block))}: {path} of {name} is {fault}, so that it cannot be scaled")


def _memory(tensor: Tensor) -> int:
    return id(tensor) if tensor.is_meta else tensor.data_ptr()


def _check_no_gate_is_lost(
    model: nn.Module, state_dict: dict[str, Any], prefix: str, _metadata: Any, _strict: bool, *args: Any
) -> None:
    """Refuse weights in which some blocks have survival probabilities and others lost theirs.

    Weights without any count as p = 1.
    """
    gates = [
        (f"{prefix}{name}.", f"{prefix}{name}.{gate}.survival_prob")
        for name, block in residual_blocks(model)
        for gate in block.gate_names
    ]
    held = [(block, key) for block, key in gates if any(name.startswith(block) for name in state_dict)]
    lacking = [key for _, key in held if key not in state_dict]
    if lacking and len(lacking) < len(held):
        args[-1].append(f"survival probabilities are missing for {', '.join(lacking)} and there for the others")
