"""What a recipe would cost, from its arithmetic and a few measured steps; nothing is written, nor downloaded."""

from __future__ import annotations

import dataclasses
import resource
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from timm.models import get_pretrained_cfg

from sdzoo.macs import count_macs
from sdzoo.training.data.streaming import lost_workers_named
from sdzoo.training.distributed import processes
from sdzoo.training.engine import Run, where_the_data_is
from sdzoo.training.environment import deterministic
from sdzoo.training.recipe import Recipe
from sdzoo.training.run_folder import RunFolder

WARM_UP_STEPS = 2
MEASURED_STEPS = 10


@dataclass(frozen=True)
class Cost:
    """What training by a recipe would take.

    ``relative_macs`` are the multiply-accumulates of training, on average over the gates, against constant depth;
    ``step_s`` the lower quartile, median and upper quartile of the measured steps; ``memory_mib`` the most that this
    process held.
    """

    parameters: int
    blocks: int
    training_images: int
    validation_images: int
    steps_per_epoch: int
    epochs: int
    processes: int
    relative_macs: float
    step_s: tuple[float, float, float]
    mean_step_s: float
    memory_mib: float

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.epochs * self.steps_per_epoch

    @property
    def training_s(self) -> float:
        """Estimated seconds of all steps; validation is not in it."""
        return self.steps * self.mean_step_s


def dry_run(recipe: Recipe, data_dir: str | Path | None, device: str | None = None) -> Cost:
    """Do a few training steps by ``recipe`` and return what all of it would cost; data must be there already.

    Raises:
        InputError: as :func:`sdzoo.train`.
    """
    recipe = _without_downloads(recipe)
    with lost_workers_named(), processes(device) as team, deterministic(team.device):
        run = Run(recipe, where_the_data_is(recipe, data_dir), RunFolder(Path()), team)
        trainer, data = run.trainer, run.training_data
        macs = count_macs(trainer.model, run.config["input_size"])
        warmup = recipe.sdzoo.survival_warmup_epochs / trainer.epochs  # over it, 1 - p rises from 0 in a straight line
        relative = macs.training / macs.evaluation
        relative += (1 - relative) * warmup / 2
        trainer.enter_epoch()
        count = min(WARM_UP_STEPS + MEASURED_STEPS, data.steps)
        # There the survival warm-up is over, and the learning rate is one that weights not trained yet bear too.
        last = trainer.epochs - 1
        batches, seconds = data.epoch(last), []
        for number in range(last * data.steps, last * data.steps + count):
            started = time.perf_counter()
            trainer.step(number, batches)
            seconds.append(time.perf_counter() - started)
        seconds = seconds[min(WARM_UP_STEPS, count - 1) :]
        quartiles = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else seconds * 3
        return Cost(
            parameters=sum(parameter.numel() for parameter in trainer.model.parameters()),
            blocks=len(run.identity.survival_probs),
            training_images=data.images,
            validation_images=run.validation_data.images,
            steps_per_epoch=data.steps,
            epochs=trainer.epochs,
            processes=team.shard.world,
            relative_macs=relative if any(trainer.drawing) else 1.0,
            step_s=(quartiles[0], quartiles[1], quartiles[2]),
            mean_step_s=statistics.mean(seconds),
            memory_mib=_peak_memory_mib(team.device),
        )


def _without_downloads(recipe: Recipe) -> Recipe:
    """Return ``recipe`` without what is fetched: the data set, and weights of timm's Hub, which bring no p_l along."""
    weights = get_pretrained_cfg(recipe.model)
    pretrained = recipe.pretrained and (weights is None or not weights.hf_hub_id)
    return dataclasses.replace(recipe, dataset_download=False, pretrained=pretrained)


def _peak_memory_mib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
