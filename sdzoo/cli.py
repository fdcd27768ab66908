"""The command ``sdzoo``: parsing and printing only.

Exit codes: 0 done, 1 the run failed, 2 the input was wrong, 3 training diverged, 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from sdzoo import __version__
from sdzoo.errors import InputError, ParityError

if TYPE_CHECKING:
    from sdzoo.deploy.benchmark import Timing
    from sdzoo.deploy.runtime import Predictor
    from sdzoo.zoo import Summary

BUNDLED = "sd_resnet20.cifar10_jpeg"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with ``argv`` (default: the process's own) and return its exit code."""
    arguments = _parser().parse_args(argv)
    # What is heavy is imported by the command that needs it, so that --help answers at once.
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
    except (ParityError, OSError) as error:
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


def _train(arguments: argparse.Namespace) -> None:
    from sdzoo.training.engine import train
    from sdzoo.training.recipe import find_recipe, load_recipe

    path = find_recipe(arguments.recipe)
    recipe = load_recipe(path)
    output = Path(arguments.output or Path("runs") / path.stem)
    print(f"training {recipe.model} by {path} on {arguments.data_dir} for {recipe.epochs} epochs into {output}")
    best = train(recipe, arguments.data_dir, output, arguments.resume, arguments.device)
    print(f"done: {best}\nnext: sdzoo eval {best} --data-dir {arguments.data_dir} --split test")


def _eval(arguments: argparse.Namespace) -> None:
    from sdzoo.training.evaluate import evaluate_predictor

    predictor = _predictor(arguments)
    print(f"evaluating {arguments.model} ({predictor.provider}) on {arguments.data_dir}/{arguments.split}")
    result = evaluate_predictor(predictor, predictor.labels, predictor.config, arguments.data_dir, arguments.split)
    print(
        f"top-1 {result.top1_percent:.2f} %, top-5 {result.top5_percent:.2f} %, loss {result.loss:.4f} "
        f"on {result.images} images"
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

    def command(name: str, run: object, help: str, example: str) -> argparse.ArgumentParser:
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

    example = "sdzoo train sd_resnet20.cifar10_jpeg --data-dir cifar10 -o runs/first"
    added = command("train", _train, "train a model by a recipe", example)
    added.add_argument("recipe", help="a YAML file, or the name of a recipe that ships")
    added.add_argument("--data-dir", required=True, help="folder with <split>/<class>/<image>")
    added.add_argument("-o", "--output", help="folder for checkpoints and log (default: runs/<recipe>)")
    added.add_argument("--resume", action="store_true", help="go on where the run in the output folder stopped")
    added.add_argument("--device", help="cpu, cuda, ... (default: cuda if there is one)")

    example = f"sdzoo eval {BUNDLED} --data-dir cifar10 --split test"
    added = command("eval", _eval, "measure top-1 of a model, a checkpoint or an .onnx file", example)
    added.add_argument("model", help="name of a model, a checkpoint, or an .onnx file")
    added.add_argument("--data-dir", required=True, help="folder with <split>/<class>/<image>")
    added.add_argument("--split", default="test", help="name of the split's folder (default: test)")
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


def _onnx_file(text: str) -> Path:
    path = Path(text)
    if path.suffix != ".onnx":
        raise argparse.ArgumentTypeError(f"{text} does not end in .onnx")
    return path
