"""Ray Serve under many clients against ONNX Runtime called in a loop of single images.

    .venv-ray_serve/bin/python benchmarks/serving_ray.py FOLDER

FOLDER is what `sdzoo export --to onnx` wrote. Both start from the same encoded pictures, and take turns; the server, as
its config.yaml has it, and its clients share the machine that the loop has for itself.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import importlib
import json
import socket
import statistics
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from interleaved import hardware, interleave, ratio

from sdzoo.assets import pictures

KIT = Path(__file__).parents[1] / "export" / "ray_serve"
LOOP = "ONNX Runtime loop"


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[int]:
    """Yield the port at which the kit serves ``folder``."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    command = [sys.executable, str(KIT / "start.py"), str(folder), "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            if not any("answers on" in line for line in process.stdout):
                raise SystemExit("the server did not start")
            threading.Thread(target=process.stdout.read, daemon=True).start()
            yield port
        finally:
            process.terminate()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--images", type=int, default=1024, help="of each turn")
    parser.add_argument("--threads", type=int, default=1, help="of the loop")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    sys.path.append(str(KIT))
    kit_model, kit_pictures = importlib.import_module("model"), importlib.import_module("pictures")
    files = [path.read_bytes() for path in pictures().values()]
    bodies = [files[i % len(files)] for i in range(arguments.images)]
    model = kit_model.Model(arguments.folder, arguments.threads)

    def loop() -> None:
        for body in bodies:
            model.run(kit_pictures.to_array(kit_pictures.open_picture(body), model.card)[None])

    def client(port: int, number: int) -> list[int]:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        sizes = []
        for body in bodies[number :: arguments.clients]:
            connection.request("POST", "/classify", body, {"Content-Type": "image/jpeg"})
            response = connection.getresponse()
            content = response.read()
            if response.status != 200:
                raise SystemExit(f"status {response.status}: {content[:200]!r}")
            sizes.append(json.loads(content)["images"][0]["batch_size"])
        connection.close()
        return sizes

    with serving(arguments.folder.resolve()) as port, ThreadPoolExecutor(arguments.clients) as pool:
        sizes: list[int] = []
        served = f"Ray Serve, {arguments.clients} clients"

        def load() -> None:
            for part in pool.map(lambda number: client(port, number), range(arguments.clients)):
                sizes.extend(part)

        seconds = interleave({LOOP: loop, served: load}, arguments.rounds)
    print(f"{model.card['model']}, {model.card['precision']}; {hardware()}; medians of {arguments.rounds} rounds")
    for name in (LOOP, served):
        print(f"{name:<23} {arguments.images / statistics.median(seconds[name]):8.0f} images/s")
    print(
        f"the loop ({arguments.threads} thread) takes {ratio(seconds, LOOP, served)} of the server's time; "
        f"mean batch {statistics.mean(sizes):.1f}"
    )


if __name__ == "__main__":
    main()
