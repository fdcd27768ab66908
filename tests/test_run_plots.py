"""Pictures of training runs: what is drawn is what the tables say, and a damaged table is named."""

from __future__ import annotations

import csv
import json
import xml.etree.ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from sdzoo.errors import InputError
from sdzoo.plots import draw_runs

STEPS = ["step", "epoch", "lr", "loss", "live_blocks", "first_conv_gradient"]
LOG = [
    *("epoch", "step", "lr", "train_loss", "live_blocks", "seconds"),
    *("val_loss", "val_top1_percent", "first_conv_gradient"),
]
LOSS, ERROR, GRADIENT, LIVE, COMPARISON = range(5)

Draw = Callable[..., Figure]


def write_run(folder: Path, p: float = 0.5, epochs: int = 6, done: int | None = None, seed: int = 0) -> Path:
    """Write the folder of a run of 40 steps an epoch, finished unless fewer epochs are ``done``."""
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(f"model: sd_resnet20\nepochs: {epochs}\nlr: 1e-1\ndrop_path: {1 - p}\n")
    steps = [
        [step + 1, step // 40 + 1, 0.1, random.random() + 1, random.integers(3, 10), random.random() / 100]
        for step in range(40 * (epochs if done is None else done))
    ]
    rows = []
    for epoch in range(1, (epochs if done is None else done) + 1):
        mine = [row for row in steps if row[1] == epoch]
        live, gradient = np.mean([row[4] for row in mine]), np.mean([row[5] for row in mine])
        accuracy = [31.5, 48.25, 77.5, 60, 77.5, 70][(epoch - 1) % 6] + seed
        rows.append([epoch, 40 * epoch, 0.1, 2 / epoch + seed, live, 5.2, 1, accuracy, gradient])
    write_table(folder / "log.csv", LOG, rows)
    write_table(folder / "steps.csv", STEPS, steps)
    if done is None:
        write_result(folder, final_survival_prob=p, test_top1_percent=75 + seed)
    return folder


def write_table(file: Path, header: list[str], rows: list[list[Any]]) -> None:
    with open(file, "w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(header)
        writer.writerows(rows)


def write_result(folder: Path, **values: Any) -> None:
    result = {"best_epoch": 3, "val_top1_percent": 77.5, "model": "sd_resnet20", "blocks": 9, "survival_probs": [1.0]}
    (folder / "result.json").write_text(json.dumps(result | values))


def column(folder: Path, table: str, name: str) -> list[float]:
    with open(folder / table, newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file)]


def points(figure: Figure, panel: int) -> list[list[tuple[float, float]]]:
    """Return the points of each line of a panel."""
    return [[(float(x), float(y)) for x, y in line.get_xydata()] for line in figure.axes[panel].lines]  # type: ignore[union-attr]


def dots(figure: Figure, panel: int) -> list[list[float]]:
    """Return the scattered dots of a panel, in the order of the runs."""
    return [[float(n) for n in dot.get_offsets()[0]] for dot in figure.axes[panel].collections]  # type: ignore[index]


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.texts]


def heading(figure: Figure, panel: int) -> str:
    return " / ".join(text.get_text() for text in figure.axes[panel].texts)


@pytest.fixture
def draw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Draw:
    """Return a function that draws runs into ``picture.png`` and ``.svg``, and returns what was drawn."""
    figures: list[Figure] = []
    save = Figure.savefig

    def savefig(figure: Figure, *args: Any, **kwargs: Any) -> None:
        figures.append(figure)
        save(figure, *args, **kwargs)

    def draw(*folders: Path) -> Figure:
        monkeypatch.setattr(Figure, "savefig", savefig)
        draw_runs(folders, tmp_path / "picture")
        return figures[-1]

    return draw


def test_the_lines_are_the_tables(tmp_path: Path, draw: Draw) -> None:
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b", seed=1)]
    figure = draw(*runs)
    assert len(figure.axes) == 4  # one p_L: nothing to compare
    for panel, name in ((LOSS, "train_loss"), (GRADIENT, "first_conv_gradient")):
        expected = [list(zip(range(1, 7), column(run, "log.csv", name), strict=True)) for run in runs]
        assert points(figure, panel) == expected
    accuracies = [column(run, "log.csv", "val_top1_percent") for run in runs]
    assert points(figure, ERROR) == [[(n + 1, 100 - top1) for n, top1 in enumerate(run)] for run in accuracies]
    assert dots(figure, ERROR) == [[3, 22.5], [3, 21.5]]  # the first of two equal epochs
    thin, thick = points(figure, LIVE)[::2], points(figure, LIVE)[1::2]
    for run, each, mean in zip(runs, thin, thick, strict=True):
        live = column(run, "steps.csv", "live_blocks")
        assert each == list(zip(range(1, 241), live, strict=True))
        # a tenth of 240 steps, at their middle
        expected_mean = [(start + 12.5, sum(live[start : start + 24]) / 24) for start in range(217)]
        assert np.allclose(mean, expected_mean, rtol=0, atol=1e-9)
    assert [figure.axes[n].get_yscale() for n in range(4)] == ["linear", "linear", "log", "linear"]
    assert [axes.get_xlabel() for axes in figure.axes] == ["epoch", "epoch", "epoch", "optimizer step"]


def test_a_line_has_the_colour_of_its_name(tmp_path: Path, draw: Draw) -> None:
    figure = draw(write_run(tmp_path / "first"), write_run(tmp_path / "second"))
    keys = [line.get_color() for line in figure.artists]  # type: ignore[attr-defined]
    assert len(set(keys)) == 2
    assert [texts(figure).index(name) for name in ("first", "second")] == [6, 12]
    for panel in (LOSS, ERROR, GRADIENT):
        assert [line.get_color() for line in figure.axes[panel].lines] == keys
    assert [line.get_color() for line in figure.axes[LIVE].lines] == [keys[0], keys[0], keys[1], keys[1]]


def test_what_came_out_stands_above(tmp_path: Path, draw: Draw) -> None:
    figure = draw(write_run(tmp_path / "whole"), write_run(tmp_path / "half", done=2))
    assert texts(figure)[6:12] == ["whole", "sd_resnet20", "0.5", "6", "22.50 at 3", "25.00"]
    assert texts(figure)[12:] == ["half", "sd_resnet20", "-", "2 of 6", "51.75 at 2", "-"]


def test_test_error_is_drawn_against_p(tmp_path: Path, draw: Draw) -> None:
    runs = [write_run(tmp_path / f"p{p}-{seed}", p, seed=seed) for p, seed in ((0.5, 0), (1.0, 1), (0.5, 2), (0.2, 3))]
    figure = draw(*runs, write_run(tmp_path / "going on", 0.8, done=3))
    assert dots(figure, COMPARISON) == [[0.5, 25], [1, 24], [0.5, 23], [0.2, 22]]
    assert points(figure, COMPARISON) == [[(0.2, 22), (0.5, 24), (1, 24)]]  # through the means
    axes = figure.axes[COMPARISON]
    assert axes.get_ylabel() == "test error, %"
    assert heading(figure, COMPARISON).startswith("Test error against")
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0.2", "0.5", "1"]


def test_rings_of_runs_whose_best_epochs_coincide_lie_around_each_other(tmp_path: Path, draw: Draw) -> None:
    runs = [write_run(tmp_path / name, seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 0), ("d", 20))]
    figure = draw(*runs)
    rings: Any = figure.axes[ERROR].collections
    widths = [float(ring.get_sizes()[0]) ** 0.5 for ring in rings]
    assert dots(figure, ERROR) == [[3, 22.5]] * 3 + [[3, 2.5]]
    assert min(widths[1] - widths[0], widths[2] - widths[1]) > 2 * rings[0].get_linewidth()[0]
    assert widths[3] == widths[0]
    assert all(ring.get_facecolor().size == 0 for ring in rings), "lines are seen through them"


def test_without_a_test_error_everywhere_validation_error_is_compared(tmp_path: Path, draw: Draw) -> None:
    runs = [write_run(tmp_path / "a", 0.5), write_run(tmp_path / "b", 1.0, seed=1)]
    write_result(runs[1], final_survival_prob=1.0, test_top1_percent=None)
    figure = draw(*runs)
    assert dots(figure, COMPARISON) == [[0.5, 22.5], [1, 21.5]]
    assert figure.axes[COMPARISON].get_ylabel() == "validation error, %"
    assert heading(figure, COMPARISON).startswith("Validation error against")


def test_lines_join_runs_of_one_model_only(tmp_path: Path, draw: Draw) -> None:
    runs = [write_run(tmp_path / "a", 0.5), write_run(tmp_path / "b", 1.0), write_run(tmp_path / "c", 0.2)]
    (runs[2] / "recipe.yaml").write_text("model: sd_resnet56\nepochs: 6\n")
    assert points(draw(*runs), COMPARISON) == [[(0.5, 25), (1, 25)], [(0.2, 25)]]


def test_an_unfinished_run_is_drawn_without_the_line_it_is_writing(tmp_path: Path, draw: Draw) -> None:
    run = write_run(tmp_path / "run", done=3)
    for table, torn in (("log.csv", "4,160,0.1,0.7"), ("steps.csv", "121,4,0.")):
        with open(run / table, "a") as file:
            file.write(torn)
    figure = draw(run)
    assert [x for x, _ in points(figure, LOSS)[0]] == [1, 2, 3]
    assert len(points(figure, LIVE)[0]) == 120


def test_an_old_run_has_neither_steps_nor_gradients(tmp_path: Path, draw: Draw) -> None:
    run = write_run(tmp_path / "run")
    (run / "steps.csv").unlink()
    with open(run / "log.csv", newline="") as file:
        write_table(run / "log.csv", LOG[:-1], [row[:-1] for row in csv.reader(file)][1:])
    figure = draw(run)
    assert points(figure, GRADIENT) == [[]]
    assert heading(figure, GRADIENT).endswith("not recorded")
    live = column(run, "log.csv", "live_blocks")
    assert points(figure, LIVE) == [[(40 * (n + 1), blocks) for n, blocks in enumerate(live)]]
    assert heading(figure, LIVE) == "Live blocks / mean of each epoch"


def test_epochs_without_validation_and_overflows_are_left_out(tmp_path: Path, draw: Draw) -> None:
    run = write_run(tmp_path / "run", epochs=3)
    rows = [
        [1, 40, 0.1, 2.0, 5, 1, "", "", "nan"],
        [2, 80, 0.1, "inf", 5, 1, 1.5, 40, 0.25],
        [3, 120, 0.1, 1.0, 5, 1, "", "", 0.0],
    ]
    write_table(run / "log.csv", LOG, rows)
    figure = draw(run)
    assert points(figure, LOSS) == [[(1, 2), (3, 1)]]
    assert points(figure, ERROR) == [[(2, 60)]]
    assert dots(figure, ERROR) == [[2, 60]]
    assert points(figure, GRADIENT) == [[(2, 0.25)]]  # the axis is logarithmic
    assert figure.axes[GRADIENT].lines[0].get_marker() == "."  # one point makes no line


def test_a_run_without_any_validation_is_drawn(tmp_path: Path, draw: Draw) -> None:
    run = write_run(tmp_path / "run", epochs=1)
    write_table(run / "log.csv", LOG, [[1, 40, 0.1, 2.0, 5, 1, "", "", ""]])
    figure = draw(run)
    assert heading(figure, ERROR).endswith("not recorded")
    assert texts(figure)[-2] == "-"


def test_folders_of_one_name_are_told_apart_by_their_paths(tmp_path: Path, draw: Draw) -> None:
    runs = [write_run(tmp_path / "a" / "seed0"), write_run(tmp_path / "b" / "seed0")]
    shown = texts(draw(*runs))
    for text, run in zip((shown[6], shown[12]), runs, strict=True):
        assert text.removeprefix("…") == str(run)[-39:]


def test_both_files_are_whole_and_the_same_each_time(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b", 1.0)]
    for name in ("v1.2", "again.png", "more.svg"):
        files = draw_runs(runs, tmp_path / name)
        stem = name.removesuffix(".png").removesuffix(".svg")
        assert files == [tmp_path / f"{stem}.png", tmp_path / f"{stem}.svg"]
        assert files[0].read_bytes() == (tmp_path / "v1.2.png").read_bytes()
        assert files[1].read_bytes() == (tmp_path / "v1.2.svg").read_bytes()
    with Image.open(files[0]) as image:
        image.load()
        assert image.format == "PNG"
    assert xml.etree.ElementTree.parse(files[1]).getroot().tag == "{http://www.w3.org/2000/svg}svg"
    assert {file.suffix for file in tmp_path.iterdir() if file.is_file()} == {".png", ".svg"}


@pytest.mark.parametrize("count", [1, 2, 5, 21])
def test_nothing_is_cut_off_and_no_texts_touch(count: int, tmp_path: Path, draw: Draw) -> None:
    runs = [write_run(tmp_path / f"run {n} of a long name that says a lot", 1 - 0.04 * n, seed=n) for n in range(count)]
    figure = draw(*runs)
    with Image.open(tmp_path / "picture.png") as image:
        pixels = np.asarray(image.convert("RGB"))
    for edge in (pixels[:8], pixels[-8:], pixels[:, :8], pixels[:, -8:]):
        assert (edge == 255).all()
    words = [*figure.texts, *(text for axes in figure.axes for text in axes.texts)]
    boxes = [word.get_window_extent() for word in words]
    assert not [1 for n, box in enumerate(boxes) for other in boxes[:n] if box.overlaps(other)]
    looks = [(line.get_color(), line.get_linestyle(), str(line._dash_pattern)) for line in figure.artists]  # type: ignore[attr-defined]
    assert len(set(looks)) == count


def spoil(file: str, line: int, text: str) -> Callable[[Path], None]:
    """Return a function that puts ``text`` in the place of a line (counted from 1) of a file of a run."""

    def change(run: Path) -> None:
        lines = (run / file).read_text().splitlines(keepends=True)
        lines[line - 1] = text
        (run / file).write_text("".join(lines))

    return change


def remove(*files: str) -> Callable[[Path], None]:
    def change(run: Path) -> None:
        for file in files:
            (run / file).unlink()

    return change


def write(file: str, content: bytes) -> Callable[[Path], None]:
    def change(run: Path) -> None:
        (run / file).write_bytes(content)

    return change


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (remove("log.csv", "recipe.yaml"), "{run} is not the folder of a run: it has no log.csv, no recipe.yaml"),
        (write("log.csv", b"\n"), "{run}/log.csv is empty"),
        (write("log.csv", ",".join(LOG).encode() + b"\n"), "{run}/log.csv has no rows: the run has not finished an e"),
        (write("log.csv", b"epoch,step,train_loss\n"), "{run}/log.csv lacks live_blocks, val_top1_percent"),
        (write("log.csv", b"\xff\xfe"), "{run}/log.csv is damaged: 'utf-8' codec"),
        (spoil("log.csv", 3, "2,80,0.1\n"), "{run}/log.csv, line 3: 3 cells for 9 columns"),
        (spoil("log.csv", 3, "2,80,0.1,two,9,1,1,50,0.1\n"), "{run}/log.csv, line 3: train_loss is 'two'"),
        (spoil("log.csv", 3, "2,80,0.1,,9,1,1,50,0.1\n"), "{run}/log.csv, line 3: train_loss is ''"),
        (spoil("log.csv", 3, "2,80,0.1,2,9,1,1,nan,0.1\n"), "{run}/log.csv, line 3: val_top1_percent is 'nan'"),
        (spoil("log.csv", 4, "2,80,0.1,2,9,1,1,50,0.1\n"), "{run}/log.csv, line 4: epoch 2 stands after 2"),
        (spoil("steps.csv", 200, "\n"), "{run}/steps.csv, line 200: 0 cells for 6 columns"),
        (spoil("steps.csv", 200, "\x00\n"), "{run}/steps.csv, line 200: "),
        (spoil("steps.csv", 241, "240,6,0.1,"), "{run}/steps.csv, line 241: 4 cells for 6 columns"),
        (write("result.json", b"{"), "{run}/result.json is damaged: "),
        (write("result.json", b"[1]"), "{run}/result.json is damaged: it holds no mapping"),
        (
            write("result.json", b'{"final_survival_prob": NaN}'),
            "final_survival_prob is nan; {run}/result.json lacks t",
        ),
        (write("result.json", b'{"final_survival_prob": "a", "test_top1_percent": true}'), "test_top1_percent is True"),
        (write("recipe.yaml", b"a: [\n"), "{run}/recipe.yaml is damaged: "),
        (write("recipe.yaml", b"model: 3\n"), "{run}/recipe.yaml: model is 3; {run}/recipe.yaml lacks epochs"),
    ],
)
def test_damage_is_named(damage: Callable[[Path], None], said: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    damage(run)
    with pytest.raises(InputError) as raised:
        draw_runs([run], tmp_path / "picture")
    assert said.format(run=run) in str(raised.value)
    assert [file.name for file in tmp_path.iterdir()] == ["run"]


def test_many_damaged_lines_are_counted(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    for line in (3, 5, 6):
        spoil("log.csv", line, "?\n")(run)
    with pytest.raises(InputError, match=r"log\.csv, line 3: 1 cells for 9 columns \(and 2 more lines\)$"):
        draw_runs([run], tmp_path / "picture")


def test_all_faults_are_said_at_once(tmp_path: Path) -> None:
    good, bad = write_run(tmp_path / "good"), write_run(tmp_path / "bad")
    spoil("log.csv", 2, "?\n")(bad)
    spoil("steps.csv", 7, "?\n")(bad)
    with pytest.raises(InputError) as raised:
        draw_runs([good, good, bad, tmp_path / "none"], tmp_path / "picture")
    faults = str(raised.value).split("; ")
    assert len(faults) == 5
    assert faults[0] == f"{good} is given twice"
    assert faults[1].startswith(f"{bad}/log.csv, line 2")
    assert faults[2].startswith(f"{bad}/steps.csv, line 7")
    assert "; ".join(faults[3:]) == f"{tmp_path}/none is not a folder; name the folder of a run"


def test_the_number_of_runs_is_limited(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no runs given"):
        draw_runs([], tmp_path / "picture")
    runs = [write_run(tmp_path / str(n), epochs=1) for n in range(22)]
    with pytest.raises(InputError, match="22 runs given; at most 21 can be told apart"):
        draw_runs(runs, tmp_path / "picture")


def test_the_output_must_be_a_file_in_a_folder(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    for output, said in ((tmp_path, "is a folder; name a file"), (tmp_path / "no" / "a.png", "create it first")):
        with pytest.raises(InputError, match=said):
            draw_runs([run], output)


def test_a_failed_drawing_leaves_the_old_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "run")
    files = draw_runs([run], tmp_path / "picture")
    before = [file.read_bytes() for file in files]
    save = Figure.savefig

    def full(figure: Figure, *args: Any, **kwargs: Any) -> None:
        if kwargs["format"] == "svg":
            raise OSError(28, "No space left on device")
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", full)
    write_result(run, final_survival_prob=0.3, test_top1_percent=1.0)
    with pytest.raises(OSError, match="No space left"):
        draw_runs([run], tmp_path / "picture")
    assert [file.read_bytes() for file in files] == before
    assert len(list(tmp_path.iterdir())) == 3
