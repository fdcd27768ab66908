"""The command as a person meets it: what it prints, where, and what it exits with."""

from __future__ import annotations

import json
import os
import pickle
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import pytest
import safetensors
import timm
import torch
import yaml
from onnx_files import save_sealed
from PIL import Image

import sdzoo
from sdzoo import weights
from sdzoo.assets import pictures
from sdzoo.cli import main
from sdzoo.deploy import onnx_graph, runtime
from sdzoo.errors import InputError
from sdzoo.registry import models
from sdzoo.training.engine import Interrupted

BUNDLED = "sd_resnet20.cifar10_jpeg"
COMMANDS = ["list", "info", "train", "eval", "predict", "export", "bench", "demo"]
CAT, DOG = (str(pictures()[name]) for name in ("cat", "dog"))
COLOURS = {"blue": (40, 60, 190), "green": (50, 180, 70), "red": (200, 50, 40)}
RECIPE = {
    "model": "sd_resnet20",
    "num_classes": 3,
    "drop_path": 0.5,
    "epochs": 2,
    "batch_size": 6,
    "lr": 0.05,
    "sched_on_updates": True,
    "warmup_epochs": 0,
    "train_crop_mode": "pad4",
    "color_jitter": 0.0,
    "smoothing": 0.0,
    "interpolation": "bilinear",
    "crop_pct": 1.0,
    "val_split": "val",
    "workers": 0,
}
PREDICTION = re.compile(r"(\S+) (\d+\.\d\d) %")

Capture = pytest.CaptureFixture[str]


class Said(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str


def sdzoo_command(capsys: Capture, *argv: object) -> Said:
    """Run the command in this process."""
    capsys.readouterr()
    try:
        code = main([str(word) for word in argv])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    out, err = capsys.readouterr()
    return Said(code, str(out), str(err))


def done(capsys: Capture, *argv: object) -> str:
    said = sdzoo_command(capsys, *argv)
    assert said.code == 0, said.err
    assert said.err == ""
    return said.out


def refused(capsys: Capture, *argv: object, code: int = 2) -> str:
    """Return the error of a command that must fail with one line on stderr."""
    said = sdzoo_command(capsys, *argv)
    assert said.code == code
    assert re.fullmatch(r"sdzoo: [^\n]+\n", said.err)
    assert "Traceback" not in said.out + said.err
    return said.err


def process(*argv: object, cwd: Path | None = None, **environment: str) -> Said:
    """Run ``python -m sdzoo`` in a process of its own."""
    ended = subprocess.run(
        [sys.executable, "-m", "sdzoo", *map(str, argv)],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    return Said(ended.returncode, ended.stdout, ended.stderr)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of pictures in three colours that are easily told apart: 12 for training, 6 and 6 others."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 2), ("test", 2)):
        for name, colour in COLOURS.items():
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = np.clip(np.array(colour) + rng.integers(-40, 41, (32, 32, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{index}.png")
    return root


def write_recipe(path: Path, **changes: Any) -> Path:
    values = {name: value for name, value in {**RECIPE, **changes}.items() if value != "left out"}
    path.write_text(yaml.safe_dump(values))
    return path


class Run(NamedTuple):
    """A finished run of ``sdzoo train``."""

    recipe: Path
    folder: Path
    best: Path
    last: Path
    out: str


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("trained")
    recipe = write_recipe(folder / "colours.yaml")
    with pytest.MonkeyPatch.context() as patch:
        printed: list[str] = []
        patch.setattr("builtins.print", lambda *words, **_: printed.append(" ".join(map(str, words))))
        assert main(["train", str(recipe), "--data-dir", str(data), "-o", str(folder / "run")]) == 0
    run = folder / "run"
    return Run(recipe, run, run / "best.safetensors", run / "last.pth", "\n".join(printed))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the bundled model as an ONNX file."""
    path = tmp_path_factory.mktemp("exported") / "model.onnx"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", lambda *_, **__: None)
        assert main(["export", BUNDLED, "-o", str(path)]) == 0
    return path


# Help, version, usage


def test_help_names_every_command(capsys: Capture) -> None:
    out = done(capsys, "--help")
    for name in COMMANDS:
        assert re.search(rf"^ +{name} ", out, re.MULTILINE)


def example_of(capsys: Capture, name: str) -> list[str]:
    out = done(capsys, name, "--help")
    match = re.search(r"^example:\n +(sdzoo .+)$", out, re.MULTILINE)
    assert match, out
    words = shlex.split(match[1])
    assert words[:2] == ["sdzoo", name]
    return words[1:]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_every_command_shows_an_example(capsys: Capture, name: str) -> None:
    example_of(capsys, name)


@pytest.mark.parametrize("name", ["info", "train", "eval", "predict", "export"])
def test_examples_are_understood(capsys: Capture, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They work, or lack nothing but the files they name."""
    monkeypatch.chdir(tmp_path)
    said = sdzoo_command(capsys, *example_of(capsys, name))
    if name in ("info", "export"):
        assert (said.code, said.err) == (0, "")
    else:
        assert re.search("does not exist|is not a folder", said.err)


def test_version(capsys: Capture) -> None:
    assert done(capsys, "--version") == f"sdzoo {sdzoo.__version__}\n"


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "COMMAND"),
        (["predit"], "predit"),
        (["info"], "model"),
        (["predict"], "image"),
        (["eval", BUNDLED], "--data-dir"),
        (["train"], "recipe"),
        (["train", "x.yaml", "--checkpoint-interval-s", "soon"], "soon is not a number of seconds"),
        (["recipe"], "list | show | copy"),
        (["plot"], "RUN"),
        (["export", BUNDLED], "-o/--output"),
        (["verify", BUNDLED], "b"),
        (["verify", BUNDLED, BUNDLED, "--max-drop", "little"], "--max-drop"),
        (["bench", BUNDLED, "--samples", "0"], "--samples: 0 is not a number of at least 1"),
        (["bench", BUNDLED, "--batch", "1,-2"], "--batch: -2 is not a number of at least 1"),
        (["bench", BUNDLED, "--threads", "many"], "--threads"),
        (["predict", CAT, "--top", "0"], "--top"),
        (["predict", CAT, "--top", "-1"], "--top"),
        (["predict", CAT, "--topp", "1"], "--topp"),
    ],
    ids=lambda value: " ".join(value) or "nothing" if isinstance(value, list) else "",
)
def test_wrong_usage(capsys: Capture, argv: list[str], says: str) -> None:
    message = refused(capsys, *argv)
    assert says in message
    assert message.endswith("--help)\n")


# list, info


def table(out: str) -> dict[str, list[str]]:
    """Return the rows of ``sdzoo list`` by model."""
    rows = out.partition("\n\n")[0].splitlines()[1:]
    return {row.split()[0]: row.split() for row in rows}


def test_list_has_a_row_for_every_model(capsys: Capture) -> None:
    assert list(table(done(capsys, "list"))) == models()


def test_list_says_what_models_cost(capsys: Capture) -> None:
    out = done(capsys, "list", "sd_resnet110", "sd_resnet?0")
    rows = table(out)
    expected = ["sd_resnet110", "32", "1,727,962", "253", "M", "189", "M", "110", "54", "40.25", "-"]
    assert rows["sd_resnet110"] == expected
    assert rows["sd_resnet20"][-1] == "cifar10_jpeg"
    assert "live" in out.splitlines()[0]
    assert "next: sdzoo info sd_resnet" in out


def test_list_shows_those_that_match(capsys: Capture) -> None:
    assert list(table(done(capsys, "list", "*resnet3*", "*110*"))) == models(["*resnet3*", "*110*"])


@pytest.mark.parametrize("patterns", [[], ["sd_resnet2*"], [BUNDLED]])
def test_list_shows_the_weights_that_ship(capsys: Capture, patterns: list[str]) -> None:
    rows = table(done(capsys, "list", "--pretrained", *patterns))
    assert list(rows) == models(patterns, pretrained=True)
    assert rows[BUNDLED][2] == "269,722"
    assert rows[BUNDLED][-3:] == ["ship", "with", "sdzoo"]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["sd_resent110*"], '"sd_resent110*" matches no model; nearest: sd_resnet110'),
        (["sd_resnet20", "nothing"], '"nothing" matches no model'),
        (
            ["--pretrained", "sd_resnet32"],
            '"sd_resnet32" matches no model with weights; sdzoo list --pretrained shows those',
        ),
    ],
)
def test_list_of_nothing_is_refused_before_any_row(capsys: Capture, argv: list[str], says: str) -> None:
    said = sdzoo_command(capsys, "list", *argv)
    assert (said.code, said.out) == (2, "")
    assert said.err.startswith(f"sdzoo: {says}")


def test_info(capsys: Capture) -> None:
    out = done(capsys, "info", "sd_resnet110")
    for words in (
        "3 x 32 x 32",
        "1,727,962",
        "252,887,680 for one image",
        "188,618,709 on average (74.6%): a dropped branch costs nothing",
        "110",
        "54, of which 40.25",
        "p_1 = 0.990741 to p_L = 0.500000, mean 0.745370",
        "none ship",
    ):
        assert words in out


def test_info_draws_the_survival_probabilities(capsys: Capture) -> None:
    lines = done(capsys, "info", "sd_resnet110").splitlines()
    top = next(index for index, line in enumerate(lines) if line.startswith("1.0 "))
    assert lines[top][5] == "█"
    assert lines[top + 2] == "0.5 ┤" + 54 * "█"  # p_L = 0.5
    assert re.fullmatch(r" +1 +block +54", lines[top + 5])
    assert max(map(len, lines[top : top + 6])) <= 60


@pytest.mark.parametrize(("encoding", "line"), [("ascii", "0.5 |" + 54 * "#"), ("utf-8", "0.5 ┤" + 54 * "█")])
def test_info_draws_with_what_the_terminal_has(encoding: str, line: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "sdzoo", "info", "sd_resnet56"],
        env={**os.environ, "PYTHONIOENCODING": encoding},
        capture_output=True,
        check=True,
        timeout=120,
    )
    assert line in ended.stdout.decode(encoding).splitlines()


@pytest.mark.parametrize("name", ["sd_resnet20", BUNDLED])
def test_info_of_a_model_with_weights_shows_their_card(capsys: Capture, name: str) -> None:
    out, card = done(capsys, "info", name), weights.card(BUNDLED)
    assert f"{card['test_top1_percent']:.2f} %" in out
    assert card["data"] in out
    assert out.count("1.0 ┤") == 2  # of the model, and of the weights
    assert str(weights.path(BUNDLED)) in out
    assert f"next: sdzoo predict IMAGE --model {BUNDLED}" in out


@pytest.mark.parametrize("command", ["info", "bench", "export", "eval", "predict"])
@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("sd_resnet111", '"sd_resnet111" is not a model; nearest: sd_resnet110'),
        ("sd_resnet20.cifar10", 'sd_resnet20 has no weights "cifar10"; it has: cifar10_jpeg'),
    ],
)
def test_unknown_model_or_tag(capsys: Capture, command: str, name: str, says: str, tmp_path: Path, data: Path) -> None:
    argv = {
        "info": ["info", name],
        "bench": ["bench", name],
        "export": ["export", name, "-o", str(tmp_path / "x.onnx")],
        "eval": ["eval", name, "--data-dir", str(data)],
        "predict": ["predict", CAT, "--model", name],
    }[command]
    assert says in refused(capsys, *argv)
    assert os.listdir(tmp_path) == []


# predict


def predictions(out: str) -> dict[str, list[tuple[str, float]]]:
    """Return the labels and percentages in the table of ``sdzoo predict``, by picture."""
    lines = out.splitlines()[1:]
    return {line.split()[0]: [(label, float(value)) for label, value in PREDICTION.findall(line)] for line in lines}


def test_predict(capsys: Capture) -> None:
    out = done(capsys, "predict", CAT, DOG)
    assert out.splitlines()[0] == "sd_resnet20, PyTorch cpu"
    table = predictions(out)
    assert list(table) == [CAT, DOG]
    for best in table.values():
        assert len(best) == 3
        percentages = [value for _, value in best]
        assert percentages == sorted(percentages, reverse=True)
        assert 0 < sum(percentages) <= 100.02
        assert {label for label, _ in best} <= set(pictures())


def test_predict_with_all_classes_sums_to_one(capsys: Capture) -> None:
    best = predictions(done(capsys, "predict", CAT, "--top", 10))[CAT]
    assert {label for label, _ in best} == set(pictures())
    assert sum(value for _, value in best) == pytest.approx(100, abs=0.1)


def test_predict_takes_onnx_files_alike(capsys: Capture, exported: Path) -> None:
    out = done(capsys, "predict", CAT, DOG, "--model", exported)
    assert out.splitlines()[0] == "sd_resnet20, CPUExecutionProvider"
    ours = predictions(done(capsys, "predict", CAT, DOG, "--model", BUNDLED))
    for picture, best in predictions(out).items():
        assert [label for label, _ in best] == [label for label, _ in ours[picture]]
        assert [value for _, value in best] == pytest.approx([value for _, value in ours[picture]], abs=0.02)


@pytest.fixture(scope="module")
def odd_pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    with Image.open(CAT) as image:
        image.convert("L").save(folder / "grey.png")
        image.convert("RGBA").save(folder / "rgba.png")
        image.resize((1, 1)).save(folder / "tiny.png")
    content = Path(CAT).read_bytes()
    (folder / "truncated.jpg").write_bytes(content[: len(content) // 2])
    (folder / "text.jpg").write_text("no picture")
    (folder / "empty.jpg").touch()
    return folder


@pytest.mark.parametrize("kind", ["torch", "onnx"])
@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("missing.jpg", "does not exist"),
        ("text.jpg", "is not an image"),
        ("empty.jpg", "is not an image"),
        ("truncated.jpg", "cannot be decoded"),
        ("grey.png", r"is .*\bL\b.*; the model takes RGB"),
        ("rgba.png", r"is .*\bRGBA\b.*; the model takes RGB"),
        ("tiny.png", "is 1x1 pixels"),
        (".", "is a folder"),
    ],
)
def test_predict_refuses_pictures_before_it_answers(
    capsys: Capture, exported: Path, odd_pictures: Path, kind: str, name: str, says: str
) -> None:
    said = sdzoo_command(
        capsys, "predict", CAT, odd_pictures / name, "--model", exported if kind == "onnx" else BUNDLED
    )
    assert said.code == 2
    assert said.out == ""
    assert re.fullmatch(rf"sdzoo: {re.escape(str(odd_pictures / name))} .*{says}.*\n", said.err)


def test_predict_converts_where_it_is_asked_to(capsys: Capture, odd_pictures: Path) -> None:
    table = predictions(done(capsys, "predict", CAT, odd_pictures / "rgba.png", odd_pictures / "grey.png", "--convert"))
    assert table[str(odd_pictures / "rgba.png")] == table[CAT]
    assert len(table) == 3
    assert "1x1" in refused(capsys, "predict", odd_pictures / "tiny.png", "--convert")


@pytest.mark.parametrize(
    ("provider", "says"),
    [("cdua", "nearest: cuda"), ("tensorrt", "TensorrtExecutionProvider is not in the installed onnxruntime")],
)
def test_predict_never_takes_another_provider(capsys: Capture, exported: Path, provider: str, says: str) -> None:
    assert says in refused(capsys, "predict", CAT, "--model", exported, "--provider", provider)


@pytest.mark.parametrize(
    ("provider", "says"),
    [
        pytest.param("tensorrt", '--provider "tensorrt" is for exported files', id="none of PyTorch's"),
        pytest.param(
            "cuda",
            "finds no GPU here",
            id="not here",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="GPU"),
        ),
    ],
)
@pytest.mark.parametrize(
    "command", [("predict", CAT), ("eval", BUNDLED, "--data-dir", "."), ("bench", BUNDLED)], ids=lambda words: words[0]
)
def test_a_provider_that_the_model_cannot_have(
    capsys: Capture, command: tuple[object, ...], provider: str, says: str
) -> None:
    assert says in refused(capsys, *command, "--provider", provider)


@pytest.mark.parametrize("kind", ["PyTorch", "exported", "data"])
def test_threads_are_those_asked_for(
    capsys: Capture, exported: Path, data: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    asked: list[Any] = []
    load = runtime.load_predictor
    monkeypatch.setattr(torch, "set_num_threads", lambda number: asked.append(number))
    monkeypatch.setattr(runtime, "load_predictor", lambda *given: asked.append(given[2]) or load(*given))
    model = BUNDLED if kind == "PyTorch" else exported
    argv = ["eval", model, "--data-dir", data] if kind == "data" else ["predict", CAT, "--model", model]
    sdzoo_command(capsys, *argv, "--threads", 1)
    assert asked[0] == 1
    for number, says in ((100_000, "threads is 100000; on this machine 1 to"), (0, "0 is not a number of at least 1")):
        assert says in refused(capsys, *argv, "--threads", number)


@pytest.mark.parametrize("command", ["predict", "eval"])
@pytest.mark.parametrize("kind", ["missing", "empty", "truncated", "text", "of another model"])
def test_onnx_files_that_are_none(
    capsys: Capture, exported: Path, tmp_path: Path, data: Path, command: str, kind: str
) -> None:
    path, content = tmp_path / "x.onnx", exported.read_bytes()
    if kind == "of another model":
        proto = onnx.load(exported)
        (mean,) = (entry for entry in proto.metadata_props if entry.key == "mean")
        proto.metadata_props.remove(mean)
        onnx.save(proto, path)
    elif kind != "missing":
        path.write_bytes({"empty": b"", "truncated": content[: len(content) // 2], "text": b"hello"}[kind])
    argv = ["predict", CAT, "--model", path] if command == "predict" else ["eval", path, "--data-dir", data]
    message = refused(capsys, *argv)
    assert str(path) in message
    assert ("of another version of sdzoo: its metadata lack" in message) == (kind == "of another model")


def test_an_onnx_file_that_is_not_sdzoos_takes_no_pictures(
    capsys: Capture, exported: Path, tmp_path: Path, data: Path
) -> None:
    proto = onnx.load(exported)
    proto.producer_name = "another"
    del proto.metadata_props[:]
    onnx.save(proto, tmp_path / "x.onnx")
    for argv in (["predict", CAT, "--model", tmp_path / "x.onnx"], ["eval", tmp_path / "x.onnx", "--data-dir", data]):
        said = sdzoo_command(capsys, *argv)
        warning, error = said.err.splitlines()
        assert warning.startswith("warning: ") and "no metadata of sdzoo's" in warning
        assert error.startswith("sdzoo: ") and "does not say how pictures are resized and normalised" in error
        assert said.code == 2


def test_an_onnx_file_whose_metadata_are_of_another_model(capsys: Capture, exported: Path, tmp_path: Path) -> None:
    proto = onnx.load(exported)
    for entry in proto.metadata_props:
        if entry.key == "input_size":
            entry.value = "[3, 64, 64]"
    save_sealed(proto, tmp_path / "x.onnx")
    message = refused(capsys, "predict", CAT, "--model", tmp_path / "x.onnx")
    assert "[3, 64, 64]" in message
    assert "32, 32]" in message


# Checkpoints


class Code:
    """What leaves a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("kind", ["torch.save", "pickle", "pickle called safetensors", "pickle called onnx"])
def test_code_in_a_pickle_does_not_run(capsys: Capture, tmp_path: Path, kind: str) -> None:
    ran = tmp_path / "ran"
    path = tmp_path / {"pickle called safetensors": "x.safetensors", "pickle called onnx": "x.onnx"}.get(kind, "x.pth")
    if kind == "torch.save":
        torch.save({"state_dict": {"fc.weight": Code(ran)}}, path)
    else:
        path.write_bytes(pickle.dumps({"state_dict": Code(ran)}))
    message = refused(capsys, "predict", CAT, "--model", path, "--arch", "sd_resnet20")
    assert str(path) in message
    assert not ran.exists()
    pickle.loads(pickle.dumps(Code(ran)))
    assert ran.exists(), "the pickle would have done nothing anyway"


def test_a_pickle_prints_nothing_but_the_error(tmp_path: Path) -> None:
    """In a process of its own: here warnings are errors, there they are lines on stderr."""
    (tmp_path / "x.pth").write_bytes(pickle.dumps({"state_dict": Code(tmp_path / "ran")}))
    said = process("predict", CAT, "--model", tmp_path / "x.pth", "--arch", "sd_resnet20")
    assert said.code == 2
    assert re.fullmatch(r"sdzoo: .*x\.pth is damaged or holds more than tensors and plain values.*\n", said.err)


@pytest.mark.parametrize("name", ["best.safetensors", "last.pth"])
@pytest.mark.parametrize("kept", [0, 20, 0.5, -1])
def test_truncated_checkpoint(capsys: Capture, trained: Run, tmp_path: Path, name: str, kept: float) -> None:
    content = (trained.folder / name).read_bytes()
    path = tmp_path / name
    path.write_bytes(content[: int(len(content) * kept) if isinstance(kept, float) else kept])
    assert str(path) in refused(capsys, "predict", CAT, "--model", path)


@pytest.mark.parametrize("name", ["best.safetensors", "last.pth"])
def test_checkpoint_with_a_flipped_byte(capsys: Capture, trained: Run, tmp_path: Path, name: str) -> None:
    content = bytearray((trained.folder / name).read_bytes())
    content[len(content) // 2] ^= 0x40
    (tmp_path / name).write_bytes(content)
    assert str(tmp_path / name) in refused(capsys, "predict", CAT, "--model", tmp_path / name)


def test_bundled_checkpoint_with_a_flipped_byte(tmp_path: Path) -> None:
    """In a copy of the package, run as it is."""
    package = Path(sdzoo.__file__).parent
    shutil.copytree(package, tmp_path / "sdzoo", ignore=shutil.ignore_patterns("__pycache__"))
    file = tmp_path / "sdzoo" / "weights" / f"{BUNDLED}.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    said = process("predict", CAT, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert (said.code, said.out) == (2, "")
    assert re.fullmatch(rf"sdzoo: {re.escape(str(file))} is damaged: sha256 \w{{64}}, .*\n", said.err)


def test_checkpoint_of_other_shapes_lists_the_keys(capsys: Capture, tmp_path: Path) -> None:
    state = timm.create_model("sd_resnet20").state_dict()
    del state["fc.bias"]
    state["head.bias"] = torch.zeros(10)
    state["conv1.weight"] = torch.zeros(16, 1, 3, 3)
    torch.save(state, tmp_path / "x.pth")
    message = refused(capsys, "predict", CAT, "--model", tmp_path / "x.pth", "--arch", "sd_resnet20")
    assert "missing: fc.bias;" in message
    assert "unexpected: head.bias;" in message
    assert "of another shape: conv1.weight (16, 1, 3, 3) for (16, 3, 3, 3)" in message


def test_checkpoint_that_does_not_say_its_model(capsys: Capture, tmp_path: Path) -> None:
    torch.save(timm.create_model("sd_resnet20").state_dict(), tmp_path / "x.pth")
    assert "name it with --arch" in refused(capsys, "predict", CAT, "--model", tmp_path / "x.pth")
    done(capsys, "predict", CAT, "--model", tmp_path / "x.pth", "--arch", "sd_resnet20")
    message = refused(capsys, "predict", CAT, "--model", tmp_path / "x.pth", "--arch", "sd_resnet2O")
    assert '"sd_resnet2O" is not a model; nearest: ' in message


# export


def test_export_says_what_it_verified_and_the_next_command(capsys: Capture, tmp_path: Path) -> None:
    out = done(capsys, "export", "sd_resnet20", "-o", tmp_path / "model.onnx")
    assert re.search(
        r"^verified: \|difference\| \S+ of \S+ allowed in the batch .*, top-1 equal on 80 of 80 images", out, re.M
    )
    following = re.search(r"^next: sdzoo (predict IMAGE --model .*)$", out, re.M)
    assert following
    done(capsys, *(CAT if word == "IMAGE" else word for word in shlex.split(following[1])))
    assert os.listdir(tmp_path) == ["model.onnx"]


def test_export_into_a_folder_and_verify(capsys: Capture, tmp_path: Path, data: Path) -> None:
    folder = tmp_path / "exported"
    out = done(capsys, "export", "sd_resnet20", "--preprocess", "in-graph", "-o", folder)
    assert re.search(r"model\.onnx, parity: \|difference\| \S+ of \S+ allowed in .*, on 80 images", out)
    assert sorted(os.listdir(folder)) == ["README.md", "card.json", "labels.json", "model.onnx"]
    following = re.search(r"^next: sdzoo (predict IMAGE --model .*)$", out, re.M)
    assert following
    assert "cat 99." in done(capsys, *(CAT if word == "IMAGE" else word for word in shlex.split(following[1])))
    for a, b in ((BUNDLED, folder), (f"folded:{BUNDLED}", folder / "model.onnx"), (folder, BUNDLED)):
        assert "passed: |difference|" in done(capsys, "verify", a, b)
    (folder / "model.onnx").write_bytes(b"damaged")
    assert "is damaged: its sha256" in refused(capsys, "predict", CAT, "--model", folder)


def test_a_model_is_not_another_one(capsys: Capture, exported: Path) -> None:
    other = onnx.load(exported)
    (bias,) = (tensor for tensor in other.graph.initializer if tensor.name == "fc.bias")
    bias.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) + np.float32(0.5), bias.name))
    path = save_sealed(other, exported.with_name("other.onnx"))
    message = refused(capsys, "verify", exported, path, code=1)
    path.unlink()
    assert re.search(
        r"image 0 \(airplane.jpg\), output \[\d\] is \S+, the reference's \S+: differs by 0.5, allowed", message
    )


def test_a_strangers_file_is_warned_of_on_one_line(capsys: Capture, exported: Path, tmp_path: Path) -> None:
    foreign = onnx.load(exported)
    del foreign.metadata_props[:]
    foreign.producer_name = "other"
    onnx.save(foreign, str(tmp_path / "x.onnx"))
    said = sdzoo_command(capsys, "verify", BUNDLED, tmp_path / "x.onnx")
    assert (said.code, "passed: |difference|" in said.out) == (0, True)
    assert re.fullmatch(r"warning: .*x\.onnx has no metadata of sdzoo's: [^\n]+\n", said.err)


@pytest.mark.parametrize("max_drop", ["nan", "-5", "1e9"])
def test_a_max_drop_that_is_none(capsys: Capture, exported: Path, max_drop: str) -> None:
    said = refused(capsys, "verify", BUNDLED, exported, f"--max-drop={max_drop}")
    assert "it is in points of top-1, 0 to 100" in said


def test_targets_and_precisions_that_are_not(capsys: Capture, tmp_path: Path) -> None:
    for argv, says in (
        (["--to", "tensorflow"], "possible: onnx with onnxruntime; tensorrt with"),
        (["--precision", "fp8"], "known: fp32, fp16, int8"),
        (["--precision", "fp16"], "fp16 is compared on at least 1000 real images"),
        (["--precision", "int8"], "int8 needs pictures in class folders to be judged on"),
        (["--backend", "python"], 'onnx with "python" is not possible'),
    ):
        assert says in refused(capsys, "export", BUNDLED, *argv, "-o", tmp_path / "x")
    for argv, says in (
        (["--to", "triton"], "--to triton makes a folder; "),
        (["--backend", "onnxruntime"], "--backend needs a folder; "),
    ):
        assert says in refused(capsys, "export", BUNDLED, *argv, "-o", tmp_path / "x.onnx")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("model", "output", "says"),
    [
        ("sd_resnet32", "x.onnx", "sd_resnet32 has no weights: give a checkpoint"),
        (BUNDLED, "missing/x.onnx", "missing is not a folder; create it first"),
        (BUNDLED, "folder.onnx", "is a folder; name a file"),
        ("missing.pth", "x.onnx", "missing.pth does not exist"),
    ],
)
def test_export_refuses(capsys: Capture, tmp_path: Path, model: str, output: str, says: str) -> None:
    (tmp_path / "folder.onnx").mkdir()
    assert says in refused(capsys, "export", model, "-o", tmp_path / output)
    assert os.listdir(tmp_path) == ["folder.onnx"]


def test_export_of_an_onnx_file_says_that_it_is_one(capsys: Capture, exported: Path, tmp_path: Path) -> None:
    message = refused(capsys, "export", exported, "-o", tmp_path / "x.onnx")
    assert "ONNX" in message.replace(str(exported), "")


def test_a_folder_is_no_model(capsys: Capture, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even one that is called like weights that there are not; nor is a model a folder that is called so."""
    monkeypatch.chdir(tmp_path)
    for name in ("plain", "folder", "sd_resnet20.folder", "sd_resnet32", "deep/folder"):
        Path(name).mkdir(parents=True)
        if name != "plain":
            Path(name, "card.json").touch()
    for argv in (["export", "-o", "x.onnx"], ["bench"]):
        for name in ("folder", "sd_resnet20.folder", "deep/folder", tmp_path / "folder"):
            says = f"{name} is an exported folder; name the model or the checkpoint that it came from"
            assert says in refused(capsys, argv[0], name, *argv[1:])
        assert "plain is a folder; name a model or a checkpoint" in refused(capsys, argv[0], "plain", *argv[1:])
    assert "sd_resnet32 has no weights" in refused(capsys, "export", "sd_resnet32", "-o", "x.onnx")


def test_what_is_neither_a_model_nor_there(capsys: Capture, exported: Path, tmp_path: Path) -> None:
    for argv in (["verify", exported, "nothing"], ["export", "nothing", "-o", tmp_path / "x"], ["bench", "nothing"]):
        assert 'there is no file or folder "nothing", and "nothing" is not a model' in refused(capsys, *argv)


def test_export_that_fails_its_verification_exits_with_1(
    capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = onnx_graph.onnx_graph

    def wrong(*args: Any) -> onnx.ModelProto:
        proto = build(*args)
        [node for node in proto.graph.node if node.op_type == "Relu"][-1].op_type = "Identity"
        return proto

    monkeypatch.setattr(onnx_graph, "onnx_graph", wrong)
    message = refused(capsys, "export", BUNDLED, "-o", tmp_path / "x.onnx", code=1)
    assert re.search(
        r"not exported, 10 real pictures, 8 ways each: batch of 1: image 0 \(airplane.jpg\).* differs by \S+, allowed ",
        message,
    )
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("command", "name"), [("export", "x.onnx"), ("demo", "demo")])
def test_a_full_disk(capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, name: str) -> None:
    def write(path: Path, _: bytes) -> int:
        path.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", write)
    argv = ["export", BUNDLED, "-o", tmp_path / name] if command == "export" else ["demo", "-o", tmp_path / name]
    message = refused(capsys, *argv, code=1)
    assert "No space left on device" in message
    assert str(tmp_path / name) in message, "which disk is full"
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_missing_extra(capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: None)
    assert 'pip install "sdzoo[onnx]"' in refused(capsys, "export", BUNDLED, "-o", tmp_path / "x.onnx")


# bench, demo


FEW = ("--samples", 2, "--threads", "1", "--batch", "1,3", "--provider", "cpu")


def test_bench_prints_one_table_and_writes_it(capsys: Capture, tmp_path: Path) -> None:
    argv = ["bench", BUNDLED, "--targets", "folded,onnx", *FEW, "-o", tmp_path / "now"]
    lines = done(capsys, *argv).splitlines()
    assert "median ms" in lines[2] and "peak MiB" in lines[2]
    assert [line.split()[:3] for line in lines[3:7]] == [
        ["folded", "1", "1"],
        ["onnx", "1", "1"],
        ["folded", "1", "3"],
        ["onnx", "1", "3"],
    ]
    assert lines[4].endswith("CPUExecutionProvider")
    assert sorted(os.listdir(tmp_path)) == ["now.csv", "now.png", "now.svg"]
    out = done(capsys, "bench", "--compare", tmp_path / "now.csv", tmp_path / "now.csv")
    assert len(re.findall("1.00", out)) >= 4


@pytest.mark.parametrize(
    ("argv", "gpu", "device"), [((), False, "cpu"), ((), True, "cuda"), (("--provider", "cpu"), True, "cpu")]
)
def test_bench_takes_a_gpu_where_there_is_one(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, argv: tuple[str, ...], gpu: bool, device: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.nn.Module, "to", lambda _, where: where)
    timed: list[str] = []

    def benchmark(where: str, *_: Any, **__: Any) -> None:
        timed.append(where)
        raise InputError("enough")

    monkeypatch.setattr("sdzoo.deploy.benchmark.benchmark", benchmark)
    refused(capsys, "bench", BUNDLED, *argv)
    assert timed == [device]


def test_bench_of_a_model_without_weights_says_so(capsys: Capture) -> None:
    out = done(capsys, "bench", "sd_resnet32", "--targets", "onnx", *FEW)
    assert "no weights of sd_resnet32 ship with sdzoo: timing it untrained" in out


def test_bench_says_what_it_leaves_out(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    def make(*_: Any) -> None:
        raise InputError("enough")

    monkeypatch.setattr("sdzoo.deploy.benchmark.make", make)
    assert main(["bench", BUNDLED, "--provider", "cpu"]) == 2
    assert "left out: onnx-int8 needs at least 256 pictures to calibrate on" in capsys.readouterr().out


def test_a_name_longer_than_any_files(capsys: Capture) -> None:
    for command in (["bench"], ["predict", CAT, "--model"], ["export", "-o", "x.onnx"]):
        assert "x: File name too long" in refused(capsys, *command, "x" * 300)


def test_bench_of_nothing_or_of_what_cannot_be(capsys: Capture) -> None:
    assert "name a model to time" in refused(capsys, "bench")
    assert "possible here: eager, folded" in refused(capsys, "bench", BUNDLED, "--targets", "coreml")
    assert "at least 256 pictures" in refused(capsys, "bench", BUNDLED, "--targets", "onnx-int8")
    assert "at least 2" in refused(capsys, "bench", BUNDLED, "--samples", 1)


def test_demo_says_what_it_wrote_and_the_next_command(
    capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Path] = []
    monkeypatch.setattr("sdzoo.demo.demo", lambda output, *_: written.append(output))
    out = done(capsys, "demo", "-o", tmp_path / "here")
    assert written == [tmp_path / "here"]
    assert f"wrote {tmp_path / 'here' / 'model.onnx'} and {tmp_path / 'here' / 'report.png'}\n" in out
    assert f"next: sdzoo predict IMAGE --model {tmp_path / 'here' / 'model.onnx'}" in out


def test_demo_into_a_file(capsys: Capture, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "cannot create" in refused(capsys, "demo", "-o", tmp_path / "file")


# train, and what becomes of its checkpoints


def test_train_writes_its_folder_and_says_the_next_command(trained: Run, data: Path) -> None:
    assert sorted(os.listdir(trained.folder)) == [
        ".lock",
        "best.safetensors",
        "last.pth",
        "log.csv",
        "recipe.yaml",
        "result.json",
        "steps.csv",
    ]
    assert f"next: sdzoo export {trained.best} -o model.onnx" in trained.out
    assert "epoch 2/2" in trained.out


def eval_line(capsys: Capture, model: Path, data: Path) -> str:
    lines = done(capsys, "eval", model, "--data-dir", data, "--split", "test").splitlines()
    assert re.fullmatch(r"top-1 \d+\.\d\d %, top-5 100\.00 %, loss \d+\.\d{4} on 6 images", lines[1])
    return lines[1]


def test_eval_of_every_kind_of_file_a_run_leads_to(capsys: Capture, trained: Run, data: Path, tmp_path: Path) -> None:
    done(capsys, "export", trained.best, "-o", tmp_path / "best.onnx")
    done(capsys, "export", trained.last, "-o", tmp_path / "last.onnx")
    figures = r"top-1 (\S+) %, top-5 .* loss (\S+) on"
    for checkpoint, file in ((trained.best, "best.onnx"), (trained.last, "last.onnx")):
        ours = re.match(figures, eval_line(capsys, checkpoint, data))
        theirs = re.match(figures, eval_line(capsys, tmp_path / file, data))
        assert ours
        assert theirs
        assert ours[1] == theirs[1]
        assert float(ours[2]) == pytest.approx(float(theirs[2]), rel=1e-3)


def test_eval_counts_right(capsys: Capture, trained: Run, data: Path, tmp_path: Path) -> None:
    """Against predictions one by one."""
    right = 0
    for file in sorted((data / "test").rglob("*.png")):
        right += (
            predictions(done(capsys, "predict", file, "--model", trained.best))[str(file)][0][0] == file.parent.name
        )
    assert f"top-1 {100 * right / 6:.2f} %" in eval_line(capsys, trained.best, data)


@pytest.mark.parametrize("name", ["best.safetensors", "last.pth"])
def test_predict_with_a_checkpoint_knows_its_classes(capsys: Capture, trained: Run, data: Path, name: str) -> None:
    file = data / "test" / "red" / "0.png"
    best = predictions(done(capsys, "predict", file, "--model", trained.folder / name))[str(file)]
    assert {label for label, _ in best} == set(COLOURS)


def test_export_of_a_checkpoint_keeps_its_classes(capsys: Capture, trained: Run, data: Path, tmp_path: Path) -> None:
    done(capsys, "export", trained.last, "-o", tmp_path / "x.onnx")
    metadata = {entry.key: json.loads(entry.value) for entry in onnx.load(tmp_path / "x.onnx").metadata_props}
    assert metadata["labels"] == list(COLOURS)
    assert (metadata["model"], metadata["tag"]) == ("sd_resnet20", None)
    with safetensors.safe_open(trained.best, "pt") as file:
        assert json.loads(file.metadata()["sdzoo"])["labels"] == list(COLOURS)


def test_a_finished_run_is_not_overwritten_but_resumes_to_the_same(capsys: Capture, trained: Run, data: Path) -> None:
    before = {file.name: file.read_bytes() for file in trained.folder.iterdir()}
    argv = ["train", trained.recipe, "--data-dir", data, "-o", trained.folder]
    assert "already holds a run; resume it" in refused(capsys, *argv)
    done(capsys, *argv, "--resume")
    assert before == {file.name: file.read_bytes() for file in trained.folder.iterdir()}


def test_eval_on_data_of_other_classes(capsys: Capture, trained: Run, data: Path) -> None:
    message = refused(capsys, "eval", BUNDLED, "--data-dir", data)
    assert "are not the model's: blue, green, red; airplane" in message


@pytest.mark.parametrize("kind", ["missing", "empty split", "no split", "a file"])
@pytest.mark.parametrize("command", ["train", "eval"])
def test_data_folder_that_is_none(capsys: Capture, trained: Run, tmp_path: Path, command: str, kind: str) -> None:
    folder = tmp_path / "data"
    if kind == "a file":
        folder.touch()
    elif kind != "missing":
        (folder / (command.replace("eval", "test") if kind == "empty split" else "other")).mkdir(parents=True)
    output = tmp_path / "run"
    argv = {"train": ["train", trained.recipe, "-o", output], "eval": ["eval", trained.best]}[command]
    message = refused(capsys, *argv, "--data-dir", folder)
    assert str(folder) in message
    assert "<class>/<image>" in message
    assert not output.exists()


@pytest.mark.parametrize("content", ["truncated", "text"])
def test_data_folder_with_a_damaged_picture(
    capsys: Capture, trained: Run, data: Path, odd_pictures: Path, tmp_path: Path, content: str
) -> None:
    shutil.copytree(data, tmp_path / "data")
    bad = tmp_path / "data" / "train" / "red" / "bad.jpg"
    shutil.copy(odd_pictures / f"{content}.jpg", bad)
    output = tmp_path / "run"
    assert str(bad) in refused(capsys, "train", trained.recipe, "--data-dir", tmp_path / "data", "-o", output)
    assert not output.exists()


def test_recipe_faults_are_said_all_at_once(capsys: Capture, tmp_path: Path, data: Path) -> None:
    recipe = write_recipe(tmp_path / "x.yaml", epochs="many", epoch=3, learning=1, lr="left out", batch_size=0)
    message = refused(capsys, "train", recipe, "--data-dir", data, "-o", tmp_path / "run")
    for fault in (
        "epochs: 'many' is not int",
        "epoch: unknown key; nearest: epochs",
        "learning: unknown key",
        "lr: missing",
    ):
        assert fault in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("text", ["", "# nothing but this\n", "- a\n- list\n", "model: [sd_resnet20\n", "\x00"])
def test_recipe_that_is_none(capsys: Capture, tmp_path: Path, data: Path, text: str) -> None:
    (tmp_path / "x.yaml").write_text(text)
    assert "x.yaml" in refused(capsys, "train", tmp_path / "x.yaml", "--data-dir", data, "-o", tmp_path / "run")
    assert os.listdir(tmp_path) == ["x.yaml"]


def test_recipe_that_is_not_there_lists_those_that_ship(capsys: Capture, data: Path) -> None:
    message = refused(capsys, "train", "smok", "--data-dir", data)
    assert "nearest: smoke; those are: cifar100_constant_depth_resnet110, " in message
    assert f", {BUNDLED}, smoke, " in message


def test_train_without_data(capsys: Capture, trained: Run, tmp_path: Path) -> None:
    assert "give --data-dir, or data_dir in the recipe" in refused(
        capsys, "train", trained.recipe, "-o", tmp_path / "x"
    )


def test_data_dir_of_the_recipe(capsys: Capture, tmp_path: Path, data: Path) -> None:
    recipe = write_recipe(tmp_path / "x.yaml", epochs=1, data_dir=str(data))
    assert f" on {data} for 1 epochs" in done(capsys, "train", recipe, "-o", tmp_path / "run")


def test_dry_run_says_what_it_would_take_and_writes_nothing(capsys: Capture, trained: Run, data: Path) -> None:
    said = done(capsys, "train", trained.recipe, "--data-dir", data, "--dry-run", "-o", trained.folder)
    assert "12 images to train on, 6 to validate" in said
    assert "2 an epoch, 2 epochs, 4 in all" in said
    assert "72.7% of constant depth" in said  # 29.5 of 40.5 million: facts of the 20-layer network, as sdzoo list
    assert said.endswith(f"next: sdzoo train {trained.recipe} --data-dir {data} -o {trained.folder}\n")
    assert "12 images to train on" in done(capsys, "train", trained.recipe, "--data-dir", data, "--dry-run")


def test_what_was_forced_once_is_not_proposed_again(
    capsys: Capture, trained: Run, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But by a dry run, which changes nothing, it is."""
    given = ["train", str(trained.recipe), "--data-dir", str(data), "-o", str(trained.folder), "--resume", "--force"]
    assert "--resume --force\n" in done(capsys, *given, "--dry-run")

    def stopped(*_: Any) -> Path:
        raise Interrupted("stopped")

    monkeypatch.setattr("sdzoo.training.engine.train", stopped)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "some")
    assert sdzoo_command(capsys, *given).err.endswith(f"-o {trained.folder} --resume\n")


def test_recipes_are_listed_shown_and_copied(capsys: Capture, tmp_path: Path) -> None:
    recipes = Path(sdzoo.__file__).parents[1] / "recipes"
    listed = done(capsys, "recipe", "list").splitlines()
    assert [line.split()[0] for line in listed[:-2]] == sorted(path.stem for path in recipes.glob("*.yaml"))
    assert done(capsys, "recipe", "show", "smoke") == (recipes / "smoke.yaml").read_text()
    assert f"wrote {tmp_path / 'smoke.yaml'}" in done(capsys, "recipe", "copy", "smoke", tmp_path)
    assert (tmp_path / "smoke.yaml").read_bytes() == (recipes / "smoke.yaml").read_bytes()
    assert "already exists" in refused(capsys, "recipe", "copy", "smoke", tmp_path)
    assert "nearest: smoke" in refused(capsys, "recipe", "show", "smok")


def test_runs_are_drawn(capsys: Capture, trained: Run, tmp_path: Path) -> None:
    said = done(capsys, "plot", trained.folder, "-o", tmp_path / "figure")
    assert said == f"wrote {tmp_path / 'figure.png'}\nwrote {tmp_path / 'figure.svg'}\n"
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert "is not the folder of a run" in refused(capsys, "plot", tmp_path, "-o", tmp_path / "none")


def test_corrupt_pictures_do_not_count_as_those_that_batchnorm_was_estimated_on(
    capsys: Capture, trained: Run, data: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "data"
    shutil.copytree(data, copy)
    bad = sorted((copy / "train").glob("*/*"))[0]
    bad.write_bytes(b"no picture")
    said = done(capsys, "eval", trained.best, "--data-dir", copy, "--recalibrate-bn", 12, "--skip-corrupt")
    assert f"re-estimated at full depth on 11 images of {copy}/train (1 corrupt left out: {bad}" in said


def test_batchnorm_is_estimated_again_and_the_effect_is_said(capsys: Capture, trained: Run, data: Path) -> None:
    said = done(capsys, "eval", trained.best, "--data-dir", data, "--recalibrate-bn", 11).splitlines()
    before, after = (float(re.findall(r"top-1 (\d+\.\d\d) %", line)[0]) for line in (said[1], said[3]))
    assert f"BatchNorm re-estimated at full depth on 11 images of {data}/train" in said[2]
    assert said[3].endswith(f"top-1 {after - before:+.2f} points")
    again = sdzoo_command(capsys, "eval", trained.best, "--data-dir", data, "--recalibrate-bn", 13)
    assert again.code == 2
    assert again.err == f"sdzoo: --recalibrate-bn 13: {data}/train has 12 images\n"
    assert "re-estimated" not in again.out and "top-1" not in again.out, "refused before anything is measured"


def test_eval_of_a_model_without_labels_on_another_number_of_classes(
    capsys: Capture, data: Path, tmp_path: Path
) -> None:
    torch.save({"arch": "sd_resnet18", "state_dict": timm.create_model("sd_resnet18").state_dict()}, tmp_path / "x.pth")
    said = refused(capsys, "eval", tmp_path / "x.pth", "--data-dir", data)
    assert "the data has 3 classes, the model 1000" in said


def test_corrupt_pictures_are_left_out_when_asked_for(
    capsys: Capture, trained: Run, tmp_path: Path, data: Path
) -> None:
    shutil.copytree(data, tmp_path / "data")
    bad = next((tmp_path / "data" / "test").rglob("0.png"))
    bad.write_bytes(b"no picture")
    assert str(bad) in refused(capsys, "eval", trained.best, "--data-dir", tmp_path / "data")
    said = done(capsys, "eval", trained.best, "--data-dir", tmp_path / "data", "--skip-corrupt")
    assert f"on 5 images (1 corrupt left out: {bad})" in said


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model": "sd_resnet111"}, '"sd_resnet111" is not a model; nearest: sd_resnet110'),
        ({"num_classes": 4}, "has 3 classes"),
        ({"num_classes": "left out"}, "has 3 classes"),
        ({"batch_size": 13}, "12 training images do not fill one step of 13"),
        ({"drop_path": 1.0}, "drop_path is 1.0; it must be in [0, 1)"),
        ({"drop_path": "left out", "model_kwargs": {"survival_probs": [0.5] * 8}}, "has 8 entries"),
        ({"drop_path": "left out", "model_kwargs": {"survival_probs": [0.5] * 8 + [1.2]}}, "survival_probs[8] is 1.2"),
        ({"drop_path": "left out", "model_kwargs": {"survival_probs": [float("nan")] * 9}}, "survival_probs[0] is nan"),
        ({"model_kwargs": {"schedule": "liner_decay"}}, "nearest: linear_decay"),
        ({"model_kwargs": {"depth": 3}}, "depth"),
        ({"opt": "sdg"}, "sdg"),
        ({"opt_kwargs": {"speed": 3}}, "speed"),
        ({"interpolation": "bilinaer"}, "bilinaer"),
        ({"crop_pct": -1.0}, "crop_pct"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_recipe_that_does_not_fit(
    capsys: Capture, tmp_path: Path, data: Path, changes: dict[str, Any], says: str
) -> None:
    recipe = write_recipe(tmp_path / "x.yaml", **changes)
    assert says in refused(capsys, "train", recipe, "--data-dir", data, "-o", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_device_that_cannot_be_had(capsys: Capture, tmp_path: Path, data: Path, trained: Run, device: str) -> None:
    argv = ["train", trained.recipe, "--data-dir", data, "-o", tmp_path / "run", "--device", device]
    assert device in refused(capsys, *argv)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("below", ["", "sub"])
def test_train_into_a_file(capsys: Capture, tmp_path: Path, data: Path, trained: Run, below: str) -> None:
    (tmp_path / "file").touch()
    argv = ["train", trained.recipe, "--data-dir", data, "-o", tmp_path / "file" / below]
    assert "cannot create" in refused(capsys, *argv)


def test_divergence_exits_with_3(capsys: Capture, tmp_path: Path, data: Path) -> None:
    recipe = write_recipe(tmp_path / "x.yaml", lr=1e30, sched="constant")
    said = sdzoo_command(capsys, "train", recipe, "--data-dir", data, "-o", tmp_path / "run")
    assert said.code == 3
    assert re.fullmatch(r"sdzoo: the loss is \w+ at step \d.*\n", said.err)


# Interrupts, pipes, processes


def test_an_interrupt_exits_with_130(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sdzoo.zoo.summarise", interrupt)
    assert refused(capsys, "info", "sd_resnet20", code=130) == "sdzoo: interrupted\n"


@pytest.fixture
def started(tmp_path: Path, data: Path) -> Iterator[Any]:
    """Return a function that starts a long ``sdzoo train`` in a process of its own."""
    recipe = write_recipe(tmp_path / "long.yaml", epochs=5000)
    processes: list[subprocess.Popen[str]] = []

    def start(*options: str) -> subprocess.Popen[str]:
        argv = ["train", str(recipe), "--data-dir", str(data), "-o", str(tmp_path / "run"), *options]
        started = subprocess.Popen(
            [sys.executable, "-u", "-m", "sdzoo", *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        processes.append(started)
        return started

    yield start
    for one in processes:
        one.kill()
        one.communicate()


def interrupted_after_an_epoch(training: subprocess.Popen[str]) -> tuple[int, str]:
    """Return the first epoch that the process reports, and its last words, after a Ctrl-C."""
    assert training.stdout is not None
    for line in training.stdout:
        if match := re.match(r"epoch (\d+)/5000: ", line):
            training.send_signal(signal.SIGINT)
            _, err = training.communicate(timeout=60)
            assert training.returncode == 130
            return int(match[1]), err
    raise AssertionError(training.communicate()[1])


def test_ctrl_c_leaves_a_checkpoint_that_evaluates_and_resumes(
    capsys: Capture, started: Any, tmp_path: Path, data: Path
) -> None:
    first, err = interrupted_after_an_epoch(started())
    assert re.fullmatch(r"sdzoo: stopped in epoch \d+, batch \d+; .*last\.pth.*\n", err)
    assert not [name for name in os.listdir(tmp_path / "run") if name.startswith(".") and name != ".lock"]
    eval_line(capsys, tmp_path / "run" / "last.pth", data)
    eval_line(capsys, tmp_path / "run" / "best.safetensors", data)
    stopped = int(re.findall(r"epoch (\d+)", err)[0])
    assert stopped > first
    resumed, err = interrupted_after_an_epoch(started("--resume"))
    assert resumed == stopped, "it goes on in the epoch in which it was stopped"
    epochs = [line.split(",")[0] for line in (tmp_path / "run" / "log.csv").read_text().splitlines()[1:]]
    assert epochs == [str(epoch) for epoch in range(1, len(epochs) + 1)]


def test_a_reader_that_has_seen_enough_is_no_error(tmp_path: Path) -> None:
    """As in ``sdzoo list | head -1``."""
    listing = subprocess.Popen(
        [sys.executable, "-m", "sdzoo", "list"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert listing.stdout is not None
    assert listing.stderr is not None
    with listing:
        listing.stdout.readline()
        listing.stdout.close()
        assert listing.stderr.read() == ""
