"""A folder that ``sdzoo export --to onnx`` wrote, checked against its card and run by ONNX Runtime."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pictures import read_card, softmax

TENSOR_TYPES = {"float32": "tensor(float)", "uint8": "tensor(uint8)"}


def checked_card(folder: str | Path) -> dict[str, Any]:
    """Return the card of ``folder`` with its labels; every file has been compared with the sha256 in it.

    Raises:
        ValueError: in one sentence, if the folder is not an undamaged export for ONNX Runtime.
    """
    card = read_card(folder)
    if not card["file"].endswith(".onnx"):
        raise ValueError(f"{folder} holds {card['file']}; this kit serves what `sdzoo export --to onnx` wrote")
    return card


class Model:
    """An exported model.

    Attributes:
        card: What ``sdzoo export`` wrote about it, with its labels.
        input_shape: Of one image, as the graph takes it: ``(C, H, W)``, or ``(H, W, C)`` with in-graph preprocessing.
        dtype: ``float32``, or ``uint8`` with in-graph preprocessing.
    """

    def __init__(self, folder: str | Path, threads: int) -> None:
        """Load ``folder`` to compute with ``threads`` threads.

        Raises:
            ValueError: if it is not an undamaged export whose graph is the one that its card describes.
        """
        os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read at the import; the function of that name is too late
        import onnxruntime

        self.card = checked_card(folder)
        self.input_shape = tuple(self.card["input"]["shape"][1:])
        self.dtype = np.dtype(self.card["input"]["dtype"])
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        path = str(Path(folder) / self.card["file"])
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        found = [(v.name, v.type, *v.shape[1:]) for v in (*self._session.get_inputs(), *self._session.get_outputs())]
        stated = [
            (self.card["input"]["name"], TENSOR_TYPES[self.dtype.name], *self.input_shape),
            (self.card["output"]["name"], TENSOR_TYPES["float32"], len(self.card["labels"])),
        ]
        if found != stated:
            raise ValueError(f"{path} computes {found}; card.json and labels.json say {stated}")

    def run(self, images: NDArray[Any]) -> NDArray[np.float32]:
        """Return the logits ``(B, num_classes)`` of ``images`` ``(B, *input_shape)``."""
        logits = self._session.run([self.card["output"]["name"]], {self.card["input"]["name"]: images})[0]
        return np.asarray(logits)

    def top(self, logits: NDArray[np.float32], k: int) -> list[dict[str, Any]]:
        """Return label and probability of the ``k`` largest of ``logits`` ``(num_classes,)``, best first."""
        probabilities = softmax(logits)
        best = np.argsort(-logits, kind="stable")[:k]
        return [{"label": self.card["labels"][i], "probability": float(probabilities[i])} for i in best]
