from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import timm
from cards import put_card
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nets import calibrated
from onnx import TensorProto, helper, numpy_helper
from onnx_files import save_sealed
from samples import FILES

from sdzoo.deploy.export import export
from sdzoo.deploy.predictor import Predictor
from sdzoo.deploy.runtime import load_predictor
from sdzoo.digest import file_sha256
from sdzoo.errors import InputError


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


def test_a_strangers_file_computes_arrays_and_says_what_is_unknown(tmp_path: Path) -> None:
    path = write(tmp_path / "x.onnx", linear_graph(), {"author": "somebody", "labels": "cat,dog", "format": "mine"})
    with pytest.warns(UserWarning, match="no metadata of sdzoo's: its labels, how pictures are resized and") as seen:
        predictor = load_predictor(path)
    assert seen[0].filename == __file__
    assert (predictor.name, predictor.provider, predictor.labels) == ("x.onnx", "CPUExecutionProvider", None)
    assert predictor(np.zeros((3, 3, 32, 32), np.float32)).shape == (3, 10)
    assert [one.label for one in predictor.top(np.zeros((1, 3, 32, 32), np.float32), 2)[0]] == ["0", "1"]
    with pytest.raises(InputError, match="does not say how pictures are resized and normalised"):
        predictor(FILES[0])
    predictor.warmup()


@pytest.mark.parametrize(
    ("graph", "says"),
    [
        (linear_graph(["batch", 3072]), "a classifier of images takes one float"),
        (linear_graph(kind=TensorProto.DOUBLE), "a classifier of images takes one float"),
        (constant_graph(), "takes nothing; a classifier of images takes one float"),
    ],
    ids=["rank", "float64", "no input"],
)
def test_a_strangers_file_that_is_no_classifier_of_images(tmp_path: Path, graph: onnx.GraphProto, says: str) -> None:
    assert says in refused(write(tmp_path / "x.onnx", graph))


def test_a_strangers_file_that_gives_no_floats(tmp_path: Path) -> None:
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, 8, 8])
    result = helper.make_tensor_value_info("y", TensorProto.INT64, ["batch", 3, 8, 8])
    node = helper.make_node("Cast", ["x"], ["y"], to=TensorProto.INT64)
    message = refused(write(tmp_path / "x.onnx", helper.make_graph([node], "g", [given], [result])))
    assert "gives tensor(int64); a classifier of images gives tensor(float)" in message


def test_a_file_of_sdzoo_that_lost_its_metadata_is_not_a_strangers(tmp_path: Path, exported: Path) -> None:
    """As one that was cut before them."""
    proto = onnx.load(exported)
    del proto.metadata_props[:]
    assert "is damaged, or of another version of sdzoo" in refused(save_sealed(proto, tmp_path / "x.onnx"))


# Folders


def test_a_folder_is_what_its_card_says(in_graph_folder: Path) -> None:
    predictor = load_predictor(in_graph_folder, threads=1)
    assert (predictor.name, predictor.precision, predictor.in_graph) == ("sd_resnet20", "fp32", True)
    assert len(predictor.top(FILES, 3)) == len(FILES)


def test_a_damaged_folder_is_refused(tmp_path: Path, onnx_folder: Path) -> None:
    folder = Path(shutil.copytree(onnx_folder, tmp_path / "out"))
    (folder / "labels.json").write_text("[]")
    assert "labels.json is damaged: its sha256 is not the one in card.json" in refused(folder)


@pytest.mark.parametrize(
    ("name", "value"),
    [("mean", [4.4914, 0.4822, 0.4465]), ("std", [1.0, 1.0, 1.0]), ("input_size", [3, 33, 32]), ("where", "in-graph")],
)
def test_a_card_and_a_file_that_say_different_things(tmp_path: Path, onnx_folder: Path, name: str, value: Any) -> None:
    folder = Path(shutil.copytree(onnx_folder, tmp_path / "out"))
    said = json.loads((folder / "card.json").read_text())["preprocessing"]
    put_card(folder, preprocessing=said | {name: value})
    assert f"model.onnx: its {'preprocess' if name == 'where' else name} is " in (message := refused(folder))
    assert message.endswith(f", its card.json says {value}")


def test_a_card_of_another_precision(tmp_path: Path, onnx_folder: Path) -> None:
    folder = put_card(Path(shutil.copytree(onnx_folder, tmp_path / "out")), precision="fp16")
    assert "model.onnx: its precision is fp32, its card.json says fp16" in refused(folder)


@pytest.mark.parametrize(
    ("entry", "changed"),
    [
        ("input", {"name": "pixels"}),
        ("input", {"dtype": "uint8"}),
        ("input", {"shape": ["batch", 32, 32, 3]}),
        ("input", {"layout": "NHWC"}),
        ("output", {"name": "features"}),
        ("output", {"dtype": "float16"}),
        ("output", {"shape": [1, 10]}),
    ],
)
def test_a_card_that_names_other_inputs_or_outputs(
    tmp_path: Path, onnx_folder: Path, entry: str, changed: dict[str, Any]
) -> None:
    folder = Path(shutil.copytree(onnx_folder, tmp_path / "out"))
    put_card(folder, **{entry: json.loads((folder / "card.json").read_text())[entry] | changed})
    said = refused(folder)
    assert "model.onnx makes {'name': 'logits', " in said and said.endswith("; its card.json says otherwise")


@pytest.mark.parametrize(("name", "value"), [("model", "sd_resnet32"), ("survival_probs", [0.5] * 9), ("tag", "x")])
def test_a_card_of_another_model(tmp_path: Path, onnx_folder: Path, name: str, value: Any) -> None:
    folder = put_card(Path(shutil.copytree(onnx_folder, tmp_path / "out")), **{name: value})
    assert f"model.onnx: its {name} is " in (message := refused(folder))
    assert message.endswith(f", its card.json says {value}")


def test_a_card_with_other_figures(tmp_path: Path, onnx_folder: Path) -> None:
    folder = Path(shutil.copytree(onnx_folder, tmp_path / "out"))
    put_card(folder, parity=json.loads((folder / "card.json").read_text())["parity"] | {"max_abs_diff": 0})
    assert "model.onnx: its parity is " in refused(folder)


def test_a_card_of_other_weights(tmp_path: Path, onnx_folder: Path) -> None:
    folder = put_card(Path(shutil.copytree(onnx_folder, tmp_path / "out")), weights_sha256="0" * 63 + "1")
    assert re.search(r"model.onnx: its weights_sha256 is \w{64}, its card.json says 0{63}1$", refused(folder))


def test_labels_in_another_order_than_the_files_own(tmp_path: Path, onnx_folder: Path) -> None:
    folder = Path(shutil.copytree(onnx_folder, tmp_path / "out"))
    labels = json.loads((folder / "labels.json").read_text())
    (folder / "labels.json").write_text(json.dumps(labels[::-1]))
    said = json.loads((folder / "card.json").read_text())["files"]
    put_card(folder, files=said | {"labels.json": file_sha256(folder / "labels.json")})
    assert "model.onnx: its labels are not those in labels.json" in refused(folder)


def test_classes_that_are_called_by_their_numbers(tmp_path: Path) -> None:
    numbered = calibrated("sd_resnet20", pretrained_cfg_overlay={"label_names": [*map(str, range(10))]})
    export(numbered, "onnx", tmp_path / "digits")
    assert load_predictor(tmp_path / "digits").top(FILES[0], 1)[0][0].label.isdigit()


def test_an_engine_without_its_card(tmp_path: Path) -> None:
    (tmp_path / "model.engine").touch()
    assert "has no card.json beside it" in refused(tmp_path / "model.engine")


def test_an_engine_that_is_not_the_cards(tmp_path: Path, onnx_folder: Path) -> None:
    folder = Path(shutil.copytree(onnx_folder, tmp_path / "out"))
    (folder / "model.engine").touch()
    assert "card.json is about: that is model.onnx" in refused(folder / "model.engine")


@pytest.mark.parametrize("missing", ["model", "mean", "labels", "survival_probs"])
def test_metadata_that_lack_something(tmp_path: Path, metadata: dict[str, str], missing: str) -> None:
    del metadata[missing]
    assert f"its metadata lack {missing}" in refused(write(tmp_path / "x.onnx", linear_graph(), metadata))


@pytest.mark.parametrize("version", ["sdzoo-99", "sdzoo-1"])
def test_a_file_of_another_format(tmp_path: Path, metadata: dict[str, str], version: str) -> None:
    """Also without the producer's name, which the quantiser replaces."""
    path = write(tmp_path / "x.onnx", linear_graph(), metadata | {"format": json.dumps(version)})
    assert refused(path) == f"{path}: is of another version of sdzoo: its format is '{version}'"


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
