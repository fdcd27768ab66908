"""A double of TensorRT's Python module and of a GPU: what sdzoo asks of them, and what it makes of the answers.

A plan of the double holds the ONNX file and its profile; ONNX Runtime computes it on the CPU, from and to the addresses
that it is given. The double compiles nothing and knows no precision, stream or GPU memory: that real TensorRT answers
as it does is for tests/export_kits/test_tensorrt.py, that engines compute their model on a GPU for tests/gpu.
"""

from __future__ import annotations

import contextlib
import ctypes
import pickle
import sys
import threading
import time
import types
import weakref
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from sdzoo.deploy import tensorrt_builder, tensorrt_engine
from sdzoo.deploy.tensorrt_builder import Gpu

KINDS = {onnx.TensorProto.FLOAT: np.float32, onnx.TensorProto.UINT8: np.uint8, onnx.TensorProto.FLOAT16: np.float16}
MAGIC = b"double"


class ILogger:
    INTERNAL_ERROR, ERROR, WARNING = range(3)


class Shaped:
    """An input of the network."""

    def __init__(self, info: onnx.ValueInfoProto) -> None:
        self.name = info.name
        self.shape = [d.dim_value if d.HasField("dim_value") else -1 for d in info.type.tensor_type.shape.dim]


class Network:
    def __init__(self, flags: int) -> None:
        self.flags, self.content, self.proto = flags, b"", onnx.ModelProto()

    @property
    def num_inputs(self) -> int:
        return len(self.proto.graph.input)

    @property
    def num_layers(self) -> int:
        return len(self.proto.graph.node)

    def get_input(self, index: int) -> Shaped:
        return Shaped(self.proto.graph.input[index])


class OnnxParser:
    """Refers to the network by address, as TensorRT does: one that nobody else holds is gone."""

    def __init__(self, network: Network, logger: ILogger) -> None:
        self._network = weakref.ref(network)
        self._errors: list[str] = []

    def parse(self, content: bytes) -> bool:
        network = self._network()
        assert network is not None, "here TensorRT would crash: the network is gone"
        try:
            network.proto, network.content = onnx.load_model_from_string(content), content
            onnx.checker.check_model(network.proto)
        except Exception as error:  # protobuf's and onnx's own
            self._errors.append(f"In node -1: the double cannot read it: {type(error).__name__}")
        return not self._errors

    @property
    def num_errors(self) -> int:
        return len(self._errors)

    def get_error(self, index: int) -> str:
        return self._errors[index]


class Profile:
    shapes: tuple[str, tuple[tuple[int, ...], ...]]

    def set_shape(self, name: str, *shapes: tuple[int, ...]) -> None:
        assert len(shapes) == 3
        self.shapes = (name, shapes)


class Config:
    def __init__(self) -> None:
        self.flags = {"TF32"}
        self.profiles: list[Profile] = []
        self.targets: list[str | None] = []

    @property
    def num_compute_capabilities(self) -> int:
        return len(self.targets)

    @num_compute_capabilities.setter
    def num_compute_capabilities(self, number: int) -> None:
        self.targets = [None] * number

    def set_compute_capability(self, target: str, index: int) -> bool:
        if index >= len(self.targets):
            return False  # TensorRT raises nothing
        self.targets[index] = target
        return True

    def clear_flag(self, flag: str) -> None:
        self.flags.discard(flag)

    def add_optimization_profile(self, profile: Profile) -> int:
        self.profiles.append(profile)
        return 0


class Plan(bytes):
    @property
    def nbytes(self) -> int:
        return len(self)


class Context:
    """An execution context, which is not thread-safe: a second call amid one changes its shape or addresses."""

    def __init__(self, content: bytes, profile: Profile) -> None:
        self._session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
        self._profile = profile
        self._addresses: dict[str, int] = {}
        self._shape: tuple[int, ...] = ()
        self._caller = 0

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        given, (least, _, most) = self._profile.shapes
        if name != given or not all(a <= b <= c for a, b, c in zip(least, shape, most, strict=True)):
            return False
        self._shape, self._caller = shape, threading.get_ident()
        time.sleep(0.002)  # time for another thread to come in between
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        (output,) = self._session.get_outputs()
        return self._shape if name != output.name else (self._shape[0], *output.shape[1:])

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._check_caller()
        self._addresses[name] = address
        return True

    def _check_caller(self) -> None:
        assert self._caller == threading.get_ident(), "here TensorRT would compute nonsense: a thread came in between"

    def execute_async_v3(self, stream: int) -> bool:
        self._check_caller()
        (given,), (output,) = self._session.get_inputs(), self._session.get_outputs()
        size = int(np.prod(self._shape))
        kind: Any = ctypes.c_uint8 if given.type == "tensor(uint8)" else ctypes.c_float
        images = np.ctypeslib.as_array((kind * size).from_address(self._addresses[given.name])).reshape(self._shape)
        logits = np.ascontiguousarray(self._session.run(None, {given.name: images})[0])
        ctypes.memmove(self._addresses[output.name], logits.ctypes.data, logits.nbytes)
        return True


class Engine:
    def __init__(self, content: bytes, profile: Profile) -> None:
        self._content, self._profile = content, profile
        graph = onnx.load_model_from_string(content).graph
        self._tensors = {info.name: info for info in (*graph.input, *graph.output)}
        self._inputs = [info.name for info in graph.input]
        self.num_io_tensors = len(self._tensors)

    def get_tensor_name(self, index: int) -> str:
        return list(self._tensors)[index]

    def get_tensor_mode(self, name: str) -> str:
        return "INPUT" if name in self._inputs else "OUTPUT"

    def get_tensor_dtype(self, name: str) -> int:
        return self._tensors[name].type.tensor_type.elem_type

    def get_tensor_shape(self, name: str) -> list[int]:
        return Shaped(self._tensors[name]).shape

    def get_tensor_profile_shape(self, name: str, index: int) -> tuple[tuple[int, ...], ...]:
        return self._profile.shapes[1]

    def create_execution_context(self) -> Context:
        return Context(self._content, self._profile)


def double(name: str, version: str) -> Any:
    """Return a module like ``tensorrt`` or ``tensorrt_rtx``; ``builds`` are the configurations that were compiled.

    An ONNX file whose producer is ``"breaks"`` is parsed, and fails to compile.
    """
    module: Any = types.ModuleType(name)

    class Builder:
        def __init__(self, logger: Any) -> None:
            self._logger = logger

        def create_network(self, flags: int) -> Network:
            return Network(flags)

        def create_optimization_profile(self) -> Profile:
            return Profile()

        def create_builder_config(self) -> Config:
            return Config()

        def build_serialized_network(self, network: Network, config: Config) -> Plan | None:
            if network.proto.producer_name == "breaks":
                self._logger.log(ILogger.WARNING, "a warning")
                self._logger.log(ILogger.ERROR, "no kernel\nfor this\nnoise: cudaError 35")
                return None
            module.builds.append((network.flags, config))
            return Plan(MAGIC + pickle.dumps((config.profiles[0].shapes, network.content)))

    class Runtime:
        def __init__(self, logger: Any) -> None:
            self._logger = logger

        def deserialize_cuda_engine(self, plan: bytes) -> Engine | None:
            if not plan.startswith(MAGIC):
                self._logger.log(ILogger.ERROR, "magic tag does not match")
                return None
            shapes, content = pickle.loads(plan.removeprefix(MAGIC))
            profile = Profile()
            profile.shapes = shapes
            return Engine(content, profile)

    module.__version__, module.builds = version, []
    module.ILogger, module.Builder, module.Runtime, module.OnnxParser = ILogger, Builder, Runtime, OnnxParser
    module.NetworkDefinitionCreationFlag = types.SimpleNamespace(STRONGLY_TYPED=1)
    module.BuilderFlag = types.SimpleNamespace(TF32="TF32")
    module.TensorIOMode = types.SimpleNamespace(INPUT="INPUT", OUTPUT="OUTPUT")
    module.ComputeCapability = types.SimpleNamespace(**{f"SM{n}": f"SM{n}" for n in (75, 80, 86, 89, 120, 121)})
    module.nptype = KINDS.__getitem__
    return module


def install(patch: pytest.MonkeyPatch, **versions: str) -> dict[str, Any]:
    """Let ``tensorrt=version`` and ``tensorrt_rtx=version`` be what can be imported, and return their doubles."""
    doubles = {name: double(name, version) for name, version in versions.items()}
    for name in ("tensorrt", "tensorrt_rtx"):
        patch.setitem(sys.modules, name, doubles.get(name))  # None: importing it raises ModuleNotFoundError
    return doubles


def pretend(patch: pytest.MonkeyPatch, gpu: Gpu | None) -> None:
    """Let there be ``gpu``, whose memory is that of the CPU."""

    class Stream:
        def __init__(self, device: torch.device) -> None:
            assert device == torch.device("cuda", 0)
            self.device, self.cuda_stream = torch.device("cpu"), 7

    for module in (tensorrt_builder, tensorrt_engine):
        patch.setattr(module, "find_gpu", lambda: gpu)
    patch.setattr(torch.cuda, "is_available", lambda: gpu is not None)
    patch.setattr(torch.cuda, "Stream", Stream)
    patch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
