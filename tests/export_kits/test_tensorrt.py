"""Engines compiled by real TensorRT for RTX, which needs no GPU. They are run in tests/gpu, where there is one."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from nets import calibrated, random_images
from onnx import TensorProto, helper

import sdzoo
from sdzoo.deploy import tensorrt_builder
from sdzoo.deploy.half import to_half
from sdzoo.deploy.onnx_graph import onnx_graph
from sdzoo.deploy.preprocess import with_preprocessing
from sdzoo.deploy.quantize import quantize
from sdzoo.deploy.tensorrt_builder import RTX_TARGETS, build_engine, find_flavour, find_gpu
from sdzoo.deploy.tensorrt_engine import load_engine
from sdzoo.errors import InputError

trt: Any = pytest.importorskip(
    "tensorrt_rtx", reason="no TensorRT for RTX: pip install -r export/tensorrt/requirements.txt"
)
SIZES = {"sd_resnet20": 32, "sd_resnet110": 32, "sd_resnet50": 224}
CONVOLUTIONS = {"sd_resnet20": 19, "sd_resnet110": 109, "sd_resnet50": 53}


@cache
def graph(arch: str) -> onnx.ModelProto:
    """Return ``arch``, calibrated and folded. Read only."""
    size = SIZES[arch]
    model = calibrated(arch, images=random_images(4, size))
    return onnx_graph(sdzoo.fold(model), (3, size, size), "logits")


def weights(arch: str) -> int:
    return sum(int(np.prod(tensor.dims)) for tensor in graph(arch).graph.initializer)


def at(precision: str, arch: str) -> onnx.ModelProto:
    if precision == "fp16":
        return to_half(graph(arch))
    return (
        graph(arch)
        if precision == "fp32"
        else quantize(graph(arch), "tensorrt", iter([random_images(8, SIZES[arch]).numpy()]))
    )


def test_it_is_found() -> None:
    found = find_flavour("tensorrt-rtx")
    assert (found.module, found.version) == (trt, trt.__version__)


@pytest.mark.skipif(find_gpu() is not None, reason="needs a machine without GPU; with one, see tests/gpu")
def test_without_a_gpu_an_engine_is_built_and_not_loaded(tmp_path: Path) -> None:
    path = tmp_path / "model.engine"
    facts = build_engine(graph("sd_resnet20").SerializeToString(), path, flavour="tensorrt-rtx")
    with pytest.raises(InputError, match=r"runs on an NVIDIA GPU, and there is none here"):
        load_engine(path, facts.as_dict(), "sdzoo export ...", None)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("arch", SIZES)
def test_every_precision_compiles(
    arch: str, precision: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    proto = at(precision, arch)
    path = tmp_path / "model.engine"
    facts = build_engine(proto.SerializeToString(), path, flavour="tensorrt-rtx")
    assert facts.bytes == path.stat().st_size > weights(arch) * {"fp32": 4, "fp16": 2, "int8": 1}[precision]
    assert facts.layers > CONVOLUTIONS[arch]
    assert facts.profile == (1, 8, 64)
    assert facts.targets == RTX_TARGETS
    assert facts.gpu == find_gpu()
    with capsys.disabled():
        print(f"\n{arch} {precision}: {facts.layers} layers, {facts.bytes} bytes", end=" ")


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_preprocessing_in_the_graph_compiles(precision: str, tmp_path: Path) -> None:
    proto = with_preprocessing(graph("sd_resnet20"), {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.2,) * 3})
    proto = to_half(proto) if precision == "fp16" else proto
    assert proto.graph.input[0].type.tensor_type.elem_type == TensorProto.UINT8
    assert build_engine(proto.SerializeToString(), tmp_path / "model.engine", flavour="tensorrt-rtx").bytes > 0


# What TensorRT refuses, in its own words: without these, nothing above would say that it looks at all


def refused(proto: onnx.ModelProto | bytes, folder: Path, match: str) -> None:
    """Assert that a file is refused and nothing is left in the folder."""
    content = proto if isinstance(proto, bytes) else proto.SerializeToString()
    with pytest.raises(InputError, match=match):
        build_engine(content, folder / "model.engine", flavour="tensorrt-rtx")
    assert not list(folder.iterdir())


def model_of(node: onnx.NodeProto, kind: int, shape: list[str | int], out: list[str | int]) -> onnx.ModelProto:
    given = helper.make_tensor_value_info("images", kind, shape)
    output = helper.make_tensor_value_info("logits", kind, out)
    scales = onnx.numpy_helper.from_array(np.array([1, 1, 0.5, 0.5], np.float32), "scales")
    used = [scales] if "scales" in node.input else []
    opset = [helper.make_opsetid("", 18)]
    return helper.make_model(
        helper.make_graph([node], "one", [given], [output], used), opset_imports=opset, ir_version=8
    )


def test_a_truncated_file(tmp_path: Path) -> None:
    content = graph("sd_resnet20").SerializeToString()
    for left in (1, len(content) // 2, len(content) - 1):
        refused(content[:left], tmp_path, r"cannot parse the ONNX file: .*Failed to parse the ONNX model")
    refused(b"", tmp_path, "the ONNX file takes nothing")  # for TensorRT, nothing is a network


def test_a_network_that_does_not_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_builder, "RTX_TARGETS", ("7.5",))
    refused(graph("sd_resnet20"), tmp_path, r"cannot compile .*Turing \(SM75\): FP32 GEMM is not supported")


def test_hopper_is_no_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_builder, "RTX_TARGETS", ("8.9", "9.0"))
    refused(graph("sd_resnet20"), tmp_path, r"has no target of compute capability 9\.0")


def test_an_operator_it_does_not_know(tmp_path: Path) -> None:
    node = helper.make_node("Bernoullish", ["images"], ["logits"])
    refused(model_of(node, TensorProto.FLOAT, ["batch", 3], ["batch", 3]), tmp_path, r"cannot parse .*Bernoullish")


def test_a_resize_as_pillows(tmp_path: Path) -> None:
    node = helper.make_node("Resize", ["images", "", "scales"], ["logits"], mode="linear", antialias=1)
    proto = model_of(node, TensorProto.FLOAT, ["batch", 3, 8, 8], ["batch", 3, 4, 4])
    refused(proto, tmp_path, r"cannot parse .*Antialiasing is not supported")


def test_bytes_into_a_transpose(tmp_path: Path) -> None:
    node = helper.make_node("Transpose", ["images"], ["logits"], perm=[0, 3, 1, 2])
    proto = model_of(node, TensorProto.UINT8, ["batch", 8, 8, 3], ["batch", 3, 8, 8])
    refused(proto, tmp_path, r"cannot parse .*first input has type UInt8")
