from __future__ import annotations

import copy
import errno
import importlib.util
import json
import os
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from nets import Net, calibrated, evaluate, random_images
from PIL import Image
from samples import FILES, LABELS, equal, onnx_outputs, tree
from tensorrt_double import install, pretend
from torch import nn

import sdzoo
from sdzoo import files
from sdzoo.deploy import export as export_module
from sdzoo.deploy import onnx_graph as graph_module
from sdzoo.deploy import tensorrt_engine, triton
from sdzoo.deploy.card import Card, read_card
from sdzoo.deploy.export import BACKENDS, export, possible
from sdzoo.deploy.onnx_export import Settings
from sdzoo.deploy.predictor import model_predictor
from sdzoo.deploy.runtime import load_predictor
from sdzoo.deploy.tensorrt_builder import Gpu
from sdzoo.digest import state_sha256
from sdzoo.errors import InputError, ParityError
from sdzoo.extras import MissingExtra

RTX_4090, H100 = Gpu("NVIDIA GeForce RTX 4090", "8.9"), Gpu("NVIDIA H100", "9.0")


def absent(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in names else find(name, *rest))


def refused(model: nn.Module, target: str, out: Path, **options: Any) -> str:
    with pytest.raises((InputError, ParityError)) as caught:
        export(model, target, out, **options)
    assert "\n" not in str(caught.value)
    assert not out.exists()
    return str(caught.value)


# What comes out


def test_card_says_what_it_is(classifier: Net, onnx_folder: Path) -> None:
    card = json.loads((onnx_folder / "card.json").read_text())
    assert (card["format"], card["model"], card["tag"]) == ("sdzoo-2", "sd_resnet20", None)
    assert (card["target"], card["precision"], card["file"]) == ("onnx", "fp32", "model.onnx")
    assert card["input"] == {
        "name": "images",
        "dtype": "float32",
        "layout": "NCHW",
        "shape": ["batch", 3, 32, 32],
        "largest_batch": 64,
    }
    assert card["output"] == {"name": "logits", "dtype": "float32", "shape": ["batch", 10]}
    assert card["preprocessing"] == {
        "where": "client",
        "input_size": [3, 32, 32],
        "mean": [0.4914, 0.4822, 0.4465],
        "std": [0.2470, 0.2435, 0.2616],
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "crop_mode": "center",
    }
    assert card["survival_probs"] == sdzoo.survival_probs(classifier)
    assert card["weights_sha256"] == state_sha256(classifier.state_dict())
    assert set(card["versions"]) == {"sdzoo", "torch", "timm", "onnx", "onnxruntime"}
    assert card["parity"]["images"] == 80
    assert "CPUExecutionProvider" in card["provider"]
    assert card["serve"] == shlex.join(["sdzoo", "predict", "IMAGE", "--model", str(onnx_folder)])
    assert "engine" not in card


def test_in_graph_card(in_graph_folder: Path) -> None:
    card = read_card(in_graph_folder)
    assert (card.input["dtype"], card.input["layout"], card.input["shape"]) == ("uint8", "NHWC", ["batch", 32, 32, 3])
    assert card.preprocessing["where"] == "in-graph"


def test_card_is_returned(classifier: Net, tmp_path: Path) -> None:
    assert export(classifier, "onnx", tmp_path / "out") == read_card(tmp_path / "out")


def test_folder_computes_the_model(classifier: Net, onnx_folder: Path) -> None:
    images = random_images(5)
    equal(evaluate(classifier, images).numpy(), onnx_outputs(onnx_folder / "model.onnx", images.numpy()))
    equal(model_predictor(classifier)(FILES), load_predictor(onnx_folder)(FILES))


def test_labels(onnx_folder: Path, tmp_path: Path) -> None:
    assert json.loads((onnx_folder / "labels.json").read_text()) == LABELS
    export(calibrated("sd_resnet20", num_classes=3), "onnx", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "labels.json").read_text()) == ["0", "1", "2"]


@pytest.mark.parametrize(("global_pool", "shape"), [("avg", [64]), ("", [64, 8, 8])])
def test_a_model_without_classifier(tmp_path: Path, global_pool: str, shape: list[int]) -> None:
    model = calibrated("sd_resnet20", num_classes=0, global_pool=global_pool)
    card = export(model, "onnx", tmp_path / "out")
    assert card.output == {"name": "features", "dtype": "float32", "shape": ["batch", *shape]}
    assert json.loads((tmp_path / "out" / "labels.json").read_text()) == []
    assert load_predictor(tmp_path / "out")(FILES[0]).shape == (1, *shape)


def test_a_model_without_classifier_takes_pictures_of_any_classes(tmp_path: Path, labelled: Path) -> None:
    few = tmp_path / "few"
    few.mkdir()
    for name in ("cat", "dog"):
        (few / name).symlink_to(labelled / name)
    card = export(calibrated("sd_resnet20", num_classes=0), "onnx", tmp_path / "out", images=few)
    assert isinstance(card.parity, dict)
    assert (card.parity["images"], card.parity["inputs"]) == (200, "200 pictures of few")


def test_command_for_a_path_with_a_space(classifier: Net, tmp_path: Path) -> None:
    out = tmp_path / "my model"
    assert export(classifier, "onnx", out).serve == f"sdzoo predict IMAGE --model '{out}'"


def test_progress_says_what_is_done(classifier: Net, tmp_path: Path) -> None:
    said: list[str] = []
    export(classifier, "onnx", tmp_path / "out", progress=said.append)
    assert said == ["folding and writing the graph", "comparing on 10 real pictures, 8 ways each"]


def test_the_model_is_left_alone(classifier: Net, tmp_path: Path) -> None:
    before = state_sha256(classifier.state_dict())
    export(classifier, "onnx", tmp_path / "out", preprocess="in-graph")
    assert state_sha256(classifier.state_dict()) == before
    assert not classifier.training


# What is possible


@pytest.mark.parametrize(
    ("target", "near"), [("onx", "onnx"), ("tensorflow", None), ("", None), ("Triton", "triton"), (None, None)]
)
def test_unknown_target(classifier: Net, tmp_path: Path, target: str, near: str | None) -> None:
    said = refused(classifier, target, tmp_path / "out")
    assert said.startswith(f'target "{target}" is unknown; possible: onnx with onnxruntime')
    assert "; tensorrt with tensorrt" in said
    assert "; triton with onnxruntime" in said
    assert near is None or said.endswith(f"; nearest: {near}")


@pytest.mark.parametrize(
    ("target", "backend"), [("onnx", "tensorrt"), ("tensorrt", "python"), ("triton", "tensorrt-rtx"), ("onnx", "")]
)
def test_pairs_that_do_not_fit(classifier: Net, tmp_path: Path, target: str, backend: str) -> None:
    said = refused(classifier, target, tmp_path / "out", backend=backend)
    assert said == f'{target} with "{backend}" is not possible; possible: {possible()}'


def test_what_is_missing_is_said_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    absent(monkeypatch, "onnxruntime", "tensorrt", "tensorrt_rtx", "tritonclient")
    assert possible() == (
        "onnx with onnxruntime (needs sdzoo[onnx]); "
        "tensorrt with tensorrt (needs sdzoo[tensorrt]) or tensorrt-rtx (needs sdzoo[tensorrt-rtx]); "
        "triton with onnxruntime (needs sdzoo[triton]) or onnxruntime-tensorrt (needs sdzoo[triton]) "
        "or python (needs sdzoo[triton])"
    )


def test_what_is_installed_is_said_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: object())
    assert "needs" not in possible()
    assert all(name in possible() for backends in BACKENDS.values() for name in backends)


@pytest.mark.parametrize(
    ("target", "module", "extra"),
    [("onnx", "onnxruntime", "onnx"), ("triton", "tritonclient", "triton"), ("triton", "grpc", "triton")],
)
def test_missing_extra_is_named_before_anything_is_done(
    classifier: Net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, module: str, extra: str
) -> None:
    absent(monkeypatch, module)
    said: list[str] = []
    with pytest.raises(MissingExtra, match=rf'{module}.* not installed; .*pip install "sdzoo\[{extra}\]"'):
        export(classifier, target, tmp_path / "out", progress=said.append)
    assert said == []


def test_unknown_precision(classifier: Net, tmp_path: Path) -> None:
    assert 'precision "fp61" is unknown; known: fp32, fp16, int8; nearest: fp16' in refused(
        classifier, "onnx", tmp_path / "out", precision="fp61"
    )


def test_models_that_cannot_be_exported(classifier: Net, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "training mode" in refused(copy.deepcopy(classifier).train(), "onnx", out)
    assert "it is folded" in refused(sdzoo.fold(classifier), "onnx", out)
    assert "call model.float() first" in refused(copy.deepcopy(classifier).double(), "onnx", out)
    assert "create it with timm.create_model" in refused(nn.Sequential(nn.Linear(2, 2)).eval(), "onnx", out)


# Whole or not at all


@pytest.fixture(params=[False, True], ids=["new", "over an older one"])
def out(request: pytest.FixtureRequest, tmp_path: Path, onnx_folder: Path) -> Path:
    """Return where to export to: nothing is there, or an older export is."""
    if request.param:
        shutil.copytree(onnx_folder, tmp_path / "out")
        (tmp_path / "out" / "README.md").write_bytes(b"old")
    return tmp_path / "out"


def test_success_replaces_an_older_one_whole(classifier: Net, out: Path) -> None:
    export(classifier, "onnx", out)
    assert sorted(tree(out)) == ["README.md", "card.json", "labels.json", "model.onnx"]
    assert (out / "README.md").read_bytes() != b"old"
    assert os.listdir(out.parent) == ["out"]


def test_a_failing_comparison_names_image_logit_and_difference(
    classifier: Net, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = graph_module.onnx_graph

    def wrong(*args: Any) -> onnx.ModelProto:
        proto = build(*args)
        bias = next(tensor for tensor in proto.graph.initializer if tensor.name == "fc.bias")
        values = onnx.numpy_helper.to_array(bias).copy()
        values[7] -= 0.25
        bias.CopyFrom(onnx.numpy_helper.from_array(values, bias.name))
        return proto

    monkeypatch.setattr(graph_module, "onnx_graph", wrong)
    before = tree(out.parent)
    with pytest.raises(
        ParityError,
        match=r"^not exported, 10 real .*: batch of 1: image 0 \(airplane\.jpg\), output \[7\] is .* by 0\.25, allowed",
    ):
        export(classifier, "onnx", out)
    assert tree(out.parent) == before


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("error", [FULL, KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("when", ["model", "labels", "card", "flush", "rename"])
def test_a_full_disk_or_an_interrupt_leaves_all_as_it_was(
    classifier: Net, out: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, when: str
) -> None:
    def fails(act: Callable[..., Any], name: str) -> Callable[..., Any]:
        def failing(path: Path, *args: Any, **kwargs: Any) -> Any:
            if path.name == name and str(path.parent) != str(out.parent):
                raise error
            return act(path, *args, **kwargs)

        return failing

    def fail(*_: object) -> None:
        raise error

    before = tree(out.parent)
    with monkeypatch.context() as patch:
        if when == "model":
            patch.setattr(Path, "write_bytes", fails(Path.write_bytes, "model.onnx"))
        elif when == "labels":
            patch.setattr(Path, "write_text", fails(Path.write_text, "labels.json"))
        elif when == "card":
            patch.setattr(Card, "write", fail)
        elif when == "flush":
            patch.setattr(os, "fsync", fail)
        else:
            patch.setattr(files, "_swap", lambda *_: False)  # there is no failing in the middle of it
            patch.setattr(Path, "rename", fails(Path.rename, "out"))
        with pytest.raises((OSError, KeyboardInterrupt), match=f"cannot write {out}: " if error is FULL else None):
            export(classifier, "onnx", out)
    assert tree(out.parent) == before


def test_folders_of_another_kind_are_refused(classifier: Net, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "cat.jpg").write_bytes(b"cat")
    with pytest.raises(InputError, match=r"photos is no exported folder: it has no card\.json; name another folder"):
        export(classifier, "onnx", photos)
    with pytest.raises(InputError, match=r"cat\.jpg is a file; name a folder"):
        export(classifier, "onnx", photos / "cat.jpg")
    with pytest.raises(InputError, match="nowhere is not a folder; create it first"):
        export(classifier, "onnx", tmp_path / "nowhere" / "out")
    assert tree(tmp_path) == {"photos/cat.jpg": b"cat"}


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("notes.txt", "years of work", r"out holds other things \(notes\.txt\); name another folder"),
        ("labels.json", "[]", r"labels\.json is damaged: .*; name another folder"),
        ("card.json", '{"pokemon": 1}', r"card\.json is damaged or of another version .*; name another folder"),
    ],
)
def test_what_somebody_put_into_an_exported_folder_is_kept(
    classifier: Net, tmp_path: Path, onnx_folder: Path, name: str, content: str, said: str
) -> None:
    out = shutil.copytree(onnx_folder, tmp_path / "out")
    (out / name).write_text(content)
    before = tree(out)
    with pytest.raises(InputError, match=said):
        export(classifier, "onnx", out)
    assert tree(out) == before


def test_an_empty_folder_is_taken(classifier: Net, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    export(classifier, "onnx", tmp_path / "out")
    assert read_card(tmp_path / "out").verified


# TensorRT, with doubles: of the module and of the GPU


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def has(gpu: Gpu | None, **versions: str) -> None:
        install(monkeypatch, **versions)
        pretend(monkeypatch, gpu)

    return has


def test_without_a_gpu_the_engine_is_unverified(classifier: Net, tmp_path: Path, machine: Callable[..., None]) -> None:
    machine(None, tensorrt_rtx="1.7.1.116")
    out, said = tmp_path / "my out", list[str]()
    card = export(classifier, "tensorrt", out, progress=said.append)
    assert sorted(os.listdir(out)) == ["README.md", "card.json", "labels.json", "model.onnx", "model.unverified.engine"]
    assert (card.file, card.parity, card.provider) == ("model.unverified.engine", "not run", "tensorrt-rtx 1.7.1.116")
    assert set(card.files) == {"labels.json", "model.onnx", "model.unverified.engine"}
    assert card.serve.startswith(f"sdzoo verify '{out}/model.onnx' '{out}/model.unverified.engine' --images DIR  ")
    assert card.rebuild == "sdzoo export CHECKPOINT --to tensorrt --precision fp32 --backend tensorrt-rtx -o DIR"
    assert "Compared with the model that was trained: not run." in (out / "README.md").read_text()
    assert card.engine is not None
    assert card.engine["onnx_parity"]["images"] == 80
    assert said[-1].startswith("the engine stays unverified: it runs on an NVIDIA GPU, and there is none here")
    assert card == read_card(out)


def test_on_a_gpu_the_engine_is_verified(classifier: Net, tmp_path: Path, machine: Callable[..., None]) -> None:
    machine(RTX_4090, tensorrt="11.4.0.106")
    out = tmp_path / "out"
    card = export(classifier, "tensorrt", out)
    assert sorted(os.listdir(out)) == ["README.md", "card.json", "labels.json", "model.engine", "model.onnx"]
    assert isinstance(card.parity, dict)
    assert (card.parity["images"], card.parity["runtime"]) == (80, f"tensorrt 11.4.0.106, {RTX_4090}")
    assert card.serve == f"sdzoo predict IMAGE --model {out}"
    assert card == read_card(out)
    equal(model_predictor(classifier)(FILES), load_predictor(out)(FILES))


def test_an_engine_that_normalises_itself(classifier: Net, tmp_path: Path, machine: Callable[..., None]) -> None:
    machine(RTX_4090, tensorrt="11.4.0.106")
    card = export(classifier, "tensorrt", tmp_path / "out", preprocess="in-graph")
    assert (card.file, card.input["dtype"], card.preprocessing["where"]) == ("model.engine", "uint8", "in-graph")
    predictor = load_predictor(tmp_path / "out")
    assert predictor.in_graph
    equal(model_predictor(classifier)(FILES), predictor(FILES))
    assert predictor(np.zeros((3, 32, 32, 3), np.uint8)).shape == (3, 10)


def test_an_engine_takes_what_a_gpu_can(classifier: Net, tmp_path: Path, machine: Callable[..., None]) -> None:
    machine(RTX_4090, tensorrt="11.4.0.106")
    out = tmp_path / "out"
    export(classifier, "tensorrt", out)
    with pytest.raises(InputError, match=r"threads are for the CPU; .*model\.engine is a TensorRT engine"):
        load_predictor(out, threads=1)
    with pytest.raises(InputError, match=r"provider is cpu; .*model\.engine is a TensorRT engine"):
        load_predictor(out, "cpu")
    grey = Image.new("L", (32, 32))
    with pytest.raises(InputError, match="the image is grey"):
        load_predictor(out)(grey)
    assert load_predictor(out, "tensorrt", convert=True)(grey).shape == (1, 10)


def test_an_engine_for_other_gpus_than_this_one_is_unverified(
    classifier: Net, tmp_path: Path, machine: Callable[..., None]
) -> None:
    """TensorRT for RTX has no target of compute capability 9.0."""
    machine(H100, tensorrt_rtx="1.7.1.116")
    assert export(classifier, "tensorrt", tmp_path / "out").file == "model.unverified.engine"


def test_an_engine_that_fails_leaves_nothing(
    classifier: Net, out: Path, machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(RTX_4090, tensorrt="11.4.0.106")
    load = tensorrt_engine.load_engine

    def off(*args: Any, **kwargs: Any) -> Callable[..., Any]:
        run = load(*args, **kwargs)
        return lambda batch: run(batch) + 0.5

    monkeypatch.setattr(tensorrt_engine, "load_engine", off)
    before = tree(out.parent)
    with pytest.raises(ParityError, match=r"batch of 1: image 0 .* differs by 0\.5"):
        export(classifier, "tensorrt", out)
    assert tree(out.parent) == before


def test_what_tensorrt_says_is_passed_on(
    classifier: Net, out: Path, machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sdzoo.deploy import tensorrt_builder

    def fail(*_: object, **__: object) -> None:
        raise InputError("tensorrt 11 cannot parse the ONNX file: In node 3")

    machine(None, tensorrt_rtx="1.7.1.116")
    monkeypatch.setattr(tensorrt_builder, "build_engine", fail)
    before = tree(out.parent)
    with pytest.raises(InputError, match="cannot parse the ONNX file: In node 3"):
        export(classifier, "tensorrt", out)
    assert tree(out.parent) == before


def test_without_any_tensorrt(classifier: Net, tmp_path: Path, machine: Callable[..., None]) -> None:
    machine(None)
    with pytest.raises(MissingExtra, match=r'pip install "sdzoo\[tensorrt\]" or pip install "sdzoo\[tensorrt-rtx\]"'):
        export(classifier, "tensorrt", tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_tensorrt_that_cannot_compile_here_is_refused_before_anything_slow(
    classifier: Net, tmp_path: Path, machine: Callable[..., None]
) -> None:
    machine(None, tensorrt="11.4.0.106")
    said: list[str] = []
    with pytest.raises(InputError, match="there is none here; tensorrt-rtx compiles without one"):
        export(classifier, "tensorrt", tmp_path / "out", progress=said.append)
    assert (os.listdir(tmp_path), said) == ([], [])


def test_int8_for_tensorrt_has_its_own_preset(
    classifier: Net,
    tmp_path: Path,
    machine: Callable[..., None],
    few: Path,
    calibration: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine(RTX_4090, tensorrt="11.4.0.106")
    options: dict[str, Any] = {"precision": "int8", "images": few, "calibration": calibration, "max_drop": 20.0}
    card = export(classifier, "tensorrt", tmp_path / "out", **options)
    assert card.engine is not None
    assert card.engine["onnx_parity"]["preset"] == "tensorrt"
    assert isinstance(card.parity, dict)
    assert card.parity["top1_percent_before"] == 100.0  # of the model, not of the ONNX file
    assert torch.cuda.is_available()  # as far as the double says
    assert card.rebuild.endswith(" --backend tensorrt --max-drop 20.0 -o DIR")

    def worse(*args: Any, **kwargs: Any) -> Callable[..., Any]:
        run = load(*args, **kwargs)
        return lambda batch: run(batch) + np.eye(1, 10, dtype=np.float32) * 100

    load = tensorrt_engine.load_engine
    monkeypatch.setattr(tensorrt_engine, "load_engine", worse)
    with pytest.raises(ParityError, match=r"top-1 100\.00 % before, 10\.00 % after .*at most -20 allowed"):
        export(classifier, "tensorrt", tmp_path / "worse", **options)
    assert os.listdir(tmp_path) == ["out"]


class Stop(BaseException):
    """Enough was seen."""


@pytest.mark.parametrize(
    ("target", "backend", "preset"),
    [
        ("onnx", None, "cpu"),
        ("triton", None, "cpu"),
        ("triton", "python", "cpu"),
        ("triton", "onnxruntime-tensorrt", "tensorrt"),
        ("tensorrt", None, "tensorrt"),
    ],
)
def test_int8_is_quantised_for_what_computes_it(
    classifier: Net,
    tmp_path: Path,
    machine: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    target: str,
    backend: str | None,
    preset: str,
) -> None:
    def build(model: nn.Module, settings: Settings, _: object) -> None:
        assert settings.preset == preset
        raise Stop

    machine(None, tensorrt_rtx="1.7.1.116")
    monkeypatch.setattr(export_module, "require", lambda *_: None)
    monkeypatch.setattr(export_module, "build_onnx", build)
    with pytest.raises(Stop):
        export(classifier, target, tmp_path / "out", precision="int8", images="i", calibration="c", backend=backend)


# Triton, whose own message is not needed here


@pytest.mark.parametrize(
    ("backend", "served_by"),
    [
        ("onnxruntime", "ONNX Runtime in Triton, by its CUDA provider where there is a GPU: not compared there"),
        ("onnxruntime-tensorrt", "ONNX Runtime in Triton, by its TensorRT provider on a GPU: not compared there"),
        ("python", None),
    ],
)
def test_what_triton_serves_by_is_said_where_it_was_not_compared(
    classifier: Net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str, served_by: str | None
) -> None:
    def write(folder: Path, name: str, content: bytes, *_: object, **__: object) -> None:
        (folder / name / "1").mkdir(parents=True)
        (folder / name / "1" / "model.onnx").write_bytes(content)

    monkeypatch.setattr(export_module, "require", lambda *_: None)
    monkeypatch.setattr(triton, "write_repository", write)
    out = tmp_path / "out"
    card = export(classifier, "triton", out, backend=backend)
    assert card == read_card(out)
    assert (card.backend, card.served_by) == (backend, served_by)
    assert card.rebuild.endswith(f" --backend {backend} -o DIR")
    text = (out / "README.md").read_text()
    assert ("not compared there" in text) == (served_by is not None)
    assert served_by is None or f", onnxruntime, CPUExecutionProvider.\nServed by {served_by}.\n" in text
    serve = f"python serve.py {out}    # serve.py is in the kit export/triton"
    assert card.serve == (serve if backend == "python" else f"tritonserver --model-repository={out}/model_repository")
