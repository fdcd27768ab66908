"""What is believed of a run, and what is not."""

from __future__ import annotations

import csv
import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from small_run import COUNTS, DATA, edit_recipe, edit_result

import sdzoo
from sdzoo.cli import main
from sdzoo.errors import InputError
from sdzoo.hub.measured import read_measured
from sdzoo.training.recipe_file import load_recipe
from sdzoo.training.recipe_yaml import load_yaml


def test_the_figures_are_those_of_the_log_and_of_measuring_again(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    measured = read_measured(run)
    rows = list(csv.DictReader((run / "log.csv").read_text().splitlines()))
    best = max(rows, key=lambda row: float(row["val_top1_percent"]))
    assert measured.figures is not None
    assert measured.figures.best_epoch == int(best["epoch"])
    assert measured.figures.val.percent == pytest.approx(float(best["val_top1_percent"]), abs=1e-3)
    assert (measured.figures.val.split, measured.figures.val.images) == ("val", 3 * COUNTS["val"])
    assert (measured.data, measured.training_images, measured.corrupt_images) == (DATA, 3 * COUNTS["train"], 0)
    assert measured.training_s == pytest.approx(float(rows[-1]["seconds"]), rel=0.5)
    test = measured.figures.test
    run_data = load_recipe(run / "recipe.yaml").data_dir
    assert test is not None and (test.split, test.images) == ("test", 3 * COUNTS["test"])
    assert main(["eval", str(run / "best.safetensors"), "--data-dir", str(run_data)]) == 0
    assert f"top-1 {test.percent:.2f} %" in capsys.readouterr().out


def append(name: str) -> Callable[[Path], object]:
    return lambda run: (run / name).write_bytes((run / name).read_bytes() + b"\n")


def without(name: str) -> Callable[[Path], object]:
    return lambda run: (run / name).unlink()


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no run": (without("recipe.yaml"), "is not the folder of a run: it has no recipe.yaml"),
    "not finished": (without("result.json"), "is not finished, 2 of 2 epochs: sdzoo train --resume goes on"),
    "weights changed": (append("best.safetensors"), "is not as its run left it.*best.safetensors has changed since"),
    "went on": (append("last.pth"), "last.pth has changed"),
    "steps changed": (append("steps.csv"), "steps.csv has changed"),
    "log changed": (append("log.csv"), "log.csv has changed"),
    "recipe changed": (append("recipe.yaml"), "recipe.yaml has changed"),
    "no recipe": (lambda run: (run / "recipe.yaml").write_text("model: x\n"), "recipe.yaml is damaged, or of another"),
    "weights gone": (without("best.safetensors"), "best.safetensors is missing"),
    "no figure": (lambda run: edit_result(run, val_top1_percent=None), "only with --no-metrics, and says so"),
    "no epoch": (lambda run: edit_result(run, best_epoch=None), "only with --no-metrics"),
    "figure changed": (lambda run: edit_result(run, val_top1_percent=99.0), r"says top-1 99.000 % on val at epoch"),
    "figure off by a little": (
        lambda run: edit_result(run, val_top1_percent=read_measured(run).figures.val.percent - 0.01),  # type: ignore
        r"% on val at epoch \d, log.csv",
    ),
    "other epoch": (lambda run: edit_result(run, best_epoch=7), "at epoch 7, log.csv nothing"),
    "figure edited": (
        lambda run: (run / "result.json").write_text(
            re.sub('(?<="test_top1_percent": )[^,]*', "99.9", (run / "result.json").read_text())
        ),
        r"result\.json was changed after its run had written it; remove it and run sdzoo train --resume",
    ),
    "older sdzoo": (
        lambda run: edit_result(run, sha256=None),
        "lacks sha256: it is damaged, or of an older sdzoo; rem",
    ),
    "no word of force": (lambda run: edit_result(run, forced=None), "lacks forced"),
    "forced at no epoch": (lambda run: edit_result(run, forced=["lr: 0.1"]), "is damaged: when it was forced"),
    "no session": (lambda run: edit_result(run, environment=[]), "its images, seconds or environment"),
    "no mapping": (lambda run: (run / "result.json").write_text("[]"), "lacks data, seal, corrupt_training_images"),
    "cut off": (lambda run: (run / "result.json").write_text("{"), "result.json is damaged"),
    "no seconds": (lambda run: edit_result(run, seconds={"step": "long"}), "its images, seconds or environment"),
    "no machine": (lambda run: edit_result(run, environment=[{}]), "its images, seconds or environment"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_run_that_is_not_whole_is_refused(fault: str, run: Path) -> None:
    damage, message = FAULTS[fault]
    damage(run)
    with pytest.raises(InputError, match=message):
        read_measured(run)


def test_what_was_held_out_is_not_the_split_that_it_is_of(run: Path) -> None:
    settings = load_yaml((run / "recipe.yaml").read_text())["sdzoo"] | {"held_out": 5000}
    edit_recipe(run, val_split="train", sdzoo=settings)
    figures = read_measured(run).figures
    assert figures is not None and figures.val.split == "train, 5,000 held out by seed"


def test_measuring_again_does_not_change_where_it_was_trained(run: Path) -> None:
    trained_in = read_measured(run).environment
    (run / "result.json").unlink()
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    recipe = load_recipe(run / "recipe.yaml")
    sdzoo.train(recipe, None, run, resume=True, device="cpu")
    assert read_measured(run).environment == trained_in and len(trained_in) == 1
    sdzoo.train(dataclasses.replace(recipe, epochs=3), None, run, resume=True, device="cpu", force=True)
    torch.set_num_threads(threads)
    assert read_measured(run).environment == [*trained_in, trained_in[0] | {"threads": threads + 1}]
    assert read_measured(run).forced == (3,)


def test_a_run_in_use_is_refused(run: Path) -> None:
    with FileLock(run / ".lock"), pytest.raises(InputError, match="in use"):
        read_measured(run)


def test_without_metrics_there_are_none_but_the_files_are_compared_all_the_same(run: Path) -> None:
    edit_result(run, val_top1_percent=None)
    (run / "last.pth").unlink()  # often removed to save space
    assert read_measured(run, no_metrics=True).figures is None
    append("log.csv")(run)
    with pytest.raises(InputError, match=r"log\.csv has changed"):
        read_measured(run, no_metrics=True)
