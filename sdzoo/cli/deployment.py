"""The commands that predict, export, prove and time."""

from __future__ import annotations

import argparse
import shlex
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sdzoo.cli.parser import Commands, numbers, positive, words
from sdzoo.cli.predictor import (
    BUNDLED,
    model_options,
    open_operand,
    open_predictor,
    torch_device,
    warnings_on_one_line,
)
from sdzoo.errors import InputError
from sdzoo.extras import require

if TYPE_CHECKING:
    from sdzoo.deploy.benchmark_row import Row


def add_commands(commands: Commands) -> None:
    """Add ``predict``, ``export``, ``verify``, ``bench`` and ``demo``."""
    added = commands.add(
        "predict", _predict, "classify pictures", "sdzoo predict cat.jpg dog.jpg --model demo/model.onnx"
    )
    added.add_argument("image", nargs="+", help="image files")
    added.add_argument(
        "--model", default=BUNDLED, help=f"a model, a checkpoint, or an exported file or folder (default: {BUNDLED})"
    )
    added.add_argument("--top", type=positive, default=3, help="classes to show (default: 3)")
    added.add_argument("--convert", action="store_true", help="convert grey or transparent pictures")
    model_options(added, runs=True)

    example = (
        f"sdzoo export {BUNDLED} -o model.onnx\n"
        f"  sdzoo export {BUNDLED} --precision int8 --images cifar10/val --calibration cifar10/train -o int8"
    )
    added = commands.add("export", _export, "write a model for a target, proved equal to it", example)
    added.add_argument("model", help="name of a model, or a checkpoint")
    added.add_argument("-o", "--output", required=True, type=Path, help="a folder, or for ONNX one .onnx file")
    added.add_argument("--to", default="onnx", metavar="TARGET", help="onnx (default), tensorrt or triton")
    added.add_argument("--backend", help="what computes at the target, where there is a choice")
    added.add_argument("--precision", default="fp32", help="fp32 (default), fp16 or int8")
    added.add_argument("--preprocess", default="client", help="who normalises: client (default) or in-graph")
    added.add_argument("--images", metavar="DIR", help="real pictures to compare on (default: ten that ship)")
    added.add_argument("--calibration", metavar="DIR", help="at least 256 other pictures, for int8")
    _max_drop_option(added)
    model_options(added, runs=False)

    example = f"sdzoo verify {BUNDLED} model.onnx --images cifar10/val\n  sdzoo verify hub:ORG/NAME"
    added = commands.add("verify", _verify, "compare any two of model, checkpoint, exported file or folder", example)
    added.add_argument("a", help="the reference; folded:NAME is a folded model, hub:ORG/NAME one on the Hub")
    added.add_argument("b", nargs="?", help="what shall compute the same; without, a published A and its SHA256SUMS")
    added.add_argument("--images", metavar="DIR", help="real pictures to compare on (default: ten that ship)")
    _max_drop_option(added)
    model_options(added, runs=False)

    example = "sdzoo bench sd_resnet110 --batch 1,32 --threads 2 -o bench\n  sdzoo bench --compare before.csv after.csv"
    added = commands.add("bench", _bench, "time a model at several targets, in turn, or compare two tables", example)
    added.add_argument("model", nargs="?", help="name of a model, or a checkpoint")
    added.add_argument("--targets", type=words, help="separated by commas (default: all that can run here)")
    added.add_argument("--batch", type=numbers, default=(1, 8, 32, 128), help="images a call (default: 1,8,32,128)")
    added.add_argument("--threads", type=numbers, default=(1, 2), help="within one operator (default: 1,2)")
    added.add_argument(
        "--provider", default="auto", help="where all compute: auto (a GPU if there is one), cpu or cuda"
    )
    added.add_argument("--samples", type=positive, default=20, help="timed calls a row; p99 from 500 (default: 20)")
    added.add_argument("--images", metavar="DIR", help="real pictures to compare on, by class also for top-1")
    added.add_argument("--calibration", metavar="DIR", help="at least 256 other pictures, for int8")
    added.add_argument("-o", "--output", type=Path, metavar="NAME", help="write NAME.csv, NAME.png and NAME.svg")
    added.add_argument("--compare", nargs=2, metavar=("A.csv", "B.csv"), help="compare two tables; times nothing")
    _max_drop_option(added)
    model_options(added, runs=False)

    example = "sdzoo demo -o demo"
    added = commands.add("demo", _demo, "classify ten real pictures in PyTorch and ONNX Runtime, side by side", example)
    added.add_argument("-o", "--output", type=Path, default=Path("demo"), help="folder for model.onnx and report.png")


def _predict(arguments: argparse.Namespace) -> None:
    from PIL.Image import DecompressionBombWarning

    from sdzoo.images import open_image

    predictor = open_predictor(arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DecompressionBombWarning)  # whether a picture is too large is said by us
        for image in arguments.image:  # all faults before any answer
            open_image(image, predictor.config["input_size"][0], arguments.convert)
    print(f"{predictor.name}, {predictor.provider}")
    width = max(len(str(image)) for image in arguments.image) + 2
    for image, best in zip(arguments.image, predictor.top(arguments.image, arguments.top), strict=True):
        print(f"{image:<{width}}" + "   ".join(f"{p.label} {100 * p.probability:.2f} %" for p in best))


def _max_drop_option(added: argparse.ArgumentParser) -> None:
    added.add_argument(
        "--max-drop", type=float, default=0.5, metavar="POINTS", help="top-1 that int8 may lose (default: 0.5)"
    )


def _export(arguments: argparse.Namespace) -> None:
    from sdzoo.deploy.export import export
    from sdzoo.deploy.onnx_export import export_onnx
    from sdzoo.zoo import open_model

    output: Path = arguments.output
    names = ("precision", "preprocess", "images", "calibration", "max_drop")
    settings = {name: getattr(arguments, name) for name in names}
    one_file = output.suffix == ".onnx"
    if one_file and (arguments.to != "onnx" or arguments.backend):
        what = f"--to {arguments.to} makes a folder" if arguments.to != "onnx" else "--backend needs a folder"
        raise InputError(f"{what}; {output} is the name of an ONNX file")
    print(f"exporting {arguments.model} to {output}: {arguments.to}, {arguments.precision}", flush=True)
    model = open_model(arguments.model, arguments.arch)
    if one_file:
        with warnings_on_one_line():
            proof = export_onnx(model, output, **settings, progress=show_progress)
        print(f"verified: {proof}\nnext: sdzoo predict IMAGE --model {shlex.quote(str(output))}")
        return
    with warnings_on_one_line():
        card = export(model, arguments.to, output, backend=arguments.backend, progress=show_progress, **settings)
    show_progress("")
    print(f"{output / card.file}, parity: {card.compared}\nnext: {card.serve}")


def _verify(arguments: argparse.Namespace) -> None:
    from sdzoo.deploy.verify import verify
    from sdzoo.hub.load import verify_hub
    from sdzoo.hub.source import FOLDER, HUB

    if arguments.b is None:
        if not arguments.a.startswith((HUB, FOLDER)):
            raise InputError(f"b is missing: name what to compare {arguments.a} with (see sdzoo verify --help)")
        print(f"passed: {verify_hub(arguments.a)}")
        return
    a, b = (open_operand(name, arguments.arch) for name in (arguments.a, arguments.b))
    print(f"comparing {arguments.b} with {arguments.a} on {arguments.images or 'ten pictures that ship'}", flush=True)
    with warnings_on_one_line():
        print(f"passed: {verify(a, b, arguments.images, arguments.max_drop)}")


def _bench(arguments: argparse.Namespace) -> None:
    from sdzoo.deploy.benchmark_csv import compare, comparison_as_text

    if arguments.compare:
        print(comparison_as_text(compare(*arguments.compare)))
        return
    if not arguments.model:
        raise InputError("name a model to time, or two tables: --compare A.csv B.csv")

    from sdzoo.calibration import calibrate_batchnorm
    from sdzoo.deploy.benchmark import benchmark
    from sdzoo.deploy.verification import default_images, normalised
    from sdzoo.hub.source import FOLDER, HUB
    from sdzoo.images import input_config
    from sdzoo.zoo import open_model, summarise

    if arguments.output:
        require("matplotlib")  # rather now than after the measurement
    device = torch_device(arguments)
    model = open_model(arguments.model, arguments.arch, need_weights=False)
    published = arguments.model.startswith((HUB, FOLDER))
    if not published and not Path(arguments.model).is_file() and not summarise(arguments.model).bundled:
        print(f"no weights of {arguments.model} ship with sdzoo: timing it untrained", flush=True)
        config = input_config(model)
        calibrate_batchnorm(model, [normalised(default_images(config).read(range(17)), config)])
    print(f"timing {arguments.model}, {arguments.samples} calls a row", flush=True)
    with warnings_on_one_line():
        rows = benchmark(
            model.to(device),
            arguments.targets,
            arguments.batch,
            arguments.threads,
            arguments.samples,
            images=arguments.images,
            calibration=arguments.calibration,
            max_drop=arguments.max_drop,
            progress=show_progress,
            note=lambda text: print(text, flush=True),
        )
    _print_rows(rows)
    if arguments.output:
        from sdzoo.deploy.benchmark_csv import write_rows
        from sdzoo.plots import draw_benchmark

        table = arguments.output.with_name(f"{arguments.output.name}.csv")
        write_rows(rows, table)
        for path in (table, *draw_benchmark(rows, arguments.output)):
            print(f"wrote {path}")


def _demo(arguments: argparse.Namespace) -> None:
    from sdzoo.demo import demo

    demo(arguments.output, print, _print_rows, show_progress)
    print(f"\nwrote {arguments.output / 'model.onnx'} and {arguments.output / 'report.png'}")
    print(f"next: sdzoo predict IMAGE --model {arguments.output / 'model.onnx'}")


def _print_rows(rows: Sequence[Row]) -> None:
    from sdzoo.deploy.benchmark_row import as_text

    show_progress("")
    print(as_text(rows))


def show_progress(text: str) -> None:
    """Show ``text`` in place of what was shown before, if a person is watching."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
