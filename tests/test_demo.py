from __future__ import annotations

import functools
import importlib.util
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sdzoo import demo as module
from sdzoo.assets import pictures
from sdzoo.demo import demo
from sdzoo.deploy import onnx_graph
from sdzoo.deploy.benchmark import benchmark
from sdzoo.deploy.benchmark_row import Row
from sdzoo.deploy.predictor import model_predictor
from sdzoo.deploy.runtime import load_predictor
from sdzoo.errors import InputError, ParityError
from sdzoo.zoo import open_model

LABELS = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


class Ran:
    """What one demo wrote and said."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lines: list[str] = []
        self.timings: list[Row] = []
        self.progress: list[str] = []
        demo(folder, self.lines.append, self.timings.extend, self.progress.append)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """Return a demo into a folder, and its parent, that are not there yet; two timed calls instead of twenty."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "benchmark", functools.partial(benchmark, samples=2))
        return Ran(tmp_path_factory.mktemp("demo") / "new" / "folder")


def test_both_files_are_written_and_nothing_else(ran: Ran) -> None:
    assert sorted(os.listdir(ran.folder)) == ["model.onnx", "report.png"]


def test_the_report_is_a_picture_with_something_on_it(ran: Ran) -> None:
    with Image.open(ran.folder / "report.png") as image:
        assert image.format == "PNG"
        assert 800 <= image.width <= 4000
        assert 400 <= image.height <= 4000
        pixels = np.asarray(image.convert("RGB"))
    assert (pixels[:5] == 255).all(), "text at the upper edge is cut off"
    assert 0.3 < (pixels == 255).all(axis=2).mean() < 0.95
    upper, lower = np.split(pixels[:, :, 0] < 128, [int(0.6 * len(pixels))])
    assert upper.mean() > 0.02, "no pictures"
    assert lower.mean() > 0.02, "no latencies"


def test_the_report_shows_the_pictures(ran: Ran) -> None:
    """Every one's own colours are found in it, as many times as pixels are magnified."""
    with Image.open(ran.folder / "report.png") as image:
        report = np.asarray(image.convert("RGB")).reshape(-1, 3).astype(np.uint32)
    shown = set((report @ np.array([65536, 256, 1], np.uint32)).tolist())
    for label, file in pictures().items():
        with Image.open(file) as picture:
            pixels = np.asarray(picture.convert("RGB"))[4:-4, 4:-4].reshape(-1, 3).astype(np.uint32)
        colours = set((pixels @ np.array([65536, 256, 1], np.uint32)).tolist())
        assert len(colours & shown) > 0.9 * len(colours), label


def test_the_model_is_the_bundled_one(ran: Ran) -> None:
    files = list(pictures().values())
    theirs = load_predictor(ran.folder / "model.onnx")(files)
    ours = model_predictor(open_model("sd_resnet20.cifar10_jpeg"))(files)
    assert np.abs(ours - theirs).max() <= 1e-4 * max(1, np.abs(ours).max())


def test_every_picture_is_in_the_table_with_both_answers(ran: Ran) -> None:
    assert list(pictures()) == LABELS
    start = ran.lines.index("picture     PyTorch               CPUExecutionProvider")
    ours = model_predictor(open_model("sd_resnet20.cifar10_jpeg")).top(list(pictures().values()), 1)
    right = 0
    for label, line, best in zip(LABELS, ran.lines[start + 1 :], ours, strict=False):
        match = re.fullmatch(r"(\w+) +(\w+) (\d+\.\d\d) % +(\w+) (\d+\.\d\d) %( +\(wrong\))?", line)
        assert match, line
        assert match[1] == label
        assert match[2] == match[4] == best[0].label
        assert float(match[3]) == pytest.approx(100 * best[0].probability, abs=0.0051)
        assert float(match[5]) == pytest.approx(100 * best[0].probability, abs=0.02)
        assert bool(match[6]) == (best[0].label != label)
        right += best[0].label == label
    assert ran.lines[start + 11] == f"{right} of 10 right"


def test_what_was_verified_is_said(ran: Ran) -> None:
    text = "\n".join(ran.lines)
    assert "sd_resnet20.cifar10_jpeg" in text
    assert re.search(
        r"^folding: \|difference\| \S+ of \S+ allowed in the batch .*, top-1 equal on 84 of 84 images",
        text,
        re.M,
    )
    assert re.search(r"^exporting .*model\.onnx: \|difference\| \S+ of \S+ allowed", text, re.M)


def test_latencies_of_all_three_at_both_batch_sizes(ran: Ran) -> None:
    targets = ["PyTorch eager", "PyTorch folded", "ONNX Runtime"]
    assert [(row.batch_size, row.target) for row in ran.timings] == [
        (size, name) for size in (1, 32) for name in targets
    ]
    assert any(text.endswith("batch 32, round 2/2") for text in ran.progress)


def test_the_file_that_was_exported_is_the_one_that_is_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ran: Ran
) -> None:
    """And older files are replaced."""
    timed: list[Any] = []

    def note(*_: object, onnx: Path, **__: object) -> list[Row]:
        timed.append(onnx)
        names = {title: name for name, title in module.TITLES.items()}
        return [replace(row, target=names[row.target]) for row in ran.timings]

    monkeypatch.setattr(module, "benchmark", note)
    for name in ("model.onnx", "report.png"):
        (tmp_path / name).write_bytes(b"old")
    demo(tmp_path, lambda _: None)
    assert timed == [tmp_path / "model.onnx"]
    assert all((tmp_path / name).stat().st_size > 10_000 for name in ("model.onnx", "report.png"))


@pytest.mark.parametrize("below", ["", "sub"])
def test_output_that_cannot_be_created(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot create .*file"):
        demo(tmp_path / "file" / below, lambda _: None)
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize(("missing", "extra"), [("matplotlib", "plots"), ("onnxruntime", "onnx"), ("onnx", "onnx")])
def test_missing_extra_is_named_before_anything_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str, extra: str
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == missing else find(name, *rest))
    with pytest.raises(ImportError, match=rf'^{missing} not installed.*"sdzoo\[{extra}\]"$'):
        demo(tmp_path / "new", lambda _: None)
    assert not (tmp_path / "new").exists()


def test_a_failed_verification_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = onnx_graph.onnx_graph

    def wrong(*args: Any) -> Any:
        proto = build(*args)
        [node for node in proto.graph.node if node.op_type == "Relu"][-1].op_type = "Identity"
        return proto

    monkeypatch.setattr(onnx_graph, "onnx_graph", wrong)
    with pytest.raises(ParityError, match="not exported"):
        demo(tmp_path, lambda _: None)
    assert os.listdir(tmp_path) == []
