"""Compiling engines, with doubles: real TensorRT for RTX is in tests/export_kits/test_tensorrt.py."""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper
from tensorrt_double import Plan, install, pretend

from sdzoo.deploy.tensorrt_builder import (
    EngineFacts,
    Gpu,
    build_engine,
    find_flavour,
    find_gpu,
)
from sdzoo.errors import InputError
from sdzoo.extras import MissingExtra

RTX_4090 = Gpu("NVIDIA GeForce RTX 4090", "8.9")


@pytest.fixture
def rtx(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the double of TensorRT for RTX, alone on a machine without GPU."""
    pretend(monkeypatch, None)
    return install(monkeypatch, tensorrt_rtx="1.7.1.116")["tensorrt_rtx"]


def relu(shape: tuple[str | int, ...] = ("batch", 3), inputs: int = 1, producer: str = "test") -> bytes:
    given = [helper.make_tensor_value_info(f"x{i}", TensorProto.FLOAT, shape) for i in range(inputs)]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)
    graph = helper.make_graph([helper.make_node("Relu", ["x0"], ["y"])], "relu", given, [output])
    return helper.make_model(graph, producer_name=producer).SerializeToString()


# Which TensorRT


def test_auto_takes_tensorrt_before_tensorrt_for_rtx(monkeypatch: pytest.MonkeyPatch) -> None:
    doubles = install(monkeypatch, tensorrt="11.4.0.106", tensorrt_rtx="1.7.1.116")
    found = find_flavour()
    assert (found.name, found.version, found.module) == ("tensorrt", "11.4.0.106", doubles["tensorrt"])
    assert str(find_flavour("tensorrt-rtx")) == "tensorrt-rtx 1.7.1.116"


def test_auto_takes_tensorrt_for_rtx_where_there_is_no_other(rtx: Any) -> None:
    assert find_flavour("auto").name == "tensorrt-rtx"


def test_one_asked_for_by_name_is_never_another(rtx: Any) -> None:
    with pytest.raises(MissingExtra) as caught:
        find_flavour("tensorrt")
    assert str(caught.value) == 'tensorrt is not installed; install with: pip install "sdzoo[tensorrt]"'
    assert isinstance(caught.value, ImportError)


def test_without_any_both_extras_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    with pytest.raises(MissingExtra, match=r"sdzoo\[tensorrt\]\" or pip install \"sdzoo\[tensorrt-rtx\]"):
        find_flavour()


def test_one_that_is_installed_but_broken_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch)
    monkeypatch.delitem(sys.modules, "tensorrt")
    (tmp_path / "tensorrt.py").write_text("import tensorrt_bindings_that_are_not_there")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(MissingExtra, match=r"cannot be imported .*tensorrt_bindings_that_are_not_there"):
        find_flavour("tensorrt")


def test_an_unknown_one_is_an_error() -> None:
    with pytest.raises(InputError, match='"tensorrt_rtx" is unknown; known: auto, tensorrt, tensorrt-rtx; nearest: t'):
        find_flavour("tensorrt_rtx")


# The GPU


class Driver:
    """The five functions of CUDA's driver library, for one GPU or, with ``code``, none."""

    def __init__(self, code: int = 0) -> None:
        self.code = code

    def cuInit(self, flags: int) -> int:  # noqa: N802
        return self.code

    def cuDeviceGet(self, device: Any, index: int) -> int:  # noqa: N802
        device._obj.value = 3
        return 0 if index == 0 else 101

    def cuDeviceGetName(self, name: Any, size: int, device: Any) -> int:  # noqa: N802
        name.value = b"NVIDIA L4"[: size - 1]
        return 0 if device.value == 3 else 101

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: Any) -> int:  # noqa: N802
        value._obj.value = {75: 8, 76: 9}[attribute]
        return 0 if device.value == 3 else 101


def test_the_driver_is_asked_for_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver())
    assert find_gpu() == Gpu("NVIDIA L4", "8.9")


def test_a_driver_without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver(code=100))
    assert find_gpu() is None


def test_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", absent)
    assert find_gpu() is None


# Building


def test_what_is_written_and_told(rtx: Any, exported: Path, tmp_path: Path) -> None:
    facts = build_engine(exported.read_bytes(), tmp_path / "model.engine")
    size = (tmp_path / "model.engine").stat().st_size
    nodes = len(onnx.load(exported).graph.node)
    targets = ("8.0", "8.6", "8.9", "12.0", "12.1")
    assert facts == EngineFacts("tensorrt-rtx", "1.7.1.116", None, targets, (1, 8, 64), nodes, size)
    assert size > 0
    (flags, config) = rtx.builds[0]
    assert flags == 1 << rtx.NetworkDefinitionCreationFlag.STRONGLY_TYPED
    assert "TF32" not in config.flags
    assert config.targets == ["SM80", "SM86", "SM89", "SM120", "SM121"]
    assert config.profiles[0].shapes == ("images", ((1, 3, 32, 32), (8, 3, 32, 32), (64, 3, 32, 32)))


def test_other_batches_can_be_asked_for(rtx: Any, tmp_path: Path) -> None:
    assert build_engine(relu(), tmp_path / "model.engine", batch=(2, 4, 4)).profile == (2, 4, 4)
    assert rtx.builds[0][1].profiles[0].shapes == ("x0", ((2, 3), (4, 3), (4, 3)))


def test_facts_survive_json(rtx: Any, tmp_path: Path) -> None:
    facts = build_engine(relu(), tmp_path / "model.engine", batch=(2, 4, 4))
    assert EngineFacts.from_dict(json.loads(json.dumps(facts.as_dict()))) == facts
    with_gpu = EngineFacts("tensorrt", "11.4.0.106", RTX_4090, (), (1, 8, 64), 3, 4)
    assert EngineFacts.from_dict(json.loads(json.dumps(with_gpu.as_dict()))) == with_gpu


def test_tensorrt_is_bound_to_the_gpu_and_has_no_targets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pretend(monkeypatch, RTX_4090)
    double = install(monkeypatch, tensorrt="11.4.0.106", tensorrt_rtx="1.7.1.116")["tensorrt"]
    facts = build_engine(relu(), tmp_path / "model.engine")
    assert (facts.flavour, facts.gpu, facts.targets) == ("tensorrt", RTX_4090, ())
    assert double.builds[0][1].targets == []


def test_auto_without_a_gpu_is_the_one_that_compiles_without(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pretend(monkeypatch, None)
    install(monkeypatch, tensorrt="11.4.0.106", tensorrt_rtx="1.7.1.116")
    assert build_engine(relu(), tmp_path / "model.engine").flavour == "tensorrt-rtx"


@pytest.mark.parametrize(
    ("flavour", "installed"),
    [
        ("tensorrt", {"tensorrt": "11.4.0.106", "tensorrt_rtx": "1.7.1.116"}),
        ("auto", {"tensorrt": "11.4.0.106"}),
    ],
)
def test_tensorrt_without_a_gpu_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flavour: str, installed: dict[str, str]
) -> None:
    pretend(monkeypatch, None)
    install(monkeypatch, **installed)
    with pytest.raises(
        InputError, match=r"tensorrt 11\.4\.0\.106 compiles on the GPU .* tensorrt-rtx compiles without"
    ):
        build_engine(relu(), tmp_path / "model.engine", flavour=flavour)


def refused(tmp_path: Path, content: bytes, *, match: str, batch: Any = (1, 8, 64)) -> None:
    """Assert that a build is refused and leaves what was there."""
    path = tmp_path / "model.engine"
    path.write_bytes(b"old")
    with pytest.raises(InputError, match=match):
        build_engine(content, path, batch)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_broken_file_is_refused_in_the_parsers_words(rtx: Any, tmp_path: Path) -> None:
    refused(
        tmp_path,
        relu()[:-9],
        match=r"tensorrt-rtx 1\.7\.1\.116 cannot parse the ONNX file: In node -1: the double cannot read it",
    )


def test_what_does_not_compile_is_refused_in_tensorrts_words(rtx: Any, tmp_path: Path) -> None:
    refused(tmp_path, relu(producer="breaks"), match=r"cannot compile the ONNX file: no kernel; for this$")
    refused(tmp_path, relu(producer="breaks"), match=r"cannot compile the ONNX file: no kernel; for this$")


def test_an_empty_plan_is_refused(rtx: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rtx.Builder, "build_serialized_network", lambda *_: Plan())
    refused(tmp_path, relu(), match="cannot compile the ONNX file: it does not say why")


@pytest.mark.parametrize(
    ("content", "shapes"),
    [
        (relu((4, 3)), r"\(4, 3\)"),
        (relu(("batch", "channels")), r"\(-1, -1\)"),
        (relu(inputs=2), r"\(-1, 3\), \(-1, 3\)"),
    ],
    ids=["fixed batch", "two dynamic dimensions", "two inputs"],
)
def test_the_batch_alone_may_be_dynamic(rtx: Any, tmp_path: Path, content: bytes, shapes: str) -> None:
    refused(tmp_path, content, match=rf"takes {shapes}; wanted is one input")


@pytest.mark.parametrize("batch", [(0, 8, 64), (8, 1, 64), (1, 65, 64), (1, 8)])
def test_batches_out_of_order(rtx: Any, tmp_path: Path, batch: Any) -> None:
    refused(tmp_path, relu(), match="batch is .*; give smallest, best and largest", batch=batch)


# The card's word


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"profile": None}, "cannot be read"),
        ({"profile": [1, 8]}, "cannot be read"),
        ({"gpu": {"name": "x"}}, "cannot be read"),
        ({"bytes": "many"}, "cannot be read"),
    ],
)
def test_facts_that_cannot_be_read(change: dict[str, Any], message: str) -> None:
    facts = EngineFacts("tensorrt", "11.4.0.106", RTX_4090, (), (1, 8, 64), 3, 4).as_dict()
    with pytest.raises(InputError, match=message):
        EngineFacts.from_dict(facts | change)
    del facts["gpu"], facts["bytes"]
    with pytest.raises(InputError, match="lacks bytes, gpu"):
        EngineFacts.from_dict(facts)
