"""TensorRT engines loaded and run, where they fit: flavour, version and GPU are checked against what was built."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from sdzoo.deploy.card import UNVERIFIED_SUFFIX
from sdzoo.deploy.tensorrt_builder import RTX_TARGETS, EngineFacts, Flavour, find_flavour, find_gpu, logger
from sdzoo.errors import InputError
from sdzoo.extras import MissingExtra

ENGINE = "model.engine"
UNVERIFIED = f"model{UNVERIFIED_SUFFIX}"  # parity was not run

Run: TypeAlias = Callable[[NDArray[Any]], NDArray[np.float32]]


def load_engine(path: str | Path, facts: Mapping[str, Any], rebuild: str, prove: str | None) -> Run:
    """Return a callable that runs an engine on the first GPU: an array ``(B, ...)`` in, float32 logits out.

    It may be called from several threads; calls wait for each other. Batches above the largest that the engine was
    built for are run in pieces, smaller ones than its smallest are filled up.

    Args:
        path: The engine.
        facts: What its card says of it (:meth:`EngineFacts.as_dict`).
        rebuild: The command that builds it anew, for the message if it does not fit here.
        prove: The command that compares it with its model, for the message if that was not done; None: load it all the
            same, in order to compare it.

    Raises:
        InputError: if the engine is unverified, there is no GPU, it was built by another TensorRT or for another GPU,
            or it is damaged.
        MissingExtra: without any TensorRT.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path} does not exist")
    if path.name.endswith(UNVERIFIED_SUFFIX) and prove is not None:
        raise InputError(
            f"{path} was never compared with the model it was built from: on a machine with the GPU that it is for, "
            f"run {prove}"
        )
    if reason := why_not_here(facts):
        remedy = f"; build it anew here: {rebuild}" if torch.cuda.is_available() else ""
        raise InputError(f"{path} {reason}{remedy}")
    engine = EngineFacts.from_dict(facts)
    if path.stat().st_size != engine.bytes:
        raise InputError(f"{path} is damaged: it has {path.stat().st_size} bytes, its card says {engine.bytes}")
    return _Engine(path, find_flavour(engine.flavour))


def why_not_here(facts: Mapping[str, Any]) -> str | None:
    """Return why an engine cannot run on this machine, None if it can.

    Raises:
        InputError: if ``facts`` are not what :meth:`EngineFacts.as_dict` gives.
        MissingExtra: without any TensorRT.
    """
    engine, gpu = EngineFacts.from_dict(facts), find_gpu()
    if gpu is None:
        return "runs on an NVIDIA GPU, and there is none here, or no driver for it"
    if not torch.cuda.is_available():
        return f"needs a PyTorch with CUDA for its memory; here is {torch.__version__}"
    try:
        found = find_flavour(engine.flavour)
    except MissingExtra:
        found = find_flavour()  # another one, if any: enough to say that the engine is not for it
    if (found.name, found.version) != (engine.flavour, engine.version):
        return f"was built with {engine.flavour} {engine.version}; here is {found}"
    if engine.targets and gpu.compute_capability not in engine.targets:
        reason = f"was built for compute capability {', '.join(engine.targets)}; here is {gpu}"
        known = gpu.compute_capability in RTX_TARGETS
        return reason if known else f'{reason}, for which TensorRT is needed: pip install "sdzoo[tensorrt]"'
    if not engine.targets and gpu != engine.gpu:
        return f"was built for {engine.gpu}; here is {gpu}"
    return None


class _Engine:
    """An engine on the GPU, with the one execution context that its calls share."""

    def __init__(self, path: Path, found: Flavour) -> None:
        trt, words = found.module, logger(found.module)
        self._lock = threading.Lock()
        self._stream = torch.cuda.Stream(torch.device("cuda", 0))
        with words.lock, torch.cuda.stream(self._stream):  # which also makes that GPU the current one
            words.errors.clear()
            self._runtime = trt.Runtime(words)
            self._engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
            self._context = self._engine and self._engine.create_execution_context()
            if not self._context:
                raise InputError(f"{found} cannot load {path}: {words.said()}")
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        inputs = [name for name in names if self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        outputs = [name for name in names if name not in inputs]
        kinds = [np.dtype(trt.nptype(self._engine.get_tensor_dtype(name))) for name in (*inputs, *outputs)]
        if len(kinds) != 2 or kinds[1] != np.float32:
            raise InputError(
                f"{path} has inputs {inputs} and outputs {outputs}, {kinds}; wanted: one each, float32 out"
            )
        (self._input,), (self._output,), self._dtype = inputs, outputs, kinds[0]
        self._sample = tuple(self._engine.get_tensor_shape(self._input))[1:]
        shapes = self._engine.get_tensor_profile_shape(self._input, 0)
        self._smallest, self._largest = shapes[0][0], shapes[2][0]

    def __call__(self, batch: NDArray[Any]) -> NDArray[np.float32]:
        """Return logits ``(B, num_classes)``.

        Raises:
            InputError: if ``batch`` is of another type or shape than the engine's input, or empty.
            RuntimeError: if TensorRT fails to run it.
        """
        if batch.dtype != self._dtype or batch.shape[1:] != self._sample or not len(batch):
            wanted = ", ".join(["batch", *map(str, self._sample)])
            raise InputError(f"the array is {batch.dtype} {batch.shape}; wanted: {self._dtype} ({wanted})")
        pieces = [self._piece(batch[at : at + self._largest]) for at in range(0, len(batch), self._largest)]
        return np.concatenate(pieces)

    def _piece(self, batch: NDArray[Any]) -> NDArray[np.float32]:
        filling = np.zeros((max(0, self._smallest - len(batch)), *self._sample), self._dtype)
        whole = np.require(np.concatenate([batch, filling]) if len(filling) else batch, requirements=["C", "W"])
        with self._lock, torch.cuda.stream(self._stream):
            images = torch.from_numpy(whole).to(self._stream.device)
            if not self._context.set_input_shape(self._input, tuple(whole.shape)):
                raise RuntimeError(f"TensorRT does not take a batch of {len(whole)}")
            shape = tuple(self._context.get_tensor_shape(self._output))
            logits = torch.empty(shape, dtype=torch.float32, device=self._stream.device)
            self._context.set_tensor_address(self._input, images.data_ptr())
            self._context.set_tensor_address(self._output, logits.data_ptr())
            if not self._context.execute_async_v3(self._stream.cuda_stream):
                raise RuntimeError(f"TensorRT did not run a batch of {len(whole)}")
            return logits.cpu().numpy()[: len(batch)]  # waits for the stream
