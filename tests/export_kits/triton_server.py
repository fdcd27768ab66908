"""A tritonserver started by the kit's serve.py, watched, and ended with all that it started."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path

from exported import IGNORING, KITS

KIT = KITS / "triton"


@dataclass
class Server:
    """A running serve.py, which is the first process of a group of its own."""

    process: subprocess.Popen[bytes]
    ports: dict[str, int]
    log: Path

    def listens(self) -> bool:
        """Return whether any port is taken."""
        with contextlib.ExitStack() as sockets:
            probes = [(sockets.enter_context(socket.socket()), port) for port in self.ports.values()]
            return any(probe.connect_ex(("127.0.0.1", port)) == 0 for probe, port in probes)

    def connection(self, port: str = "http") -> HTTPConnection:
        return HTTPConnection("127.0.0.1", self.ports[port], timeout=60)

    def get(self, path: str, port: str = "http") -> tuple[int, str]:
        connection = self.connection(port)
        connection.request("GET", path)
        response = connection.getresponse()
        content = response.read().decode()
        connection.close()
        return response.status, content

    def is_ready(self) -> bool:
        try:
            return self.get("/v2/health/ready")[0] == 200
        except OSError:
            return False

    def metric(self, name: str, model: str = "sd_resnet20") -> float:
        _, text = self.get("/metrics", "metrics")
        pattern = rf'^{name}\{{[^}}]*model="{model}"[^}}]*\}} (\S+)$'
        return sum(float(value) for value in re.findall(pattern, text, re.MULTILINE))

    def end(self) -> None:
        """End the whole group, gently first; whatever is left of it is killed."""
        if self.process.poll() is None:
            self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(10)


def free_ports() -> dict[str, int]:
    """Return three ports that are free now."""
    sockets = {name: socket.socket() for name in ("http", "grpc", "metrics")}
    for one in sockets.values():
        one.bind(("127.0.0.1", 0))
    ports = {name: one.getsockname()[1] for name, one in sockets.items()}
    for one in sockets.values():
        one.close()
    return ports


def start(folder: Path, log: Path, *options: str) -> Server:
    """Start the kit's serve.py on ``folder``, with SIGINT ignored, as a shell starts what it is given with ``&``."""
    ports = free_ports()
    command = [*IGNORING, sys.executable, KIT / "serve.py", folder, *options]
    command += [f"--{name}-port={port}" for name, port in ports.items()]
    with log.open("w") as file:
        process = subprocess.Popen([*map(str, command)], stdout=file, stderr=file, start_new_session=True)
    return Server(process, ports, log)


@contextlib.contextmanager
def running(folder: Path, log: Path, *options: str, seconds: float = 120) -> Iterator[Server]:
    """Yield a server that is ready, and end it; ``seconds`` is for machines that are very busy."""
    one = start(folder, log, *options)
    deadline = time.monotonic() + seconds
    try:
        while not one.is_ready():
            assert one.process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield one
    finally:
        one.end()


def errors_of(folder: Path, log: Path) -> list[str]:
    """Return the errors with which Triton refuses to serve ``folder``; that it finds no GPU is none of them."""
    refused = start(folder, log)
    try:
        assert refused.process.wait(120) != 0
    finally:
        refused.end()
    errors = [line for line in log.read_text().splitlines() if re.match(r"E\d{4} ", line)]
    return [line for line in errors if "Cuda" not in line]
