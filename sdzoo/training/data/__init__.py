"""Training and evaluation data: which samples, decoded how, augmented how; see :mod:`sdzoo.training.data.loader`."""

from sdzoo.training.data.augment import normaliser, pad_crop_flip
from sdzoo.training.data.legacy import ImageSet, load_image_set, training_batches

__all__ = ["ImageSet", "load_image_set", "normaliser", "pad_crop_flip", "training_batches"]
