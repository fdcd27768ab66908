"""What the engine iterates over: the training set and the sets it is measured on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdzoo.errors import InputError
from sdzoo.training.data.augment import BatchAugmentation, evaluation_steps, normaliser, training_steps
from sdzoo.training.data.corrupt import CorruptImages, refuse
from sdzoo.training.data.image_set import fits, read_images
from sdzoo.training.data.names import in_shards, same_split
from sdzoo.training.data.order import micro_batches
from sdzoo.training.data.sources import ArraySource, HeldOut, Source, open_source
from sdzoo.training.data.streaming import Batch, Samples, Stream
from sdzoo.training.data.web_shards import evaluation_reader, open_shards, training_reader
from sdzoo.training.distributed import Shard
from sdzoo.training.recipe import Recipe
from sdzoo.training.streams import stream

CPU = torch.device("cpu")
HERE = Shard()


class TrainingData:
    """A training set in augmented micro-batches of one rank; from :func:`open_training_data`.

    Attributes:
        classes: Names, in the order of the labels.
        images: Samples of the set.
        steps: Optimizer steps an epoch.
        exact_position: Whether an epoch can be entered at any step; else only at 0.
    """

    def __init__(
        self,
        identity: Callable[[], str],
        classes: tuple[str, ...],
        corrupt_images: CorruptImages,
        steps: int,
        raw: Callable[[int, int], Iterator[Batch]],
        augment: BatchAugmentation,
        exact_position: bool = True,
    ) -> None:
        self.classes, self.images, self.steps = classes, corrupt_images.count, steps
        self.exact_position = exact_position
        self.identity, self.raw, self.augment, self.corrupt_images = identity, raw, augment, corrupt_images

    @property
    def corrupt(self) -> dict[str, str]:
        """The corrupt images substituted so far, as far as this rank has seen: name and reason."""
        return self.corrupt_images.found

    @cached_property
    def fingerprint(self) -> str:
        """A digest of what identifies the data: names, labels and contents; of what does not fit into memory sizes."""
        return self.identity()

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield this rank's micro-batches from ``start_step`` on: augmented float images, and int64 labels.

        Raises:
            InputError: if too many images are corrupt, or ``start_step`` is not one where this set can be entered.
        """
        if start_step and not self.exact_position:
            raise InputError(f"this data set is entered at the start of an epoch, not at step {start_step}")
        for batch in self.raw(epoch, start_step):
            if batch.fault:
                raise InputError(batch.fault)
            if batch.corrupt:
                self.corrupt_images.add(batch.corrupt)
            images = self.augment(batch.images, batch.keys, epoch)
            yield images, batch.labels.to(images.device, non_blocking=True)


class EvaluationData:
    """One rank's part of a split; from :func:`open_evaluation_data`.

    Attributes:
        classes: Names, in the order of the labels.
        corrupt: Images left out, as far as this rank has seen: name and reason. Always empty without ``skip_corrupt``.
    """

    def __init__(
        self,
        identity: Callable[[], str],
        classes: tuple[str, ...],
        images: int,
        raw: Callable[[], Iterator[Batch]],
        normalise: Callable[[Tensor], Tensor],
        skip_corrupt: bool,
    ) -> None:
        self.identity, self.classes, self.raw, self.normalise = identity, classes, raw, normalise
        self.total, self.skip_corrupt = images, skip_corrupt
        self.corrupt: dict[str, str] = {}

    @property
    def images(self) -> int:
        """Images of the whole split that are evaluated: all but those in ``corrupt``."""
        return self.total - len(self.corrupt)

    @cached_property
    def fingerprint(self) -> str:
        """A digest of what identifies the data: names, labels and contents; of what does not fit into memory sizes."""
        return self.identity()

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield this rank's part, each sample once: normalised float images, and int64 labels.

        Raises:
            InputError: if an image is corrupt and ``skip_corrupt`` was not asked for.
        """
        for batch in self.raw():
            if batch.fault:
                raise InputError(batch.fault)
            self.note(batch.corrupt)
            if len(batch.labels):
                images = self.normalise(batch.images)
                yield images, batch.labels.to(images.device, non_blocking=True)

    def note(self, corrupt: dict[str, str]) -> None:
        """Take note of corrupt images, or raise InputError."""
        if not self.skip_corrupt:
            refuse(corrupt)
        self.corrupt.update(corrupt)


def open_training_data(
    recipe: Recipe, data_dir: str | Path, data_config: dict[str, Any], shard: Shard = HERE, device: torch.device = CPU
) -> TrainingData:
    """Return the training set of ``recipe``, without what it holds out.

    Args:
        recipe: Names the data set, its augmentation, batches, workers and seed.
        data_dir: The folder that holds the data set.
        data_config: timm's, of the model: ``input_size``, ``mean``, ``std``, ``interpolation``, ``crop_pct``.
        shard: Which rank this is; only rank 0 downloads, so let it come first.
        device: Where batches are augmented and handed over.

    Raises:
        InputError: if the data set or split is missing or does not fill one step, or too many images are corrupt.
    """
    fixed, random = training_steps(recipe, data_config)
    if in_shards(recipe.dataset):
        return _training_shards(recipe, data_dir, data_config, shard, device, [*fixed, *random])
    size = data_config["input_size"]
    download = recipe.dataset_download and shard.rank == 0
    source = open_source(recipe.dataset, data_dir, recipe.train_split, size[0], download)
    source = HeldOut(recipe.sdzoo.held_out, recipe.seed).training(source, recipe.train_split)
    identity = _identity(recipe.dataset, recipe.train_split, source.classes, _digest(source, size))
    steps = _steps(len(source), recipe, shard)
    corrupt = CorruptImages(len(source))
    if fixed and fits(len(source), size):
        source, found = read_images(
            source, fixed, size, recipe.seed, recipe.workers, recipe.train_split, shard.rank == 0
        )
        corrupt.add(found)
        fixed = []
    if isinstance(source, ArraySource) and not (fixed or random):
        read = _from_memory(source)
    else:
        read = Stream(Samples(source, [*fixed, *random], recipe.seed), recipe.workers, recipe.pin_mem).batches

    def raw(epoch: int, start_step: int) -> Iterator[Batch]:
        count, accum = len(source), recipe.grad_accum_steps
        return read(epoch, micro_batches(count, recipe.seed, epoch, recipe.batch_size, accum, shard, start_step))

    augment = BatchAugmentation(recipe, data_config, device, len(source))
    return TrainingData(identity, source.classes, corrupt, steps, raw, augment)


def open_evaluation_data(
    recipe: Recipe,
    data_dir: str | Path,
    split: str,
    data_config: dict[str, Any],
    shard: Shard = HERE,
    device: torch.device = CPU,
) -> EvaluationData:
    """Return this rank's part of a split of the recipe's data set; of ``train_split``, what training holds out.

    Raises:
        InputError: as :func:`open_split`; or if ``split`` is what is trained on.
    """
    held_out = None
    if same_split(split, recipe.train_split):
        held_out = HeldOut(recipe.sdzoo.held_out, recipe.seed)
        if not held_out.number:
            raise InputError(
                f'"{split}" is what the recipe trains on ("{recipe.train_split}"), and nothing is held out'
            )
    return open_split(
        recipe.dataset,
        data_dir,
        split,
        data_config,
        shard,
        device,
        recipe.validation_batch_size or recipe.batch_size,
        workers=recipe.workers,
        pin_mem=recipe.pin_mem,
        held_out=held_out,
        num_samples=recipe.val_num_samples if split == recipe.val_split else None,
        num_classes=recipe.num_classes,
        download=recipe.dataset_download,
    )


def open_split(
    dataset: str,
    data_dir: str | Path,
    split: str,
    data_config: dict[str, Any],
    shard: Shard = HERE,
    device: torch.device = CPU,
    batch_size: int = 250,
    *,
    workers: int = 0,
    pin_mem: bool = False,
    skip_corrupt: bool = False,
    held_out: HeldOut | None = None,
    order_seed: int | None = None,
    num_samples: int | None = None,
    num_classes: int | None = None,
    download: bool = False,
) -> EvaluationData:
    """Return this rank's part of a split: samples ``rank::world``, of WebDataset shards ``rank::world``.

    Args:
        dataset: timm's name for the data set; ``""`` is a folder.
        data_dir: The folder that holds the data set.
        split: The split's name.
        data_config: timm's, of the model, as for :func:`open_training_data`.
        shard: Which rank this is.
        device: Where batches are handed over.
        batch_size: Images a batch.
        workers: Processes that decode.
        pin_mem: Pin what they hand over.
        skip_corrupt: Leave corrupt images out and name them, instead of stopping at the first.
        held_out: Evaluate on what training holds out of ``split``, not on all of it; not for WebDataset shards.
        order_seed: Seed of the order in which samples are read; default: as they lie, which may be class by class. Not
            for WebDataset shards.
        num_samples: For WebDataset shards whose ``_info.json`` does not say.
        num_classes: For WebDataset shards, which do not name their classes.
        download: Let torchvision fetch what is missing (only rank 0 does, so let it come first).

    Raises:
        InputError: if the data set or split is missing, or an image that is read now is corrupt.
    """
    size, steps = data_config["input_size"], evaluation_steps(data_config)
    normalise = normaliser(data_config["mean"], data_config["std"], device)
    if in_shards(dataset):
        shards = open_shards(data_dir, split, num_samples, num_classes, size[0])
        read_all = evaluation_reader(shards, steps, shard, batch_size, workers)
        identity = _identity(dataset, split, shards.classes, shards.sha256)
        return EvaluationData(identity, shards.classes, shards.images, read_all, normalise, skip_corrupt)
    source = open_source(dataset, data_dir, split, size[0], download and shard.rank == 0)
    if held_out is not None:
        source = held_out.validation(source, split)
    if order_seed is not None:
        source = source.subset(torch.randperm(len(source), generator=stream(order_seed, "order")))
    identity, total = _identity(dataset, split, source.classes, _digest(source, size)), len(source)
    if shard.world > 1:
        source = source.subset(torch.arange(total)[shard.rank :: shard.world])
    corrupt: dict[str, str] = {}
    if fits(len(source), size):
        source, corrupt = read_images(source, steps, size, None, workers, split, shard.rank == 0)
        read = _from_memory(source)
    else:
        read = Stream(Samples(source, steps, None), workers, pin_mem).batches

    def raw() -> Iterator[Batch]:
        return read(0, torch.arange(len(source)).split(batch_size) if len(source) else ())

    data = EvaluationData(identity, source.classes, total, raw, normalise, skip_corrupt)
    data.note(corrupt)
    return data


def _training_shards(
    recipe: Recipe, data_dir: str | Path, data_config: dict[str, Any], shard: Shard, device: torch.device, steps: Any
) -> TrainingData:
    in_chans, wanted = data_config["input_size"][0], recipe.train_num_samples
    shards = open_shards(data_dir, recipe.train_split, wanted, recipe.num_classes, in_chans, "train_num_samples")
    optimizer_steps = _steps(shards.images, recipe, shard)
    count = optimizer_steps * recipe.grad_accum_steps
    read = training_reader(shards, steps, shard, recipe.batch_size, count, recipe.seed, recipe.workers)
    augment = BatchAugmentation(recipe, data_config, device, None)
    return TrainingData(
        _identity(recipe.dataset, recipe.train_split, shards.classes, shards.sha256),
        shards.classes,
        CorruptImages(shards.images),
        optimizer_steps,
        lambda epoch, _: read(epoch),
        augment,
        exact_position=False,
    )


def _digest(source: Source, input_size: tuple[int, int, int]) -> Callable[[], str]:
    """Return what takes the digest of ``source``: by contents, if it is small enough to be held in memory.

    Of files, not of the pixels that were read from them: each of several processes holds a part of an evaluation only.
    """
    return partial(source.sha256, contents=fits(len(source), input_size))


def _identity(dataset: str, split: str, classes: tuple[str, ...], sha256: Callable[[], str]) -> Callable[[], str]:
    return lambda: hashlib.sha256(repr((dataset, split, classes, sha256())).encode()).hexdigest()


def _steps(count: int, recipe: Recipe, shard: Shard) -> int:
    together = recipe.batch_size * shard.world * recipe.grad_accum_steps
    if count < together:
        raise InputError(
            f"{count} training images do not fill one step of {together} (batch_size {recipe.batch_size} x "
            f"{shard.world} ranks x grad_accum_steps {recipe.grad_accum_steps}); take fewer ranks or a smaller batch"
        )
    return count // together


def _from_memory(source: ArraySource) -> Callable[[int, Iterable[Tensor]], Iterator[Batch]]:
    def read(_: int, indices: Iterable[Tensor]) -> Iterator[Batch]:
        for chosen in indices:
            yield Batch(source.pixels[chosen], source.labels[chosen], chosen, {})

    return read
