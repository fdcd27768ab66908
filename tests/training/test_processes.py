"""Several processes of one run, on gloo: they drop the same blocks, agree with one process, and do not outlive it."""

from __future__ import annotations

import json
import os
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

from sdzoo.training.checkpoint import read_checkpoint

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
train_crop_mode: pad4
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


def write_recipe(path: Path, batch_size: int, epochs: int = 2, no_aug: bool = False, more: str = "") -> Path:
    path.write_text(RECIPE.format(batch_size=batch_size, epochs=epochs, no_aug=str(no_aug).lower(), more=more))
    return path


def start(world: int, arguments: Sequence[str | Path]) -> list[subprocess.Popen[str]]:
    """Start ``world`` processes as torchrun does, but let none of them end another."""
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
    assert "another process of this run is gone" in errors
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
