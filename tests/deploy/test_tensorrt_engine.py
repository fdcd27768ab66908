"""Loading and running engines, with doubles of TensorRT and of the GPU: real ones are in tests/gpu."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nets import close, evaluate, random_images
from onnx import TensorProto, helper
from tensorrt_double import install, pretend
from torch import nn

from sdzoo.deploy.tensorrt_builder import Gpu, build_engine
from sdzoo.deploy.tensorrt_engine import Run, load_engine, why_not_here
from sdzoo.errors import InputError
from sdzoo.extras import MissingExtra

RTX_4090, RTX_4080, H100 = (
    Gpu(f"NVIDIA {name}", capability)
    for name, capability in (("GeForce RTX 4090", "8.9"), ("GeForce RTX 4080", "8.9"), ("H100", "9.0"))
)
REBUILD = "sdzoo export sd_resnet20 --to tensorrt -o folder"
PROVE = "sdzoo verify sd_resnet20 model.unverified.engine"
TENSORRT, RTX = {"tensorrt": "11.4.0.106"}, {"tensorrt_rtx": "1.7.1.116"}


class Place:
    """A machine with doubles, on which engines are built and loaded."""

    def __init__(self, patch: pytest.MonkeyPatch, folder: Path) -> None:
        self._patch, self.path = patch, folder / "model.engine"

    def has(self, gpu: Gpu | None, versions: dict[str, str]) -> None:
        pretend(self._patch, gpu)
        install(self._patch, **versions)

    def build(self, content: bytes, **kwargs: Any) -> dict[str, Any]:
        return build_engine(content, self.path, **kwargs).as_dict()


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Place:
    """Return a machine with TensorRT for RTX and a GPU that it knows."""
    place = Place(monkeypatch, tmp_path)
    place.has(RTX_4090, RTX)
    return place


def loaded(place: Place, content: bytes, **kwargs: Any) -> Run:
    return load_engine(place.path, place.build(content, **kwargs), REBUILD, PROVE)


# Running


@pytest.mark.parametrize("size", [1, 2, 8, 9, 17])
def test_batches_of_any_size(place: Place, model: nn.Module, exported: Path, size: int) -> None:
    run = loaded(place, exported.read_bytes(), batch=(2, 4, 8))  # 1 is filled up, 9 and 17 leave one over
    images = random_images(size, seed=size)
    logits = run(images.numpy())
    assert logits.dtype == np.float32
    close(evaluate(model, images), torch.from_numpy(logits), 1e-4)


def test_an_array_in_another_order_of_memory(place: Place, model: nn.Module, exported: Path) -> None:
    images = random_images(3)
    transposed = np.ascontiguousarray(images.numpy().transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    logits = loaded(place, exported.read_bytes())(transposed)
    close(evaluate(model, images), torch.from_numpy(logits), 1e-4)


def test_bytes_go_in_where_the_engine_takes_bytes(place: Place) -> None:
    given = helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", 5])
    output = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 5])
    cast = helper.make_node("Cast", ["images"], ["logits"], to=TensorProto.FLOAT)
    opset = [helper.make_opsetid("", 18)]
    proto = helper.make_model(helper.make_graph([cast], "cast", [given], [output]), opset_imports=opset, ir_version=8)
    run = loaded(place, proto.SerializeToString())
    pixels = np.arange(250, 260, dtype=np.int64).astype(np.uint8).reshape(2, 5)
    np.testing.assert_array_equal(run(pixels), [[250, 251, 252, 253, 254], [255, 0, 1, 2, 3]])
    with pytest.raises(InputError, match=r"the array is float32 \(2, 5\); wanted: uint8 \(batch, 5\)"):
        run(pixels.astype(np.float32))


def test_threads_wait_for_each_other(place: Place, model: nn.Module, exported: Path) -> None:
    run = loaded(place, exported.read_bytes())
    batches = [random_images(1 + seed % 5, seed=seed) for seed in range(24)]
    with ThreadPoolExecutor(8) as pool:
        outputs = list(pool.map(lambda images: run(images.numpy()), batches))
    for images, logits in zip(batches, outputs, strict=True):
        close(evaluate(model, images), torch.from_numpy(logits), 1e-4)


@pytest.mark.parametrize(
    "array",
    [np.zeros((2, 3, 32, 31), np.float32), np.zeros((0, 3, 32, 32), np.float32), np.zeros((2, 3, 32, 32))],
    ids=["shape", "empty", "float64"],
)
def test_arrays_that_do_not_fit(place: Place, exported: Path, array: np.ndarray[Any, Any]) -> None:
    with pytest.raises(InputError, match=re.escape(f"the array is {array.dtype} {array.shape}; wanted: float32")):
        loaded(place, exported.read_bytes())(array)


def test_outputs_that_are_not_float32(place: Place) -> None:
    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT16, ["batch", 5]) for name in ("images", "logits")]
    graph = helper.make_graph([helper.make_node("Relu", ["images"], ["logits"])], "half", info[:1], info[1:])
    with pytest.raises(InputError, match="wanted: one each, float32 out"):
        loaded(place, helper.make_model(graph, ir_version=8).SerializeToString())


# Where it runs


def test_an_engine_for_rtx_runs_on_every_target(place: Place, exported: Path) -> None:
    place.has(None, RTX)
    facts = place.build(exported.read_bytes())
    for capability in ("8.0", "8.6", "8.9", "12.0", "12.1"):
        place.has(Gpu("some GPU", capability), RTX)
        assert why_not_here(facts) is None
    assert load_engine(place.path, facts, REBUILD, PROVE)(random_images(1).numpy()).shape == (1, 10)


def test_an_engine_of_tensorrt_runs_on_its_gpu(place: Place, exported: Path) -> None:
    place.has(RTX_4090, TENSORRT | RTX)
    facts = place.build(exported.read_bytes())
    assert why_not_here(facts) is None
    assert load_engine(place.path, facts, REBUILD, PROVE)(random_images(1).numpy()).shape == (1, 10)


@pytest.mark.parametrize(
    ("built", "here", "message"),
    [
        ((RTX_4090, RTX), (RTX_4090, {"tensorrt_rtx": "1.8"}), "with tensorrt-rtx 1.7.1.116; here is tensorrt-rtx 1.8"),
        ((RTX_4090, RTX), (RTX_4090, TENSORRT), "with tensorrt-rtx 1.7.1.116; here is tensorrt 11.4.0.106"),
        ((RTX_4090, TENSORRT), (RTX_4090, RTX), "with tensorrt 11.4.0.106; here is tensorrt-rtx 1.7.1.116"),
        (
            (RTX_4090, TENSORRT),
            (RTX_4080, TENSORRT),
            "for NVIDIA GeForce RTX 4090 (compute capability 8.9); "
            "here is NVIDIA GeForce RTX 4080 (compute capability 8.9)",
        ),
        (
            (None, RTX),
            (H100, RTX),
            "for compute capability 8.0, 8.6, 8.9, 12.0, 12.1; here is NVIDIA H100 (compute capability 9.0), "
            'for which TensorRT is needed: pip install "sdzoo[tensorrt]"',
        ),
    ],
    ids=["version", "TensorRT instead of RTX", "RTX instead of TensorRT", "GPU", "H100"],
)
def test_elsewhere_the_command_that_rebuilds_it_is_told(
    place: Place,
    exported: Path,
    built: tuple[Gpu | None, dict[str, str]],
    here: tuple[Gpu | None, dict[str, str]],
    message: str,
) -> None:
    place.has(*built)
    facts = place.build(exported.read_bytes())
    place.has(*here)
    with pytest.raises(InputError) as caught:
        load_engine(place.path, facts, REBUILD, PROVE)
    assert str(caught.value) == f"{place.path} was built {message}; build it anew here: {REBUILD}"


def test_a_target_that_was_left_out_needs_no_other_tensorrt(place: Place, exported: Path) -> None:
    facts = place.build(exported.read_bytes()) | {"targets": ["12.0"]}
    assert str(why_not_here(facts)).endswith("here is NVIDIA GeForce RTX 4090 (compute capability 8.9)")


def test_where_building_anew_would_not_help(place: Place, exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = place.build(exported.read_bytes())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match=r"needs a PyTorch with CUDA for its memory; here is [^;]*$"):
        load_engine(place.path, facts, REBUILD, PROVE)
    place.has(None, RTX)
    with pytest.raises(InputError, match=r"runs on an NVIDIA GPU, and there is none here, or no driver for it$"):
        load_engine(place.path, facts, REBUILD, PROVE)
    place.has(RTX_4090, {})
    with pytest.raises(MissingExtra, match=r"sdzoo\[tensorrt-rtx\]"):
        load_engine(place.path, facts, REBUILD, PROVE)


# Files


def test_an_unverified_engine_is_refused_unless_it_is_to_be_verified(place: Place, exported: Path) -> None:
    place.path = place.path.with_name("model.unverified.engine")
    facts = place.build(exported.read_bytes())
    with pytest.raises(InputError, match=re.escape(f"run {PROVE}")):
        load_engine(place.path, facts, REBUILD, PROVE)
    assert load_engine(place.path, facts, REBUILD, None)(random_images(1).numpy()).shape == (1, 10)


def test_files_that_are_missing_or_damaged(place: Place, exported: Path) -> None:
    facts = place.build(exported.read_bytes())
    with pytest.raises(InputError, match=r"other\.engine does not exist"):
        load_engine(place.path.with_name("other.engine"), facts, REBUILD, PROVE)
    content = place.path.read_bytes()
    place.path.write_bytes(content[:-1])
    with pytest.raises(InputError, match=rf"is damaged: it has {len(content) - 1} bytes, its card says {len(content)}"):
        load_engine(place.path, facts, REBUILD, PROVE)
    place.path.write_bytes(b"?" * len(content))
    with pytest.raises(InputError, match=r"tensorrt-rtx 1\.7\.1\.116 cannot load .*: magic tag does not match"):
        load_engine(place.path, facts, REBUILD, PROVE)
