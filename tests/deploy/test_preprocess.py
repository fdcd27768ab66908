from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from nets import Net, calibrated, random_images
from numpy.typing import NDArray
from onnx import TensorProto, helper
from samples import FILES, blots, chain, equal, normalised_pixels, onnx_outputs
from torch import nn

from sdzoo.deploy.onnx_export import export_onnx
from sdzoo.deploy.predictor import Predictor
from sdzoo.deploy.preprocess import with_preprocessing
from sdzoo.deploy.runtime import load_predictor
from sdzoo.errors import InputError


def identity(channels: int, height: int, width: int) -> onnx.ModelProto:
    shape = ["batch", channels, height, width]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("images", "same")]
    graph = helper.make_graph([helper.make_node("Identity", ["images"], ["same"])], "g", values[:1], values[1:])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def computed(proto: onnx.ModelProto, array: NDArray[np.uint8]) -> NDArray[np.float32]:
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"images": array})[0])


@pytest.mark.parametrize("mean", [0.0, 0.5, 0.4465, 1.0])
@pytest.mark.parametrize("std", [1.0, 0.2, 0.0627])
@pytest.mark.parametrize("size", [(3, 5, 7), (1, 4, 2)])
def test_all_values_are_pixel_over_255_minus_mean_over_std(mean: float, std: float, size: tuple[int, int, int]) -> None:
    """Each channel has its own; what is expected is computed in float64."""
    channels, height, width = size
    means, stds = [mean + 0.01 * c for c in range(channels)], [std * (1 + 0.1 * c) for c in range(channels)]
    proto = with_preprocessing(identity(*size), {"input_size": size, "mean": means, "std": stds})
    onnx.checker.check_model(proto, full_check=True)
    pixels = np.random.default_rng(0).integers(0, 256, (3, height, width, channels), np.uint8)
    pixels[0], pixels[1] = 0, 255
    expected = np.stack([(pixels[..., c] / 255.0 - means[c]) / stds[c] for c in range(channels)], axis=1)
    equal(expected, computed(proto, pixels), 1e-6)


def test_order_of_the_nodes(in_graph_folder: Path) -> None:
    """TensorRT takes no uint8 into a Transpose: Cast comes first."""
    proto = onnx.load(in_graph_folder / "model.onnx")
    assert [node.op_type for node in proto.graph.node[:5]] == ["Cast", "Transpose", "Sub", "Mul", "Conv"]
    for before, after in zip(proto.graph.node[:4], proto.graph.node[1:5], strict=True):
        assert after.input[0] == before.output[0]
    assert proto.graph.node[0].input[0] == proto.graph.input[0].name == "images"
    tensor = proto.graph.input[0].type.tensor_type
    assert tensor.elem_type == TensorProto.UINT8
    assert [dim.dim_param or dim.dim_value for dim in tensor.shape.dim] == ["batch", 32, 32, 3]


def test_the_given_graph_is_left_alone() -> None:
    given = identity(3, 4, 4)
    before = given.SerializeToString()
    with_preprocessing(given, {"input_size": (3, 4, 4), "mean": (0.5,) * 3, "std": (0.5,) * 3})
    assert given.SerializeToString() == before


def test_in_graph_is_the_clients_within_the_limit_of_fp32(onnx_folder: Path, in_graph_folder: Path) -> None:
    pixels = blots(64, seed=0)
    client = onnx_outputs(onnx_folder / "model.onnx", normalised_pixels(pixels))
    equal(client, onnx_outputs(in_graph_folder / "model.onnx", pixels), 1e-4)
    equal(load_predictor(onnx_folder)(FILES), load_predictor(in_graph_folder)(FILES), 1e-4)
    parity = json.loads((in_graph_folder / "card.json").read_text())["parity"]
    assert (parity["tol"], parity["batch_sizes"]) == (1e-4, [1, 2, 17, 64])


@pytest.mark.parametrize(
    ("mean", "std"), [((0, 0, 0), (1, 1, 1)), ((0.9, 0.1, 0.5), (0.05, 0.5, 1.5))], ids=["none", "each its own"]
)
@pytest.mark.parametrize("arch", ["sd_resnet20", "sd_resnet32"])
def test_other_models_and_means(tmp_path: Path, arch: str, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    config = {"mean": mean, "std": std, "input_size": (3, 32, 48)}
    model = calibrated(arch, pretrained_cfg_overlay=config, images=random_images(8, 32))
    for where in ("client", "in-graph"):
        export_onnx(model, tmp_path / f"{where}.onnx", preprocess=where)
    client, in_graph = (load_predictor(tmp_path / f"{where}.onnx") for where in ("client", "in-graph"))
    equal(client(FILES), in_graph(FILES), 1e-4)


def test_one_channel(tmp_path: Path) -> None:
    model = calibrated("sd_resnet20", in_chans=1, images=random_images(8, chans=1))
    for where in ("client", "in-graph"):
        export_onnx(model, tmp_path / f"{where}.onnx", preprocess=where)
    client, in_graph = (load_predictor(tmp_path / f"{where}.onnx", convert=True) for where in ("client", "in-graph"))
    equal(client(FILES), in_graph(FILES), 1e-4)
    grey = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 1), np.uint8)
    mean, std = (0.4914 + 0.4822 + 0.4465) / 3, (0.2470 + 0.2435 + 0.2616) / 3
    equal(client(((grey / 255 - mean) / std).transpose(0, 3, 1, 2).astype(np.float32)), in_graph(grey), 1e-4)


def test_channels_of_no_picture_are_refused(tmp_path: Path) -> None:
    model = calibrated("sd_resnet20", in_chans=4, images=random_images(8, chans=4))
    with pytest.raises(InputError, match="pictures have 1 or 3 channels; the model takes 4"):
        export_onnx(model, tmp_path / "model.onnx", preprocess="in-graph")


def test_unknown_place(tmp_path: Path, model: nn.Module) -> None:
    with pytest.raises(InputError, match=r'preprocess "in_graph" is unknown; known: client, in-graph; nearest: in-gr'):
        export_onnx(model, tmp_path / "model.onnx", preprocess="in_graph")


@pytest.fixture(scope="module")
def in_graph(in_graph_folder: Path) -> Predictor:
    return load_predictor(in_graph_folder)


@pytest.mark.parametrize("dtype", [np.float32, np.int64, np.int8])
def test_arrays_are_of_pixels(in_graph: Predictor, dtype: type[np.number]) -> None:
    with pytest.raises(InputError, match=r"normalises itself: give uint8, or pictures"):
        in_graph(np.zeros((1, 32, 32, 3), dtype))


@pytest.mark.parametrize("shape", [(1, 3, 32, 32), (32, 32, 3), (0, 32, 32, 3), (1, 32, 31, 3)])
def test_arrays_are_channels_last(in_graph: Predictor, shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError) as caught:
        in_graph(np.zeros(shape, np.uint8))
    assert f"the array is {shape}; sd_resnet20 takes (batch, 32, 32, 3)" in str(caught.value)


def test_an_array_laid_out_otherwise(in_graph: Predictor) -> None:
    pixels = blots(3, seed=5)
    strided = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)).transpose(0, 2, 3, 1)
    np.testing.assert_allclose(in_graph(strided), in_graph(pixels), rtol=0, atol=1e-5)


def test_normalised_arrays_are_turned_back_into_pixels(in_graph: Predictor, onnx_folder: Path) -> None:
    """Evaluation normalises before it knows what computes."""
    pixels = blots(16, seed=6)
    equal(load_predictor(onnx_folder)(normalised_pixels(pixels)), in_graph.normalised(normalised_pixels(pixels)), 1e-4)


def test_warming_up(in_graph: Predictor) -> None:
    in_graph.warmup(batch_size=3, runs=1)


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_it_stays_in_float32_at_any_precision(
    tmp_path: Path,
    classifier: Net,
    labelled: Path,
    few: Path,
    calibration: Path,
    request: pytest.FixtureRequest,
    precision: str,
) -> None:
    """Logits are those of the client's preprocessing and the same arithmetic: nothing more is rounded."""
    calibrating = calibration if precision == "int8" else None
    images = few if precision == "int8" else labelled
    settings = {"precision": precision, "images": images, "calibration": calibrating, "max_drop": 10.0}
    export_onnx(classifier, tmp_path / "model.onnx", preprocess="in-graph", **settings)  # type: ignore[arg-type]
    proto = onnx.load(tmp_path / "model.onnx")
    assert chain(proto, 4) == ["Cast", "Transpose", "Sub", "Mul"]
    pixels = blots(32, seed=8)
    client = request.getfixturevalue(f"{precision}_folder") / "model.onnx"
    got, expected = onnx_outputs(tmp_path / "model.onnx", pixels), onnx_outputs(client, normalised_pixels(pixels))
    assert np.abs(got - expected).max(axis=1).min() < 1e-4  # a last digit may tip a step of eight bits, on some images
    equal(expected, got, 1e-2 if precision == "fp16" else 0.3)
