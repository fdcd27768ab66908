"""WebDataset shards: tar files read from end to end, by timm's description of splits.

Which samples meet in a batch depends on ranks and workers, because each reads shards of its own; it follows from the
seed and the epoch all the same. A run resumes at the start of an epoch.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from sdzoo.errors import InputError
from sdzoo.extras import require
from sdzoo.images import open_image
from sdzoo.training.data.augment import Step, own_generators
from sdzoo.training.data.corrupt import reason, too_many
from sdzoo.training.data.streaming import Batch, Loader, collate, one_thread, transform_of
from sdzoo.training.distributed import Shard
from sdzoo.training.streams import stream, stream_seed

PICTURES = ("jpg", "jpeg", "png", "webp")
SHUFFLED = 1000  # samples that a worker keeps, still encoded, to draw the next from


@dataclass(frozen=True)
class Shards:
    """A split: its files, how many samples each holds (empty if unknown) and all together, and where labels are."""

    files: tuple[str, ...]
    lengths: tuple[int, ...]
    images: int
    classes: tuple[str, ...]
    label_key: str  # a key of the sample's json; "" if it has a .cls
    in_chans: int

    def sha256(self) -> str:
        """Return a digest of what identifies the samples: names, lengths and, on this machine, sizes of the shards."""
        sizes = [os.path.getsize(file) if os.path.isfile(file) else -1 for file in self.files]
        names = [os.path.basename(file) for file in self.files]
        return hashlib.sha256(repr((names, sizes, self.lengths, self.images, self.label_key)).encode()).hexdigest()


def open_shards(
    data_dir: str | Path, split: str, num_samples: int | None, num_classes: int | None, in_chans: int, key: str = ""
) -> Shards:
    """Return a split as timm reads it: a name in ``data_dir/_info.json``, or ``name-{0000..0009}.tar``.

    Args:
        data_dir: The folder, or address, of the shards.
        split: The split.
        num_samples: Samples in it, where ``_info.json`` does not say.
        num_classes: How many classes there are; shards do not name them.
        in_chans: Channels that the model takes.
        key: The recipe's key for ``num_samples``, where the number must be known; else it may be 0, unknown.

    Raises:
        InputError: if there is no such split, a shard is missing, or the number of samples or classes is unknown.
        MissingExtra: if webdataset is not installed.
    """
    require("webdataset")
    from timm.data.readers.reader_wds import ReaderWds

    try:
        reader = ReaderWds(str(data_dir), split=split, num_samples=num_samples)
    except Exception as error:  # a description that is not as timm's reader takes for granted
        raise InputError(
            f'split "{split}" is not in {data_dir}/_info.json ({reason(error)}); '
            "a split is a name in there, or shards such as train-{0000..0009}.tar"
        ) from None
    info = reader.split_info
    files = tuple(os.path.join(str(data_dir), file) for file in info.filenames)
    missing = [
        file for file in files if "://" not in file and not file.startswith("pipe:") and not Path(file).is_file()
    ]
    if missing or not files:
        raise InputError(f"{len(missing)} of {len(files)} shards do not exist: {', '.join(missing[:3])}")
    if key and not reader.num_samples:
        raise InputError(f'{key} is needed: {data_dir}/_info.json does not say how many samples "{split}" has')
    if not num_classes:
        raise InputError("num_classes is needed: WebDataset shards do not name their classes")
    classes = tuple(str(label) for label in range(num_classes))
    lengths = tuple(info.shard_lengths) if num_samples in (None, info.num_samples) else ()
    return Shards(files, lengths, int(reader.num_samples or 0), classes, info.alt_label, in_chans)


class _Unusable(Exception):
    """The shards cannot be used; the message goes to the main process."""


class _ShardBatches(IterableDataset[Batch]):
    """What training and evaluation share: from the bytes of a sample to its image."""

    def __init__(self, shards: Shards, steps: list[Step], shard: Shard, batch_size: int) -> None:
        self.shards, self.transform, self.shard, self.batch_size = shards, transform_of(steps), shard, batch_size

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        try:
            yield from self.batches(worker, workers)
        except _Unusable as error:
            yield collate([], {}, str(error))

    def batches(self, worker: int, workers: int) -> Iterator[Batch]:
        raise NotImplementedError

    def raw(self, file: str) -> Iterator[dict[str, Any]]:
        """Yield the samples of a shard, still encoded."""
        from webdataset.gopen import gopen
        from webdataset.tariterators import group_by_keys, tar_file_expander

        try:
            with gopen(file) as content:  # webdataset's own opener leaves closing to the garbage collector
                yield from group_by_keys(tar_file_expander([{"url": file, "stream": content}]))
        except (Exception, EOFError) as error:
            raise _Unusable(f"{file} cannot be read: {reason(error)}") from None

    def label(self, sample: dict[str, Any]) -> int | None:
        """Return a sample's label; None if it has none (timm's -1)."""
        where = f"{sample['__url__']}: {sample['__key__']}"
        try:
            label = int(json.loads(sample["json"])[self.shards.label_key] if self.shards.label_key else sample["cls"])
        except (KeyError, ValueError, TypeError) as error:
            raise _Unusable(f"{where} has no label that can be read: {reason(error)}") from None
        if label >= len(self.shards.classes):
            raise _Unusable(f"{where} is of class {label}; there are {len(self.shards.classes)}, from 0")
        return label if label >= 0 else None

    def decoded(self, sample: dict[str, Any], corrupt: dict[str, str], seed: tuple[int, int] | None) -> Any:
        """Return image, label and key of a sample; None, with a note in ``corrupt``, if it cannot be decoded."""
        name = f"{sample['__url__']}: {sample['__key__']}"
        content = next((sample[kind] for kind in PICTURES if kind in sample), None)
        label = self.label(sample)
        if label is None:
            return None
        try:
            if content is None:
                raise ValueError(f"no picture among {', '.join(PICTURES)}")
            image = open_image(_Named(content, name), self.shards.in_chans, convert=True)  # type: ignore[arg-type]
        except MemoryError:
            raise
        except Exception as error:  # as in corrupt.read
            corrupt[name] = reason(error)
            return None
        key = content_key(content)
        with own_generators() as seed_generators, one_thread():
            if seed is not None:
                seed_generators(stream_seed(seed[0], "augment", seed[1], key))
            return self.transform(image), label, key


def content_key(content: bytes) -> int:
    """Return what stands for a sample's index where there is none: a hash of its bytes."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big") >> 1


class _Named(io.BytesIO):
    """The bytes of a file, called by a name in messages."""

    def __init__(self, content: bytes, name: str) -> None:
        super().__init__(content)
        self.called = name

    def __str__(self) -> str:
        return self.called


class _TrainingShards(_ShardBatches):
    """This rank's micro-batches of an epoch: ``count`` of them, whatever the shards of each worker hold.

    A worker goes through its shards again where they run out; a corrupt image is left out for the next one.
    """

    def __init__(self, shards: Shards, steps: list[Step], shard: Shard, batch_size: int, count: int, seed: int) -> None:
        super().__init__(shards, steps, shard, batch_size)
        self.count, self.seed = count, seed
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # workers outlive an epoch

    def batches(self, worker: int, workers: int) -> Iterator[Batch]:
        epoch = int(self.epoch)
        samples = self.shuffled(epoch, self.shard.rank * workers + worker, self.shard.world * workers)
        for _ in range(worker, self.count, workers):
            corrupt: dict[str, str] = {}
            batch: list[tuple[Tensor, int, int]] = []
            missed = 0
            while len(batch) < self.batch_size and not too_many(corrupt, self.shards.images):
                taken = self.decoded(next(samples), corrupt, (self.seed, epoch))
                if taken is not None:
                    batch.append(taken)
                missed = 0 if taken else missed + 1
                if missed > self.shards.images:
                    raise _Unusable(f"{self.shards.files[0]} and others hold no sample that can be used")
            yield collate(batch, corrupt)

    def shuffled(self, epoch: int, reader: int, readers: int) -> Iterator[dict[str, Any]]:
        """Yield samples without end, from this reader's part of the epoch's order of shards."""
        order = torch.randperm(len(self.shards.files), generator=stream(self.seed, "shards", epoch)).tolist()
        draws = random.Random(stream_seed(self.seed, "shuffle", epoch, reader))
        while True:
            kept: list[dict[str, Any]] = []
            empty = True
            for index in order[reader::readers]:
                for sample in self.raw(self.shards.files[index]):
                    empty = False
                    kept.append(sample)
                    if len(kept) > SHUFFLED:
                        yield _draw(kept, draws)
            while kept:
                yield _draw(kept, draws)
            if empty:
                raise _Unusable(
                    f"{', '.join(self.shards.files[index] for index in order[reader::readers])}: no samples"
                )


def _draw(kept: list[dict[str, Any]], draws: random.Random) -> dict[str, Any]:
    chosen = draws.randrange(len(kept))
    kept[chosen], kept[-1] = kept[-1], kept[chosen]
    return kept.pop()


class _EvaluationShards(_ShardBatches):
    """All samples of the shards ``rank::world``, each once."""

    def batches(self, worker: int, workers: int) -> Iterator[Batch]:
        batch: list[tuple[Tensor, int, int]] = []
        corrupt: dict[str, str] = {}
        for file in self.shards.files[self.shard.rank :: self.shard.world][worker::workers]:
            for sample in self.raw(file):
                taken = self.decoded(sample, corrupt, None)
                if taken is not None:
                    batch.append(taken)
                if len(batch) == self.batch_size:
                    yield collate(batch, corrupt)
                    batch, corrupt = [], {}
        if batch or corrupt:
            yield collate(batch, corrupt)


def training_reader(
    shards: Shards, steps: list[Step], shard: Shard, batch_size: int, count: int, seed: int, workers: int
) -> Callable[[int], Iterator[Batch]]:
    """Return the function from an epoch to its ``count`` micro-batches of this rank.

    Raises:
        InputError: if there are fewer shards than ranks.
    """
    own = len(shards.files) // shard.world
    if not own:
        raise InputError(f"{len(shards.files)} shards for {shard.world} ranks; each rank needs one of its own")
    dataset = _TrainingShards(shards, steps, shard, batch_size, count, seed)
    loader = Loader(dataset, min(workers, own), batch_size=None)

    def read(epoch: int) -> Iterator[Batch]:
        dataset.epoch.fill_(epoch)
        yield from loader

    return read


def evaluation_reader(
    shards: Shards, steps: list[Step], shard: Shard, batch_size: int, workers: int
) -> Callable[[], Iterator[Batch]]:
    """Return the function to all samples of this rank's shards, in batches.

    It raises InputError at the end if they were not as many as announced, where that can be known.
    """
    own = len(shards.files[shard.rank :: shard.world])
    expected = sum(shards.lengths[shard.rank :: shard.world]) if shards.lengths else shards.images
    known = bool(shards.lengths) or (shard.world == 1 and shards.images > 0)
    loader = Loader(_EvaluationShards(shards, steps, shard, batch_size), min(workers, own), batch_size=None)

    def read() -> Iterator[Batch]:
        seen = 0
        for batch in loader:
            seen += len(batch.labels) + len(batch.corrupt)
            yield batch
        if known and seen != expected:
            raise InputError(f"{own} shards hold {seen} images; {expected} were announced")

    return read
