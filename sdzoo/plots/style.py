"""What the pictures have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, MUTED, RIGHT, WRONG = "#1a1a2e", "#6b7280", "#1b7f4d", "#b3261e"
RULE = "#d1d5db"


def headed(axes: Axes, title: str, note: str) -> None:
    """Write ``title`` and a muted ``note`` above ``axes``; of the frame leave a rule below, and lines to read it by."""
    above: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points"}
    axes.annotate(title, (0, 1), (0, 28), fontsize=11, fontweight="bold", color=INK, **above)
    axes.annotate(note, (0, 1), (0, 14), fontsize=8, color=MUTED, **above)
    axes.grid(axis="y", color=RULE, linewidth=0.5)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8, colors=INK, length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(RULE)
