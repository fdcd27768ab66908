"""The demo's report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from sdzoo.deploy.benchmark_row import Row
from sdzoo.deploy.predictor import Prediction
from sdzoo.extras import require
from sdzoo.files import atomic_path
from sdzoo.plots.style import INK, MUTED, RIGHT, RULE, WRONG

COLOURS = {"PyTorch eager": "#9aa5b8", "PyTorch folded": "#5b7db1", "ONNX Runtime": "#1f3f77"}


def draw_report(
    path: str | Path,
    title: str,
    subtitle: str,
    pictures: Mapping[str, Path],
    predictions: Mapping[str, Sequence[Prediction]],
    timings: Sequence[Row],
) -> None:
    """Draw the demo's report: each picture with its most probable classes, and the latencies below.

    Args:
        path: The PNG to write.
        title: First line.
        subtitle: Second line: what was verified.
        pictures: Files by true label.
        predictions: By true label, best first.
        timings: Of every target and batch size.

    Raises:
        ImportError: without the extra ``plots``.
    """
    require("matplotlib")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6.5), dpi=130, facecolor="white")
    figure.text(0.04, 0.96, title, fontsize=17, fontweight="bold", color=INK, va="top")
    figure.text(0.04, 0.905, subtitle, fontsize=10, color=MUTED, va="top")
    grid = figure.add_gridspec(2, 5, left=0.04, right=0.97, top=0.80, bottom=0.442, hspace=0.44, wspace=0.10)
    for index, (label, file) in enumerate(pictures.items()):
        cell = grid[index // 5, index % 5].subgridspec(1, 2, width_ratios=(1, 1.22), wspace=0.06)
        picture, chances = figure.add_subplot(cell[0]), figure.add_subplot(cell[1])
        with Image.open(file) as image:
            picture.imshow(image.convert("RGB"), interpolation="nearest")
        best = predictions[label][0].label
        picture.set_title(label, fontsize=10, color=INK, loc="left", pad=4)
        picture.axis("off")
        shown = list(predictions[label])[:3]
        for row, prediction in enumerate(shown):
            colour = (RIGHT if best == label else WRONG) if row == 0 else MUTED
            line, style = 0.90 - 0.34 * row, {"fontsize": 7.5, "color": colour, "va": "center"}
            chances.text(0.02, line, prediction.label, **style)
            chances.text(1.0, line, f"{prediction.probability:.0%}", ha="right", **style)
            chances.barh(line - 0.14, 0.98 * prediction.probability, height=0.06, left=0.02, color=colour)
        chances.set(xlim=(0, 1), ylim=(0, 1))
        chances.axis("off")

    sizes = sorted({timing.batch_size for timing in timings})
    lower = figure.add_gridspec(1, len(sizes), left=0.15, right=0.94, top=0.32, bottom=0.13, wspace=0.42)
    for index, size in enumerate(sizes):
        axes = figure.add_subplot(lower[index])
        rows = [timing for timing in timings if timing.batch_size == size][::-1]
        medians = [timing.median_ms for timing in rows]
        spread = [
            [t.median_ms - t.lower_quartile_ms for t in rows],
            [t.upper_quartile_ms - t.median_ms for t in rows],
        ]
        axes.barh(
            [timing.target for timing in rows],
            medians,
            xerr=spread,
            color=[COLOURS[timing.target] for timing in rows],
            ecolor=MUTED,
            height=0.62,
        )
        reach = max(timing.upper_quartile_ms for timing in rows)
        for row, timing in enumerate(rows):
            text = f"{timing.median_ms:.2f} ms" if timing.median_ms < 10 else f"{timing.median_ms:.0f} ms"
            axes.text(timing.upper_quartile_ms + 0.03 * reach, row, text, va="center", fontsize=9, color=INK)
        axes.set_xlim(0, 1.3 * reach)
        axes.set_title(f"latency, batch of {size}", fontsize=10, color=INK, loc="left")
        axes.tick_params(labelsize=9, colors=INK, length=0)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(RULE)
    threads = "1 thread" if timings[0].threads == 1 else f"{timings[0].threads} threads"
    note = f"median and quartiles of {timings[0].samples} interleaved calls, {threads}"
    figure.text(0.04, 0.03, note, fontsize=8.5, color=MUTED)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")
