"""The benchmark's CSV: what is written is read again, what is damaged is named, what differs is not compared."""

from __future__ import annotations

import csv
import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sdzoo.deploy.benchmark_csv import COLUMNS, compare, comparison_as_text, read_rows, write_rows
from sdzoo.deploy.benchmark_row import KINDS, Row
from sdzoo.errors import InputError


def row(target: str = "eager", threads: int = 1, batch_size: int = 8, median_ms: float = 4.0, **changes: Any) -> Row:
    made = Row(
        model="sd_resnet20.cifar10_jpeg",
        input_size="3x32x32",
        target=target,
        runtime="torch 2.14.1",
        provider="PyTorch cpu",
        device="AMD EPYC, 2 cores",
        threads=threads,
        batch_size=batch_size,
        samples=20,
        median_ms=median_ms,
        lower_quartile_ms=0.9 * median_ms,
        upper_quartile_ms=1.1 * median_ms,
        p99_ms=None,
        file_mb=1.14,
        peak_memory_mib=50.5,
        parity=2.4e-06,
        parity_limit=6.5e-4,
        parity_kind="logits",
        top1_percent=None,
    )
    return dataclasses.replace(made, **changes)


def written(path: Path, *rows: Row) -> Path:
    write_rows(rows, path)
    return path


POSITIVE = st.floats(1e-4, 1e9)  # milliseconds are written to 1e-4
TEXT = st.text(st.characters(categories=("L", "N", "P", "S")), min_size=1, max_size=20)


@st.composite
def any_row(draw: Any) -> Row:
    lower, median, upper, p99 = sorted(draw(POSITIVE) for _ in range(4))
    samples = draw(st.integers(1, 10_000))
    return row(
        *(draw(TEXT), draw(st.integers(1, 99)), draw(st.integers(1, 9999)), median),
        lower_quartile_ms=lower,
        upper_quartile_ms=upper,
        samples=samples,
        p99_ms=p99 if samples >= 500 else None,
        runtime=draw(TEXT),
        peak_memory_mib=draw(st.none() | POSITIVE),
        top1_percent=draw(st.none() | st.floats(0, 100)),
        parity=draw(st.floats(-100, 100)),
        parity_kind=draw(st.sampled_from(KINDS)),
    )


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(any_row(), min_size=1, max_size=5, unique_by=lambda row: row.place))
def test_what_is_written_is_read_again(rows: list[Row], tmp_path: Path) -> None:
    assert read_rows(written(tmp_path / "a.csv", *rows)) == rows


def test_any_spreadsheet_reads_it(tmp_path: Path) -> None:
    with open(written(tmp_path / "a.csv", row(), row(device='a, "b"', batch_size=4)), newline="") as file:
        first, second = csv.DictReader(file)
    assert list(first) == list(COLUMNS)
    assert (first["images_per_s"], first["p99_ms"], first["top1_percent"]) == ("2000.0", "", "")
    assert second["device"] == 'a, "b"'


def test_p99_stands_from_500_samples_on(tmp_path: Path) -> None:
    assert read_rows(written(tmp_path / "a.csv", row(samples=500, p99_ms=9.0)))[0].p99_ms == 9
    with pytest.raises(InputError, match=r"line 2: p99_ms is 9.0 of 499 samples"):
        read_rows(written(tmp_path / "a.csv", row(samples=499, p99_ms=9.0)))


def test_a_failed_writing_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = written(tmp_path / "a.csv", row()).read_bytes()

    def full(path: Path, *_: Any, **__: Any) -> int:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        write_rows([row(), row("onnx")], tmp_path / "a.csv")
    assert os.listdir(tmp_path) == ["a.csv"]
    assert (tmp_path / "a.csv").read_bytes() == before


Cells = list[list[str]]


def cell(name: str, value: str) -> Callable[[Cells], Any]:
    def change(table: Cells) -> None:
        table[2][COLUMNS.index(name)] = value

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (cell("median_ms", "fast"), "line 3: median_ms is 'fast'"),
        (cell("median_ms", "nan"), "line 3: median_ms is 'nan'"),
        (cell("median_ms", "1e400"), "line 3: median_ms is '1e400'"),
        (cell("median_ms", ""), "line 3: median_ms is ''"),
        (cell("median_ms", "4_0"), "line 3: median_ms is '4_0'"),
        (cell("median_ms", "99"), "line 3: the quartiles 3.6 and 4.4 are not about the median"),
        (cell("lower_quartile_ms", "0"), "line 3: the quartiles"),
        (cell("batch_size", "2.5"), "line 3: batch_size is '2.5'"),
        (cell("threads", "0"), "line 3: threads is '0'"),
        (cell("threads", "٣"), "line 3: threads is '٣'"),
        (cell("file_mb", "-1"), "line 3: file_mb is '-1'"),
        (cell("images_per_s", "many"), "line 3: images_per_s is 'many'"),
        (cell("target", ""), "line 3: target is ''"),
        (cell("target", "a\x1b[2J"), r"line 3: target is 'a\\x1b"),
        (cell("provider", "x" * 301), "line 3: provider is 'xxx"),
        (cell("parity_kind", "cosine"), "line 3: parity_kind is 'cosine'; known: logits, top1_loss_points"),
        (cell("batch_size", "8"), "line 3: eager, 1 threads, batch 8 comes twice"),
        (cell("model", "other"), "is of more than one model: other, sd_resnet20.cifar10_jpeg"),
        (lambda table: table[2].append("1"), "line 3: 20 cells for|line 3: 21 cells for 20 columns"),
        (lambda table: table[2].pop(), "line 3: 19 cells for 20 columns"),
        (lambda table: table[0].remove("samples"), "line 1: its columns are not a benchmark's: it lacks samples"),
        (lambda table: table[0].append("cost"), "line 1: its columns are not a benchmark's: it has 'cost'"),
        (lambda table: table[0].reverse(), "line 1: .* it has them in another order"),
        (lambda table: table.clear(), "line 1: .* lacks model, "),
        (lambda table: table.__delitem__(slice(1, None)), "a.csv has no rows"),
    ],
)
def test_damage_is_named(tmp_path: Path, change: Callable[[Cells], Any], said: str) -> None:
    path = written(tmp_path / "a.csv", row(), row(batch_size=16))
    with open(path, newline="") as file:
        table = list(csv.reader(file))
    change(table)
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows(table)
    with pytest.raises(InputError, match=said) as raised:
        read_rows(path)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\xff\xfe\x00", "is damaged"),
        (b'"' + b"x" * 140_000, "line 1"),
        (b" " * 10_000_001, "10000001 bytes; a bench"),
    ],
)
def test_files_that_are_no_table(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(InputError, match=said):
        read_rows(tmp_path / "a.csv")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read .*none.csv: No such file"):
        read_rows(tmp_path / "none.csv")
    with pytest.raises(InputError, match=r"cannot read .*: Is a directory"):
        read_rows(tmp_path)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits=st.lists(st.tuples(st.integers(0, 999), st.binary(max_size=4), st.integers(0, 9)), max_size=4))
def test_whatever_the_bytes_it_is_rows_or_a_refusal(edits: list[tuple[int, bytes, int]], tmp_path: Path) -> None:
    content = written(tmp_path / "a.csv", row(), row("onnx"), row(batch_size=16)).read_bytes()
    for place, put, cut in edits:
        place %= len(content) + 1
        content = content[:place] + put + content[place + cut :]
    (tmp_path / "a.csv").write_bytes(content)
    try:
        rows = read_rows(tmp_path / "a.csv")
    except InputError as error:
        said = str(error)
    else:
        said = ""
        assert read_rows(written(tmp_path / "b.csv", *rows)) == rows
    assert said == "" or said.isprintable()


def compared(tmp_path: Path, a: Sequence[Row], b: Sequence[Row]) -> list[Any]:
    return [dataclasses.astuple(c) for c in compare(written(tmp_path / "a.csv", *a), written(tmp_path / "b.csv", *b))]


def test_rows_are_matched_by_target_threads_and_batch(tmp_path: Path) -> None:
    a = [row("eager", 1, 8, 10), row("onnx", 1, 8, 4), row("eager", 2, 8, 6), row("gone", 2, 8, 6)]
    b = [row("onnx", 1, 8, 5), row("eager", 2, 8, 6.6), row("eager", 1, 8, 5), row("eager", 1, 32, 9)]
    assert compared(tmp_path, a, b) == [
        ("eager", 1, 8, 10, 5, 0.5, False),
        ("onnx", 1, 8, 4, 5, 1.25, False),
        ("eager", 1, 32, None, 9, None, None),
        ("eager", 2, 8, 6, 6.6, pytest.approx(1.1), True),
        ("gone", 2, 8, 6, None, None, None),
    ]


@pytest.mark.parametrize(("lower", "overlap"), [(4.39, True), (4.4, True), (4.41, False)])
def test_quartiles_that_touch_overlap(tmp_path: Path, lower: float, overlap: bool) -> None:
    other = row(median_ms=5.0, lower_quartile_ms=lower)
    assert compared(tmp_path, [row(upper_quartile_ms=4.4)], [other])[0][-1] is overlap
    assert compared(tmp_path, [other], [row(upper_quartile_ms=4.4)])[0][-1] is overlap


def test_newer_versions_are_what_is_compared(tmp_path: Path) -> None:
    assert compared(tmp_path, [row()], [row(runtime="torch 3", samples=40, file_mb=2.0)])[0][5] == 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": "sd_resnet32"}, "model of eager is sd_resnet20.cifar10_jpeg in .*a.csv, sd_resnet32 in .*b.csv"),
        ({"input_size": "3x64x64"}, "input_size of eager is 3x32x32 in .*, 3x64x64 in "),
        ({"device": "Other, 4 cores"}, "device of eager is AMD EPYC, 2 cores in .*, Other, 4 cores in"),
        ({"provider": "PyTorch cuda"}, "provider of eager is PyTorch cpu in .*, PyTorch cuda in"),
        ({"batch_size": 9}, "have no target, threads and batch size in common"),
    ],
)
def test_what_differs_is_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        compared(tmp_path, [row()], [dataclasses.replace(row(), **changes)])


def test_other_columns_are_refused(tmp_path: Path) -> None:
    (tmp_path / "b.csv").write_text("target,ms\neager,1\n")
    with pytest.raises(InputError, match=r"b.csv, line 1: its columns are not .* lacks model, .* and has 'ms'"):
        compare(written(tmp_path / "a.csv", row()), tmp_path / "b.csv")


def test_the_comparison_for_a_terminal(tmp_path: Path) -> None:
    a, b = written(tmp_path / "a.csv", row(), row("x")), written(tmp_path / "b.csv", row(median_ms=5), row("y"))
    lines = [line.split() for line in comparison_as_text(compare(a, b)).splitlines()]
    assert lines[0] == ["target", "threads", "batch", "A", "ms", "B", "ms", "B", "/", "A", "quartiles"]
    assert lines[1] == ["eager", "1", "8", "4.00", "5.00", "1.250", "apart"]
    assert lines[2:] == [
        ["x", "1", "8", "4.00", "-", "-", "only", "in", "A"],
        ["y", "1", "8", "-", "4.00", "-", "only", "in", "B"],
    ]
