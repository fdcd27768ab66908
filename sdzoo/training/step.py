"""One optimizer step: its gates, its micro-batches, its gradients.

All that is random in it follows from the seed and the number of the step, alike on every process but for dropout.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import convert_sync_batchnorm
from timm.task import ClassificationTask
from timm.utils import dispatch_clip_grad, distribute_bn
from torch import Tensor, nn

from sdzoo.errors import InputError
from sdzoo.gate import fixed_gates, gates, set_draw_probs
from sdzoo.residual import compile_blocks
from sdzoo.schedule import warm_up
from sdzoo.training.checkpoint import load_state
from sdzoo.training.data.mixing import Mixing
from sdzoo.training.distributed import Processes, lost_processes_named
from sdzoo.training.model import enter_training
from sdzoo.training.optimisation import (
    create_optimizer,
    create_scaler,
    create_scheduler,
    criterion_settings,
    restore_optimizer,
)
from sdzoo.training.recipe import Recipe
from sdzoo.training.streams import stream, stream_seed

BATCHNORM = ("running_mean", "running_var", "num_batches_tracked")
SKIPPED_IN_A_ROW = 100  # the loss scale halves each time: by then it is 2**-84 and no step will ever be taken again


class Diverged(RuntimeError):
    """The loss is no longer a finite number."""


@dataclass(frozen=True)
class Step:
    """What one optimizer step was.

    Mean loss over the global batch, blocks computed, learning rate, the mean magnitude of the first convolution's
    gradient; and whether some process was asked to stop.
    """

    loss: float
    live_blocks: int
    lr: float
    first_conv_gradient: float
    stop: bool = False


class _Statistics:
    """BatchNorm's running statistics, put back where a step is skipped: its forward may have made them NaN."""

    def __init__(self, model: nn.Module) -> None:
        found = [buffer for name, buffer in model.named_buffers() if name.rsplit(".")[-1] in BATCHNORM]
        floats, counters = (
            [buffer for buffer in found if buffer.is_floating_point() == floating] for floating in (True, False)
        )
        self.now = [group for group in (floats, counters) if group]
        self.kept = [[torch.empty_like(buffer) for buffer in group] for group in self.now]

    def keep(self) -> None:
        self._copy(self.now, self.kept)

    def put_back(self) -> None:
        self._copy(self.kept, self.now)

    @torch.no_grad()
    def _copy(self, source: list[list[Tensor]], target: list[list[Tensor]]) -> None:
        for there, here in zip(target, source, strict=True):
            torch._foreach_copy_(there, here)  # a kernel or two, not hundreds


class Trainer:
    """A model with all that changes it: optimizer, learning rate, EMA, loss scale."""

    def __init__(self, recipe: Recipe, model: nn.Module, steps: int, team: Processes) -> None:
        """Take ``model`` to the device and prepare it; ``steps`` is the number of optimizer steps an epoch."""
        if recipe.sync_bn and team.device.type == "cpu":
            raise InputError("sync_bn needs a GPU: SyncBatchNorm does not train on the CPU")
        self.recipe, self.team, self.steps = recipe, team, steps
        layout = torch.channels_last if recipe.channels_last else torch.contiguous_format
        if recipe.sync_bn and team.many:
            model = convert_sync_batchnorm(model)
        self.model = model.to(device=team.device, memory_format=layout)  # type: ignore[call-overload]
        self.gates = gates(model)
        self.probs = [gate.p for gate in self.gates]
        self.draw_probs = self.probs
        self.first_conv = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
        self.mixing = Mixing(recipe, model.num_classes) if recipe.mixes else None  # type: ignore[arg-type]
        if recipe.grad_checkpointing:
            model.set_grad_checkpointing()  # type: ignore[operator]
        self.optimizer = create_optimizer(recipe, model)
        self.scheduler, self.epochs = create_scheduler(recipe, self.optimizer, steps)
        self.scaler = create_scaler(recipe, team.device)
        self.statistics = _Statistics(model) if self.scaler.is_enabled() else None
        self.skipped_in_a_row = 0
        self.task = ClassificationTask(
            self.model,
            criterion_kwargs=criterion_settings(recipe, soft_targets=self.mixing is not None),
            device=team.device,
            verbose=False,
        )
        self.ema: nn.Module | None = None
        if recipe.model_ema:
            self.ema = self.task.setup_ema(recipe.model_ema_decay, recipe.model_ema_warmup).get_submodule("module")
        if recipe.torchcompile:
            compile_blocks(self.model, backend=recipe.torchcompile)
        if team.many:
            with lost_processes_named(team.shard):
                cards = [team.device] if team.device.type == "cuda" else None
                # DDP starts every forward from the first process's statistics: what that one saves is all there is.
                self.task.prepare_distributed(device_ids=cards)

    @property
    def kept(self) -> nn.Module:
        """The model that is validated and kept: the moving average where there is one."""
        return self.ema or self.model

    def enter_epoch(self) -> None:
        """Put the model into training, or what of it is trained."""
        enter_training(self.model, self.recipe)
        self.drawing = [gate.training for gate in self.gates]

    def leave_epoch(self) -> None:
        """Make the processes' models one: since the last forward, BatchNorm statistics are each process's own."""
        if self.team.many:
            with lost_processes_named(self.team.shard):
                # Without dist_bn the first process's count, as they do in the next step: what is kept is validated.
                distribute_bn(self.model, self.team.shard.world, self.recipe.dist_bn == "reduce")
                if self.ema is not None:
                    distribute_bn(self.ema, self.team.shard.world, reduce=False)

    def step(self, number: int, micro_batches: Iterator[tuple[Tensor, Tensor]], stop: bool = False) -> Step:
        """Do optimizer step ``number``, counted from 0, on the next micro-batches.

        Raises:
            Diverged: if the loss is not finite, on every process; the weights are as they were.
            LostProcess: if another process is gone.
        """
        recipe, shard = self.recipe, self.team.shard
        self._set_learning_rate(number)
        self.optimizer.zero_grad()
        if self.statistics is not None:
            self.statistics.keep()
        loss = 0.0
        with self._gates(number) as live_blocks, lost_processes_named(shard):
            for micro in range(recipe.grad_accum_steps):
                images, labels = next(micro_batches)
                if recipe.channels_last:
                    images = images.contiguous(memory_format=torch.channels_last)
                if self.mixing:
                    images, labels = self.mixing(images, labels, number, number // self.steps)
                torch.manual_seed(stream_seed(recipe.seed, "dropout", number, shard.rank, micro))
                last = micro == recipe.grad_accum_steps - 1
                with nullcontext() if last else self.task.no_sync():
                    with self._autocast():
                        part = self.task(images, labels)["loss"] / recipe.grad_accum_steps
                    self.scaler.scale(part).backward()
                loss += part.item()
        loss, stop_asked = self.team.total(loss / shard.world, stop)
        if not math.isfinite(loss) and not self.scaler.is_enabled():
            raise Diverged(f"the loss is {loss} at step {number + 1}")
        self.scaler.unscale_(self.optimizer)
        gradient = self.first_conv.weight.grad
        magnitude = 0.0 if gradient is None else gradient.abs().mean().item()
        if recipe.clip_grad is not None:
            clipped = self.task.get_clip_parameters(exclude_head=recipe.clip_mode == "agc")
            dispatch_clip_grad(clipped, recipe.clip_grad, recipe.clip_mode)
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        skipped = self.scaler.get_scale() < scale
        if skipped and self.statistics is not None:
            self.statistics.put_back()
        self._count_skipped(skipped, loss, number)
        self.task.update_ema(step=number + 1)
        return Step(loss, live_blocks, self.optimizer.param_groups[0]["lr"], magnitude, stop_asked > 0)

    def _set_learning_rate(self, number: int) -> None:
        if self.recipe.sched_on_updates:
            self.scheduler.step_update(number)
        else:
            self.scheduler.step(number // self.steps)

    @contextmanager
    def _gates(self, number: int) -> Iterator[int]:
        """Fix the gates of step ``number`` and yield how many blocks it computes."""
        recipe = self.recipe
        if not any(self.drawing):
            yield len(self.probs)
            return
        self.draw_probs = warm_up(self.probs, number / self.steps, recipe.sdzoo.survival_warmup_epochs)
        if self.gates[0].mode == "sample":
            set_draw_probs(self.model, self.draw_probs)
            yield len(self.probs)
            return
        draws = torch.rand(len(self.probs), generator=stream(recipe.seed, "gates", number)).tolist()
        bits = [draw < p for draw, p in zip(draws, self.draw_probs, strict=True)]
        with fixed_gates(self.model, bits):
            yield sum(bits)

    def _autocast(self) -> AbstractContextManager[Any]:
        if not self.recipe.amp:
            return nullcontext()
        return torch.autocast(self.team.device.type, dtype=getattr(torch, self.recipe.amp_dtype))

    def _count_skipped(self, skipped: bool, loss: float, number: int) -> None:
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        if self.skipped_in_a_row >= SKIPPED_IN_A_ROW:
            what = "the gradient is not finite" if math.isfinite(loss) else f"the loss is {loss}"
            raise Diverged(f"{what} at step {number + 1}, the {SKIPPED_IN_A_ROW}th in a row that is skipped")

    def state(self) -> dict[str, Any]:
        """Return all that a run needs to go on, under the names that timm gives it.

        ``lr_scheduler`` and ``draw_probs`` are records: both follow from the recipe and the number of the step.
        """
        ema = {} if self.ema is None else {"state_dict_ema": self.ema.state_dict()}
        return {
            "state_dict": self.model.state_dict(),
            **ema,
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": self.scheduler.state_dict(),
            "amp_scaler": self.scaler.state_dict(),
            "draw_probs": self.draw_probs,
        }

    def restore(self, state: dict[str, Any], source: str) -> list[str]:
        """Take up what :meth:`state` gave, with its recipe, and return what it does not hold, which starts anew.

        Survival probabilities are its own and nothing is rescaled. Where the recipe is another (a run is forced), it is
        the recipe that acts: the learning rate follows from it and the step alone, and so do the optimizer's settings.

        Raises:
            InputError: if the weights do not fit.
        """
        anew = []
        load_state(self.model, state["state_dict"], source)
        if self.ema is not None:
            load_state(self.ema, state.get("state_dict_ema", state["state_dict"]), source)
            anew += [] if "state_dict_ema" in state else ["moving average"]
        if state["recipe"]["opt"] != self.recipe.opt or not restore_optimizer(self.optimizer, state["optimizer"]):
            anew.append("optimizer")
        if state["amp_scaler"]:
            self.scaler.load_state_dict(state["amp_scaler"])
        elif self.scaler.is_enabled():
            anew.append("loss scale")
        self.draw_probs = state["draw_probs"]
        return anew
