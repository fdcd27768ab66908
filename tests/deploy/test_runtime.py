from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nets import calibrated, close, evaluate, plain_forward, random_images, stored_probs
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx_files import save_sealed
from PIL import Image
from torch import nn

from sdzoo.assets import pictures
from sdzoo.deploy.onnx_export import export_onnx
from sdzoo.deploy.runtime import Predictor, load_predictor, model_predictor
from sdzoo.errors import InputError

FILES = list(pictures().values())
LABELS = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def normalised(*files: Path) -> NDArray[np.float32]:
    """Return 32-pixel pictures as the bundled models want them, without sdzoo's help."""
    mean, std = np.array([0.4914, 0.4822, 0.4465]), np.array([0.2470, 0.2435, 0.2616])
    pixels = np.stack([np.asarray(Image.open(file)) for file in files])
    return ((pixels / 255 - mean) / std).transpose(0, 3, 1, 2).astype(np.float32)


def equal(reference: NDArray[Any], other: NDArray[Any]) -> None:
    """Assert the limit that parity has."""
    assert reference.shape == other.shape
    assert np.abs(reference - other).max() <= 1e-4 * max(1, np.abs(reference).max())


@pytest.fixture(scope="module")
def predictor(exported: Path) -> Predictor:
    return load_predictor(exported)


@pytest.fixture(scope="module")
def torch_predictor(model: nn.Module) -> Predictor:
    return model_predictor(model)


@pytest.fixture(params=["onnx", "torch"])
def either(request: pytest.FixtureRequest, predictor: Predictor, torch_predictor: Predictor) -> Predictor:
    return predictor if request.param == "onnx" else torch_predictor


@pytest.fixture
def expected(model: nn.Module) -> Callable[..., NDArray[np.float32]]:
    """Return the logits of picture files by the paper's equations on the model's state dict."""
    state = model.state_dict()
    return lambda *files: plain_forward(state, torch.from_numpy(normalised(*files)), stored_probs(state)).numpy()


# What it takes and gives


def test_a_path(either: Predictor, expected: Callable[..., NDArray[np.float32]]) -> None:
    equal(expected(FILES[0]), either(FILES[0]))
    equal(expected(FILES[0]), either(str(FILES[0])))


def test_a_pil_image(either: Predictor, expected: Callable[..., NDArray[np.float32]]) -> None:
    with Image.open(FILES[1]) as image:
        equal(expected(FILES[1]), either(image))


def test_several_of_either_kind(either: Predictor, expected: Callable[..., NDArray[np.float32]]) -> None:
    logits = either([FILES[2], str(FILES[3]), Image.open(FILES[4])])
    equal(expected(FILES[2], FILES[3], FILES[4]), logits)
    equal(logits, either((FILES[2], FILES[3], FILES[4])))


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
@pytest.mark.parametrize("batch_size", [1, 5])
def test_a_normalised_array(
    model: nn.Module, either: Predictor, dtype: type[np.floating[Any]], batch_size: int
) -> None:
    images = random_images(batch_size).half()  # so that every dtype holds the same numbers
    logits = either(images.numpy().astype(dtype))
    assert logits.dtype == np.float32
    equal(evaluate(model, images.float()).numpy(), logits)


def test_an_array_laid_out_otherwise(model: nn.Module, either: Predictor) -> None:
    images = random_images(3)
    channels_last = np.ascontiguousarray(images.permute(0, 2, 3, 1).numpy()).transpose(0, 3, 1, 2)
    equal(evaluate(model, images).numpy(), either(channels_last))


def test_both_predictors_are_alike(predictor: Predictor, torch_predictor: Predictor) -> None:
    close(torch.from_numpy(torch_predictor(FILES)), torch.from_numpy(predictor(FILES)), 1e-4)
    for theirs, ours in zip(predictor.top(FILES, 3), torch_predictor.top(FILES, 3), strict=True):
        assert [one.label for one in theirs] == [one.label for one in ours]
        assert [one.probability for one in theirs] == pytest.approx([one.probability for one in ours], abs=1e-4)
    assert predictor.name == torch_predictor.name == "sd_resnet20"
    assert predictor.labels == torch_predictor.labels == LABELS
    for name in ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode"):
        assert predictor.config[name] == torch_predictor.config[name]


def test_the_larger_picture_is_resized_and_its_centre_taken(tmp_path: Path, either: Predictor) -> None:
    """Shorter side to 32, antialiased bilinear, then the middle 32 columns: columns 16 to 48 of 64."""
    pixels = np.random.default_rng(0).integers(0, 256, (48, 96, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    small = Image.fromarray(pixels).resize((64, 32), Image.Resampling.BILINEAR).crop((16, 0, 48, 32))
    small.save(tmp_path / "small.png")
    equal(either(normalised(tmp_path / "small.png")), either(tmp_path / "wide.png"))


def test_probabilities_are_the_softmax_of_the_logits(either: Predictor) -> None:
    images = random_images(3).numpy() * 3
    logits = either(images).astype(np.float64)
    softmax = torch.from_numpy(logits).softmax(1).numpy()
    for row, best in zip(softmax, either.top(images, 4), strict=True):
        order = sorted(range(10), key=lambda index: -row[index])[:4]
        assert [one.label for one in best] == [LABELS[index] for index in order]
        assert [one.probability for one in best] == pytest.approx(row[order].tolist(), rel=1e-9)
    assert len(either.top(images)[0]) == 5
    assert sum(one.probability for one in either.top(images, 10)[0]) == pytest.approx(1, abs=1e-12)
    assert len(either.top(images, 99)[0]) == 10


def test_large_logits_do_not_overflow(source: nn.Module) -> None:
    with torch.no_grad():
        source.get_parameter("fc.bias")[7] = 1e6
    best = model_predictor(source).top(FILES[0], 2)[0]
    assert (best[0].label, best[0].probability) == ("horse", 1.0)
    assert best[1].probability == 0.0


def test_classes_without_names_are_numbered(tmp_path: Path) -> None:
    model = calibrated("sd_resnet20", num_classes=3)
    export_onnx(model, tmp_path / "model.onnx")
    for predictor in (load_predictor(tmp_path / "model.onnx"), model_predictor(model)):
        assert predictor.labels is None
        assert {one.label for one in predictor.top(FILES[0])[0]} == {"0", "1", "2"}


@pytest.mark.parametrize("global_pool", ["avg", ""])
def test_a_model_without_classifier_has_no_top_classes(global_pool: str) -> None:
    predictor = model_predictor(calibrated("sd_resnet20", num_classes=0, global_pool=global_pool))
    assert predictor(FILES[0]).shape == ((1, 64) if global_pool else (1, 64, 8, 8))
    with pytest.raises(InputError):
        predictor.top(FILES[0])


@pytest.mark.parametrize("k", [0, -1])
def test_top_of_no_classes_is_refused(torch_predictor: Predictor, k: int) -> None:
    with pytest.raises(InputError):
        torch_predictor.top(FILES[0], k)


def test_one_channel(tmp_path: Path) -> None:
    model = calibrated("sd_resnet20", in_chans=1, images=random_images(8, chans=1))
    export_onnx(model, tmp_path / "model.onnx")
    grey = Image.open(FILES[0]).convert("L")
    mean, std = (0.4914 + 0.4822 + 0.4465) / 3, (0.2470 + 0.2435 + 0.2616) / 3
    array = ((np.asarray(grey) / 255 - mean) / std).astype(np.float32)[None, None]
    predictor = load_predictor(tmp_path / "model.onnx")
    equal(evaluate(model, torch.from_numpy(array)).numpy(), predictor(grey))
    with pytest.raises(InputError, match=r"is RGB; the model takes .*\bL\b"):
        predictor(FILES[0])


def test_the_torch_predictor_refuses_training_mode(source: nn.Module) -> None:
    with pytest.raises(InputError, match=r"training mode.*call model\.eval\(\)"):
        model_predictor(source.train())


def test_the_torch_predictor_computes_in_the_models_dtype(source: nn.Module) -> None:
    images = random_images(2)
    reference = evaluate(source, images)
    logits = model_predictor(source.double())(images.numpy())
    assert logits.dtype == np.float32
    close(reference, torch.from_numpy(logits), 1e-5)


# Arrays and pictures it refuses


@pytest.mark.parametrize(
    "shape", [(3, 32, 32), (1, 3, 32, 31), (1, 1, 32, 32), (1, 32, 32, 3), (0, 3, 32, 32), (1, 1, 3, 32, 32), ()]
)
def test_arrays_of_other_shapes(either: Predictor, shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError) as caught:
        either(np.zeros(shape, np.float32))
    assert f"the array is {shape}; sd_resnet20 takes (batch, 3, 32, 32)" in str(caught.value)


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.bool_, np.complex64, object, "U1"])
def test_arrays_of_other_types(either: Predictor, dtype: Any) -> None:
    """uint8 above all: pixels that are not normalised would give a confident wrong answer."""
    with pytest.raises(InputError, match=r"the array is .*; give normalised floats, or pictures"):
        either(np.zeros((1, 3, 32, 32), dtype))


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(1, 3, 32, 32),
        [np.zeros((3, 32, 32), np.float32)],
        [torch.zeros(3, 32, 32)],
        None,
        5,
        b"x.jpg",
        [None],
    ],
    ids=["tensor", "arrays", "tensors", "None", "number", "bytes", "Nones"],
)
def test_things_that_are_neither_pictures_nor_arrays(torch_predictor: Predictor, images: Any) -> None:
    with pytest.raises(InputError):
        torch_predictor(images)


def test_no_images(either: Predictor) -> None:
    with pytest.raises(InputError, match="no images given"):
        either([])


@pytest.fixture(scope="module")
def odd_pictures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pictures")
    with Image.open(FILES[0]) as image:
        image.convert("L").save(folder / "grey.png")
        image.convert("RGBA").save(folder / "rgba.png")
        image.resize((1, 1)).save(folder / "tiny.png")
    content = FILES[0].read_bytes()
    (folder / "truncated.jpg").write_bytes(content[: len(content) // 2])
    (folder / "text.jpg").write_text("no picture")
    return {file.stem: file for file in folder.iterdir()} | {"missing": folder / "missing.jpg", "folder": folder}


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("grey", r"is .*\bL\b.*; the model takes RGB"),
        ("rgba", r"is .*\bRGBA\b.*; the model takes RGB"),
        ("tiny", "is 1x1 pixels"),
        ("truncated", "cannot be decoded"),
        ("text", "is not an image"),
        ("missing", "does not exist"),
        ("folder", "is a folder"),
    ],
)
def test_pictures_that_cannot_be_used(either: Predictor, odd_pictures: dict[str, Path], name: str, says: str) -> None:
    with pytest.raises(InputError, match=says) as caught:
        either([FILES[0], odd_pictures[name]])
    assert str(odd_pictures[name]) in str(caught.value)


@pytest.mark.parametrize("mode", ["L", "RGBA"])
def test_a_pil_image_of_another_mode(either: Predictor, mode: str) -> None:
    with pytest.raises(InputError, match=rf"the image is .*\b{mode}\b.*; the model takes RGB"):
        either(Image.open(FILES[0]).convert(mode))


@pytest.mark.parametrize("kind", ["onnx", "torch"])
def test_conversion_where_it_is_asked_for(
    exported: Path, model: nn.Module, odd_pictures: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    predictor = load_predictor(exported, convert=True) if kind == "onnx" else model_predictor(model, convert=True)
    for name in ("grey", "rgba"):
        with Image.open(odd_pictures[name]) as image:
            image.convert("RGB").save(tmp_path / "rgb.png")
            equal(predictor(normalised(tmp_path / "rgb.png")), predictor(image))
        equal(predictor(normalised(tmp_path / "rgb.png")), predictor(odd_pictures[name]))
    with pytest.raises(InputError, match="1x1"):
        predictor(odd_pictures["tiny"])


# Providers and threads


class Sessions:
    """Stands for onnxruntime.InferenceSession: notes what was asked for; ``runs`` is the provider it claims to run."""

    def __init__(self, runs: str | None = None) -> None:
        self.create, self.runs = onnxruntime.InferenceSession, runs
        self.options: list[onnxruntime.SessionOptions] = []
        self.providers: list[list[str]] = []

    def __call__(self, path: str, options: onnxruntime.SessionOptions, providers: list[str], **_: Any) -> Any:
        self.options.append(options)
        self.providers.append(providers)
        session = self.create(path, providers=["CPUExecutionProvider"])
        if runs := self.runs:
            session.get_providers = lambda: [runs, "CPUExecutionProvider"]
        return session


def install(monkeypatch: pytest.MonkeyPatch, compiled: list[str], runs: str | None = None) -> Sessions:
    sessions = Sessions(runs)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: compiled)
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda *_, **__: None, raising=False)
    monkeypatch.setattr(onnxruntime, "InferenceSession", sessions)
    return sessions


@pytest.mark.parametrize("provider", ["auto", "cpu", "CPUExecutionProvider"])
def test_the_provider_that_runs_is_named(exported: Path, provider: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_predictor(exported, provider).provider == "CPUExecutionProvider"


def test_the_torch_predictor_names_its_device(torch_predictor: Predictor) -> None:
    assert torch_predictor.provider == "PyTorch cpu"


@pytest.mark.parametrize(
    ("provider", "says"),
    [
        ("cdua", 'provider "cdua" is unknown; known: auto, cpu, cuda, tensorrt; nearest: cuda'),
        ("CUDAExecutionProvidr", "nearest: CUDAExecutionProvider"),
        ("", "known: auto, cpu, cuda, tensorrt"),
        ("AUTO", "known: auto"),
    ],
)
def test_unknown_providers(exported: Path, provider: str, says: str) -> None:
    with pytest.raises(InputError) as caught:
        load_predictor(exported, provider)
    assert says in str(caught.value)


@pytest.mark.parametrize("provider", ["cuda", "tensorrt", "CUDAExecutionProvider"])
def test_providers_that_are_not_installed(exported: Path, monkeypatch: pytest.MonkeyPatch, provider: str) -> None:
    sessions = install(monkeypatch, ["CPUExecutionProvider"])
    with pytest.raises(InputError, match="is not in the installed onnxruntime; it has CPUExecutionProvider"):
        load_predictor(exported, provider)
    assert sessions.providers == []


@pytest.mark.parametrize(
    ("provider", "name"), [("cuda", "CUDAExecutionProvider"), ("tensorrt", "TensorrtExecutionProvider")]
)
def test_a_named_provider_that_falls_back_in_silence_is_an_error(
    exported: Path, monkeypatch: pytest.MonkeyPatch, provider: str, name: str
) -> None:
    sessions = install(monkeypatch, [name, "CPUExecutionProvider"])
    with pytest.raises(InputError, match=f"asked for {name}, but this machine can only run CPUExecutionProvider"):
        load_predictor(exported, provider)
    assert sessions.providers == [[name]]
    assert sessions.options[0].get_session_config_entry("session.disable_cpu_ep_fallback") == "1"


def test_a_named_provider_that_runs_is_the_only_one_listed(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sessions = install(monkeypatch, ["CUDAExecutionProvider", "CPUExecutionProvider"], "CUDAExecutionProvider")
    assert load_predictor(exported, "cuda").provider == "CUDAExecutionProvider"
    assert sessions.providers == [["CUDAExecutionProvider"]]


def test_auto_takes_cuda_where_it_runs(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sessions = install(monkeypatch, ["CUDAExecutionProvider", "CPUExecutionProvider"], "CUDAExecutionProvider")
    assert load_predictor(exported).provider == "CUDAExecutionProvider"
    assert sessions.providers == [["CUDAExecutionProvider", "CPUExecutionProvider"]]


def test_auto_warns_where_cuda_was_installed_but_does_not_run(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, ["CUDAExecutionProvider", "CPUExecutionProvider"])
    with pytest.warns(
        UserWarning, match="CUDAExecutionProvider is installed but .* using CPUExecutionProvider"
    ) as seen:
        predictor = load_predictor(exported)
    assert predictor.provider == "CPUExecutionProvider"
    assert seen[0].filename == __file__


def test_threads_reach_onnxruntime(
    exported: Path, monkeypatch: pytest.MonkeyPatch, expected: Callable[..., NDArray[np.float32]]
) -> None:
    equal(expected(FILES[0]), load_predictor(exported, threads=1)(FILES[0]))
    sessions = install(monkeypatch, ["CPUExecutionProvider"])
    load_predictor(exported, threads=2)
    load_predictor(exported)
    assert [options.intra_op_num_threads for options in sessions.options] == [2, 0]


@pytest.mark.parametrize("threads", [0, -1, 10**6])
def test_threads_that_no_machine_has_are_refused(exported: Path, threads: int) -> None:
    with pytest.raises(InputError, match=f"threads is {threads}"):
        load_predictor(exported, threads=threads)


def test_missing_extra_is_named(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "onnxruntime" else find(name, *rest)
    )
    with pytest.raises(ImportError, match=r'onnxruntime not installed.*"sdzoo\[onnx\]"'):
        load_predictor(exported)


# Files it refuses


def refused(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        load_predictor(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("kept", [0, 1, 100, 0.3, 0.9, -1])
def test_truncated(tmp_path: Path, exported: Path, kept: float) -> None:
    content = exported.read_bytes()
    (tmp_path / "x.onnx").write_bytes(content[: int(len(content) * kept) if isinstance(kept, float) else kept])
    refused(tmp_path / "x.onnx")


def test_missing_file_and_folder(tmp_path: Path) -> None:
    assert "does not exist" in refused(tmp_path / "missing.onnx")
    refused(tmp_path)


@pytest.mark.parametrize("content", [b"hello", b"\x00" * 1000, b"PK\x03\x04", bytes(range(256)) * 8])
def test_garbage(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.onnx").write_bytes(content)
    refused(tmp_path / "x.onnx")


def linear_graph(
    inputs: list[Any] | None = None, labels: int = 10, kind: int = TensorProto.FLOAT, outputs: int = 1
) -> onnx.GraphProto:
    shape = ["batch", 3, 32, 32] if inputs is None else inputs
    array = np.zeros((labels, math.prod(shape[1:])), helper.tensor_dtype_to_np_dtype(kind))
    nodes = [helper.make_node("Flatten", ["x"], ["flat"]), helper.make_node("Gemm", ["flat", "w"], ["y"], transB=1)]
    given = [helper.make_tensor_value_info("x", kind, shape)]
    results = [helper.make_tensor_value_info(name, kind, None) for name in ("y", "flat")[:outputs]]
    results[0].CopyFrom(helper.make_tensor_value_info("y", kind, [shape[0], labels]))
    return helper.make_graph(nodes, "other", given, results, [numpy_helper.from_array(array, "w")])


def constant_graph() -> onnx.GraphProto:
    value = helper.make_tensor("v", TensorProto.FLOAT, [1, 10], [0.0] * 10)
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 10])
    return helper.make_graph([helper.make_node("Constant", [], ["y"], value=value)], "constant", [], [result])


def write(path: Path, graph: onnx.GraphProto, metadata: dict[str, str] | None = None) -> Path:
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    helper.set_model_props(proto, metadata or {})
    return save_sealed(proto, path)


@pytest.fixture
def metadata(exported: Path) -> dict[str, str]:
    return {entry.key: entry.value for entry in onnx.load(exported, load_external_data=False).metadata_props}


def test_a_model_that_sdzoo_did_not_export(tmp_path: Path) -> None:
    message = refused(write(tmp_path / "x.onnx", linear_graph()))
    assert "was not exported by sdzoo: its metadata lack model, input_size" in message


@pytest.mark.parametrize("missing", ["model", "mean", "labels", "survival_probs"])
def test_metadata_that_lack_something(tmp_path: Path, metadata: dict[str, str], missing: str) -> None:
    del metadata[missing]
    assert f"its metadata lack {missing}" in refused(write(tmp_path / "x.onnx", linear_graph(), metadata))


@pytest.mark.parametrize(
    "graph",
    [
        linear_graph(["batch", 3, 64, 64]),
        linear_graph(["batch", 1, 32, 32]),
        linear_graph(["batch", 3072]),
        linear_graph(labels=9),
        linear_graph(labels=1000),
    ],
    ids=["size", "channels", "rank", "fewer classes", "more classes"],
)
def test_metadata_of_another_model(tmp_path: Path, metadata: dict[str, str], graph: onnx.GraphProto) -> None:
    refused(write(tmp_path / "x.onnx", graph, metadata))


@pytest.mark.parametrize(
    "graph",
    [
        constant_graph(),
        linear_graph(kind=TensorProto.DOUBLE),
        linear_graph(kind=TensorProto.FLOAT16),
        linear_graph([1, 3, 32, 32]),
    ],
    ids=["no input", "float64", "float16", "fixed batch"],
)
def test_graphs_that_cannot_be_fed_as_the_metadata_say(
    tmp_path: Path, metadata: dict[str, str], graph: onnx.GraphProto
) -> None:
    """Found at loading, not at the first prediction."""
    refused(write(tmp_path / "x.onnx", graph, metadata))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model", "{"),
        ("model", "5"),
        ("labels", "5"),
        ("labels", '"abcdefghij"'),
        ("input_size", '"3"'),
        ("mean", '"grey"'),
        ("mean", "null"),
        ("std", "[1, 1]"),
        ("interpolation", '"bilinaer"'),
        ("interpolation", "7"),
        ("crop_pct", '"all"'),
        ("crop_pct", "-1.0"),
    ],
)
def test_metadata_of_wrong_types(
    tmp_path: Path, exported: Path, metadata: dict[str, str], name: str, value: str
) -> None:
    proto = onnx.load(exported)
    del proto.metadata_props[:]
    helper.set_model_props(proto, metadata | {name: value})
    assert "sha256" not in refused(save_sealed(proto, tmp_path / "x.onnx"))


def test_a_file_sealed_again_loads(tmp_path: Path, exported: Path) -> None:
    load_predictor(save_sealed(onnx.load(exported), tmp_path / "x.onnx"))


@pytest.mark.parametrize("place", [0.05, 0.3, 0.5, 0.7, 0.95])
def test_a_flipped_byte_among_the_weights_is_refused(tmp_path: Path, exported: Path, place: float) -> None:
    content = bytearray(exported.read_bytes())
    content[int(place * len(content))] ^= 1
    (tmp_path / "x.onnx").write_bytes(content)
    refused(tmp_path / "x.onnx")


def test_metadata_that_are_not_text(tmp_path: Path, exported: Path) -> None:
    content = exported.read_bytes()
    assert content.count(b'"bilinear"') == 1
    (tmp_path / "x.onnx").write_bytes(content.replace(b'"bilinear"', b'"bil\xffnear"'))
    refused(tmp_path / "x.onnx")


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.one_of(st.binary(max_size=300), st.binary(max_size=50).map(lambda tail: b"\x08\x08" + tail)))
def test_random_bytes_are_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "random.onnx"
    path.write_bytes(content)
    refused(path)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_file_cut_anywhere_is_refused(
    tmp_path_factory: pytest.TempPathFactory, exported: Path, data: st.DataObject
) -> None:
    """Up to the metadata at its end; a cut between two of those that are not needed does no harm."""
    content = exported.read_bytes()
    path = tmp_path_factory.getbasetemp() / "cut.onnx"
    path.write_bytes(content[: data.draw(st.integers(0, content.index(b"weights_sha256")))])
    refused(path)


FLIP = """
import random, sys
from pathlib import Path
from sdzoo.deploy.runtime import load_predictor
from sdzoo.errors import InputError

content, picture, path = Path(sys.argv[1]).read_bytes(), sys.argv[2], Path(sys.argv[3])
ends = content.index(b"weights_sha256")
pick, others = random.Random(0), {}
for _ in range(150):
    damaged = bytearray(content)
    first, last = pick.choice([(0, len(content)), (0, 3000), (ends - 3000, ends)])
    for _ in range(pick.randrange(1, 10)):
        damaged[pick.randrange(first, last)] ^= 1 << pick.randrange(8)
    path.write_bytes(damaged)
    try:
        load_predictor(path, threads=1)
    except InputError as error:
        if "\\n" in str(error):
            others["two lines"] = str(error)
    except Exception as error:
        others[type(error).__name__] = str(error)
print(others or "fine")
"""


def test_files_with_flipped_bits_load_or_are_refused(tmp_path: Path, exported: Path) -> None:
    """In a process of its own, which a crash inside ONNX Runtime would end."""
    command = [sys.executable, "-c", FLIP, str(exported), str(FILES[0]), str(tmp_path / "x.onnx")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "fine"


def test_a_refused_file_prints_nothing(tmp_path: Path, exported: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The error says it all; ONNX Runtime would also print, and try again in vain."""
    content = bytearray(exported.read_bytes())
    (tmp_path / "x.onnx").write_bytes(content[:1000])
    refused(tmp_path / "x.onnx")
    (tmp_path / "y.onnx").write_bytes(content.replace(b"GlobalAveragePool", b"Glob\xfflAveragePool"))
    refused(tmp_path / "y.onnx")
    assert capfd.readouterr() == ("", "")


def test_metadata_are_those_of_the_file(exported: Path, predictor: Predictor, metadata: dict[str, str]) -> None:
    for name in ("input_size", "mean", "std"):
        assert list(predictor.config[name]) == json.loads(metadata[name])
    assert timm.get_pretrained_cfg_value("sd_resnet20", "input_size") == predictor.config["input_size"]
