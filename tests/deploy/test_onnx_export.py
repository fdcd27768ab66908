from __future__ import annotations

import copy
import errno
import hashlib
import importlib.util
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import timm
import torch
import torch.nn.functional as F
from nets import calibrate, calibrated, close, evaluate, linear_decay_by_hand, random_images
from samples import normalised as pixels_of
from torch import Tensor, nn

import sdzoo
from sdzoo.deploy import half
from sdzoo.deploy import onnx_export as export_module
from sdzoo.deploy import onnx_graph as graph_module
from sdzoo.deploy.onnx_export import export_onnx, labels_of
from sdzoo.deploy.verification import Images, default_images, normalised
from sdzoo.digest import state_sha256
from sdzoo.errors import InputError, ParityError
from sdzoo.images import input_config

NODES = {"Conv", "Relu", "Add", "AveragePool", "Pad", "GlobalAveragePool", "Flatten", "Gemm"}
LABELS = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def onnx_outputs(path: Path, images: Tensor) -> Tensor:
    """Return what ONNX Runtime computes from ``path``, without sdzoo's help."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (entry,) = session.get_inputs()
    (output,) = session.run(None, {entry.name: images.numpy()})
    return torch.from_numpy(output)


def metadata_of(path: Path) -> dict[str, Any]:
    return {entry.key: json.loads(entry.value) for entry in onnx.load(path).metadata_props}


def sha256_by_hand(state: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        array = tensor.numpy()
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


# The file


@pytest.mark.parametrize("batch_size", [1, 2, 5, 17])
def test_file_computes_the_model_at_any_batch_size(model: nn.Module, exported: Path, batch_size: int) -> None:
    images = random_images(batch_size, seed=batch_size)
    close(evaluate(model, images), onnx_outputs(exported, images), 1e-4)


def test_only_plain_nodes_are_left(exported: Path) -> None:
    graph = onnx.load(exported).graph
    assert {node.op_type for node in graph.node} == NODES
    assert sum(node.op_type == "Conv" for node in graph.node) == 19
    assert sum(node.op_type == "Add" for node in graph.node) == 9
    assert {node.domain for node in graph.node} == {""}


def test_opset(exported: Path) -> None:
    proto = onnx.load(exported)
    assert [(entry.domain, entry.version) for entry in proto.opset_import] == [("", 18)]
    onnx.checker.check_model(proto, full_check=True)


def test_batch_is_a_named_dynamic_dimension(exported: Path) -> None:
    graph = onnx.load(exported).graph
    for values, name, shape in ((graph.input, "images", [3, 32, 32]), (graph.output, "logits", [10])):
        assert [value.name for value in values] == [name]
        batch, *others = values[0].type.tensor_type.shape.dim
        assert batch.dim_param == "batch"
        assert [dim.dim_value for dim in others] == shape
        assert values[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT


def test_one_file_holds_everything(exported: Path) -> None:
    assert os.listdir(exported.parent) == [exported.name]
    proto = onnx.load(exported, load_external_data=False)
    assert all(tensor.data_location == onnx.TensorProto.DEFAULT for tensor in proto.graph.initializer)
    assert not any(tensor.external_data for tensor in proto.graph.initializer)


def test_no_source_paths_and_no_doc_strings(exported: Path) -> None:
    """Weights are taken out before the search: a million random bytes may well hold any three of them."""
    proto = onnx.load(exported)
    for tensor in proto.graph.initializer:
        tensor.ClearField("raw_data")
    text = proto.SerializeToString()
    for word in (
        b"/work",
        b".py",
        b"site-packages",
        os.fsencode(Path.home()),
        os.fsencode(Path(sdzoo.__file__).parent),
    ):
        assert word not in text
    assert proto.doc_string == proto.graph.doc_string == ""
    for part in (*proto.graph.node, *proto.graph.initializer, *proto.graph.input, *proto.graph.output):
        assert part.doc_string == ""
        assert not part.metadata_props


def test_file_has_the_usual_permissions(exported: Path) -> None:
    beside = exported.parent / "beside"
    beside.touch()
    mode = beside.stat().st_mode
    beside.unlink()
    assert exported.stat().st_mode == mode


# Its metadata


def test_metadata_say_how_to_feed_the_model_and_what_it_is(exported: Path) -> None:
    metadata = metadata_of(exported)
    assert metadata["format"] == "sdzoo-2"
    assert metadata["model"] == "sd_resnet20"
    assert metadata["tag"] is None
    assert metadata["labels"] == LABELS
    assert metadata["input_size"] == [3, 32, 32]
    assert metadata["mean"] == [0.4914, 0.4822, 0.4465]
    assert metadata["std"] == [0.2470, 0.2435, 0.2616]
    assert metadata["interpolation"] == "bilinear"
    assert metadata["crop_pct"] == 1.0
    assert metadata["crop_mode"] == "center"


def test_metadata_hold_the_survival_probabilities(exported: Path) -> None:
    assert metadata_of(exported)["survival_probs"] == pytest.approx(linear_decay_by_hand(9, 0.3), abs=1e-6)


def test_metadata_hold_the_digest_of_the_source_weights(model: nn.Module, exported: Path) -> None:
    assert metadata_of(exported)["weights_sha256"] == sha256_by_hand(model.state_dict())


def test_metadata_hold_the_versions(exported: Path) -> None:
    import onnxruntime

    assert metadata_of(exported)["versions"] == {
        "sdzoo": sdzoo.__version__,
        "torch": str(torch.__version__),
        "timm": timm.__version__,
        "onnx": onnx.__version__,
        "onnxruntime": onnxruntime.__version__,
    }


def test_metadata_hold_the_result_of_the_comparison(model: nn.Module, exported: Path) -> None:
    parity = metadata_of(exported)["parity"]
    assert parity["batch_sizes"] == [1, 2, 17, 64]
    assert (parity["images"], parity["tol"]) == (80, 1e-4)
    assert parity["inputs"] == "10 real pictures, 8 ways each"
    assert parity["runtime"] == "onnxruntime, CPUExecutionProvider"
    config = input_config(model)
    batches = [normalised(batch, config) for batch in default_images(config).batches()]
    diffs = [(evaluate(model, batch) - onnx_outputs(exported, batch)).abs().max().item() for batch in batches]
    sizes = [evaluate(model, batch).abs().max().item() for batch in batches]
    assert 0 < parity["max_abs_diff"] <= parity["allowed"]
    assert parity["max_abs_diff"] <= max(diffs) * 3  # of the worst batch; threads may add in another order
    assert any(parity["max_abs_reference"] == pytest.approx(size, rel=1e-5) for size in sizes)


def test_metadata_of_the_bundled_weights_name_their_tag(tmp_path: Path) -> None:
    export_onnx(timm.create_model("sd_resnet20", pretrained=True).eval(), tmp_path / "model.onnx")
    metadata = metadata_of(tmp_path / "model.onnx")
    assert (metadata["model"], metadata["tag"]) == ("sd_resnet20", "cifar10_jpeg")


def test_changed_weights_have_no_tag(tmp_path: Path) -> None:
    """A net fine-tuned from the bundled weights is not those weights, whatever its configuration says."""
    tuned = timm.create_model("sd_resnet20", pretrained=True).eval()
    with torch.no_grad():
        tuned.get_parameter("fc.bias")[0] += 1e-3
    export_onnx(tuned, tmp_path / "model.onnx")
    assert metadata_of(tmp_path / "model.onnx")["tag"] is None


@pytest.mark.parametrize(
    "state",
    [
        {"b": torch.arange(6.0).view(2, 3), "a": torch.tensor(5), "a.b": torch.zeros(0, 2), "ä": torch.tensor([True])},
        {"x": torch.arange(6.0).view(2, 3).T, "y": torch.arange(4, dtype=torch.float64)[::2]},
    ],
    ids=["kinds", "strided"],
)
def test_digest_of_weights(state: dict[str, Tensor]) -> None:
    assert state_sha256(state) == sha256_by_hand(state)
    assert state_sha256(dict(reversed(state.items()))) == sha256_by_hand(state)


@pytest.mark.parametrize(
    "other",
    [
        {"a": torch.tensor([1.0, 2.0, 3.0, 4.5])},
        {"b": torch.tensor([1.0, 2.0, 3.0, 4.0])},
        {"a": torch.tensor([[1.0, 2.0], [3.0, 4.0]])},
        {"a": torch.tensor([1.0, 2.0, 3.0, 4.0]).view(torch.int32)},
        {"a": torch.tensor([1.0, 2.0, 3.0, 4.0]), "b": torch.zeros(0)},
    ],
    ids=["value", "name", "shape", "dtype", "more"],
)
def test_digest_sees_every_difference(other: dict[str, Tensor]) -> None:
    assert state_sha256(other) != state_sha256({"a": torch.tensor([1.0, 2.0, 3.0, 4.0])})


def test_labels_are_left_out_where_they_are_not_the_models() -> None:
    assert labels_of(timm.create_model("sd_resnet20")) == LABELS
    assert labels_of(timm.create_model("sd_resnet20", num_classes=3)) is None
    assert labels_of(timm.create_model("sd_resnet32")) is None


# Kinds of model


@pytest.mark.parametrize(
    ("kwargs", "shape", "nodes"),
    [
        ({"num_classes": 0}, (64,), NODES - {"Gemm"}),
        ({"num_classes": 0, "global_pool": ""}, (64, 8, 8), NODES - {"Gemm", "Flatten", "GlobalAveragePool"}),
        ({"global_pool": "max"}, (10,), NODES - {"GlobalAveragePool"} | {"GlobalMaxPool"}),
        ({"global_pool": "fast"}, (10,), NODES - {"GlobalAveragePool", "Flatten"} | {"ReduceMean"}),
        ({"in_chans": 1, "num_classes": 3}, (3,), NODES),
        ({"in_chans": 4, "drop_rate": 0.5}, (10,), NODES),
        ({"pretrained_cfg_overlay": {"input_size": (3, 33, 33)}}, (10,), NODES),
        ({"pretrained_cfg_overlay": {"input_size": (3, 30, 45)}, "num_classes": 1}, (1,), NODES),
        ({"mode": "sample", "schedule": "uniform"}, (10,), NODES),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_models_of_other_shapes(
    tmp_path: Path, kwargs: dict[str, Any], shape: tuple[int, ...], nodes: set[str]
) -> None:
    model = timm.create_model("sd_resnet20", **kwargs)
    channels, height, width = input_config(model)["input_size"]
    torch.manual_seed(7)
    calibrate(model, images=torch.randn(8, channels, height, width))
    export_onnx(model, tmp_path / "model.onnx")
    images = torch.randn(5, channels, height, width)
    reference = evaluate(model, images)
    assert reference.shape[1:] == shape
    close(reference, onnx_outputs(tmp_path / "model.onnx", images), 1e-4)
    graph = onnx.load(tmp_path / "model.onnx").graph
    assert {node.op_type for node in graph.node} == nodes
    assert graph.output[0].name == ("features" if kwargs.get("num_classes") == 0 else "logits")
    metadata = metadata_of(tmp_path / "model.onnx")
    assert metadata["input_size"] == [channels, height, width]
    assert metadata["labels"] == (LABELS if shape == (10,) else None)
    assert len(metadata["mean"]) == len(metadata["std"]) == channels
    assert metadata["parity"]["inputs"] == ("10 real pictures, 8 ways each" if channels == 3 else "seeded noise")


@pytest.mark.slow
def test_1202_layers(tmp_path: Path) -> None:
    config = input_config(timm.create_model("sd_resnet20"))
    model = calibrated("sd_resnet1202", images=normalised(default_images(config).read(range(3, 20)), config))
    parity = export_onnx(model, tmp_path / "model.onnx")
    assert parity.images == 80
    images = random_images(3)
    close(evaluate(model, images), onnx_outputs(tmp_path / "model.onnx", images), 1e-4)
    assert sum(node.op_type == "Conv" for node in onnx.load(tmp_path / "model.onnx").graph.node) == 1201


def test_the_model_is_left_alone(tmp_path: Path, source: nn.Module) -> None:
    before = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    modules = [name for name, _ in source.named_modules()]
    export_onnx(source, tmp_path / "model.onnx")
    assert [name for name, _ in source.named_modules()] == modules
    assert not source.training
    for name, tensor in source.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0, msg=name)


# What lower precisions are made from


def test_calibration_is_spread_evenly_over_all_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sorted folders hold one class after the other."""
    numbers = Images("x", ["x"] * 60_000, lambda i: np.array([i], np.uint32).view(np.uint8).reshape(4, 1, 1))
    monkeypatch.setattr(export_module, "images_of", lambda *_: numbers)
    images, chosen = export_module._calibration("folder", {}, numbers)
    assert (images, len(chosen)) == (numbers, 512)
    assert (chosen[0], chosen[-1]) == (0, 59_999)
    assert set(np.diff(chosen)) == {117, 118}  # 59 999 / 511


def test_each_content_calibrates_once(tmp_path: Path) -> None:
    """Here of 300 files 256 are distinct: the first ones are copies of one."""
    config = {"input_size": (3, 32, 32), "interpolation": "bilinear", "crop_pct": 1.0}
    for index in range(300):
        (tmp_path / f"{index:03}.png").write_bytes(b"%d" % max(index - 44, 0))
    with pytest.warns(UserWarning, match="left out: 44 copies"):
        images, chosen = export_module._calibration(tmp_path, config, default_images(config))
    assert [(tmp_path / images.names[index]).read_bytes() for index in chosen] == [b"%d" % n for n in range(256)]


def test_overflow_is_looked_for_on_every_image_as_the_model_takes_it(
    monkeypatch: pytest.MonkeyPatch, classifier: nn.Module, labelled: Path, tmp_path: Path
) -> None:
    seen: list[np.ndarray] = []

    def look(_: object, batches: Iterable[np.ndarray]) -> tuple[str, float]:
        seen.extend(batches)
        raise ParityError("seen")

    monkeypatch.setattr(half, "check_range", look)
    with pytest.raises(ParityError, match=r"not exported, 1000 pictures of .*: seen"):
        export_onnx(classifier, tmp_path / "model.onnx", precision="fp16", images=labelled)
    files = sorted(labelled.rglob("*.png"), key=lambda file: (file.parent.name, int(file.stem)))
    found = np.concatenate(seen)
    assert found.shape == (1000, 3, 32, 32)
    picked = [0, 1, 500, 999]
    np.testing.assert_allclose(found[picked], pixels_of(*(files[i] for i in picked)), rtol=0, atol=1e-5)


# Calls, one by one


class Calls(nn.Module):
    """A network of one call."""

    def __init__(self, call: Callable[[Tensor], Tensor] | nn.Module) -> None:
        super().__init__()
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: x[:, :, ::2, 1::3],
        lambda x: x[:, 1:, :-1],
        lambda x: F.pad(x, (1, 2, 3, 0)),
        nn.AvgPool2d(3, 2, padding=1, count_include_pad=False),
        nn.AvgPool2d(3, 2, padding=1),
        nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False),
        nn.MaxPool2d(3, 2, padding=1),
        nn.MaxPool2d(2, 2, ceil_mode=True),
        nn.Conv2d(3, 4, 3, padding=2, dilation=2),
    ],
    ids=["steps", "ends", "pad", "avg", "avg with padding", "avg ceil", "max", "max ceil", "dilation"],
)
def test_a_call_computes_what_pytorch_does(call: Callable[[Tensor], Tensor], tmp_path: Path) -> None:
    images, network = random_images(2, 13), Calls(call).eval()
    onnx.save(graph_module.onnx_graph(network, (3, 13, 13), "y"), str(tmp_path / "x.onnx"))
    with torch.inference_mode():
        close(network(images), onnx_outputs(tmp_path / "x.onnx", images), 1e-6)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (nn.AvgPool2d(2, divisor_override=3), "overrides its divisor"),
        (nn.MaxPool2d(2, dilation=2), "with dilation or indices"),
        (lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"), "only zero padding"),
        (lambda x: F.pad(x, (1, 1), value=2.0), "only zero padding"),
        (lambda x: x[:, 0], "only slices"),
    ],
)
def test_calls_that_would_compute_something_else(call: Callable[[Tensor], Tensor], says: str) -> None:
    with pytest.raises(InputError, match=f"{says}.* can"):
        graph_module.onnx_graph(Calls(call).eval(), (3, 13, 13), "y")


# Nothing unverified


def perturb_a_weight(proto: onnx.ModelProto) -> None:
    weight = next(tensor for tensor in proto.graph.initializer if tensor.name == "fc.bias")
    values = onnx.numpy_helper.to_array(weight).copy()
    values[3] += 0.5
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))


def drop_a_relu(proto: onnx.ModelProto) -> None:
    relu = [node for node in proto.graph.node if node.op_type == "Relu"][-1]
    relu.op_type = "Identity"


def lower_the_opset(proto: onnx.ModelProto) -> None:
    proto.opset_import[0].version = 17


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[onnx.ModelProto], None]], None]:
    """Return a function that makes the graph builder's result go through another one."""
    build = graph_module.onnx_graph

    def install(change: Callable[[onnx.ModelProto], None]) -> None:
        def wrong(*args: Any) -> onnx.ModelProto:
            proto = build(*args)
            change(proto)
            return proto

        monkeypatch.setattr(graph_module, "onnx_graph", wrong)

    return install


@pytest.mark.parametrize("old", [None, b"the file of yesterday"])
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            perturb_a_weight,
            r"^not exported, 10 real pictures, .*: batch of 1: image 0 \(airplane.jpg\), output \[3\].*by 0\.5,",
        ),
        (drop_a_relu, r"not exported, 10 real pictures, 8 ways each: batch of 1: .* differs by .*, allowed "),
        (lower_the_opset, "asked for opset 18, got 17"),
    ],
)
def test_a_failed_verification_leaves_no_file_and_keeps_an_older_one(
    tmp_path: Path,
    model: nn.Module,
    broken: Callable[[Callable[[onnx.ModelProto], None]], None],
    change: Callable[[onnx.ModelProto], None],
    says: str,
    old: bytes | None,
) -> None:
    path = tmp_path / "model.onnx"
    if old is not None:
        path.write_bytes(old)
    broken(change)
    with pytest.raises(ParityError, match=says):
        export_onnx(model, path)
    assert os.listdir(tmp_path) == ([] if old is None else ["model.onnx"])
    assert old is None or path.read_bytes() == old


def test_the_file_is_compared_with_the_model_and_not_with_the_folded_one(
    tmp_path: Path, model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fold_wrongly(model: nn.Module) -> nn.Module:
        folded = sdzoo.fold(model)
        with torch.no_grad():
            folded.get_parameter("layer3.2.conv2.weight").mul_(1.01)
        return folded

    monkeypatch.setattr(export_module, "fold", fold_wrongly)
    with pytest.raises(ParityError, match="not exported"):
        export_onnx(model, tmp_path / "model.onnx")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_outputs_that_are_not_finite_are_not_exported(tmp_path: Path, source: nn.Module, bad: float) -> None:
    """As those of an untrained net of 1202 layers."""
    with torch.no_grad():
        source.get_parameter("layer2.1.bn2.bias")[5] = bad
    with pytest.raises(ParityError, match=r"not exported.*the reference's output is not finite"):
        export_onnx(source, tmp_path / "model.onnx")
    assert os.listdir(tmp_path) == []


def failing_write(error: BaseException) -> Callable[[Path, bytes], int]:
    def write(path: Path, content: bytes) -> int:
        with open(path, "wb") as file:
            file.write(content[: len(content) // 2])
        raise error

    return write


@pytest.mark.parametrize("old", [None, b"the file of yesterday"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=repr)
def test_a_full_disk_or_an_interrupt_leaves_nothing_half_written(
    tmp_path: Path, model: nn.Module, monkeypatch: pytest.MonkeyPatch, error: BaseException, old: bytes | None
) -> None:
    path = tmp_path / "model.onnx"
    if old is not None:
        path.write_bytes(old)
    monkeypatch.setattr(Path, "write_bytes", failing_write(error))
    with pytest.raises((OSError, InputError, KeyboardInterrupt), match="No space left" if str(error) else None):
        export_onnx(model, path)
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ([] if old is None else ["model.onnx"])
    assert old is None or path.read_bytes() == old


def test_what_reaches_the_disk_is_compared_with_what_was_verified(
    tmp_path: Path, model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flip(path: Path, content: bytes) -> int:
        damaged = bytearray(content)
        damaged[len(damaged) // 2] ^= 1
        with open(path, "wb") as file:
            return file.write(damaged)

    monkeypatch.setattr(Path, "write_bytes", flip)
    with pytest.raises(ParityError, match="is not what was verified"):
        export_onnx(model, tmp_path / "model.onnx")
    assert os.listdir(tmp_path) == []


# Refused


def refused(model: nn.Module, path: Path) -> str:
    with pytest.raises(InputError) as caught:
        export_onnx(model, path)
    assert "\n" not in str(caught.value)
    assert not path.is_file()
    return str(caught.value)


def test_training_mode(tmp_path: Path, source: nn.Module) -> None:
    message = refused(source.train(), tmp_path / "model.onnx")
    assert "training mode" in message
    assert "call model.eval() first" in message


def test_a_part_in_training_mode(tmp_path: Path, source: nn.Module) -> None:
    source.get_submodule("layer2.0").train()
    assert "layer2.0" in refused(source, tmp_path / "model.onnx")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(tmp_path: Path, source: nn.Module, dtype: torch.dtype) -> None:
    assert f"cannot export {dtype} weights: call model.float()" in refused(source.to(dtype), tmp_path / "model.onnx")


def test_a_folded_model(tmp_path: Path, model: nn.Module) -> None:
    assert "it is folded" in refused(sdzoo.fold(model), tmp_path / "model.onnx")


def test_models_that_are_not_timms(tmp_path: Path) -> None:
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).eval()
    assert "create it with timm.create_model" in refused(plain, tmp_path / "model.onnx")


def test_models_without_stochastic_depth(tmp_path: Path) -> None:
    assert "no gates" in refused(timm.create_model("resnet10t").eval(), tmp_path / "model.onnx")


@pytest.mark.parametrize(
    ("kwargs", "named"),
    [({"act_layer": "gelu"}, "gelu"), ({"act_layer": "silu"}, "SiLU"), ({"global_pool": "fastmax"}, "amax")],
)
def test_parts_without_onnx_counterpart_are_named(tmp_path: Path, kwargs: dict[str, Any], named: str) -> None:
    assert f"{named} cannot be exported" in refused(calibrated("sd_resnet20", **kwargs), tmp_path / "model.onnx")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("part", "says"),
    [
        (nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), "zero padding"),
        (nn.Conv2d(3, 4, 3, padding="same"), "zero padding"),
        (nn.AdaptiveAvgPool2d(2), "1x1"),
        (nn.Flatten(2), "all but the batch"),
        (nn.Sigmoid(), "Sigmoid cannot be exported"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_settings_without_onnx_counterpart_are_named(part: nn.Module, says: str) -> None:
    with pytest.raises(InputError, match=says):
        graph_module.onnx_graph(nn.Sequential(part).eval(), (3, 8, 8), "features")


def test_output_folder_that_is_not_there(tmp_path: Path, model: nn.Module) -> None:
    assert "is not a folder; create it first" in refused(model, tmp_path / "missing" / "model.onnx")
    assert os.listdir(tmp_path) == []


def test_output_that_is_a_folder(tmp_path: Path, model: nn.Module) -> None:
    (tmp_path / "model.onnx").mkdir()
    assert "is a folder; name a file" in refused(model, tmp_path / "model.onnx")
    assert os.listdir(tmp_path) == ["model.onnx"]


@pytest.mark.parametrize("missing", ["onnx", "onnxruntime"])
def test_missing_extra_is_named(
    tmp_path: Path, model: nn.Module, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == missing else find(name, *rest))
    with pytest.raises(ImportError, match=rf'^{missing} not installed.*pip install "sdzoo\[onnx\]"$'):
        export_onnx(model, tmp_path / "model.onnx")
    assert os.listdir(tmp_path) == []


def test_copies_of_a_model_export_alike(tmp_path: Path, model: nn.Module, exported: Path) -> None:
    """Byte for byte: neither time nor address is written."""
    export_onnx(copy.deepcopy(model), tmp_path / "model.onnx")
    first, second = onnx.load(exported), onnx.load(tmp_path / "model.onnx")
    for proto in (first, second):
        del proto.metadata_props[:]  # parity may differ in the last digits
    assert first.SerializeToString(deterministic=True) == second.SerializeToString(deterministic=True)
