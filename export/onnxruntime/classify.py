"""Print the five best labels of each picture: ``python classify.py FOLDER PICTURE...``."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np
from pictures import open_picture, read_card, softmax, to_array

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read at the import
import onnxruntime


def classify(folder: Path, pictures: list[str]) -> None:
    """Print each picture's labels with their probabilities, computed by the model in ``folder``."""
    card = read_card(folder)
    if not card["file"].endswith(".onnx"):
        raise ValueError(f"{folder} holds {card['file']}; this kit runs what `sdzoo export --to onnx` wrote")
    session = onnxruntime.InferenceSession(folder / card["file"], providers=["CPUExecutionProvider"])
    for picture in pictures:
        batch = to_array(open_picture(picture), card)[np.newaxis]
        (logits,) = np.asarray(session.run([card["output"]["name"]], {card["input"]["name"]: batch})[0])
        probabilities = softmax(logits)
        print(picture)
        for index in np.argsort(-probabilities, kind="stable")[:5]:
            print(f"  {probabilities[index]:6.1%}  {card['labels'][index]}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Print the five best labels of each picture.")
    parser.add_argument("folder", type=Path, help="what `sdzoo export --to onnx` wrote")
    parser.add_argument("picture", nargs="+")
    given = parser.parse_args()
    try:
        classify(given.folder, given.picture)
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")
