"""Survival schedules, as a picture and for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sdzoo.extras import require
from sdzoo.files import atomic_path
from sdzoo.plots.style import MUTED, RIGHT, headed
from sdzoo.schedule import budget, constant_depth, linear_decay, stagewise, uniform, warm_up

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CHART_COLUMNS, CHART_ROWS = 54, 4


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
        headed(axes, title, note)
        axes.set(xlim=(1, 54), ylim=(0, 1.02), xticks=(1, 18, 36, 54), yticks=(0, 0.25, 0.5, 0.75, 1))
        axes.set_xlabel("block", fontsize=8, color=MUTED, labelpad=2)
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
