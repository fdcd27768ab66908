"""ONNX files compiled to TensorRT engines.

Two flavours share one interface. ``tensorrt`` compiles on the GPU that will run the engine, and for it alone;
``tensorrt-rtx`` (TensorRT for RTX) compiles with or without a GPU, for a list of targets, and the last step happens on
the GPU itself. Their files look alike but neither loads the other's.

Precision comes from the ONNX file: networks are strongly typed, so float16 and int8 are computed where the graph says
so and nowhere else. TF32, which TensorRT would use for float32, is turned off: its ten bits of mantissa do not hold
sdzoo's limit.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import importlib
import os
import threading
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdzoo.errors import InputError, nearest
from sdzoo.extras import MissingExtra
from sdzoo.files import atomic_path

FLAVOURS = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}  # the extra's name, and the module's
RTX_TARGETS = ("8.0", "8.6", "8.9", "12.0", "12.1")  # all it has, less 7.5, for which float32 does not compile

# In passing, and whatever it is asked, TensorRT for RTX complains to machines without a driver.
NO_DRIVER = "cudaError 35"


@dataclass(frozen=True)
class Flavour:
    """A TensorRT that was imported: ``tensorrt`` or ``tensorrt-rtx``, its version, its module."""

    name: str
    version: str
    module: Any

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


@dataclass(frozen=True)
class Gpu:
    """A GPU: the driver's name for it, and its compute capability, as ``8.9``."""

    name: str
    compute_capability: str

    def __str__(self) -> str:
        return f"{self.name} (compute capability {self.compute_capability})"


@dataclass(frozen=True)
class EngineFacts:
    """What an engine is and where it runs; what its card holds under ``engine``.

    Attributes:
        flavour: ``tensorrt`` or ``tensorrt-rtx``.
        version: Of TensorRT; an engine is loaded by that version only.
        gpu: What it was built beside, None without a GPU.
        targets: The compute capabilities that it can run on; empty for ``tensorrt``: the one GPU above.
        profile: Smallest, best and largest batch.
        layers: Of the network that the parser made of the ONNX file, before layers are fused.
        bytes: Of the file.
    """

    flavour: str
    version: str
    gpu: Gpu | None
    targets: tuple[str, ...]
    profile: tuple[int, int, int]
    layers: int
    bytes: int

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        plain = dataclasses.asdict(self)
        return plain | {"targets": list(self.targets), "profile": list(self.profile)}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> EngineFacts:
        """Return what :meth:`as_dict` wrote.

        Raises:
            InputError: naming what is missing or of another kind.
        """
        wanted = {field.name for field in dataclasses.fields(cls)}
        if missing := sorted(wanted - set(stored)):
            raise InputError(f"what is said of the engine lacks {', '.join(missing)}")
        try:
            gpu = None if stored["gpu"] is None else Gpu(**stored["gpu"])
            smallest, best, largest = map(int, stored["profile"])
            return cls(
                str(stored["flavour"]),
                str(stored["version"]),
                gpu,
                tuple(map(str, stored["targets"])),
                (smallest, best, largest),
                int(stored["layers"]),
                int(stored["bytes"]),
            )
        except (TypeError, ValueError, OverflowError) as error:
            raise InputError(f"what is said of the engine cannot be read: {error}") from None


def find_flavour(name: str = "auto") -> Flavour:
    """Return the TensorRT called ``name``; ``auto``: TensorRT where it can be imported, else TensorRT for RTX.

    Raises:
        InputError: for another name.
        MissingExtra: an ImportError naming the extra, if it cannot be imported.
    """
    if name != "auto" and name not in FLAVOURS:
        raise InputError(
            f'TensorRT flavour "{name}" is unknown; known: auto, {", ".join(FLAVOURS)}{nearest(name, FLAVOURS)}'
        )
    names = list(FLAVOURS) if name == "auto" else [name]
    reasons = []
    for candidate in names:
        try:
            module = importlib.import_module(FLAVOURS[candidate])
        except (ImportError, OSError) as error:  # OSError: a library that it needs
            absent = isinstance(error, ModuleNotFoundError) and error.name == FLAVOURS[candidate]
            reasons.append(f"{candidate} {'is not installed' if absent else f'cannot be imported ({error})'}")
        else:
            return Flavour(candidate, module.__version__, module)
    commands = " or ".join(f'pip install "sdzoo[{candidate}]"' for candidate in names)
    raise MissingExtra(f"{', '.join(reasons)}; install with: {commands}")


def find_builder(name: str = "auto") -> Flavour:
    """Return the TensorRT called ``name`` if it compiles here; ``auto``: one that does, TensorRT before the other.

    Raises:
        InputError: for another name, or if it compiles on a GPU and there is none.
        MissingExtra: as for :func:`find_flavour`.
    """
    if find_gpu() is not None:
        return find_flavour(name)
    if name == "auto":
        with suppress(MissingExtra):
            return find_flavour("tensorrt-rtx")
    found = find_flavour(name)
    if found.name == "tensorrt":
        raise InputError(
            f"{found} compiles on the GPU that will run the engine, and there is none here; "
            "tensorrt-rtx compiles without one"
        )
    return found


def find_gpu() -> Gpu | None:
    """Return the first GPU that programs may use here (``CUDA_VISIBLE_DEVICES``), None without GPU or driver."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError:
        return None
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    name = ctypes.create_string_buffer(256)
    # Every call returns 0 for success; 75 and 76 are the two halves of the compute capability.
    if (
        driver.cuInit(0)
        or driver.cuDeviceGet(ctypes.byref(device), 0)
        or driver.cuDeviceGetName(name, len(name), device)
        or driver.cuDeviceGetAttribute(ctypes.byref(major), 75, device)
        or driver.cuDeviceGetAttribute(ctypes.byref(minor), 76, device)
    ):
        return None
    return Gpu(name.value.decode(errors="replace"), f"{major.value}.{minor.value}")


def build_engine(
    onnx: bytes, path: str | Path, batch: tuple[int, int, int] = (1, 8, 64), flavour: str = "auto"
) -> EngineFacts:
    """Compile an ONNX file to an engine, write it to ``path`` and return what it is.

    Args:
        onnx: The file's content: one input whose first dimension, the batch, is dynamic.
        path: The file to write.
        batch: Smallest, best and largest batch.
        flavour: As for :func:`find_builder`.

    Raises:
        InputError: with TensorRT's own words, if it cannot parse or compile the file; if ``batch`` is not in order, or
            the flavour needs a GPU and there is none. There is no file then.
        MissingExtra: if the flavour is not installed.
    """
    if len(batch) != 3 or not 1 <= batch[0] <= batch[1] <= batch[2]:
        raise InputError(f"batch is {batch}; give smallest, best and largest, each at least 1 and as large as the last")
    found, gpu = find_builder(flavour), find_gpu()
    targets = RTX_TARGETS if found.name == "tensorrt-rtx" else ()
    with atomic_path(path) as temporary:
        plan, layers = _compile(found, onnx, batch, targets)
        temporary.write_bytes(plan)
    return EngineFacts(found.name, found.version, gpu, targets, batch, layers, len(plan))


@functools.cache
def logger(module: Any) -> Any:
    """Return the logger for a flavour's module, whose ``errors`` are its latest words.

    One for the process: TensorRT keeps the first that it is given and reports to it whatever comes later. Who wants to
    know whose words they are holds ``lock``.
    """

    class Words(module.ILogger):
        def __init__(self) -> None:
            module.ILogger.__init__(self)
            self.errors: deque[str] = deque(maxlen=8)
            self.lock = threading.Lock()

        def log(self, severity: Any, msg: str) -> None:
            if int(severity) <= int(module.ILogger.ERROR):  # 0 is an internal error
                self.errors.append(msg)

        def said(self, *first: str) -> str:
            """Return ``first``, else the latest words, on one line."""
            lines = [line for text in first or self.errors for line in text.splitlines() if NO_DRIVER not in line]
            return "; ".join(map(str.strip, lines)) or "it does not say why"

    return Words()


def _compile(found: Flavour, onnx: bytes, batch: tuple[int, int, int], targets: tuple[str, ...]) -> tuple[bytes, int]:
    """Return the plan, and the number of layers of the parsed network."""
    trt, words = found.module, logger(found.module)
    with words.lock:
        words.errors.clear()
        # Parser and plan use builder, network and configuration by address: all stay referred to until the end.
        builder = trt.Builder(words)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, words)
        if not parser.parse(onnx):
            errors = [str(parser.get_error(index)) for index in range(parser.num_errors)]
            raise InputError(f"{found} cannot parse the ONNX file: {words.said(*errors)}")
        config = builder.create_builder_config()
        config.clear_flag(trt.BuilderFlag.TF32)
        config.add_optimization_profile(_profile(builder, network, batch))
        if targets:  # where none are set, they would be this version's default, or the GPU that is here
            _set_targets(found, config, targets)
        plan = builder.build_serialized_network(network, config)
        if plan is None or not plan.nbytes:
            raise InputError(f"{found} cannot compile the ONNX file: {words.said()}")
        return bytes(plan), network.num_layers


def _profile(builder: Any, network: Any, batch: tuple[int, int, int]) -> Any:
    shapes = [tuple(network.get_input(index).shape) for index in range(network.num_inputs)]
    if len(shapes) != 1 or [side == -1 for side in shapes[0]] != [True] + [False] * (len(shapes[0]) - 1):
        got = ", ".join(map(str, shapes)) or "nothing"
        raise InputError(f"the ONNX file takes {got}; wanted is one input of which the batch alone is dynamic (-1)")
    profile = builder.create_optimization_profile()
    profile.set_shape(network.get_input(0).name, *((size, *shapes[0][1:]) for size in batch))
    return profile


def _set_targets(found: Flavour, config: Any, targets: tuple[str, ...]) -> None:
    config.num_compute_capabilities = len(targets)  # before them: each would be refused, with no word but False
    for index, target in enumerate(targets):
        capability = getattr(found.module.ComputeCapability, f"SM{target.replace('.', '')}", None)
        if capability is None or not config.set_compute_capability(capability, index):
            raise InputError(f"{found} has no target of compute capability {target}")
