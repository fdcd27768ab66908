"""The benchmarks that time whole training runs: what they read from the runs' own records, and what they refuse."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
# as timm 1.0.31 prints it, with the time that its logger puts before
TIMM_LINE = (
    "2026-01-01 00:00:00,000 - INFO - Train: {epoch} [{step:>4d}/2 ( 50%)]  Loss: 2.31 (2.30)  "
    "Time: {seconds:.3f}s,  355.10/s  ({seconds:.3f}s,  355.10/s)  LR: 1.000e-02  Data: 0.012 (0.012)\n"
)
SCRIPTS = ("train_wall_time", "against_timm_train", "two_processes", "activation_memory")


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that imports a benchmark, which imports its neighbours by their bare names."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


def test_the_first_epoch_and_validation_do_not_count(load: Any, tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text(
        "epoch,step,live_blocks,seconds,val_loss\n1,50,9,30.0,1\n2,100,7,50.0,1\n3,150,6,71.0,1\n"
    )
    (tmp_path / "result.json").write_text(
        json.dumps({"seconds": {"data": 3.0, "step": 60.0, "log": 1.5, "validation": 1.5}})
    )
    found = load("training_runs").read_time(tmp_path)
    assert found.training_s == pytest.approx(41 - 1)
    assert found.data_share == pytest.approx(2 / 40)
    assert found.log_share == pytest.approx(1 / 40)
    assert found.live_blocks == 6.5


def test_timms_own_times_are_read(load: Any, capsys: pytest.CaptureFixture[str]) -> None:
    script = load("against_timm_train")
    lines = [
        TIMM_LINE.format(epoch=epoch, step=step, seconds=seconds)
        for epoch, step, seconds in ((0, 0, 9.0), (0, 1, 9.0), (1, 0, 0.5), (1, 1, 0.25), (2, 0, 0.125), (2, 1, 1.0))
    ]
    text = "Scheduled epochs: 3\n" + "Test: [   0/0]  Time: 7.000 (7.000)\n".join(lines)
    assert script.printed_seconds(text, 4) == 1.875
    with pytest.raises(SystemExit, match="printed 3 updates after the first epoch, not 4"):
        script.printed_seconds("".join(lines[:-1]), 4)


def test_steps_are_a_multiple_of_the_epochs_that_count(load: Any) -> None:
    runs = load("training_runs")
    assert runs.steps_an_epoch(100) == 50
    for steps in (0, 101):
        with pytest.raises(SystemExit, match=f"{steps} steps cannot be had"):
            runs.steps_an_epoch(steps)


def test_the_candidates_take_turns_from_both_ends(load: Any) -> None:
    calls = []

    def candidate(name: str) -> Any:
        return lambda index: calls.append((name, index)) or float(index)

    seconds = load("training_runs").in_turn({"a": candidate("a"), "b": candidate("b")}, 3, lambda text: None)
    assert calls == [("a", 0), ("b", 0), ("b", 1), ("a", 1), ("a", 2), ("b", 2)]
    assert seconds == {"a": [0, 1, 2], "b": [0, 1, 2]}


def test_a_recipe_and_its_pictures_are_whole(load: Any, tmp_path: Path) -> None:
    from sdzoo.training.recipe_file import load_recipe

    runs = load("training_runs")
    for keys in ({"train_crop_mode": "pad4"}, *load("against_timm_train").AUGMENTATIONS.values()):
        file = runs.write_recipe(tmp_path / "recipe.yaml", model="sd_resnet20", batch_size=4, drop_path=0.5, **keys)
        assert load_recipe(file).faults() == []
        assert yaml.safe_load(file.read_text())["weight_decay"] == 0.0001  # PyYAML alone reads it as a number too
    data = runs.noise_pictures(tmp_path / "data", 24)
    assert len(list((data / "train").glob("*/*.png"))) == 24
    assert len(list((data / "val").iterdir())) == len(list((data / "train").iterdir())) == 10


def test_a_failed_run_says_what_it_printed(load: Any) -> None:
    with pytest.raises(SystemExit, match=r"failed with 3:\noh no"):
        load("training_runs").run([sys.executable, "-c", "print('oh no'); raise SystemExit(3)"], threads=1)


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("against_timm_train", ["--timm-dir", "nowhere"], "nowhere/train.py does not exist"),
        ("against_timm_train", [], "required: --timm-dir"),
        ("against_timm_train", ["--timm-dir", ".", "--augmentation", "pad4"], "invalid choice: 'pad4'"),
        ("two_processes", ["--batch-size", "7"], "--batch-size is 7; two processes need an even one"),
        ("train_wall_time", ["--steps", "many"], "invalid int value: 'many'"),
    ],
)
def test_wrong_arguments_are_refused(
    name: str,
    arguments: list[str],
    said: str,
    load: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    with pytest.raises(SystemExit, match=r"^2$"):
        load(name).main()
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_begins_with_the_command(
    name: str, load: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit, match=r"^0$"):
        load(name).main()
    assert f"python benchmarks/{name}.py" in capsys.readouterr().out
