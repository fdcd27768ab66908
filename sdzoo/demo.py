"""The whole way in a minute: bundled checkpoint, real pictures, folding, verified ONNX, latencies, a report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from sdzoo.assets import pictures
from sdzoo.deploy.benchmark import benchmark
from sdzoo.deploy.benchmark_row import Row
from sdzoo.deploy.onnx_export import export_onnx
from sdzoo.deploy.predictor import Prediction, model_predictor
from sdzoo.deploy.runtime import load_predictor
from sdzoo.deploy.verification import default_images, normalised
from sdzoo.errors import InputError
from sdzoo.extras import require
from sdzoo.fold import fold
from sdzoo.images import input_config
from sdzoo.parity import compare
from sdzoo.plots import draw_report
from sdzoo.zoo import open_model

MODEL = "sd_resnet20.cifar10_jpeg"
TITLES = {"eager": "PyTorch eager", "folded": "PyTorch folded", "onnx": "ONNX Runtime"}


def demo(
    output: str | Path,
    say: Callable[[str], None] = print,
    show_timings: Callable[[list[Row]], None] = lambda _: None,
    progress: Callable[[str], None] = lambda _: None,
) -> None:
    """Classify the ten bundled pictures in PyTorch and in ONNX Runtime and write ``model.onnx`` and ``report.png``.

    Args:
        output: Folder for the two files; made if it is not there.
        say: Gets each line of text.
        show_timings: Gets the latencies.
        progress: Gets what is being measured, while it is.

    Raises:
        InputError: if ``output`` cannot be written.
        ParityError: if the exported file is not the model.
        ImportError: without the extras ``onnx`` and ``plots``.
    """
    require("onnx", "onnxruntime", "matplotlib")
    folder = Path(output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot create {folder}: {error.strerror}") from None
    say(f"loading {MODEL}, sha256 checked")
    model = open_model(MODEL)
    config = input_config(model)
    batches = [normalised(batch, config) for batch in default_images(config).batches()]
    say(f"folding: {compare(model, fold(model), batches)}")
    parity = export_onnx(model, folder / "model.onnx")
    say(f"exporting {folder / 'model.onnx'}: {parity}")

    files = pictures()
    exported = load_predictor(folder / "model.onnx", "cpu", threads=torch.get_num_threads())
    ours = model_predictor(model).top(list(files.values()), 3)
    theirs = exported.top(list(files.values()), 3)
    say("")
    say(f"{'picture':<12}{'PyTorch':<22}{exported.provider}")
    for label, a, b in zip(files, ours, theirs, strict=True):
        say(f"{label:<12}{_best(a):<22}{_best(b)}{'' if a[0].label == label else '   (wrong)'}")
    right = sum(a[0].label == label for label, a in zip(files, ours, strict=True))
    say(f"{right} of {len(files)} right")
    say("")
    threads = (torch.get_num_threads(),)
    rows = benchmark(model, tuple(TITLES), (1, 32), threads, onnx=folder / "model.onnx", progress=progress)
    timings = [replace(row, target=TITLES[row.target]) for row in rows]
    show_timings(timings)
    draw_report(
        folder / "report.png",
        f"{MODEL}: ten real pictures",
        f"ONNX Runtime ({exported.provider}) equals PyTorch on these, eight ways each:\n{parity}",
        files,
        dict(zip(files, theirs, strict=True)),
        timings,
    )


def _best(predictions: list[Prediction]) -> str:
    return f"{predictions[0].label} {100 * predictions[0].probability:.2f} %"
