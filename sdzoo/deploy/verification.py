"""What an export is compared on: real pictures at the model's input size, and the sizes of batch that are tried."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sdzoo.assets import pictures
from sdzoo.digest import file_sha256
from sdzoo.errors import InputError
from sdzoo.image_folder import read_image_folder
from sdzoo.images import normalise, open_image, resizer

LARGEST_BATCH = 64
BATCH_SIZES = (1, 2, 17, LARGEST_BATCH)
DIGITS = 16  # of a picture's sha256, where an int8 file says what calibrated it


@dataclass(frozen=True)
class Images:
    """Images at a model's input size, read when they are asked for.

    Attributes:
        origin: What they are, for a report.
        made: Whether they are not as a camera left them: noise, or one picture many ways.
        names: What errors call each.
        classes: The class folders that they come from, if any.
        labels: The class of each by number, None where it is not known.
        root: The folder of the files ``names``, None of pictures that are no files.
        digests: The sha256 of each file, of pictures that are no files none.
    """

    origin: str
    names: Sequence[str]
    _read: Callable[[int], NDArray[np.uint8]]
    classes: tuple[str, ...] = ()
    labels: Tensor | None = None
    made: bool = False
    root: Path | None = None
    digests: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.names)

    def read(self, indices: Sequence[int]) -> Tensor:
        """Return uint8 ``(len(indices), C, H, W)``."""
        return torch.from_numpy(np.stack([self._read(index) for index in indices]))

    def order(self) -> list[list[int]]:
        """Return which images each batch holds: of 1, 2, 17 and 64, then all that are left.

        Where there are too few for the batch of 64, they begin again with the first.
        """
        wanted = range(max(len(self), sum(BATCH_SIZES)))
        sizes = itertools.chain(BATCH_SIZES, itertools.repeat(LARGEST_BATCH))
        batches, start = [], 0
        while start < len(wanted):
            end = start + next(sizes)
            batches.append([index % len(self) for index in wanted[start:end]])
            start = end
        return batches

    def batches(self) -> Iterator[Tensor]:
        """Yield uint8 ``(B, C, H, W)``, in the order of :meth:`order`."""
        return (self.read(indices) for indices in self.order())

    def labelled_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield :meth:`batches` with the label of each image; -1 where it comes again."""
        assert self.labels is not None
        seen = 0
        for indices in self.order():
            labels = self.labels[indices]
            labels[max(0, len(self) - seen) :] = -1
            seen += len(indices)
            yield self.read(indices), labels

    def check_classes(self, labels: Sequence[str] | None, num_classes: int) -> None:
        """Check that the class folders, if any, are a model's; where it has no names, their order is its classes'.

        A model without classifier takes any.

        Raises:
            InputError: with both.
        """
        if not num_classes:
            return
        if self.classes and labels and tuple(labels) != self.classes:
            raise InputError(f"the classes of {self.origin} are {_some(self.classes)}; the model's are {_some(labels)}")
        if self.classes and len(self.classes) != num_classes:
            raise InputError(f"{self.origin} are of {len(self.classes)} classes; the model has {num_classes}")

    def name(self, position: int) -> str:
        """Return the name of the image that comes ``position``-th over :meth:`batches`."""
        return self.names[[index for batch in self.order() for index in batch][position]]


def default_images(config: dict[str, Any]) -> Images:
    """Return the ten bundled pictures eight ways each (mirrored, upside down, negative) or, where the model does not
    take colour pictures, seeded noise."""
    if config["input_size"][0] == 3:
        return _bundled(config)
    count = sum(BATCH_SIZES)
    noise = np.random.default_rng(0).integers(0, 256, (count, *config["input_size"]), dtype=np.uint8)
    return Images("seeded noise", [f"noise {index}" for index in range(count)], noise.__getitem__, made=True)


def _bundled(config: dict[str, Any]) -> Images:
    resize = resizer(config)
    plain = [(f"{label}.jpg", resize(open_image(file))) for label, file in pictures().items()]
    changed: list[tuple[str, NDArray[np.uint8]]] = []
    for negative in (False, True):
        for upside_down in (False, True):
            for mirrored in (False, True):
                words = (("mirrored", mirrored), ("upside down", upside_down), ("negative", negative))
                how = "".join(f", {word}" for word, applies in words if applies)
                for name, image in plain:
                    image = image[:, :, ::-1] if mirrored else image
                    image = image[:, ::-1] if upside_down else image
                    changed.append((name + how, 255 - image if negative else image))
    origin = f"{len(plain)} real pictures, {len(changed) // len(plain)} ways each"
    return Images(origin, [name for name, _ in changed], lambda index: changed[index][1], made=True)


def images_of(folder: str | Path, config: dict[str, Any]) -> Images:
    """Return the pictures of ``folder``, with labels if they lie in folders named by class.

    What lies there more than once counts once; what lies in two classes is left out. A warning says so.

    Raises:
        InputError: if there are no pictures, or a file cannot be read; reading a picture raises as
            :func:`sdzoo.images.open_image`.
    """
    root = Path(folder)
    found = read_image_folder(root, need_classes=False)
    same: dict[str, list[int]] = {}
    try:
        for index, name in enumerate(found.files):
            same.setdefault(file_sha256(root / name), []).append(index)
    except OSError as error:
        raise InputError(f"cannot read {error.filename}: {error.strerror}") from None
    first = {
        digest: i for digest, (i, *others) in same.items() if all(found.labels[i] == found.labels[j] for j in others)
    }
    names = tuple(found.files[index] for index in first.values())
    labels = torch.tensor(found.labels)[list(first.values())] if found.classes else None
    resize, in_chans = resizer(config), config["input_size"][0]

    def read(index: int) -> NDArray[np.uint8]:
        return resize(open_image(root / names[index], in_chans, convert=True))

    origin = f"{len(names)} pictures of {root.name}"
    contradicted = sum(len(files) for digest, files in same.items() if digest not in first)
    copies = len(found.files) - contradicted - len(names)
    kinds = ((copies, "copy" if copies == 1 else "copies"), (contradicted, "files in two classes"))
    if left_out := ", ".join(f"{count} {kind}" for count, kind in kinds if count):
        left_out = f"left out: {left_out}"
        warnings.warn(f"{root}: {left_out}", stacklevel=2)
        origin += f" ({left_out})"
    if not names:
        raise InputError(f"{root} holds nothing but copies in two classes")
    return Images(origin, names, read, found.classes, labels, root=root, digests=list(first))


def check_apart(calibration: Images, images: Images) -> None:
    """Check that none of ``images`` is one of ``calibration``, by its bytes: what calibrates must not judge.

    Raises:
        InputError: naming one that is.
    """
    judging = dict(zip(images.digests, images.names, strict=False))
    for digest, file in zip(calibration.digests, calibration.names, strict=False):
        if same := judging.get(digest):
            held = f"{calibration.root}/{file} is also {images.root}/{same}"
            raise InputError(f"{held}: calibrate on other images than judge")


def check_unseen(images: Images, calibrated_on: Collection[str], what: object) -> None:
    """Check that none of ``images`` calibrated ``what``, by the first digits of their sha256, ``calibrated_on``.

    Raises:
        InputError: naming one that did.
    """
    for name, digest in zip(images.names, images.digests if calibrated_on else (), strict=False):
        if digest[:DIGITS] in calibrated_on:
            raise InputError(f"{images.root}/{name} calibrated {what}: judge on other images than calibrated it")


def normalised(images: Tensor, config: dict[str, Any]) -> Tensor:
    """Return uint8 ``(B, C, H, W)`` as the float32 that the model takes."""
    return torch.from_numpy(normalise(images.numpy(), config))


def _some(names: Sequence[str], limit: int = 5) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
