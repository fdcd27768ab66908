"""Inference of one model at several targets, timed in turn so that a busy machine slows all alike."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sdzoo import weights
from sdzoo.deploy.benchmark_process import TargetProcess, Turn
from sdzoo.deploy.benchmark_row import LOGITS, TOP1_LOSS, Row, spread
from sdzoo.deploy.benchmark_target import PRECISIONS, Given, choose, make, opening
from sdzoo.deploy.onnx_export import labels_of
from sdzoo.deploy.precision import MAX_DROP_POINTS, judge
from sdzoo.deploy.predictor import model_predictor
from sdzoo.deploy.session import check_threads
from sdzoo.deploy.verification import default_images, images_of
from sdzoo.digest import state_sha256
from sdzoo.errors import InputError, ParityError
from sdzoo.fold import check_evaluation
from sdzoo.images import input_config
from sdzoo.parity import Accuracy, Compute

ROUNDS = 10

Progress = Callable[[str], None]


def benchmark(
    model: nn.Module,
    targets: Sequence[str] | None = None,
    batch_sizes: Sequence[int] = (1, 8, 32, 128),
    threads: Sequence[int] = (1, 2),
    samples: int = 20,
    *,
    images: str | Path | None = None,
    calibration: str | Path | None = None,
    onnx: str | Path | None = None,
    max_drop: float = MAX_DROP_POINTS,
    progress: Progress = lambda _: None,
    note: Callable[[str], None] = lambda _: None,
) -> list[Row]:
    """Return what ``model`` costs at each of ``targets`` and how near each comes to it, by threads, batch and target.

    For each number of threads, each target is opened in a process of its own. There it is timed on noise of the
    model's input size, then compared with ``model`` by the rule of its precision. The targets take turns, in ten rounds
    after one that is not counted; a turn begins with one call that is not counted, and ends when the process has come
    to rest.

    Args:
        model: A stochastic-depth model in evaluation mode; left alone. Where its weights are, all targets are timed.
        targets: Of ``eager``, ``folded``, ``folded-channels-last``, ``onnx``, ``onnx-fp16``, ``onnx-int8``,
            ``openvino``, ``tensorrt``; default: those that can run here.
        batch_sizes: Images a call.
        threads: Within one operator.
        samples: Timed calls for each row.
        images: A folder of real pictures to compare on, and to take top-1 on if they are in class folders; default:
            those that ship with sdzoo. fp16 takes at least 1000, int8 class folders.
        calibration: A folder of at least 256 other pictures, for int8.
        onnx: The model's fp32 ONNX file, if there is one already; else it is exported (and verified) for the time.
        max_drop: Top-1 that int8 may lose, in points.
        progress: Called with what is being done.
        note: Called with each target that is left out, and why, if none were named.

    Raises:
        InputError: if a target is unknown or cannot run here, with those that can and what the others lack; for
            numbers out of range; and as :func:`sdzoo.export_onnx`.
        ParityError: naming the target whose outputs are not the model's.
        ChildProcessError: naming the target whose process died, and why.
    """
    check_evaluation(model)
    sizes, counts = _sorted("batch sizes", batch_sizes), _sorted("threads", threads)
    for count in counts:
        check_threads(count)
    if samples < 2:
        raise InputError(f"samples is {samples}; quartiles need at least 2")
    config = input_config(model)
    pictures = default_images(config) if images is None else images_of(images, config)
    pictures.check_classes(labels_of(model), int(model.num_classes))  # type: ignore[arg-type]
    provider = "cuda" if next(model.parameters()).is_cuda else "cpu"
    given = Given(pictures, images, calibration, onnx, max_drop, provider)
    chosen = choose(targets, given, note)
    name, reference = _name(model), remembered(model_predictor(model).pixels)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="sdzoo-bench-") as folder:
        files = make(model, chosen, Path(folder), given, progress)
        for count in counts:
            said = _threads(count)
            progress(f"{said}: opening {', '.join(chosen)}")
            openings = [opening(target, files[target], count, provider, config) for target in chosen]
            with ExitStack() as stack:
                processes = {o.name: stack.enter_context(TargetProcess(o)) for o in openings}
                timed = {
                    size: take_turns(processes, size, samples, _prefixed(progress, f"{said}, batch {size}"))
                    for size in sizes
                }
                proofs = {}  # after that: the memory of a comparison's batches would count as that of smaller ones
                for target, process in processes.items():
                    progress(f"{said}: comparing {target} on {pictures.origin}")
                    proofs[target] = _prove(target, process, reference, given)
                for size, turns in timed.items():
                    for target, process in processes.items():
                        rows.append(_row(name, config["input_size"], process, size, turns[target], proofs[target]))
    return rows


def take_turns(
    processes: Mapping[str, TargetProcess], batch_size: int, samples: int, progress: Progress = lambda _: None
) -> dict[str, Turn]:
    """Return ``samples`` calls of each process, spread over rounds in which each has one turn.

    The n-th calls of two processes are of the same round: their ratio is that of two calls on a machine in one state.
    """
    rounds = min(ROUNDS, samples)
    milliseconds: dict[str, list[float]] = {target: [] for target in processes}
    peaks: dict[str, float | None] = {}
    for target, process in processes.items():
        progress(f"warming up {target}")
        process.time(batch_size, 1)
    for index in range(rounds):
        progress(f"round {index + 1}/{rounds}")
        for target, process in processes.items():
            turn = process.time(batch_size, samples // rounds + (index < samples % rounds))
            milliseconds[target] += turn.milliseconds
            peaks[target] = turn.peak_memory_mib
    return {target: Turn(milliseconds[target], peaks[target]) for target in processes}


def remembered(logits: Callable[[NDArray[np.uint8]], NDArray[np.float32]]) -> Compute:
    """Return ``logits`` as a function of tensors that computes each batch once: several comparisons ask for it."""
    known: dict[bytes, Tensor] = {}

    def compute(images: Tensor) -> Tensor:
        pixels = images.numpy()
        key = hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).digest()
        if key not in known:
            known[key] = torch.from_numpy(logits(pixels))
        return known[key]

    return compute


@dataclass(frozen=True)
class _Proof:
    """How near a target came: the last four columns of its rows."""

    parity: float
    limit: float
    kind: str
    top1_percent: float | None


def _prove(target: str, process: TargetProcess, reference: Compute, given: Given) -> _Proof:
    compute, images = remembered(process.logits), given.images
    try:
        proof = judge(reference, compute, images, PRECISIONS[target], given.max_drop)
    except ParityError as error:
        raise ParityError(f"{target}, {images.origin}: {error}") from None
    if isinstance(proof, Accuracy):
        loss = proof.top1_percent_before - proof.top1_percent_after
        return _Proof(round(loss, 4), given.max_drop, TOP1_LOSS, round(proof.top1_percent_after, 4))
    top1 = None
    if images.labels is not None:
        right = sum(int((compute(batch).argmax(1) == labels).sum()) for batch, labels in images.labelled_batches())
        top1 = round(100 * right / len(images), 4)
    return _Proof(float(f"{proof.max_abs_diff:.3g}"), float(f"{proof.allowed:.3g}"), LOGITS, top1)


def _row(
    model: str, input_size: Sequence[int], process: TargetProcess, batch_size: int, timed: Turn, proof: _Proof
) -> Row:
    took, opened, opening = spread(timed.milliseconds), process.opened, process.opening
    return Row(
        model=model,
        input_size="x".join(map(str, input_size)),
        target=opening.name,
        runtime=opened.runtime,
        provider=opened.provider,
        device=opened.device,
        threads=opening.threads,
        batch_size=batch_size,
        samples=len(timed.milliseconds),
        median_ms=took.median,
        lower_quartile_ms=took.lower,
        upper_quartile_ms=took.upper,
        p99_ms=took.p99,
        file_mb=round(opening.file.stat().st_size / 1e6, 4),
        peak_memory_mib=timed.peak_memory_mib,
        parity=proof.parity,
        parity_limit=proof.limit,
        parity_kind=proof.kind,
        top1_percent=proof.top1_percent,
    )


def _name(model: nn.Module) -> str:
    name = str(model.pretrained_cfg.get("architecture") or type(model).__name__)  # type: ignore[union-attr]
    tag = weights.tag_of(state_sha256(model.state_dict()))
    return f"{name}.{tag}" if tag else name


def _sorted(what: str, numbers: Sequence[int]) -> list[int]:
    """Return ``numbers`` from the smallest: what memory a larger batch took stays taken."""
    if not numbers or min(numbers) < 1:
        raise InputError(f"{what} are {', '.join(map(str, numbers)) or 'none'}; give some, each at least 1")
    return sorted(set(numbers))


def _prefixed(progress: Progress, prefix: str) -> Progress:
    return lambda text: progress(f"{prefix}, {text}")


def _threads(count: int) -> str:
    return f"{count} thread{'s' if count > 1 else ''}"
