"""Inference of one network: ONNX Runtime and the folded model against eager PyTorch.

    python benchmarks/inference.py

Each target lives in a process of its own, so that none pays for the spinning threads or the heap of another; the
processes take turns, and each calls once uncounted before it is timed.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import timm
import torch
from interleaved import hardware, ratio

import sdzoo
from sdzoo.calibration import calibrate_batchnorm
from sdzoo.deploy.predictor import model_predictor
from sdzoo.images import input_config

TARGETS = ("PyTorch eager", "PyTorch folded", "ONNX Runtime")


def serve(target: str, name: str, folder: Path, threads: int, connection: Connection) -> None:
    """Answer each batch size with the seconds of one call, until told to stop by None."""
    torch.set_num_threads(threads)
    if target == "ONNX Runtime":
        predictor = sdzoo.load_predictor(folder / "model.onnx", "cpu", threads=threads)
    else:
        model = timm.create_model(name, pretrained_cfg_overlay={"file": str(folder / "model.pth")}, pretrained=True)
        predictor = model_predictor(sdzoo.fold(model.eval()) if target == "PyTorch folded" else model.eval())
    connection.send(predictor.provider)
    while (batch := connection.recv()) is not None:
        images = np.random.default_rng(0).standard_normal((batch, *predictor.config["input_size"]), dtype=np.float32)
        predictor(images)
        started = time.perf_counter()
        predictor(images)
        connection.send(time.perf_counter() - started)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sd_resnet110")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=21)
    arguments = parser.parse_args()

    torch.manual_seed(0)
    model = timm.create_model(arguments.model).eval()
    calibrate_batchnorm(model, [torch.randn(32, *input_config(model)["input_size"])])
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.save(model.state_dict(), folder / "model.pth")
        sdzoo.export_onnx(model, folder / "model.onnx")
        connections: dict[str, Connection] = {}
        for target in TARGETS:
            connections[target], theirs = context.Pipe()
            given = (target, arguments.model, folder, arguments.threads, theirs)
            context.Process(target=serve, args=given, daemon=True).start()
        providers = {target: connection.recv() for target, connection in connections.items()}
        print(f"{arguments.model}; {hardware()}, {arguments.threads} threads; against eager PyTorch")
        for batch in (1, 32):
            seconds: dict[str, list[float]] = {target: [] for target in TARGETS}
            for index in range(arguments.rounds + 1):
                for target, connection in connections.items():
                    connection.send(batch)
                    took = connection.recv()
                    if index:
                        seconds[target].append(took)
            for target in TARGETS:
                median_ms = 1000 * statistics.median(seconds[target])
                faster = ratio(seconds, TARGETS[0], target)
                print(f"batch {batch:>2} {target:<15} {providers[target]:<21} {median_ms:8.2f} ms, faster by {faster}")
        for connection in connections.values():
            connection.send(None)


if __name__ == "__main__":
    main()
