"""The training loop: one recipe, one folder of results."""

from __future__ import annotations

import csv
import dataclasses
import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import ClassificationTask
from timm.utils import dispatch_clip_grad
from torch import Tensor
from tqdm import tqdm

from sdzoo.description import check_description
from sdzoo.errors import InputError
from sdzoo.files import atomic_path
from sdzoo.gate import fixed_gates, gates, live_blocks
from sdzoo.images import input_config
from sdzoo.training.checkpoint import describe, load_state, read_checkpoint, save_run, save_weights
from sdzoo.training.data import load_image_set, normaliser, training_batches
from sdzoo.training.evaluate import evaluate
from sdzoo.training.model import create_model
from sdzoo.training.recipe import Recipe
from sdzoo.training.streams import stream, stream_seed

LOG_COLUMNS: tuple[str, ...] = (
    "epoch",
    "step",
    "lr",
    "train_loss",
    "live_blocks",
    "seconds",
    "val_loss",
    "val_top1_percent",
)


class Diverged(RuntimeError):
    """The loss is no longer a finite number."""


class Interrupted(RuntimeError):
    """The run was asked to stop, and has saved itself."""


@dataclass
class Progress:
    """Where a run stands; everything else follows from the recipe, the data and the weights."""

    epoch: int = 0
    step: int = 0  # optimizer steps since the start of the run
    batch: int = 0  # batches done in this epoch
    loss_sum: float = 0.0  # over those batches
    live_sum: int = 0
    seconds: float = 0.0  # training and validation, over all sessions of the run
    best_epoch: int = 0
    best_top1_percent: float = -1.0


def train(
    recipe: Recipe,
    data_dir: str | Path,
    output: str | Path,
    resume: bool = False,
    device: str | None = None,
) -> Path:
    """Train by ``recipe`` on ``data_dir`` and return the file with the weights that did best on the validation split.

    ``output`` then holds ``best.safetensors``, ``last.pth`` (to resume or extend), ``log.csv`` and ``recipe.yaml``.
    On SIGINT or SIGTERM the run finishes its step, saves itself and raises :class:`Interrupted`; with ``resume`` it
    goes on from there, to the same weights bit for bit on the same machine, versions and threads; where there is no run
    yet, it says so and starts one.

    Raises:
        InputError: if the recipe does not fit the data, or ``output`` holds a run and ``resume`` was not asked for, or
            holds the run of another recipe.
        Diverged: if the loss is not finite; ``last.pth`` is from before.
    """
    try:
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f'device "{device}" cannot be had: {str(error).splitlines()[0]}') from None
    return _Run(recipe, Path(data_dir), Path(output), resume, chosen).execute()


class _Run:
    def __init__(self, recipe: Recipe, data_dir: Path, output: Path, resume: bool, device: torch.device) -> None:
        self.recipe, self.output = recipe, output
        self.last, self.best, self.log = output / "last.pth", output / "best.safetensors", output / "log.csv"
        if self.last.exists() and not resume:
            raise InputError(f"{output} already holds a run; resume it, or name another folder")
        if not self.last.exists() and (self.best.exists() or self.log.exists()):
            raise InputError(f"{output} holds results of a run, but no last.pth to resume; name another folder")
        if resume and not self.last.exists():
            print(f"{output} holds no run to resume: starting anew", flush=True)
        if faults := recipe.faults():
            raise InputError("; ".join(faults))
        torch.manual_seed(stream_seed(recipe.seed, "init"))
        self.model = create_model(recipe)
        self.probs = [gate.p for gate in gates(self.model)]
        self.skips = gates(self.model)[0].mode == "batch"
        config = input_config(self.model)
        self.train_set = load_image_set(data_dir, recipe.train_split, config)
        self.val_set = load_image_set(data_dir, recipe.val_split, config)
        self.batches = len(self.train_set) // recipe.batch_size
        self._check_data(data_dir)
        self.normalise = normaliser(config["mean"], config["std"], device)
        self.description = describe(self.model, self.train_set.classes)
        check_description(self.description)

        memory_format = torch.channels_last if recipe.channels_last else torch.contiguous_format
        self.model.to(device=device, memory_format=memory_format)  # type: ignore[call-overload]
        self.task = ClassificationTask(
            self.model, criterion_kwargs={"smoothing": recipe.smoothing}, device=device, verbose=False
        )
        try:
            self.optimizer = create_optimizer_v2(
                self.model,
                opt=recipe.opt,
                lr=recipe.lr,
                weight_decay=recipe.weight_decay,
                momentum=recipe.momentum,
                **recipe.opt_kwargs,
            )
        except (TypeError, ValueError) as error:
            raise InputError(f"opt, opt_kwargs: {error}") from None
        scheduler, _ = create_scheduler_v2(
            self.optimizer,
            sched=recipe.sched,
            num_epochs=recipe.epochs,
            warmup_epochs=recipe.warmup_epochs,
            warmup_lr=recipe.warmup_lr,
            min_lr=recipe.min_lr,
            decay_milestones=recipe.decay_milestones,
            decay_rate=recipe.decay_rate,
            step_on_epochs=not recipe.sched_on_updates,
            updates_per_epoch=self.batches,
        )
        assert scheduler is not None
        self.scheduler = scheduler
        self.progress = Progress()
        self.rows: list[dict[str, Any]] = []
        if self.last.exists():
            self._restore()

    def _check_data(self, data_dir: Path) -> None:
        classes = self.train_set.classes
        if classes != self.val_set.classes:
            raise InputError(f"the splits of {data_dir} have different classes")
        if self.model.num_classes != len(classes):
            raise InputError(f"{data_dir} has {len(classes)} classes, the model {self.model.num_classes}")
        if not self.batches:
            raise InputError(f"{len(self.train_set)} training images do not fill a batch of {self.recipe.batch_size}")

    def execute(self) -> Path:
        try:
            self.output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot create {self.output}: {error.strerror}") from None
        with atomic_path(self.output / "recipe.yaml") as temporary:
            temporary.write_text(self.recipe.to_yaml(), encoding="utf-8")
        with _stop_on_signal() as stop:
            while self.progress.epoch < self.recipe.epochs:
                self._train_epoch(stop)
                self._finish_epoch()
        return self.best

    def _train_epoch(self, stop: threading.Event) -> None:
        recipe, progress = self.recipe, self.progress
        self.model.train()
        batches = training_batches(
            self.train_set,
            self.normalise,
            recipe.batch_size,
            recipe.seed,
            progress.epoch,
            start=progress.batch,
            augment=not recipe.no_aug,
            hflip=recipe.hflip,
        )
        bar = tqdm(
            total=self.batches * recipe.batch_size,
            initial=progress.batch * recipe.batch_size,
            desc=f"epoch {progress.epoch + 1}/{recipe.epochs}",
            unit="image",
            leave=False,
            disable=None,
        )
        before, started = progress.seconds, time.perf_counter()
        with bar:
            for images, labels in batches:
                progress.loss_sum += self._step(images, labels)
                live = sum(live_blocks(self.model)) if self.skips else len(self.probs)
                progress.live_sum += live
                progress.batch += 1
                progress.step += 1
                progress.seconds = before + time.perf_counter() - started
                bar.set_postfix_str(f"loss {progress.loss_sum / progress.batch:.3f}, live blocks {live}", refresh=False)
                bar.update(recipe.batch_size)
                if stop.is_set():
                    self._save_last()
                    raise Interrupted(
                        f"stopped in epoch {progress.epoch + 1}, batch {progress.batch}; {self.last} goes on"
                    )

    def _step(self, images: Tensor, labels: Tensor) -> float:
        """Do one optimizer step and return its loss."""
        recipe, progress = self.recipe, self.progress
        if recipe.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        if recipe.sched_on_updates:
            self.scheduler.step_update(progress.step)
        else:
            self.scheduler.step(progress.epoch)
        torch.manual_seed(stream_seed(recipe.seed, "dropout", progress.step))
        draws = torch.rand(len(self.probs), generator=stream(recipe.seed, "gates", progress.step)).tolist()
        bits = [draw < p for draw, p in zip(draws, self.probs, strict=True)]
        with fixed_gates(self.model, bits) if self.skips else nullcontext():
            loss = self.task(images, labels)["loss"]
            value = loss.item()
            if not math.isfinite(value):
                raise Diverged(f"the loss is {value} at step {progress.step}; {self._kept()}")
            self.optimizer.zero_grad()
            loss.backward()
        if recipe.clip_grad is not None:
            dispatch_clip_grad(self.model.parameters(), recipe.clip_grad)
        self.optimizer.step()
        return value

    def _finish_epoch(self) -> None:
        progress, started = self.progress, time.perf_counter()
        validation = evaluate(self.model, self.val_set, self.normalise, self.recipe.validation_batch_size or 250)
        progress.seconds += time.perf_counter() - started
        if not all(parameter.isfinite().all() for parameter in self.model.parameters()):
            raise Diverged(f"a weight is not finite after step {progress.step}; {self._kept()}")
        row = {
            "epoch": progress.epoch + 1,
            "step": progress.step,
            "lr": self.optimizer.param_groups[0]["lr"],
            "train_loss": round(progress.loss_sum / progress.batch, 5),
            "live_blocks": round(progress.live_sum / progress.batch, 3),
            "seconds": round(progress.seconds, 1),
            "val_loss": round(validation.loss, 5),
            "val_top1_percent": round(validation.top1_percent, 3),
        }
        self.rows.append(row)
        is_best = validation.top1_percent > progress.best_top1_percent
        if is_best:
            progress.best_epoch, progress.best_top1_percent = progress.epoch + 1, validation.top1_percent
        progress.epoch += 1
        progress.batch, progress.loss_sum, progress.live_sum = 0, 0.0, 0
        if is_best:
            save_weights(self.best, self.model, self.description | {"epoch": progress.epoch, **row})
        self._save_last()
        with atomic_path(self.log) as temporary, open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, LOG_COLUMNS)
            writer.writeheader()
            writer.writerows(self.rows)
        best = f"best {progress.best_top1_percent:.2f} % at {progress.best_epoch}"
        print(
            f"epoch {row['epoch']}/{self.recipe.epochs}: loss {row['train_loss']:.3f}, "
            f"val top-1 {row['val_top1_percent']:.2f} % ({best}), "
            f"live blocks {row['live_blocks']:.2f} of {len(self.probs)}, {row['seconds']:.0f} s",
            flush=True,
        )

    def _kept(self) -> str:
        return f"{self.last} is from before" if self.last.exists() else "nothing was saved yet"

    def _save_last(self) -> None:
        state = self.description | {
            "state_dict": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "epoch": self.progress.epoch,
            "progress": dataclasses.asdict(self.progress),
            "recipe": dataclasses.asdict(self.recipe),
            "rows": self.rows,
        }
        save_run(self.last, state)

    def _restore(self) -> None:
        state, rest = read_checkpoint(self.last)
        theirs = rest.get("recipe", {})
        ours = dataclasses.asdict(self.recipe)
        if other := sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)):
            raise InputError(f"{self.last} is from another recipe; it differs in {', '.join(other)}")
        stored = [float(p) for name, p in state.items() if name.endswith("survival_prob")]
        if stored != self.probs:
            raise InputError(f"{self.last} was trained with other survival probabilities than the recipe's")
        load_state(self.model, state, str(self.last))
        self.optimizer.load_state_dict(rest["optimizer"])
        self.progress, self.rows = Progress(**rest["progress"]), rest["rows"]


@contextmanager
def _stop_on_signal() -> Iterator[threading.Event]:
    """Yield an event that the first SIGINT or SIGTERM sets; a second one acts at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    # The defaults, not what was there before: a shell starts what runs in the background with SIGINT ignored.
    at_once = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    before = {number: signal.getsignal(number) for number in at_once}

    def ask(number: int, _: Any) -> None:
        stop.set()
        signal.signal(number, at_once[signal.Signals(number)])

    for number in before:
        signal.signal(number, ask)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
