"""Predictors: one callable on pictures or arrays, whatever computes it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from sdzoo.deploy.onnx_export import check_described, labels_of
from sdzoo.errors import InputError
from sdzoo.fold import check_evaluation
from sdzoo.images import check_image, denormalise, input_config, normalise, open_image, resizer

Picture: TypeAlias = str | Path | Image.Image


@dataclass(frozen=True)
class Prediction:
    """One of the classes of an image; ``label`` is its number where the model has no names."""

    label: str
    probability: float


class Predictor:
    """A callable from images to logits, and what it is made of; threads may share it.

    Attributes:
        name: Of the model.
        provider: What really computes: an ONNX Runtime provider, TensorRT and its GPU, or ``PyTorch`` and the device.
        labels: Class names, or None.
        config: Input size, mean, std, interpolation, crop; of a file that does not say, the input size alone.
        precision: ``fp32``, ``fp16`` or ``int8``: what the comparison with the model that was trained allowed.
        in_graph: Whether arrays are uint8 ``(B, H, W, C)``, which the graph normalises.
        weights_sha256: Of the weights that it was exported from; None of a model or a file that does not say.
        calibrated_on: The first digits of the sha256 of each picture that calibrated what is int8; None if unknown.
    """

    def __init__(
        self,
        run: Callable[[NDArray[Any]], NDArray[np.float32]],
        name: str,
        provider: str,
        labels: list[str] | None,
        config: dict[str, Any],
        *,
        has_classes: bool = True,
        convert: bool = False,
        precision: str = "fp32",
        in_graph: bool = False,
        weights_sha256: str | None = None,
        calibrated_on: Collection[str] | None = None,
    ) -> None:
        self.has_classes = has_classes
        self.name, self.provider, self.labels, self.config = name, provider, labels, config
        self.precision, self.in_graph, self.weights_sha256 = precision, in_graph, weights_sha256
        self.calibrated_on = calibrated_on
        self._run, self._convert = run, convert
        self._resize = resizer(config) if "mean" in config else None

    def __call__(self, images: Picture | Sequence[Picture] | NDArray[Any]) -> NDArray[np.float32]:
        """Return logits ``(B, num_classes)``.

        Args:
            images: A picture or several (files or PIL images), resized, cropped and normalised as the model wants it;
                or an array: float ``(B, C, H, W)``, normalised already, or with ``in_graph`` uint8 ``(B, H, W, C)``.

        Raises:
            InputError: if a picture cannot be used, an array is of another shape or type, or what the model computes is
                not finite.
        """
        if isinstance(images, np.ndarray):
            return self._finite(self._run(self._checked(images)))
        pictures = [images] if isinstance(images, (str, Path, Image.Image)) else images
        if not isinstance(pictures, (list, tuple)) or not all(
            isinstance(p, (str, Path, Image.Image)) for p in pictures
        ):
            raise InputError("images are a picture (file or PIL image), a list of pictures, or one NumPy array")
        if not pictures:
            raise InputError("no images given")
        if self._resize is None:
            raise InputError(f"{self.name} does not say how pictures are resized and normalised: give it arrays")
        return self._finite(self.pixels(np.stack([self._resize(self._opened(picture)) for picture in pictures])))

    def pixels(self, images: NDArray[np.uint8], config: dict[str, Any] | None = None) -> NDArray[np.float32]:
        """Return logits ``(B, num_classes)`` for uint8 ``(B, C, H, W)`` at the model's input size, also if not finite.

        Args:
            images: Pictures, resized and cropped.
            config: By what they are normalised where the graph does not; default: the predictor's own.
        """
        if self.in_graph:
            return self._run(np.ascontiguousarray(images.transpose(0, 2, 3, 1)))
        return self._run(normalise(images, config or self.config))

    def normalised(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return logits for normalised ``(B, C, H, W)``, of whose pixels a graph that normalises is given."""
        return self._finite(self.pixels(denormalise(images, self.config))) if self.in_graph else self(images)

    def warmup(self, batch_size: int = 1, runs: int = 3) -> None:
        """Compute ``runs`` batches of zeros, so that the first real one does not wait for what is set up late."""
        channels, height, width = (size or 32 for size in self.config["input_size"])
        shape = (batch_size, height, width, channels) if self.in_graph else (batch_size, channels, height, width)
        for _ in range(runs):
            self._run(np.zeros(shape, np.uint8 if self.in_graph else np.float32))

    def _finite(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        if not np.isfinite(logits).all():
            raise InputError(f"{self.name} gives values that are not finite: its weights are damaged or untrained")
        return logits

    def top(self, images: Picture | Sequence[Picture] | NDArray[Any], k: int = 5) -> list[list[Prediction]]:
        """Return the ``k`` most probable classes of each image, best first.

        Raises:
            InputError: if ``k`` is below 1, or the model has no classifier; and as calling it does.
        """
        if k < 1:
            raise InputError(f"k is {k}; at least 1")
        if not self.has_classes:
            raise InputError(f"{self.name} has no classifier: it gives features, not classes")
        logits = self(images).astype(np.float64)
        odds = np.exp(logits - logits.max(axis=1, keepdims=True))
        probabilities = odds / odds.sum(axis=1, keepdims=True)
        names = self.labels or [str(index) for index in range(logits.shape[1])]
        best = np.argsort(-probabilities, axis=1, kind="stable")[:, :k]
        return [
            [Prediction(names[i], float(row[i])) for i in indices]
            for row, indices in zip(probabilities, best, strict=True)
        ]

    def _opened(self, picture: Picture) -> Image.Image:
        in_chans = self.config["input_size"][0]
        if isinstance(picture, Image.Image):
            return check_image(picture, in_chans, self._convert)
        return open_image(picture, in_chans, self._convert)

    def _checked(self, array: NDArray[Any]) -> NDArray[Any]:
        channels, height, width = self.config["input_size"]
        wanted = (height, width, channels) if self.in_graph else (channels, height, width)
        fits = array.ndim == 4 and all(w in (None, got) for w, got in zip(wanted, array.shape[1:], strict=True))
        if not fits or not len(array):
            raise InputError(
                f"the array is {array.shape}; {self.name} takes (batch, {', '.join(str(w or 'any') for w in wanted)})"
            )
        if self.in_graph:
            if array.dtype != np.uint8:
                raise InputError(f"the array is {array.dtype}; {self.name} normalises itself: give uint8, or pictures")
            return np.ascontiguousarray(array)
        if not np.issubdtype(array.dtype, np.floating):
            raise InputError(f"the array is {array.dtype}; give normalised floats, or pictures")
        with np.errstate(over="ignore"):
            images = np.ascontiguousarray(array, dtype=np.float32)
        if not np.isfinite(images).all():
            raise InputError("the array holds values that are not finite")
        return images


def model_predictor(model: nn.Module, convert: bool = False) -> Predictor:
    """Return a predictor that computes ``model``, in evaluation, where its weights are.

    Raises:
        InputError: if the model is in training mode, or not one of timm's.
    """
    check_evaluation(model)
    check_described(model)
    like = next(model.parameters())

    @torch.inference_mode()
    def run(batch: NDArray[np.float32]) -> NDArray[np.float32]:
        return model(torch.from_numpy(batch).to(like.device, like.dtype)).float().cpu().numpy()

    name = model.pretrained_cfg.get("architecture") or type(model).__name__  # type: ignore[union-attr]
    return Predictor(
        run,
        name,
        f"PyTorch {like.device.type}",
        labels_of(model),
        input_config(model),
        has_classes=bool(model.num_classes),
        convert=convert,
    )
