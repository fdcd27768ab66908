"""What data sets and their splits are called, in recipes and on the command line: timm's names."""

from __future__ import annotations

FOLDER = ""  # data_dir/split/<class>/*
IMAGENET = "torch/imagenet"
# Of these timm reads every split but train as the test set: there is none for validation.
IN_TWO = ("torch/cifar10", "torch/cifar100", "torch/svhn")
WEB_PREFIX = "wds/"
DATASETS = (FOLDER, *IN_TWO, IMAGENET, WEB_PREFIX + "...")
# timm takes these for one another; unlike timm, nothing here falls back to the whole of data_dir
SYNONYMS = (("train", "training"), ("val", "valid", "validation", "eval", "evaluation"))


def is_known(dataset: str) -> bool:
    """Return whether there is such a data set."""
    return dataset in DATASETS[:-1] or in_shards(dataset)


def in_shards(dataset: str) -> bool:
    """Return whether a data set is read from WebDataset shards, end to end."""
    return dataset.startswith(WEB_PREFIX)


def known_datasets() -> str:
    """Return the names of all data sets, as messages list them."""
    return ", ".join(['"" (a folder of class folders)', *DATASETS[1:]])


def same_split(one: str, other: str) -> bool:
    """Return whether two names may stand for the same split, as ``train`` and ``training`` do."""
    return other in synonyms(one)


def synonyms(split: str) -> tuple[str, ...]:
    """Return the names that may stand for ``split``, itself first."""
    return (split, *next((group for group in SYNONYMS if split in group), ()))
