"""Int8 (CPU preset) against fp32, both ONNX Runtime on the CPU.

    python benchmarks/quantised.py --calibration DIR

The network is untrained, its BatchNorms calibrated: its accuracy is that of chance, so the rule by which an int8 export
is refused says nothing of it. It is quantised by ``sdzoo.deploy.quantize`` directly, and the figure is one of speed
alone. DIR holds at least 256 pictures of any kind and size.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import timm
import torch
from targets import print_ratios, versions

import sdzoo
from sdzoo.calibration import calibrate_batchnorm
from sdzoo.deploy.onnx_graph import onnx_graph
from sdzoo.deploy.quantize import LEAST_IMAGES, quantize
from sdzoo.deploy.verification import Images, images_of, normalised
from sdzoo.errors import InputError
from sdzoo.images import input_config


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sd_resnet50")
    parser.add_argument("--calibration", type=Path, required=True, metavar="DIR")
    parser.add_argument("--batch", type=int, nargs="+", default=(1, 8))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--samples", type=int, default=30)
    arguments = parser.parse_args()

    torch.manual_seed(0)
    model = timm.create_model(arguments.model).eval()
    config = input_config(model)
    try:
        pictures = images_of(arguments.calibration, config)
    except InputError as error:
        parser.error(str(error))
    if len(pictures) < LEAST_IMAGES:
        parser.error(f"{arguments.calibration} holds {len(pictures)} pictures; at least {LEAST_IMAGES}")
    first = next(batches(pictures))
    calibrate_batchnorm(model, [normalised(first, config)])
    graph = onnx_graph(sdzoo.fold(model), config["input_size"], "logits")
    int8 = quantize(graph, "cpu", (normalised(batch, config).numpy() for batch in batches(pictures)))
    with tempfile.TemporaryDirectory() as folder:
        files = {"fp32": Path(folder, "fp32.onnx"), "int8": Path(folder, "int8.onnx")}
        sdzoo.export_onnx(model, files["fp32"])
        onnx.save(int8, str(files["int8"]))
        size = " x ".join(map(str, config["input_size"]))
        print(f"{arguments.model}, {size}, untrained, {arguments.threads} threads; {versions()}")
        print(", ".join(f"{name} {file.stat().st_size / 1e6:.1f} MB" for name, file in files.items()))
        print_ratios(files, config, [("fp32", "int8")], arguments.batch, arguments.threads, arguments.samples)


def batches(pictures: Images) -> Iterator[torch.Tensor]:
    """Yield 256 pictures, evenly spread, as uint8 ``(32, C, H, W)``."""
    chosen = np.linspace(0, len(pictures) - 1, LEAST_IMAGES).round().astype(int).tolist()
    for start in range(0, LEAST_IMAGES, 32):
        yield pictures.read(chosen[start : start + 32])


if __name__ == "__main__":
    main()
