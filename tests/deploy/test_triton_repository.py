from __future__ import annotations

import importlib.util
import json
import os
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from nets import Net, close, random_images

import sdzoo
from sdzoo.deploy import triton
from sdzoo.deploy.triton import write_repository
from sdzoo.errors import InputError
from sdzoo.extras import MissingExtra

needs_tritonclient = pytest.mark.skipif(
    importlib.util.find_spec("tritonclient") is None, reason='tritonclient not installed: pip install "sdzoo[triton]"'
)

CARD: Mapping[str, Any] = {
    "precision": "fp32",
    "input": {
        "name": "images",
        "dtype": "float32",
        "layout": "NCHW",
        "shape": ["batch", 3, 32, 32],
        "largest_batch": 64,
    },
    "output": {"name": "logits", "dtype": "float32", "shape": ["batch", 10]},
}
IN_GRAPH = {
    **CARD,
    "input": {**CARD["input"], "dtype": "uint8", "layout": "NHWC", "shape": ["batch", 32, 32, 3]},
}
LABELS = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]

# Written by hand from Triton's documentation of config.pbtxt.
EXPECTED = """
name: "net"
backend: "onnxruntime"
default_model_filename: "model.onnx"
version_policy { latest { num_versions: 1 } }
max_batch_size: 64
input { name: "images" data_type: TYPE_FP32 format: FORMAT_NCHW dims: [3, 32, 32] }
output { name: "logits" data_type: TYPE_FP32 dims: [10] label_filename: "labels.txt" }
instance_group { count: 1 kind: KIND_AUTO }
dynamic_batching { }
model_warmup {
  name: "batch_1" batch_size: 1
  inputs { key: "images" value { data_type: TYPE_FP32 dims: [3, 32, 32] zero_data: true } }
}
model_warmup {
  name: "batch_64" batch_size: 64
  inputs { key: "images" value { data_type: TYPE_FP32 dims: [3, 32, 32] zero_data: true } }
}
"""


def parsed(text: str) -> Any:
    from google.protobuf import text_format

    messages = importlib.import_module("tritonclient.grpc.model_config_pb2")
    return text_format.Parse(text, messages.ModelConfig())


def config_of(model: Path) -> Any:
    return parsed((model / "config.pbtxt").read_text())


def tree(folder: Path) -> list[str]:
    return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())


# The repository


@needs_tritonclient
def test_configuration_is_the_one_written_by_hand(tmp_path: Path, exported: Path) -> None:
    model = write_repository(tmp_path / "models", "net", exported, CARD, labels=LABELS)
    assert model == tmp_path / "models" / "net"
    assert config_of(model) == parsed(EXPECTED)


@needs_tritonclient
def test_files_of_a_model(tmp_path: Path, exported: Path) -> None:
    model = write_repository(tmp_path, "net", exported, CARD, labels=LABELS)
    assert tree(tmp_path) == ["net/1/model.onnx", "net/config.pbtxt", "net/labels.txt"]
    assert (model / "1" / "model.onnx").read_bytes() == exported.read_bytes()
    assert (model / "labels.txt").read_text().splitlines() == LABELS


@needs_tritonclient
def test_python_backend(tmp_path: Path, exported: Path) -> None:
    model = write_repository(tmp_path, "net", exported.read_bytes(), CARD, labels=LABELS, backend="python", instances=3)
    assert tree(tmp_path) == ["net/1/model.onnx", "net/1/model.py", "net/config.pbtxt", "net/labels.txt"]
    expected = parsed(EXPECTED.replace("onnxruntime", "python").replace("model.onnx", "model.py"))
    (group,) = expected.instance_group
    group.count, group.kind = 3, 2  # ModelInstanceGroup.KIND_CPU
    assert config_of(model) == expected
    assert (model / "1" / "model.py").read_text() == (Path(triton.__file__).parent / "triton_model.py").read_text()


@needs_tritonclient
@pytest.mark.parametrize(("precision", "mode"), [("fp32", "FP32"), ("fp16", "FP16"), ("int8", "INT8")])
def test_tensorrt_is_an_option_of_the_onnxruntime_backend(
    tmp_path: Path, exported: Path, precision: str, mode: str
) -> None:
    card = {**CARD, "precision": precision}
    model = write_repository(tmp_path, "net", exported, card, labels=LABELS, tensorrt=True)
    accelerator = f'name: "tensorrt" parameters {{ key: "precision_mode" value: "{mode}" }}'
    expected = f"optimization {{ execution_accelerators {{ gpu_execution_accelerator {{ {accelerator} }} }} }}"
    assert config_of(model) == parsed(EXPECTED.replace("KIND_AUTO", "KIND_GPU") + expected)


@needs_tritonclient
def test_preprocessing_in_the_graph(tmp_path: Path, exported: Path) -> None:
    expected = EXPECTED.replace("NCHW", "NHWC").replace("3, 32, 32", "32, 32, 3").replace("TYPE_FP32", "TYPE_UINT8")
    expected = expected.replace('"logits" data_type: TYPE_UINT8', '"logits" data_type: TYPE_FP32')
    assert config_of(write_repository(tmp_path, "net", exported, IN_GRAPH, labels=LABELS)) == parsed(expected)


@needs_tritonclient
def test_largest_batch_is_warmed_up(tmp_path: Path, exported: Path) -> None:
    config = config_of(write_repository(tmp_path, "net", exported, CARD, largest_batch=17))
    assert config.max_batch_size == 17
    assert [warmup.batch_size for warmup in config.model_warmup] == [1, 17]
    config = config_of(write_repository(tmp_path, "single", exported, CARD, largest_batch=1))
    assert config.max_batch_size == 1
    assert [warmup.batch_size for warmup in config.model_warmup] == [1]


@needs_tritonclient
def test_classes_without_names_are_numbered(tmp_path: Path, exported: Path) -> None:
    model = write_repository(tmp_path, "net", exported, CARD)
    assert (model / "labels.txt").read_text() == "0\n1\n2\n3\n4\n5\n6\n7\n8\n9\n"


@needs_tritonclient
def test_names_in_other_scripts(tmp_path: Path, exported: Path) -> None:
    labels = [*LABELS[:9], "Müllwagen 🚛"]
    model = write_repository(tmp_path, "net", exported, CARD, labels=labels)
    assert (model / "labels.txt").read_bytes().decode("utf-8").splitlines() == labels


@needs_tritonclient
def test_features_have_no_labels(tmp_path: Path, exported: Path) -> None:
    card = {**CARD, "output": {"name": "features", "dtype": "float32", "shape": ["batch", 64, 8, 8]}}
    model = write_repository(tmp_path, "net", exported, card)
    assert tree(model) == ["1/model.onnx", "config.pbtxt"]
    (output,) = config_of(model).output
    assert (output.name, list(output.dims), output.label_filename) == ("features", [64, 8, 8], "")


@needs_tritonclient
@pytest.mark.parametrize("name", ["net", "sd_resnet20.cifar10_jpeg", "sd-resnet20", "20", "_net", "n" * 100])
def test_names_that_triton_takes(tmp_path: Path, exported: Path, name: str) -> None:
    model = write_repository(tmp_path, name, exported, CARD)
    assert config_of(model).name == model.name == name


@needs_tritonclient
def test_models_share_a_repository_and_one_is_replaced_whole(tmp_path: Path, exported: Path) -> None:
    write_repository(tmp_path, "one", exported, CARD, backend="python")
    write_repository(tmp_path, "two", exported, CARD)
    write_repository(tmp_path, "one", exported, CARD)
    assert tree(tmp_path) == [
        f"{name}/{file}" for name in ("one", "two") for file in ("1/model.onnx", "config.pbtxt", "labels.txt")
    ]


# What is refused


@needs_tritonclient
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"backend": "onnx"}, 'backend "onnx" is unknown; known: onnxruntime, python'),
        ({"backend": "tensorrt"}, 'backend "tensorrt" is unknown; known: onnxruntime, python'),
        ({"backend": "python", "tensorrt": True}, "TensorRT belongs to the onnxruntime backend; the python backend"),
        ({"instances": 0}, "instances is 0; 1 to 1024"),
        ({"instances": 1025}, "instances is 1025; 1 to 1024"),
        ({"largest_batch": 0}, "largest_batch is 0; 1 to 64"),
        ({"largest_batch": 65}, "largest_batch is 65; 1 to 64, the largest that the model was compared at"),
        ({"labels": LABELS[:9]}, "9 labels for 10 classes"),
        ({"labels": [*LABELS[:9], "a\nb"]}, r"labels[9] is 'a\nb'"),
        ({"labels": ["", *LABELS[1:]]}, "labels[0] is ''"),
        *(
            ({"name": name}, f'"{name}" cannot name a model of Triton; 1 to 100 of')
            for name in ("", "a/b", "..", ".net", "a b", "ä", "-net", "n" * 101, "net\n", "net%20")
        ),
        (
            {"card": {**CARD, "precision": "fp8"}, "tensorrt": True},
            'precision "fp8" is unknown to TensorRT; known:',
        ),
        (
            {"card": {**CARD, "input": {**CARD["input"], "dtype": "float64"}}},
            "images is float64; known: float32",
        ),
        ({"card": {**CARD, "input": {**CARD["input"], "shape": [1, 3, 32, 32]}}}, "images is [1, 3, 32, 32]; Triton"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, str) else "",
)
def test_refused(tmp_path: Path, exported: Path, arguments: dict[str, Any], said: str) -> None:
    given = {"name": "net", "card": CARD, "labels": LABELS, **arguments}
    with pytest.raises(InputError) as caught:
        write_repository(tmp_path / "models", model=exported, **given)
    assert said in str(caught.value)
    assert not (tmp_path / "models").exists()


@needs_tritonclient
@pytest.mark.parametrize("content", [b"", b"ptrt\x00\x01", b"ftrt\x00\x01", b"vtrt\x00\x01", b"RTX"])
def test_an_engine_is_never_written(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.engine").write_bytes(content)
    for model in (content, tmp_path / "model.engine"):
        with pytest.raises(InputError, match=r"is no ONNX file.*an engine fits one version of TensorRT"):
            write_repository(tmp_path / "models", "net", model, CARD)
    assert not (tmp_path / "models").exists()


@needs_tritonclient
def test_a_missing_file_and_a_folder_of_other_things(tmp_path: Path, exported: Path) -> None:
    with pytest.raises(InputError, match=r"nothing\.onnx is not a file"):
        write_repository(tmp_path / "models", "net", tmp_path / "nothing.onnx", CARD)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is a file; name a folder"):
        write_repository(tmp_path / "file", "net", exported, CARD)
    (tmp_path / "net").mkdir()
    (tmp_path / "net" / "thesis.tex").touch()
    (tmp_path / "net" / "labels.txt").touch()
    with pytest.raises(InputError, match=r"holds other things \(labels\.txt, thesis\.tex\)"):
        write_repository(tmp_path, "net", exported, CARD)
    assert tree(tmp_path) == ["file", "net/labels.txt", "net/thesis.tex"]


@needs_tritonclient
def test_a_version_that_somebody_added_is_kept(tmp_path: Path, exported: Path) -> None:
    model = write_repository(tmp_path, "net", exported, CARD, backend="python")
    (model / "2").mkdir()
    (model / "2" / "model.onnx").touch()
    with pytest.raises(InputError, match=r"net holds other things \(2/model\.onnx\); name another folder"):
        write_repository(tmp_path, "net", exported, CARD)
    assert (model / "2" / "model.onnx").is_file()


# Exported


@needs_tritonclient
@pytest.mark.parametrize(("backend", "preset"), [(None, "cpu"), ("onnxruntime-tensorrt", "tensorrt")])
def test_int8_is_quantised_for_what_computes(
    tmp_path: Path, classifier: Net, few: Path, calibration: Path, backend: str | None, preset: str
) -> None:
    out = tmp_path / "out"
    card = sdzoo.export(
        classifier,
        "triton",
        out,
        backend=backend,
        precision="int8",
        images=few,
        calibration=calibration,
        max_drop=20.0,
    )
    assert isinstance(card.parity, dict) and card.parity["preset"] == preset
    optimization = config_of(out / "model_repository" / "sd_resnet20").optimization
    accelerators = optimization.execution_accelerators.gpu_execution_accelerator
    assert [a.parameters["precision_mode"] for a in accelerators] == ["INT8"] * (preset == "tensorrt")


@needs_tritonclient
def test_a_model_that_somebody_added_to_an_exported_repository_is_kept(tmp_path: Path, classifier: Net) -> None:
    out = tmp_path / "out"
    sdzoo.export(classifier, "triton", out)
    sdzoo.export(classifier, "triton", out, backend="python")  # over the first
    write_repository(out / "model_repository", "mine", out / "model_repository/sd_resnet20/1/model.onnx", CARD)
    before = tree(out)
    with pytest.raises(InputError, match=r"out holds other things \(model_repository/mine/1/model\.onnx, "):
        sdzoo.export(classifier, "triton", out)
    assert tree(out) == before


@needs_tritonclient
def test_nothing_is_left_of_a_failure(tmp_path: Path, exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_repository(tmp_path, "net", exported, CARD, largest_batch=17)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    monkeypatch.setattr(triton, "PYTHON_MODEL", tmp_path / "nothing.py")
    with pytest.raises(OSError, match="cannot write"):
        write_repository(tmp_path, "net", exported, CARD, backend="python")
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


def test_a_missing_package_is_named_with_its_extra(
    tmp_path: Path, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r'tritonclient.*pip install "sdzoo\[triton\]"'):
        write_repository(tmp_path, "net", exported, CARD)


# The python backend's model, with what it uses of Triton replaced


class Tensor:
    def __init__(self, name: str, array: np.ndarray) -> None:
        self.name, self.array = name, array

    def as_numpy(self) -> np.ndarray:
        return self.array


class InferenceResponse:
    def __init__(self, tensors: list[Tensor]) -> None:
        self.tensors = tensors


def get_input_tensor_by_name(request: dict[str, np.ndarray], name: str) -> Tensor:
    return Tensor(name, request[name])


@pytest.fixture
def python_model(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the loaded model of the python backend, its instance group of two."""
    fake: Any = types.ModuleType("triton_python_backend_utils")
    fake.Tensor, fake.InferenceResponse = Tensor, InferenceResponse
    fake.get_input_tensor_by_name = get_input_tensor_by_name
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", fake)
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "model.onnx").write_bytes(exported.read_bytes())
    spec = importlib.util.spec_from_file_location("model", Path(triton.__file__).parent / "triton_model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.TritonPythonModel()
    model.initialize(arguments(tmp_path))
    return model


def arguments(folder: Path) -> dict[str, str]:
    config = {"input": [{"name": "images"}], "output": [{"name": "logits"}], "instance_group": [{"count": 2}]}
    return {"model_repository": str(folder), "model_version": "1", "model_config": json.dumps(config)}


def test_a_damaged_file_is_not_served(python_model: Any, exported: Path, tmp_path: Path) -> None:
    proto = onnx.load(exported)
    weights = max(proto.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    weights.raw_data = bytes([weights.raw_data[0] ^ 1]) + weights.raw_data[1:]
    entries = list(proto.metadata_props)
    for metadata in (entries, [entry for entry in entries if entry.key != "file_sha256"]):
        del proto.metadata_props[:]
        proto.metadata_props.extend(metadata)
        onnx.save(proto, tmp_path / "1" / "model.onnx")
        with pytest.raises(ValueError, match=r"model\.onnx is damaged: its sha256 is not the one in its metadata"):
            python_model.initialize(arguments(tmp_path))


@pytest.mark.parametrize("sizes", [[1], [1, 1, 1], [2, 1, 5]])
def test_each_request_of_a_batch_gets_its_own_answer(python_model: Any, exported: Path, sizes: list[int]) -> None:
    requests = [{"images": random_images(size, seed=seed).numpy()} for seed, size in enumerate(sizes)]
    responses = python_model.execute(requests)
    assert len(responses) == len(requests)
    predictor = sdzoo.load_predictor(exported, "cpu")
    for request, response in zip(requests, responses, strict=True):
        (tensor,) = response.tensors
        assert tensor.name == "logits"
        assert tensor.array.flags["C_CONTIGUOUS"]
        close(torch.from_numpy(predictor(request["images"])), torch.from_numpy(tensor.array), 1e-4)


def test_a_batch_of_requests_is_one_call(python_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    session = python_model.session
    run = types.SimpleNamespace(run=lambda names, feed: calls.append(feed["images"].shape) or session.run(names, feed))
    monkeypatch.setattr(python_model, "session", run)
    python_model.execute([{"images": random_images(size).numpy()} for size in (3, 4)])
    assert calls == [(7, 3, 32, 32)]


def test_instances_share_the_cores(python_model: Any) -> None:
    cores = len(os.sched_getaffinity(0))
    assert python_model.session.get_session_options().intra_op_num_threads == max(1, cores // 2)
