"""TensorRT engines on a GPU: built, run, compared with their model, and timed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nets import calibrated, random_images
from torch import Tensor, nn

import sdzoo
from sdzoo import assets
from sdzoo.deploy import export as export_module
from sdzoo.deploy.export import export
from sdzoo.deploy.predictor import model_predictor
from sdzoo.deploy.runtime import load_predictor
from sdzoo.deploy.tensorrt_builder import EngineFacts, Gpu, build_engine, find_flavour, find_gpu
from sdzoo.deploy.tensorrt_engine import Run, load_engine, why_not_here
from sdzoo.errors import InputError
from sdzoo.extras import MissingExtra
from sdzoo.parity import compare

pytestmark = pytest.mark.gpu

Record = Callable[[str, object], None]

SIZES = {"sd_resnet20": 32, "sd_resnet110": 32, "sd_resnet50": 224}


def installed() -> bool:
    try:
        find_flavour()
    except MissingExtra:
        return False
    return True


needs_tensorrt = pytest.mark.skipif(
    not installed(), reason='no TensorRT: pip install "sdzoo[tensorrt]" or "sdzoo[tensorrt-rtx]"'
)


def at(precision: str, model: nn.Module, size: int) -> bytes:
    """Return the ONNX file of ``model`` that the engine is built from."""
    pytest.importorskip("onnxruntime", reason='no ONNX Runtime: pip install "sdzoo[onnx]"')
    from sdzoo.deploy.half import to_half
    from sdzoo.deploy.onnx_graph import onnx_graph
    from sdzoo.deploy.quantize import quantize

    graph = onnx_graph(sdzoo.fold(model), (3, size, size), "logits")
    if precision == "fp16":
        graph = to_half(graph)
    elif precision == "int8":
        graph = quantize(graph, "tensorrt", (random_images(8, size, seed=seed).numpy() for seed in range(32)))
    return graph.SerializeToString()


def engine(content: bytes, path: Path) -> tuple[Run, EngineFacts]:
    """Return a built and loaded engine; skip where the installed TensorRT does not know the GPU."""
    facts = build_engine(content, path)
    if reason := why_not_here(facts.as_dict()):
        pytest.skip(f"the engine {reason}")
    return load_engine(path, facts.as_dict(), "make test-gpu", None), facts


def test_the_driver_and_pytorch_name_the_same_gpu() -> None:
    """The GPU that the driver names first is the one that PyTorch computes on."""
    major, minor = torch.cuda.get_device_capability(0)
    assert find_gpu() == Gpu(torch.cuda.get_device_name(0), f"{major}.{minor}")


@needs_tensorrt
@pytest.mark.parametrize(("precision", "tol"), [("fp32", 1e-4), ("fp16", 1e-2)])
@pytest.mark.parametrize("arch", SIZES)
def test_an_engine_computes_the_model(
    arch: str, precision: str, tol: float, tmp_path: Path, record_property: Record
) -> None:
    """An engine agrees with the model on the CPU, at batches of 1, 2, 17, the largest, and more than that."""
    size = SIZES[arch]
    model = calibrated(arch, images=random_images(4, size))
    run, facts = engine(at(precision, model, size), tmp_path / "model.engine")

    def candidate(batch: Tensor) -> Tensor:
        return torch.from_numpy(run(batch.numpy()))

    batches = [random_images(count, size, seed=count) for count in (1, 2, 17, 64, 65)]
    parity = compare(model, candidate, batches, tol)
    record_property("tensorrt", f"{facts.flavour} {facts.version}")
    record_property("difference_of_allowed", parity.max_abs_diff / parity.allowed)


@needs_tensorrt
@pytest.mark.parametrize("arch", SIZES)
def test_int8_computes_what_onnx_runtime_does(arch: str, tmp_path: Path, record_property: Record) -> None:
    """An int8 engine agrees in top-1 with ONNX Runtime on the same file, on nine of ten images of noise."""
    import onnxruntime

    size = SIZES[arch]
    content = at("int8", calibrated(arch, images=random_images(4, size)), size)
    run, _ = engine(content, tmp_path / "model.engine")
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    images = random_images(64, size).numpy()
    (expected,) = session.run(None, {"images": images})
    same = float(np.mean(run(images).argmax(1) == np.asarray(expected).argmax(1)))
    record_property("top1_equal", same)
    assert same >= 0.9


@needs_tensorrt
def test_bytes_are_normalised_in_the_graph(tmp_path: Path) -> None:
    """An engine that takes uint8 pictures computes what the model does with normalised ones."""
    import onnx

    from sdzoo.deploy.preprocess import with_preprocessing

    model, mean, std = calibrated("sd_resnet20"), (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    graph = onnx.load_model_from_string(at("fp32", model, 32))
    graph = with_preprocessing(graph, {"input_size": (3, 32, 32), "mean": mean, "std": std})
    run, _ = engine(graph.SerializeToString(), tmp_path / "model.engine")
    pixels = torch.randint(0, 256, (17, 32, 32, 3), dtype=torch.uint8)

    def reference(pictures: Tensor) -> Tensor:
        images = pictures.permute(0, 3, 1, 2).float() / 255
        return model((images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1))

    compare(reference, lambda pictures: torch.from_numpy(run(pictures.numpy())), [pixels], 1e-4)


@needs_tensorrt
@pytest.mark.parametrize("preprocess", ["client", "in-graph"])
def test_from_export_to_prediction(preprocess: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An export compares its engine at once; one that could not is verified, given its name, and loaded."""
    model = calibrated("sd_resnet20")
    at_once = export(model.cuda(), "tensorrt", tmp_path / "at once", preprocess=preprocess)
    model = model.cpu()
    if at_once.file == "model.unverified.engine":
        pytest.skip("the engine does not run on this GPU")
    with monkeypatch.context() as patch:
        patch.setattr(export_module, "why_not_here", lambda _: "is built as on another machine")
        later = export(model, "tensorrt", tmp_path / "later", preprocess=preprocess)
    assert (at_once.file, later.file) == ("model.engine", "model.unverified.engine")
    with pytest.raises(InputError, match="was never compared"):
        load_predictor(tmp_path / "later")
    sdzoo.verify(tmp_path / "later" / "model.onnx", tmp_path / "later")
    pictures = list(assets.pictures().values())
    expected = model_predictor(model)(pictures)
    for name in ("at once", "later"):
        predictor = load_predictor(tmp_path / name)
        assert predictor.provider.startswith("tensorrt")
        assert np.abs(predictor(pictures) - expected).max() <= 1e-4 * max(1.0, float(np.abs(expected).max()))


@needs_tensorrt
def test_threads_share_an_engine(tmp_path: Path) -> None:
    """Eight threads get what one gets."""
    run, _ = engine(at("fp32", calibrated(), 32), tmp_path / "model.engine")
    batches = [random_images(1 + seed % 9, seed=seed).numpy() for seed in range(64)]
    expected = [run(batch) for batch in batches]
    with ThreadPoolExecutor(8) as pool:
        outputs = list(pool.map(run, batches))
    for one, other in zip(expected, outputs, strict=True):
        np.testing.assert_allclose(other, one, rtol=0, atol=1e-5 * max(1.0, float(np.abs(one).max())))


@needs_tensorrt
def test_an_engine_of_another_version_is_refused(tmp_path: Path) -> None:
    """An engine whose card names another version is refused with the command that builds it anew."""
    facts: dict[str, Any] = build_engine(at("fp32", calibrated(), 32), tmp_path / "model.engine").as_dict()
    with pytest.raises(InputError, match=r"built with .* 0\.1; here is .*; build it anew here: the command"):
        load_engine(tmp_path / "model.engine", facts | {"version": "0.1"}, "the command", None)


@needs_tensorrt
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("batch_size", [1, 32])
def test_an_engines_speed(batch_size: int, precision: str, tmp_path: Path, record_property: Record) -> None:
    """Latency of an engine against eager PyTorch on the same GPU, with the copies there and back: recorded."""
    model = calibrated("sd_resnet110")
    run, _ = engine(at(precision, model, 32), tmp_path / "model.engine")
    images, eager = random_images(batch_size).numpy(), model_predictor(model.cuda())

    def milliseconds(compute: Callable[[np.ndarray[Any, Any]], object]) -> float:
        started = time.perf_counter()
        for _ in range(10):
            compute(images)
        return (time.perf_counter() - started) * 100  # of one of ten

    rounds = [(milliseconds(run), milliseconds(eager)) for _ in range(23)][3:]
    record_property("latency_ms", round(statistics.median(ours for ours, _ in rounds), 3))
    record_property("latency_ratio", round(statistics.median(ours / theirs for ours, theirs in rounds), 3))
