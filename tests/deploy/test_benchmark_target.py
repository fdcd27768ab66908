"""Which targets there are, and what is said of those that cannot run."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from sdzoo.deploy import benchmark_target as module
from sdzoo.deploy import onnx_export
from sdzoo.deploy.benchmark_target import TARGETS, Given, Opening, choose, device_name, make, open_target, opening
from sdzoo.deploy.predictor import model_predictor
from sdzoo.deploy.tensorrt_builder import Flavour, Gpu
from sdzoo.deploy.verification import Images, default_images
from sdzoo.errors import InputError
from sdzoo.extras import MissingExtra
from sdzoo.images import input_config

CONFIG: dict[str, Any] = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3}


def given(count: int | None = None, labelled: bool = False, calibration: str | None = None) -> Given:
    images = default_images(CONFIG)
    if count is not None:
        labels = torch.zeros(count, dtype=torch.long) if labelled else None
        images = Images(f"{count} pictures", ["x"] * count, lambda _: np.zeros((3, 8, 8), np.uint8), labels=labels)
    return Given(images, "somewhere", calibration, None, 0.5)


@pytest.fixture(autouse=True)
def _bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither OpenVINO nor TensorRT nor a GPU, whatever this machine has."""
    find = importlib.util.find_spec

    def found(name: str, *rest: Any) -> Any:
        return None if name == "openvino" else find(name, *rest)

    def none(_: str = "auto") -> Flavour:
        raise MissingExtra('tensorrt is not installed; install with: pip install "sdzoo[tensorrt]"')

    monkeypatch.setattr(importlib.util, "find_spec", found)
    monkeypatch.setattr(module, "find_flavour", none)
    monkeypatch.setattr(module, "find_gpu", lambda: None)


@pytest.mark.parametrize(
    ("what", "also"),
    [
        (given(), []),
        (given(999), []),
        (given(1000), ["onnx-fp16"]),
        (given(300, labelled=True), []),
        (given(300, labelled=True, calibration="c"), ["onnx-int8"]),
        (given(300, calibration="c"), []),
        (given(1000, labelled=True, calibration="c"), ["onnx-fp16", "onnx-int8"]),
    ],
)
def test_by_default_those_that_can_run(what: Given, also: list[str]) -> None:
    assert choose(None, what) == ["eager", "folded", "folded-channels-last", "onnx", *also]


def test_what_is_left_out_is_noted_with_its_reason() -> None:
    noted: list[str] = []
    choose(None, given(999), noted.append)
    assert [line.split()[2] for line in noted] == ["onnx-fp16", "onnx-int8", "openvino", "tensorrt"]
    assert noted[0].startswith("left out: onnx-fp16 cannot be judged: fp16 is compared on at least 1000 real images")
    choose(["eager"], given(999), noted.append)
    assert len(noted) == 4  # who names targets knows what is not among them


def test_they_come_in_one_order() -> None:
    assert choose(["onnx", "eager", "onnx"], given()) == ["eager", "onnx"]


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("onnx-fp16", "target onnx-fp16 cannot be judged: fp16 is compared on at least 1000 real images"),
        ("onnx-int8", "target onnx-int8 needs at least 256 pictures to calibrate on"),
        ("openvino", r'target openvino needs pip install "sdzoo\[openvino\]"'),
        ("tensorrt", r'target tensorrt cannot run: tensorrt is not installed; .*"sdzoo\[tensorrt\]"'),
    ],
)
def test_what_an_impossible_one_lacks(target: str, said: str) -> None:
    with pytest.raises(InputError, match=f"^{said}.*; possible here: eager, folded, folded-channels-last, onnx$"):
        choose(["eager", target], given())


def test_an_unknown_one_is_told_what_is_possible_and_what_is_missing() -> None:
    with pytest.raises(InputError) as raised:
        choose(["onnx-int4"], given())
    said = str(raised.value)
    assert said.startswith('target "onnx-int4" is unknown; possible here: eager, folded, folded-channels-last, onnx; ')
    assert said.endswith("; nearest: onnx-int8")
    assert all(target in said for target in TARGETS)
    with pytest.raises(InputError, match="no targets given; possible here: eager, "):
        choose([], given())


def test_without_onnx_only_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    what = given(1000, labelled=True, calibration="c")
    assert choose(None, what) == ["eager", "folded", "folded-channels-last"]
    for target in TARGETS[3:]:
        with pytest.raises(InputError, match=r'"sdzoo\[onnx\]"'):
            choose([target], what)


@pytest.mark.parametrize(
    ("flavour", "capability", "cuda", "reason"),
    [
        ("tensorrt", "9.0", True, None),
        ("tensorrt", "9.0", False, "needs an NVIDIA GPU, and a PyTorch with CUDA"),
        ("tensorrt", None, True, "needs an NVIDIA GPU, and a PyTorch with CUDA"),
        ("tensorrt-rtx", "8.9", True, None),
        ("tensorrt-rtx", "9.0", True, "needs TensorRT itself for card (compute capability 9.0): tensorrt-rtx 1 has no"),
    ],
)
def test_tensorrt_needs_its_gpu(
    monkeypatch: pytest.MonkeyPatch, flavour: str, capability: str | None, cuda: bool, reason: str | None
) -> None:
    monkeypatch.setattr(module, "find_flavour", lambda: Flavour(flavour, "1", None))
    monkeypatch.setattr(module, "find_gpu", lambda: Gpu("card", capability) if capability else None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    said = module.why_not("tensorrt", replace(given(), provider="cuda"))
    assert said is None if reason is None else said is not None and said.startswith(reason)


@pytest.mark.parametrize("compiled", [True, False])
def test_all_of_one_table_compute_on_one_kind_of_device(monkeypatch: pytest.MonkeyPatch, compiled: bool) -> None:
    """The model's; what cannot is left out of those by default, and told why when asked for."""
    providers = ["CUDAExecutionProvider"] * compiled + ["CPUExecutionProvider"]
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: providers)
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: True)
    monkeypatch.setattr(module, "_why_no_tensorrt", lambda: None)
    cpu, cuda = (replace(given(1000), provider=provider) for provider in ("cpu", "cuda"))
    torchs, onnx = ["eager", "folded", "folded-channels-last"], ["onnx", "onnx-fp16"]
    assert choose(None, cpu) == [*torchs, *onnx, "openvino"]
    assert choose(None, cuda) == [*torchs, *onnx * compiled, "tensorrt"]
    with pytest.raises(InputError, match=r"openvino computes on the CPU, the model on a GPU \(--provider cpu\)"):
        choose(["openvino"], cuda)
    with pytest.raises(InputError, match=r"tensorrt computes on a GPU, the model on the CPU \(--provider cuda\)"):
        choose(["tensorrt"], cpu)
    if not compiled:
        with pytest.raises(InputError, match=r"onnx needs the CUDA provider .*onnx-gpu\]\"\), or --provider cpu"):
            choose(["onnx"], cuda)


def test_an_exported_file_is_the_very_one_that_onnx_and_openvino_open(model: nn.Module, tmp_path: Path) -> None:
    what = Given(default_images(input_config(model)), None, None, None, 0.5)
    said: list[str] = []
    files = make(model, ["folded", "onnx", "openvino"], tmp_path, what, said.append)
    assert files["onnx"] == files["openvino"] == tmp_path / "fp32.onnx"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["folded.pt", "fp32.onnx"]
    assert {"making folded", "making onnx", "making openvino"} < set(said)


def test_each_file_is_exported_with_what_was_given(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls: dict[str, dict[str, Any]] = {}
    monkeypatch.setattr(onnx_export, "export_onnx", lambda _, file, **given: calls.update({file.name: given}))
    what = Given(default_images(CONFIG), "images", "calibration", None, 0.25)
    make(model, ["onnx", "onnx-fp16", "onnx-int8"], tmp_path, what, print)
    common = {"images": "images", "max_drop": 0.25, "progress": print}
    assert calls == {
        "fp32.onnx": common | {"precision": "fp32", "calibration": None},
        "fp16.onnx": common | {"precision": "fp16", "calibration": None},
        "int8.onnx": common | {"precision": "int8", "calibration": "calibration"},
    }


def test_a_graph_that_normalises_is_refused(model: nn.Module, tmp_path: Path) -> None:
    from sdzoo.deploy.onnx_export import export_onnx

    export_onnx(model, tmp_path / "model.onnx", preprocess="in-graph")
    what = Given(default_images(input_config(model)), None, None, tmp_path / "model.onnx", 0.5)
    with pytest.raises(InputError, match="normalises in its graph"):
        make(model, ["onnx"], tmp_path, what, lambda _: None)


def test_channels_last_is_another_layout_and_the_same_function(model: nn.Module, tmp_path: Path) -> None:
    config = input_config(model)
    pixels = np.random.default_rng(0).integers(0, 256, (4, 3, 32, 32), dtype=np.uint8)
    what = Given(default_images(config), None, None, None, 0.5)
    threads = torch.get_num_threads()
    seen: list[bool] = []
    files = make(model, ["folded", "folded-channels-last"], tmp_path, what, lambda _: None)
    hook = nn.modules.module.register_module_forward_hook(
        lambda module, _, out: (
            seen.append(out.is_contiguous(memory_format=torch.channels_last)) if isinstance(module, nn.Conv2d) else None
        )
    )
    try:
        for target, expected in (("folded", False), ("folded-channels-last", True)):
            seen.clear()
            found = open_target(opening(target, files[target], threads + 1, "cpu", config)).pixels(pixels)
            assert torch.get_num_threads() == threads + 1
            assert set(seen) == {expected}
            expected_logits = model_predictor(model).pixels(pixels)
            assert np.abs(found - expected_logits).max() <= 1e-4 * max(1, np.abs(expected_logits).max())
    finally:
        hook.remove()
        torch.set_num_threads(threads)


def test_threads_are_those_asked_for(exported: Path, model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(module, "load_predictor", lambda *given, **named: asked.append((given, named)))
    open_target(Opening("onnx-int8", "onnx", exported, 2, "cpu", input_config(model)))
    assert asked == [((exported, "cpu"), {"threads": 2})]


def test_openvino_computes_the_verified_file(exported: Path, model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # where it is installed, it is tried
    pytest.importorskip("openvino", reason="OpenVINO is not installed: the extra openvino")
    pixels = np.random.default_rng(0).integers(0, 256, (3, 3, 32, 32), dtype=np.uint8)
    predictor = open_target(opening("openvino", exported, 1, "cpu", input_config(model)))
    first, second = predictor.pixels(pixels), predictor.pixels(255 - pixels)
    for found, images in ((first, pixels), (second, 255 - pixels)):
        expected = model_predictor(model).pixels(images)
        assert np.abs(found - expected).max() <= 1e-4 * max(1, np.abs(expected).max())


def test_openvino_computes_in_float32_with_the_threads_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are bfloat16 instructions, its own choice would be those."""
    asked: list[Any] = []
    core = SimpleNamespace(compile_model=lambda *given: asked.extend(given))
    monkeypatch.setitem(sys.modules, "openvino", SimpleNamespace(Core=lambda: core))  # type: ignore[arg-type]
    open_target(opening("openvino", Path("x.onnx"), 2, "cpu", CONFIG))
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 2, "PERFORMANCE_HINT": "LATENCY"}
    assert asked == ["x.onnx", "CPU", settings]


def test_devices_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_gpu", lambda: Gpu("NVIDIA H", "9.0"))
    assert device_name("PyTorch cuda") == device_name("CUDAExecutionProvider") == "NVIDIA H"
    assert device_name("TensorRT 10.8, NVIDIA H") == "NVIDIA H"
    assert device_name("CPUExecutionProvider").endswith("cores")
