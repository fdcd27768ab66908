"""How long the graph of a folded network takes: sdzoo's writer against torch's two exporters, same file contents.

    python benchmarks/export_time.py --model sd_resnet1202 --rounds 1

sdzoo's time includes folding, verification in ONNX Runtime on 20 images, and writing; torch's is the export alone.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from interleaved import hardware, interleave

import sdzoo
from sdzoo.calibration import calibrate_batchnorm
from sdzoo.images import input_config


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sd_resnet110")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=("sdzoo",), help="leave torch's exporters out")
    arguments = parser.parse_args()

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.manual_seed(0)
    model = timm.create_model(arguments.model).eval()
    size = input_config(model)["input_size"]
    calibrate_batchnorm(model, [torch.randn(32, *size)])
    folded, images = sdzoo.fold(model), torch.randn(2, *size)

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"

        def by_torch(dynamo: bool) -> None:
            options: dict[str, Any] = (
                {"dynamic_shapes": ({0: "batch"},)} if dynamo else {"dynamic_axes": {"images": {0: "batch"}}}
            )
            options |= {"external_data": False, "verbose": False} if dynamo else {}
            torch.onnx.export(folded, (images,), file, dynamo=dynamo, input_names=["images"], **options)

        candidates: dict[str, Callable[[], object]] = {
            "sdzoo, with folding and verification": lambda: sdzoo.export_onnx(model, file)
        }
        if not arguments.only:
            candidates["torch, dynamo=True, unverified"] = lambda: by_torch(True)
            candidates["torch, dynamo=False (deprecated), unverified"] = lambda: by_torch(False)
        seconds = interleave(candidates, arguments.rounds)
    print(f"{arguments.model}; {hardware()}, {torch.get_num_threads()} threads")
    for name, samples in seconds.items():
        print(f"{name:<46} median {statistics.median(samples):6.2f} s of {len(samples)}")


if __name__ == "__main__":
    main()
