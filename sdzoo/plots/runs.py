"""Training runs, laid over each other: what the method's paper looks at, from the tables that a run writes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sdzoo.errors import InputError
from sdzoo.extras import require
from sdzoo.files import atomic_path
from sdzoo.plots.run_record import GRADIENT, RunRecord, read_run
from sdzoo.plots.style import INK, MUTED, headed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which the colour-blind tell apart too; the blue is darker, the yellow left out.
COLOURS = ("#1f3f77", "#d55e00", "#009e73", "#56b4e9", "#cc79a7", "#e69f00", "#6b7280")
DASHES = ("solid", (0, (4, 1.5)), (0, (1, 1)))
MOST = len(COLOURS) * len(DASHES)
SUFFIXES = (".png", ".svg")
NAME_LENGTH = 40
WINDOW = 100
# In inches: a line of the list of runs, the edge around it, a row of panels with what stands above and below it
LINE, EDGE, ROW = 0.21, 0.32, 3.0


def draw_runs(folders: Sequence[str | Path], output: str | Path) -> list[Path]:
    """Draw one or several runs into ``output`` as PNG and as SVG, and return the two files.

    By epoch: training loss, validation error, and the mean gradient magnitude of the first convolution, which is the
    paper's figure of constant against stochastic depth. By step: the live blocks. Where finished runs have different
    p_L: test error against p_L; validation error if one of them has not measured a test error, which the axis says.

    Args:
        folders: Of runs, finished or not.
        output: The two files' common name; a suffix ``.png`` or ``.svg`` is left off.

    Raises:
        InputError: with every fault of every folder: no run's, a table without rows, a damaged line.
        ImportError: without the extra ``plots``.
    """
    require("matplotlib")
    from matplotlib import rc_context

    output = Path(output)
    stem = output.name.removesuffix(output.suffix) if output.suffix in SUFFIXES else output.name
    if output.is_dir() or not stem:
        raise InputError(f"{output} is a folder; name a file")
    runs = _read(folders)
    files = [output.with_name(stem + suffix) for suffix in SUFFIXES]
    # without salt and date, the same runs give the same bytes
    with rc_context({"svg.hashsalt": "sdzoo"}):
        figure = _figure(runs)
        with atomic_path(files[0]) as png, atomic_path(files[1]) as svg:
            figure.savefig(png, format="png")
            figure.savefig(svg, format="svg", metadata={"Date": None})
    return files


def _read(folders: Sequence[str | Path]) -> dict[str, RunRecord]:
    """Return the runs by the names that tell them apart: their folders', or else the whole paths."""
    paths = [Path(folder) for folder in folders]
    faults = [] if paths else ["no runs given; name the folder of at least one"]
    whole = [path.resolve() for path in paths]
    faults += [f"{path} is given twice" for n, path in enumerate(paths) if whole[n] in whole[:n]]
    if len(paths) > MOST:
        faults.append(f"{len(paths)} runs given; at most {MOST} can be told apart")
    runs = []
    for path in paths:
        try:
            runs.append(read_run(path))
        except InputError as error:
            faults.append(str(error))
    if faults:
        raise InputError("; ".join(faults))
    names = [path.name for path in whole]
    names = names if len(set(names)) == len(names) else [str(path) for path in paths]
    return dict(zip(names, runs, strict=True))


def _figure(runs: dict[str, RunRecord]) -> Figure:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    finished = [run for run in runs.values() if run.final_survival_prob is not None]
    compared = len({run.final_survival_prob for run in finished}) > 1
    columns, top = 3 if compared else 2, EDGE + LINE * (len(runs) + 1)
    width, height = 4.2 * columns, top + 2 * ROW
    figure = Figure(figsize=(width, height), dpi=130, facecolor="white")
    looks: dict[str, dict[str, Any]] = {
        name: {"color": COLOURS[n % len(COLOURS)], "linestyle": DASHES[n // len(COLOURS)], "linewidth": 1.5}
        for n, name in enumerate(runs)
    }
    _list_runs(figure, runs, looks)

    def panel(row: int, column: int, title: str, note: str, x: str, span: int = 1) -> Axes:
        left, right = 0.62 + 4.2 * column, 4.2 * (column + span) - 0.3
        bottom = (1 - row) * ROW + 0.5
        axes = figure.add_axes((left / width, bottom / height, (right - left) / width, (ROW - 1.15) / height))
        headed(axes, title, note)
        axes.set_xlabel(x, fontsize=8, color=MUTED, labelpad=2)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6 * span, integer=True))
        return axes

    per_epoch = "mean of each epoch"
    loss = panel(0, 0, "Training loss", per_epoch, "epoch")
    error = panel(0, 1, "Validation error", "% of the images; the ring: best epoch", "epoch")
    gradient = panel(1, 0, "Gradient of the first convolution", "mean magnitude, log scale", "epoch")
    for name, run in runs.items():
        epochs = run.log["epoch"]
        _line(loss, epochs, run.log["train_loss"], looks[name])
        _line(error, epochs, 100 - run.log["val_top1_percent"], looks[name])
        magnitude = run.log[GRADIENT]
        _line(gradient, epochs, np.where(magnitude > 0, magnitude, np.nan), looks[name])
    _mark_best_epochs(error, runs, looks)
    stepwise = any(run.steps for run in runs.values())
    note = f"thin: each step; thick: running mean of up to {WINDOW} steps" if stepwise else per_epoch
    live = panel(1, 1, "Live blocks", note, "optimizer step", span=columns - 1)
    for name, run in runs.items():
        _draw_live_blocks(live, run, looks[name])
    for axes in (loss, error, gradient, live):
        _scale(axes, logarithmic=axes is gradient)

    if compared:
        tested = all(run.test_top1_percent is not None for run in finished)
        what, note = ("Test", "weights of the best epoch") if tested else ("Validation", "%, of the best epoch")
        _draw_errors(panel(0, 2, f"{what} error against $p_L$", note, "$p_L$"), runs, looks, tested)
    return figure


def _line(axes: Axes, x: NDArray[np.float64], y: NDArray[np.float64], look: dict[str, Any]) -> None:
    """Draw through the finite points; a single one, which has no line, as a dot."""
    there = np.isfinite(y)
    axes.plot(x[there], y[there], marker="." if there.sum() == 1 else "", solid_capstyle="round", **look)


def _mark_best_epochs(axes: Axes, runs: dict[str, RunRecord], looks: dict[str, dict[str, Any]]) -> None:
    """Draw a ring around each run's best epoch, wider than those that are nearly there already: none hides another."""
    width = max(float(run.log["epoch"][-1]) for run in runs.values())
    height = max([run.best_val_error_percent for run in runs.values() if run.best_epoch is not None], default=1.0)
    marked: list[tuple[float, float]] = []
    for name, run in runs.items():
        if run.best_epoch is None:
            continue
        x, y = float(run.best_epoch), run.best_val_error_percent
        here = sum(abs(x - a) < 0.04 * width and abs(y - b) < 0.1 * height for a, b in marked)
        marked.append((x, y))
        axes.scatter(
            [x],
            [y],
            s=(4.5 + 3.5 * here) ** 2,
            facecolors="none",
            edgecolors=looks[name]["color"],
            linewidths=1.3,
            zorder=3,
        )


def _scale(axes: Axes, logarithmic: bool) -> None:
    """Set the limits, from 0; on a logarithmic axis two of 1, 2, 5, 10, ... at least are in sight. Or say: no data."""
    from matplotlib.ticker import LogLocator, NullLocator

    x, y = (np.concatenate([np.asarray(line.get_data()[i], np.float64) for line in axes.lines]) for i in (0, 1))
    if not y.size:
        axes.set(xticks=(), yticks=())
        axes.text(0.5, 0.5, "not recorded", transform=axes.transAxes, fontsize=8, color=MUTED, ha="center")
        return
    axes.set_xlim(0, 1.02 * x.max())
    if not logarithmic:
        axes.set_ylim(0, 1.05 * y.max() or 1)
        return
    lowest, highest = y.min() / 1.2, y.max() * 1.2
    widen = max(1.0, math.sqrt(10 * lowest / highest))
    axes.set_yscale("log")
    axes.set_ylim(lowest / widen, highest * widen)
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if highest > 1000 * lowest else (1.0, 2.0, 5.0), numticks=9))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())


def _draw_live_blocks(axes: Axes, run: RunRecord, look: dict[str, Any]) -> None:
    if run.steps is None:
        _line(axes, run.log["step"], run.log["live_blocks"], look)
        return
    step, live = run.steps["step"], run.steps["live_blocks"]
    # a hundred thousand strokes in an SVG would be slow to open: they become a picture inside it
    axes.plot(step, live, color=look["color"], linewidth=0.4, alpha=0.3, rasterized=True)
    width = min(WINDOW, max(1, len(step) // 10))
    mean, centre = (np.convolve(values, np.full(width, 1 / width), mode="valid") for values in (live, step))
    _line(axes, centre, mean, look)


def _draw_errors(axes: Axes, runs: dict[str, RunRecord], looks: dict[str, dict[str, Any]], tested: bool) -> None:
    """Draw a dot for each finished run, and through the mean of each p_L a line for each model."""
    points: dict[str, dict[float, list[float]]] = {}
    for name, run in runs.items():
        p = run.final_survival_prob
        if p is None:
            continue
        test_top1 = run.test_top1_percent if tested else None
        error = run.best_val_error_percent if test_top1 is None else 100 - test_top1
        axes.scatter([p], [error], s=36, color=looks[name]["color"], zorder=3)
        points.setdefault(run.model, {}).setdefault(p, []).append(error)
    for by_p in points.values():
        means = [(p, sum(errors) / len(errors)) for p, errors in sorted(by_p.items())]
        axes.plot(*zip(*means, strict=True), color=MUTED, linewidth=0.8, zorder=2)
    survival = sorted({p for by_p in points.values() for p in by_p})
    axes.set_xticks(survival, [f"{p:g}" for p in survival])
    axes.set_xlim(survival[0] - 0.1, survival[-1] + 0.1)
    axes.margins(y=0.25)
    axes.set_ylabel("test error, %" if tested else "validation error, %", fontsize=8, color=MUTED)


def _list_runs(figure: Figure, runs: dict[str, RunRecord], looks: dict[str, dict[str, Any]]) -> None:
    """Write above the panels what the runs are called, and what came out."""
    from matplotlib.lines import Line2D

    width, height = figure.get_size_inches()
    places = {"run": 0.72, "model": 3.5, "$p_L$": 5.4, "epochs": 6.2, "val. error, %": 7.2, "test error, %": 8.1}

    def write(line: int, texts: Sequence[str], colour: str) -> None:
        for text, (name, x) in zip(texts, places.items(), strict=True):
            side = "left" if name in ("run", "model") else "right"
            y = 1 - (EDGE + LINE * line) / height
            figure.text(x / width, y, text, fontsize=8.5, color=colour, ha=side, va="center")

    write(0, list(places), MUTED)
    for number, (name, run) in enumerate(runs.items(), start=1):
        y = 1 - (EDGE + LINE * number) / height
        key = Line2D([0.3 / width, 0.62 / width], [y, y])
        key.set(**looks[name] | {"linewidth": 2})
        figure.add_artist(key)
        done = int(run.log["epoch"][-1])
        p, top1, error = run.final_survival_prob, run.test_top1_percent, run.best_val_error_percent
        shown = [
            name if len(name) <= NAME_LENGTH else f"…{name[1 - NAME_LENGTH :]}",
            run.model,
            "-" if p is None else f"{p:g}",
            f"{done}" if run.finished else f"{done} of {run.epochs}",
            "-" if math.isnan(error) else f"{error:.2f} at {run.best_epoch}",
            "-" if top1 is None else f"{100 - top1:.2f}",
        ]
        write(number, shown, INK)
