"""Pictures of survival schedules; the demo's report is in test_demo.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from sdzoo.plots import draw_schedules, survival_chart

COMMITTED = Path(__file__).parents[1] / "docs" / "schedules.png"
BARS = " ▁▂▃▄▅▆▇█"


@pytest.fixture
def drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Figure]:
    """Return the file and what was drawn into it."""
    figures: list[Figure] = []
    save = Figure.savefig

    def savefig(figure: Figure, *args: Any, **kwargs: Any) -> None:
        figures.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", savefig)
    draw_schedules(tmp_path / "schedules.png")
    return tmp_path / "schedules.png", figures[0]


def lines(figure: Figure, panel: int) -> dict[str, np.ndarray]:
    """Return the heights of the lines by their labels, which stand where the lines end."""
    axes = figure.axes[panel]
    labels = [text for text in axes.texts if "mean" in text.get_text()]
    found = {}
    for line, label in zip(axes.lines, labels, strict=True):
        x, y = np.asarray(line.get_xdata()), np.asarray(line.get_ydata())
        assert x.tolist() == list(range(1, 55))
        assert label.xy == (54, y[-1])  # type: ignore[attr-defined]
        assert label.get_color() == line.get_color()
        found[label.get_text()] = y
    return found


def test_the_schedules_are_drawn(drawn: tuple[Path, Figure]) -> None:
    schedules, block = lines(drawn[1], 0), np.arange(1, 55)
    expected = {
        "constant depth\nmean 1.00": np.ones(54),
        "uniform\nmean 0.75": np.full(54, 0.75),
        "stagewise\nmean 0.81": np.repeat([0.95, 0.85, 0.625], 18),
        "linear decay\nmean 0.75": 1 - block / 108,
        "linear decay\non a budget\nmean 0.60": 1 - 0.4 * block / 27.5,
    }
    assert list(schedules) == list(expected)
    for label, heights in schedules.items():
        assert heights == pytest.approx(expected[label], abs=1e-12), label


def test_the_warm_up_is_drawn(drawn: tuple[Path, Figure]) -> None:
    shares = lines(drawn[1], 1)
    assert [label.split("\n")[0] for label in shares] == ["0 %", "25 %", "50 %", "75 %", "100 %"]
    for share, heights in zip((0, 0.25, 0.5, 0.75, 1), shares.values(), strict=True):
        assert heights == pytest.approx(1 - share * np.arange(1, 55) / 108, abs=1e-12)


def test_nothing_is_cut_off(drawn: tuple[Path, Figure]) -> None:
    with Image.open(drawn[0]) as image:
        assert image.format == "PNG"
        assert image.width >= 2 * image.height - 100 > 400
        pixels = np.asarray(image.convert("RGB"))
    for edge in (pixels[:5], pixels[-5:], pixels[:, :5], pixels[:, -5:]):
        assert (edge == 255).all()
    assert 0.02 < (pixels < 250).any(axis=2).mean() < 0.2


def test_labels_do_not_touch(drawn: tuple[Path, Figure]) -> None:
    for axes in drawn[1].axes:
        boxes = [text.get_window_extent() for text in axes.texts if "mean" in text.get_text()]
        assert not [1 for index, box in enumerate(boxes) for other in boxes[:index] if box.overlaps(other)]


def test_the_picture_of_the_readme_is_the_one_that_is_drawn(drawn: tuple[Path, Figure]) -> None:
    """But for what fonts and versions of matplotlib change."""
    with Image.open(COMMITTED) as committed, Image.open(drawn[0]) as image:
        assert committed.size == image.size
        difference = np.asarray(committed.convert("L"), float) - np.asarray(image.convert("L"), float)
    assert (np.abs(difference) > 64).mean() < 0.02


def heights(chart: list[str], fills: str) -> list[int]:
    """Return the height of each bar, counted in the steps of a character."""
    rows = [line[5:].ljust(54) for line in chart[:4]]
    return [sum(fills.index(row[column]) for row in rows) for column in range(len(chart[4]) - 5)]


@pytest.mark.parametrize(("count", "columns"), [(1, 54), (9, 54), (10, 50), (27, 54), (28, 28), (54, 54)])
@pytest.mark.parametrize(("ascii_only", "fills"), [(False, BARS), (True, " .:#")])
def test_a_chart_is_as_high_as_the_probabilities(count: int, columns: int, ascii_only: bool, fills: str) -> None:
    probs = np.random.default_rng(0).uniform(0, 1, count).tolist()
    chart = survival_chart(probs, ascii_only)
    steps = 4 * (len(fills) - 1)
    expected = [prob for prob in probs for _ in range(columns // count)]
    assert [height / steps for height in heights(chart, fills)] == pytest.approx(expected, abs=0.5001 / steps)
    assert "".join(chart).isascii() is ascii_only


def test_a_chart_of_many_blocks_shows_means() -> None:
    probs = [1 - block / 1200 for block in range(1, 601)]
    bars = heights(survival_chart(probs), BARS)
    assert len(bars) == 54
    assert [height / 32 for height in bars] == pytest.approx([1 - (c + 0.5) / 108 for c in range(54)], abs=0.6 / 32)


@pytest.mark.parametrize("count", [1, 2, 9, 53, 54, 55, 75, 600])
def test_a_chart_has_its_axes_and_fits_a_terminal(count: int) -> None:
    chart = survival_chart([0.6] * count)
    assert [line[:5] for line in chart[:5]] == ["1.0 ┤", "    │", "0.5 ┤", "    │", "0.0 ┼"]
    assert max(map(len, chart)) <= 60
    assert chart[5].split() == (["1", "block", str(count)] if count > 1 else ["block", "1"])
    assert count == 1 or len(chart[5]) == len(chart[4])
    assert not [line for line in chart if line != line.rstrip()]
