from __future__ import annotations

import copy
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from nets import Net
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from samples import blots, chain, equal, normalised_pixels, onnx_outputs, tree
from torch import Tensor, fx, nn

import sdzoo
from sdzoo.deploy.export import export
from sdzoo.deploy.half import check_range, to_half
from sdzoo.deploy.onnx_graph import onnx_graph
from sdzoo.deploy.preprocess import with_preprocessing
from sdzoo.errors import InputError, ParityError

IMAGES = normalised_pixels(blots(40, seed=11))


def graph_of(model: nn.Module) -> onnx.ModelProto:
    return onnx_graph(sdzoo.fold(model), (3, 32, 32), "logits")


def largest_in_torch(model: nn.Module, images: NDArray[np.float32]) -> dict[str, float]:
    """Return the largest magnitude of whatever the folded ``model`` computes, by module or call, seen by torch."""
    found = dict[str, float]()

    class Watch(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            output = super().run_node(n)
            if n.op.startswith("call_"):
                found[str(n.target) if n.op == "call_module" else n.name] = output.abs().max().item()
            return output.clone() if isinstance(output, Tensor) else output  # the next module may work in place

    with torch.inference_mode():
        Watch(fx.symbolic_trace(sdzoo.fold(model))).run(torch.from_numpy(images))
    return found


@pytest.fixture
def loud(classifier: Net) -> Net:
    """Return ``classifier`` with one channel between two convolutions of layer2.1 so large that float16 cannot hold
    it, and that the next convolution makes small again: its logits are unharmed."""
    changed = copy.deepcopy(classifier)
    with torch.no_grad():
        for name in ("weight", "bias"):
            changed.get_parameter(f"layer2.1.bn1.{name}")[3] *= 5e4
        changed.get_parameter("layer2.1.conv2.weight")[:, 3] /= 5e4
    return changed


# Overflow


def test_largest_intermediate_is_the_one_that_torch_sees(classifier: Net) -> None:
    """Over all batches; a convolution's own output may be the largest, which a fused ReLU would hide."""
    in_torch = largest_in_torch(classifier, IMAGES)
    name, value = check_range(graph_of(classifier), [IMAGES[:1], IMAGES[1:30], IMAGES[30:]])
    assert value == pytest.approx(max(in_torch.values()), rel=1e-5)
    assert in_torch[name] == pytest.approx(value, rel=1e-5)


def test_every_batch_is_looked_at(classifier: Net) -> None:
    graph = graph_of(classifier)
    small, large = IMAGES[:3] * 0.01, IMAGES[3:6] * 100
    expected = max(largest_in_torch(classifier, large).values())
    for batches in ([small, large], [large, small]):
        assert check_range(graph, batches)[1] == pytest.approx(expected, rel=1e-5)


def test_overflow_names_the_first_node_beyond_32_000(loud: Net) -> None:
    """The figure is the one that torch sees there."""
    in_torch = largest_in_torch(loud, IMAGES)
    assert in_torch["layer2.1.conv1"] > 65504
    with pytest.raises(ParityError) as caught:
        check_range(graph_of(loud), [IMAGES])
    words = str(caught.value)
    assert "the output of node layer2.1.conv1 reaches " in words
    assert float(words.split("reaches ")[1].split(";")[0]) == pytest.approx(in_torch["layer2.1.conv1"], rel=1e-4)
    assert "in float16 at most 32000 is allowed: export fp32" in words


@pytest.mark.parametrize(("value", "refused"), [(31_999.0, False), (32_000.0, False), (32_001.0, True)])
def test_the_limit(value: float, refused: bool) -> None:
    proto = one_node("Add", value - 1)
    if refused:
        with pytest.raises(ParityError, match=r"node sum reaches 32001"):
            check_range(proto, [np.ones((2, 1), np.float32)])
    else:
        assert check_range(proto, [np.ones((2, 1), np.float32)]) == ("sum", value)


def test_negative_values_overflow_as_well() -> None:
    with pytest.raises(ParityError, match="node sum reaches 40001"):
        check_range(one_node("Sub", 31_000.0), [np.full((1, 1), -9001, np.float32)])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_overflow(bad: float) -> None:
    with pytest.raises(ParityError, match=r"the weight w reaches (nan|inf)"):
        check_range(one_node("Add", bad), [np.ones((1, 1), np.float32)])
    if math.isinf(bad):  # of finite images and weights, nothing else comes before NaN
        with pytest.raises(ParityError, match="node sum reaches inf"):
            check_range(one_node("Add", 1.0), [np.ones((1, 1), np.float32), np.array([[1.0], [bad]], np.float32)])


def test_a_weight_that_float16_cannot_hold_is_named() -> None:
    with pytest.raises(ParityError, match="the weight w reaches 70000"):
        check_range(one_node("Add", -70_000.0), [np.full((1, 1), 70_000, np.float32)])


def one_node(op: str, value: float) -> onnx.ModelProto:
    given, result = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 1]) for name in ("x", "y"))
    weight = numpy_helper.from_array(np.array([value], np.float32), "w")
    graph = helper.make_graph([helper.make_node(op, ["x", "w"], ["y"], name="sum")], "g", [given], [result], [weight])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


@pytest.mark.parametrize("old", [False, True])
def test_an_export_that_overflows_leaves_what_was_there(
    tmp_path: Path, loud: Net, labelled: Path, onnx_folder: Path, old: bool
) -> None:
    """Though its logits in float16, computed in float32 as CPUs do, are right."""
    out = tmp_path / "out"
    if old:
        shutil.copytree(onnx_folder, out)
    before = tree(tmp_path)
    with pytest.raises(ParityError, match=r"^not exported, 1000 pictures of .*: the output of node layer2\.1\.conv1"):
        export(loud, "onnx", out, precision="fp16", images=labelled)
    assert tree(tmp_path) == before
    assert os.listdir(tmp_path) == (["out"] if old else [])


# The file


def test_inputs_and_outputs_stay_float32_and_weights_are_float16(fp16_folder: Path) -> None:
    graph = onnx.load(fp16_folder / "model.onnx").graph
    for value in (*graph.input, *graph.output):
        assert value.type.tensor_type.elem_type == TensorProto.FLOAT
    kinds = {w.data_type for w in graph.initializer if w.name.endswith((".weight", ".bias"))}
    assert kinds == {TensorProto.FLOAT16}


def test_file_is_half_as_large(fp16_folder: Path, onnx_folder: Path) -> None:
    sizes = [(folder / "model.onnx").stat().st_size for folder in (fp16_folder, onnx_folder)]
    assert sizes[0] == pytest.approx(sizes[1] / 2, rel=0.05)


def test_logits_within_the_wider_limit_and_not_within_the_narrow_one(fp16_folder: Path, onnx_folder: Path) -> None:
    fp32, fp16 = (onnx_outputs(folder / "model.onnx", IMAGES) for folder in (onnx_folder, fp16_folder))
    equal(fp32, fp16, 1e-2)
    assert np.abs(fp32 - fp16).max() > 1e-4  # else it was never rounded


def test_card_holds_the_proof_and_says_what_computed_it(classifier: Net, fp16_folder: Path, labelled: Path) -> None:
    card = json.loads((fp16_folder / "card.json").read_text())
    parity = card["parity"]
    assert card["precision"] == "fp16"
    assert (parity["tol"], parity["images"], parity["batch_sizes"][:4]) == (1e-2, 1000, [1, 2, 17, 64])
    assert parity["top1_equal"] >= 995
    assert parity["inputs"] == f"1000 pictures of {labelled.name}"
    assert parity["computed_in"] == "float32, as CPUs do"
    assert 0 < parity["largest_intermediate"]["value"] < 32_000
    assert parity["largest_intermediate"]["node"] in largest_in_torch(classifier, IMAGES[:1])


def test_preprocessing_stays_in_float32(classifier: Net) -> None:
    """255 in float16 has steps of an eighth; (x - mean) / std would lose digits."""
    config = {"input_size": (3, 32, 32), "mean": (0.4914, 0.4822, 0.4465), "std": (0.2470, 0.2435, 0.2616)}
    half = with_preprocessing(to_half(graph_of(classifier)), config)
    onnx.checker.check_model(half, full_check=True)
    kinds = {w.name: w.data_type for w in half.graph.initializer if w.name.startswith("preprocess.")}
    assert kinds == {"preprocess.mean": TensorProto.FLOAT, "preprocess.scale": TensorProto.FLOAT}
    assert half.graph.input[0].type.tensor_type.elem_type == TensorProto.UINT8
    assert chain(half, 6) == ["Cast", "Transpose", "Sub", "Mul", "Cast", "Conv"]


def test_nodes_are_in_order(classifier: Net) -> None:
    half, known = to_half(graph_of(classifier)), set[str]()
    known.update(value.name for value in (*half.graph.input, *half.graph.initializer))
    for node in half.graph.node:
        assert set(node.input) <= known
        known.update(node.output)


def test_the_given_graph_is_left_alone(classifier: Net) -> None:
    graph = graph_of(classifier)
    before = graph.SerializeToString(deterministic=True)
    to_half(graph)
    check_range(graph, [IMAGES[:1]])
    assert graph.SerializeToString(deterministic=True) == before


def test_tiny_weights_are_no_fault(classifier: Net) -> None:
    """Float16 has nothing between 0 and 6e-8."""
    changed = copy.deepcopy(classifier)
    with torch.no_grad():
        changed.get_parameter("fc.weight")[0, 0] = 1e-12
    onnx.checker.check_model(to_half(graph_of(changed)))


# Too few images


def test_bundled_pictures_do_not_suffice(tmp_path: Path, classifier: Net) -> None:
    with pytest.raises(
        InputError, match=r"at least 1000 real images \(--images DIR\); given are 10 real pictures, 8 w"
    ):
        export(classifier, "onnx", tmp_path / "out", precision="fp16")
    assert os.listdir(tmp_path) == []


def test_999_do_not_suffice(tmp_path: Path, classifier: Net, calibration: Path) -> None:
    with pytest.raises(InputError, match=r"at least 1000 real images .*; given are 256 pictures of "):
        export(classifier, "onnx", tmp_path / "out", precision="fp16", images=calibration)
    assert os.listdir(tmp_path) == []


def test_a_model_without_classifier_has_no_top1(tmp_path: Path, classifier: Net, labelled: Path) -> None:
    features = copy.deepcopy(classifier)
    features.reset_classifier(0)
    with pytest.raises(InputError, match="fp16 is judged by top-1; the model has no classifier"):
        export(features, "onnx", tmp_path / "out", precision="fp16", images=labelled)
