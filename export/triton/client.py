"""Print the five best labels of each picture, asked of a Triton server: ``python client.py FOLDER PICTURE...``.

Triton speaks the KServe v2 protocol: JSON that describes the tensors, then their bytes, both ways. Python's own library
can do that; with the package tritonclient the same is a call of ``InferenceServerClient.infer``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pictures import open_picture, read_card, softmax, to_array

DATATYPES = {"float32": "FP32", "uint8": "UINT8"}
LENGTH = "Inference-Header-Content-Length"


def infer(
    server: HTTPConnection, card: dict[str, Any], batch: NDArray[Any], model: str | None = None
) -> NDArray[np.float32]:
    """Return the logits ``(B, num_classes)`` of a batch, from the newest version of the model.

    Args:
        server: A connection to Triton's HTTP port, which is left open. One at a time may use it.
        card: Of the exported folder.
        batch: What :func:`to_array` gives of one or more pictures, stacked.
        model: Its name in Triton's repository; default: the card's.

    Raises:
        OSError: if the server cannot be reached, or with its own words if it refuses.
    """
    model = model or card["model"]
    tensor = {
        "name": card["input"]["name"],
        "shape": batch.shape,
        "datatype": DATATYPES[card["input"]["dtype"]],
        "parameters": {"binary_data_size": batch.nbytes},
    }
    wanted = {"name": card["output"]["name"], "parameters": {"binary_data": True}}
    header = json.dumps({"inputs": [tensor], "outputs": [wanted]}).encode()
    try:
        server.request("POST", f"/v2/models/{model}/infer", header + batch.tobytes(), {LENGTH: str(len(header))})
        response = server.getresponse()
        content = response.read()
    except (OSError, HTTPException) as error:
        server.close()  # what was half sent or read cannot be gone on with; the next request connects anew
        raise OSError(f"no answer from {server.host}:{server.port}: {str(error) or type(error).__name__}") from None
    if response.status != 200:
        reason = content.decode(errors="replace").strip()
        raise OSError(f"{server.host}:{server.port} answered {response.status}: {reason}")
    end = int(response.headers[LENGTH])
    (output,) = json.loads(content[:end])["outputs"]
    return np.frombuffer(content[end:], "<f4").reshape(output["shape"])


def classify(server: HTTPConnection, folder: Path, pictures: Sequence[str | Path], model: str | None = None) -> None:
    """Print each picture's labels with their probabilities, as many pictures a request as the model takes."""
    card = read_card(folder)
    size = card["input"]["largest_batch"]
    for start in range(0, len(pictures), size):
        some = pictures[start : start + size]
        batch = np.stack([to_array(open_picture(picture), card) for picture in some])
        for picture, probabilities in zip(some, softmax(infer(server, card, batch, model)), strict=True):
            print(picture)
            for index in np.argsort(-probabilities, kind="stable")[:5]:
                print(f"  {probabilities[index]:6.1%}  {card['labels'][index]}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description="Print the five best labels of each picture, asked of a Triton server."
    )
    parser.add_argument("folder", type=Path, help="what `sdzoo export --to triton` wrote")
    parser.add_argument("picture", nargs="+")
    parser.add_argument("--url", default="127.0.0.1:8000", help="host and HTTP port of Triton (default: %(default)s)")
    parser.add_argument("--model", help="the model's name in Triton (default: that in card.json)")
    given = parser.parse_args()
    try:
        classify(HTTPConnection(given.url, timeout=60), given.folder, given.picture, given.model)
    except (ValueError, HTTPException) as error:
        parser.exit(2, f"error: {error}\n")
    except OSError as error:
        parser.exit(1, f"error: {error}\n")
