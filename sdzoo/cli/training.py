"""The commands that train and measure."""

from __future__ import annotations

import argparse
import os
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from sdzoo.cli.parser import Commands, Parser, positive, seconds
from sdzoo.cli.predictor import BUNDLED, is_exported, model_options, open_predictor, torch_device
from sdzoo.errors import InputError

if TYPE_CHECKING:
    from sdzoo.training.evaluate import Evaluation
    from sdzoo.training.recipe import Recipe


def add_commands(commands: Commands) -> None:
    """Add ``recipe``, ``train``, ``plot`` and ``eval``."""
    added = commands.add("recipe", None, "list, show or copy the recipes that ship", "sdzoo recipe copy smoke .")
    actions = added.add_subparsers(required=True, metavar="list | show | copy", parser_class=Parser)
    action = actions.add_parser("list", help="names, and what each is")
    action.set_defaults(run=_recipe_list)
    action = actions.add_parser("show", help="print a recipe")
    action.add_argument("recipe", help="a YAML file, or the name of a recipe that ships")
    action.set_defaults(run=_recipe_show)
    action = actions.add_parser("copy", help="copy a recipe, to be edited")
    action.add_argument("recipe", help="the name of a recipe that ships")
    action.add_argument("folder", nargs="?", default=".", help="where to (default: here)")
    action.set_defaults(run=_recipe_copy)

    example = (
        "sdzoo train sd_resnet20.cifar10_jpeg --data-dir cifar10 -o runs/first\n"
        "  torchrun --nproc-per-node 2 -m sdzoo train modern_sd_resnet56 --data-dir data"
    )
    added = commands.add("train", _train, "train a model by a recipe", example)
    added.add_argument("recipe", help="a YAML file, or the name of a recipe that ships")
    added.add_argument("--data-dir", help="where the data is (default: data_dir of the recipe)")
    added.add_argument("-o", "--output", help="folder for checkpoints and logs (default: runs/<recipe>)")
    added.add_argument("--resume", action="store_true", help="go on where the run in the output folder stopped")
    added.add_argument("--force", action="store_true", help="resume although recipe or data are others than the run's")
    added.add_argument("--device", help="cpu, cuda, ... (default: cuda if there is one)")
    added.add_argument("--dry-run", action="store_true", help="say what it would take, from a few steps; write nothing")
    added.add_argument(
        "--checkpoint-interval-s", type=seconds, default=300.0, metavar="S", help="between checkpoints (default: 300)"
    )
    added.add_argument("--tensorboard", action="store_true", help="write for TensorBoard too")
    added.add_argument("--profile", action="store_true", help="profile ten steps into profile.txt and trace.json")

    example = "sdzoo plot runs/cifar10_sd_resnet110 runs/cifar10_constant_depth_resnet110 -o figure"
    added = commands.add("plot", _plot, "draw one run or several into one picture, as PNG and SVG", example)
    added.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="folders of runs")
    added.add_argument("-o", "--output", type=Path, default=Path("plot"), help="name of the picture (default: plot)")

    example = f"sdzoo eval {BUNDLED} --data-dir cifar10 --split test"
    added = commands.add("eval", _eval, "measure top-1 of a model, a checkpoint or what was exported", example)
    added.add_argument("model", help="name of a model, a checkpoint, or an exported file or folder")
    added.add_argument("--data-dir", required=True, help="where the data is: by default a folder of <split>/<class>/")
    added.add_argument("--split", default="test", help="name of the split (default: test)")
    added.add_argument("--dataset", default="", help="torch/cifar10, wds/..., as in recipes (default: class folders)")
    added.add_argument("--skip-corrupt", action="store_true", help="leave out images that cannot be read, and say so")
    added.add_argument(
        "--recalibrate-bn", type=positive, metavar="N", help="measure again with BatchNorm of N training images"
    )
    added.add_argument("--train-split", default="train", help="where those N come from (default: train)")
    model_options(added, runs=True)


def _recipe_list(arguments: argparse.Namespace) -> None:
    from sdzoo.training.recipe_file import recipe_header, shipped_recipes

    shipped = shipped_recipes()
    width = max(map(len, shipped)) + 2
    for name, path in shipped.items():
        first_words = re.split(r"[.:;] ", recipe_header(path).what)[0].rstrip(".")
        print(f"{name:<{width}}{first_words}")
    print(f"\nnext: sdzoo recipe show {next(iter(shipped))}")


def _recipe_show(arguments: argparse.Namespace) -> None:
    from sdzoo.training.recipe_file import find_recipe

    print(find_recipe(arguments.recipe).read_text(encoding="utf-8"), end="")


def _recipe_copy(arguments: argparse.Namespace) -> None:
    from sdzoo.training.recipe_file import copy_recipe

    copy = copy_recipe(arguments.recipe, arguments.folder)
    print(f"wrote {copy}\nnext: sdzoo train {copy} --data-dir DIR --dry-run")


def _train(arguments: argparse.Namespace) -> None:
    from sdzoo.training.distributed import LostProcess, this_shard
    from sdzoo.training.engine import Comforts, Interrupted, train, where_the_data_is
    from sdzoo.training.recipe_file import find_recipe, load_recipe

    path = find_recipe(arguments.recipe)
    recipe = load_recipe(path)
    if arguments.dry_run:
        _dry_run(recipe, arguments)
        return
    output = Path(arguments.output or Path("runs") / path.stem)
    data = where_the_data_is(recipe, arguments.data_dir)
    leads = this_shard().rank == 0
    if leads:
        print(f"training {recipe.model} by {path} on {data} for {recipe.epochs} epochs into {output}", flush=True)
    go_on = f"next: {_this_command(arguments, '--resume')}"
    comforts = Comforts(arguments.checkpoint_interval_s, arguments.tensorboard, arguments.profile, go_on)
    try:
        best = train(recipe, data, output, arguments.resume, arguments.device, arguments.force, comforts)
    except (LostProcess, Interrupted) as error:
        raise type(error)(f"{error}; {go_on}" if leads else str(error)) from None
    if leads:
        print(f"done: {best}\nnext: sdzoo export {shlex.quote(str(best))} -o model.onnx")


def _this_command(arguments: argparse.Namespace, *more: str) -> str:
    """Return the command that started this process and the others of its run, with ``more`` and for real.

    Without the ``--force`` of a run that has begun: its checkpoint is the new run's.
    """
    from sdzoo.training.distributed import this_shard

    dropped = ("--dry-run",) if arguments.dry_run else ("--force",)
    given = [argument for argument in arguments.argv if argument not in (*more, *dropped)]
    world, local = this_shard().world, os.environ.get("LOCAL_WORLD_SIZE", "")
    here = int(local) if local.isdecimal() else world
    start = ["sdzoo"] if world == 1 else ["torchrun", f"--nproc-per-node={here}", "-m", "sdzoo"]
    command = shlex.join([*start, *given, *more])
    return command if here == world else f"{command} (with --nnodes and --rdzv-endpoint as before, on every machine)"


def _dry_run(recipe: Recipe, arguments: argparse.Namespace) -> None:
    from tqdm import tqdm

    from sdzoo.training.distributed import this_shard
    from sdzoo.training.dry_run import dry_run

    leads = this_shard().rank == 0
    if leads:
        print(f"measuring a few steps of {recipe.model}; nothing is written, nor downloaded", flush=True)
    cost = dry_run(recipe, arguments.data_dir, arguments.device)
    if not leads:
        return
    low, middle, high = (1000 * value for value in cost.step_s)
    many = f", {cost.processes} processes" if cost.processes > 1 else ""
    rows = {
        "model": f"{recipe.model}, {cost.parameters:,} parameters, {cost.blocks} blocks",
        "data": f"{cost.training_images:,} images to train on, {cost.validation_images:,} to validate",
        "steps": f"{cost.steps_per_epoch:,} an epoch, {cost.epochs} epochs, {cost.steps:,} in all{many}",
        "cost": f"{cost.relative_macs:.1%} of constant depth (multiply-accumulates, mean over gates and epochs)",
        "memory": f"{cost.memory_mib:,.0f} MiB at most, in this process",
        "time": f"{middle:.0f} ms a step (quartiles {low:.0f} - {high:.0f}): about "
        f"{tqdm.format_interval(cost.training_s)} in all, validation not counted",
    }
    for name, value in rows.items():
        print(f"{name:<8}{value}")
    print(f"next: {_this_command(arguments)}")


def _plot(arguments: argparse.Namespace) -> None:
    from sdzoo.plots import draw_runs

    for path in draw_runs(arguments.runs, arguments.output):
        print(f"wrote {path}")


def _eval(arguments: argparse.Namespace) -> None:
    from sdzoo.training.evaluate import DataSplit, evaluate_predictor, recalibration_data

    split = DataSplit(arguments.data_dir, arguments.split, arguments.dataset, arguments.skip_corrupt)
    predictor = open_predictor(arguments)
    if arguments.recalibrate_bn and is_exported(arguments.model):
        raise InputError("--recalibrate-bn is for PyTorch models: a folded one has no BatchNorm left")
    source = DataSplit(arguments.data_dir, arguments.train_split, arguments.dataset, arguments.skip_corrupt)
    number: int | None = arguments.recalibrate_bn
    others = recalibration_data(predictor.config, source, number) if number else None
    if "mean" not in predictor.config:
        raise InputError(f"{arguments.model} does not say how pictures are resized and normalised")
    print(f"evaluating {arguments.model} ({predictor.provider}) on {split}", flush=True)
    result = evaluate_predictor(predictor.normalised, predictor.labels, predictor.config, split)
    print(_said(result))
    if others is None:
        return

    from sdzoo.calibration import recalibrate_batchnorm
    from sdzoo.deploy.predictor import model_predictor
    from sdzoo.zoo import open_model

    device = torch_device(arguments)
    model = open_model(arguments.model, arguments.arch).to(device)
    recalibrate_batchnorm(model, (images.to(device) for images, _ in others.batches()))
    left_out = _left_out(tuple(others.corrupt))
    print(f"BatchNorm re-estimated at full depth on {others.images} images of {source}{left_out}", flush=True)
    again = evaluate_predictor(model_predictor(model).normalised, predictor.labels, predictor.config, split)
    print(f"{_said(again)}; top-1 {again.top1_percent - result.top1_percent:+.2f} points")


def _said(result: Evaluation) -> str:
    return (
        f"top-1 {result.top1_percent:.2f} %, top-5 {result.top5_percent:.2f} %, loss {result.loss:.4f} "
        f"on {result.images} images{_left_out(result.corrupt)}"
    )


def _left_out(corrupt: tuple[str, ...]) -> str:
    return f" ({len(corrupt)} corrupt left out: {', '.join(corrupt[:5])})" if corrupt else ""
