"""Normalising in the graph: uint8 pictures ``(batch, H, W, C)`` at the model's input size go in.

Cast, Transpose, then ``(x - 255 mean) / (255 std)``, in this order for all targets: TensorRT takes no uint8 into a
Transpose. Resizing and cropping stay with the client, since Pillow's antialiased resize has no exact twin in ONNX.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

PREFIX = "preprocess"


def with_preprocessing(proto: onnx.ModelProto, config: dict[str, Any]) -> onnx.ModelProto:
    """Return a copy of ``proto``, whose input is float32 ``(batch, C, H, W)``, that takes uint8 ``(batch, H, W, C)``.

    Args:
        proto: A model with one input; it may compute in any precision.
        config: timm's data config: ``input_size``, ``mean`` and ``std``.
    """
    wrapped = onnx.ModelProto()
    wrapped.CopyFrom(proto)
    graph = wrapped.graph
    (given,) = graph.input
    channels, height, width = config["input_size"]
    mean, std = (255 * np.asarray(config[name], np.float64).reshape(1, -1, 1, 1) for name in ("mean", "std"))
    constants = {f"{PREFIX}.mean": mean, f"{PREFIX}.scale": 1 / std}
    graph.initializer.extend(
        numpy_helper.from_array(value.astype(np.float32), name) for name, value in constants.items()
    )
    steps = [
        ("Cast", [given.name], {"to": TensorProto.FLOAT}),
        ("Transpose", [f"{PREFIX}.cast"], {"perm": [0, 3, 1, 2]}),
        ("Sub", [f"{PREFIX}.transpose", f"{PREFIX}.mean"], {}),
        ("Mul", [f"{PREFIX}.sub", f"{PREFIX}.scale"], {}),
    ]
    added = []
    for op, inputs, attributes in steps:
        name = f"{PREFIX}.{op.lower()}"
        added.append(helper.make_node(op, inputs, [name], name=name, **attributes))
    for node in graph.node:
        for index, name in enumerate(node.input):
            if name == given.name:
                node.input[index] = added[-1].name
    nodes = [*added, *graph.node]
    del graph.node[:], graph.input[:]
    graph.node.extend(nodes)
    graph.input.append(helper.make_tensor_value_info(given.name, TensorProto.UINT8, ["batch", height, width, channels]))
    return wrapped
