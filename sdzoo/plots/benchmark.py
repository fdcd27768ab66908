"""The benchmark's table as a picture: latency and throughput by batch size, a line for each target."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdzoo.deploy.benchmark_row import Row
from sdzoo.errors import InputError
from sdzoo.extras import require
from sdzoo.files import atomic_path
from sdzoo.plots.runs import COLOURS, DASHES, SUFFIXES
from sdzoo.plots.style import INK, MUTED, headed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# In inches: the page, a line of the list of targets, the edge around it, a row of panels with what is about it
WIDTH, LINE, EDGE, ROW = 9.6, 0.21, 0.32, 3.0
ASIDE = 1.035  # the factor between the places of two targets that were timed at one batch size
MOST = len(COLOURS) * len(DASHES)


def draw_benchmark(rows: Sequence[Row], output: str | Path) -> list[Path]:
    """Draw a benchmark's table into ``output`` as PNG and as SVG, and return the two files.

    Above: the targets, with what does not depend on the batch. Below, for each number of threads: the median latency
    with its quartiles, and the images per second.

    Args:
        rows: Of one model.
        output: The two files' common name; a suffix ``.png``, ``.svg`` or ``.csv`` is left off.

    Raises:
        InputError: without rows, with more targets than can be told apart, or if ``output`` is a folder.
        ImportError: without the extra ``plots``.
    """
    require("matplotlib")
    from matplotlib import rc_context

    output = Path(output)
    stem = output.name.removesuffix(output.suffix) if output.suffix in (*SUFFIXES, ".csv") else output.name
    if output.is_dir() or not stem:
        raise InputError(f"{output} is a folder; name a file")
    if not rows:
        raise InputError("no rows to draw")
    if (count := len({row.target for row in rows})) > MOST:
        raise InputError(f"{count} targets given; at most {MOST} can be told apart")
    files = [output.with_name(stem + suffix) for suffix in SUFFIXES]
    with rc_context({"svg.hashsalt": "sdzoo"}):  # without salt and date, the same rows give the same bytes
        figure = _figure(rows)
        with atomic_path(files[0]) as png, atomic_path(files[1]) as svg:
            figure.savefig(png, format="png")
            figure.savefig(svg, format="svg", metadata={"Date": None})
    return files


def _figure(rows: Sequence[Row]) -> Figure:
    from matplotlib.figure import Figure

    targets = list(dict.fromkeys(row.target for row in rows))
    threads = sorted({row.threads for row in rows})
    looks: dict[str, dict[str, Any]] = {
        target: {"color": COLOURS[n % len(COLOURS)], "linestyle": DASHES[n // len(COLOURS)], "linewidth": 1.5}
        for n, target in enumerate(targets)
    }
    height = EDGE + LINE * (len(targets) + 3.8) + ROW * len(threads)
    figure = Figure(figsize=(WIDTH, height), dpi=130, facecolor="white")
    _list_targets(figure, rows, looks)
    panels: dict[str, list[Axes]] = {"latency": [], "throughput": []}
    for index, count in enumerate(threads):
        mine = [row for row in rows if row.threads == count]
        bottom = ROW * (len(threads) - 1 - index) + 0.5
        said = f"{count} thread{'s' if count > 1 else ''}"
        notes = {"latency": "ms a call: median and quartiles, log scale", "throughput": "images/s at the median"}
        for column, (name, note) in enumerate(notes.items()):
            left = 0.62 + WIDTH / 2 * column
            place = (left / WIDTH, bottom / height, (WIDTH / 2 - 0.92) / WIDTH, (ROW - 1.25) / height)
            axes = figure.add_axes(place)
            headed(axes, f"{name.capitalize()}, {said}", note)
            for number, (target, look) in enumerate(looks.items()):
                own = sorted((row for row in mine if row.target == target), key=lambda row: row.batch_size)
                if name == "throughput":
                    _line(axes, [row.batch_size for row in own], [row.images_per_s for row in own], look)
                else:
                    _latency(axes, own, look, aside=ASIDE ** (number - (len(looks) - 1) / 2))
            _batches(axes, sorted({row.batch_size for row in rows}))
            panels[name].append(axes)
    _same_scale(panels["latency"], logarithmic=True)
    _same_scale(panels["throughput"], logarithmic=False)
    return figure


def _line(axes: Axes, x: Sequence[float], y: Sequence[float], look: dict[str, Any]) -> None:
    axes.plot(x, y, marker="o", markersize=3.5, **look)


def _latency(axes: Axes, rows: Sequence[Row], look: dict[str, Any], aside: float) -> None:
    """Draw medians and quartiles at ``aside`` times their batch size, so that no target hides another's."""
    sizes, medians = [row.batch_size * aside for row in rows], [row.median_ms for row in rows]
    below = [row.median_ms - row.lower_quartile_ms for row in rows]
    above = [row.upper_quartile_ms - row.median_ms for row in rows]
    _line(axes, sizes, medians, look)
    axes.errorbar(sizes, medians, (below, above), fmt="none", ecolor=look["color"], elinewidth=0.9, capsize=2)


def _batches(axes: Axes, sizes: Sequence[int]) -> None:
    """Label the sizes that were measured, at equal distances for equal factors."""
    from matplotlib.ticker import NullLocator

    axes.set_xscale("log")
    axes.set_xlim(sizes[0] / 1.3, sizes[-1] * 1.3)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(sizes, [f"{size}" for size in sizes])
    axes.set_xlabel("batch size", fontsize=8, color=MUTED, labelpad=2)


def _same_scale(panels: Sequence[Axes], logarithmic: bool) -> None:
    """Give all numbers of threads one scale, by which they can be compared; a linear one begins at 0."""
    from matplotlib.ticker import LogLocator, NullLocator

    if logarithmic:
        for axes in panels:
            axes.set_yscale("log")
    lowest = min(axes.get_ylim()[0] for axes in panels) if logarithmic else 0.0
    highest = max(axes.get_ylim()[1] for axes in panels)
    for axes in panels:
        axes.set_ylim(lowest, highest)
        axes.yaxis.set_major_formatter("{x:,.0f}" if highest > 10 and not logarithmic else "{x:g}")
        if logarithmic:
            every = (1.0,) if highest > 1000 * lowest else (1.0, 3.0) if highest > 50 * lowest else (1.0, 2.0, 5.0)
            axes.yaxis.set_major_locator(LogLocator(subs=every, numticks=12))
            axes.yaxis.set_minor_locator(NullLocator())


def _list_targets(figure: Figure, rows: Sequence[Row], looks: dict[str, dict[str, Any]]) -> None:
    """Write what was timed and where, and of each target what it is made of and how near it came."""
    from matplotlib.lines import Line2D

    width, height = figure.get_size_inches()
    places = {"target": 0.72, "runtime": 2.45, "provider": 4.2, "file, MB": 6.75, "parity": 8.35, "top-1, %": 9.28}

    def write(line: float, x: float, text: str, **style: Any) -> None:
        figure.text(x / width, 1 - (EDGE + LINE * line) / height, text, va="center", **style)

    write(0, 0.3, rows[0].model, fontsize=13, fontweight="bold", color=INK)
    devices = "; ".join(dict.fromkeys(row.device for row in rows))
    about = f"{rows[0].input_size.replace('x', ' x ')}, {rows[0].samples} interleaved calls each; {devices}"
    write(1.15, 0.3, about, fontsize=8.5, color=MUTED)
    first = {target: next(row for row in rows if row.target == target) for target in looks}
    for number, target in enumerate([None, *looks]):
        texts = list(places)
        if target is not None:
            row, line = first[target], 1 - (EDGE + LINE * (2.6 + number)) / height
            key = Line2D([0.3 / width, 0.62 / width], [line, line])
            key.set(**looks[target] | {"linewidth": 2})
            figure.add_artist(key)
            top1 = "-" if row.top1_percent is None else f"{row.top1_percent:.2f}"
            texts = [target, row.runtime, row.provider, f"{row.file_mb:.2f}", row.compared, top1]
        for text, (name, x) in zip(texts, places.items(), strict=True):
            side = "left" if name in ("target", "runtime", "provider") else "right"
            write(2.6 + number, x, text, fontsize=8.5, color=MUTED if target is None else INK, ha=side)
