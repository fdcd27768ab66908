"""Every picture that sdzoo draws."""

from sdzoo.plots.benchmark import draw_benchmark
from sdzoo.plots.report import draw_report
from sdzoo.plots.runs import draw_runs
from sdzoo.plots.schedules import draw_schedules, survival_chart

__all__ = ["draw_benchmark", "draw_report", "draw_runs", "draw_schedules", "survival_chart"]
