"""The command ``sdzoo``: parsing and printing only.

Exit codes: 0 done, 1 the run failed, 2 the input was wrong, 3 training diverged, 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from sdzoo import __version__
from sdzoo.errors import InputError, ParityError

if TYPE_CHECKING:
    from sdzoo.deploy.benchmark import Timing
    from sdzoo.deploy.runtime import Predictor
    from sdzoo.training.evaluate import Evaluation
    from sdzoo.training.recipe import Recipe
    from sdzoo.zoo import Summary

BUNDLED = "sd_resnet20.cifar10_jpeg"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with ``argv`` (default: the process's own) and return its exit code."""
    arguments = _parser().parse_args(argv)
    arguments.argv = sys.argv[1:] if argv is None else list(argv)
    # What is heavy is imported by the command that needs it, so that --help answers at once.
    from sdzoo.training.distributed import LostProcess
    from sdzoo.training.engine import Diverged, Interrupted

    try:
        arguments.run(arguments)
    except InputError as error:
        return _fail(2, str(error))
    except Diverged as error:
        return _fail(3, str(error))
    except Interrupted as error:
        return _fail(130, str(error))
    except KeyboardInterrupt:
        return _fail(130, "interrupted")
    except BrokenPipeError:  # the reader has seen enough; nor shall the interpreter's last flush complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ParityError, LostProcess, OSError) as error:
        return _fail(1, str(error))
    return 0


def _fail(code: int, message: str) -> int:
    print(f"sdzoo: {message}", file=sys.stderr)
    return code


def _list(arguments: argparse.Namespace) -> None:
    from sdzoo.registry import models
    from sdzoo.zoo import summarise

    names = models(arguments.pattern, arguments.pretrained)
    width = max(map(len, names)) + 1
    columns = (("pixels", 7), ("parameters", 13), ("MACs", 11), ("training", 11), ("layers", 8), ("blocks", 8))
    print(f"{'model':<{width}}" + "".join(f"{name:>{room}}" for name, room in columns) + f"{'live':>8}  weights")
    for name in names:
        s = summarise(name)
        print(
            f"{name:<{width}}{s.input_size[-1]:>7}{s.parameters:>13,}{s.macs / 1e6:>9,.0f} M"
            f"{s.training_macs / 1e6:>9,.0f} M{s.layers:>8}{s.blocks:>8}{s.expected_live_blocks:>8.2f}  {_weights(s)}",
            flush=True,
        )
    print(
        "\nMACs: of one image in evaluation; training: of its forward in training, on average, at p_L = 0.5;"
        "\nlive: blocks that this computes, on average; layers: convolutions and linear layers, those of shortcuts too."
        f"\nnext: sdzoo info {names[0]}"
    )


def _weights(s: Summary) -> str:
    """Return which weights ``s`` has, in a few words."""
    if "." in s.name:
        return "ship with sdzoo" if s.name in s.bundled else "on the Hub"
    on_the_hub = len(s.weights) - len(s.bundled)
    words = [name.partition(".")[2] for name in s.bundled] + [f"{on_the_hub} on the Hub"] * (on_the_hub > 0)
    return ", ".join(words) or "-"


def _info(arguments: argparse.Namespace) -> None:
    from sdzoo import weights
    from sdzoo.plots import survival_chart
    from sdzoo.survival import survival_probs
    from sdzoo.zoo import open_model, summarise

    def survival(probs: Sequence[float], source: str) -> str:
        said = f"p_1 = {probs[0]:.6f} to p_L = {probs[-1]:.6f}, mean {sum(probs) / len(probs):.6f}, {source}"
        return "\n".join([said, *survival_chart(probs, ascii_only=not _takes("▁█┤─"))])

    s = summarise(arguments.model)
    rows = {
        "model": s.name,
        "input": " x ".join(map(str, s.input_size)),
        "parameters": f"{s.parameters:,}",
        "MACs": f"{s.macs:,} for one image in evaluation",
        "in training": f"{s.training_macs:,.0f} on average ({s.training_macs / s.macs:.1%}): "
        "a dropped branch costs nothing",
        "layers": f"{s.layers}",
        "blocks": f"{s.blocks}, of which {s.expected_live_blocks:.2f} are computed in a training step on average",
        "survival": survival(s.survival_probs, "linear decay (the default)"),
        "weights": ", ".join(s.bundled) or "none ship with sdzoo",
    }
    for name, value in rows.items():
        print(f"{name:<12}{value}")
    if on_the_hub := [name.partition(".")[2] for name in s.weights if name not in s.bundled]:
        print(f"on the Hub  {', '.join(on_the_hub)}")
    for name in s.bundled:
        facts = weights.card(name)
        print(
            f"\n{name}: trained on {facts['data']}, {facts['epochs']} epochs, top-1 {facts['test_top1_percent']:.2f} % "
            f"on its test split\nsurvival    {survival(survival_probs(open_model(name)), 'in the weights')}"
            f"\n{weights.path(name)}\nnext: sdzoo predict IMAGE --model {name}"
        )


def _takes(text: str) -> bool:
    """Return whether standard output's encoding has all of ``text``."""
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True


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
    from sdzoo.training.distributed import LostProcess
    from sdzoo.training.engine import Comforts, Interrupted, train, where_the_data_is
    from sdzoo.training.recipe_file import find_recipe, load_recipe

    path = find_recipe(arguments.recipe)
    recipe = load_recipe(path)
    if arguments.dry_run:
        _dry_run(recipe, arguments)
        return
    output = Path(arguments.output or Path("runs") / path.stem)
    data = where_the_data_is(recipe, arguments.data_dir)
    leads = int(os.environ.get("RANK", 0)) == 0
    if leads:
        print(f"training {recipe.model} by {path} on {data} for {recipe.epochs} epochs into {output}", flush=True)
    comforts = Comforts(arguments.checkpoint_interval_s, arguments.tensorboard, arguments.profile)
    try:
        best = train(recipe, data, output, arguments.resume, arguments.device, arguments.force, comforts)
    except (LostProcess, Interrupted) as error:
        raise type(error)(f"{error}; next: {_this_command(arguments, '--resume')}" if leads else str(error)) from None
    if leads:
        print(f"done: {best}\nnext: sdzoo export {shlex.quote(str(best))} -o model.onnx")


def _this_command(arguments: argparse.Namespace, *more: str) -> str:
    """Return the command that started this process and the others of its run, with ``more`` and for real."""
    given = [argument for argument in arguments.argv if argument not in (*more, "--dry-run")]
    here, world = (int(os.environ.get(name, 1)) for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"))
    start = ["sdzoo"] if world == 1 else ["torchrun", f"--nproc-per-node={here}", "-m", "sdzoo"]
    command = shlex.join([*start, *given, *more])
    return command if here == world else f"{command} (with --nnodes and --rdzv-endpoint as before, on every machine)"


def _dry_run(recipe: Recipe, arguments: argparse.Namespace) -> None:
    from tqdm import tqdm

    from sdzoo.training.dry_run import dry_run

    leads = int(os.environ.get("RANK", 0)) == 0
    if leads:
        print(f"measuring a few steps of {recipe.model}; nothing is written", flush=True)
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
    from sdzoo.training.evaluate import DataSplit, evaluate_predictor, recalibration_batches

    split = DataSplit(arguments.data_dir, arguments.split, arguments.dataset, arguments.skip_corrupt)
    predictor = _predictor(arguments)
    if arguments.recalibrate_bn and arguments.model.endswith(".onnx"):
        raise InputError("--recalibrate-bn is for PyTorch models: a folded one has no BatchNorm left")
    print(f"evaluating {arguments.model} ({predictor.provider}) on {split}", flush=True)
    result = evaluate_predictor(predictor, predictor.labels, predictor.config, split)
    print(_said(result))
    if not arguments.recalibrate_bn:
        return

    from sdzoo.calibration import recalibrate_batchnorm
    from sdzoo.deploy.runtime import model_predictor
    from sdzoo.zoo import open_model

    source = DataSplit(arguments.data_dir, arguments.train_split, arguments.dataset, arguments.skip_corrupt)
    print(f"BatchNorm re-estimated at full depth on {arguments.recalibrate_bn} images of {source}", flush=True)
    model = open_model(arguments.model, arguments.arch)
    recalibrate_batchnorm(model, recalibration_batches(predictor.config, source, arguments.recalibrate_bn))
    again = evaluate_predictor(model_predictor(model), predictor.labels, predictor.config, split)
    print(f"{_said(again)}; top-1 {again.top1_percent - result.top1_percent:+.2f} points")


def _said(result: Evaluation) -> str:
    corrupt = f" ({len(result.corrupt)} corrupt left out: {', '.join(result.corrupt[:5])})" if result.corrupt else ""
    return (
        f"top-1 {result.top1_percent:.2f} %, top-5 {result.top5_percent:.2f} %, loss {result.loss:.4f} "
        f"on {result.images} images{corrupt}"
    )


def _predict(arguments: argparse.Namespace) -> None:
    from sdzoo.images import open_image

    predictor = _predictor(arguments)
    for image in arguments.image:  # all faults before any answer
        open_image(image, predictor.config["input_size"][0], arguments.convert)
    print(f"{predictor.name}, {predictor.provider}")
    width = max(len(str(image)) for image in arguments.image) + 2
    for image, best in zip(arguments.image, predictor.top(arguments.image, arguments.top), strict=True):
        print(f"{image:<{width}}" + "   ".join(f"{p.label} {100 * p.probability:.2f} %" for p in best))


def _export(arguments: argparse.Namespace) -> None:
    from sdzoo.deploy.onnx_export import export_onnx
    from sdzoo.zoo import open_model

    print(f"exporting {arguments.model} to {arguments.output}: folding, writing, verifying in ONNX Runtime", flush=True)
    parity = export_onnx(open_model(arguments.model, arguments.arch), arguments.output)
    print(f"verified: {parity}\nnext: sdzoo predict IMAGE --model {arguments.output}")


def _bench(arguments: argparse.Namespace) -> None:
    from sdzoo.calibration import calibrate_batchnorm
    from sdzoo.deploy.benchmark import benchmark
    from sdzoo.deploy.onnx_export import verification_batches
    from sdzoo.images import input_config
    from sdzoo.zoo import open_model, summarise

    model = open_model(arguments.model, arguments.arch, need_weights=False)
    if not Path(arguments.model).is_file() and not summarise(arguments.model).bundled:
        print(f"no weights of {arguments.model} ship with sdzoo: timing it untrained")
        calibrate_batchnorm(model, verification_batches(input_config(model))[0][-1:])
    _print_timings(benchmark(model, runs=arguments.runs, threads=arguments.threads, progress=_progress))


def _demo(arguments: argparse.Namespace) -> None:
    from sdzoo.demo import demo

    demo(arguments.output, print, _print_timings, _progress)
    print(f"\nwrote {arguments.output / 'model.onnx'} and {arguments.output / 'report.png'}")
    print(f"next: sdzoo predict IMAGE --model {arguments.output / 'model.onnx'}")


def _predictor(arguments: argparse.Namespace) -> Predictor:
    from sdzoo.deploy.runtime import load_predictor, model_predictor
    from sdzoo.zoo import open_model

    convert = getattr(arguments, "convert", False)
    if arguments.model.endswith(".onnx"):
        return load_predictor(arguments.model, arguments.provider, convert=convert)
    if arguments.provider not in ("auto", "cpu"):
        raise InputError(f"--provider is for .onnx files; {arguments.model} runs in PyTorch")
    return model_predictor(open_model(arguments.model, arguments.arch), convert)


def _print_timings(timings: list[Timing]) -> None:
    _progress("")
    print(f"{'target':<16}{'batch':>6}{'median ms':>11}{'quartiles ms':>18}{'images/s':>10}  provider, threads")
    for t in timings:
        quartiles = f"{t.lower_quartile_ms:.2f} - {t.upper_quartile_ms:.2f}"
        print(
            f"{t.target:<16}{t.batch_size:>6}{t.median_ms:>11.2f}{quartiles:>18}{t.images_per_s:>10.0f}"
            f"  {t.provider}, {t.threads}"
        )


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"sdzoo: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="sdzoo", description="ResNets with stochastic depth for timm: train, fold, export, verify.")
    parser.add_argument("--version", action="version", version=f"sdzoo {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(
        name: str, run: Callable[[argparse.Namespace], None] | None, help: str, example: str
    ) -> argparse.ArgumentParser:
        added = commands.add_parser(
            name,
            help=help,
            description=help[0].upper() + help[1:] + ".",
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        added.set_defaults(run=run)
        return added

    def model_options(added: argparse.ArgumentParser, runs: bool) -> None:
        added.add_argument("--arch", help="name of the model in a checkpoint that does not say")
        if runs:
            added.add_argument("--provider", default="auto", help="for .onnx: auto, cpu, cuda or tensorrt")

    example = "sdzoo list 'sd_resnet1*' '*110*'"
    added = command("list", _list, "list the models, what they cost, and which have weights", example)
    added.add_argument("pattern", nargs="*", help="only names that match one of these wildcards (default: all)")
    added.add_argument("--pretrained", action="store_true", help="only those with weights, as model.tag")

    added = command("info", _info, "say what a model is made of", "sdzoo info sd_resnet110")
    added.add_argument("model", help="name of a model")

    added = command("recipe", None, "list, show or copy the recipes that ship", "sdzoo recipe copy smoke .")
    actions = added.add_subparsers(required=True, metavar="list | show | copy", parser_class=_Parser)
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
    added = command("train", _train, "train a model by a recipe", example)
    added.add_argument("recipe", help="a YAML file, or the name of a recipe that ships")
    added.add_argument("--data-dir", help="where the data is (default: data_dir of the recipe)")
    added.add_argument("-o", "--output", help="folder for checkpoints and logs (default: runs/<recipe>)")
    added.add_argument("--resume", action="store_true", help="go on where the run in the output folder stopped")
    added.add_argument("--force", action="store_true", help="resume although recipe or data are others than the run's")
    added.add_argument("--device", help="cpu, cuda, ... (default: cuda if there is one)")
    added.add_argument("--dry-run", action="store_true", help="say what it would take, from a few steps; write nothing")
    added.add_argument(
        "--checkpoint-interval-s", type=_seconds, default=300.0, metavar="S", help="between checkpoints (default: 300)"
    )
    added.add_argument("--tensorboard", action="store_true", help="write for TensorBoard too")
    added.add_argument("--profile", action="store_true", help="profile ten steps into profile.txt and trace.json")

    example = "sdzoo plot runs/cifar10_sd_resnet110 runs/cifar10_constant_depth_resnet110 -o figure"
    added = command("plot", _plot, "draw one run or several into one picture, as PNG and SVG", example)
    added.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="folders of runs")
    added.add_argument("-o", "--output", type=Path, default=Path("plot"), help="name of the picture (default: plot)")

    example = f"sdzoo eval {BUNDLED} --data-dir cifar10 --split test"
    added = command("eval", _eval, "measure top-1 of a model, a checkpoint or an .onnx file", example)
    added.add_argument("model", help="name of a model, a checkpoint, or an .onnx file")
    added.add_argument("--data-dir", required=True, help="where the data is: by default a folder of <split>/<class>/")
    added.add_argument("--split", default="test", help="name of the split (default: test)")
    added.add_argument("--dataset", default="", help="torch/cifar10, wds/..., as in recipes (default: class folders)")
    added.add_argument("--skip-corrupt", action="store_true", help="leave out images that cannot be read, and say so")
    added.add_argument(
        "--recalibrate-bn", type=_positive, metavar="N", help="measure again with BatchNorm of N training images"
    )
    added.add_argument("--train-split", default="train", help="where those N come from (default: train)")
    model_options(added, runs=True)

    added = command("predict", _predict, "classify pictures", "sdzoo predict cat.jpg dog.jpg --model demo/model.onnx")
    added.add_argument("image", nargs="+", help="image files")
    added.add_argument("--model", default=BUNDLED, help=f"a model, a checkpoint, or an .onnx file (default: {BUNDLED})")
    added.add_argument("--top", type=_positive, default=3, help="classes to show (default: 3)")
    added.add_argument("--convert", action="store_true", help="convert grey or transparent pictures")
    model_options(added, runs=True)

    example = f"sdzoo export {BUNDLED} -o model.onnx"
    added = command("export", _export, "write a model as an ONNX file that was proved equal to it", example)
    added.add_argument("model", help="name of a model, or a checkpoint")
    added.add_argument("-o", "--output", required=True, type=_onnx_file, help="the .onnx file to write")
    model_options(added, runs=False)

    added = command("bench", _bench, "time a model eager, folded and in ONNX Runtime", "sdzoo bench sd_resnet110")
    added.add_argument("model", help="name of a model, or a checkpoint")
    added.add_argument("--runs", type=_positive, default=15, help="timed calls for each row (default: 15)")
    added.add_argument("--threads", type=_positive, help="default: PyTorch's number")
    model_options(added, runs=False)

    example = "sdzoo demo -o demo"
    added = command("demo", _demo, "classify ten real pictures in PyTorch and ONNX Runtime, side by side", example)
    added.add_argument("-o", "--output", type=Path, default=Path("demo"), help="folder for model.onnx and report.png")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number of at least 1")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds")
    return value


def _onnx_file(text: str) -> Path:
    path = Path(text)
    if path.suffix != ".onnx":
        raise argparse.ArgumentTypeError(f"{text} does not end in .onnx")
    return path
