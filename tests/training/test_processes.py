"""Several processes of one run, on gloo: they drop the same blocks, agree with one process, and do not outlive it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import assert_same_run, named_seed, table

from sdzoo.deploy.predictor import model_predictor
from sdzoo.training.checkpoint import load_model, read_checkpoint
from sdzoo.training.evaluate import DataSplit, evaluate_predictor

RECIPE = """
model: sd_resnet20
num_classes: 3
drop_path: 0.5
device_modules: [sdzoo]
val_split: val
epochs: {epochs}
batch_size: {batch_size}
workers: 0
lr: 0.05
warmup_epochs: 0
no_aug: {no_aug}
train_crop_mode: {crop}
color_jitter: 0.0
smoothing: 0.0
interpolation: bilinear
crop_pct: 1.0
{more}
"""

FROZEN_STEP = """
import sys, torch
from pathlib import Path
from sdzoo.calibration import calibrate_batchnorm
from sdzoo.training.distributed import processes
from sdzoo.training.engine import Run
from sdzoo.training.recipe_file import load_recipe
from sdzoo.training.run_folder import RunFolder

torch.set_num_threads(1)
recipe, data, out = sys.argv[1:]
with processes("cpu") as team:
    run = Run(load_recipe(recipe), Path(data), RunFolder(Path("unused")), team)
    model, trainer = run.trainer.model, run.trainer
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.uniform_(module.bias, -0.5, 0.5)
    calibrate_batchnorm(model, [torch.randn(64, 3, 32, 32)])
    trainer.enter_epoch()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    batches = run.training_data.epoch(0)
    steps = []
    for number in range(2):
        step = trainer.step(number, batches)
        steps.append((step.loss, step.live_blocks))
        if number == 0:
            gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    if team.leads:
        torch.save({"gradients": gradients, "steps": steps}, out)
"""

TOGETHER = """
import json, sys, torch
from pathlib import Path
from sdzoo.digest import state_sha256
from sdzoo.training.distributed import processes
from sdzoo.training.engine import Run
from sdzoo.training.recipe_file import load_recipe
from sdzoo.training.run_folder import RunFolder

recipe, data = sys.argv[1:]
with processes("cpu") as team:
    run = Run(load_recipe(recipe), Path(data), RunFolder(Path("unused")), team)
    trainer, rank, seeds = run.trainer, team.shard.rank, []
    trainer.model.register_forward_pre_hook(lambda *_: seeds.append(torch.initial_seed()))
    trainer.enter_epoch()
    batches = run.training_data.epoch(0)
    for number in range(2):
        trainer.step(number, batches)
    apart = {name: state_sha256(model.state_dict()) for name, model in (("model", trainer.model), ("ema", trainer.ema))}
    trainer.leave_epoch()
    after = {name: state_sha256(model.state_dict()) for name, model in (("model", trainer.model), ("ema", trainer.ema))}
    found = {
        "seeds": seeds,
        "apart": apart,
        "after": after,
        "union": team.union({f"{rank}.jpg": f"seen by {rank}"}),
        "content": len(team.from_leader(bytes(range(256)) * 9000 if team.leads else b"stale")),
        "empty": len(team.from_leader(b"" if team.leads else b"stale")),
        "nothing": team.from_leader(None if team.leads else b"stale"),
    }
    print(json.dumps(found))
"""

# One rank reads data for longer than ranks wait for each other in training.
SLOW = """
import sys, time
from datetime import timedelta
from pathlib import Path
from sdzoo.training import distributed, engine, heartbeat
from sdzoo.training.recipe_file import load_recipe

recipe, data, output, rank, seconds = sys.argv[1:]
distributed.PATIENCE = timedelta(seconds=8)
heartbeat.BEAT_S, heartbeat.SILENCE_S = 0.5, 6.0
original = engine.open_training_data

def slow(recipe, data_dir, config, shard, device):
    if shard.rank == int(rank):
        print("reading", flush=True)
        time.sleep(float(seconds))
    return original(recipe, data_dir, config, shard, device)

engine.open_training_data = slow
advice = engine.Comforts(advice="next: go on")
engine.train(load_recipe(recipe), Path(data), Path(output), device="cpu", comforts=advice)
"""


# Killed while it validates, with a checkpoint after every step; or asked to stop there.
VALIDATING = """
import os, signal, sys
from pathlib import Path
from sdzoo.training import engine
from sdzoo.training.recipe_file import load_recipe

recipe, data, output, how = sys.argv[1:]
original = engine.evaluate

def disturbed(*arguments):
    if how == "killed":
        os._exit(9)
    if os.environ["RANK"] == "1":  # one is enough: they agree to stop
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
    return original(*arguments)

if how in ("killed", "stopped"):
    engine.evaluate = disturbed
comforts = engine.Comforts(checkpoint_interval_s=0 if how == "killed" else 300)
try:
    engine.train(load_recipe(recipe), Path(data), Path(output), how == "resumed", device="cpu", comforts=comforts)
except engine.Interrupted as stopped:
    print(stopped)
    sys.exit(130)
"""


def write_recipe(path: Path, batch_size: int, epochs: int = 2, no_aug: bool = False, more: str = "") -> Path:
    crop = "null" if no_aug else "pad4"
    path.write_text(
        RECIPE.format(batch_size=batch_size, epochs=epochs, no_aug=str(no_aug).lower(), crop=crop, more=more)
    )
    return path


def start(
    world: int, arguments: Sequence[str | Path], folders: Sequence[Path] | None = None
) -> list[subprocess.Popen[str]]:
    """Start ``world`` processes as torchrun does, each in its folder, but let none of them end another."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    shared |= {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=folders[rank] if folders else None,
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(world)
    ]


def finish(running: list[subprocess.Popen[str]], seconds: float = 240) -> list[tuple[int, str, str]]:
    """Return exit code, output and errors of each process; none is left behind."""
    try:
        return [(*reversed(process.communicate(timeout=seconds)), process.returncode)[::-1] for process in running]  # type: ignore[misc]
    finally:
        for process in running:
            process.kill()
            process.communicate()


def trained(world: int, recipe: Path, data: Path, output: Path, *more: str) -> list[tuple[int, str, str]]:
    arguments = ["-m", "sdzoo", "train", recipe, "--data-dir", data, "-o", output, "--device", "cpu", *more]
    return finish(start(world, arguments))


def test_two_ranks_of_64_and_one_of_128_agree_with_frozen_batchnorm(make_image_folder: Any, tmp_path: Path) -> None:
    data = make_image_folder({"train": 86, "val": 2})  # 3 classes: 258 images, two global batches of 128
    results = {}
    for world in (1, 2):
        recipe = write_recipe(tmp_path / f"{world}.yaml", batch_size=128 // world)
        for code, _, errors in finish(start(world, ["-c", FROZEN_STEP, recipe, data, tmp_path / f"{world}.pt"])):
            assert code == 0, errors
        results[world] = torch.load(tmp_path / f"{world}.pt", weights_only=True)
    one, two = results[1], results[2]
    assert [live for _, live in one["steps"]] == [live for _, live in two["steps"]]
    assert [loss for loss, _ in one["steps"]] == pytest.approx([loss for loss, _ in two["steps"]], rel=1e-5)
    largest = max(gradient.abs().max() for gradient in one["gradients"].values())
    worst = max((one["gradients"][name] - two["gradients"][name]).abs().max() for name in one["gradients"])
    assert worst <= 1e-5 * largest


@pytest.mark.slow
def test_two_ranks_interrupted_and_resumed_are_the_undisturbed_two_to_the_bit(
    image_folder: Path, tmp_path: Path
) -> None:
    more = "model_ema: true\nmodel_ema_decay: 0.9\ndrop: 0.2\nsdzoo: {survival_warmup_epochs: 3}"
    recipe = write_recipe(tmp_path / "recipe.yaml", batch_size=8, epochs=3, more=more)
    for code, _, errors in trained(2, recipe, image_folder, tmp_path / "whole"):
        assert code == 0, errors
    arguments = ["-m", "sdzoo", "train", recipe, "--data-dir", image_folder, "-o", tmp_path / "cut", "--device", "cpu"]
    running = start(2, arguments)
    log = tmp_path / "cut" / "log.csv"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (log.is_file() and len(log.read_text().splitlines()) > 1):
        time.sleep(0.02)
    running[1].send_signal(signal.SIGTERM)  # one is enough: they agree to stop
    for code, _, errors in finish(running):
        assert code in (130, 0), errors  # 0 if it was quicker than the signal
    for code, _, errors in trained(2, recipe, image_folder, tmp_path / "cut", "--resume"):
        assert code == 0, errors
    for name in ("last.pth", "best.safetensors"):
        cut, whole = (read_checkpoint(tmp_path / run / name) for run in ("cut", "whole"))
        assert cut[0].keys() == whole[0].keys()
        assert all(torch.equal(cut[0][key], whole[0][key]) for key in cut[0])
        for key in cut[1].get("state_dict_ema", {}):
            assert torch.equal(cut[1]["state_dict_ema"][key], whole[1]["state_dict_ema"][key])
    assert (tmp_path / "cut" / "steps.csv").read_text() == (tmp_path / "whole" / "steps.csv").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dist_bn", "how", "code"), [("reduce", "killed", 9), ("", "killed", 9), ("reduce", "stopped", 130)]
)
def test_two_ranks_disturbed_between_the_last_step_and_its_validation_lose_nothing(
    image_folder: Path, tmp_path: Path, dist_bn: str, how: str, code: int
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", batch_size=8, epochs=2, more=f'dist_bn: "{dist_bn}"')
    for run, way, expected in (("whole", "plain", 0), ("cut", how, code), ("cut", "resumed", 0)):
        for got, said, errors in finish(start(2, ["-c", VALIDATING, recipe, image_folder, tmp_path / run, way])):
            assert got == expected, errors
            assert ("stopped before epoch 1 was validated" in said) == (way == "stopped")
    assert len(table(tmp_path / "cut" / "steps.csv")) == len(table(tmp_path / "whole" / "steps.csv"))
    cut, whole = (read_checkpoint(tmp_path / run / "last.pth")[0] for run in ("cut", "whole"))
    assert all(torch.equal(cut[key], whole[key]) for key in whole)
    logs = [[row | {"seconds": ""} for row in table(tmp_path / run / "log.csv")] for run in ("cut", "whole")]
    assert logs[0] == logs[1]
    predictor = model_predictor(load_model(tmp_path / "whole" / "last.pth"))
    split = DataSplit(image_folder, "val")
    kept = evaluate_predictor(predictor.normalised, predictor.labels, predictor.config, split)
    assert kept.loss == pytest.approx(float(logs[1][-1]["val_loss"]), abs=2e-5), "what was validated is what is kept"


@pytest.mark.slow
def test_machines_with_disks_of_their_own_go_on_from_the_first_ones_checkpoint(
    image_folder: Path, tmp_path: Path
) -> None:
    """Killed and resumed, the output folder is relative, and what lies on the second machine's disk plays no role."""
    recipe = write_recipe(tmp_path / "recipe.yaml", 8, epochs=3, more="model_ema: true\ndrop: 0.2")
    machines = [tmp_path / "first", tmp_path / "second"]
    for machine in machines:
        machine.mkdir()

    def running(output: str, *more: str) -> list[subprocess.Popen[str]]:
        arguments = ["-m", "sdzoo", "train", recipe, "--data-dir", image_folder, "-o", output, "--device", "cpu"]
        return start(2, [*arguments, "--checkpoint-interval-s", "0", *more], machines)

    for code, _, errors in finish(running("whole")):
        assert code == 0, errors
    assert not (machines[1] / "whole").exists()
    cut = running("cut")
    saved = machines[0] / "cut" / "last.pth"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not saved.is_file():
        time.sleep(0.01)
    for process in cut:
        process.kill()
    finish(cut)
    assert 0 < read_checkpoint(saved)[1]["global_step"] < 12
    (machines[1] / "cut").mkdir()
    (machines[1] / "cut" / "last.pth").write_bytes(b"stale")
    for code, _, errors in finish(running("cut", "--resume")):
        assert code == 0, errors
    assert_same_run(machines[0] / "cut", machines[0] / "whole")
    assert [path.name for path in (machines[1] / "cut").iterdir()] == ["last.pth"]


@pytest.mark.parametrize("what", ["recipe", "data"])
def test_machines_with_recipes_or_data_of_their_own_are_refused(what: str, image_folder: Path, tmp_path: Path) -> None:
    machines = [tmp_path / "first", tmp_path / "second"]
    for index, machine in enumerate(machines):
        shutil.copytree(image_folder, machine / "data")
        write_recipe(machine / "recipe.yaml", 8, more=f"seed: {index if what == 'recipe' else 0}")
    if what == "data":
        files = sorted((machines[1] / "data" / "train" / "red").iterdir())
        shutil.copyfile(files[0], files[2])
    arguments = ["-m", "sdzoo", "train", "recipe.yaml", "--data-dir", "data", "-o", "run", "--device", "cpu"]
    for code, _, errors in finish(start(2, arguments, machines)):
        assert code == 2
        assert f"the {what} of process 1 differs from that of process 0" in errors


def test_ranks_draw_dropout_of_their_own_and_end_an_epoch_as_one(image_folder: Path, tmp_path: Path) -> None:
    """Before an epoch ends statistics of BatchNorm are each rank's own; what is validated is the same on all."""
    recipe = write_recipe(tmp_path / "recipe.yaml", 8, more="model_ema: true\ndrop: 0.2\nseed: 5\ndist_bn: broadcast")
    said = finish(start(2, ["-c", TOGETHER, recipe, image_folder]))
    assert [code for code, _, _ in said] == [0, 0], said
    first, second = (json.loads(out) for _, out, _ in said)
    for rank, found in enumerate((first, second)):
        assert found["seeds"] == [named_seed(5, "dropout", step, rank, 0) for step in (0, 1)]
        assert found["union"] == {"0.jpg": "seen by 0", "1.jpg": "seen by 1"}
        assert (found["content"], found["empty"], found["nothing"]) == (256 * 9000, 0, None)
    assert first["apart"]["ema"] != second["apart"]["ema"]
    assert first["after"] == second["after"]
    assert first["after"]["ema"] == first["apart"]["ema"]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_reads_for_long_is_waited_for(image_folder: Path, tmp_path: Path, rank: int) -> None:
    """20 s, of ranks that wait 8 s for each other in training and call 6 s of silence death."""
    recipe = write_recipe(tmp_path / "recipe.yaml", batch_size=33, epochs=1)
    running = start(2, ["-c", SLOW, recipe, image_folder, tmp_path / "run", str(rank), "20"])
    for code, _, errors in finish(running):
        assert code == 0, errors


def test_a_rank_that_reads_hears_that_another_has_died(image_folder: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", batch_size=33, epochs=1)
    running = start(2, ["-c", SLOW, recipe, image_folder, tmp_path / "run", "0", "600"])
    assert running[0].stdout and running[0].stdout.readline() == "reading\n"
    running[1].kill()
    killed = time.monotonic()
    code, _, errors = finish(running, seconds=60)[0]
    assert time.monotonic() - killed < 30
    assert code == 1
    expected = "rank 0 of 2: another process of this run is gone: nothing was heard of rank 1 for 6 s; next: go on"
    assert errors == f"sdzoo: {expected}\n"


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_when_a_rank_is_stopped_the_other_leaves_within_a_minute(image_folder: Path, tmp_path: Path, rank: int) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", batch_size=8, epochs=1000)
    arguments = ["-m", "sdzoo", "train", recipe, "--data-dir", image_folder, "-o", tmp_path / "run", "--device", "cpu"]
    running = start(2, arguments)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (tmp_path / "run" / "last.pth").is_file():
        time.sleep(0.05)
    running[rank].send_signal(signal.SIGSTOP)
    stopped = time.monotonic()
    try:
        assert running[1 - rank].wait(timeout=60) == 1
        assert time.monotonic() - stopped < 55
    finally:
        running[rank].kill()
    code, _, errors = finish(running)[1 - rank]
    assert code == 1
    assert f"nothing was heard of rank {rank} for 30 s" in errors
    assert errors.rstrip().endswith("--resume" if rank == 1 else "for 30 s")
    assert "Traceback" not in errors


@pytest.mark.slow
def test_validation_of_several_ranks_is_that_of_one(image_folder: Path, tmp_path: Path) -> None:
    """12 images over 5 ranks: each counts once."""
    recipe = write_recipe(tmp_path / "recipe.yaml", batch_size=4, epochs=1)
    for code, _, errors in trained(5, recipe, image_folder, tmp_path / "run"):
        assert code == 0, errors
    logged = json.loads((tmp_path / "run" / "result.json").read_text())["val_top1_percent"]
    command = ["-m", "sdzoo", "eval", tmp_path / "run" / "best.safetensors", "--data-dir", image_folder]
    said = subprocess.run(
        [sys.executable, *map(str, command), "--split", "val"], capture_output=True, text=True, check=True
    ).stdout
    assert f"top-1 {logged:.2f} %" in said
    assert "on 12 images" in said


def test_when_a_rank_dies_the_others_leave_and_the_first_says_how_to_go_on(image_folder: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", batch_size=8, epochs=1000)
    arguments = ["-m", "sdzoo", "train", recipe, "--data-dir", image_folder, "-o", tmp_path / "run", "--device", "cpu"]
    running = start(2, arguments)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (tmp_path / "run" / "last.pth").is_file():
        time.sleep(0.05)
    running[1].kill()
    killed = time.monotonic()
    code, _, errors = finish(running, seconds=60)[0]
    assert time.monotonic() - killed < 60
    assert code == 1
    assert "another process of this run is gone: its connection is closed; next: " in errors
    assert "gloo" not in errors and "GLHF" not in errors
    assert f"torchrun --nproc-per-node=2 -m sdzoo train {recipe}" in errors
    assert errors.rstrip().endswith("--resume")
    assert "Traceback" not in errors


def test_only_the_first_rank_writes_and_speaks_and_one_does_not_go_on_alone(image_folder: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", batch_size=8, epochs=1)
    (code, out, _), (other_code, other_out, other_errors) = trained(2, recipe, image_folder, tmp_path / "run")
    assert (code, other_code) == (0, 0)
    assert "epoch 1/1" in out
    assert other_out == other_errors == ""
    [(code, _, errors)] = trained(1, recipe, image_folder, tmp_path / "run", "--resume")
    assert code == 2
    assert "2 processes, now 1" in errors


def test_more_ranks_than_work(image_folder: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", batch_size=64, epochs=1)
    for code, _, errors in trained(2, recipe, image_folder, tmp_path / "run"):
        assert code == 2
        assert "66" in errors and "128" in errors
        assert "Traceback" not in errors
