"""The benchmark's picture: what is drawn is what the rows say."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from sdzoo.deploy.benchmark_row import Row
from sdzoo.errors import InputError
from sdzoo.plots.benchmark import MOST, draw_benchmark

Draw = Callable[[Sequence[Row]], Figure]
BASE = Row(
    *("sd_resnet20.cifar10_jpeg", "3x32x32", "eager", "torch 2.14.1", "PyTorch cpu", "AMD EPYC, 2 cores"),
    *(1, 1, 20, 4.0, 3.0, 6.0, None, 1.14, 50.0, 2.4e-6, 6.5e-4, "logits", None),
)


def rows(targets: Sequence[str] = ("eager", "onnx"), threads: Sequence[int] = (1, 2)) -> list[Row]:
    made = []
    for count in threads:
        for size in (32, 1, 8):  # as nobody sorted them
            for number, target in enumerate(targets):
                ms = size * (number + 1) / count + 1
                place = {"target": target, "threads": count, "batch_size": size}
                spread = {"median_ms": ms, "lower_quartile_ms": 0.75 * ms, "upper_quartile_ms": 1.5 * ms}
                made.append(dataclasses.replace(BASE, **place, **spread))
    return made


@pytest.fixture
def draw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Draw:
    figures: list[Figure] = []
    save = Figure.savefig

    def savefig(figure: Figure, *args: Any, **kwargs: Any) -> None:
        figures.append(figure)
        save(figure, *args, **kwargs)

    def draw(rows: Sequence[Row]) -> Figure:
        monkeypatch.setattr(Figure, "savefig", savefig)
        draw_benchmark(rows, tmp_path / "picture")
        return figures[-1]

    return draw


def heading(figure: Figure, panel: int) -> str:
    return " / ".join(text.get_text() for text in figure.axes[panel].texts)


def line(figure: Figure, panel: int, number: int) -> list[tuple[float, float]]:
    lines = [line for line in figure.axes[panel].lines if line.get_marker() == "o"]
    return [(float(x), float(y)) for x, y in lines[number].get_xydata()]  # type: ignore[union-attr]


def test_a_panel_of_latency_and_one_of_throughput_for_each_number_of_threads(draw: Draw) -> None:
    figure = draw(rows())
    titles = ["Latency, 1 thread /", "Throughput, 1 thread /", "Latency, 2 threads /", "Throughput, 2 threads /"]
    assert [heading(figure, panel)[: len(title)] for panel, title in enumerate(titles)] == titles
    for panel, count in enumerate((1, 2)):
        for number in (0, 1):
            latencies = [(float(size), size * (number + 1) / count + 1) for size in (1, 8, 32)]
            found = line(figure, 2 * panel, number)
            assert [y for _, y in found] == [ms for _, ms in latencies]
            assert [x for x, _ in found] == pytest.approx([size for size, _ in latencies], rel=0.05)  # a little aside
            expected = [(size, pytest.approx(size / ms * 1000)) for size, ms in latencies]
            assert line(figure, 2 * panel + 1, number) == expected


def test_whiskers_are_the_quartiles(draw: Draw) -> None:
    figure = draw(rows(("eager",), (1,)))
    (whiskers,) = figure.axes[0].collections
    found = sorted(tuple(map(float, segment[:, 1])) for segment in whiskers.get_segments())  # type: ignore[attr-defined]
    assert found == [pytest.approx((0.75 * ms, 1.5 * ms)) for ms in (2, 9, 33)]


def test_all_threads_share_a_scale(draw: Draw) -> None:
    figure = draw(rows())
    assert figure.axes[0].get_ylim() == figure.axes[2].get_ylim()
    assert figure.axes[1].get_ylim() == figure.axes[3].get_ylim()
    assert figure.axes[1].get_ylim()[0] == 0
    assert [axes.get_yscale() for axes in figure.axes] == ["log", "linear"] * 2
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["1", "8", "32"]
    low, high = figure.axes[0].get_ylim()
    assert sum(low <= tick <= high for tick in figure.axes[0].get_yticks()) >= 2


def test_a_line_has_the_colour_of_its_target(draw: Draw) -> None:
    figure = draw(rows(("eager", "onnx", "openvino")))
    keys = [key.get_color() for key in figure.artists]  # type: ignore[attr-defined]
    assert len(set(keys)) == 3
    for axes in figure.axes:
        assert [line.get_color() for line in axes.lines if line.get_marker() == "o"] == keys


def test_what_was_timed_and_proved_stands_above(draw: Draw) -> None:
    loss = {"parity": 0.05, "parity_limit": 0.5, "parity_kind": "top1_loss_points", "top1_percent": 80.78}
    int8 = dataclasses.replace(BASE, target="onnx-int8", runtime="onnxruntime 1.32.0", provider="CPU", **loss)
    texts = [text.get_text() for text in draw([BASE, int8]).texts]
    assert texts[:2] == ["sd_resnet20.cifar10_jpeg", "3 x 32 x 32, 20 interleaved calls each; AMD EPYC, 2 cores"]
    assert texts[2:8] == ["target", "runtime", "provider", "file, MB", "parity", "top-1, %"]
    assert texts[8:14] == ["eager", "torch 2.14.1", "PyTorch cpu", "1.14", "2.4e-06 of 0.00065", "-"]
    assert texts[14:] == ["onnx-int8", "onnxruntime 1.32.0", "CPU", "1.14", "0.05 of 0.5 points", "80.78"]


@pytest.mark.parametrize("count", [1, 8, MOST])
def test_nothing_is_cut_off(tmp_path: Path, count: int) -> None:
    files = draw_benchmark(rows([f"target {n}" for n in range(count)]), tmp_path / "picture.png")
    assert files == [tmp_path / "picture.png", tmp_path / "picture.svg"]
    with Image.open(files[0]) as image:
        pixels = np.asarray(image.convert("RGB"))
    assert 0.002 < (pixels < 128).all(axis=2).mean() < 0.2
    for edge in (pixels[:8], pixels[-8:], pixels[:, :8], pixels[:, -8:]):
        assert (edge == 255).all()


def test_a_missing_place_is_a_gap_and_a_single_one_a_dot(draw: Draw) -> None:
    figure = draw([row for row in rows() if row.target == "eager" or (row.threads, row.batch_size) == (2, 8)])
    assert [len(line(figure, panel, 1)) for panel in (0, 2)] == [0, 1]


def test_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    first, second = (draw_benchmark(rows(), tmp_path / name) for name in ("a.csv", "b"))
    assert [file.name for file in first] == ["a.png", "a.svg"]
    assert [file.read_bytes() for file in first] == [file.read_bytes() for file in second]


def test_refusals(tmp_path: Path) -> None:
    for given, output, said in (
        ([], tmp_path / "a", "no rows to draw"),
        (rows([f"{n}" for n in range(MOST + 1)]), tmp_path / "a", f"{MOST + 1} targets given; at most {MOST}"),
        (rows(), tmp_path, "is a folder; name a file"),
        (rows(), tmp_path / "none" / "a", "create it first"),
    ):
        with pytest.raises(InputError, match=said):
            draw_benchmark(given, output)
    assert list(tmp_path.iterdir()) == []
