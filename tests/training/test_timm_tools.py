"""timm's own tools read what a run writes, without sdzoo's readers, and its ``train.py`` the recipes that ship.

Three of them, ``train.py``, ``validate.py`` and ``avg_checkpoints.py``, are in timm's repository, not in its package:
their tests run where ``SDZOO_TIMM_DIR`` names a checkout of it.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import timm.models
import torch
from runs import same
from timm.models import load_checkpoint, load_state_dict, resume_checkpoint
from timm.optim import create_optimizer_v2
from timm.utils import NativeScaler, load_checkpoint_metadata
from torch import Tensor, nn

import sdzoo
from sdzoo.training.checkpoint import load_model, read_checkpoint
from sdzoo.training.engine import train
from sdzoo.training.recipe import Recipe
from sdzoo.training.recipe_file import load_recipe, shipped_recipes
from sdzoo.training.recipe_table import upstream

MakeRecipe = Callable[..., Recipe]


@pytest.fixture(scope="module")
def ema_run(image_folder: Path, tmp_path_factory: pytest.TempPathFactory, make_recipe: MakeRecipe) -> Path:
    """A run with a moving average that differs from the weights."""
    output = tmp_path_factory.mktemp("ema") / "run"
    train(make_recipe(model_ema=True, model_ema_decay=0.7, lr=0.02), image_folder, output, device="cpu")
    return output


@pytest.fixture
def net() -> nn.Module:
    """A net of another schedule, as timm makes it: what is loaded decides."""
    return timm.create_model("sd_resnet20", num_classes=3).eval()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(3)))


def test_load_state_dict_takes_weights_or_their_average(ema_run: Path) -> None:
    state, rest = read_checkpoint(ema_run / "last.pth")
    last = str(ema_run / "last.pth")
    assert same(dict(load_state_dict(last, use_ema=False)), dict(state))
    assert same(dict(load_state_dict(last)), dict(rest["state_dict_ema"]))
    assert not same(dict(state), dict(rest["state_dict_ema"]))


@pytest.mark.parametrize("use_ema", [True, False])
def test_load_checkpoint_gives_the_function_that_sdzoo_gives(ema_run: Path, net: nn.Module, use_ema: bool) -> None:
    load_checkpoint(net, str(ema_run / "last.pth"), use_ema=use_ema)
    expected = timm.create_model("sd_resnet20", num_classes=3)
    state, rest = read_checkpoint(ema_run / "last.pth")
    expected.load_state_dict(rest["state_dict_ema"] if use_ema else state)
    assert torch.equal(logits(net), logits(expected))
    assert torch.equal(logits(net), logits(load_model(ema_run / "last.pth"))) == use_ema
    assert sdzoo.survival_probs(net)[-1] == 0.5


def test_best_weights_load_by_path_and_as_pretrained(ema_run: Path) -> None:
    best = ema_run / "best.safetensors"
    expected = logits(load_model(best))
    by_path = timm.create_model("sd_resnet20", num_classes=3, checkpoint_path=str(best))
    overlay = {"file": str(best), "num_classes": 3}
    pretrained = timm.create_model("sd_resnet20", pretrained=True, num_classes=3, pretrained_cfg_overlay=overlay)
    assert torch.equal(logits(by_path), expected)
    assert torch.equal(logits(pretrained), expected)


@pytest.mark.slow
def test_resume_checkpoint_restores_weights_optimizer_and_scaler(
    image_folder: Path, tmp_path: Path, make_recipe: MakeRecipe, net: nn.Module
) -> None:
    """``epoch`` counts those done, which is where timm's loop goes on."""
    recipe = make_recipe(epochs=1, batch_size=33, amp=True, lr=0.01)
    train(recipe, image_folder, tmp_path / "run", device="cpu")
    state, rest = read_checkpoint(tmp_path / "run" / "last.pth")
    optimizer = create_optimizer_v2(net, opt="sgd", lr=0.3, momentum=0.9, weight_decay=1e-4)
    scaler = NativeScaler("cpu")
    epoch = resume_checkpoint(net, str(tmp_path / "run" / "last.pth"), optimizer, scaler, log_info=False)
    assert epoch == 1
    assert same(dict(net.state_dict()), dict(state))
    assert same(optimizer.state_dict()["state"], rest["optimizer"]["state"])
    assert scaler.state_dict() == rest[NativeScaler.state_dict_key]
    assert scaler.state_dict()["_growth_tracker"] + 65536 / scaler.state_dict()["scale"] > 0


def test_metadata_is_read_without_the_weights(ema_run: Path) -> None:
    metadata: dict[str, Any] = load_checkpoint_metadata(str(ema_run / "last.pth"))
    assert (metadata["arch"], metadata["epoch"]) == ("sd_resnet20", 2)


def test_files_hold_nothing_but_tensors_and_plain_values(ema_run: Path) -> None:
    content = torch.load(ema_run / "last.pth", weights_only=True)
    plain = (int, float, str, bool, type(None), Tensor)

    def check(value: Any, where: str) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                check(item, f"{where}.{key}")
        elif isinstance(value, (list, tuple)):
            for index, item in enumerate(value):
                check(item, f"{where}[{index}]")
        else:
            assert isinstance(value, plain), f"{where}: {type(value)}"

    check(content, "last")


# With a checkout of timm's repository


@pytest.fixture(scope="module")
def timm_dir() -> Path:
    folder = os.environ.get("SDZOO_TIMM_DIR")
    if not folder:
        pytest.skip("needs a checkout of timm's repository, named by SDZOO_TIMM_DIR")
    return Path(folder)


def run_script(script: Path, *arguments: str | Path) -> str:
    """Run a script of timm's that knows sdzoo's models, and the timm that is installed rather than the checkout's."""
    code = "import sys, runpy, sdzoo; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    result = subprocess.run(
        [sys.executable, "-c", code, str(script), *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", ["last.pth", "best.safetensors"])
def test_validate_py_measures_what_the_log_says(timm_dir: Path, image_folder: Path, ema_run: Path, name: str) -> None:
    log = read_checkpoint(ema_run / "last.pth")[1]["rows"]
    best = json.loads((ema_run / "result.json").read_text())["best_epoch"]
    options = ["--model", "sd_resnet20", "--num-classes", "3", "--checkpoint", ema_run / name, "--data-dir"]
    options += [image_folder, "--split", "val", "--device", "cpu", "--use-ema", "-j", "1", "-b", "4", "--no-prefetcher"]
    said = run_script(timm_dir / "validate.py", *options)
    result = json.loads(said[said.index("--result") + len("--result") :])
    row = log[-1] if name == "last.pth" else log[best - 1]
    assert result["top1"] == pytest.approx(row["val_top1_percent"], abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("ema", [True, False])
def test_avg_checkpoints_py_averages_two_runs(
    timm_dir: Path, image_folder: Path, ema_run: Path, tmp_path: Path, make_recipe: MakeRecipe, ema: bool
) -> None:
    other = tmp_path / "other"
    recipe = make_recipe(model_ema=True, model_ema_decay=0.7, lr=0.02, seed=8)
    train(recipe, image_folder, other, device="cpu")
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    for index, run in enumerate((ema_run, other)):
        (inputs / f"{index}.pth").write_bytes((run / "last.pth").read_bytes())
    options = ["--input", inputs, "--filter", "*.pth", "--output", tmp_path / "averaged.pth"]
    run_script(timm_dir / "avg_checkpoints.py", *options, *([] if ema else ["--no-use-ema"]))
    averaged = timm.create_model("sd_resnet20", num_classes=3)
    load_checkpoint(averaged, str(tmp_path / "averaged.pth"))
    states = []
    for run in (ema_run, other):
        state, rest = read_checkpoint(run / "last.pth")
        states.append(rest["state_dict_ema"] if ema else state)
    for name, tensor in averaged.state_dict().items():
        expected = (states[0][name].double() + states[1][name].double()) / 2
        if not name.endswith("num_batches_tracked"):  # a whole number, which its mean need not be
            torch.testing.assert_close(tensor.double(), expected, rtol=1e-6, atol=1e-7, msg=name)
    assert sdzoo.survival_probs(averaged) == sdzoo.survival_probs(load_model(ema_run / "last.pth"))


# As a user starts train.py, with the checkout's own timm; torchvision takes CIFAR's files, whatever they hold.
TRAIN = """
import runpy, sys
from pathlib import Path
import torchvision.datasets.cifar
torchvision.datasets.cifar.check_integrity = lambda path, *_: Path(path).is_file()
sys.argv = sys.argv[1:]
sys.path.insert(0, str(Path(sys.argv[0]).parent))
runpy.run_path(sys.argv[0], run_name="__main__")
"""
REFUSALS = {"pad4": "assert train_crop_mode in {", "torch/svhn": "Unknown torchvision dataset svhn"}


@pytest.fixture
def small_data(make_image_folder: Callable[..., Path]) -> Path:
    """A folder of class folders which is CIFAR-10 and CIFAR-100, too: a few pictures each."""
    root = make_image_folder({"train": 3, "val": 1})
    sets = {
        ("cifar-10-batches-py", "labels"): [*(f"data_batch_{part}" for part in range(1, 6)), "test_batch"],
        ("cifar-100-python", "fine_labels"): ["train", "test"],
    }
    for (folder, key), files in sets.items():
        (root / folder).mkdir()
        content = {
            "data": np.zeros((9, 3072), np.uint8),
            key: list(range(9)),
            "label_names": [],
            "fine_label_names": [],
        }
        for name in (*files, "batches.meta", "meta"):
            (root / folder / name).write_bytes(pickle.dumps(content))
    return root


@pytest.mark.slow
@pytest.mark.parametrize("name", shipped_recipes())
def test_train_py_makes_of_a_recipe_what_the_table_says(
    timm_dir: Path, small_data: Path, tmp_path: Path, name: str
) -> None:
    """Two steps an epoch, two epochs, which is all that is changed."""
    recipe_file = shipped_recipes()[name]
    options = ["--config", recipe_file, "--data-dir", small_data, "--output", tmp_path, "--experiment", "run"]
    options += ["--device", "cpu", "-b", "4", "--epochs", "2"]
    result = subprocess.run(
        [sys.executable, "-c", TRAIN, str(timm_dir / "train.py"), *map(str, options)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    kind, _, reason = upstream(load_recipe(recipe_file)).partition(": ")
    if kind == "refused":
        assert result.returncode
        assert REFUSALS[reason] in result.stderr, result.stderr[-2000:]
    else:
        assert result.returncode == 0, result.stderr[-2000:]
        assert len((tmp_path / "run" / "summary.csv").read_text().splitlines()) == 3, "a head and two epochs"
