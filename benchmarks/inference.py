"""Inference of one network: sdzoo's ONNX file against eager PyTorch, the folded model, and timm's own export.

    python benchmarks/inference.py

All in ONNX Runtime or PyTorch on the CPU, each in a process of its own, in turn; a ratio is of two calls of one round.
timm's export is ``timm.utils.onnx`` with ``use_dynamo=False``: the model as it is, not folded.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import warnings
from pathlib import Path

import timm
import torch
from targets import differ, print_ratios, versions
from timm.utils.onnx import onnx_export

import sdzoo
from sdzoo.calibration import calibrate_batchnorm
from sdzoo.deploy.verification import default_images, normalised
from sdzoo.images import input_config

PAIRS = (("eager", "onnx"), ("folded-channels-last", "onnx"), ("timm-onnx", "onnx"))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sd_resnet110")
    parser.add_argument("--batch", type=int, nargs="+", default=(1, 32))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--samples", type=int, default=40)
    arguments = parser.parse_args()

    torch.manual_seed(0)
    model = timm.create_model(arguments.model).eval()
    config = input_config(model)
    pixels = default_images(config).read(range(17))
    calibrate_batchnorm(model, [normalised(pixels, config)])
    with tempfile.TemporaryDirectory() as folder:
        files = {target: Path(folder, f"{target}.pt") for target in ("eager", "folded-channels-last")}
        files |= {target: Path(folder, f"{target}.onnx") for target in ("timm-onnx", "onnx")}
        torch.save(model, files["eager"])
        torch.save(sdzoo.fold(model), files["folded-channels-last"])
        sdzoo.export_onnx(model, files["onnx"])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that exporter is deprecated
            onnx_export(copy.deepcopy(model), str(files["timm-onnx"]), use_dynamo=False)
        print(f"{arguments.model}, untrained, {arguments.threads} threads; {versions()}")
        differ(files, config, pixels.numpy(), PAIRS)
        print_ratios(files, config, PAIRS, arguments.batch, arguments.threads, arguments.samples)


if __name__ == "__main__":
    main()
