"""The folder of a run: one process at a time, files that are whole, logs that agree, and a disk that is full."""

from __future__ import annotations

import errno
import json
import os
import pkgutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from runs import FILES, after_step, assert_same_run, epochs, files, plan, steps, table

from sdzoo.cli import main
from sdzoo.errors import InputError
from sdzoo.training.checkpoint import load_model, read_checkpoint
from sdzoo.training.engine import train
from sdzoo.training.environment import differences
from sdzoo.training.evaluate import Evaluation
from sdzoo.training.progress import Progress
from sdzoo.training.recipe import Recipe, SdzooSettings
from sdzoo.training.run_folder import RunFolder, StepLog

MakeRecipe = Callable[..., Recipe]
COLUMNS = "step,epoch,lr,loss,live_blocks,first_conv_gradient\n"
LINEAR_TO_HALF = [1 - block / 9 * 0.5 for block in range(1, 10)]


# What the files say


def test_the_steps_agree_with_the_plan_and_the_epochs_with_the_steps(finished_run: Any) -> None:
    by_step, by_epoch = steps(finished_run.output), epochs(finished_run.output)
    assert [row["step"] for row in by_step] == [str(number) for number in range(1, 9)]
    assert [row["epoch"] for row in by_step] == ["1"] * 4 + ["2"] * 4
    assert [int(row["live_blocks"]) for row in by_step] == [sum(plan(7, step, LINEAR_TO_HALF)) for step in range(8)]
    for number, epoch in enumerate(by_epoch):
        own = by_step[4 * number : 4 * number + 4]
        assert int(epoch["step"]) == int(own[-1]["step"])
        assert float(epoch["lr"]) == pytest.approx(float(own[-1]["lr"]), rel=1e-5)
        for column, name, digits in (
            ("train_loss", "loss", 1e-5),
            ("live_blocks", "live_blocks", 1e-3),
            ("first_conv_gradient", "first_conv_gradient", 1e-6),
        ):
            mean = sum(float(row[name]) for row in own) / 4
            assert float(epoch[column]) == pytest.approx(mean, rel=1e-5, abs=digits)
    assert all(float(row["first_conv_gradient"]) > 0 for row in by_step)


def test_the_result_agrees_with_log_weights_and_recipe(finished_run: Any) -> None:
    result = json.loads((finished_run.output / "result.json").read_text())
    best = max(epochs(finished_run.output), key=lambda row: float(row["val_top1_percent"]))
    assert result["model"] == "sd_resnet20"
    assert result["blocks"] == 9
    assert result["best_epoch"] == int(best["epoch"])
    assert result["val_top1_percent"] == pytest.approx(float(best["val_top1_percent"]), abs=1e-3)
    assert result["test_top1_percent"] is None
    assert result["survival_probs"] == pytest.approx(LINEAR_TO_HALF, abs=1e-6)
    assert result["final_survival_prob"] == 0.5
    assert result["corrupt_training_images"] == []
    progress = read_checkpoint(finished_run.output / "last.pth")[1]["progress"]
    assert result["seconds"].keys() == {"data", "step", "log", "validation"}
    for name in ("data", "step", "validation"):  # the log's own time goes on while the checkpoint is written
        assert result["seconds"][name] == pytest.approx(progress[f"{name}_s"], abs=1e-3)


def test_the_test_split_is_measured_once_with_the_best_weights(
    image_folder: Path, tmp_path: Path, make_recipe: MakeRecipe, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = make_recipe(sdzoo=SdzooSettings(test_split="test"), lr=0.03)
    best = load_model(train(recipe, image_folder, tmp_path / "run", device="cpu"))
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    correct, count = 0, 0
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ((0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)))
    for label, name in enumerate(("blue", "green", "red")):
        for file in sorted((image_folder / "test" / name).iterdir()):
            correct += int(best(((picture(file) - mean) / std)[None]).argmax().item()) == label
            count += 1
    assert result["test_top1_percent"] == pytest.approx(100 * correct / count, abs=1e-9)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("test top-1")]
    assert said == [f"test top-1 {100 * correct / 9:.2f} % on 9 images, weights of epoch {result['best_epoch']}"]


def test_the_test_split_is_not_measured_with_the_last_weights(
    image_folder: Path, tmp_path: Path, make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Validation is replaced by fixed figures, 70 and 60 %; the third evaluation is the test's."""
    measured: list[torch.Tensor] = []

    def measure(model: Any, *_: Any) -> Evaluation:
        measured.append(model.get_parameter("fc.weight").detach().clone())
        return Evaluation([70.0, 60.0, 42.0][len(measured) - 1], 100.0, 1.0, 9)

    monkeypatch.setattr("sdzoo.training.engine.evaluate", measure)
    recipe = make_recipe(batch_size=33, sdzoo=SdzooSettings(test_split="test"))
    best = train(recipe, image_folder, tmp_path / "run", device="cpu")
    assert torch.equal(measured[2], measured[0]) and not torch.equal(measured[2], measured[1])
    assert torch.equal(measured[2], read_checkpoint(best)[0]["fc.weight"])
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["best_epoch"], result["val_top1_percent"], result["test_top1_percent"]) == (1, 70.0, 42.0)


def picture(file: Path) -> torch.Tensor:
    """Return a picture as evaluation sees it: the shorter side to 32, the middle of the longer."""
    image = Image.open(file).convert("RGB")
    width, height = image.size
    scale = 32 / min(width, height)
    image = image.resize((int(scale * width), int(scale * height)), Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
    top, left = round((pixels.shape[1] - 32) / 2), round((pixels.shape[2] - 32) / 2)
    return pixels[:, top : top + 32, left : left + 32]


def test_the_checkpoint_says_all_that_a_run_needs_to_go_on(finished_run: Any) -> None:
    state, rest = read_checkpoint(finished_run.output / "last.pth")
    expected = {"optimizer", "lr_scheduler", "amp_scaler", "metric", "global_step", "draw_probs", "recipe_sha256"}
    assert expected | {"data_sha256", "validation_data_sha256", "environment", "epoch", "arch"} <= rest.keys()
    assert (rest["epoch"], rest["global_step"]) == (2, 8)
    assert rest["metric"] == max(float(row["val_top1_percent"]) for row in rest["rows"])
    assert rest["draw_probs"] == pytest.approx(LINEAR_TO_HALF, abs=1e-6)
    assert [len(rest[name]) for name in ("recipe_sha256", "data_sha256", "validation_data_sha256")] == [64] * 3
    assert rest["data_sha256"] != rest["validation_data_sha256"]
    assert rest["environment"][-1]["torch"] == torch.__version__
    assert rest["environment"][-1]["threads"] == rest["environment"][-1]["world"] == 1
    assert state["layer3.2.gate.survival_prob"] == 0.5


def test_best_weights_are_those_of_the_moving_average(
    image_folder: Path, tmp_path: Path, make_recipe: MakeRecipe
) -> None:
    recipe = make_recipe(epochs=1, model_ema=True, model_ema_decay=0.5, lr=0.01)
    best = train(recipe, image_folder, tmp_path / "run", device="cpu")
    weights, _ = read_checkpoint(best)
    state, rest = read_checkpoint(tmp_path / "run" / "last.pth")
    average = rest["state_dict_ema"]
    assert weights.keys() == average.keys() == state.keys()
    assert all(torch.equal(weights[name], average[name]) for name in weights)
    assert not torch.equal(weights["fc.weight"], state["fc.weight"])
    probs = [name for name in state if name.endswith("survival_prob")]
    assert len(probs) == 9 and all(torch.equal(average[name], state[name]) for name in probs)


def test_differences_of_environments() -> None:
    before = {"torch": "2.6", "threads": 1, "gone": "x", "same": 0}
    now = {"torch": "2.7", "threads": 1, "same": 0, "new": 3}
    assert differences(before, now) == ["torch: 2.6 -> 2.7", "gone: x -> None", "new: None -> 3"]
    assert differences(now, now) == []


# The log of steps


def test_step_log_writes_rows_and_cuts_what_follows_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "steps.csv"
    log = StepLog(path, Progress())
    for step in range(1, 5):
        log.add(step, 1, 0.1, 1 / 3, 5, 1e-9 / 3)
    log.flush()
    log.close()
    lines = path.read_text()
    assert lines == COLUMNS + "".join(f"{step},1,0.1,0.333333,5,3.33333e-10\n" for step in range(1, 5))
    path.write_text(lines + "5,1,0.1,")
    log = StepLog(path, Progress(step=2, batch=2))
    log.add(3, 2, 0.2, 0.5, 4, 2.0)
    log.close()
    assert path.read_text() == COLUMNS + "".join(lines.splitlines(True)[1:3]) + "3,2,0.2,0.5,4,2\n"


@pytest.mark.parametrize(
    ("progress", "kept"),
    [
        pytest.param(Progress(epoch=1, step=4), [1, 2, 3, 4], id="an epoch is done"),
        pytest.param(Progress(epoch=1, step=6, batch=2), [1, 2, 3, 4, 5, 6], id="within the next"),
        pytest.param(Progress(epoch=1, step=3), [1, 2, 3], id="forced onto fewer steps an epoch"),
        pytest.param(Progress(epoch=1, step=9), [1, 2, 3, 4], id="forced onto more"),
        pytest.param(Progress(), [], id="anew"),
    ],
)
def test_step_log_keeps_the_epochs_that_are_done_and_what_is_done_of_this_one(
    tmp_path: Path, progress: Progress, kept: list[int]
) -> None:
    """Of a run of four steps an epoch that was stopped in its second."""
    path = tmp_path / "steps.csv"
    path.write_text(COLUMNS + "".join(f"{step},{1 + (step - 1) // 4},0.1,0.5,4,2\n" for step in range(1, 8)) + "x,2\n")
    StepLog(path, progress).close()
    assert [int(row["step"]) for row in table(path)] == kept


@pytest.mark.parametrize(
    "content", [None, "", COLUMNS, COLUMNS + "1,1,0.1", COLUMNS + "1,one,0.1,0.5,4,2\n", "1,1,0.1"]
)
def test_step_log_of_a_run_whose_log_is_gone_or_broken(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "steps.csv"
    if content is not None:
        path.write_text(content)
    log = StepLog(path, Progress(step=1, batch=1))
    log.add(2, 1, 0.1, 0.5, 4, 2.0)
    log.close()
    assert path.read_text() == COLUMNS + "2,1,0.1,0.5,4,2\n"


def test_flushed_rows_are_on_the_disk(tmp_path: Path) -> None:
    log = StepLog(tmp_path / "steps.csv", Progress())
    log.add(1, 1, 0.1, 0.5, 4, 2.0)
    log.flush()
    assert (tmp_path / "steps.csv").read_text().endswith("1,1,0.1,0.5,4,2\n")
    log.close()


# One process at a time

HOLD = """
import sys, time
from pathlib import Path
from sdzoo.training.run_folder import RunFolder
with RunFolder(Path(sys.argv[1])).locked():
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock of ``tmp_path / "run"``."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_folder_in_use_is_refused_and_a_lock_dies_with_its_process(
    holder: subprocess.Popen[str],
    image_folder: Path,
    tmp_path: Path,
    make_recipe: MakeRecipe,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe, output = make_recipe(epochs=1, batch_size=66), tmp_path / "run"
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    command = ["train", str(tmp_path / "recipe.yaml"), "--data-dir", str(image_folder), "-o", str(output)]
    for more in ([], ["--resume"], ["--resume", "--force"]):
        assert main([*command, *more, "--device", "cpu"]) == 2
        assert capsys.readouterr().err == f"sdzoo: {output} is in use by another process\n"
    assert set(files(output)) == {".lock"}
    holder.kill()
    holder.wait()
    assert main([*command, "--device", "cpu"]) == 0
    assert set(files(output)) == FILES


def test_lock_is_free_after_a_run_and_after_a_failure(
    image_folder: Path, tmp_path: Path, make_recipe: MakeRecipe
) -> None:
    def fail(_: Any) -> None:
        raise SystemError("power cut")

    with after_step(1, fail), pytest.raises(SystemError):
        train(make_recipe(epochs=1), image_folder, tmp_path / "run", device="cpu")
    with RunFolder(tmp_path / "run").locked():
        pass


# What may be in the folder


@pytest.mark.parametrize("left", ["best.safetensors", "log.csv"])
def test_results_without_a_checkpoint_are_not_overwritten(
    left: str, image_folder: Path, tmp_path: Path, make_recipe: MakeRecipe
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / left).write_text("epoch\n1\n")
    with pytest.raises(InputError, match=r"holds results of a run, but no last\.pth to resume; name another folder"):
        train(make_recipe(), image_folder, tmp_path / "run", device="cpu")
    assert (tmp_path / "run" / left).read_text() == "epoch\n1\n"


def test_what_a_killed_process_left_half_written_is_removed(
    finished_run: Any, image_folder: Path, tmp_path: Path
) -> None:
    """A power cut between writing and renaming; on a small disk the next checkpoint might not fit beside it."""
    output = tmp_path / "run"
    output.mkdir()
    for name in (".last.pth.ab12cd.pth", ".best.safetensors.x.safetensors", ".log.csv.q_1.csv", ".result.json.1.json"):
        (output / name).write_bytes(b"half")
    (output / "notes.txt").write_text("mine")
    (output / ".last.pth.bak").write_text("mine")
    train(finished_run.recipe, image_folder, output, device="cpu")
    assert set(files(output)) == FILES | {"notes.txt", ".last.pth.bak"}


# A full disk


@contextmanager
def tmpfs(where: Path, size: int) -> Iterator[None]:
    """Mount a file system of ``size`` bytes, or skip the test where that is not allowed."""
    where.mkdir()
    try:
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", where], capture_output=True, text=True
        )
    except FileNotFoundError:
        pytest.skip("there is no mount command here")
    if mounted.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here, which takes root: {mounted.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", where], check=True)  # a failed test may still have a file open


def fill(where: Path, leave: int) -> Path:
    """Leave that many bytes of a file system."""
    free = os.statvfs(where)
    filler = where / "filler"
    filler.write_bytes(bytes(free.f_bavail * free.f_bsize - leave))
    return filler


def command(recipe: Recipe, folder: Path, data: Path, *more: str) -> list[str]:
    (folder / "recipe.yaml").write_text(recipe.to_yaml())
    return ["train", str(folder / "recipe.yaml"), "--data-dir", str(data), "--device", "cpu", *more]


def test_divergence_names_step_and_checkpoint_and_exits_with_3(
    image_folder: Path, tmp_path: Path, make_recipe: MakeRecipe, capsys: pytest.CaptureFixture[str]
) -> None:
    def poison(optimizer: Any) -> None:
        optimizer.param_groups[0]["params"][0].data.fill_(float("inf"))

    output = tmp_path / "run"
    arguments = command(make_recipe(batch_size=22), tmp_path, image_folder, "-o", str(output))
    with after_step(2, poison):
        assert main(arguments) == 3
    assert capsys.readouterr().err == "sdzoo: the loss is nan at step 3; nothing was saved yet\n"
    with after_step(4, poison):
        assert main(arguments) == 3
    last = output / "last.pth"
    assert capsys.readouterr().err == f"sdzoo: the loss is nan at step 5; {last} is from before\n"
    assert read_checkpoint(last)[1]["global_step"] == 3


def test_a_disk_too_small_for_any_checkpoint_ends_in_one_line(
    image_folder: Path, tmp_path: Path, make_recipe: MakeRecipe, capsys: pytest.CaptureFixture[str]
) -> None:
    """1 MiB; the weights of 20 layers take a little more."""
    disk = tmp_path / "disk"
    with tmpfs(disk, 1 << 20):
        arguments = command(make_recipe(epochs=1), tmp_path, image_folder, "-o", str(disk / "run"))
        assert main(arguments) == 1
        best = disk / "run" / "best.safetensors"
        assert capsys.readouterr().err == f"sdzoo: cannot write {best}: No space left on device\n"
        assert set(files(disk / "run")) == {".lock", "log.csv", "steps.csv", "recipe.yaml"}


@pytest.mark.parametrize("left", [1 << 20, 0], ids=["1 MiB left", "nothing left"])
def test_a_full_disk_keeps_the_previous_checkpoint_and_ends_in_one_line(
    left: int,
    finished_run: Any,
    image_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It fills up after the fifth step of eight; with room again, the run goes on as if nothing had been."""
    disk, before = tmp_path / "disk", {}

    def fill_up(_: Any) -> None:
        before.update(files(disk / "run"))
        fill(disk, left)

    with tmpfs(disk, 16 << 20):
        output = disk / "run"
        arguments = command(finished_run.recipe, tmp_path, image_folder, "-o", str(output))
        with after_step(5, fill_up):
            assert main([*arguments, "--checkpoint-interval-s", "0"]) == 1
        said = capsys.readouterr().err
        assert said == f"sdzoo: cannot write {output / 'last.pth'}: No space left on device\n"
        assert files(output)["last.pth"] == before["last.pth"]
        assert set(files(output)) == FILES - {"result.json"}
        assert read_checkpoint(output / "last.pth")[1]["global_step"] == 4
        assert main([*arguments, "--resume"]) == 1, "still full"
        assert files(output)["last.pth"] == before["last.pth"]
        assert "No space left on device" in capsys.readouterr().err
        (disk / "filler").unlink()
        assert main([*arguments, "--resume"]) == 0
        assert_same_run(output, finished_run.output)


def test_a_row_that_does_not_fit_names_the_log(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    with tmpfs(disk, 1 << 16):
        log = StepLog(disk / "steps.csv", Progress())
        fill(disk, 0)

        def add_many() -> None:
            for step in range(10_000):
                log.add(step, 1, 0.1, 0.5, 4, 2.0)

        with pytest.raises(OSError, match=r"cannot write .*steps\.csv: No space left on device"):
            add_many()
        log.close()  # what is still in memory is lost, and has been said to be


@pytest.mark.parametrize("operation", ["os.fsync", "os.replace", "pathlib.Path.write_bytes", "tempfile.mkstemp"])
@pytest.mark.parametrize("nth", [0, 1, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 3))])
def test_whichever_write_fails_the_checkpoint_stays_and_the_run_can_go_on(
    operation: str,
    nth: int,
    finished_run: Any,
    image_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """From the sixth step on, the disk refuses the operation after ``nth`` more of it."""
    output = tmp_path / "run"
    module, _, name = operation.rpartition(".")
    owner: Any = pkgutil.resolve_name(module)
    original, left, before = getattr(owner, name), nth, {}

    def refuse(*args: Any, **kwargs: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*args, **kwargs)

    def start(_: Any) -> None:
        before.update(files(output))
        monkeypatch.setattr(owner, name, refuse)

    arguments = command(finished_run.recipe, tmp_path, image_folder, "-o", str(output))
    with after_step(6, start):
        code = main(arguments)
    monkeypatch.undo()
    said = capsys.readouterr().err
    if operation == "tempfile.mkstemp":
        assert code in (1, 2) and said.count("\n") == 1 and "No space left on device" in said
    elif code:
        assert code == 1
        assert said.startswith("sdzoo: cannot write ") and said.endswith(": No space left on device\n")
        assert said.count("\n") == 1
    else:
        assert operation == "pathlib.Path.write_bytes" and nth >= 2, "best and last alone are written so"
    read_checkpoint(output / "last.pth")
    assert set(files(output)) <= FILES
    assert main([*arguments, "--resume"]) == 0
    assert_same_run(output, finished_run.output)
