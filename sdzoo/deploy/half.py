"""Half precision: float16 weights and arithmetic between float32 inputs and outputs, where nothing overflows.

A CPU computes float16 files in float32 and so would never notice an overflow. It is looked for in the float32 graph.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from sdzoo.errors import ParityError

LARGEST = 32_000.0  # of 65 504: images that were not looked at may reach further


def to_half(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Return a float16 copy of ``proto`` with its inputs and outputs in float32."""
    from onnxruntime.transformers.float16 import convert_float_to_float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    converted = OnnxModel(convert_float_to_float16(copy, keep_io_types=True))
    converted.topological_sort()  # the casts were appended
    return converted.model


def check_range(proto: onnx.ModelProto, batches: Iterable[NDArray[np.generic]]) -> tuple[str, float]:
    """Return the node of the float32 graph ``proto`` whose output is largest on ``batches``, and how large.

    Raises:
        ParityError: naming the first node or weight that is beyond 32 000, or not finite.
    """
    import onnxruntime

    for weight in proto.graph.initializer:
        if weight.data_type == TensorProto.FLOAT:
            _check(f"the weight {weight.name}", float(np.abs(numpy_helper.to_array(weight)).max(initial=0)))
    probe = _with_maxima(proto)
    names = [node.name for node in proto.graph.node]
    session = onnxruntime.InferenceSession(probe.SerializeToString(), providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    largest = np.zeros(len(names))
    for batch in batches:
        found = np.array(session.run(None, {given.name: batch}), np.float64)
        largest = np.maximum(largest, found)  # NaN stays NaN
        for name, value in zip(names, largest, strict=True):
            _check(f"the output of node {name}", value)
    return names[int(largest.argmax())], float(largest.max())


def _check(what: str, value: float) -> None:
    if not value <= LARGEST:
        raise ParityError(f"{what} reaches {value:.6g}; in float16 at most {LARGEST:g} is allowed: export fp32")


def _with_maxima(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy of ``proto`` whose outputs are the largest magnitude of each node's output, in their order."""
    probe = onnx.ModelProto()
    probe.CopyFrom(proto)
    outputs = [node.output[0] for node in proto.graph.node]
    del probe.graph.output[:]
    for output in outputs:
        probe.graph.node.append(helper.make_node("Abs", [output], [f"{output}/abs"]))
        probe.graph.node.append(helper.make_node("ReduceMax", [f"{output}/abs"], [f"{output}/max"], keepdims=0))
        probe.graph.output.append(helper.make_tensor_value_info(f"{output}/max", TensorProto.FLOAT, []))
    return probe
