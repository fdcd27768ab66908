"""A folder of pictures: what lies in it, in an order that is the same everywhere, and the classes that it tells."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.utils.misc import natural_key

from sdzoo.errors import InputError


@dataclass(frozen=True)
class ImageFolder:
    """Files relative to ``root``, each with the number of its class; ``classes`` is empty where there are none."""

    root: Path
    files: tuple[str, ...]
    labels: tuple[int, ...]
    classes: tuple[str, ...]


def read_image_folder(root: Path, need_classes: bool = True) -> ImageFolder:
    """Return the pictures in ``root/<class>/``, or with ``need_classes`` off also those of a folder without classes.

    Raises:
        InputError: if there is no such folder, or there are no pictures in it, or some of them are outside any class.
    """
    expected = f"expected {root}/<class>/<image>" if need_classes else f"expected pictures in {root}"
    if not root.is_dir():
        raise InputError(f"{root} is not a folder; {expected}")
    try:
        reader = ReaderImageFolder(str(root))
    except RuntimeError:
        raise InputError(f"{root} holds no images; {expected}") from None
    except ValueError as error:  # digits of other scripts, in timm's sorting
        raise InputError(f"{root} holds a name that cannot be sorted: {error}") from None
    without_classes = set(reader.class_to_idx) == {""}
    if "" in reader.class_to_idx and (need_classes or not without_classes):
        raise InputError(f"{root} holds images outside of any class; {expected}")
    # "1" and "01", or "a" and "A", are equal to timm: their order would be that of the hash seed, or the file system.
    classes = sorted(reader.class_to_idx, key=lambda name: (natural_key(name), name))
    label_of = {reader.class_to_idx[name]: label for label, name in enumerate(classes)}
    start = len(os.path.join(root, ""))
    samples = [(path[start:], label_of[label]) for path, label in reader.samples]
    samples.sort(key=lambda sample: (natural_key(sample[0]), sample[0]))
    files, labels = zip(*samples, strict=True)
    return ImageFolder(root, files, labels, () if without_classes else tuple(classes))
