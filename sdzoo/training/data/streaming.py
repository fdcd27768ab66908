"""Samples decoded and augmented one by one, in worker processes that do not change the result."""

from __future__ import annotations

import os
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from PIL import Image
from timm.data.transforms import MaybePILToTensor
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import Compose

from sdzoo.training.data.augment import Step, own_generators
from sdzoo.training.data.corrupt import CorruptImage, read, read_or_substitute
from sdzoo.training.data.sources import Source
from sdzoo.training.distributed import LostProcess
from sdzoo.training.streams import stream_seed


class Batch(NamedTuple):
    """What a worker hands over; samples that could not be read are missing from the tensors."""

    images: Tensor  # (B, C, H, W) uint8
    labels: Tensor  # (B,) int64
    keys: Tensor  # (B,) int64: what the sample's augmentation follows from
    corrupt: dict[str, str]  # name -> reason
    fault: str = ""  # what makes the data set unusable; workers cannot raise without a traceback


def transform_of(steps: list[Step]) -> Callable[[Image.Image], Tensor]:
    """Return the function from a PIL image through ``steps`` to a uint8 tensor ``(C, H, W)``."""
    return Compose([*steps, MaybePILToTensor()])  # type: ignore[return-value]


def collate(samples: list[tuple[Tensor, int, int]], corrupt: dict[str, str], fault: str = "") -> Batch:
    """Return a batch of ``(image, label, key)``, which may be none."""
    images = torch.stack([image for image, _, _ in samples]) if samples else torch.empty(0, dtype=torch.uint8)
    labels, keys = (torch.tensor([sample[part] for sample in samples], dtype=torch.int64) for part in (1, 2))
    return Batch(images, labels, keys, corrupt, fault)


class Samples(Dataset[Batch]):
    """Batches by the epoch and the indices of their samples.

    Args:
        source: Where pictures and labels come from.
        steps: What each picture goes through; their random numbers follow from seed, epoch and index.
        seed: The run's; None leaves corrupt images out, where training substitutes them.
    """

    def __init__(self, source: Source, steps: list[Step], seed: int | None) -> None:
        self.source, self.transform, self.seed = source, transform_of(steps), seed

    def __getitems__(self, items: list[tuple[int, int]]) -> Batch:
        samples: list[tuple[Tensor, int, int]] = []
        corrupt: dict[str, str] = {}
        with own_generators() as seed_generators, one_thread():
            for epoch, index in items:
                try:
                    if self.seed is None:
                        image, taken = read(self.source, index), index
                    else:
                        image, taken = read_or_substitute(self.source, index, self.seed, corrupt)
                        seed_generators(stream_seed(self.seed, "augment", epoch, index))
                except CorruptImage as error:
                    corrupt[error.name] = error.reason
                else:
                    samples.append((self.transform(image), int(self.source.labels[taken]), index))
        return collate(samples, corrupt)


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute in one thread, as workers do: a blur in several may round otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Loader:
    """A DataLoader that hands on what the data set yields; its workers live as long as this does, and no longer."""

    def __init__(self, dataset: Dataset[Any], workers: int = 0, pin: bool = False, **options: Any) -> None:
        with _no_advice():
            self.loader: DataLoader[Any] = DataLoader(
                dataset,
                num_workers=workers,
                pin_memory=pin and torch.cuda.is_available(),
                persistent_workers=workers > 0,
                collate_fn=_as_it_is,
                worker_init_fn=_start_worker,
                generator=torch.Generator(),  # not the global one: drawing a seed for workers would advance it
                **options,
            )
        # Left to the garbage collector, which closes its queues first, a loader waits 5 s for each of its workers.
        weakref.finalize(self, _end_workers, self.loader, os.getpid())

    def __iter__(self) -> Iterator[Any]:
        try:
            with _no_advice():
                batches = iter(self.loader)
            yield from batches
        except (ConnectionError, EOFError) as error:
            if "in DataLoader worker" in str(error):  # one that its reading raised, not the pipe from it
                raise
            raise RuntimeError("a DataLoader worker is gone") from error


@contextmanager
def _no_advice() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*suggested max number of worker")  # the recipe says how many
        yield


def _as_it_is(batch: Any) -> Any:
    return batch


def _start_worker(_: int) -> None:
    # A signal to the run's process group, such as Ctrl-C, is for the run to answer: it still needs its workers.
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)


@contextmanager
def lost_workers_named() -> Iterator[None]:
    """Turn what torch says of a worker that was killed, wherever the run was then, into :class:`LostProcess`."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise LostProcess(
            "a process that reads the data was killed, as happens where memory runs out (recipe: workers)"
        ) from None


def _end_workers(loader: DataLoader[Any], owner: int) -> None:
    end = getattr(loader._iterator, "_shutdown_workers", None)
    if end and os.getpid() == owner:  # and not a worker, whose memory began as a copy
        end()


class Stream:
    """The batches of :class:`Samples`, read ahead by workers."""

    def __init__(self, samples: Samples, workers: int = 0, pin: bool = False) -> None:
        self.plan = _Plan()
        self.loader = Loader(samples, workers, pin, batch_sampler=self.plan)

    def batches(self, epoch: int, indices: Iterable[Tensor]) -> Iterator[Batch]:
        """Yield the batch of each tensor of indices, in their order."""
        self.plan.items = ([(epoch, index) for index in batch.tolist()] for batch in indices)
        yield from self.loader


class _Plan:
    """What the loader is to read next: an iterable of lists of items."""

    items: Iterable[list[tuple[int, int]]] = ()

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return iter(self.items)
