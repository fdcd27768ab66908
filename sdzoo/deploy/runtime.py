"""Predictors: one callable on pictures or arrays, whether a PyTorch model or an ONNX file computes it."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from sdzoo.deploy.onnx_export import labels_of
from sdzoo.description import check_description
from sdzoo.digest import seal_holds
from sdzoo.errors import InputError, nearest
from sdzoo.extras import require
from sdzoo.fold import check_evaluation
from sdzoo.images import check_image, input_config, normalise, open_image, resizer

Picture: TypeAlias = str | Path | Image.Image
PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
METADATA = (
    "model",
    "input_size",
    "mean",
    "std",
    "interpolation",
    "crop_pct",
    "crop_mode",
    "labels",
    "survival_probs",
    "file_sha256",
)


@dataclass(frozen=True)
class Prediction:
    """One of the classes of an image; ``label`` is its number where the model has no names."""

    label: str
    probability: float


class Predictor:
    """A callable from images to logits, and what it is made of.

    Attributes:
        name: Of the model.
        provider: What really computes: an ONNX Runtime provider, or ``PyTorch`` and the device.
        labels: Class names, or None.
        config: Input size, mean, std, interpolation, crop.
    """

    def __init__(
        self,
        run: Callable[[NDArray[np.float32]], NDArray[np.float32]],
        name: str,
        provider: str,
        labels: list[str] | None,
        config: dict[str, Any],
        has_classes: bool = True,
        convert: bool = False,
    ) -> None:
        self.has_classes = has_classes
        self.name, self.provider, self.labels, self.config = name, provider, labels, config
        self._run, self._convert, self._resize = run, convert, resizer(config)

    def __call__(self, images: Picture | Sequence[Picture] | NDArray[Any]) -> NDArray[np.float32]:
        """Return logits ``(B, num_classes)``.

        Args:
            images: A picture or several (files or PIL images), resized, cropped and normalised as the model wants it;
                or a float array ``(B, C, H, W)``, normalised already.

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
        arrays = np.stack([self._resize(self._opened(picture)) for picture in pictures])
        return self._finite(self._run(normalise(arrays, self.config)))

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

    def _checked(self, array: NDArray[Any]) -> NDArray[np.float32]:
        wanted = tuple(self.config["input_size"])
        if array.ndim != 4 or array.shape[1:] != wanted or not len(array):
            raise InputError(f"the array is {array.shape}; {self.name} takes (batch, {', '.join(map(str, wanted))})")
        if not np.issubdtype(array.dtype, np.floating):
            raise InputError(f"the array is {array.dtype}; give normalised floats, or pictures")
        if not np.isfinite(array).all():
            raise InputError("the array holds values that are not finite")
        return np.ascontiguousarray(array, dtype=np.float32)


def model_predictor(model: nn.Module, convert: bool = False) -> Predictor:
    """Return a predictor that computes ``model``, in evaluation, where its weights are.

    Raises:
        InputError: if the model is in training mode.
    """
    check_evaluation(model)
    like = next(model.parameters())

    @torch.inference_mode()
    def run(batch: NDArray[np.float32]) -> NDArray[np.float32]:
        return model(torch.from_numpy(batch).to(like.device, like.dtype)).float().cpu().numpy()

    name = model.pretrained_cfg.get("architecture") or type(model).__name__  # type: ignore[union-attr]
    has_classes = bool(model.num_classes)
    return Predictor(
        run, name, f"PyTorch {like.device.type}", labels_of(model), input_config(model), has_classes, convert
    )


def load_predictor(
    path: str | Path, provider: str = "auto", threads: int | None = None, convert: bool = False
) -> Predictor:
    """Return a predictor for an ONNX file that sdzoo exported.

    Args:
        path: The file.
        provider: ``cpu``, ``cuda``, ``tensorrt`` or ONNX Runtime's own name: that one or an error. ``auto``: CUDA if it
            really runs, else the CPU, with a warning if CUDA was installed but could not be had.
        threads: Threads within one operator; default: ONNX Runtime's choice.
        convert: Convert pictures of another colour mode instead of refusing them.

    Raises:
        InputError: if the file is missing, damaged or not sdzoo's, or the provider cannot be had.
        ImportError: without the extra ``onnx``.
    """
    require("onnxruntime")
    if not Path(path).is_file():
        raise InputError(f"{path} does not exist")
    if threads is not None:
        check_threads(threads)
    session = _session(path, provider, threads)
    metadata = _metadata(session, path)
    inputs, outputs = session.get_inputs(), session.get_outputs()
    fed = [(i.type, isinstance(i.shape[0], str), i.shape[1:]) for i in inputs if i.shape]
    if fed != [("tensor(float)", True, metadata["input_size"])]:
        got = ", ".join(f"{i.type} {i.shape}" for i in inputs) or "nothing"
        raise InputError(f"{path} takes {got}; its metadata say float (batch, {metadata['input_size']})")
    output = outputs[0].name

    def run(batch: NDArray[np.float32]) -> NDArray[np.float32]:
        return session.run([output], {inputs[0].name: batch})[0]

    config = {name: tuple(value) if isinstance(value, list) else value for name, value in metadata.items()}
    has_classes = output == "logits"
    return Predictor(
        run, metadata["model"], session.get_providers()[0], metadata["labels"], config, has_classes, convert
    )


def check_threads(threads: int) -> None:
    """Check a number of threads: more than a few a core only wait for each other, very many bring the process down.

    Raises:
        InputError: if it is below 1 or above four a core.
    """
    most = 4 * (os.cpu_count() or 1)
    if not 1 <= threads <= most:
        raise InputError(f"threads is {threads}; on this machine 1 to {most}")


def _session(path: str | Path, provider: str, threads: int | None) -> Any:
    import onnxruntime

    compiled = onnxruntime.get_available_providers()
    known = {**PROVIDERS, **{name: name for name in onnxruntime.get_all_providers()}}
    if provider != "auto" and provider not in known:
        raise InputError(
            f'provider "{provider}" is unknown; known: auto, {", ".join(PROVIDERS)}{nearest(provider, known)}'
        )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what went wrong is raised; ONNX Runtime would also print it
    if threads:
        options.intra_op_num_threads = threads
    wanted = [name for name in (PROVIDERS["cuda"], PROVIDERS["cpu"]) if name in compiled]
    if provider != "auto":
        wanted = [known[provider]]
        if wanted[0] not in compiled:
            raise InputError(f"{wanted[0]} is not in the installed onnxruntime; it has {', '.join(compiled)}")
        if wanted[0] != PROVIDERS["cpu"]:
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    if wanted[0] != PROVIDERS["cpu"]:
        onnxruntime.preload_dlls()
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=wanted, enable_fallback=0)
    except Exception as error:  # onnxruntime's own classes derive from Exception alone
        reason = " ".join(str(error).split())
        raise InputError(f"{path} is no whole ONNX file, or {wanted[0]} cannot run it: {reason}") from None
    got = session.get_providers()[0]
    if got != wanted[0]:
        if provider != "auto":
            raise InputError(f"asked for {wanted[0]}, but this machine can only run {got}")
        warnings.warn(f"{wanted[0]} is installed but does not run here; using {got}", stacklevel=3)
    return session


def _metadata(session: Any, path: str | Path) -> dict[str, Any]:
    try:
        stored = session.get_modelmeta().custom_metadata_map
        if missing := [name for name in METADATA if name not in stored]:
            raise InputError(f"was not exported by sdzoo: its metadata lack {', '.join(missing)}")
        metadata = {name: json.loads(stored[name]) for name in METADATA}
        shape = session.get_outputs()[0].shape
        check_description(metadata | {"arch": metadata["model"], "num_classes": shape[1] if len(shape) == 2 else 0})
        if not seal_holds(Path(path).read_bytes(), str(metadata["file_sha256"])):
            raise InputError("is damaged: its sha256 is not the one in its metadata")
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except (ValueError, RecursionError):  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise InputError(f"{path} is damaged: its metadata cannot be read") from None
    return metadata
