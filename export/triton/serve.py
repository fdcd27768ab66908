"""Serve an exported folder with the Triton that the package nvidia-pytriton carries: ``python serve.py FOLDER``.

That is NVIDIA's tritonserver without its container, and with the python backend alone. Here it answers on this machine
only, until it is interrupted. Options that this script does not know are handed to tritonserver.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from pictures import read_sealed

PR_SET_PDEATHSIG = 1
PORTS = {"http": 8000, "grpc": 8001, "metrics": 8002}


def package() -> Path:
    """Return the folder of pytriton, which is not imported."""
    spec = importlib.util.find_spec("pytriton")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError("nvidia-pytriton is not installed: pip install -r requirements.txt")
    return Path(spec.submodule_search_locations[0])


def backends(scratch: Path) -> Path:
    """Return a folder of links to Triton's python backend and to the program made for this version of Python."""
    server = package() / "tritonserver"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    program = server / "python_backend_stubs" / version / "triton_python_backend_stub"
    if not program.is_file():
        made = ", ".join(sorted(folder.name for folder in program.parents[1].iterdir()))
        raise ValueError(f"this nvidia-pytriton runs models with Python {made}; this is {version}")
    (scratch / "python").mkdir()
    for file in (*(server / "backends" / "python").glob("*.*"), program):
        (scratch / "python" / file.name).symlink_to(file)
    return scratch


def environment() -> dict[str, str]:
    """Return the variables by which Triton finds its libraries, and its models this Python and its packages."""
    root = package()
    libraries = [
        root.parent / "nvidia_pytriton.libs",
        root / "tritonserver" / "external_libs",
        sysconfig.get_config_var("LIBDIR"),
        os.environ.get("LD_LIBRARY_PATH"),
    ]
    return os.environ | {
        "LD_LIBRARY_PATH": os.pathsep.join(str(path) for path in libraries if path),
        "PYTHONPATH": os.pathsep.join(path for path in sys.path[1:] if path),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }


def end_with_parent() -> None:
    """Let Linux end this process when its parent ends, however that does."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def serve(repository: Path, host: str, ports: dict[str, int], others: list[str]) -> int:
    """Run tritonserver until it ends and return its exit code; it ends with this process."""
    for port in ports.values():
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError as error:
                raise ValueError(f"cannot listen on {host}:{port}: {error.strerror}") from None
    with tempfile.TemporaryDirectory() as scratch:
        command = [
            str(package() / "tritonserver" / "bin" / "tritonserver"),
            f"--model-repository={repository}",
            f"--backend-directory={backends(Path(scratch))}",
            *(f"--{name}-address={host}" for name in ports),
            *(f"--{name}-port={port}" for name, port in ports.items()),
            *others,
        ]
        server = subprocess.Popen(command, env=environment(), preexec_fn=end_with_parent)
        for number in (signal.SIGTERM, signal.SIGINT):  # which a shell's `&` has ignored
            signal.signal(number, lambda *_: server.terminate())
        return server.wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Serve an exported folder with Triton, on this machine.")
    parser.add_argument("folder", type=Path, help="what `sdzoo export --to triton` wrote")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: %(default)s)")
    for name, port in PORTS.items():
        parser.add_argument(f"--{name}-port", type=int, default=port, help="default: %(default)s")
    parser.add_argument("--own-config", action="store_true", help="config.pbtxt was changed on purpose")
    given, unknown = parser.parse_known_args()
    try:
        if read_sealed(given.folder, ["config.pbtxt"] * given.own_config)["target"] != "triton":
            raise ValueError(f"{given.folder} is not what `sdzoo export --to triton` wrote")
        chosen = {name: getattr(given, f"{name}_port") for name in PORTS}
        sys.exit(serve(given.folder / "model_repository", given.host, chosen, unknown))
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")
