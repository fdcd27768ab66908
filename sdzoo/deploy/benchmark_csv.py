"""The benchmark's table as a CSV file, written whole, read with care, and two of them compared."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdzoo.deploy.benchmark_row import KINDS, LEAST_FOR_P99, Row, aligned
from sdzoo.errors import InputError
from sdzoo.files import atomic_path

DERIVED = "images_per_s"  # for whoever reads the file in a spreadsheet
FIELDS = {field.name: str(field.type) for field in dataclasses.fields(Row)}
_PLACE = list(FIELDS).index("p99_ms") + 1
COLUMNS = (*list(FIELDS)[:_PLACE], DERIVED, *list(FIELDS)[_PLACE:])
MOST_BYTES = 10_000_000
CONTEXT = ("model", "input_size")


@dataclass(frozen=True)
class Comparison:
    """Rows of two tables at one place; where one of them has none, its median is None.

    Attributes:
        target: As in both.
        threads: As in both.
        batch_size: As in both.
        a_median_ms: Of the first table.
        b_median_ms: Of the second.
        ratio: Second by first: below 1, the second is faster.
        overlap: Whether the ranges between their quartiles have a value in common: then they may be as fast.
    """

    target: str
    threads: int
    batch_size: int
    a_median_ms: float | None
    b_median_ms: float | None
    ratio: float | None
    overlap: bool | None


def write_rows(rows: Sequence[Row], path: str | Path) -> None:
    """Write ``rows`` to ``path``; a file that is there is replaced by a whole one.

    Raises:
        InputError, OSError: as :func:`sdzoo.files.atomic_path`.
    """
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow(dataclasses.asdict(row) | {DERIVED: round(row.images_per_s, 4)})
    with atomic_path(path) as temporary:
        temporary.write_text(out.getvalue(), encoding="utf-8", newline="")


def read_rows(path: str | Path) -> list[Row]:
    """Return the rows of the file that :func:`write_rows` wrote to ``path``.

    Raises:
        InputError: naming the line and the column of what no benchmark writes.
    """
    path = Path(path)
    try:
        if path.stat().st_size > MOST_BYTES:
            raise InputError(f"{path} has {path.stat().st_size} bytes; a benchmark's table has at most {MOST_BYTES}")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is damaged: {error}") from None
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows: dict[tuple[int, int, str], Row] = {}
    try:
        _check_header(next(reader, []))
        for cells in reader:
            row = _row(cells)
            if row.place in rows:
                raise ValueError(f"{row.target}, {row.threads} threads, batch {row.batch_size} comes twice")
            rows[row.place] = row
    except (ValueError, csv.Error) as error:
        raise InputError(f"{path}, line {max(1, reader.line_num)}: {error}") from None
    if not rows:
        raise InputError(f"{path} has no rows")
    for name in CONTEXT:
        if len(found := {getattr(row, name) for row in rows.values()}) > 1:
            raise InputError(f"{path} is of more than one {name}: {', '.join(sorted(found))}")
    return list(rows.values())


def compare(a: str | Path, b: str | Path) -> list[Comparison]:
    """Return the rows of two tables of one model side by side, matched by target, threads and batch size.

    Raises:
        InputError: saying what differs, if they are of other models, or what they have in common ran on other devices;
            if they have nothing in common; and as :func:`read_rows`.
    """
    first, second = ({row.place: row for row in read_rows(path)} for path in (a, b))
    ours, theirs = next(iter(first.values())), next(iter(second.values()))
    for name in CONTEXT:
        _check_equal(name, ours, theirs, a, b)
    if not first.keys() & second.keys():
        raise InputError(f"{a} and {b} have no target, threads and batch size in common")
    for place in first.keys() & second.keys():
        for name in ("provider", "device"):
            _check_equal(name, first[place], second[place], a, b)
    found = []
    for place in sorted(first.keys() | second.keys()):
        threads, batch_size, target = place
        before, after = first.get(place), second.get(place)
        ratio = overlap = None
        if before and after:
            ratio = after.median_ms / before.median_ms
            lower = max(before.lower_quartile_ms, after.lower_quartile_ms)
            overlap = lower <= min(before.upper_quartile_ms, after.upper_quartile_ms)
        a_ms, b_ms = (row.median_ms if row else None for row in (before, after))
        found.append(Comparison(target, threads, batch_size, a_ms, b_ms, ratio, overlap))
    return found


def comparison_as_text(comparisons: Sequence[Comparison]) -> str:
    """Return ``comparisons`` as a table for a terminal."""
    lines = [["target", "threads", "batch", "A ms", "B ms", "B / A", "quartiles"]]
    for row in comparisons:
        medians = ["-" if ms is None else f"{ms:.2f}" for ms in (row.a_median_ms, row.b_median_ms)]
        ratio, said = "-", f"only in {'A' if row.b_median_ms is None else 'B'}"
        if row.ratio is not None:
            ratio, said = f"{row.ratio:.3f}", "overlap" if row.overlap else "apart"
        lines.append([row.target, f"{row.threads}", f"{row.batch_size}", *medians, ratio, said])
    return "\n".join(aligned(lines, left=(0, len(lines[0]) - 1)))


def _check_equal(name: str, one: Row, other: Row, a: str | Path, b: str | Path) -> None:
    ours, theirs = getattr(one, name), getattr(other, name)
    if ours != theirs:
        raise InputError(f"cannot compare: {name} of {one.target} is {ours} in {a}, {theirs} in {b}")


def _check_header(header: list[str]) -> None:
    if header == list(COLUMNS):
        return
    lacks, unknown = ([n for n in x if n not in y] for x, y in ((COLUMNS, header), (header, COLUMNS)))
    said = [f"lacks {', '.join(lacks)}"] * bool(lacks) + [f"has {', '.join(map(repr, unknown))[:200]}"] * bool(unknown)
    raise ValueError(f"its columns are not a benchmark's: it {' and '.join(said) or 'has them in another order'}")


def _row(cells: list[str]) -> Row:
    if len(cells) != len(COLUMNS):
        raise ValueError(f"{len(cells)} cells for {len(COLUMNS)} columns")
    named = dict(zip(COLUMNS, cells, strict=True))
    _number("images_per_s", named.pop(DERIVED), float)
    values: dict[str, Any] = {}
    for name, kind in FIELDS.items():
        cell = named[name]
        if kind.endswith("| None") and not cell:
            values[name] = None
        elif kind == "str":
            values[name] = _text(name, cell)
        else:
            values[name] = _number(name, cell, int if kind == "int" else float)
    row = Row(**values)
    if not 0 < row.lower_quartile_ms <= row.median_ms <= row.upper_quartile_ms:
        raise ValueError(f"the quartiles {row.lower_quartile_ms} and {row.upper_quartile_ms} are not about the median")
    if row.p99_ms is not None and (row.samples < LEAST_FOR_P99 or row.p99_ms < row.upper_quartile_ms):
        raise ValueError(f"p99_ms is {row.p99_ms} of {row.samples} samples")
    if row.parity_kind not in KINDS:
        raise ValueError(f"parity_kind is {row.parity_kind!r}; known: {', '.join(KINDS)}")
    return row


def _text(name: str, cell: str) -> str:
    if not cell or len(cell) > 300 or not cell.isprintable():
        raise ValueError(f"{name} is {cell[:40]!r}")
    return cell


def _number(name: str, cell: str, kind: Callable[[str], float]) -> float:
    try:
        value = kind(cell)
    except ValueError:
        raise ValueError(f"{name} is {cell[:40]!r}") from None
    least = 1 if kind is int else -100 if name == "parity" else 0
    if not math.isfinite(value) or not least <= value < 1e12 or not cell.isascii() or "_" in cell:
        raise ValueError(f"{name} is {cell[:40]!r}")
    return value
