from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from nets import Net, evaluate
from onnx import TensorProto, numpy_helper
from samples import LABELS, blots, chain, normalised_pixels, onnx_outputs
from torch import nn

import sdzoo
from sdzoo.deploy.export import export
from sdzoo.deploy.onnx_graph import onnx_graph
from sdzoo.deploy.preprocess import with_preprocessing
from sdzoo.deploy.quantize import quantize
from sdzoo.errors import InputError, ParityError

PIXELS = blots(256, seed=3)
CONFIG = {"input_size": (3, 32, 32), "mean": (0.4914, 0.4822, 0.4465), "std": (0.2470, 0.2435, 0.2616)}


@pytest.fixture(scope="module")
def graphs(classifier: Net) -> dict[str, onnx.ModelProto]:
    """Return ``classifier`` in both presets, and for the CPU with preprocessing in the graph."""
    graph = onnx_graph(sdzoo.fold(classifier), (3, 32, 32), "logits")
    images = normalised_pixels(PIXELS)
    return {
        "cpu": quantize(graph, "cpu", iter(np.split(images, 8))),
        "tensorrt": quantize(graph, "tensorrt", iter(np.split(images, 8))),
        "in-graph": with_preprocessing(quantize(graph, "cpu", iter(np.split(images, 8))), CONFIG),
    }


def initializers(proto: onnx.ModelProto) -> dict[str, np.ndarray[Any, Any]]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}


def producers(proto: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    return {name: node for node in proto.graph.node for name in node.output}


def zero_points(proto: onnx.ModelProto, of: Callable[[onnx.NodeProto], bool]) -> list[np.ndarray[Any, Any]]:
    values = initializers(proto)
    return [values[node.input[2]] for node in proto.graph.node if of(node)]


def in_float(proto: onnx.ModelProto) -> list[str]:
    """Return the convolutions and classifiers whose weights were not quantised."""
    made = producers(proto)
    return [n.name for n in proto.graph.node if n.op_type in ("Conv", "Gemm") and n.input[1] not in made]


# Presets


def test_cpu_has_unsigned_activations_and_signed_weights_per_channel(graphs: dict[str, onnx.ModelProto]) -> None:
    proto, values = graphs["cpu"], initializers(graphs["cpu"])
    activations = zero_points(proto, lambda node: node.op_type == "QuantizeLinear")
    assert activations
    assert {zero.dtype for zero in activations} == {np.dtype(np.uint8)}
    made = producers(proto)
    for node in (n for n in proto.graph.node if n.op_type == "Conv" and n.input[1] in made):
        weight, scale, zero = (values[name] for name in made[node.input[1]].input)
        assert weight.dtype == np.int8
        assert scale.shape == (len(weight),)
        assert not zero.any()
        assert np.abs(weight.astype(int)).max() <= 64  # seven bits: u8 x s8 does not saturate


def test_cpu_leaves_the_first_convolution_and_the_classifier_in_float(graphs: dict[str, onnx.ModelProto]) -> None:
    assert in_float(graphs["cpu"]) == ["conv1", "fc"]
    assert in_float(graphs["in-graph"]) == ["conv1", "fc"]


def test_tensorrt_is_symmetric_and_signed_without_quantised_bias(graphs: dict[str, onnx.ModelProto]) -> None:
    proto, values = graphs["tensorrt"], initializers(graphs["tensorrt"])
    zeros = zero_points(proto, lambda node: node.op_type in ("QuantizeLinear", "DequantizeLinear"))
    assert zeros
    assert {zero.dtype for zero in zeros} == {np.dtype(np.int8)}
    assert not any(zero.any() for zero in zeros)
    assert in_float(proto) == []
    assert not any(value.dtype == np.int32 for value in values.values())
    made = producers(proto)
    for node in (n for n in proto.graph.node if n.op_type in ("Conv", "Gemm")):
        assert node.input[2] not in made  # the bias is a float initializer
        assert values[node.input[2]].dtype == np.float32
    weights = [values[made[n.input[1]].input[0]] for n in proto.graph.node if n.op_type == "Conv"]
    assert max(np.abs(weight.astype(int)).max() for weight in weights) == 127  # the whole range


def test_cpu_quantises_the_bias(graphs: dict[str, onnx.ModelProto]) -> None:
    assert any(value.dtype == np.int32 for value in initializers(graphs["cpu"]).values())


@pytest.mark.parametrize("kind", ["cpu", "tensorrt", "in-graph"])
def test_inputs_and_outputs_stay_as_they_are(graphs: dict[str, onnx.ModelProto], kind: str) -> None:
    proto = graphs[kind]
    onnx.checker.check_model(proto, full_check=True)
    (given,), (result,) = proto.graph.input, proto.graph.output
    pixels = kind == "in-graph"
    assert given.type.tensor_type.elem_type == (TensorProto.UINT8 if pixels else TensorProto.FLOAT)
    assert (given.name, result.name, result.type.tensor_type.elem_type) == ("images", "logits", TensorProto.FLOAT)


def test_preprocessing_is_not_quantised(graphs: dict[str, onnx.ModelProto]) -> None:
    assert chain(graphs["in-graph"], 5) == ["Cast", "Transpose", "Sub", "Mul", "Conv"]


@pytest.mark.parametrize("kind", ["cpu", "tensorrt", "in-graph"])
def test_weights_are_the_models_within_half_a_step(
    graphs: dict[str, onnx.ModelProto], classifier: Net, kind: str
) -> None:
    proto = graphs[kind]
    values, made, state = initializers(proto), producers(proto), sdzoo.fold(classifier).state_dict()
    checked = 0
    for node in (n for n in proto.graph.node if n.op_type == "Conv" and n.input[1] in made):
        weight, scale, _ = (values[name] for name in made[node.input[1]].input)
        exact = state[f"{node.name}.weight"].numpy()
        step = scale.reshape(-1, 1, 1, 1)
        assert (np.abs(weight * step - exact) <= 0.5001 * step).all(), node.name
        checked += 1
    assert checked == (19 if kind == "tensorrt" else 18)


def test_answers_are_the_models(int8_folder: Path, classifier: Net) -> None:
    images = normalised_pixels(blots(200, seed=21))
    exact = evaluate(classifier, torch.from_numpy(images)).numpy()
    got = onnx_outputs(int8_folder / "model.onnx", images)
    assert np.corrcoef(exact.ravel(), got.ravel())[0, 1] > 0.99
    assert np.abs(exact - got).max() > 1e-3  # else nothing was quantised


def test_unknown_preset(classifier: Net) -> None:
    with pytest.raises(InputError, match='preset "gpu" is unknown; known: cpu, tensorrt'):
        quantize(onnx_graph(sdzoo.fold(classifier), (3, 32, 32), "logits"), "gpu", iter([]))


def test_onnx_runtimes_advice_is_not_logged(classifier: Net, caplog: pytest.LogCaptureFixture) -> None:
    """This graph has had it."""
    graph = onnx_graph(sdzoo.fold(classifier), (3, 32, 32), "logits")
    quantize(graph, "cpu", iter([normalised_pixels(PIXELS[:2])]))
    assert caplog.records == []
    assert logging.root.manager.disable == logging.NOTSET


# The export


def test_card_holds_the_accuracy_before_and_after(classifier: Net, int8_folder: Path, few: Path) -> None:
    """By ONNX Runtime alone, on pictures that are read a second time."""
    from PIL import Image

    card = json.loads((int8_folder / "card.json").read_text())
    parity = card["parity"]
    assert (card["precision"], parity["preset"], parity["images"]) == ("int8", "cpu", 200)
    files = [(number, file) for number, label in enumerate(LABELS) for file in (few / label).iterdir()]
    array = normalised_pixels(np.stack([np.asarray(Image.open(file)) for _, file in files]))
    labels = np.array([number for number, _ in files])
    right = (onnx_outputs(int8_folder / "model.onnx", array).argmax(1) == labels).sum()
    assert parity["top1_percent_before"] == 100.0
    assert parity["top1_percent_after"] == pytest.approx(right / 2, abs=0.51)  # threads may tip one image
    assert 90 <= parity["top1_percent_after"] < 99.5
    assert (
        f"top-1 100.00 % before, {parity['top1_percent_after']:.2f} % after" in (int8_folder / "README.md").read_text()
    )


def attempt(model: nn.Module, folder: Path, **options: Any) -> str:
    """Export for int8, which must fail and leave nothing."""
    with pytest.raises((InputError, ParityError)) as caught:
        export(model, "onnx", folder / "out", precision="int8", **options)
    assert [name for name in os.listdir(folder) if "out" in name] == []
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_loss_above_max_drop_leaves_nothing_and_says_by_how_much(
    tmp_path: Path, classifier: Net, few: Path, calibration: Path, int8_folder: Path
) -> None:
    """What ``int8_folder`` was allowed to lose is above the default."""
    said = attempt(classifier, tmp_path, images=few, calibration=calibration)
    start = f"not exported, 200 pictures of {few.name}: top-1 100.00 % before, "
    assert said.startswith(start)
    lost = re.fullmatch(r"(.*) % after \((.*) points, at most -0\.5 allowed\) on 200 images", said[len(start) :])
    assert lost is not None
    after = json.loads((int8_folder / "card.json").read_text())["parity"]["top1_percent_after"]
    assert float(lost[1]) == pytest.approx(after, abs=0.51)  # threads may tip an image
    assert float(lost[2]) == pytest.approx(float(lost[1]) - 100, abs=1e-9)


def test_class_folders_are_needed(tmp_path: Path, classifier: Net, calibration: Path) -> None:
    said = attempt(classifier, tmp_path, calibration=calibration, images=calibration)
    assert "on at least 200 images in class folders (--images DIR); given are 256 pictures of" in said


def test_classes_must_be_the_models(tmp_path: Path, classifier: Net, few: Path, calibration: Path) -> None:
    (tmp_path / "some").mkdir()
    shutil.copytree(few / "cat", tmp_path / "some" / "cat")
    said = attempt(classifier, tmp_path, calibration=calibration, images=tmp_path / "some")
    assert "are cat; the model's are airplane, automobile, bird, cat, deer and 5 more" in said


def test_both_folders_are_needed(tmp_path: Path, classifier: Net, few: Path, calibration: Path) -> None:
    """What is missing is said at once."""
    for given in ({"images": few}, {"calibration": calibration}, {}):
        said = attempt(classifier, tmp_path, **given)
        assert "judged on (--images DIR), and at least 256 others to calibrate on (--calibration DIR)" in said


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_calibration_is_for_int8_alone(tmp_path: Path, classifier: Net, calibration: Path, precision: str) -> None:
    with pytest.raises(InputError, match=f"calibration images are for int8.*; precision is {precision}"):
        export(classifier, "onnx", tmp_path / "out", precision=precision, calibration=calibration)


def test_an_empty_calibration_folder(tmp_path: Path, classifier: Net, few: Path) -> None:
    (tmp_path / "none").mkdir()
    said = attempt(classifier, tmp_path, images=few, calibration=tmp_path / "none")
    assert said == f"{tmp_path}/none holds no images; expected pictures in {tmp_path}/none"


def test_a_calibration_folder_that_is_too_small(tmp_path: Path, classifier: Net, few: Path, calibration: Path) -> None:
    some = tmp_path / "some"
    some.mkdir()
    for file in sorted(calibration.iterdir())[:255]:
        shutil.copy(file, some)
    said = attempt(classifier, tmp_path, images=few, calibration=some)
    assert said == f"{some}: 255 pictures of some; int8 is calibrated on at least 256"


def test_copies_do_not_fill_a_calibration_folder(tmp_path: Path, classifier: Net, few: Path, calibration: Path) -> None:
    some = Path(shutil.copytree(calibration, tmp_path / "some"))
    shutil.copy(some / "0.png", some / "1.png")
    with pytest.warns(UserWarning, match="left out: 1 copy"):
        said = attempt(classifier, tmp_path, images=few, calibration=some)
    left_out = "left out: 1 copy"
    assert said == f"{some}: 255 pictures of some ({left_out}); int8 is calibrated on at least 256"


def test_the_card_says_by_their_digests_which_pictures_calibrated(int8_folder: Path, calibration: Path) -> None:
    contents = (file.read_bytes() for file in calibration.iterdir())
    expected = sorted(hashlib.sha256(content).hexdigest()[:16] for content in contents)
    assert json.loads((int8_folder / "card.json").read_text())["parity"]["calibration"] == expected
    (stored,) = (p for p in onnx.load(int8_folder / "model.onnx").metadata_props if p.key == "parity")
    assert json.loads(stored.value)["calibration"] == expected


def test_of_many_pictures_only_those_are_named_that_calibrated(
    tmp_path: Path, classifier: Net, few: Path, calibration: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sdzoo.deploy.onnx_export.CALIBRATION_IMAGES", 6)  # of 256: every 51st
    card = export(
        classifier, "onnx", tmp_path / "x", precision="int8", images=few, calibration=calibration, max_drop=90
    )
    contents = [(calibration / f"{index}.png").read_bytes() for index in range(0, 256, 51)]
    assert isinstance(card.parity, dict)
    assert card.parity["calibration"] == sorted(hashlib.sha256(content).hexdigest()[:16] for content in contents)


def test_calibrating_on_what_judges(tmp_path: Path, classifier: Net, few: Path, calibration: Path) -> None:
    mixed = tmp_path / "mixed"
    shutil.copytree(calibration, mixed)
    shared = next((few / "ship").iterdir())
    shutil.copy(shared, mixed / "another name.png")
    said = attempt(classifier, tmp_path, images=few, calibration=mixed)
    assert f"{mixed}/another name.png is also {few}/ship/{shared.name}: calibrate on other images" in said


@pytest.mark.parametrize("max_drop", [-0.1, 100.1, float("nan")])
def test_max_drop_is_in_points(tmp_path: Path, classifier: Net, few: Path, calibration: Path, max_drop: float) -> None:
    said = attempt(classifier, tmp_path, images=few, calibration=calibration, max_drop=max_drop)
    assert f"max_drop is {max_drop}; it is in points of top-1, 0 to 100" in said
