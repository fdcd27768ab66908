"""A copy of the Ray Serve kit, started by its own command, spoken to over HTTP and ended with all its processes."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from exported import IGNORING

KIT = Path(__file__).parents[2] / "export" / "ray_serve"
JPEG, PNG, JSON = "image/jpeg", "image/png", "application/json"


def processes(home: Path) -> dict[int, str]:
    """Return pid and command of every process that was given ``home``, or writes there."""
    found = {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):  # it has just ended, is another user's, or no process
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            written = [os.readlink(fd) for fd in (entry / "fd").iterdir()]
            environment = (entry / "environ").read_bytes().decode(errors="replace")
            if any(str(home) in text for text in (command, environment, *written)):
                found[int(entry.name)] = command
    return found


def eventually(condition: Callable[[], bool], what: str, seconds: float = 90) -> None:
    """Wait until ``condition`` holds; fail after ``seconds``."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(0.2)


@dataclass
class Server:
    """A running copy of the kit. ``home`` is the temporary folder of its Ray, ``log`` what it printed."""

    process: subprocess.Popen[bytes]
    port: int
    home: Path
    log: Path

    def ask(
        self, path: str, body: bytes | None = None, kind: str = JSON, method: str | None = None, timeout: float = 60
    ) -> tuple[int, Any]:
        """Return status and answer of one request, decoded where it is JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            method = method or ("GET" if body is None else "POST")
            connection.request(method, path, body, {"Content-Type": kind} if body is not None else {})
            response = connection.getresponse()
            content = response.read()
        finally:
            connection.close()
        return response.status, json.loads(content) if response.headers["Content-Type"] == JSON else content

    def replicas(self) -> set[int]:
        """Return the pids of the replicas."""
        return {pid for pid, command in processes(self.home).items() if command.startswith("ray::ServeReplica")}

    def healthy(self) -> bool:
        """Return whether a replica answers; fail if the server has ended."""
        assert self.process.poll() is None, self.log.read_text()
        try:
            return self.ask("/health")[0] == 200
        except OSError:
            return False


@contextlib.contextmanager
def serving(
    folder: Path, work: Path, under: tuple[str, ...] = (), end: int = signal.SIGTERM, **autoscaling: float
) -> Iterator[Server]:
    """Serve ``folder`` with a copy of the kit, and see that the signal ``end`` leaves nothing of it.

    It is started with SIGINT ignored, as a shell starts what it is given with ``&``.
    """
    kit = Path(shutil.copytree(KIT, work / "kit", ignore=shutil.ignore_patterns("__pycache__")))
    config = yaml.safe_load((kit / "config.yaml").read_text())
    config["deployment"]["autoscaling_config"] |= {"max_replicas": 2} | autoscaling
    (kit / "config.yaml").write_text(yaml.safe_dump(config))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    home = Path(tempfile.mkdtemp(prefix="sdzoo-ray-", dir="/tmp"))  # the path of a Unix socket is short
    with (work / "log").open("wb") as log:
        process = subprocess.Popen(
            [*IGNORING, *under, sys.executable, "start.py", str(folder), "--port", str(port)],
            cwd=kit,
            env=os.environ | {"RAY_TMPDIR": str(home), "RAY_USAGE_STATS_ENABLED": "1"},  # they are off all the same
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    server = Server(process, port, home, work / "log")
    try:
        eventually(server.healthy, "the server to be ready", 180)
        yield server
        process.send_signal(end)
        assert process.wait(60) == 0, server.log.read_text()
        eventually(lambda: not processes(home), "Ray to end", 30)
    finally:
        for pid in processes(home):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait(60)
        shutil.rmtree(home, ignore_errors=True)
