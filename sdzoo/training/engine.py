"""The training loop: one recipe, one folder of results."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from tqdm import tqdm

from sdzoo.description import check_description
from sdzoo.digest import file_sha256, state_sha256
from sdzoo.errors import InputError
from sdzoo.extras import require
from sdzoo.gate import gates
from sdzoo.images import input_config
from sdzoo.training.checkpoint import describe, load_model, read_run, save_run, save_weights
from sdzoo.training.data.corrupt import check_few
from sdzoo.training.data.loader import EvaluationData, TrainingData, open_evaluation_data, open_training_data
from sdzoo.training.data.streaming import lost_workers_named
from sdzoo.training.distributed import Processes, Shard, processes
from sdzoo.training.environment import deterministic, differences, environment
from sdzoo.training.evaluate import Stopped, evaluate
from sdzoo.training.history import History
from sdzoo.training.identity import Identity
from sdzoo.training.logs import Logs
from sdzoo.training.model import create_model
from sdzoo.training.profiling import profiler_into
from sdzoo.training.recipe import Recipe
from sdzoo.training.run_folder import RunFolder
from sdzoo.training.signals import sigterm_raises, stop_on_signal
from sdzoo.training.step import Diverged, Trainer
from sdzoo.training.streams import stream_seed

CHECKPOINT_INTERVAL_S = 300.0


class Interrupted(RuntimeError):
    """The run was asked to stop, and has saved itself."""


@dataclass(frozen=True)
class Comforts:
    """What a run shows and keeps on its way, none of which changes what comes out."""

    checkpoint_interval_s: float = CHECKPOINT_INTERVAL_S
    tensorboard: bool = False
    profile: bool = False
    advice: str = ""  # what to do if another process falls silent, for the line that the first one then ends with


def train(
    recipe: Recipe,
    data_dir: str | Path | None,
    output: str | Path,
    resume: bool = False,
    device: str | None = None,
    force: bool = False,
    comforts: Comforts = Comforts(),
) -> Path:
    """Train by ``recipe`` and return the file with the weights that did best on the validation split.

    ``output`` then holds ``best.safetensors``, ``last.pth`` (to resume or extend), ``log.csv`` (a row an epoch),
    ``steps.csv`` (a row an optimizer step), ``recipe.yaml`` and ``result.json``. On SIGINT or SIGTERM the run finishes
    its step, saves itself and raises :class:`Interrupted`; with ``resume`` it goes on from there, to the same weights
    bit for bit on the same machine, versions, threads, processes and workers; where there is no run yet, it says so and
    starts one. Started by ``torchrun``, it is one process of several: all drop the same blocks, the first one writes,
    and what it finds in its ``output`` is what all go on from.

    Args:
        recipe: What to train, and how.
        data_dir: Where the data is; default: the recipe's ``data_dir``.
        output: The run's folder.
        resume: Go on with the run in ``output``.
        device: ``cpu``, ``cuda``, ...; default: cuda if there is one.
        force: With ``resume``: go on although recipe or data are others than those of the run; a new one from there.
        comforts: How often to checkpoint, and what to show.

    Raises:
        InputError: if the recipe does not fit the data, or ``output`` holds a run and ``resume`` was not asked for, or
            holds the run of another recipe, or is in use; or ``force`` is given without ``resume``.
        Diverged: if the loss is not finite; ``last.pth`` is from before.
        LostProcess: if another process of the run has died, or one of those that read its data.
    """
    if force and not resume:
        raise InputError("--force goes with --resume: it goes on with a run of another recipe or other data")
    if comforts.tensorboard:
        require("tensorboard")
    folder = RunFolder(Path(output))
    with ExitStack() as stack:
        stack.enter_context(sigterm_raises(Interrupted("terminated outside of training, nothing is lost")))
        stack.enter_context(lost_workers_named())
        team = stack.enter_context(processes(device, comforts.advice))
        stack.enter_context(deterministic(team.device))
        if team.leads:
            folder.refuse_if_in_use()
            folder.check(resume)
        run = Run(recipe, where_the_data_is(recipe, data_dir), folder, team, comforts)
        if team.leads:
            stack.enter_context(folder.locked())
            folder.check(resume)
        found = team.from_leader(folder.last.read_bytes() if team.leads and folder.last.exists() else None)
        if found is not None:
            run.restore(found, force)
        elif resume and team.leads:
            print(f"{output} holds no run to resume: starting anew", flush=True)
        return run.execute()


def where_the_data_is(recipe: Recipe, given: str | Path | None) -> Path:
    """Return the folder of the data: the given one, or the recipe's.

    Raises:
        InputError: if there is neither.
    """
    if not (given or recipe.data_dir):
        raise InputError("no data: give --data-dir, or data_dir in the recipe")
    return Path(given or recipe.data_dir or "")


class Run:
    """One run of a recipe, in one of its processes."""

    def __init__(
        self, recipe: Recipe, data_dir: Path, folder: RunFolder, team: Processes, comforts: Comforts = Comforts()
    ) -> None:
        """Make the model and open the data; nothing is written yet."""
        if faults := recipe.faults():
            raise InputError("; ".join(faults))
        self.recipe, self.data_dir, self.folder, self.team, self.comforts = recipe, data_dir, folder, team, comforts
        torch.manual_seed(stream_seed(recipe.seed, "init"))
        model = create_model(recipe)
        self.config = input_config(model)
        with team.leader_first():
            self.training_data = open_training_data(recipe, data_dir, self.config, team.shard, team.device)
            self.validation_data = self._evaluation_data(recipe.val_split)
        test = recipe.sdzoo.test_split if team.leads else ""
        self.test_data = self._evaluation_data(test, Shard()) if test else None
        self._check_data(model, self.training_data, self.validation_data, self.test_data)
        self.description = describe(model, self.training_data.classes)
        check_description(self.description)
        team.meet()  # all have read their data; what these are known by is computed here, while nobody is hurried
        self.identity = Identity(
            recipe=dataclasses.asdict(recipe),
            data_sha256=self.training_data.fingerprint,
            validation_data_sha256=self.validation_data.fingerprint,
            survival_probs=[gate.p for gate in gates(model)],
            start_sha256=state_sha256(model.state_dict()),
            world=team.shard.world,
            data_dir=data_dir,
        )
        self._check_processes_agree()
        self.trainer = Trainer(recipe, model, self.training_data.steps, team)
        self.history = History()
        self.logs: Logs | None = None
        self.environment = environment(recipe, team)
        self.force_is_new = False

    def _evaluation_data(self, split: str, shard: Shard | None = None) -> EvaluationData:
        return open_evaluation_data(
            self.recipe, self.data_dir, split, self.config, shard or self.team.shard, self.team.device
        )

    def _check_data(self, model: nn.Module, training: TrainingData, *others: EvaluationData | None) -> None:
        if any(other is not None and training.classes != other.classes for other in others):
            raise InputError(f"the splits of {self.data_dir} have different classes")
        if model.num_classes != len(training.classes):
            raise InputError(f"{self.data_dir} has {len(training.classes)} classes, the model {model.num_classes}")

    def _check_processes_agree(self) -> None:
        # On several machines each has its own copy of the recipe and of the data. From here on they go in step.
        for what, digest in self.identity.digests().items():
            given = self.team.gather(digest)
            if others := [rank for rank, theirs in enumerate(given) if theirs != given[0]]:
                said = ", ".join(map(str, others))
                raise InputError(f"the {what} of process {said} differs from that of process 0; all take the same")

    def execute(self) -> Path:
        """Train from where the run stands to its end and return the file of the best weights."""
        history, leads = self.history, self.team.leads
        progress = history.progress
        with ExitStack() as stack:
            stop = stack.enter_context(stop_on_signal())
            if progress.epoch < self.trainer.epochs and history.trained_in[-1:] != [self.environment]:
                history.trained_in.append(self.environment)
            if leads:
                if progress.epoch < self.trainer.epochs:
                    self.folder.result.unlink(missing_ok=True)
                self.folder.write_recipe(self.recipe.to_yaml())
                self.logs = Logs(self.folder, history, self.comforts.tensorboard)
                stack.callback(self.logs.close)
                if self.force_is_new:  # the logs are no longer those that the checkpoint knows
                    self._save_last()
            profiler = stack.enter_context(profiler_into(self.folder.path)) if leads and self.comforts.profile else None
            self.saved_at = time.monotonic()
            try:
                while progress.epoch < self.trainer.epochs:
                    self._train_epoch(stop, profiler)
                    self._finish_epoch(stop)
            except Diverged as error:
                kept = f"{self.folder.last} is from before" if self.folder.last.exists() else "nothing was saved yet"
                raise Diverged(f"{error}; {kept}") from None
        if leads and not self.folder.result.is_file():
            self._finish_run()
        return self.folder.best

    def _train_epoch(self, stop: threading.Event, profiler: Any) -> None:
        """Do what is left of the epoch's steps."""
        progress, trainer = self.history.progress, self.trainer
        trainer.enter_epoch()
        steps, images = self.training_data.steps, self.recipe.batch_size * self.recipe.grad_accum_steps
        micro_batches = _Timed(self.training_data.epoch(progress.epoch, progress.batch))
        bar = tqdm(
            total=steps * images * self.team.shard.world,
            initial=progress.batch * images * self.team.shard.world,
            desc=f"epoch {progress.epoch + 1}/{trainer.epochs}",
            unit="image",
            leave=False,
            disable=None if self.team.leads else True,
        )
        begun, done_before = time.perf_counter(), progress.step
        with bar:
            while progress.batch < steps:
                started, waited = time.perf_counter(), micro_batches.waited_s
                step = trainer.step(progress.step, micro_batches, stop.is_set())
                waited = micro_batches.waited_s - waited
                done = time.perf_counter()
                progress.count(step.loss, step.live_blocks, step.first_conv_gradient)
                if self.logs:
                    self.logs.step(progress, step)
                progress.data_s += waited
                progress.step_s += done - started - waited
                left_s = (done - begun) / (progress.step - done_before) * (trainer.epochs * steps - progress.step)
                bar.set_postfix_str(
                    f"loss {progress.mean_loss:.3f}, live blocks {step.live_blocks}, "
                    f"run {tqdm.format_interval(left_s)} left",
                    refresh=False,
                )
                bar.update(images * self.team.shard.world)
                if profiler is not None:
                    profiler.step()
                # Several processes agree to stop in the next step; one alone need not wait for it.
                stopping = step.stop or (stop.is_set() and not self.team.many)
                # After an epoch's last step the statistics of BatchNorm are to be made one first.
                if progress.batch < steps and (stopping or self._checkpoint_is_due()):
                    saved = self._save_within_epoch()
                    if stopping:
                        self._stop(f"in epoch {progress.epoch + 1}, batch {progress.batch}", saved)
                progress.log_s += time.perf_counter() - done

    def _checkpoint_is_due(self) -> bool:
        return time.monotonic() - self.saved_at >= self.comforts.checkpoint_interval_s

    def _stop(self, where: str, saved: bool) -> NoReturn:
        self.team.meet()  # nobody leaves while the first one may still be writing
        kept = f"{self.folder.last} goes on" + ("" if saved else " from the start of an epoch")
        kept = kept if saved or self.folder.last.is_file() else "nothing was saved yet"
        raise Interrupted(f"stopped {where}; {kept}")

    def _finish_epoch(self, stop: threading.Event) -> None:
        progress, trainer, started = self.history.progress, self.trainer, time.perf_counter()
        if not progress.left:
            trainer.leave_epoch()
            progress.left = True
        self._gather_corrupt()
        if not self._model_is_finite():
            raise Diverged(f"a weight or a statistic of BatchNorm is not finite after step {progress.step}")
        if self._checkpoint_is_due():
            self._save_last()
        try:
            validation = evaluate(trainer.kept, self.validation_data, self.team, stop.is_set)
        except Stopped:
            self._save_last()
            self._stop(f"before epoch {progress.epoch + 1} was validated", saved=True)
        progress.validation_s += time.perf_counter() - started
        started = time.perf_counter()
        is_best = self.history.end_epoch(trainer.optimizer.param_groups[0]["lr"], validation)
        if self.logs:
            if is_best:
                save_weights(self.folder.best, trainer.kept, self.description | self.history.rows[-1])
            self._save_last()
            self.logs.epoch(self.history, validation.top1_percent, trainer.epochs, len(self.identity.survival_probs))
        progress.log_s += time.perf_counter() - started

    def _gather_corrupt(self) -> None:
        """Say which images could not be read, on whatever process; the limit is that of the run."""
        known = self.history.corrupt
        found = known | self.team.union(self.training_data.corrupt)
        check_few(found, self.training_data.images)
        if self.team.leads and (new := sorted(found.keys() - known.keys())):
            print(f"{len(new)} corrupt training images are substituted: {', '.join(new)}", flush=True)
        self.history.corrupt = found

    def _finish_run(self) -> None:
        """Measure the test split, if the recipe names one, with the best weights, and write down what came out."""
        history, folder, test = self.history, self.folder, None
        progress = history.progress
        if self.test_data is not None:
            best = load_model(folder.best).to(self.team.device)
            test = evaluate(best, self.test_data)
            where = f"weights of epoch {progress.best_epoch}"
            print(f"test top-1 {test.top1_percent:.2f} % on {test.images} images, {where}", flush=True)
        folder.write_result(
            {
                "model": self.recipe.model,
                "data": self.recipe.dataset or self.data_dir.resolve().name,
                "images": {
                    "train": self.training_data.images,
                    "val": self.validation_data.images,
                    "test": test and test.images,
                },
                "blocks": len(self.identity.survival_probs),
                "final_survival_prob": self.identity.survival_probs[-1],
                "survival_probs": self.identity.survival_probs,
                "best_epoch": progress.best_epoch,
                "val_top1_percent": progress.best_top1_percent,
                "test_top1_percent": test and test.top1_percent,
                "seconds": {
                    name: round(getattr(progress, f"{name}_s"), 3) for name in ("data", "step", "log", "validation")
                },
                "corrupt_training_images": sorted(history.corrupt),
                "environment": history.trained_in,
                "forced": history.forced,
                # by which it is seen later that these are still the files of this result
                "sha256": {
                    file.name: file_sha256(file)
                    for file in (folder.best, folder.last, folder.log, folder.steps, folder.recipe)
                },
            }
        )

    def _model_is_finite(self) -> bool:
        return all(bool(tensor.isfinite().all()) for tensor in self.trainer.model.state_dict().values())

    def _save_within_epoch(self) -> bool:
        # Only some data can be entered within an epoch; and weights that a step broke, the next one's loss will tell.
        if not (self.training_data.exact_position and self._model_is_finite()):
            return False
        self._save_last()
        return True

    def _save_last(self) -> None:
        self.saved_at = time.monotonic()
        if not self.logs:
            return
        self.logs.flush()
        progress, corrupt = self.history.progress, self.history.corrupt | self.training_data.corrupt
        state = self.description | self.trainer.state() | self.identity.record()
        state |= dataclasses.replace(self.history, corrupt=corrupt).record()
        state |= {
            "epoch": progress.epoch,
            "metric": progress.best_top1_percent,
            "global_step": progress.step,
            "steps_per_epoch": self.training_data.steps,
        }
        save_run(self.folder.last, state)

    def restore(self, content: bytes, force: bool) -> None:
        """Take up the run where its checkpoint, the ``content`` of the first process's last.pth, left it.

        Raises:
            InputError: if the checkpoint is damaged, or of another recipe or data, unless ``force``; another model is
                refused in any case.
        """
        last = self.folder.last
        weights, rest = read_run(content, last)
        if "progress" not in rest or "recipe" not in rest:
            raise InputError(f"{last} is no run of sdzoo's: it does not say where it stands")
        try:
            self._take_up(weights, rest, force)
        except InputError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
            what = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            raise InputError(f"{last} is not a whole run, or one of another version of sdzoo: {what}") from None

    def _take_up(self, weights: dict[str, Tensor], rest: dict[str, Any], force: bool) -> None:
        last = self.folder.last
        probs = [float(p) for name, p in weights.items() if name.endswith("survival_prob")]
        faults = self.identity.differences(rest, probs)
        best_epoch = rest["progress"]["best_epoch"]
        lost_best = bool(self.team.leads and best_epoch and not self.folder.best.is_file())
        lost = [f"{self.folder.best}, the weights of epoch {best_epoch}, is gone"] if lost_best else []
        if (faults or lost) and not force:
            other = [f"{last} is from another run: {'; '.join(faults)}"] if faults else []
            raise InputError(f"{'; '.join(other + lost)}; --force goes on all the same, if epochs are left")
        history = History.of(rest)
        if self.team.leads and (other := differences(history.trained_in[-1], self.environment)):
            print(f"not bit for bit from here on: {'; '.join(other)}", flush=True)
        anew = self.trainer.restore({**rest, "state_dict": weights}, str(last))
        if self.team.leads and anew:
            print(f"not in {last}, starting anew: {', '.join(anew)}", flush=True)
        self.history, progress = history, history.progress
        if faults or lost:
            self._force(faults + lost)
        # Forced: there is no figure to compare with.
        if lost_best or rest.get("validation_data_sha256") != self.validation_data.fingerprint:
            progress.best_epoch, progress.best_top1_percent = 0, -1.0
        steps = self.training_data.steps
        if rest.get("steps_per_epoch", steps) != steps:  # forced onto other data: from the start of the epoch
            progress.start_epoch()
            progress.step = progress.epoch * steps

    def _force(self, faults: list[str]) -> None:
        done = self.history.progress.epoch
        if done >= self.trainer.epochs:
            raise InputError(
                f"{self.folder.last} has {done} epochs, the recipe {self.trainer.epochs}: none is left to go on with, "
                f"forced or not ({'; '.join(faults)})"
            )
        self.history.forced.append(f"from epoch {done + 1} on: {'; '.join(faults)}")
        if self.team.leads:
            print(f"forced {self.history.forced[-1]}", flush=True)
        self.force_is_new = True


class _Timed:
    """An iterator that knows how long it was waited for."""

    def __init__(self, items: Iterator[Any]) -> None:
        self._items = items
        self.waited_s = 0.0

    def __iter__(self) -> _Timed:
        return self

    def __next__(self) -> Any:
        started = time.perf_counter()
        item = next(self._items)
        self.waited_s += time.perf_counter() - started
        return item
