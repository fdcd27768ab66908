"""Triton asked by 64 clients against ONNX Runtime called in a loop of single images: images a second of both.

    .venv-triton/bin/python benchmarks/serving_triton.py

Needs what export/triton/requirements.txt names. The server is the kit's, with the python backend; the clients are
threads that each keep one connection and send one image a request. Clients, server and loop have the same cores.
"""

from __future__ import annotations

import argparse
import importlib
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path

import numpy as np
import onnxruntime
import timm
import torch
from interleaved import hardware, interleave, ratio

import sdzoo
from sdzoo.calibration import calibrate_batchnorm
from sdzoo.images import input_config

KIT = Path(__file__).parents[1] / "export" / "triton"
sys.path.insert(0, str(KIT))
client = importlib.import_module("client")


def get(port: int, path: str) -> str:
    """Return what the server answers at ``path``, or an empty text."""
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.read().decode() or "ready" if response.status == 200 else ""
    except OSError:
        return ""
    finally:
        connection.close()


def free_ports() -> list[int]:
    """Return three ports that are free now."""
    sockets = [socket.socket() for _ in range(3)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sd_resnet110")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--requests", type=int, default=16, help="of each client in a round")
    parser.add_argument("--rounds", type=int, default=11)
    arguments = parser.parse_args()

    torch.manual_seed(0)
    model = timm.create_model(arguments.model).eval()
    calibrate_batchnorm(model, [torch.randn(32, *input_config(model)["input_size"])])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "exported"
        sdzoo.export(model, "triton", folder, backend="python")
        card = client.read_card(folder)
        images = np.random.default_rng(0).standard_normal((arguments.clients, *card["input"]["shape"][1:]), np.float32)
        count = arguments.clients * arguments.requests
        session = onnxruntime.InferenceSession(folder / card["file"], providers=["CPUExecutionProvider"])
        http, grpc, metrics = free_ports()
        ports = (f"--http-port={http}", f"--grpc-port={grpc}", f"--metrics-port={metrics}")
        with open(Path(name) / "log", "w") as log:
            server = subprocess.Popen(
                [sys.executable, str(KIT / "serve.py"), str(folder), *ports], stdout=log, stderr=log
            )
        try:
            while not get(http, "/v2/health/ready"):
                if server.poll() is not None:
                    sys.exit((Path(name) / "log").read_text())
                time.sleep(0.2)

            def ask(index: int) -> None:
                connection = HTTPConnection("127.0.0.1", http, timeout=60)
                for _ in range(arguments.requests):
                    client.infer(connection, card, images[index : index + 1])
                connection.close()

            def triton() -> None:
                with ThreadPoolExecutor(arguments.clients) as pool:
                    list(pool.map(ask, range(arguments.clients)))

            def loop() -> None:
                for index in range(count):
                    session.run(None, {"images": images[index % len(images)][np.newaxis]})

            seconds = interleave({"ONNX Runtime, loop": loop, "Triton": triton}, arguments.rounds)
            text = get(metrics, "/metrics")
        finally:
            server.terminate()
            server.wait()
    served, calls = (
        sum(float(value) for value in re.findall(rf"^{metric}{{.*}} (\S+)$", text, re.MULTILINE))
        for metric in ("nv_inference_count", "nv_inference_exec_count")
    )
    print(f"{arguments.model}, float32; {hardware()}; onnxruntime {onnxruntime.__version__}, CPUExecutionProvider")
    print(f"{arguments.clients} clients, {count} images a round; images a call of Triton's model: {served / calls:.1f}")
    for name, times in seconds.items():
        print(f"{name:<20} {count / statistics.median(times):8.1f} images/s")
    print(f"Triton is faster by {ratio(seconds, 'ONNX Runtime, loop', 'Triton')}")


if __name__ == "__main__":
    main()
