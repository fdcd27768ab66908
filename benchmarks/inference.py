"""Inference of one network: ONNX Runtime and the folded model against eager PyTorch.

python benchmarks/inference.py
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import timm
import torch
from interleaved import hardware, interleave, ratio

import sdzoo
from sdzoo.calibration import calibrate_batchnorm
from sdzoo.deploy.runtime import model_predictor
from sdzoo.images import input_config


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sd_resnet110")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=21)
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    model = timm.create_model(arguments.model).eval()
    size = input_config(model)["input_size"]
    calibrate_batchnorm(model, [torch.randn(32, *size)])
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        sdzoo.export_onnx(model, file)
        predictors = {
            "PyTorch eager": model_predictor(model),
            "PyTorch folded": model_predictor(sdzoo.fold(model)),
            "ONNX Runtime": sdzoo.load_predictor(file, "cpu", threads=arguments.threads),
        }
    print(f"{arguments.model}; {hardware()}, {arguments.threads} threads; against eager PyTorch")
    for batch in (1, 32):
        images = np.random.default_rng(0).standard_normal((batch, *size), dtype=np.float32)
        calls = {name: partial(predictor, images) for name, predictor in predictors.items()}
        seconds = interleave(calls, arguments.rounds)
        for name, predictor in predictors.items():
            median_ms = 1000 * statistics.median(seconds[name])
            eager = ratio(seconds, "PyTorch eager", name)
            print(f"batch {batch:>2} {name:<15} {predictor.provider:<21} {median_ms:8.2f} ms, faster by {eager}")


if __name__ == "__main__":
    main()
