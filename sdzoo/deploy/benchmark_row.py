"""A row of the benchmark's table: what ran, where, how long it took, and how near it came to the model."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

LEAST_FOR_P99 = 500  # samples; of fewer, the hundredth part is a handful
LOGITS, TOP1_LOSS = "logits", "top1_loss_points"
KINDS = (LOGITS, TOP1_LOSS)


@dataclass(frozen=True)
class Row:
    """One target at one number of threads and one batch size.

    Attributes:
        model: Its name, with the tag of bundled weights.
        input_size: As ``3x32x32``.
        target: As ``onnx-int8``.
        runtime: What computed it, with its version.
        provider: What really ran: an ONNX Runtime provider, ``PyTorch cpu``, ...
        device: The processor, or the GPU.
        threads: Within one operator.
        batch_size: Images a call.
        samples: Timed calls.
        median_ms: Of one call; so are the quartiles.
        lower_quartile_ms: A quarter of the calls took less.
        upper_quartile_ms: A quarter took more.
        p99_ms: One call in a hundred took longer; None below 500 samples.
        file_mb: What is shipped: the ONNX file, the engine, or what ``torch.save`` writes; in 10^6 bytes.
        peak_memory_mib: The most that the target's process held in memory so far, in smaller batches too, above what it
            held before it opened the model; None where the system does not say, and on a GPU.
        parity: How far its outputs are from the eager model's, in the process that was timed and the batch that comes
            nearest its limit.
        parity_limit: How far they may be.
        parity_kind: ``logits``: ``parity`` is their difference; ``top1_loss_points``: what top-1 loses.
        top1_percent: On the images given, None if they have no labels.
    """

    model: str
    input_size: str
    target: str
    runtime: str
    provider: str
    device: str
    threads: int
    batch_size: int
    samples: int
    median_ms: float
    lower_quartile_ms: float
    upper_quartile_ms: float
    p99_ms: float | None
    file_mb: float
    peak_memory_mib: float | None
    parity: float
    parity_limit: float
    parity_kind: str
    top1_percent: float | None

    @property
    def images_per_s(self) -> float:
        """Throughput at the median."""
        return self.batch_size / self.median_ms * 1000

    @property
    def place(self) -> tuple[int, int, str]:
        """What tells the rows of one table apart: threads, batch size, target."""
        return self.threads, self.batch_size, self.target

    @property
    def compared(self) -> str:
        """Return parity and its limit in words."""
        unit = " points" if self.parity_kind == TOP1_LOSS else ""
        return f"{self.parity:.2g} of {self.parity_limit:.2g}{unit}"


@dataclass(frozen=True)
class Spread:
    """Median, quartiles and 99th percentile of calls, in milliseconds."""

    median: float
    lower: float
    upper: float
    p99: float | None


def spread(milliseconds: Sequence[float]) -> Spread:
    """Return how ``milliseconds`` are spread, to a tenth of a microsecond."""
    lower, median, upper = statistics.quantiles(milliseconds, n=4, method="inclusive")
    enough = len(milliseconds) >= LEAST_FOR_P99
    p99 = statistics.quantiles(milliseconds, n=100, method="inclusive")[98] if enough else None
    return Spread(round(median, 4), round(lower, 4), round(upper, 4), None if p99 is None else round(p99, 4))


def as_text(rows: Sequence[Row]) -> str:
    """Return ``rows`` as a table for a terminal, below a line that says what they have in common."""
    titles = ["target", "threads", "batch", "median ms", "quartiles ms", "p99 ms", "images/s", "file MB", "peak MiB"]
    shared = list(dict.fromkeys(row.device for row in rows))
    if differ := len(shared) > 1:
        shared = []
    lines = [[*titles, "parity", "top-1 %", "provider", *["device"] * differ]]
    for row in rows:
        quartiles = f"{row.lower_quartile_ms:.2f} - {row.upper_quartile_ms:.2f}"
        cells = [row.target, f"{row.threads}", f"{row.batch_size}", f"{row.median_ms:.2f}", quartiles]
        cells += [_or_dash(row.p99_ms, 2), f"{row.images_per_s:.0f}", f"{row.file_mb:.2f}"]
        cells += [_or_dash(row.peak_memory_mib, 0), row.compared, _or_dash(row.top1_percent, 2), row.provider]
        lines.append([*cells, *[row.device] * differ])
    runtimes = ", ".join(dict.fromkeys(row.runtime for row in rows))
    head = "; ".join([f"{rows[0].model}, {rows[0].input_size}, {rows[0].samples} samples", *shared, runtimes])
    return "\n".join([head, *aligned(lines, left=(0, len(titles) + 2, len(titles) + 3))])


def aligned(lines: Sequence[Sequence[str]], left: Sequence[int]) -> list[str]:
    """Return ``lines`` of cells as text, each column as wide as it must be, flush right but for those in ``left``."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = []
    for cells in lines:
        padded = [
            cell.ljust(width) if index in left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        rows.append("  ".join(padded).rstrip())
    return rows


def _or_dash(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
