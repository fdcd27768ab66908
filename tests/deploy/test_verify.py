from __future__ import annotations

import copy
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from nets import Net, calibrated, random_images
from onnx_files import save_sealed
from samples import FILES, LABELS, equal, normalised, tree
from tensorrt_double import install, pretend

import sdzoo
from sdzoo.deploy.card import read_card
from sdzoo.deploy.export import export
from sdzoo.deploy.onnx_export import export_onnx
from sdzoo.deploy.predictor import Predictor, model_predictor
from sdzoo.deploy.runtime import load_predictor
from sdzoo.deploy.tensorrt_builder import Gpu
from sdzoo.deploy.verify import Operand, verify
from sdzoo.errors import InputError, ParityError
from sdzoo.parity import Accuracy, Parity

KINDS = ("model", "folded", "predictor", "file", "folder")
RTX_4090 = Gpu("NVIDIA GeForce RTX 4090", "8.9")


@pytest.fixture(scope="session")
def operands(classifier: Net, onnx_folder: Path, in_graph_folder: Path) -> dict[str, Operand]:
    """Return one function, five times."""
    return {
        "model": classifier,
        "folded": sdzoo.fold(classifier),
        "predictor": model_predictor(classifier),
        "file": str(in_graph_folder / "model.onnx"),
        "folder": onnx_folder,
    }


@pytest.fixture(scope="session")
def other(classifier: Net) -> Net:
    """Return ``classifier`` with one logit a little larger."""
    changed = copy.deepcopy(classifier)
    with torch.no_grad():
        changed.get_parameter("fc.bias")[4] += 0.01
    return changed


# Any two


@pytest.mark.parametrize("a", KINDS)
@pytest.mark.parametrize("b", KINDS)
def test_every_pair(operands: dict[str, Operand], a: str, b: str) -> None:
    proof = verify(operands[a], operands[b])
    assert isinstance(proof, Parity)
    assert (proof.images, proof.batch_sizes, proof.tol) == (80, (1, 2, 17, 64), 1e-4)
    assert proof.top1_equal == 80


@pytest.mark.parametrize("kind", KINDS)
def test_another_function_is_refused_either_way(operands: dict[str, Operand], other: Net, kind: str) -> None:
    """With the image, the logit and the difference."""
    for pair in ((operands[kind], other), (other, operands[kind])):
        with pytest.raises(ParityError, match=r"batch of 1: image 0 \(airplane\.jpg\), output \[4\] .* by 0\.01, all"):
            verify(*pair)


def test_images_of_a_folder(operands: dict[str, Operand], calibration: Path) -> None:
    assert verify(operands["model"], operands["folder"], calibration).images == 256


def test_a_candidate_that_is_not_finite_is_no_fault_of_the_input(operands: dict[str, Operand], classifier: Net) -> None:
    """An engine in float16 that overflows is found out so."""
    broken = copy.deepcopy(classifier)
    with torch.no_grad():
        broken.get_parameter("fc.bias")[4] = torch.inf
    with pytest.raises(ParityError, match="the candidate's output is not finite"):
        verify(operands["folder"], broken)


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"in_chans": 1}, r"input_size of sd_resnet20 is \(3, 32, 32\), of sd_resnet20 \(1, 32, 32\)"),
        ({"pretrained_cfg_overlay": {"input_size": (3, 48, 48)}}, r"of sd_resnet20 \(3, 48, 48\)"),
        ({"pretrained_cfg_overlay": {"mean": (0, 0, 0)}}, r"mean of sd_resnet20 is .* of sd_resnet20 \(0, 0, 0\)"),
        ({"pretrained_cfg_overlay": {"std": (1, 1, 1)}}, "std of sd_resnet20 is"),
        ({"pretrained_cfg_overlay": {"label_names": list("abcdefghij")}}, "name their classes differently"),
    ],
)
def test_models_of_other_images_or_classes(operands: dict[str, Operand], kwargs: dict[str, object], says: str) -> None:
    model = calibrated("sd_resnet20", images=random_images(4, chans=int(kwargs.get("in_chans", 3))), **kwargs)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=says):
        verify(operands["folder"], model)


def test_models_of_another_number_of_classes(operands: dict[str, Operand]) -> None:
    with pytest.raises(ParityError, match=r"the output is \(1, 3\), the reference's \(1, 10\)"):
        verify(operands["folder"], calibrated("sd_resnet20", num_classes=3))


def test_folders_of_other_classes(operands: dict[str, Operand], labelled: Path, tmp_path: Path) -> None:
    shutil.copytree(labelled / "cat", tmp_path / "cat")
    with pytest.raises(InputError, match=r"are cat; the model's are airplane, "):
        verify(operands["model"], operands["folder"], tmp_path)
    nameless = calibrated("sd_resnet20", pretrained_cfg_overlay={"label_names": None})
    with pytest.raises(InputError, match="are of 1 classes; the model has 10"):
        verify(nameless, sdzoo.fold(nameless), tmp_path)


def test_things_that_cannot_be_opened(operands: dict[str, Operand], tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_bytes(b"x")
    for path in (tmp_path / "missing", tmp_path / "x.onnx", tmp_path):
        with pytest.raises(InputError, match=str(path)):
            verify(operands["model"], path)
    with pytest.raises(InputError, match=r"Sequential does not say its classes and input"):
        verify(torch.nn.Sequential().eval(), operands["model"])
    with pytest.raises(InputError, match="training mode"):
        verify(copy.deepcopy(operands["model"]).train(), operands["model"])  # type: ignore[union-attr]


def foreign(path: Path, source: Path, batch: int | None = None, size: int | str = 32) -> Path:
    """Write ``source`` as a stranger would have: without metadata, perhaps of a fixed batch."""
    proto = onnx.load(source)
    del proto.metadata_props[:]
    proto.producer_name = "other"
    shape = proto.graph.input[0].type.tensor_type.shape
    del shape.dim[:]
    for dim in (batch or "n", 3, size, size):
        shape.dim.add(**{"dim_value" if isinstance(dim, int) else "dim_param": dim})  # type: ignore[arg-type]
    if batch:
        proto.graph.output[0].type.tensor_type.shape.dim[0].dim_value = batch
    return save_sealed(proto, path)


@pytest.mark.parametrize("size", [32, "side"])
@pytest.mark.filterwarnings("ignore:.*has no metadata:UserWarning")
def test_a_strangers_file_is_fed_as_the_other_one(
    operands: dict[str, Operand], onnx_folder: Path, other: Net, tmp_path: Path, size: int | str
) -> None:
    path = foreign(tmp_path / "x.onnx", onnx_folder / "model.onnx", size=size)
    for pair in ((operands["model"], path), (path, operands["model"])):
        assert verify(*pair).images == 80
    with pytest.raises(ParityError, match=r"output \[4\]"):
        verify(other, path)
    with pytest.raises(InputError, match=r"neither x\.onnx nor x\.onnx says how pictures are normalised"):
        verify(path, path)


# Precision


def test_fp16_is_judged_as_fp16(operands: dict[str, Operand], fp16_folder: Path, labelled: Path) -> None:
    for pair in ((operands["model"], fp16_folder), (fp16_folder, operands["folder"])):
        proof = verify(*pair, labelled)
        assert isinstance(proof, Parity)
        assert (proof.tol, proof.images) == (1e-2, 1000)
    with pytest.raises(InputError, match="fp16 is compared on at least 1000 real images"):
        verify(operands["model"], fp16_folder)


def test_int8_is_judged_as_int8(operands: dict[str, Operand], int8_folder: Path, fp16_folder: Path, few: Path) -> None:
    after = json.loads((int8_folder / "card.json").read_text())["parity"]["top1_percent_after"]
    proof = verify(operands["model"], int8_folder, few, max_drop=10)
    assert isinstance(proof, Accuracy)
    assert (proof.top1_percent_before, proof.images) == (100, 200)
    assert proof.top1_percent_after == pytest.approx(after, abs=0.51)
    assert isinstance(verify(int8_folder, fp16_folder, few), Accuracy)  # the lower of the two; it gains
    with pytest.raises(ParityError, match=r"points, at most -0\.5 allowed"):
        verify(operands["model"], int8_folder, few)
    with pytest.raises(InputError, match="int8 is judged by top-1"):
        verify(operands["model"], int8_folder)


@pytest.fixture
def seen(few: Path, calibration: Path, tmp_path: Path) -> Path:
    """Return ``few`` with one of the pictures that calibrated ``int8_folder`` among them, under another name."""
    folder = Path(shutil.copytree(few, tmp_path / "seen"))
    shutil.copy(calibration / "7.png", folder / "frog" / "another.png")
    return folder


@pytest.mark.parametrize("kind", ["folder", "file", "predictor", "reference", "engine"])
def test_pictures_that_calibrated_do_not_judge(
    classifier: Net,
    int8_folder: Path,
    few: Path,
    calibration: Path,
    seen: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    int8 = int8_folder / "model.onnx" if kind == "file" else int8_folder
    if kind == "engine":
        install(monkeypatch, tensorrt_rtx="1.7.1.116")
        pretend(monkeypatch, RTX_4090)
        int8 = tmp_path / "engine"
        options = {"precision": "int8", "images": few, "calibration": calibration}
        export(classifier, "tensorrt", int8, **options, max_drop=20)  # type: ignore[arg-type]
    opened = load_predictor(int8) if kind == "predictor" else int8
    pair = (int8, classifier) if kind == "reference" else (classifier, opened)
    assert isinstance(verify(*pair, few, 20), Accuracy)
    called = "sd_resnet20" if kind == "predictor" else int8
    with pytest.raises(InputError, match=rf"{seen}/frog/another\.png calibrated {called}: judge on other images"):
        verify(*pair, seen, 20)


@pytest.mark.parametrize(
    ("parity", "said"),
    [
        ("[]", "does not say what calibrated it"),
        ("{}", "does not say what calibrated it"),
        ("{", "is damaged: its metadata cannot be read"),
        (None, ".*its metadata lack parity"),
    ],
)
def test_int8_files_that_do_not_say_what_calibrated_them(
    classifier: Net, int8_folder: Path, few: Path, tmp_path: Path, parity: str | None, said: str
) -> None:
    """They could be judged on the very pictures that calibrated them."""
    proto = onnx.load(int8_folder / "model.onnx")
    kept = {prop.key: prop.value for prop in proto.metadata_props if prop.key != "parity"}
    onnx.helper.set_model_props(proto, kept if parity is None else kept | {"parity": parity})
    path = save_sealed(proto, tmp_path / "x.onnx")
    with pytest.raises(InputError, match=f"{path}:? {said}"):
        verify(classifier, path, few, 20)


def test_copies_of_a_picture_are_said_and_not_compared(classifier: Net, few: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(few, tmp_path / "copied"))
    pictures = sorted(folder.glob("*/*.png"))
    distinct = len({picture.read_bytes() for picture in pictures})
    shutil.copy(pictures[0], pictures[0].parent / "copy.png")
    with pytest.warns(UserWarning, match="left out: "):
        card = export(classifier, "onnx", tmp_path / "exported", images=folder)
    assert isinstance(card.parity, dict)
    copies = len(pictures) + 1 - distinct
    left_out = f"{copies} cop{'y' if copies == 1 else 'ies'}"
    assert card.parity["inputs"] == f"{distinct} pictures of copied (left out: {left_out})"


@pytest.mark.parametrize("max_drop", [float("nan"), -5, 1e9])
def test_a_max_drop_that_is_none(operands: dict[str, Operand], other: Net, max_drop: float) -> None:
    for candidate in (operands["folder"], other):
        with pytest.raises(InputError, match=f"max_drop is {max_drop}; it is in points of top-1, 0 to 100"):
            verify(operands["model"], candidate, max_drop=max_drop)


# What a stranger's file does not say


@pytest.mark.filterwarnings("ignore:.*has no metadata:UserWarning")
@pytest.mark.parametrize("first", [True, False])
def test_a_strangers_file_takes_classes_and_normalisation_from_the_other_one(
    classifier: Net, onnx_folder: Path, labelled: Path, tmp_path: Path, first: bool
) -> None:
    path = foreign(tmp_path / "x.onnx", onnx_folder / "model.onnx")
    shuffled = tmp_path / "images"
    for name, label in zip(sorted(LABELS), sorted(LABELS)[1:] + sorted(LABELS)[:1], strict=True):
        shutil.copytree(labelled / label, shuffled / f"{name}s")
    with pytest.raises(InputError, match="the model's are airplane"):
        verify(*((path, classifier) if first else (classifier, path)), shuffled)


def test_pictures_are_cropped_as_the_reference_says(classifier: Net) -> None:
    reference = model_predictor(classifier)
    seen: list[np.ndarray] = []

    def run(batch: np.ndarray) -> np.ndarray:
        seen.append(batch)
        return reference._run(batch)

    verify(reference, Predictor(run, "x", "y", None, reference.config | {"crop_pct": 0.5}))
    np.testing.assert_allclose(seen[0], normalised(FILES[0]), rtol=0, atol=1e-5)


# Engines


@pytest.fixture
def engine(classifier: Net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder whose engine was built without a GPU; there is one now. Both are doubles."""
    install(monkeypatch, tensorrt_rtx="1.7.1.116")
    pretend(monkeypatch, None)
    export(classifier, "tensorrt", tmp_path / "engine")
    pretend(monkeypatch, RTX_4090)
    return tmp_path / "engine"


def test_an_unverified_engine_is_refused_until_it_was_verified(classifier: Net, engine: Path) -> None:
    unverified = engine / "model.unverified.engine"
    assert read_card(engine).parity == "not run"
    for path in (engine, unverified):
        with pytest.raises(InputError, match="was never compared with the model it was built from"):
            load_predictor(path)
    proof = verify(engine / "model.onnx", unverified)
    assert isinstance(proof, Parity)
    card = read_card(engine)
    assert sorted(os.listdir(engine)) == ["README.md", "card.json", "labels.json", "model.engine", "model.onnx"]
    assert (card.file, card.verified) == ("model.engine", True)
    assert set(card.files) == {"labels.json", "model.engine", "model.onnx"}
    assert card.parity == proof.as_dict() | {
        "reference": "the fp32 ONNX file of the model that was trained",
        "inputs": "10 real pictures, 8 ways each",
        "runtime": f"tensorrt-rtx 1.7.1.116, {RTX_4090}",
    }
    assert card.engine is not None
    assert card.engine["onnx_parity"]["images"] == 80
    readme = (engine / "README.md").read_text()
    assert "`model.engine` takes" in readme
    assert "not run" not in readme
    assert "\nCompared with the fp32 ONNX file of the model that was trained: |difference| " in readme
    assert f"sdzoo predict IMAGE --model {engine}" in readme
    for path in (engine, engine / "model.engine"):
        predictor = load_predictor(path)
        assert predictor.provider == f"tensorrt-rtx 1.7.1.116, {RTX_4090}"
        equal(model_predictor(classifier)(FILES), predictor(FILES))
        assert predictor.labels == model_predictor(classifier).labels
    verify(classifier, engine)  # once more, which changes nothing
    assert read_card(engine) == card


@pytest.mark.parametrize("by_folder", [False, True])
def test_the_model_itself_proves_an_engine(classifier: Net, engine: Path, by_folder: bool) -> None:
    verify(classifier, engine if by_folder else str(engine / "model.unverified.engine"))
    load_predictor(engine)
    assert "\nCompared with the model that was trained: |difference| " in (engine / "README.md").read_text()


def test_an_engine_that_fails_stays_unverified(classifier: Net, other: Net, engine: Path) -> None:
    before = tree(engine)
    with pytest.raises(ParityError):
        verify(other, engine)
    assert tree(engine) == before


@pytest.mark.parametrize("kind", ["itself", "folded", "predictor", "as the reference"])
def test_what_proves_nothing_leaves_it_unverified(
    classifier: Net, operands: dict[str, Operand], engine: Path, kind: str
) -> None:
    """An engine agrees with itself; of the others it is not known that it was built from them."""
    before = tree(engine)
    if kind == "as the reference":
        verify(engine, classifier)
    else:
        with pytest.warns(UserWarning, match=f"{engine} stays unverified: sd_resnet20 is ") as seen:
            verify(engine if kind == "itself" else operands[kind], engine)
        assert seen[0].filename == __file__
    assert tree(engine) == before


def test_a_file_of_lower_precision_proves_nothing(classifier: Net, engine: Path, int8_folder: Path, few: Path) -> None:
    with pytest.warns(UserWarning, match="is int8, which has lost something itself"):
        verify(int8_folder, engine, few, 10)
    assert not read_card(engine).verified


def test_an_engine_that_was_compared_proves_no_other(classifier: Net, engine: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(engine, tmp_path / "other"))
    verify(classifier, other)
    for reference, reason in ((other, "an engine itself"), (load_predictor(other), "not the model .*does not say so")):
        with pytest.warns(UserWarning, match=f"{engine} stays unverified: sd_resnet20 is {reason}"):
            verify(reference, engine)
    assert not read_card(engine).verified


def test_an_int8_engine_is_not_proved_by_the_file_it_was_built_from(
    classifier: Net, few: Path, calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file has lost something already, and the engine may lose as much again; the fp32 file proves it."""
    install(monkeypatch, tensorrt_rtx="1.7.1.116")
    pretend(monkeypatch, None)
    engine = tmp_path / "engine"
    card = export(classifier, "tensorrt", engine, precision="int8", images=few, calibration=calibration, max_drop=20)
    pretend(monkeypatch, RTX_4090)
    command = f"sdzoo verify CHECKPOINT {engine}/model.unverified.engine --images DIR --max-drop 20"
    assert card.serve == f"{command}    # on the target, before anything else"
    with pytest.raises(InputError, match=re.escape(f"run {command}")):
        load_predictor(engine)
    with pytest.warns(UserWarning, match="is int8, which has lost something itself"):
        verify(engine / "model.onnx", engine, few, 20)
    assert not read_card(engine).verified
    fp32 = tmp_path / "fp32"
    export(classifier, "onnx", fp32)
    proof = verify(fp32, engine, few, 20)
    assert isinstance(proof, Accuracy)
    assert proof.top1_percent_before == 100.0  # of the model, not of the int8 file
    assert read_card(engine).verified


class Killed(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("step", range(5))
def test_a_crash_while_it_is_renamed_leaves_a_folder_that_loads(
    classifier: Net, engine: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Of the three replacements of a file and the removal of the old name, ``step`` came first and no other."""
    done = 0

    def counted(act: Callable[..., None], of: str) -> Callable[..., None]:
        def until(*args: object, **kwargs: object) -> None:
            nonlocal done
            if str(args[0]).endswith(of):
                if done == step:
                    raise Killed
                done += 1
            act(*args, **kwargs)

        return until

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", counted(os.replace, ""))
        patch.setattr(Path, "unlink", counted(Path.unlink, ".unverified.engine"))
        if step < 4:
            with pytest.raises(Killed):
                verify(classifier, engine)
        else:
            verify(classifier, engine)
    assert done == min(step, 4)
    card = read_card(engine)
    assert card.verified == (step >= 3)
    equal(model_predictor(classifier)(FILES), load_predictor(engine, unverified=True)(FILES))
    verify(classifier, engine)
    equal(model_predictor(classifier)(FILES), load_predictor(engine)(FILES))


@pytest.mark.filterwarnings("ignore:.*has no metadata:UserWarning")
def test_a_fixed_batch_is_said(classifier: Net, onnx_folder: Path, tmp_path: Path) -> None:
    path = foreign(tmp_path / "x.onnx", onnx_folder / "model.onnx", batch=1)
    assert load_predictor(path)(np.zeros((1, 3, 32, 32), np.float32)).shape == (1, 10)
    with pytest.raises(InputError, match=r"cannot compute an array of \(2, 3, 32, 32\): "):
        verify(classifier, path)


def test_no_warning_where_all_is_well(classifier: Net, tmp_path: Path) -> None:
    export_onnx(classifier, tmp_path / "model.onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        verify(classifier, tmp_path / "model.onnx")
