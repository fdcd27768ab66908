"""Going on with a run: to the bit under every feature, refused where it is another, forced, and from damaged files."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import after_step, assert_same_run, epochs, files, interrupt, plan, same, steps

import sdzoo
from sdzoo.errors import InputError
from sdzoo.plots.run_record import read_run
from sdzoo.training.checkpoint import load_model, read_checkpoint, save_run
from sdzoo.training.data import corrupt
from sdzoo.training.engine import Comforts, Interrupted, train
from sdzoo.training.evaluate import Evaluation
from sdzoo.training.recipe import Recipe, SdzooSettings

MakeImageFolder = Callable[..., Path]
MakeRecipe = Callable[..., Recipe]
EVERY_STEP = Comforts(checkpoint_interval_s=0)


@pytest.fixture
def own_run(finished_run: Any, tmp_path: Path) -> Path:
    """A copy of the finished run: 2 epochs of 4 steps."""
    return shutil.copytree(finished_run.output, tmp_path / "copy")


def refused(action: Callable[[], Any], *said: str) -> str:
    with pytest.raises(InputError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    for part in said:
        assert part in message
    return message


# To the bit


@pytest.mark.parametrize(
    "changes",
    [
        {"opt": "adamw", "lr": 1e-3},
        {"opt": "lookahead_momentum", "lr": 0.05},
        {"amp": True, "amp_dtype": "bfloat16", "lr": 0.01},
        {"mixup": 0.4, "cutmix": 1.0, "smoothing": 0.1},
        {"model_ema": True, "model_ema_decay": 0.9, "model_ema_warmup": True},
        {"batch_size": 8, "grad_accum_steps": 2},
        {"sdzoo": SdzooSettings(survival_warmup_epochs=1.7)},
        {"grad_checkpointing": True},
        {"clip_grad": 0.02, "clip_mode": "agc", "layer_decay": 0.7},
        {"model_kwargs": {"mode": "sample"}, "channels_last": False},
        {"train_crop_mode": None, "aa": "rand-m5", "reprob": 0.5, "color_jitter": 0.2, "workers": 0},
        {"sched": "multistep", "decay_milestones": [2], "sched_on_updates": False},
    ],
    ids=lambda changes: ", ".join(changes),
)
def test_interrupted_and_resumed_run_is_the_undisturbed_one(
    image_folder: Path, tmp_path: Path, make_recipe: MakeRecipe, changes: dict[str, Any]
) -> None:
    recipe = make_recipe(**changes)
    train(recipe, image_folder, tmp_path / "whole", device="cpu")
    with after_step(6, interrupt()), pytest.raises(Interrupted):
        train(recipe, image_folder, tmp_path / "cut", device="cpu")
    assert read_checkpoint(tmp_path / "cut" / "last.pth")[1]["progress"]["batch"] == 2
    torch.manual_seed(99)
    train(recipe, image_folder, tmp_path / "cut", resume=True, device="cpu")
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize(
    "opt",
    [
        *("adabelief", "adadelta", "adafactor", "adagrad", "adamax", "adamp", "adan", "adopt", "cadamw", "lamb"),
        *("laprop", "lars", "lion", "lookahead_adamw", "madgrad", "mars", "muon", "nadamw", "novograd", "radam"),
        *("rmsproptf", "sgdp", "sgdw"),
    ],
)
def test_interrupted_and_resumed_run_under_timms_other_optimizers(
    image_folder: Path, tmp_path: Path, make_recipe: MakeRecipe, opt: str
) -> None:
    recipe = make_recipe(opt=opt, lr=1e-3, batch_size=22)
    train(recipe, image_folder, tmp_path / "whole", device="cpu")
    with after_step(4, interrupt()), pytest.raises(Interrupted):
        train(recipe, image_folder, tmp_path / "cut", device="cpu")
    train(recipe, image_folder, tmp_path / "cut", resume=True, device="cpu")
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.slow
def test_interrupted_and_resumed_run_with_workers(image_folder: Path, tmp_path: Path, make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(train_crop_mode=None, aa="rand-m5", workers=2)
    train(recipe, image_folder, tmp_path / "whole", device="cpu")
    with after_step(6, interrupt()), pytest.raises(Interrupted):
        train(recipe, image_folder, tmp_path / "cut", device="cpu")
    train(recipe, image_folder, tmp_path / "cut", resume=True, device="cpu")
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


def write_shards(folder: Path, pictures: Path) -> Path:
    """Write the splits train and val of a folder of pictures as WebDataset shards of 22, and timm's note of them."""
    folder.mkdir()
    splits = {}
    for split in ("train", "val"):
        files = sorted((pictures / split).rglob("*.*"), key=lambda path: path.name)  # the classes take turns
        names, lengths = [], []
        for start in range(0, len(files), 22):
            names.append(f"{split}-{start // 22:04d}.tar")
            lengths.append(len(files[start : start + 22]))
            with tarfile.open(folder / names[-1], "w") as tar:
                for number, path in enumerate(files[start : start + 22], start=start):
                    label = ("blue", "green", "red").index(path.parent.name)
                    for kind, data in ((path.suffix[1:], path.read_bytes()), ("cls", str(label).encode())):
                        member = tarfile.TarInfo(f"{number:04d}.{kind}")
                        member.size = len(data)
                        tar.addfile(member, io.BytesIO(data))
        splits[split] = {"name": split, "num_samples": sum(lengths), "filenames": names, "shard_lengths": lengths}
    (folder / "_info.json").write_text(json.dumps({"splits": splits}))
    return folder


def test_shards_go_on_at_the_start_of_an_epoch(image_folder: Path, tmp_path: Path, make_recipe: MakeRecipe) -> None:
    """What was done of an epoch is done again, to the bit, though a checkpoint was due after every step."""
    pytest.importorskip("webdataset")
    data = write_shards(tmp_path / "shards", image_folder)
    recipe = make_recipe(dataset="wds/pictures", sdzoo=SdzooSettings(survival_warmup_epochs=1.7), model_ema=True)
    train(recipe, data, tmp_path / "whole", device="cpu")
    with after_step(2, interrupt()), pytest.raises(Interrupted, match="nothing was saved yet"):
        train(recipe, data, tmp_path / "cut", device="cpu", comforts=EVERY_STEP)
    assert not (tmp_path / "cut" / "last.pth").exists()
    with after_step(6, interrupt()), pytest.raises(Interrupted, match=r"last\.pth goes on from the start of an epoch"):
        train(recipe, data, tmp_path / "cut", resume=True, device="cpu", comforts=EVERY_STEP)
    assert read_checkpoint(tmp_path / "cut" / "last.pth")[1]["progress"]["batch"] == 0
    train(recipe, data, tmp_path / "cut", resume=True, device="cpu")
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


def test_checkpoint_after_every_step_goes_on_from_that_step(
    finished_run: Any, image_folder: Path, tmp_path: Path
) -> None:
    def die(_: Any) -> None:
        raise SystemError("power cut")

    output = tmp_path / "run"
    with after_step(7, die), pytest.raises(SystemError):
        train(finished_run.recipe, image_folder, output, device="cpu", comforts=EVERY_STEP)
    assert read_checkpoint(output / "last.pth")[1]["global_step"] == 6
    reached = []
    with after_step(2, lambda _: reached.append(2)), after_step(3, lambda _: reached.append(3)):
        train(finished_run.recipe, image_folder, output, resume=True, device="cpu")
    assert reached == [2], "two steps were left"
    assert_same_run(output, finished_run.output)


def test_rows_of_the_logs_after_the_checkpoint_are_cut(finished_run: Any, image_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    with after_step(6, interrupt()), pytest.raises(Interrupted):
        train(finished_run.recipe, image_folder, output, device="cpu")
    with open(output / "steps.csv", "a") as file:
        file.write("7,2,9,9,9,9\n8,2,9,9,9,9\ngarbage\n9,2,0.1,1.")
    with open(output / "log.csv", "a") as file:
        file.write("2,8,9,9,9,9,9,9,9\nhalf a")
    train(finished_run.recipe, image_folder, output, resume=True, device="cpu")
    assert_same_run(output, finished_run.output)


def test_corrupt_images_of_the_time_before_are_not_forgotten(
    finished_run: Any, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corrupt, "PER_IMAGES", 60)  # one of 66 may be
    with after_step(6, interrupt()), pytest.raises(Interrupted):
        train(finished_run.recipe, image_folder, tmp_path / "run", device="cpu")
    last = tmp_path / "run" / "last.pth"
    state, rest = read_checkpoint(last)
    save_run(last, {**rest, "state_dict": state, "corrupt": {"gone.png": "truncated"}})
    train(finished_run.recipe, image_folder, tmp_path / "run", resume=True, device="cpu")
    assert json.loads((tmp_path / "run" / "result.json").read_text())["corrupt_training_images"] == ["gone.png"]
    assert read_checkpoint(last)[1]["corrupt"] == {"gone.png": "truncated"}


def test_a_corrupt_image_of_the_epoch_that_was_interrupted_is_not_forgotten(
    make_image_folder: MakeImageFolder, make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corrupt, "PER_IMAGES", 60)
    data, recipe = make_image_folder(), make_recipe(epochs=1, aa="rand-m5", train_crop_mode=None)  # streamed
    bad = data / "train" / "blue" / "000.png"
    bad.write_bytes(b"broken")
    with after_step(3, interrupt()), pytest.raises(Interrupted):
        train(recipe, data, tmp_path / "run", device="cpu")
    train(recipe, data, tmp_path / "run", resume=True, device="cpu")
    assert json.loads((tmp_path / "run" / "result.json").read_text())["corrupt_training_images"] == [str(bad)]


# Refused, unless forced


def test_force_without_resume_is_refused(finished_run: Any, image_folder: Path, tmp_path: Path) -> None:
    refused(
        lambda: train(finished_run.recipe, image_folder, tmp_path / "run", device="cpu", force=True),
        "--force goes with --resume",
    )
    assert not (tmp_path / "run").exists()


def test_other_data_is_refused(own_run: Path, make_image_folder: Any, finished_run: Any) -> None:
    """The same number of pictures, one of which has other bytes."""
    folder = make_image_folder()
    picture = folder / "train" / "red" / "003.jpg"
    picture.write_bytes(picture.read_bytes() + b"\0")
    before = files(own_run)
    recipe = dataclasses.replace(finished_run.recipe, epochs=2)
    refused(
        lambda: train(recipe, folder, own_run, resume=True, device="cpu"),
        f"the data is not what it was trained on ({folder})",
    )
    assert files(own_run) == before


def test_other_validation_data_is_refused(own_run: Path, make_image_folder: Any, finished_run: Any) -> None:
    folder = make_image_folder()
    (folder / "val" / "red" / "003.jpg").unlink()
    refused(lambda: train(finished_run.recipe, folder, own_run, resume=True, device="cpu"), "the data is not what")


def test_the_same_data_elsewhere_is_taken(own_run: Path, make_image_folder: Any, finished_run: Any) -> None:
    before = files(own_run)
    train(finished_run.recipe, make_image_folder(), own_run, resume=True, device="cpu")
    assert files(own_run) == before


def test_a_run_of_more_processes_is_refused(own_run: Path, image_folder: Path, finished_run: Any) -> None:
    state, rest = read_checkpoint(own_run / "last.pth")
    rest["environment"][-1]["world"] = 4
    save_run(own_run / "last.pth", {**rest, "state_dict": state})
    refused(
        lambda: train(finished_run.recipe, image_folder, own_run, resume=True, device="cpu"),
        "it ran in 4 processes, now 1: the global batch is another",
    )


def test_all_that_differs_is_said_at_once(own_run: Path, make_image_folder: Any, make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(seed=8, lr=0.2, drop_path=0.3)
    folder = make_image_folder(seed=1)
    refused(
        lambda: train(recipe, folder, own_run, resume=True, device="cpu"),
        *("seed was 7, is 8", "lr was 0.1, is 0.2", "drop_path was 0.5, is 0.3"),
        *("other survival probabilities", "the data is not what it was trained on"),
    )


def test_a_changed_environment_is_said(
    own_run: Path, image_folder: Path, finished_run: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.set_num_threads(2)  # put back by a fixture
    state, rest = read_checkpoint(own_run / "last.pth")
    rest["environment"][-1] |= {"timm": "0.9"}
    save_run(own_run / "last.pth", {**rest, "state_dict": state})
    train(finished_run.recipe, image_folder, own_run, resume=True, device="cpu")
    said = capsys.readouterr().out
    assert "not bit for bit from here on: timm: 0.9 -> " in said
    assert "threads: 1 -> 2" in said


def test_a_result_names_every_environment_that_trained_once(
    own_run: Path, image_folder: Path, finished_run: Any
) -> None:
    """And not those that found nothing left to do."""
    recipe = dataclasses.replace(finished_run.recipe, epochs=4)
    torch.set_num_threads(2)  # put back by a fixture
    with after_step(1, interrupt()), pytest.raises(Interrupted):
        train(recipe, image_folder, own_run, resume=True, device="cpu", force=True)
    train(recipe, image_folder, own_run, resume=True, device="cpu")
    torch.set_num_threads(1)
    train(recipe, image_folder, own_run, resume=True, device="cpu")
    ran = json.loads((own_run / "result.json").read_text())["environment"]
    assert [session["threads"] for session in ran] == [1, 2]


def test_an_unchanged_environment_is_not_mentioned(
    own_run: Path, image_folder: Path, finished_run: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    train(finished_run.recipe, image_folder, own_run, resume=True, device="cpu")
    assert "bit for bit" not in capsys.readouterr().out


def forced(recipe: Recipe, data: Path, output: Path) -> dict[str, Any]:
    """Go on with ``recipe`` by force and return what the checkpoint then says beside the weights."""
    train(recipe, data, output, resume=True, device="cpu", force=True)
    return read_checkpoint(output / "last.pth")[1]


def test_forced_onto_other_steps_within_the_first_epoch_begins_it_anew(
    finished_run: Any, image_folder: Path, tmp_path: Path
) -> None:
    with after_step(3, interrupt()), pytest.raises(Interrupted):  # of 4 of the first epoch
        train(finished_run.recipe, image_folder, tmp_path / "run", device="cpu")
    rest = forced(dataclasses.replace(finished_run.recipe, batch_size=32), image_folder, tmp_path / "run")
    assert [row["epoch"] for row in steps(tmp_path / "run")] == ["1", "1", "2", "2"]
    assert rest["global_step"] == 4


def test_forced_extension_follows_the_new_schedule(own_run: Path, image_folder: Path, finished_run: Any) -> None:
    """2 epochs of 4 steps become 4: the cosine of steps 8 to 15 is that over 16, and not the end of that over 8."""
    rest = forced(dataclasses.replace(finished_run.recipe, epochs=4), image_folder, own_run)
    assert rest["epoch"] == 4
    rates = [float(row["lr"]) for row in steps(own_run)]
    expected = [
        0.05 * (1 + math.cos(math.pi * step / total))
        for total, run in ((8, range(8)), (16, range(8, 16)))
        for step in run
    ]
    assert rates == pytest.approx(expected, rel=1e-4)
    assert [row["step"] for row in steps(own_run)] == [str(step) for step in range(1, 17)]
    assert [row["epoch"] for row in epochs(own_run)] == ["1", "2", "3", "4"]


def test_a_finished_run_that_goes_on_has_no_result_until_it_is_finished_again(
    own_run: Path, image_folder: Path, finished_run: Any
) -> None:
    recipe = dataclasses.replace(finished_run.recipe, epochs=3)
    with after_step(2, interrupt()), pytest.raises(Interrupted):
        train(recipe, image_folder, own_run, resume=True, device="cpu", force=True)
    assert not (own_run / "result.json").exists()
    train(recipe, image_folder, own_run, resume=True, device="cpu")
    assert (own_run / "result.json").is_file()


def test_forced_recipe_acts_on_the_optimizer(own_run: Path, image_folder: Path, finished_run: Any) -> None:
    other = dataclasses.replace(
        finished_run.recipe, epochs=3, lr=0.03, weight_decay=0.02, momentum=0.5, sched="constant"
    )
    rest = forced(other, image_folder, own_run)
    groups = rest["optimizer"]["param_groups"]
    assert {group["lr"] for group in groups} == {0.03}
    assert {group["momentum"] for group in groups} == {0.5}
    assert {group["weight_decay"] for group in groups} == {0.0, 0.02}
    assert rest["recipe"]["lr"] == 0.03


@pytest.mark.parametrize(
    ("changes", "anew"),
    [
        ({"model_ema": True}, "moving average"),
        ({"amp": True, "lr": 0.01}, "loss scale"),
        ({"opt": "adamw", "lr": 1e-3}, "optimizer"),
        ({"layer_decay": 0.5, "model_ema": True}, "moving average, optimizer"),
        ({"opt_kwargs": {"nesterov": False}}, ""),
        ({"mixup": 0.5}, ""),
        ({"batch_size": 22}, ""),
        ({"train_split": "val", "val_split": "train", "batch_size": 4}, ""),
        ({"sdzoo": SdzooSettings(survival_warmup_epochs=2.0)}, ""),
    ],
    ids=str,
)
def test_forced_change_runs_and_says_what_starts_anew(
    own_run: Path,
    image_folder: Path,
    finished_run: Any,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    anew: str,
) -> None:
    recipe = dataclasses.replace(finished_run.recipe, **{"epochs": 3, **changes})
    rest = forced(recipe, image_folder, own_run)
    assert rest["epoch"] == 3
    assert rest["recipe"] == dataclasses.asdict(recipe)
    assert ("state_dict_ema" in rest) == recipe.model_ema
    assert [row["epoch"] for row in epochs(own_run)] == ["1", "2", "3"]
    said = [line for line in capsys.readouterr().out.splitlines() if "starting anew" in line]
    assert said == ([f"not in {own_run / 'last.pth'}, starting anew: {anew}"] if anew else [])


def test_forced_without_the_average_that_it_had(image_folder: Path, tmp_path: Path, make_recipe: MakeRecipe) -> None:
    train(make_recipe(epochs=1, model_ema=True), image_folder, tmp_path / "run", device="cpu")
    assert "state_dict_ema" not in forced(make_recipe(epochs=2), image_folder, tmp_path / "run")


def test_forced_average_starts_from_the_weights_of_the_checkpoint(
    image_folder: Path, tmp_path: Path, make_recipe: MakeRecipe
) -> None:
    """A decay of 1 keeps what it started from."""
    train(make_recipe(epochs=1), image_folder, tmp_path / "run", device="cpu")
    state, _ = read_checkpoint(tmp_path / "run" / "last.pth")
    rest = forced(make_recipe(epochs=2, model_ema=True, model_ema_decay=1.0), image_folder, tmp_path / "run")
    average = rest["state_dict_ema"]
    assert all(same(average[name], state[name]) for name in state if not name.endswith("num_batches_tracked"))


def test_forced_schedule_is_the_new_one_and_keeps_the_function(
    own_run: Path, image_folder: Path, finished_run: Any, make_recipe: MakeRecipe
) -> None:
    """Without a learning rate to speak of: what is left in the weights is that each branch counts by its new p."""
    recipe = dataclasses.replace(
        finished_run.recipe, epochs=3, drop_path=0.2, lr=1e-12, weight_decay=0.0, momentum=1e-9, sched="constant"
    )
    forced(recipe, image_folder, own_run)
    after = load_model(own_run / "last.pth")
    assert sdzoo.survival_probs(after) == pytest.approx([1 - block / 9 * 0.2 for block in range(1, 10)], abs=1e-6)
    expected = [sum(plan(7, step, sdzoo.survival_probs(after))) for step in range(8, 12)]
    assert [int(row["live_blocks"]) for row in steps(own_run)][8:] == expected
    scales = {name: p for name, p in after.state_dict().items() if name.endswith("bn2.weight")}
    old = read_checkpoint(finished_run.output / "last.pth")[0]
    for index, name in enumerate(scales, start=1):
        ratio = (1 - index / 9 * 0.5) / (1 - index / 9 * 0.2)
        torch.testing.assert_close(scales[name], old[name] * ratio, rtol=1e-5, atol=1e-7)


def test_another_model_is_refused_even_by_force(own_run: Path, image_folder: Path, finished_run: Any) -> None:
    before = files(own_run)
    recipe = dataclasses.replace(finished_run.recipe, model="sd_resnet32")
    message = refused(
        lambda: train(recipe, image_folder, own_run, resume=True, device="cpu", force=True), "does not fit", "missing"
    )
    assert str(own_run / "last.pth") in message
    assert files(own_run) == before


def test_forced_onto_data_with_other_steps_goes_on_at_an_epochs_start(
    own_run: Path, make_image_folder: Any, finished_run: Any
) -> None:
    """3 steps an epoch in place of 4: the third epoch begins at step 6 of the new count."""
    folder = make_image_folder({"train": 18, "val": 4})
    rest = forced(dataclasses.replace(finished_run.recipe, epochs=3), folder, own_run)
    assert (rest["epoch"], rest["global_step"]) == (3, 9)
    assert [row["step"] for row in steps(own_run)] == [str(step) for step in range(1, 10)]
    read_run(own_run)  # such a run can be drawn


def test_a_forced_run_that_dies_before_its_first_step_is_the_new_one(
    own_run: Path, image_folder: Path, finished_run: Any
) -> None:
    """Its logs are cut for the new run: a checkpoint of the old one would know of rows that are gone."""
    recipe = dataclasses.replace(finished_run.recipe, epochs=3)

    def die(*_: Any) -> None:
        raise SystemError("power cut")

    with after_step(1, die), pytest.raises(SystemError):
        train(recipe, image_folder, own_run, resume=True, device="cpu", force=True)
    train(recipe, image_folder, own_run, resume=True, device="cpu")
    assert read_checkpoint(own_run / "last.pth")[1]["forced"] == ["from epoch 3 on: epochs was 2, is 3"]


def test_what_was_forced_is_said_and_kept(
    own_run: Path, image_folder: Path, finished_run: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the checkpoint and beside the figures: no one recipe made them. Going on is not forcing again."""
    recipe = dataclasses.replace(finished_run.recipe, epochs=4, lr=0.02)
    with after_step(5, interrupt()), pytest.raises(Interrupted):
        train(recipe, image_folder, own_run, resume=True, device="cpu", force=True)
    lr = finished_run.recipe.lr
    expected = [f"from epoch 3 on: epochs was 2, is 4; lr was {lr}, is 0.02"]
    assert f"forced {expected[0]}" in capsys.readouterr().out
    train(recipe, image_folder, own_run, resume=True, device="cpu")
    assert read_checkpoint(own_run / "last.pth")[1]["forced"] == expected
    assert json.loads((own_run / "result.json").read_text())["forced"] == expected
    assert json.loads((finished_run.output / "result.json").read_text())["forced"] == []


@pytest.mark.parametrize("changed", [{"lr": 0.02}, {"epochs": 1}], ids=str)
def test_a_finished_run_cannot_be_forced_onto_what_leaves_nothing_to_train(
    own_run: Path, image_folder: Path, finished_run: Any, changed: dict[str, Any]
) -> None:
    before = files(own_run)
    recipe = dataclasses.replace(finished_run.recipe, **changed)
    refused(
        lambda: train(recipe, image_folder, own_run, resume=True, device="cpu", force=True),
        f"has 2 epochs, the recipe {recipe.epochs}: none is left to go on with, forced or not",
    )
    assert files(own_run) == before


def test_a_run_whose_best_weights_are_gone(own_run: Path, image_folder: Path, finished_run: Any) -> None:
    """It is not said to be done, and by force its best epoch is one of those to come."""
    (own_run / "best.safetensors").unlink()
    best = json.loads((own_run / "result.json").read_text())["best_epoch"]
    said = f"best.safetensors, the weights of epoch {best}, is gone"
    refused(lambda: train(finished_run.recipe, image_folder, own_run, resume=True, device="cpu"), said)
    rest = forced(dataclasses.replace(finished_run.recipe, epochs=3), image_folder, own_run)
    assert rest["forced"] == [f"from epoch 3 on: epochs was 2, is 3; {own_run / said}"]
    assert json.loads((own_run / "result.json").read_text())["best_epoch"] == 3
    assert read_checkpoint(own_run / "best.safetensors")[1]["epoch"] == 3


def test_forced_onto_other_validation_data_no_figure_is_compared_with_the_old_ones(
    own_run: Path, make_image_folder: Any, finished_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run had reached 100 %; 40 % of other pictures is the best of the new ones."""
    folder = make_image_folder(seed=1)
    monkeypatch.setattr("sdzoo.training.engine.evaluate", lambda *_: Evaluation(40.0, 100.0, 1.0, 12))
    forced(dataclasses.replace(finished_run.recipe, epochs=3), folder, own_run)
    result = json.loads((own_run / "result.json").read_text())
    assert (result["best_epoch"], result["val_top1_percent"]) == (3, 40.0)
    assert read_checkpoint(own_run / "best.safetensors")[1]["epoch"] == 3


# Damaged checkpoints


def test_a_damaged_checkpoint_is_refused_and_left_as_it_is(
    finished_run: Any, image_folder: Path, tmp_path: Path
) -> None:
    whole = (finished_run.output / "last.pth").read_bytes()
    last = tmp_path / "run" / "last.pth"
    last.parent.mkdir()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 16
    for content in (whole[: len(whole) // 3], whole[:-1], bytes(flipped), b""):
        last.write_bytes(content)
        refused(lambda: train(finished_run.recipe, image_folder, last.parent, resume=True, device="cpu"), str(last))
        assert last.read_bytes() == content
        assert {path.name for path in last.parent.iterdir()} == {"last.pth", ".lock"}


@settings(max_examples=120, deadline=None, derandomize=True, database=None)
@given(place=st.floats(0, 0.999999), bit=st.integers(0, 7), cut=st.none() | st.floats(0, 0.999999))
def test_a_flipped_bit_or_a_missing_end_is_refused_or_changes_nothing(
    finished_run: Any, tmp_path_factory: pytest.TempPathFactory, place: float, bit: int, cut: float | None
) -> None:
    """Some bytes of the file say nothing: padding, dates. Whatever else is hit must be noticed."""
    source = finished_run.output / "last.pth"
    content = bytearray(source.read_bytes())
    content[int(place * len(content))] ^= 1 << bit
    path = tmp_path_factory.getbasetemp() / "flipped.pth"
    path.write_bytes(content if cut is None else content[: int(cut * len(content))])
    message = ""
    try:
        assert same(read_checkpoint(path), read_checkpoint(source))
    except InputError as error:
        message = str(error)
    assert "\n" not in message
    assert not message or str(path) in message


ABSENT = object()


@pytest.mark.parametrize("value", [ABSENT, 5, pytest.param("x", marks=pytest.mark.slow)], ids=["absent", "5", "x"])
@pytest.mark.parametrize(
    "key",
    [
        *("amp_scaler", "corrupt", "data_sha256", "draw_probs", "environment", "epoch", "global_step", "lr_scheduler"),
        *("optimizer", "progress", "recipe", "rows", "state_dict_ema"),
    ],
)
def test_a_checkpoint_that_lacks_a_part_or_has_another_in_its_place(
    key: str, value: Any, image_folder: Path, tmp_path: Path, ema_run: Path, make_recipe: MakeRecipe
) -> None:
    """Refused in one line, or the part was not needed and the run goes on as it would have."""
    state, rest = read_checkpoint(ema_run / "last.pth")
    content = {**rest, "state_dict": state}
    if value is ABSENT:
        del content[key]
    else:
        content[key] = value
    last = tmp_path / "run" / "last.pth"
    last.parent.mkdir()
    shutil.copy(ema_run / "best.safetensors", last.parent)
    save_run(last, content)
    before = last.read_bytes()
    recipe = make_recipe(batch_size=33, model_ema=True)
    message = ""
    try:
        train(recipe, image_folder, last.parent, resume=True, device="cpu")
    except InputError as error:
        message = str(error)
    assert "\n" not in message
    if message:
        assert str(last) in message
        assert last.read_bytes() == before
    else:
        assert read_checkpoint(last)[1]["epoch"] == 2


@pytest.fixture(scope="module")
def ema_run(image_folder: Path, tmp_path_factory: pytest.TempPathFactory, make_recipe: MakeRecipe) -> Path:
    """A run of 2 epochs, interrupted after the third of its 4 steps."""
    output = tmp_path_factory.mktemp("ema") / "run"
    with after_step(3, interrupt()), pytest.raises(Interrupted):
        train(make_recipe(batch_size=33, model_ema=True), image_folder, output, device="cpu")
    return output
