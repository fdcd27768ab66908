"""Pictures for the tests of deployment, and what they must give, computed without sdzoo's help."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from PIL import Image

from sdzoo.assets import pictures

FILES = list(pictures().values())
LABELS = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
MEAN, STD = np.array([0.4914, 0.4822, 0.4465]), np.array([0.2470, 0.2435, 0.2616])


def normalised(*files: Path) -> NDArray[np.float32]:
    """Return 32-pixel pictures as the bundled models want them: ``(B, 3, 32, 32)``."""
    return normalised_pixels(np.stack([np.asarray(Image.open(file)) for file in files]))


def normalised_pixels(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return uint8 ``(B, H, W, 3)`` as float32 ``(B, 3, H, W)``."""
    return ((pixels / 255 - MEAN) / STD).transpose(0, 3, 1, 2).astype(np.float32)


def equal(reference: NDArray[Any], other: NDArray[Any], tol: float = 1e-4) -> None:
    """Assert the limit that parity has."""
    assert reference.shape == other.shape
    assert np.abs(reference - other).max() <= tol * max(1, np.abs(reference).max())


def onnx_outputs(path: Path, array: NDArray[Any]) -> NDArray[np.float32]:
    """Return what ONNX Runtime computes from the file at ``path``."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (entry,) = session.get_inputs()
    (output,) = session.run(None, {entry.name: array})
    return np.asarray(output)


def chain(proto: onnx.ModelProto, length: int) -> list[str]:
    """Return the kinds of the first ``length`` nodes that work on the input, one after the other."""
    kinds, name = list[str](), proto.graph.input[0].name
    for _ in range(length):
        (node,) = (node for node in proto.graph.node if node.input[0] == name)
        kinds.append(node.op_type)
        name = node.output[0]
    return kinds


def blots(count: int, seed: int) -> NDArray[np.uint8]:
    """Return random coloured blots ``(count, 32, 32, 3)``, on which a net differs more than on noise."""
    small = np.random.default_rng(seed).integers(0, 256, (count, 4, 4, 3), np.uint8)
    return np.stack([np.asarray(Image.fromarray(one).resize((32, 32), Image.Resampling.BICUBIC)) for one in small])


def tree(folder: Path) -> dict[str, bytes]:
    """Return every file under ``folder``, hidden ones too, by its path relative to it."""
    files = (Path(root, name) for root, _, names in os.walk(folder) for name in names)
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}
