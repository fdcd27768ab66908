"""A folded network as an ONNX graph.

A folded network has a dozen kinds of node, so they are written directly, each from its PyTorch call in the traced
graph: a 1202-layer network takes seconds, where torch's exporters take up to minutes (benchmarks/export_time.py). A
call that is not in the tables below is refused by name.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import onnx
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from sdzoo.errors import InputError

OPSET = 18
INPUT = "images"


class _Writer:
    """Collects nodes and initializers; each method writes one PyTorch call and returns the name of its result."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []

    def constant(self, name: str, value: Tensor) -> str:
        self.initializers.append(numpy_helper.from_array(value.detach().cpu().contiguous().numpy(), name))
        return name

    def add(self, op: str, name: str, inputs: list[str], **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op, inputs, [name], name=name, **attributes))
        return name

    def conv(self, name: str, module: nn.Conv2d, x: str) -> str:
        if module.padding_mode != "zeros" or isinstance(module.padding, str):
            raise InputError(f"{name}: only numeric zero padding can be exported")
        names = [x, self.constant(f"{name}.weight", module.weight)]
        if module.bias is not None:
            names.append(self.constant(f"{name}.bias", module.bias))
        return self.add(
            "Conv",
            name,
            names,
            kernel_shape=module.kernel_size,
            strides=module.stride,
            pads=module.padding * 2,
            dilations=module.dilation,
            group=module.groups,
        )

    def linear(self, name: str, module: nn.Linear, x: str) -> str:
        names = [x, self.constant(f"{name}.weight", module.weight)]
        if module.bias is not None:
            names.append(self.constant(f"{name}.bias", module.bias))
        return self.add("Gemm", name, names, transB=1)

    def relu(self, name: str, _: nn.Module, x: str) -> str:
        return self.add("Relu", name, [x])

    def unchanged(self, _name: str, _: nn.Module, x: str) -> str:
        return x

    def global_pool(self, name: str, module: nn.Module, x: str) -> str:
        if module.output_size not in (1, (1, 1)):
            raise InputError(f"{name}: only pooling to 1x1 can be exported")
        return self.add("GlobalAveragePool" if isinstance(module, nn.AdaptiveAvgPool2d) else "GlobalMaxPool", name, [x])

    def flatten(self, name: str, module: nn.Flatten, x: str) -> str:
        if (module.start_dim, module.end_dim) != (1, -1):
            raise InputError(f"{name}: only flattening all but the batch can be exported")
        return self.add("Flatten", name, [x], axis=1)

    def avg_pool2d(
        self,
        name: str,
        x: str,
        kernel: int,
        stride: int,
        *,
        ceil_mode: bool,
        count_include_pad: bool,
    ) -> str:
        return self.add(
            "AveragePool",
            name,
            [x],
            kernel_shape=[kernel] * 2,
            strides=[stride] * 2,
            ceil_mode=int(ceil_mode),
            count_include_pad=int(count_include_pad),
        )

    def pad(self, name: str, x: str, amounts: tuple[int, ...], mode: str, value: float | None) -> str:
        if mode != "constant" or value:
            raise InputError(f"{name}: only zero padding can be exported")
        pairs = [(0, 0)] * (4 - len(amounts) // 2) + list(zip(amounts[::2], amounts[1::2], strict=True))[::-1]
        pads = torch.tensor([begin for begin, _ in pairs] + [end for _, end in pairs])
        return self.add("Pad", name, [x, self.constant(f"{name}.pads", pads)])

    def pool2d(self, name: str, module: Any, x: str) -> str:
        attributes: dict[str, int] = {"ceil_mode": int(module.ceil_mode)}
        if isinstance(module, nn.AvgPool2d):
            if module.divisor_override is not None:
                raise InputError(f"{name}: a pooling that overrides its divisor cannot be exported")
            attributes["count_include_pad"] = int(module.count_include_pad)
        elif module.dilation not in (1, (1, 1)) or module.return_indices:
            raise InputError(f"{name}: a pooling with dilation or indices cannot be exported")
        sizes = {"kernel_shape": _pair(module.kernel_size), "strides": _pair(module.stride)}
        op = "AveragePool" if isinstance(module, nn.AvgPool2d) else "MaxPool"
        return self.add(op, name, [x], pads=_pair(module.padding) * 2, **sizes, **attributes)

    def slices(self, name: str, x: str, index: tuple[Any, ...]) -> str:
        if not all(isinstance(part, slice) for part in index):
            raise InputError(f"{name}: only slices can be exported")
        cut = [(axis, part) for axis, part in enumerate(index) if part != slice(None)]
        columns = {
            "starts": [part.start or 0 for _, part in cut],
            "ends": [torch.iinfo(torch.int64).max if part.stop is None else part.stop for _, part in cut],
            "axes": [axis for axis, _ in cut],
            "steps": [part.step or 1 for _, part in cut],
        }
        return self.add(
            "Slice",
            name,
            [x, *(self.constant(f"{name}.{key}", torch.tensor(column)) for key, column in columns.items())],
        )

    def mean(self, name: str, x: str, axes: tuple[int, ...], keepdim: bool = False) -> str:
        return self.add(
            "ReduceMean", name, [x, self.constant(f"{name}.axes", torch.tensor(axes))], keepdims=int(keepdim)
        )

    def sigmoid(self, name: str, x: str) -> str:
        return self.add("Sigmoid", name, [x])

    def plus(self, name: str, a: str, b: str) -> str:
        return self.add("Add", name, [a, b])

    def times(self, name: str, a: str, b: str) -> str:
        return self.add("Mul", name, [a, b])


def _pair(size: int | tuple[int, int]) -> list[int]:
    return [size, size] if isinstance(size, int) else list(size)


MODULES: dict[type[nn.Module], Callable[..., str]] = {
    nn.Conv2d: _Writer.conv,
    nn.Linear: _Writer.linear,
    nn.ReLU: _Writer.relu,
    nn.Identity: _Writer.unchanged,
    nn.Dropout: _Writer.unchanged,
    nn.MaxPool2d: _Writer.pool2d,
    nn.AvgPool2d: _Writer.pool2d,
    nn.AdaptiveAvgPool2d: _Writer.global_pool,
    nn.AdaptiveMaxPool2d: _Writer.global_pool,
    nn.Flatten: _Writer.flatten,
}
FUNCTIONS: dict[Callable[..., Any], Callable[..., str]] = {
    F.avg_pool2d: _Writer.avg_pool2d,
    F.pad: _Writer.pad,
    operator.add: _Writer.plus,
    operator.mul: _Writer.times,
    operator.getitem: _Writer.slices,
}
METHODS: dict[str, Callable[..., str]] = {"mean": _Writer.mean, "sigmoid": _Writer.sigmoid}


def _write(writer: _Writer, node: fx.Node, traced: fx.GraphModule, args: tuple[Any, ...]) -> str:
    target: Any = node.target
    if node.op == "get_attr":
        return writer.constant(target, operator.attrgetter(target)(traced))
    if node.op == "call_module":
        module = traced.get_submodule(target)
        name, args, kind, write = target, (module, *args), type(module).__name__, MODULES.get(type(module))
    else:
        name, kind = node.name, getattr(target, "__name__", target)
        write = (METHODS if node.op == "call_method" else FUNCTIONS).get(target)
    if write is None:
        raise InputError(f"{kind} cannot be exported (at {node.name})")
    return write(writer, name, *args, **node.kwargs)


def onnx_graph(folded: nn.Module, input_size: tuple[int, int, int], output: str) -> onnx.ModelProto:
    """Return ``folded`` as an ONNX model with the input ``images`` ``(batch, C, H, W)`` and one output.

    Args:
        folded: A folded float32 model in evaluation.
        input_size: ``(C, H, W)``; the batch is dynamic.
        output: Name of the output.

    Raises:
        InputError: naming a call that has no ONNX counterpart here.
    """
    traced = fx.symbolic_trace(folded)
    ShapeProp(traced).propagate(torch.zeros(1, *input_size))
    writer, names = _Writer(), dict[fx.Node, str]()
    shape: tuple[int, ...] = ()

    def named(argument: Any) -> Any:
        return names[argument] if isinstance(argument, fx.Node) else argument

    for node in traced.graph.nodes:
        if node.op == "placeholder":
            names[node] = INPUT
        elif node.op == "output":
            shape = tuple(node.args[0].meta["tensor_meta"].shape[1:])
            writer.nodes[-1].output[0] = output
        else:
            names[node] = _write(writer, node, traced, tuple(map(named, node.args)))
    graph = helper.make_graph(
        writer.nodes,
        "sdzoo",
        [helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, ["batch", *input_size])],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, ["batch", *shape])],
        writer.initializers,
    )
    opset = helper.make_opsetid("", OPSET)
    return helper.make_model(
        graph, opset_imports=[opset], ir_version=helper.find_min_ir_version_for([opset]), producer_name="sdzoo"
    )
