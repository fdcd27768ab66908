"""Every picture that sdzoo draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from sdzoo.deploy.benchmark import Timing
from sdzoo.deploy.runtime import Prediction
from sdzoo.extras import require
from sdzoo.files import atomic_path
from sdzoo.schedule import budget, constant_depth, linear_decay, stagewise, uniform, warm_up

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, MUTED, RIGHT, WRONG = "#1a1a2e", "#6b7280", "#1b7f4d", "#b3261e"
COLOURS = {"PyTorch eager": "#9aa5b8", "PyTorch folded": "#5b7db1", "ONNX Runtime": "#1f3f77"}
RULE = "#d1d5db"
CHART_COLUMNS, CHART_ROWS = 54, 4


def draw_report(
    path: str | Path,
    title: str,
    subtitle: str,
    pictures: Mapping[str, Path],
    predictions: Mapping[str, Sequence[Prediction]],
    timings: Sequence[Timing],
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
    note = f"median and quartiles of {timings[0].runs} interleaved calls, {threads}"
    figure.text(0.04, 0.03, note, fontsize=8.5, color=MUTED)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")


def draw_schedules(path: str | Path) -> None:
    """Draw the survival schedules of a network of 54 blocks, and linear decay's warm-up, each with its mean.

    Args:
        path: The PNG to write.

    Raises:
        ImportError: without the extra ``plots``.
    """
    require("matplotlib")
    from matplotlib.figure import Figure

    linear = linear_decay(54)
    schedules = {
        "constant depth": (constant_depth(54), MUTED),
        "uniform": (uniform(54, 0.75), "#5b7db1"),
        "stagewise": (stagewise([0.95, 0.85, 0.625], [18, 18, 18]), RIGHT),
        "linear decay": (linear, "#1f3f77"),
        "linear decay\non a budget": (budget(linear, 0.6), "#b45309"),
    }
    shares = {0: MUTED, 25: "#8199c4", 50: "#6b86b8", 75: "#4763a0", 100: "#1f3f77"}
    figure = Figure(figsize=(8, 3.9), dpi=160, facecolor="white")
    left, right = (figure.add_axes((x, 0.12, width, 0.715)) for x, width in ((0.055, 0.4), (0.645, 0.235)))
    for name, (probs, colour) in schedules.items():
        _draw_probs(left, probs, name, colour)
    for percent, colour in shares.items():
        _draw_probs(right, warm_up(linear, percent, 100), f"{percent} %", colour)
    for axes, title, note in (
        (left, "Survival schedules", "survival probability of each block"),
        (right, "Warm-up of linear decay", "p of the draw, by share of the warm-up"),
    ):
        axes.text(0, 1.14, title, transform=axes.transAxes, fontsize=11, fontweight="bold", color=INK)
        axes.text(0, 1.07, note, transform=axes.transAxes, fontsize=8, color=MUTED)
        axes.set(xlim=(1, 54), ylim=(0, 1.02), xticks=(1, 18, 36, 54), yticks=(0, 0.25, 0.5, 0.75, 1))
        axes.set_xlabel("block", fontsize=8, color=MUTED, labelpad=2)
        axes.grid(axis="y", color=RULE, linewidth=0.5)
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=8, colors=INK, length=0)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(RULE)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")


def _draw_probs(axes: Axes, probs: Sequence[float], name: str, colour: str) -> None:
    blocks = range(1, len(probs) + 1)
    axes.plot(blocks, probs, color=colour, linewidth=1.8, clip_on=False, solid_capstyle="round")
    label = f"{name}\nmean {sum(probs) / len(probs):.2f}"
    style = {"fontsize": 8, "color": colour, "va": "center", "linespacing": 1.15}
    axes.annotate(label, (len(probs), probs[-1]), (5, 0), textcoords="offset points", annotation_clip=False, **style)


def survival_chart(probs: Sequence[float], ascii_only: bool = False) -> list[str]:
    """Return the lines of a bar chart of p_l over the blocks, from 0 to 1, for a terminal of 60 columns.

    A block has one or more columns; where there are more than 54 blocks, a column is the mean of those that it covers.
    """
    count = len(probs)
    columns = CHART_COLUMNS // count * count or CHART_COLUMNS
    edges = [(column * count // columns, -(-(column + 1) * count // columns)) for column in range(columns)]
    fills, (tick, side, corner, rule) = (" .:#", "||+-") if ascii_only else (" ▁▂▃▄▅▆▇█", "┤│┼─")
    full = len(fills) - 1
    heights = [round(sum(probs[a:b]) / (b - a) * CHART_ROWS * full) for a, b in edges]
    lines = []
    for row in reversed(range(CHART_ROWS)):
        label, left = (f"{(row + 1) / CHART_ROWS:.1f}", tick) if row % 2 else ("   ", side)
        lines.append(f"{label} {left}" + "".join(fills[min(max(height - row * full, 0), full)] for height in heights))
    last = f"{count}"
    scale = f"1{'block':^{columns - 1 - len(last)}}{last}" if count > 1 else "block 1"
    return [line.rstrip() for line in (*lines, f"0.0 {corner}{rule * columns}", f"     {scale}")]
