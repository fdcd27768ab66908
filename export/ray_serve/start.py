"""Serve an exported folder with Ray Serve, until Ctrl-C or SIGTERM: ``python start.py FOLDER``."""

from __future__ import annotations

import argparse
import logging
import os
import secrets
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import Any

import yaml
from model import checked_card

# Ray reads these when it is imported, and its processes inherit them.
ALONE = {
    # In spite of its name: Ray takes 127.0.0.1 for its ports, not the address that other machines see.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # Nor may other users of this machine give it work. Ray would keep the token in the home folder.
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
    # Its usage statistics are off when it is started from Python, as here, but it still asks cloud providers where it
    # is: through a proxy that is not there.
    "http_proxy": "http://127.0.0.1:9",
    "no_proxy": "127.0.0.1",
}
KEYS = ("http_options", "logging_config", "deployment")  # of the configuration
OBJECT_STORE_BYTES = 128 * 2**20  # requests do not pass through it


def main() -> int:
    """Check, serve, stop; return the exit code: 2 for a wrong folder, port or configuration."""
    parser = argparse.ArgumentParser(description="Serve an exported folder with Ray Serve, until Ctrl-C or SIGTERM.")
    parser.add_argument("folder", type=Path, help="what `sdzoo export --to onnx -o FOLDER` wrote")
    parser.add_argument("--config", type=Path, default=Path(__file__).with_name("config.yaml"))
    parser.add_argument("--host", help="default: the one in the configuration, 127.0.0.1")
    parser.add_argument("--port", type=int, help="default: the one in the configuration, 8000")
    parser.add_argument("--address", default="local", help="auto: the Ray cluster of this machine; default: a new one")
    given = parser.parse_args()
    try:
        config = yaml.safe_load(given.config.read_text(encoding="utf-8"))
        if not isinstance(config, dict) or not all(isinstance(config.get(key), dict) for key in KEYS):
            raise ValueError(f"{given.config} is not a mapping with {', '.join(KEYS)}")
        http = config["http_options"]
        http |= {name: value for name in ("host", "port") if (value := getattr(given, name)) is not None}
        card = checked_card(given.folder)
        check_port(http["host"], http["port"])
    except (OSError, ValueError, yaml.YAMLError) as error:
        parser.exit(2, f"error: {' '.join(str(error).split())}\n")
    serve_until_stopped(given.folder.resolve(), card["model"], config, given.address)
    return 0


def check_port(host: str, port: int) -> None:
    """Raise ValueError where ``port`` cannot be had; Serve's proxy could share it with another server in silence."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one that a stopped server has just left is free
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            raise ValueError(f"port {port} of {host} cannot be had: {error}; choose another with --port") from None


def serve_until_stopped(folder: Path, name: str, config: dict[str, Any], address: str) -> None:
    """Run the one application of ``config`` on ``folder``, then take everything down again."""
    if address == "local":
        os.environ.update(ALONE)
    import ray
    from app import Classifier
    from ray import serve

    http, deployment = config["http_options"], config["deployment"]
    local = {
        "num_cpus": max(2, os.cpu_count() or 1),  # with one, the second replica would wait for ever
        "include_dashboard": False,
        "object_store_memory": OBJECT_STORE_BYTES,
    }
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's `&` has it ignored
    try:
        ray.init(address, logging_level=logging.WARNING, **(local if address == "local" else {}))
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        serve.start(config["proxy_location"], http, logging_config=config["logging_config"])
        classifier: serve.Deployment = Classifier  # type: ignore[assignment]
        application = classifier.options(**deployment).bind(str(folder))
        serve.run(application, name="classifier", route_prefix="/", logging_config=config["logging_config"])
        print(f"{name} answers on http://{http['host']}:{http['port']}/classify; stop with Ctrl-C", flush=True)
        threading.Event().wait()
    except KeyboardInterrupt:
        pass
    finally:
        if ray.is_initialized():
            serve.shutdown()
            ray.shutdown()


if __name__ == "__main__":
    sys.exit(main())
