"""Training and evaluation data: which samples, decoded how, augmented how; see :mod:`sdzoo.training.data.loader`."""
