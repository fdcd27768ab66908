from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import resource
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import timm
import timm.models
import torch
import torch.nn.functional as F
from PIL import Image
from runs import FILES, after_step, assert_same_run, epochs, files, interrupt, named_seed, plan, steps
from torch import Tensor, nn
from torch.optim import Optimizer

import sdzoo
from sdzoo.errors import InputError
from sdzoo.training.checkpoint import describe, load_model, read_checkpoint, save_weights
from sdzoo.training.data.loader import EvaluationData, open_split, open_training_data
from sdzoo.training.data.sources import FolderSource
from sdzoo.training.distributed import Processes, processes
from sdzoo.training.engine import Comforts, Diverged, Interrupted, train
from sdzoo.training.evaluate import evaluate
from sdzoo.training.model import create_model
from sdzoo.training.recipe import Recipe, SdzooSettings
from sdzoo.training.recipe_file import load_recipe

MakeRecipe = Callable[..., Recipe]
LINEAR_TO_HALF = [1 - block / 9 * 0.5 for block in range(1, 10)]
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
CONFIG = {"input_size": (3, 32, 32), "mean": MEAN, "std": STD, "interpolation": "bilinear", "crop_pct": 1.0}


def initial_model(seed: int = 7, **options: Any) -> Any:
    """Return the model that a run of ``seed`` starts from, in training."""
    torch.manual_seed(named_seed(seed, "init"))
    return timm.create_model("sd_resnet20", num_classes=3, **options).train()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    """Return the logits of 8 fixed images of noise."""
    channels = model.in_chans
    assert isinstance(channels, int)
    return model.eval()(torch.randn(8, channels, 32, 32, generator=torch.Generator().manual_seed(5)))


# What a run leaves


def test_run_folder_holds_these_files_and_no_other(finished_run: Any) -> None:
    assert set(files(finished_run.output)) == FILES
    assert finished_run.best == finished_run.output / "best.safetensors"


def test_recipe_beside_the_checkpoints_loads_back_equal(finished_run: Any) -> None:
    assert load_recipe(finished_run.output / "recipe.yaml") == finished_run.recipe


def test_log_has_these_columns_and_a_row_an_epoch(finished_run: Any) -> None:
    assert (finished_run.output / "log.csv").read_text().splitlines()[0] == (
        "epoch,step,lr,train_loss,live_blocks,seconds,val_loss,val_top1_percent,first_conv_gradient"
    )
    log = epochs(finished_run.output)
    assert [row["epoch"] for row in log] == ["1", "2"]
    assert [row["step"] for row in log] == ["4", "8"]
    assert 0 < float(log[0]["seconds"]) <= float(log[1]["seconds"])


def test_best_is_the_first_epoch_of_the_highest_validation_accuracy(finished_run: Any, image_folder: Path) -> None:
    log = epochs(finished_run.output)
    best = max(log, key=lambda row: float(row["val_top1_percent"]))
    assert read_checkpoint(finished_run.best)[1]["epoch"] == int(best["epoch"])
    measured = evaluate(load_model(finished_run.best), open_split("", image_folder, "val", CONFIG))
    assert measured.top1_percent == pytest.approx(float(best["val_top1_percent"]), abs=1e-3)
    assert measured.loss == pytest.approx(float(best["val_loss"]), rel=1e-3, abs=1e-5)


def test_best_is_kept_when_later_epochs_are_worse(
    image_folder: Path, tmp_path: Path, make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Validation is replaced by fixed figures: 50, 70, 70, 60 %; the first 70 is the best."""
    from sdzoo.training import engine
    from sdzoo.training.evaluate import Evaluation

    figures = iter([50.0, 70.0, 70.0, 60.0])
    monkeypatch.setattr(engine, "evaluate", lambda *_: Evaluation(next(figures), 100.0, 1.0, 12))
    recipe = make_recipe(epochs=4, batch_size=66)
    best = train(recipe, image_folder, tmp_path / "run", device="cpu")
    assert read_checkpoint(best)[1]["epoch"] == 2
    assert [row["val_top1_percent"] for row in epochs(tmp_path / "run")] == ["50.0", "70.0", "70.0", "60.0"]


def test_last_pth_holds_everything_to_go_on(finished_run: Any) -> None:
    state, rest = read_checkpoint(finished_run.output / "last.pth")
    assert rest["epoch"] == 2
    assert rest["recipe"] == dataclasses.asdict(finished_run.recipe)
    assert rest["arch"] == "sd_resnet20"
    assert tuple(rest["labels"]) == ("blue", "green", "red")
    assert state.keys() == timm.create_model("sd_resnet20", num_classes=3).state_dict().keys()


def test_progress_is_printed_a_line_an_epoch(
    image_folder: Path, tmp_path: Path, make_recipe: MakeRecipe, capsys: pytest.CaptureFixture[str]
) -> None:
    train(make_recipe(batch_size=66), image_folder, tmp_path / "run", device="cpu")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["epoch 1/2", "epoch 2/2"]
    assert all("val top-1" in line and "live blocks" in line for line in lines)


# What it learns


def test_loss_falls_and_accuracy_rises_above_chance(
    make_image_folder: Callable[..., Path], tmp_path: Path, make_recipe: MakeRecipe
) -> None:
    folder = make_image_folder({"train": 32, "val": 10, "test": 10})
    recipe = make_recipe(epochs=6, drop=0.0, lr=0.05, warmup_epochs=1, validation_batch_size=None)
    best = train(recipe, folder, tmp_path / "run", device="cpu")
    losses = [float(row["train_loss"]) for row in epochs(tmp_path / "run")]
    assert losses[0] == pytest.approx(math.log(3), abs=0.8), "an untrained net of three classes"
    assert losses[-1] < 0.5 * losses[0]
    test = evaluate(load_model(best), open_split("", folder, "test", CONFIG))
    assert test.top1_percent > 60, "chance is 33 %; 30 images"


def test_run_is_the_plain_loop(image_folder: Path, tmp_path: Path, make_recipe: MakeRecipe) -> None:
    """Forward, loss with smoothing, clipping, SGD with Nesterov's momentum and the cosine, written out."""
    recipe = make_recipe(epochs=1, batch_size=22, drop=0.0, weight_decay=0.0, smoothing=0.1, clip_grad=0.5, lr=0.05)
    train(recipe, image_folder, tmp_path / "run", device="cpu")

    model = initial_model(drop_path_rate=0.5)
    model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    losses, gradients = [], []
    for step, (images, labels) in enumerate(open_training_data(recipe, image_folder, CONFIG).epoch(0)):
        x = model.act1(model.bn1(model.conv1(images.contiguous(memory_format=torch.channels_last))))
        blocks = [block for stage in (model.layer1, model.layer2, model.layer3) for block in stage]
        for block, is_open in zip(blocks, plan(7, step, LINEAR_TO_HALF), strict=True):
            shortcut = block.shortcut(x)
            x = F.relu(shortcut + block.branch(x)) if is_open else F.relu(shortcut)
        log_probs = F.log_softmax(model.fc(x.mean(dim=(2, 3))), dim=1)
        chosen = log_probs[torch.arange(22), labels]
        loss = -(0.9 * chosen + 0.1 * log_probs.mean(dim=1)).mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        for parameter in model.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients.append(float(model.conv1.weight.grad.double().abs().mean()))
        norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in model.parameters()))
        for parameter in model.parameters():
            parameter.grad *= min(1.0, 0.5 / (norm + 1e-6))
        optimizer.param_groups[0]["lr"] = 0.5 * 0.05 * (1 + math.cos(math.pi * step / 3))
        optimizer.step()
    assert len(losses) == 3
    [epoch] = epochs(tmp_path / "run")
    assert float(epoch["train_loss"]) == pytest.approx(sum(losses) / 3, rel=1e-4)
    assert float(epoch["first_conv_gradient"]) == pytest.approx(sum(gradients) / 3, rel=1e-3)
    logged = steps(tmp_path / "run")
    assert [float(row["loss"]) for row in logged] == pytest.approx(losses, rel=1e-3)
    assert [float(row["first_conv_gradient"]) for row in logged] == pytest.approx(gradients, rel=1e-3)
    state, _ = read_checkpoint(tmp_path / "run" / "last.pth")
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(
            state[name], tensor, rtol=1e-3, atol=2e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


def cosine(step: int, total: int, warmup: int = 0) -> float:
    """Return the learning rate: linear from 0.01 over ``warmup`` steps, then 0.1 to 0.002 by a half cosine."""
    if step < warmup:
        return 0.01 + step * (0.1 - 0.01) / warmup
    return 0.002 + 0.5 * (0.1 - 0.002) * (1 + math.cos(math.pi * step / total))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        pytest.param({"sched_on_updates": True}, [cosine(3 * epoch - 1, 12) for epoch in range(1, 5)], id="by update"),
        pytest.param(
            {"sched_on_updates": True, "warmup_epochs": 2},
            [cosine(3 * epoch - 1, 12, warmup=6) for epoch in range(1, 5)],
            id="by update, warmed up",
        ),
        pytest.param({"sched_on_updates": False}, [cosine(epoch, 4) for epoch in range(4)], id="by epoch"),
        pytest.param(
            {"sched": "multistep", "sched_on_updates": False, "decay_milestones": [2, 4], "decay_rate": 0.5},
            [0.1, 0.05, 0.05, 0.025],
            id="multistep: timm's milestones are the numbers, from 1, of the epochs that begin with a new rate",
        ),
        pytest.param({"sched": "constant"}, [0.1] * 4, id="constant"),
    ],
)
def test_learning_rate_follows_the_schedule(
    make_image_folder: Callable[..., Path],
    tmp_path: Path,
    make_recipe: MakeRecipe,
    changes: dict[str, Any],
    expected: list[float],
) -> None:
    """4 epochs of 3 steps; the log holds the rate of the last step of each epoch."""
    folder = make_image_folder({"train": 4, "val": 1})
    recipe = make_recipe(**{"epochs": 4, "batch_size": 4, "lr": 0.1, "min_lr": 0.002, "warmup_lr": 0.01, **changes})
    train(recipe, folder, tmp_path / "run", device="cpu")
    assert [float(row["lr"]) for row in epochs(tmp_path / "run")] == pytest.approx(expected, rel=1e-6)


def test_weight_decay_acts_on_skipped_blocks(
    make_image_folder: Callable[..., Path], tmp_path: Path, make_recipe: MakeRecipe
) -> None:
    """A zero gradient, not none: after one step W' = W (1 - lr * decay) where the block was skipped."""
    folder = make_image_folder({"train": 4, "val": 1})
    recipe = make_recipe(epochs=1, batch_size=12, lr=0.1, weight_decay=0.5, momentum=0.0, opt="momentum")
    recipe = dataclasses.replace(recipe, drop_path=None, model_kwargs={"survival_probs": [0.5] * 9})
    train(recipe, folder, tmp_path / "run", device="cpu")
    before = initial_model(survival_probs=[0.5] * 9).state_dict()
    after, _ = read_checkpoint(tmp_path / "run" / "last.pth")
    names = [f"layer{stage}.{block}" for stage in (1, 2, 3) for block in range(3)]
    skipped = [name for name, is_open in zip(names, plan(7, 0, [0.5] * 9), strict=True) if not is_open]
    assert 0 < len(skipped) < 9
    for name in skipped:
        for conv in ("conv1", "conv2"):
            key = f"{name}.{conv}.weight"
            torch.testing.assert_close(after[key], before[key] * (1 - 0.1 * 0.5), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    "changes",
    [
        {"model_kwargs": {"in_chans": 1}},
        {"no_aug": True, "train_crop_mode": None},
        {"channels_last": False, "drop_path": None},
        {"opt": "adamw", "opt_kwargs": {"eps": 1e-6}, "lr": 1e-3},
        {"train_split": "val", "val_split": "train", "batch_size": 4},
    ],
    ids=str,
)
def test_recipes_of_other_kinds_run(
    image_folder: Path, tmp_path: Path, make_recipe: MakeRecipe, changes: dict[str, Any]
) -> None:
    recipe = make_recipe(**{"epochs": 1, "batch_size": 33, **changes})
    assert logits(load_model(train(recipe, image_folder, tmp_path / "run", device="cpu"))).shape == (8, 3)


def test_without_augmentation_the_first_loss_is_that_of_the_pictures_themselves(
    make_image_folder: Callable[..., Path], tmp_path: Path, make_recipe: MakeRecipe
) -> None:
    """One batch holds every picture, squeezed to 32 x 32: neither order nor anything random is left."""
    folder = make_image_folder({"train": 4, "val": 1})
    recipe = make_recipe(epochs=1, batch_size=12, drop=0.0, drop_path=0.0, no_aug=True, train_crop_mode=None)
    train(recipe, folder, tmp_path / "run", device="cpu")
    pictures, labels = [], []
    for label, name in enumerate(("blue", "green", "red")):
        for file in sorted((folder / "train" / name).iterdir()):
            picture = np.array(Image.open(file).convert("RGB").resize((32, 32), Image.Resampling.BILINEAR))
            pictures.append((picture / 255 - np.array(MEAN)) / np.array(STD))
            labels.append(label)
    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float()
    expected = F.cross_entropy(initial_model(drop_path_rate=0.0)(images), torch.tensor(labels)).item()
    assert float(epochs(tmp_path / "run")[0]["train_loss"]) == pytest.approx(expected, rel=1e-4)


def test_training_in_a_thread_of_its_own(image_folder: Path, tmp_path: Path, make_recipe: MakeRecipe) -> None:
    """Signals reach the main thread only; a notebook or a server trains elsewhere."""
    recipe = make_recipe(epochs=1, batch_size=66)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(train, recipe, image_folder, tmp_path / "run", device="cpu").result().is_file()


# Gates


class Forward(NamedTuple):
    """What one training forward computed."""

    open_blocks: list[bool]
    reported: list[bool]


@contextmanager
def recorded_forwards() -> Iterator[list[Forward]]:
    """Record, of every training forward of a whole model, the blocks whose convolutions were called."""
    recorded: list[Forward] = []
    called: set[int] = set()

    def hook(module: nn.Module, *_: Any) -> None:
        if isinstance(module, nn.Conv2d):
            called.add(id(module))
        elif type(module).__name__ == "SDResNetCifar":
            if module.training:
                stages: list[Any] = [module.get_submodule(name) for name in ("layer1", "layer2", "layer3")]
                blocks = [block for stage in stages for block in stage]
                opened = [id(block.conv1) in called and id(block.conv2) in called for block in blocks]
                recorded.append(Forward(opened, sdzoo.live_blocks(module)))
            called.clear()

    handle = torch.nn.modules.module.register_module_forward_hook(hook)
    try:
        yield recorded
    finally:
        handle.remove()


def test_gates_follow_the_plan_of_their_step(image_folder: Path, tmp_path: Path, make_recipe: MakeRecipe) -> None:
    with recorded_forwards() as forwards:
        train(make_recipe(seed=11), image_folder, tmp_path / "run", device="cpu")
    expected = [plan(11, step, LINEAR_TO_HALF) for step in range(8)]
    assert [forward.open_blocks for forward in forwards] == expected
    assert [forward.reported for forward in forwards] == expected
    assert len({tuple(bits) for bits in expected}) > 4, "gates vary from step to step"


def test_live_blocks_column_is_the_mean_of_the_plan(finished_run: Any) -> None:
    live = [sum(plan(finished_run.recipe.seed, step, LINEAR_TO_HALF)) for step in range(8)]
    column = [float(row["live_blocks"]) for row in epochs(finished_run.output)]
    assert column == pytest.approx([sum(live[:4]) / 4, sum(live[4:]) / 4], abs=1e-3)


def test_plans_are_as_frequent_as_the_survival_probabilities() -> None:
    """The stream that is hashed anew each step is a fair one: 5000 steps, within 4 standard deviations."""
    seen = torch.tensor([plan(42, step, LINEAR_TO_HALF) for step in range(5000)]).double().mean(dim=0)
    for frequency, p in zip(seen.tolist(), LINEAR_TO_HALF, strict=True):
        assert frequency == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / 5000))


def test_constant_depth_computes_every_block(image_folder: Path, tmp_path: Path, make_recipe: MakeRecipe) -> None:
    train(make_recipe(drop_path=0.0, batch_size=66, epochs=1), image_folder, tmp_path / "run", device="cpu")
    assert epochs(tmp_path / "run")[0]["live_blocks"] == "9.0"


def test_gates_per_sample_can_be_trained(image_folder: Path, tmp_path: Path, make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(model_kwargs={"mode": "sample"}, batch_size=66, epochs=1)
    assert train(recipe, image_folder, tmp_path / "run", device="cpu").is_file()


def test_model_without_gates_is_refused(image_folder: Path, tmp_path: Path, make_recipe: MakeRecipe) -> None:
    with pytest.raises(InputError, match='"resnet18" is not a model'):
        train(make_recipe(model="resnet18", drop_path=None), image_folder, tmp_path / "run", device="cpu")


# Corrupt images


def test_corrupt_images_that_other_ranks_saw_count_too(
    image_folder: Path, tmp_path: Path, make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of 66 is more than 0.1 %, whoever saw it."""
    monkeypatch.setattr(Processes, "union", lambda _, part: part | {"theirs.png": "truncated"})
    with pytest.raises(InputError, match=r"1 of 66 training images cannot be used.*theirs\.png: truncated"):
        train(make_recipe(epochs=1), image_folder, tmp_path / "run", device="cpu")


# Interruption


def test_sigterm_while_pictures_are_read_can_say_how_to_go_on(
    image_folder: Path, tmp_path: Path, make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And is no fault of the picture."""
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(FolderSource, "image", lambda *_: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(Interrupted, match="terminated outside of training, nothing is lost"):
        train(make_recipe(epochs=1), image_folder, tmp_path / "run", device="cpu")
    assert signal.getsignal(signal.SIGTERM) is before
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("step", "number"),
    [
        pytest.param(1, signal.SIGINT, id="SIGINT after the first step"),
        pytest.param(4, signal.SIGINT, id="SIGINT after the last step of an epoch"),
        pytest.param(6, signal.SIGINT, id="SIGINT in the second epoch"),
        pytest.param(6, signal.SIGTERM, id="SIGTERM in the second epoch"),
        pytest.param(8, signal.SIGINT, id="SIGINT after the very last step"),
    ],
)
def test_interrupted_and_resumed_run_is_the_undisturbed_one_to_the_bit(
    finished_run: Any, image_folder: Path, tmp_path: Path, step: int, number: signal.Signals
) -> None:
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    output = tmp_path / "run"
    with after_step(step, interrupt(number)), pytest.raises(Interrupted, match=r"last\.pth goes on") as caught:
        train(finished_run.recipe, image_folder, output, device="cpu")
    assert "\n" not in str(caught.value)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert logits(load_model(output / "last.pth")).isfinite().all(), "what is left is a usable checkpoint"
    torch.manual_seed(99)  # whatever was drawn before
    train(finished_run.recipe, image_folder, output, resume=True, device="cpu")
    assert_same_run(output, finished_run.output)


def test_a_run_stopped_while_it_validates_goes_on_with_the_validation(
    finished_run: Any, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not after it, which may take long; and several SIGTERMs, as some clusters send, are one request."""
    batches: list[int] = []
    original = EvaluationData.batches

    def signalled(data: EvaluationData) -> Iterator[tuple[Tensor, Tensor]]:
        for number, batch in enumerate(original(data)):
            batches.append(number)
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(EvaluationData, "batches", signalled)
        with pytest.raises(Interrupted, match=r"stopped before epoch 1 was validated; .*last\.pth goes on"):
            train(finished_run.recipe, image_folder, tmp_path / "run", device="cpu")
    assert batches == [0], "the batch that was being read is not computed any more"
    assert not epochs(tmp_path / "run")
    train(finished_run.recipe, image_folder, tmp_path / "run", resume=True, device="cpu")
    assert_same_run(tmp_path / "run", finished_run.output)


def test_run_interrupted_twice(finished_run: Any, image_folder: Path, tmp_path: Path) -> None:
    for step in (3, 2):
        with after_step(step, interrupt()), pytest.raises(Interrupted):
            train(finished_run.recipe, image_folder, tmp_path / "run", resume=step == 2, device="cpu")
    train(finished_run.recipe, image_folder, tmp_path / "run", resume=True, device="cpu")
    assert_same_run(tmp_path / "run", finished_run.output)


def test_killed_run_goes_on_from_its_last_epoch(finished_run: Any, image_folder: Path, tmp_path: Path) -> None:
    def die(_: Optimizer) -> None:
        raise SystemError("power cut")

    with after_step(6, die), pytest.raises(SystemError):
        train(finished_run.recipe, image_folder, tmp_path / "run", device="cpu")
    train(finished_run.recipe, image_folder, tmp_path / "run", resume=True, device="cpu")
    assert_same_run(tmp_path / "run", finished_run.output)


@pytest.mark.parametrize("before", [signal.default_int_handler, signal.SIG_IGN], ids=["foreground", "background"])
@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_a_ctrl_c_after_a_signal_acts_at_once(
    image_folder: Path, tmp_path: Path, make_recipe: MakeRecipe, before: Any, first: signal.Signals
) -> None:
    def twice(optimizer: Optimizer) -> None:
        interrupt(first)(optimizer)
        interrupt(signal.SIGINT)(optimizer)

    outside = signal.signal(signal.SIGINT, before)
    try:
        with after_step(6, twice), pytest.raises(KeyboardInterrupt):
            train(make_recipe(), image_folder, tmp_path / "run", device="cpu")
        assert signal.getsignal(signal.SIGINT) == before
    finally:
        signal.signal(signal.SIGINT, outside)
    assert set(files(tmp_path / "run")) == FILES - {"result.json"}
    assert read_checkpoint(tmp_path / "run" / "last.pth")[1]["epoch"] == 1


def test_finished_run_resumed_does_nothing_more(finished_run: Any, image_folder: Path) -> None:
    before = files(finished_run.output)
    assert train(finished_run.recipe, image_folder, finished_run.output, resume=True, device="cpu") == finished_run.best
    assert files(finished_run.output) == before


def test_same_recipe_same_weights_other_seed_other_weights(
    image_folder: Path, tmp_path: Path, make_recipe: MakeRecipe
) -> None:
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        train(make_recipe(batch_size=33, epochs=1, seed=seed), image_folder, tmp_path / name, device="cpu")
    assert_same_run(tmp_path / "a", tmp_path / "b")
    weights = [read_checkpoint(tmp_path / name / "last.pth")[0]["fc.weight"] for name in "ac"]
    assert not torch.equal(*weights)


def test_existing_run_is_refused_without_resume(finished_run: Any, image_folder: Path) -> None:
    before = files(finished_run.output)
    with pytest.raises(InputError, match="already holds a run; resume it, or name another folder"):
        train(finished_run.recipe, image_folder, finished_run.output, device="cpu")
    assert files(finished_run.output) == before


def test_resuming_where_there_is_no_run_starts_one_and_says_so(
    image_folder: Path, tmp_path: Path, make_recipe: MakeRecipe, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = make_recipe(epochs=1, batch_size=66)
    assert train(recipe, image_folder, tmp_path / "new", resume=True, device="cpu").is_file()
    assert "holds no run to resume: starting anew" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lr": 0.2, "seed": 8}, ["lr was 0.1, is 0.2", "seed was 7, is 8"]),
        ({"drop_path": 0.4}, ["drop_path was 0.5, is 0.4", "other survival probabilities"]),
        ({"model_kwargs": {"schedule": "uniform"}}, ["model_kwargs was {}, is", "other survival probabilities"]),
        ({"model": "sd_resnet32"}, ["model was sd_resnet20, is sd_resnet32"]),
        ({"sdzoo": SdzooSettings(survival_warmup_epochs=1.0)}, ["sdzoo was", "'survival_warmup_epochs': 1.0"]),
    ],
    ids=str,
)
def test_resume_under_another_recipe_is_refused(
    finished_run: Any, image_folder: Path, changes: dict[str, Any], said: list[str]
) -> None:
    before = files(finished_run.output)
    other = dataclasses.replace(finished_run.recipe, **changes)
    with pytest.raises(InputError, match="is from another run: ") as caught:
        train(other, image_folder, finished_run.output, resume=True, device="cpu")
    for part in (*said, "--force goes on all the same"):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    assert files(finished_run.output) == before


@pytest.mark.parametrize("content", [b"", b"garbage", None], ids=["empty", "garbage", "truncated"])
def test_resume_of_a_damaged_checkpoint(
    finished_run: Any, image_folder: Path, tmp_path: Path, content: bytes | None
) -> None:
    last = tmp_path / "run" / "last.pth"
    last.parent.mkdir()
    last.write_bytes((finished_run.output / "last.pth").read_bytes()[:5000] if content is None else content)
    with pytest.raises(InputError, match=r"last\.pth"):
        train(finished_run.recipe, image_folder, last.parent, resume=True, device="cpu")


def test_resume_of_a_checkpoint_that_is_no_runs(finished_run: Any, image_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    torch.save({"state_dict": load_model(finished_run.best).state_dict()}, tmp_path / "run" / "last.pth")
    with pytest.raises(InputError, match=r"last\.pth"):
        train(finished_run.recipe, image_folder, tmp_path / "run", resume=True, device="cpu")


# What goes wrong


def poison(optimizer: Optimizer) -> None:
    with torch.no_grad():
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.fill_(math.nan)


def test_divergence_leaves_the_checkpoint_from_before(
    image_folder: Path, tmp_path: Path, make_recipe: MakeRecipe
) -> None:
    output = tmp_path / "run"
    with after_step(5, poison), pytest.raises(Diverged, match="the loss is nan at step 6") as caught:
        train(make_recipe(), image_folder, output, device="cpu")
    assert "\n" not in str(caught.value)
    state, rest = read_checkpoint(output / "last.pth")
    assert rest["epoch"] == 1
    assert all(bool(tensor.isfinite().all()) for tensor in state.values())
    assert len(epochs(output)) == 1


def test_absurd_learning_rate_diverges(image_folder: Path, tmp_path: Path, make_recipe: MakeRecipe) -> None:
    output = tmp_path / "run"
    with pytest.raises(Diverged) as caught:
        train(make_recipe(lr=1e30), image_folder, output, device="cpu")
    assert not (output / "last.pth").exists(), "it diverged in the first epoch: there is nothing worth keeping"
    assert "last.pth is from" not in str(caught.value), "the message names a file that is not there"


def test_divergence_in_the_last_step_of_an_epoch_is_not_saved(
    image_folder: Path, tmp_path: Path, make_recipe: MakeRecipe
) -> None:
    """Only validation sees it then; weights of NaN must become neither last.pth nor the best."""
    output = tmp_path / "run"
    with after_step(8, poison), pytest.raises(Diverged):
        train(make_recipe(), image_folder, output, device="cpu")
    for name in ("last.pth", "best.safetensors"):
        state, rest = read_checkpoint(output / name)
        assert rest["epoch"] == 1
        assert all(bool(tensor.isfinite().all()) for tensor in state.values())


def test_a_checkpoint_between_the_step_that_broke_the_weights_and_the_loss_that_says_so_keeps_the_good_one(
    image_folder: Path, tmp_path: Path, make_recipe: MakeRecipe
) -> None:
    """The sixth step leaves NaN behind; a checkpoint is due after every step."""
    with after_step(6, poison), pytest.raises(Diverged, match="the loss is nan at step 7"):
        train(make_recipe(), image_folder, tmp_path / "run", device="cpu", comforts=Comforts(checkpoint_interval_s=0))
    state, rest = read_checkpoint(tmp_path / "run" / "last.pth")
    assert rest["global_step"] == 5
    assert all(bool(tensor.isfinite().all()) for tensor in state.values())


@pytest.mark.slow
def test_steps_that_float16_skips_do_not_spoil_the_epochs_means(
    image_folder: Path, tmp_path: Path, make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss is finite, its gradient overflows until the scale, at first absurd, has been halved often enough."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
    monkeypatch.setattr("sdzoo.training.step.create_scaler", lambda *_: scaler)
    recipe = make_recipe(epochs=1, batch_size=4, amp=True, lr=1e-3)
    train(recipe, image_folder, tmp_path / "run", device="cpu")
    gradients = [float(row["first_conv_gradient"]) for row in steps(tmp_path / "run")]
    finite = [gradient for gradient in gradients if math.isfinite(gradient)]
    assert 0 < len(finite) < len(gradients) == 16
    [epoch] = epochs(tmp_path / "run")
    assert float(epoch["first_conv_gradient"]) == pytest.approx(sum(finite) / len(finite), rel=1e-4)
    losses = [float(row["loss"]) for row in steps(tmp_path / "run")]
    assert float(epoch["train_loss"]) == pytest.approx(sum(losses) / 16, rel=1e-4)


@pytest.mark.parametrize("statistic", ["running_mean", "running_var"])
def test_batchnorm_statistics_that_are_not_finite_are_divergence(
    image_folder: Path, tmp_path: Path, make_recipe: MakeRecipe, statistic: str
) -> None:
    """A step that float16 skips leaves the weights, but has been through BatchNorm: a NaN there never goes away."""

    def spoil(_: Optimizer) -> None:
        norms[-1].get_buffer(statistic)[3] = math.nan

    norms: list[nn.Module] = []
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda module, *_: norms.append(module) if isinstance(module, nn.BatchNorm2d) else None
    )
    try:
        with (
            after_step(6, spoil),
            pytest.raises(Diverged, match=r"not finite after step 8; .*last\.pth is from before"),
        ):
            train(make_recipe(), image_folder, tmp_path / "run", device="cpu")
    finally:
        handle.remove()
    assert read_checkpoint(tmp_path / "run" / "last.pth")[1]["epoch"] == 1


def test_full_disk_keeps_the_old_checkpoint_and_leaves_no_temporary_file(
    finished_run: Any, image_folder: Path, tmp_path: Path
) -> None:
    """From the second epoch on, the system refuses every byte beyond 100 kB of a file, as a full disk would."""
    output = tmp_path / "run"
    saved: dict[str, bytes] = {}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(_: Optimizer) -> None:
        saved.update(files(output))
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))

    try:
        with after_step(5, fill), pytest.raises((InputError, OSError), match="too large") as caught:
            train(finished_run.recipe, image_folder, output, device="cpu")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(caught.value)
    assert str(output) in str(caught.value)
    assert files(output)["last.pth"] == saved["last.pth"]
    assert set(files(output)) == FILES - {"result.json"}
    train(finished_run.recipe, image_folder, output, resume=True, device="cpu")
    assert_same_run(output, finished_run.output)


@pytest.mark.parametrize("inside", ["file", "file/run"])
def test_output_that_cannot_be_a_folder(
    image_folder: Path, tmp_path: Path, make_recipe: MakeRecipe, inside: str
) -> None:
    (tmp_path / "file").write_text("old")
    with pytest.raises(InputError, match="cannot create") as caught:
        train(make_recipe(), image_folder, tmp_path / inside, device="cpu")
    assert "\n" not in str(caught.value)
    assert (tmp_path / "file").read_text() == "old"


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS], ids=errno.errorcode.get)
def test_output_in_a_read_only_folder(
    image_folder: Path, tmp_path: Path, make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Simulated, since permissions do not bind root."""

    def fail(path: Path, *_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(Path, "mkdir", fail)
    with pytest.raises(InputError, match=os.strerror(number)):
        train(make_recipe(), image_folder, tmp_path / "run", device="cpu")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": "sd_resnet111"}, '"sd_resnet111" is not a model; nearest: sd_resnet11'),
        ({"model": "sd_resnet20.cifar10_jpg", "pretrained": True}, "cifar10_jpg"),
        ({"model": "sd_resnet32", "pretrained": True}, "sd_resnet32"),
        ({"num_classes": 10}, "3 classes, the model 10"),
        ({"num_classes": None}, "3 classes, the model 10"),
        ({"batch_size": 67}, "66 training images do not fill one step of 67"),
        ({"train_split": "instruction"}, "instruction is not a folder"),
        ({"val_split": "held"}, "held is not a folder"),
        ({"val_split": "test"}, 'val_split is "test", the test set, which is never used for selection'),
        ({"drop_path": 1.0}, "drop_path"),
        ({"opt": "sgdd"}, "sgdd"),
        ({"opt_kwargs": {"nonsense": 1}}, "nonsense"),
        ({"model_kwargs": {"nonsense": 1}}, "nonsense"),
        ({"model_kwargs": {"num_classes": 3}}, "num_classes"),
        ({"model_kwargs": {"survival_probs": [0.5] * 8}, "drop_path": None}, "8 entries; the model has 9 blocks"),
        ({"model_kwargs": {"survival_probs": [1.5] * 9}, "drop_path": None}, r"survival_probs\[0\] is 1.5"),
        ({"interpolation": "bicubicc"}, "bicubicc"),
        ({"mean": [0.5, 0.5]}, "mean"),
    ],
    ids=str,
)
def test_recipe_that_cannot_be_run(
    image_folder: Path, tmp_path: Path, make_recipe: MakeRecipe, changes: dict[str, Any], said: str
) -> None:
    """One line that names the fault, and nothing on disk."""
    with pytest.raises(InputError, match=said) as caught:
        train(make_recipe(**changes, epochs=1), image_folder, tmp_path / "run", device="cpu")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("device", ["warp", "cuda:99"])
def test_device_that_is_not_there_is_refused(
    image_folder: Path, tmp_path: Path, make_recipe: MakeRecipe, device: str
) -> None:
    with pytest.raises(InputError, match=device) as caught:
        train(make_recipe(), image_folder, tmp_path / "run", device=device)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "said",
    [
        {"RANK": "1"},
        {"WORLD_SIZE": "2"},
        {"WORLD_SIZE": "2", "RANK": "0"},
        {"WORLD_SIZE": "0", "RANK": "0"},
        {"WORLD_SIZE": "1", "RANK": "abc"},
        {"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"},
        {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1"},
        {"WORLD_SIZE": "2", "RANK": "1", "MASTER_PORT": "29500"},
        {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "99999999"},
    ],
    ids=str,
)
def test_an_environment_that_says_half_of_what_torchrun_does(
    image_folder: Path, tmp_path: Path, make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, said: dict[str, str]
) -> None:
    """A process that took itself for the second of one would train in silence and write nothing."""
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=r"the environment has (no )?RANK.* MASTER_PORT.*: no process of a run"):
        train(make_recipe(epochs=1), image_folder, tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


def test_one_process_takes_the_first_card_by_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """``torch.cuda.set_device`` refuses a device without one."""
    taken: list[torch.device] = []
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, device: zeros(*size))
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    with processes("cuda") as team:
        assert team.device == torch.device("cuda", 0)
        assert taken == [team.device]


def test_splits_of_different_classes(
    make_image_folder: Callable[..., Path], tmp_path: Path, make_recipe: MakeRecipe
) -> None:
    folder = make_image_folder({"train": 6, "val": 1})
    (folder / "val" / "red").rename(folder / "val" / "rouge")
    with pytest.raises(InputError, match="different classes"):
        train(make_recipe(), folder, tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


def test_missing_data_folder(tmp_path: Path, make_recipe: MakeRecipe) -> None:
    with pytest.raises(InputError, match="nowhere/train is not a folder"):
        train(make_recipe(), tmp_path / "nowhere", tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


# Fine-tuning


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of three classes under uniform survival 0.6, with BatchNorms as of a trained net."""
    torch.manual_seed(1)
    model = timm.create_model("sd_resnet20", num_classes=3, survival_probs=[0.6] * 9)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)
            module.momentum = 1.0
    model.train()
    with torch.no_grad(), sdzoo.fixed_gates(model, [True] * 9):
        model(torch.randn(32, 3, 32, 32))
    path = tmp_path_factory.mktemp("source") / "source.safetensors"
    save_weights(path, model, describe(model, ("blue", "green", "red")))
    return path


def fine_tuning(make_recipe: MakeRecipe, source: Path, **changes: Any) -> Recipe:
    """Return a recipe that starts from ``source`` by timm's own means: ``pretrained`` and a ``file`` in its config."""
    cfg = timm.models.get_pretrained_cfg("sd_resnet20")
    assert cfg is not None
    own = json.loads(json.dumps(cfg.to_dict())) | {"file": str(source), "num_classes": 3}  # as YAML has it: no tuples
    return make_recipe(pretrained=True, model_kwargs={"pretrained_cfg": own}, epochs=1, batch_size=66, **changes)


@pytest.mark.parametrize(
    ("drop_path", "probs"),
    [
        pytest.param(None, [0.6] * 9, id="not named: the weights' own"),
        pytest.param(0.2, [1 - block / 9 * 0.2 for block in range(1, 10)], id="0.2: linear decay to 0.8"),
        pytest.param(0.0, [1.0] * 9, id="0: constant depth"),
    ],
)
def test_fine_tuning_starts_from_the_same_function_whatever_drop_path(
    make_recipe: MakeRecipe, source: Path, drop_path: float | None, probs: list[float]
) -> None:
    model = create_model(fine_tuning(make_recipe, source, drop_path=drop_path))
    assert sdzoo.survival_probs(model) == pytest.approx(probs, abs=1e-6)
    expected = logits(load_model(source))
    allowed = 1e-4 * max(1.0, expected.abs().max().item())
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=allowed)


def test_fine_tuning_runs_and_keeps_its_schedule(
    image_folder: Path, tmp_path: Path, make_recipe: MakeRecipe, source: Path
) -> None:
    recipe = fine_tuning(make_recipe, source, drop_path=0.2, lr=1e-3)
    with recorded_forwards() as forwards:
        best = train(recipe, image_folder, tmp_path / "run", device="cpu")
    probs = [1 - block / 9 * 0.2 for block in range(1, 10)]
    assert [forward.open_blocks for forward in forwards] == [plan(7, 0, probs)]
    assert sdzoo.survival_probs(load_model(best)) == pytest.approx(probs, abs=1e-6)
    assert load_recipe(tmp_path / "run" / "recipe.yaml") == recipe


def test_fine_tuning_to_other_classes_starts_with_a_new_classifier(make_recipe: MakeRecipe, source: Path) -> None:
    model = create_model(dataclasses.replace(fine_tuning(make_recipe, source), num_classes=5))
    assert model.get_parameter("fc.weight").shape == (5, 64)
    expected = load_model(source).get_parameter("layer1.0.conv1.weight")
    assert torch.equal(model.get_parameter("layer1.0.conv1.weight"), expected)


# The public name


def test_public_name_train_is_callable_although_a_package_is_called_the_same(
    image_folder: Path, tmp_path: Path, make_recipe: MakeRecipe
) -> None:
    """Importing anything from the package ``sdzoo.train`` binds that name to the package."""
    public: Any = sdzoo
    assert public.train(make_recipe(epochs=1, batch_size=66), image_folder, tmp_path / "run", device="cpu").is_file()


@pytest.mark.parametrize(
    ("opt_kwargs", "decays"),
    [({}, {0.0, 0.01}), ({"filter_bias_and_bn": False}, {0.01})],
    ids=["timm's", "the paper's"],
)
def test_the_optimizer_is_the_recipes(
    opt_kwargs: dict[str, Any], decays: set[float], image_folder: Path, tmp_path: Path, make_recipe: MakeRecipe
) -> None:
    recipe = make_recipe(epochs=1, batch_size=66, momentum=0.5, weight_decay=0.01, opt_kwargs=opt_kwargs)
    train(recipe, image_folder, tmp_path / "run", device="cpu")
    groups = torch.load(tmp_path / "run" / "last.pth", weights_only=True)["optimizer"]["param_groups"]
    assert {group["momentum"] for group in groups} == {0.5}
    assert {group["weight_decay"] for group in groups} == decays


@pytest.mark.parametrize("name", ["features_only", "checkpoint_path", "exportable", "nonsense"])
def test_model_kwargs_that_are_not_the_architectures_are_refused(name: str, make_recipe: MakeRecipe) -> None:
    faults = make_recipe(model_kwargs={name: True}).faults()
    assert any(fault.startswith(f"model_kwargs.{name}: unknown key") for fault in faults)
