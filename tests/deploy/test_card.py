from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from cards import put_card, save_card
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from samples import LABELS

from sdzoo.deploy.card import NOT_RUN, Card, digests, read_card, read_labels
from sdzoo.errors import InputError


def entries_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "card.json").read_text(encoding="utf-8"))


@pytest.fixture
def folder(onnx_folder: Path, tmp_path: Path) -> Path:
    """Return a copy that a test may damage."""
    return Path(shutil.copytree(onnx_folder, tmp_path / "out"))


def refused(folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        read_card(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
    return str(caught.value)


# What is written


def test_a_card_is_read_as_it_was_written(onnx_folder: Path, tmp_path: Path) -> None:
    card = read_card(onnx_folder)
    for name in card.files:
        shutil.copy(onnx_folder / name, tmp_path)
    card.write(tmp_path)
    assert read_card(tmp_path) == card
    engine = dataclasses.replace(card, engine={"version": "11", "targets": []}, parity=NOT_RUN, tag="cifar10")
    name = "m.unverified.engine"
    engine = dataclasses.replace(engine, file=name, files=card.files | {name: hashlib.sha256().hexdigest()})
    (tmp_path / name).touch()
    engine.write(tmp_path)
    assert read_card(tmp_path) == engine


def test_sha256_of_each_file(onnx_folder: Path) -> None:
    files = {
        name: hashlib.sha256((onnx_folder / name).read_bytes()).hexdigest() for name in ("model.onnx", "labels.json")
    }
    assert entries_of(onnx_folder)["files"] == files
    assert sorted(os.listdir(onnx_folder)) == ["README.md", "card.json", "labels.json", "model.onnx"]


def test_digests_are_of_files_in_folders_too(tmp_path: Path) -> None:
    (tmp_path / "a" / "1").mkdir(parents=True)
    (tmp_path / "a" / "1" / "x").write_bytes(b"x")
    (tmp_path / "card.json").touch()
    assert digests(tmp_path) == {"a/1/x": hashlib.sha256(b"x").hexdigest()}


def test_readme_says_what_it_takes_what_it_gives_and_what_was_compared(
    onnx_folder: Path, in_graph_folder: Path
) -> None:
    text = (onnx_folder / "README.md").read_text()
    figures = entries_of(onnx_folder)["parity"]
    assert text.startswith("# sd_resnet20, fp32, for onnx\n")
    assert "`model.onnx` takes `images`, float32 (batch, 3, 32, 32)\nand gives `logits`, float32 (batch, 10)." in text
    assert "(pixel / 255 - mean) / std, mean 0.4914, 0.4822, 0.4465, std 0.247, 0.2435, 0.2616" in text
    figure = (
        f"|difference| {figures['max_abs_diff']:.2g} of {figures['allowed']:.2g} allowed in the batch nearest its limit"
    )
    assert f"{figure}, on 80 images" in text
    assert f"    sdzoo predict IMAGE --model {onnx_folder}\n" in text
    text = (in_graph_folder / "README.md").read_text()
    assert "takes `images`, uint8 (batch, 32, 32, 3)" in text
    assert "The graph normalises; resizing and cropping stay with the client." in text


@pytest.mark.parametrize(
    ("changed", "command"),
    [
        ({}, "sdzoo export CHECKPOINT --to onnx --precision fp32 -o DIR"),
        (
            {"tag": "t", "precision": "fp16"},
            "sdzoo export sd_resnet20.t --to onnx --precision fp16 --images DIR -o DIR",
        ),
        (
            {"backend": "tensorrt-rtx", "parity": {"max_drop_points": 2}},
            "sdzoo export CHECKPOINT --to onnx --precision fp32 --backend tensorrt-rtx --max-drop 2 -o DIR",
        ),
        (
            {"precision": "int8", "target": "triton"},
            "sdzoo export CHECKPOINT --to triton --precision int8 --images DIR --calibration DIR -o DIR",
        ),
    ],
)
def test_command_that_makes_it_anew(onnx_folder: Path, changed: dict[str, Any], command: str) -> None:
    assert dataclasses.replace(read_card(onnx_folder), **changed).rebuild == command  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changed", "command"),
    [
        ({}, "sdzoo verify '{0}/model.onnx' '{0}/m.engine' --images DIR"),
        ({"precision": "fp16"}, "sdzoo verify CHECKPOINT '{0}/m.engine' --images DIR"),
        ({"precision": "int8", "tag": "t"}, "sdzoo verify sd_resnet20.t '{0}/m.engine' --images DIR"),
    ],
)
def test_command_that_proves_an_engine(onnx_folder: Path, changed: dict[str, str], command: str) -> None:
    """Never the file that it was built from where that has lost something itself."""
    card = dataclasses.replace(read_card(onnx_folder), file="m.engine", **changed)  # type: ignore[arg-type]
    assert card.prove(Path("my folder")) == command.format("my folder")


def test_command_says_who_normalises(in_graph_folder: Path) -> None:
    assert " --preprocess in-graph " in read_card(in_graph_folder).rebuild


def test_labels(onnx_folder: Path) -> None:
    assert read_labels(onnx_folder, read_card(onnx_folder)) == LABELS


# Damage


def test_no_card(tmp_path: Path) -> None:
    assert refused(tmp_path) == f"{tmp_path} is no exported folder: it has no card.json"
    assert "is no exported folder" in refused(tmp_path / "missing")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"5", b"null", b'"x"', b"\xff\xfe", b"{}", b"[" * 100_000])
def test_cards_that_are_none(folder: Path, content: bytes) -> None:
    (folder / "card.json").write_bytes(content)
    assert "is damaged or of another version of sdzoo" in refused(folder)


def test_card_that_is_a_folder(folder: Path) -> None:
    (folder / "card.json").unlink()
    (folder / "card.json").mkdir()
    refused(folder)


def test_the_seal_is_the_sha256_of_the_card_with_zeros_in_its_place(onnx_folder: Path) -> None:
    content = (onnx_folder / "card.json").read_bytes()
    seal = entries_of(onnx_folder)["seal"]
    assert hashlib.sha256(content.replace(seal.encode(), b"0" * 64)).hexdigest() == seal


@pytest.mark.parametrize(
    ("old", "new"),
    [("0.4914", "4.4914"), ('"bilinear"', '"bicubic"'), ('"seal": "', '"seal": "0'), ('"seal"', '"tag"')],
)
def test_a_changed_card(folder: Path, old: str, new: str) -> None:
    text = (folder / "card.json").read_text()
    assert old in text
    (folder / "card.json").write_text(text.replace(old, new, 1))
    says = f"{folder}/card.json is damaged or of another version of sdzoo: its sha256 is not the seal in it"
    assert refused(folder) == says


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"seal": 5}, "damaged or"),
        ({"seal": None}, "damaged or"),
        ({"seal": ""}, "damaged or"),
        ({"seal": "\ud800"}, "damaged or"),
        ({"format": "sdzoo-1"}, "is of another version of sdzoo: its format is 'sdzoo-1'"),
    ],
)
def test_a_card_with_another_seal(folder: Path, changed: dict[str, Any], says: str) -> None:
    (folder / "card.json").write_text(json.dumps(entries_of(folder) | changed))
    assert says in refused(folder)


def test_a_flipped_bit_anywhere_in_a_card_is_seen(folder: Path) -> None:
    content = (folder / "card.json").read_bytes()
    for index in range(0, len(content), 17):
        damaged = bytearray(content)
        damaged[index] ^= 1 << index % 8
        (folder / "card.json").write_bytes(damaged)
        refused(folder)


@pytest.mark.parametrize(
    ("parity", "name"),
    [(NOT_RUN, "m.engine"), ({"inputs": "x", "images": 1, "max_abs_diff": 0, "allowed": 1}, "m.unverified.engine")],
)
def test_an_engine_is_named_by_whether_it_was_compared(folder: Path, parity: Any, name: str) -> None:
    (folder / name).touch()
    put_card(folder, file=name, engine={}, parity=parity, files=digests(folder))
    assert f"{name} and its parity do not fit: *.unverified.engine is not run" in refused(folder)


@pytest.mark.parametrize("name", ["model.onnx", "labels.json"])
def test_a_changed_file(folder: Path, name: str) -> None:
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    assert refused(folder) == f"{folder}/{name} is damaged: its sha256 is not the one in card.json"


@pytest.mark.parametrize("name", ["model.onnx", "labels.json"])
def test_a_missing_file(folder: Path, name: str) -> None:
    (folder / name).unlink()
    assert refused(folder) == f"{folder} is not whole: {name} is missing"


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/passwd", "a/../../secret", "..", "..\\secret", "", "x" * 5000, "a\0b", "\ud800"]
)
@pytest.mark.parametrize("as_model", [False, True])
def test_names_that_lead_out_of_the_folder_or_nowhere(folder: Path, name: str, as_model: bool) -> None:
    secret = folder.parent / "secret"
    secret.write_bytes(b"secret")
    digest = hashlib.sha256(b"secret").hexdigest()
    put_card(folder, files=entries_of(folder)["files"] | {name: digest}, **({"file": name} if as_model else {}))
    message = refused(folder)
    if "secret" in name or "passwd" in name:
        assert "which is outside the folder" in message


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"format": "sdzoo-1"}, "is of another version of sdzoo: its format is 'sdzoo-1'"),
        ({"later": 1}, "of another version of sdzoo"),
        ({"target": "coreml"}, 'target "coreml" is unknown; known: onnx, tensorrt, triton'),
        ({"precision": "fp8"}, "precision is 'fp8'"),
        ({"file": "other.onnx"}, "names other.onnx but not its sha256"),
        ({"model": 5}, "an entry is of another type"),
        ({"tag": 5}, "an entry is of another type"),
        ({"files": []}, "an entry is of another type"),
        ({"backend": 5}, "an entry is of another type"),
        ({"served_by": {}}, "an entry is of another type"),
        ({"survival_probs": [1.5]}, "survival_probs is '[1.5]'"),
        ({"parity": "passed"}, 'its parity is neither "not run" nor figures'),
        ({"parity": {}}, 'its parity is neither "not run" nor figures'),
        ({"engine": {}}, "what it says of an engine do not fit"),
        ({"versions": {}}, "versions needs sdzoo"),
        ({"output": {"name": "logits"}}, "output needs name, dtype, shape"),
        ({"input": {"name": "x", "dtype": "y", "shape": 5}}, "the shape of its input is no list"),
    ],
)
def test_entries_that_no_export_wrote(folder: Path, changed: dict[str, Any], says: str) -> None:
    assert says in refused(put_card(folder, **changed))


@pytest.mark.parametrize(
    ("name", "value"), [("mean", [1, 2]), ("std", [1, 1, 0]), ("where", "nowhere"), ("crop_pct", -1), ("std", None)]
)
def test_preprocessing_that_no_export_wrote(folder: Path, name: str, value: Any) -> None:
    put_card(folder, preprocessing=entries_of(folder)["preprocessing"] | {name: value})
    assert f"it describes its model wrongly: {'preprocess' if name == 'where' else name} is" in refused(folder)


@pytest.mark.parametrize("content", ["[]]", "5", '["a"]', "[1, 2, 3, 4, 5, 6, 7, 8, 9, 0]", '{"a": 1}'])
def test_labels_that_are_not_the_classes(folder: Path, content: str) -> None:
    (folder / "labels.json").write_text(content)
    card = read_card(put_card(folder, files=digests(folder)))
    with pytest.raises(InputError, match=r"labels\.json is damaged"):
        read_labels(folder, card)


def test_labels_that_the_card_does_not_list(folder: Path) -> None:
    files = {name: digest for name, digest in digests(folder).items() if name != "labels.json"}
    with pytest.raises(InputError, match=r"card\.json does not list labels\.json"):
        read_labels(folder, read_card(put_card(folder, files=files)))


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.just(10**400)
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["sdzoo-2", "not run", "in-graph", "x.engine", "../x", "model.onnx"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def read_or_refused(folder: Path) -> Card | None:
    try:
        card = read_card(folder)
    except InputError:
        return None
    assert isinstance(card.compared + card.rebuild, str)  # what is accepted can be used
    assert isinstance(card.verified, bool)
    return card


@FUZZ
@given(data=st.data())
def test_any_change_is_read_or_refused(
    onnx_folder: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.getbasetemp() / "fuzzed"
    if not folder.is_dir():
        shutil.copytree(onnx_folder, folder)
    entries = copy.deepcopy(entries_of(onnx_folder))
    for _ in range(data.draw(st.integers(1, 3))):
        within = data.draw(st.sampled_from([entries, *(v for v in entries.values() if isinstance(v, dict))]))
        name = data.draw(st.sampled_from([*within, "new"]))
        if data.draw(st.booleans()):
            within.pop(name, None)
        else:
            within[name] = data.draw(VALUES)
    save_card(folder, entries)
    read_or_refused(folder)


@FUZZ
@given(content=st.binary(max_size=60) | VALUES.map(lambda value: json.dumps(value).encode()))
def test_anything_else_is_refused(onnx_folder: Path, tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    folder = tmp_path_factory.getbasetemp() / "garbage"
    if not folder.is_dir():
        shutil.copytree(onnx_folder, folder)
    (folder / "card.json").write_bytes(content)
    assert read_or_refused(folder) is None
