"""Training on GPUs: the same function as on the CPU, what it saves, mixed precision, and two cards together."""

from __future__ import annotations

import copy
import csv
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from nets import Net, calibrated, random_images

import sdzoo
from sdzoo.training.checkpoint import read_checkpoint

pytestmark = pytest.mark.gpu

Record = Callable[[str, object], None]
Train = Callable[..., Path]

two_cards = pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason=f"needs 2 GPUs; this machine has {torch.cuda.device_count()}"
)
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
BITS = [index % 3 > 0 for index in range(27)]


def column(run: Path, name: str, log: str = "steps.csv") -> list[float]:
    with open(run / log, newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file)]


def training_step(model: Net, bits: list[bool], device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return loss and gradients of one step in float64, on the CPU."""
    model = copy.deepcopy(model).to(device, torch.float64).train()
    images, labels = random_images(8).to(device, torch.float64), torch.arange(8, device=device)
    with sdzoo.fixed_gates(model, bits):
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
    return loss.detach().cpu(), torch.cat([p.grad.flatten().cpu() for p in model.parameters()])


def test_a_step_on_the_gpu_is_the_step_on_the_cpu() -> None:
    """Loss and gradients in float64, some blocks dropped, agree with the CPU's."""
    model = calibrated("sd_resnet56")
    (here, ours), (there, theirs) = (training_step(model, BITS, device) for device in ("cpu", "cuda"))
    assert abs(here - there) <= 1e-10 * abs(here)
    assert (ours - theirs).abs().max() <= 1e-9 * ours.abs().max()


def test_evaluation_on_the_gpu_is_that_on_the_cpu(exact: None) -> None:
    """Logits of a network and of its folded form, in float32, agree with the CPU's within the house's limit."""
    model, images = calibrated("sd_resnet110"), random_images(16)
    for network in (model, sdzoo.fold(model)):
        with torch.inference_mode():
            expected = network(images)
            got = copy.deepcopy(network).cuda()(images.cuda()).cpu()
        assert (expected - got).abs().max() <= 1e-4 * max(1, expected.abs().max().item())


def test_memory_falls_with_the_live_blocks(record_property: Record) -> None:
    """Peak memory of a training step at p_L 0.5 against constant depth: less on average; mean and maximum recorded."""
    images, labels = torch.randn(128, 3, 32, 32, device="cuda"), torch.zeros(128, dtype=torch.long, device="cuda")

    def peak(model: Net) -> float:
        for parameter in model.parameters():
            parameter.grad = None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        F.cross_entropy(model(images), labels).backward()
        return torch.cuda.max_memory_allocated() - before

    constant: Net = timm.create_model("sd_resnet110", schedule="constant_depth").cuda().train()
    dropping: Net = timm.create_model("sd_resnet110").cuda().train()
    for model in (constant, dropping):
        peak(model)  # what cuDNN takes once
    whole = peak(constant)
    shares = [peak(dropping) / whole for _ in range(50)]
    record_property("peak_memory_ratio_mean", round(statistics.mean(shares), 3))
    record_property("peak_memory_ratio_max", round(max(shares), 3))
    assert statistics.mean(shares) < 0.95


@pytest.mark.parametrize("keys", [{}, {"amp": True, "amp_dtype": "float16"}], ids=["float32", "float16"])
def test_an_interrupted_run_goes_on_to_the_same_bits(keys: dict[str, Any], train: Train, tmp_path: Path) -> None:
    """On the GPU too: asked to stop within its second epoch, and resumed."""
    whole, cut = train("whole", steps=30, epochs=3, drop=0.2, **keys), tmp_path / "cut"
    given = [tmp_path / "whole.yaml", "--data-dir", tmp_path / "data of 30 steps", "-o", cut, "--device", "cuda"]
    command = [sys.executable, "-m", "sdzoo", "train", *map(str, given)]
    environment = os.environ | {"OMP_NUM_THREADS": "4", "MKL_NUM_THREADS": "4"}  # as the whole one's
    first = subprocess.Popen(command, env=environment)
    while first.poll() is None and not ((cut / "log.csv").is_file() and column(cut, "step", "log.csv")):
        time.sleep(0.01)
    first.send_signal(signal.SIGINT)
    assert first.wait(timeout=300) == 130
    assert 30 <= len(column(cut, "step")) < 90
    subprocess.run([*command, "--resume"], env=environment, check=True, timeout=300)
    assert (cut / "steps.csv").read_bytes() == (whole / "steps.csv").read_bytes()
    (state, _), (expected, _) = (read_checkpoint(run / "last.pth") for run in (cut, whole))
    assert state.keys() == expected.keys()
    assert not [name for name in state if not torch.equal(state[name], expected[name])]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_mixed_precision_trains(dtype: str, train: Train) -> None:
    """``sdzoo train`` with AMP: ten steps, the losses near those of float32."""
    plain, mixed = train("plain"), train(dtype, amp=True, amp_dtype=dtype)
    losses = list(zip(column(plain, "loss"), column(mixed, "loss"), strict=True))
    assert len(losses) == 10
    assert losses[0][1] == pytest.approx(losses[0][0], rel=0.02)  # the same weights
    assert losses[-1][1] == pytest.approx(losses[-1][0], rel=0.2)
    assert json.loads((mixed / "result.json").read_text())["best_epoch"] == 1


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_mixed_precision_speed(dtype: str, record_property: Record) -> None:
    """Time of a training step of ``sd_resnet50`` at 224 pixels under autocast against float32 (with TF32): recorded."""
    model: Net = timm.create_model("sd_resnet50", schedule="constant_depth")
    model = model.cuda().train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cuda", enabled=dtype == "float16")
    images = torch.randn(64, 3, 224, 224, device="cuda").contiguous(memory_format=torch.channels_last)
    labels = torch.zeros(64, dtype=torch.long, device="cuda")

    def seconds(mixed: bool) -> float:
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(5):
            optimizer.zero_grad()
            with torch.autocast("cuda", getattr(torch, dtype)) if mixed else nullcontext():
                loss = F.cross_entropy(model(images), labels)
            if mixed:
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
            else:
                loss.backward()
                optimizer.step()
        torch.cuda.synchronize()
        return time.perf_counter() - started

    rounds = [(seconds(True), seconds(False)) for _ in range(13)][3:]
    record_property("time_ratio", round(statistics.median(mixed / plain for mixed, plain in rounds), 3))


@pytest.mark.parametrize("final_survival_prob", [0.5, 0.2])
def test_training_time(final_survival_prob: float, record_property: Record) -> None:
    """Wall time of ``sdzoo train``, ``sd_resnet110`` on CIFAR's size, stochastic against constant depth: recorded."""
    script = BENCHMARKS / "train_wall_time.py"
    options = ["--model", "sd_resnet110", "--steps", "400", "--device", "cuda", "--threads", "4"]
    options += ["--final-survival-prob", str(final_survival_prob)]
    done = subprocess.run([sys.executable, str(script), *options], capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(r"against constant depth: (\d+\.\d+) ", done.stdout)
    assert found, done.stdout
    record_property("wall_time_ratio", float(found[1]))
    record_property("printed", done.stdout.splitlines())


@two_cards
def test_two_cards_train_together(train: Train, training_runs: Any, record_property: Record) -> None:
    """Two processes under NCCL drop the same blocks, those that one process drops; the ratio of speeds is recorded."""
    one, two = train("one", steps=200, epochs=3), train("two", processes=2, steps=200, epochs=3)
    assert column(two, "live_blocks") == column(one, "live_blocks")
    assert column(two, "loss")[0] == pytest.approx(column(one, "loss")[0], rel=0.1)  # BatchNorm sees half a batch
    times = [training_runs.read_time(run).training_s for run in (one, two)]
    record_property("images_per_s_ratio", round(times[0] / times[1], 3))


@two_cards
def test_synchronised_batchnorm_makes_two_cards_one(exact: None, train: Train) -> None:
    """SyncBatchNorm with shared gates: two processes of 64 take the steps of one of 128, and none waits for ever."""
    one, two = train("one"), train("two", processes=2, sync_bn=True)
    assert column(two, "live_blocks") == column(one, "live_blocks")
    assert min(column(one, "live_blocks")) < 27  # else nothing was dropped
    losses = list(zip(column(one, "loss"), column(two, "loss"), strict=True))
    gradients = list(zip(column(one, "first_conv_gradient"), column(two, "first_conv_gradient"), strict=True))
    assert losses[0][1] == pytest.approx(losses[0][0], rel=1e-4)
    assert gradients[0][1] == pytest.approx(gradients[0][0], rel=1e-3)
    # from the second step on rounding grows, as in any training
    assert losses[2][1] == pytest.approx(losses[2][0], rel=0.02)
