"""What each precision promises of a file, and on which images that is judged."""

from __future__ import annotations

from numbers import Real

from sdzoo.deploy.verification import Images
from sdzoo.errors import InputError, nearest
from sdzoo.parity import Accuracy, Compute, Parity, compare, compare_accuracy

PRECISIONS = ("fp32", "fp16", "int8")  # from the strictest rule to the loosest
HALF_TOLERANCE, HALF_TOP1_PERCENT, HALF_LEAST_IMAGES = 1e-2, 99.5, 1000
INT8_LEAST_IMAGES = 200  # of fewer, one image is more than the half point below
MAX_DROP_POINTS = 0.5


def check_precision(precision: str) -> None:
    """Raise InputError unless ``precision`` is one of ``PRECISIONS``."""
    if precision not in PRECISIONS:
        raise InputError(
            f'precision "{precision}" is unknown; known: {", ".join(PRECISIONS)}{nearest(str(precision), PRECISIONS)}'
        )


def check_max_drop(points: float) -> None:
    """Raise InputError unless ``points`` of top-1 can be lost: 0 to 100."""
    if not isinstance(points, Real) or not 0 <= points <= 100:  # NaN is not
        raise InputError(f"max_drop is {points}; it is in points of top-1, 0 to 100")


def check_images(precision: str, images: Images) -> None:
    """Check that ``images`` can judge ``precision``: fp16 on at least 1000 real ones, int8 on 200 labelled ones.

    Raises:
        InputError: saying what is missing.
    """
    if precision == "fp32":
        return
    if precision == "fp16" and (len(images) < HALF_LEAST_IMAGES or images.made):
        raise InputError(
            f"fp16 is compared on at least {HALF_LEAST_IMAGES} real images (--images DIR); given are {images.origin}"
        )
    if precision == "int8" and (images.labels is None or len(images) < INT8_LEAST_IMAGES):
        raise InputError(
            f"int8 is judged by top-1, on at least {INT8_LEAST_IMAGES} images in class folders (--images DIR); "
            f"given are {images.origin}"
        )


def judge(
    reference: Compute, candidate: Compute, images: Images, precision: str, max_drop: float = MAX_DROP_POINTS
) -> Parity | Accuracy:
    """Return what shows that ``candidate`` is ``reference`` in ``precision``, both called with uint8 ``(B, C, H, W)``.

    fp32: the limit of :mod:`sdzoo.parity`. fp16: 1e-2 in place of 1e-4, and equal top-1 on 99.5 % of the images. int8:
    a loss of top-1 of at most ``max_drop`` points.

    Raises:
        InputError: as :func:`check_images` and :func:`check_max_drop`.
        ParityError: with the image, the output and the figures.
    """
    check_max_drop(max_drop)
    check_images(precision, images)
    if precision == "int8":
        return compare_accuracy(reference, candidate, images.labelled_batches(), max_drop)
    tol, top1_percent = (HALF_TOLERANCE, HALF_TOP1_PERCENT) if precision == "fp16" else (None, 0.0)
    return compare(reference, candidate, images.batches(), tol, top1_percent, images.name, len(images))
