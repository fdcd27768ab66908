"""Residual blocks with gates: which branches are computed, how they are rescaled, and the rule for loading weights.

A block here is whatever adds branches to a shortcut; what its branches are, and by which of its parameters they scale,
is said by its subclasses (sdzoo/blocks.py, sdzoo/timm_blocks.py).
"""

import inspect
import zlib
from collections.abc import Iterator
from operator import attrgetter
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, fx, nn

from sdzoo.branch_ends import Scale
from sdzoo.errors import InputError
from sdzoo.fold import check_evaluation, fold_batchnorms
from sdzoo.gate import Gate, OpenGate, float32, gates, with_zero_gradients

RECOMPILE_LIMIT = 128  # shapes of blocks, times training, evaluation and dtypes


class ResidualBlock(nn.Module):
    """A block whose gates decide in training which of its branches are computed, and weight them by p in evaluation."""

    #: The gates of the branches, in the order in which they are computed.
    gate_names: ClassVar[tuple[str, ...]] = ("gate",)
    #: What :meth:`compile` compiles: all but the gates, which draw in Python.
    compiled_methods: ClassVar[tuple[str, ...]] = ()

    _ranks_compared = False

    def branch_scale(self, gate: str = "gate") -> Scale:
        """Return the power of c by which each tensor is multiplied so that the branch of ``gate`` is multiplied by c.

        Raises:
            InputError: naming the class, if there is no such place in the branch.
        """
        raise TypeError("a residual block must say by which parameters its branch scales")

    def branch_parameters(self, gate: str = "gate") -> Iterator[nn.Parameter]:
        """Yield the parameters that nothing uses when the branch of ``gate`` is skipped."""
        raise TypeError("a residual block must say what its branch is made of")

    @torch.no_grad()
    def scale_branch_(self, c: float, gate: str = "gate") -> None:
        """Multiply the output of the branch of ``gate`` by ``c``, in place, exactly.

        Raises:
            InputError: if a weight would overflow; nothing has changed then.
        """
        for tensor, value in self.scaled_branch(c, gate):
            tensor.copy_(value)

    def scaled_branch(self, c: float, gate: str = "gate") -> list[tuple[Tensor, Tensor]]:
        """Return the tensors by which the branch of ``gate`` scales, each with its value for ``c`` times the output.

        Raises:
            InputError: if one would overflow.
        """
        scaled: list[tuple[Tensor, Tensor]] = []
        for name, power in self.branch_scale(gate).items():
            tensor = attrgetter(name)(self).detach()
            scaled.append((tensor, _times(tensor, c**power, tensor.dtype)))
            if _overflows(*scaled[-1]):
                raise InputError(f"{name} overflows {tensor.dtype} when it is multiplied by {c:.3g}")
        return scaled

    def set_survival_prob(self, p: float, gate: str = "gate") -> None:
        """Set the survival probability and rescale the branch, so that the evaluation function stays as it is."""
        own: Gate = getattr(self, gate)
        p_old, p_new = own.read(), float32(p)
        if p_new != p_old:
            self.scale_branch_(p_old / p_new, gate)
        own.set(p)
        own.draw_prob = None
        own.explicit = True

    def absorb_gates_(self) -> None:
        """Weight the branches by p for good, in place, and leave no gate.

        Raises:
            InputError: if a part of the block is in training mode; nothing has changed then.
        """
        check_evaluation(self)
        for name in self.gate_names:
            if isinstance(gate := getattr(self, name), Gate):
                self.scale_branch_(gate.read(), name)
                setattr(self, name, OpenGate().eval())

    def fuse(self) -> "ResidualBlock":
        """Fold p and the BatchNorms into the convolutions, in place; return the block (timm's hook)."""
        self.absorb_gates_()
        fold_batchnorms(self)
        return self

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the branches, with the arguments of :func:`torch.compile`; the gates go on drawing outside."""
        # All blocks of a class share its code, and with it torch's limit, beyond which it stops compiling in silence.
        if "recompile_limit" in inspect.signature(torch.compile).parameters:
            kwargs = {"recompile_limit": RECOMPILE_LIMIT, **kwargs}
        else:  # older versions have one limit for all
            config: Any = torch._dynamo.config
            config.cache_size_limit = max(config.cache_size_limit, RECOMPILE_LIMIT)
        for name in self.compiled_methods:
            self.__dict__.pop(name, None)
            self.__dict__[name] = torch.compile(getattr(self, name), *args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        # What was compiled belongs to this block's tensors: a copy that took it along would compute with them.
        return {name: value for name, value in super().__getstate__().items() if name not in self.compiled_methods}

    @torch.jit.unused
    def skips(self, x: Tensor, gate: str) -> bool:
        """Return whether the branch of ``gate`` is left out of this training step.

        Raises:
            InputError: if this is a trace, which would freeze this draw; or ranks that have to draw
                alike do not.
        """
        if isinstance(x, fx.Proxy) or torch.jit.is_tracing():
            raise InputError(
                "a trace would freeze this draw of the gate: trace in evaluation, or with timm's"
                " create_feature_extractor, to which a block is one node"
            )
        own: Gate | OpenGate = getattr(self, gate)
        closed = own.closed()
        if not self._ranks_compared and isinstance(own, Gate) and own.mode == "batch":
            self._compare_ranks(own)
        return closed

    def _compare_ranks(self, gate: Gate) -> None:
        """Check that all ranks draw alike if they have to: SyncBatchNorm would wait for a rank that skips."""
        self._ranks_compared = True
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return
        if not any(isinstance(module, nn.SyncBatchNorm) for module in self.modules()):
            return
        source = 0 if gate.planned is not None or gate.p >= 1 else zlib.crc32(torch.get_rng_state().numpy().tobytes())
        draws: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(draws, (gate.last_draw, source))
        if len(set(draws)) > 1:
            raise InputError(
                "SyncBatchNorm needs gates shared by all ranks, and these ranks draw their own: seed torch alike on all"
                " ranks, or set the draws with sdzoo.fixed_gates"
            )

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Keep the evaluation function that the weights had, whatever this block's survival probabilities.

        Weights without a survival probability count as p = 1. A gate whose p was asked for explicitly keeps it, else it
        takes the weights' own; wherever the two differ, the weights are rescaled by p_old / p_new as they pass.
        """
        block = prefix[:-1] or "the block"
        held = [name for name in state_dict if name.startswith(prefix)]
        gated = [name for name in self.gate_names if isinstance(getattr(self, name), Gate)]
        if held and not gated and any(name[len(prefix) :] not in self.state_dict() for name in held):
            error_msgs.append(f"{block} is folded; these weights are not: load them into the model, then fold it")
        elif held and gated:
            scales = {gate: self.branch_scale(gate) for gate in gated}
            lacking = [name for scale in scales.values() for name in scale if prefix + name not in state_dict]
            if lacking:
                error_msgs.append(
                    f"{block}: the weights hold {len(held)} of its tensors but not {', '.join(lacking)}, so its"
                    " evaluation function cannot be kept: load the whole block or nothing of it"
                )
                for gate in gated:
                    state_dict.pop(f"{prefix}{gate}.survival_prob", None)
            else:
                assign = local_metadata.get("assign_to_params_buffers", False)
                for gate, scale in scales.items():
                    error_msgs.extend(self._rescale(state_dict, prefix, gate, scale, assign))
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _rescale(self, state_dict: dict[str, Any], prefix: str, gate: str, scale: Scale, assign: bool) -> list[str]:
        """Rescale what passes, in ``state_dict``, and return what is wrong with it."""
        own, key = getattr(self, gate), f"{prefix}{gate}.survival_prob"
        stored = state_dict.get(key, torch.ones(()))
        valid = stored.numel() == 1 and 0 < float(stored) <= 1  # else the gate reports it
        if not valid or not (key not in state_dict or own.explicit):
            return []
        # Equal after rounding to the stored dtype is equal: a half-precision file holds p with three digits.
        p = own.read()
        same = float(torch.tensor(p, dtype=stored.dtype)) == float(stored)
        ratio = 1.0 if same else float(stored) / p
        faults = []
        for name, power in scale.items():
            weight = state_dict[prefix + name]
            dtype = weight.dtype if assign else torch.promote_types(weight.dtype, attrgetter(name)(self).dtype)
            scaled = _times(weight, ratio**power, dtype) if ratio != 1 else weight
            if _overflows(weight, scaled):
                faults.append(f"{prefix}{name} overflows {dtype} when it is multiplied by {ratio:.3g}")
            state_dict[prefix + name] = scaled
        state_dict[key] = torch.tensor(p, device=state_dict[prefix + next(iter(scale))].device)
        return faults


def _times(weight: Tensor, factor: float, dtype: torch.dtype) -> Tensor:
    widest = torch.float32 if weight.device.type == "mps" else torch.float64
    return (weight.to(widest) * factor).to(dtype)


def _overflows(weight: Tensor, scaled: Tensor) -> bool:
    return not weight.is_meta and bool((weight.isfinite() & ~scaled.isfinite()).any())


class OneBranchBlock(ResidualBlock):
    """``out = act(shortcut(x) + b * branch(x))`` in training, ``act(shortcut(x) + p * branch(x))`` in evaluation.

    A subclass has ``gate`` and defines ``branch``, ``shortcut`` and ``act``. Where the shortcut is the identity, the
    input must be the output of that activation: a skipped block with a ReLU then is the identity.
    """

    compiled_methods: ClassVar[tuple[str, ...]] = ("computed",)
    #: Modules of the shortcut, which run whether the branch does or not.
    shortcut_names: ClassVar[tuple[str, ...]] = ("shortcut", "downsample")
    #: The activation after the sum, by name; None where there is none.
    act_name: ClassVar[str | None] = "act"

    if TYPE_CHECKING:  # at run time TorchScript would trip over the annotations
        gate: Gate | OpenGate
        shortcut: Any
        downsample: Any
        act: Any

    def branch(self, x: Tensor) -> Tensor:
        """Return the residual branch of ``x``, unweighted."""
        raise TypeError("a residual block must define its branch")

    def entry(self, x: Tensor) -> Tensor:
        """Return what both the branch and the shortcut are computed from."""
        return x

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output ``(B, C', H', W')`` for ``x`` ``(B, C, H, W)``."""
        if self.gate.training and self.skips(x, "gate"):
            return self.skipped(x)
        return self.computed(x)

    def computed(self, x: Tensor) -> Tensor:
        """Return the output with the branch, weighted by the gate."""
        x = self.entry(x)
        return self.act(self.shortcut(x) + self.gate(self.branch(x)))

    @torch.jit.unused
    def skipped(self, x: Tensor) -> Tensor:
        """Return the output without the branch, whose parameters get a zero gradient."""
        x = with_zero_gradients(x, self.branch_parameters())
        if not self.has_identity_shortcut():
            shortcut = self.shortcut(self.entry(x))
            return self.act(shortcut.clone() if shortcut.data_ptr() == x.data_ptr() else shortcut)
        # An in-place activation would overwrite the output of the block before. The ReLU of a ReLU is nothing to do.
        if self.act_name is None or isinstance(self.get_submodule(self.act_name), (nn.ReLU, nn.Identity)):
            return x
        return self.act(x.clone())

    def branch_parameters(self, gate: str = "gate") -> Iterator[nn.Parameter]:
        """Yield the parameters that nothing uses when the branch is skipped."""
        yield from self.parameters(recurse=False)
        for name, child in self.named_children():
            if name not in self.shortcut_names:
                yield from child.parameters()

    def has_identity_shortcut(self) -> bool:
        """Return whether the shortcut is the block's input itself."""
        modules = [self._modules.get(name) for name in self.shortcut_names]
        return all(module is None or isinstance(module, nn.Identity) for module in modules)


class TwoBranchBlock(ResidualBlock):
    """``x = x + b1 * branch1(x); x = x + b2 * branch2(x)``: a transformer's block; its branches draw independently.

    A subclass has ``gate1`` and ``gate2`` and defines ``branch1``, ``branch2`` and ``branch_names``.
    """

    gate_names: ClassVar[tuple[str, ...]] = ("gate1", "gate2")
    compiled_methods: ClassVar[tuple[str, ...]] = ("branch1", "branch2")
    #: The modules of the branch of each gate.
    branch_names: ClassVar[dict[str, tuple[str, ...]]] = {}

    if TYPE_CHECKING:
        gate1: Gate | OpenGate
        gate2: Gate | OpenGate

    def branch1(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Return the attention branch of ``x`` ``(B, N, C)``, unweighted."""
        raise TypeError("a transformer block must define its branches")

    def branch2(self, x: Tensor) -> Tensor:
        """Return the MLP branch of ``x`` ``(B, N, C)``, unweighted."""
        raise TypeError("a transformer block must define its branches")

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Return the block's output ``(B, N, C)`` for ``x`` ``(B, N, C)``."""
        if self.gate1.training and self.skips(x, "gate1"):
            x = self.skipped(x, "gate1")
        else:
            x = x + self.gate1(self.branch1(x, attn_mask, is_causal))
        if self.gate2.training and self.skips(x, "gate2"):
            return self.skipped(x, "gate2")
        return x + self.gate2(self.branch2(x))

    @torch.jit.unused
    def skipped(self, x: Tensor, gate: str) -> Tensor:
        """Return ``x``; the parameters of the branch of ``gate`` get a zero gradient."""
        return with_zero_gradients(x, self.branch_parameters(gate))

    def branch_parameters(self, gate: str = "gate1") -> Iterator[nn.Parameter]:
        """Yield the parameters of the branch of ``gate``."""
        for name in self.branch_names[gate]:
            yield from getattr(self, name).parameters()


def compile_blocks(model: nn.Module, **kwargs: Any) -> None:
    """Compile what the blocks of ``model`` compute, in place, so that dropped ones still cost nothing.

    Blocks of one shape share their compilation. Copies of the model are not compiled.

    Args:
        model: A model with gates.
        kwargs: Those of :func:`torch.compile`.

    Raises:
        InputError: if the model has no gates.
    """
    gates(model)
    for _, block in residual_blocks(model):
        block.compile(**kwargs)


def residual_blocks(model: nn.Module) -> list[tuple[str, ResidualBlock]]:
    """Return the blocks of ``model`` that have gates, with their names, input to output."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, ResidualBlock) and any(isinstance(getattr(module, g), Gate) for g in module.gate_names)
    ]
