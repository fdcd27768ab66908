"""``kill -9`` at any moment: the run that is resumed ends as the undisturbed one, to the bit."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from runs import FILES, assert_same_run

from sdzoo.training.checkpoint import read_checkpoint
from sdzoo.training.recipe import Recipe, SdzooSettings
from sdzoo.training.run_folder import RunFolder

MakeRecipe = Callable[..., Recipe]

# Starting Python and importing torch takes longer than these runs: one process does it, and forks for each run.
# It is told the command line, and before or after which call of os.replace the run is to kill itself, if at all.
SERVER = """
import json, os, signal, sys
import torch
from sdzoo.cli import main
import sdzoo.training.engine

torch.set_num_threads(1)
print("ready", flush=True)
for line in sys.stdin:
    request = json.loads(line)
    child = os.fork()
    if child == 0:
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        original, calls = os.replace, 0

        def replace(*names):
            global calls
            calls += 1
            if [calls, "before"] == request["kill"]:
                os.kill(os.getpid(), signal.SIGKILL)
            original(*names)
            if [calls, "after"] == request["kill"]:
                os.kill(os.getpid(), signal.SIGKILL)

        os.replace = replace
        os._exit(main(request["arguments"]))
    print(child, flush=True)
    sys.stdin.readline()  # until it is waited for, its number is not another's
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Server:
    """Runs ``sdzoo`` command lines, one after the other."""

    def __init__(self, log: Path) -> None:
        self.log = log
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        assert self.hear() == "ready"

    def hear(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def say(self, line: str) -> None:
        assert self.process.stdin is not None
        print(line, file=self.process.stdin, flush=True)

    def run(self, arguments: list[str], kill_after_s: float | None = None, kill: tuple[int, str] | None = None) -> int:
        """Return the exit code of a command line; of one that was killed, -9."""
        self.say(json.dumps({"arguments": arguments, "log": str(self.log), "kill": kill}))
        child = int(self.hear())
        assert child > 1
        if kill_after_s is not None:
            time.sleep(kill_after_s)
            os.kill(child, signal.SIGKILL)
        self.say("wait")
        return int(self.hear())


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server") / "log")
    yield server
    server.process.kill()
    server.process.communicate()


class Undisturbed(NamedTuple):
    """A run of all that has a state: averages, dropout, accumulation, and gates that warm up to its last epoch."""

    recipe: Path
    output: Path
    seconds: float


def arguments(recipe: Path, data: Path, output: Path, *more: str, interval_s: float = 0.05) -> list[str]:
    given = [
        "train",
        recipe,
        "--data-dir",
        data,
        "-o",
        output,
        "--device",
        "cpu",
        "--checkpoint-interval-s",
        interval_s,
    ]
    return [*map(str, given), *more]


def write_recipe(path: Path, make_recipe: MakeRecipe, epochs: int, **changes: Any) -> Path:
    recipe = make_recipe(
        epochs=epochs,
        batch_size=8,
        grad_accum_steps=2,
        model_ema=True,
        model_ema_decay=0.9,
        model_ema_warmup=True,
        lr=0.02,
        sdzoo=SdzooSettings(survival_warmup_epochs=epochs - 0.4, test_split="test"),
        **changes,
    )
    path.write_text(recipe.to_yaml())
    return path


@pytest.fixture(scope="module")
def undisturbed(
    server: Server, image_folder: Path, tmp_path_factory: pytest.TempPathFactory, make_recipe: MakeRecipe
) -> Undisturbed:
    folder = tmp_path_factory.mktemp("undisturbed")
    recipe = write_recipe(folder / "recipe.yaml", make_recipe, epochs=3)
    begun = time.monotonic()
    assert server.run(arguments(recipe, image_folder, folder / "run")) == 0, server.log.read_text()
    return Undisturbed(recipe, folder / "run", time.monotonic() - begun)


def assert_whole(output: Path) -> None:
    """Check what a killed run has left: what has its name can be read; the rest is temporary."""
    for name in ("last.pth", "best.safetensors"):
        if (output / name).exists():
            read_checkpoint(output / name)
    if output.exists():
        left = {path.name for path in output.iterdir()} - FILES
        assert all(name.startswith(".") for name in left), left


def kill_and_resume(server: Server, undisturbed: Undisturbed, data: Path, output: Path, **kill: Any) -> int:
    """Return the exit code of the first part of a run; the second makes it whole."""
    code = server.run(arguments(undisturbed.recipe, data, output), **kill)
    assert_whole(output)
    again = server.run(arguments(undisturbed.recipe, data, output, "--resume"))
    assert again == 0, server.log.read_text()[-2000:]
    assert_same_run(output, undisturbed.output)
    return code


@pytest.mark.parametrize("part", [*range(3), *(pytest.param(p, marks=pytest.mark.slow) for p in range(3, 20))])
def test_killed_at_a_random_moment(
    part: int, server: Server, undisturbed: Undisturbed, image_folder: Path, tmp_path: Path
) -> None:
    """Three moments in the first, second and third third of the run; in the slow tier seventeen more."""
    moment = random.Random(f"kill {part}").random()
    moment = (part + moment) / 3 if part < 3 else moment
    after_s = moment * undisturbed.seconds
    assert kill_and_resume(server, undisturbed, image_folder, tmp_path / "run", kill_after_s=after_s) in (-9, 0)


def renames(output: Path) -> int:
    """Return how many files a run with a checkpoint an epoch has given their names."""
    epochs = len((output / "log.csv").read_text().splitlines()) - 1
    best = len({row["epoch"] for row in improvements(output)})
    return 3 + 2 * epochs + best + 1


def improvements(output: Path) -> list[dict[str, Any]]:
    rows, best, found = read_checkpoint(output / "last.pth")[1]["rows"], -1.0, []
    for row in rows:
        if row["val_top1_percent"] > best:
            best = row["val_top1_percent"]
            found.append(row)
    return found


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    "call", [4, 5, 6, *(pytest.param(c, marks=pytest.mark.slow) for c in (1, 2, 3, *range(7, 14)))]
)
def test_killed_before_and_after_a_file_gets_its_name(
    call: int, when: str, server: Server, undisturbed: Undisturbed, image_folder: Path, tmp_path: Path
) -> None:
    """With a checkpoint an epoch: recipe, log and steps; of every epoch the best weights, last.pth, log; the result."""
    output, data = tmp_path / "run", image_folder
    code = server.run(arguments(undisturbed.recipe, data, output, interval_s=1000), kill=(call, when))
    assert code == (-9 if call <= renames(undisturbed.output) else 0)
    assert_whole(output)
    assert server.run(arguments(undisturbed.recipe, data, output, "--resume")) == 0, server.log.read_text()[-2000:]
    assert_same_run(output, undisturbed.output)


@pytest.fixture
def with_workers(image_folder: Path, tmp_path: Path, make_recipe: MakeRecipe) -> Iterator[subprocess.Popen[str]]:
    """A run in ``tmp_path / "run"`` that two processes read pictures for; it has saved itself once."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(make_recipe(epochs=1000, train_crop_mode=None, aa="rand-m5", workers=2).to_yaml())
    process = subprocess.Popen(
        [sys.executable, "-m", "sdzoo", *arguments(recipe, image_folder, tmp_path / "run")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    while not (tmp_path / "run" / "last.pth").exists() and process.poll() is None:
        time.sleep(0.02)
    yield process
    process.kill()
    process.communicate()


def children(process: subprocess.Popen[str]) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


needs_proc = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc to find a run's workers")


@needs_proc
def test_the_lock_ends_with_the_run_though_its_workers_live_on(
    with_workers: subprocess.Popen[str], tmp_path: Path
) -> None:
    """They look every 5 s whether the run is still there."""
    workers = children(with_workers)
    assert len(workers) == 2
    with_workers.kill()
    with_workers.wait()
    with RunFolder(tmp_path / "run").locked():
        assert any(Path(f"/proc/{worker}").exists() for worker in workers), "else this showed nothing"


@needs_proc
def test_a_killed_worker_ends_the_run_with_one_line(with_workers: subprocess.Popen[str], tmp_path: Path) -> None:
    os.kill(children(with_workers)[0], signal.SIGKILL)
    _, errors = with_workers.communicate(timeout=60)
    assert with_workers.returncode == 1
    [line] = errors.splitlines()
    assert line.startswith("sdzoo: a process that reads the data was killed, as happens where memory runs out")
    assert line.endswith("--resume")
    assert f"next: sdzoo train {tmp_path / 'recipe.yaml'}" in line
    assert_whole(tmp_path / "run")


@pytest.mark.slow
def test_the_command_killed_twenty_times_in_a_row(image_folder: Path, tmp_path: Path, make_recipe: MakeRecipe) -> None:
    """Each time at a random moment of its training, and resumed."""
    recipe = write_recipe(tmp_path / "recipe.yaml", make_recipe, epochs=40)

    def start(output: Path) -> subprocess.Popen[str]:
        """Start ``sdzoo train`` and return when it has begun to train."""
        before = inode(output / "steps.csv")
        process = subprocess.Popen(
            [sys.executable, "-m", "sdzoo", *arguments(recipe, image_folder, output, "--resume", interval_s=0.1)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        while inode(output / "steps.csv") == before and process.poll() is None:
            time.sleep(0.002)
        return process

    whole = start(tmp_path / "whole")
    begun = time.monotonic()
    said, _ = whole.communicate()
    assert whole.returncode == 0, said
    seconds = time.monotonic() - begun

    moments, output = random.Random("kills in a row"), tmp_path / "killed"
    for number in range(20):
        process = start(output)
        time.sleep(moments.uniform(0, seconds / 40))  # a quarter of the run in all: a machine may become faster
        process.kill()
        said, _ = process.communicate()
        assert process.returncode == -9, f"{number}: {said}"
        assert_whole(output)
    step = read_checkpoint(output / "last.pth")[1]["global_step"]
    assert 5 < step < 160, "the kills were spread over the run"
    last = start(output)
    said, _ = last.communicate()
    assert last.returncode == 0, said
    assert_same_run(output, tmp_path / "whole")


def inode(path: Path) -> int:
    return path.stat().st_ino if path.exists() else 0
