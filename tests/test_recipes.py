"""The recipes that ship: what each says, and that it says it in full."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from timm.scheduler import create_scheduler_v2

from sdzoo.registry import check_name
from sdzoo.training import recipe_table as table_module
from sdzoo.training.recipe import Recipe, SdzooSettings
from sdzoo.training.recipe_file import find_recipe, load_recipe, recipe_header, shipped_recipes
from sdzoo.training.recipe_table import main, recipe_table, upstream
from sdzoo.training.timm_keys import TIMM_KEYS

SHIPPED = shipped_recipes()
TWINS = [name for name in SHIPPED if "constant_depth" in name]
NAMES = (
    *(f"cifar{classes}_sd_resnet{depth}" for classes in (10, 100) for depth in (110, 1202)),
    *("svhn_sd_resnet152", "imagenet_sd_resnet152", "imagenet_sd_resnet50"),
    *("modern_sd_resnet20", "modern_sd_resnet56", "modern_sd_resnet110"),
    *("finetune_all", "finetune_head", "finetune_layer_decay", "smoke", "sd_resnet20.cifar10_jpeg"),
)
# Test error in per cent, constant depth and stochastic depth: the paper's table (v3).
ERRORS = {
    "cifar10_{}_resnet110": (6.41, 5.25),
    "cifar10_{}_resnet1202": (6.67, 4.91),
    "cifar100_{}_resnet110": (27.76, 24.98),
    "svhn_{}_resnet152": (1.80, 1.75),
    "imagenet_{}_resnet152": (21.78, 21.98),
}

every_recipe = pytest.mark.parametrize("name", SHIPPED)


def written_keys(name: str) -> dict[str, Any]:
    """Return a recipe as timm's train.py reads it."""
    return yaml.safe_load(SHIPPED[name].read_text(encoding="utf-8"))


def test_all_are_there() -> None:
    assert {*NAMES, *TWINS} == set(SHIPPED)
    assert len(TWINS) == 7


@every_recipe
def test_it_loads_and_is_found_by_name(name: str) -> None:
    recipe = load_recipe(find_recipe(name))
    check_name(recipe.model)
    assert recipe.device_modules == ["sdzoo"]
    assert re.fullmatch(r"[a-z0-9_.]+", name)


@every_recipe
def test_it_leaves_nothing_to_defaults_that_surprise(name: str) -> None:
    keys = written_keys(name)
    always = {"warmup_epochs", "smoothing", "color_jitter", "interpolation", "crop_pct", "min_lr", "val_split", "seed"}
    assert always <= keys.keys()
    assert keys.get("no_aug") or keys.get("train_crop_mode") == "pad4" or {"scale", "ratio"} <= keys.keys()
    assert keys.get("no_aug") or "hflip" in keys
    assert keys.keys() <= {*TIMM_KEYS, "sdzoo"}


@every_recipe
def test_its_header(name: str) -> None:
    header = recipe_header(SHIPPED[name])
    assert header.command.startswith(f"sdzoo train {name} --data-dir ")
    if header.measured != "not run":
        assert re.search(r"\d runs?$", header.measured)
        assert header.hardware != "not run"


@every_recipe
def test_timm_would_read_its_numbers_as_numbers(name: str) -> None:
    """argparse converts a default that is a string, such as YAML 1.1's 1e-4, but not one inside a list or mapping."""
    recipe, keys = load_recipe(SHIPPED[name]), written_keys(name)
    for key, value in keys.items():
        got = getattr(recipe, key)
        if isinstance(got, SdzooSettings):
            continue
        if isinstance(got, (list, dict)):
            assert value == got
            assert yaml.safe_load(yaml.safe_dump(got)) == got
        else:
            assert type(got)(value) == got


@pytest.mark.parametrize("name", TWINS)
def test_twins_differ_in_drop_path_alone(name: str) -> None:
    constant, stochastic = load_recipe(SHIPPED[name]), load_recipe(SHIPPED[name.replace("constant_depth", "sd")])
    assert (constant.drop_path, stochastic.drop_path) == (0.0, 0.5)
    assert dataclasses.replace(constant, drop_path=0.5) == stochastic


@pytest.mark.parametrize("pattern", ERRORS)
def test_expected_accuracy_is_the_papers(pattern: str) -> None:
    for kind, error in zip(("constant_depth", "sd"), ERRORS[pattern], strict=True):
        expected = recipe_header(SHIPPED[pattern.format(kind)]).expected
        assert expected.startswith(f"top-1 {100 - error:.2f} % on ")
        assert f"error {error:.2f} %" in expected


@every_recipe
def test_no_other_recipe_claims_an_accuracy_unmeasured(name: str) -> None:
    if not any(re.fullmatch(pattern.format("(sd|constant_depth)"), name) for pattern in ERRORS):
        assert recipe_header(SHIPPED[name]).expected.startswith("none")


PAPERS = [name for name in SHIPPED if name.startswith(("cifar", "svhn", "imagenet"))]


@pytest.mark.parametrize("name", PAPERS)
def test_optimizer_is_the_papers(name: str) -> None:
    recipe = load_recipe(SHIPPED[name])
    assert (recipe.opt, recipe.lr, recipe.momentum, recipe.weight_decay) == ("sgd", 0.1, 0.9, 1e-4)
    assert recipe.opt_kwargs == {"filter_bias_and_bn": False}  # every parameter decays
    assert (recipe.batch_size, recipe.grad_accum_steps) == (256 if "imagenet" in name else 128, 1)
    assert (recipe.smoothing, recipe.model_ema, recipe.mixes, recipe.clip_grad) == (0.0, False, False, None)


@pytest.mark.parametrize("name", PAPERS)
def test_learning_rate_is_the_papers(name: str) -> None:
    """0.1, a tenth from the middle and a hundredth from three quarters on (CIFAR), counted in epochs."""
    recipe = load_recipe(SHIPPED[name])
    epochs, cuts = {"c": (500, (250, 375)), "s": (50, (30, 35)), "i": (90, (30, 60))}[name[0]]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=recipe.lr)
    scheduler, total = create_scheduler_v2(
        optimizer,
        sched=recipe.sched,
        num_epochs=recipe.epochs,
        decay_epochs=recipe.decay_epochs,
        decay_milestones=recipe.decay_milestones,
        decay_rate=recipe.decay_rate,
        warmup_epochs=recipe.warmup_epochs,
        step_on_epochs=not recipe.sched_on_updates,
    )
    assert scheduler is not None
    assert total == recipe.epochs == epochs
    for epoch in range(epochs):
        scheduler.step(epoch)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(
            0.1 * 0.1 ** sum(epoch >= cut for cut in cuts), rel=1e-9
        )


@pytest.mark.parametrize("name", PAPERS)
def test_data_is_the_papers(name: str) -> None:
    recipe = load_recipe(SHIPPED[name])
    data = (recipe.dataset, recipe.sdzoo.held_out, recipe.sdzoo.test_split)
    if name.startswith("cifar"):
        assert data == (f"torch/{name.partition('_')[0]}", 5000, "test")
        assert (recipe.train_crop_mode, recipe.hflip, recipe.color_jitter) == ("pad4", 0.5, 0.0)
    elif name.startswith("svhn"):
        assert data == ("torch/svhn", 6000, "test")
        assert recipe.no_aug
    else:
        assert data == ("", 0, "")
        assert (recipe.scale, recipe.color_jitter, recipe.crop_pct) == ([0.08, 1.0], 0.4, 0.875)


def test_what_timm_makes_of_a_recipe() -> None:
    base = Recipe("sd_resnet20", 9, 0.1)
    held_out = dataclasses.replace(base, sdzoo=SdzooSettings(held_out=5, test_split="test"))
    assert upstream(base) == "runs"
    assert upstream(held_out) == "sdzoo only: held_out, test_split"
    assert upstream(dataclasses.replace(held_out, train_crop_mode="pad4")) == "refused: pad4"
    assert upstream(dataclasses.replace(base, dataset="torch/svhn")) == "refused: torch/svhn"


@pytest.mark.parametrize("name", ["smoke", "finetune_all", "finetune_layer_decay", "imagenet_sd_resnet152"])
def test_recipes_that_timm_runs(name: str) -> None:
    assert upstream(load_recipe(SHIPPED[name])) == "runs"


def test_the_table_is_fresh() -> None:
    assert main(["--check"]) == 0


def test_the_table_has_a_row_for_each() -> None:
    rows = [line for line in recipe_table().splitlines() if line.startswith("| [")]
    assert [re.findall(r"\[(.*?)\]", row)[0] for row in rows] == list(SHIPPED)
    row = next(row for row in rows if "cifar10_sd_resnet110" in row)
    assert [cell.strip() for cell in row.split("|")[2:-1]] == [
        *("sd_resnet110", "torch/cifar10", "0.5", "500"),
        "top-1 94.75 % on test (the paper: error 5.25 %)",
        *("not run", "refused: pad4", "`sdzoo train cifar10_sd_resnet110 --data-dir cifar10`"),
    ]


def test_a_stale_table_is_noticed_and_mended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(table_module, "recipes_folder", lambda: tmp_path)
    assert main(["--check"]) == 1
    assert "is stale; python -m sdzoo.training.recipe_table" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert main([]) == 0
    assert main(["--check"]) == 0
    (tmp_path / "README.md").write_text("edited")
    assert main(["--check"]) == 1
