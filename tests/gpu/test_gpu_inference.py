"""Inference on a GPU: ONNX Runtime's CUDA provider against eager PyTorch."""

from __future__ import annotations

import copy
import importlib.util
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from nets import calibrated, random_images

import sdzoo
from sdzoo.deploy.predictor import Predictor, model_predictor
from sdzoo.deploy.runtime import load_predictor
from sdzoo.parity import Parity

pytestmark = pytest.mark.gpu

Record = Callable[[str, object], None]


def cuda_provider() -> bool:
    if importlib.util.find_spec("onnxruntime") is None:
        return False
    import onnxruntime

    return "CUDAExecutionProvider" in onnxruntime.get_available_providers()


needs_the_provider = pytest.mark.skipif(
    not cuda_provider(), reason='no CUDA provider: pip uninstall onnxruntime; pip install "sdzoo[onnx-gpu]"'
)


@needs_the_provider
def test_the_cuda_provider_computes_the_model(tmp_path: Path, record_property: Record) -> None:
    """An export under the CUDA provider agrees with eager PyTorch on the CPU within the limit: no TF32."""
    model, images = calibrated("sd_resnet110"), random_images(16).numpy()
    sdzoo.export_onnx(model, tmp_path / "model.onnx")
    expected, predictor = model_predictor(model)(images), load_predictor(tmp_path / "model.onnx", "cuda")
    assert predictor.provider == "CUDAExecutionProvider"
    relative = float(abs(predictor(images) - expected).max()) / max(1.0, float(abs(expected).max()))
    record_property("relative_difference", relative)
    assert relative <= 1e-4


def test_a_model_on_the_gpu_is_compared_in_full_float32(tmp_path: Path, record_property: Record) -> None:
    """``verify`` of a model on the GPU, as it is by default, against its copy on the CPU."""
    model = calibrated("sd_resnet110")
    proof = sdzoo.verify(copy.deepcopy(model).cuda(), model)
    assert isinstance(proof, Parity)
    record_property("difference_of_allowed", proof.max_abs_diff / proof.allowed)


@needs_the_provider
@pytest.mark.parametrize("batch_size", [1, 32])
def test_the_cuda_providers_speed(batch_size: int, tmp_path: Path, record_property: Record) -> None:
    """Latency of the CUDA provider against eager PyTorch on the same GPU, with the copies there and back: recorded."""
    model = calibrated("sd_resnet110")
    sdzoo.export_onnx(model, tmp_path / "model.onnx")
    images = random_images(batch_size).numpy()
    provider, eager = load_predictor(tmp_path / "model.onnx", "cuda"), model_predictor(model.cuda())

    def seconds(predictor: Predictor) -> float:
        started = time.perf_counter()
        for _ in range(10):
            predictor(images)
        return time.perf_counter() - started

    rounds = [(seconds(provider), seconds(eager)) for _ in range(23)][3:]
    record_property("latency_ratio", round(statistics.median(ours / theirs for ours, theirs in rounds), 3))


@pytest.mark.parametrize(("arch", "size"), [("sd_resnet20", 32), ("sd_resnetv2_164", 32), ("sd_resnet18", 224)])
def test_a_network_of_each_family_runs(arch: str, size: int, exact: None) -> None:
    """One network of each family, eager and folded, on the GPU: finite logits, equal within the house's limit."""
    images = random_images(2, size)
    model = calibrated(arch, images=images)
    eager, folded = (model_predictor(network.cuda())(images.numpy()) for network in (model, sdzoo.fold(model)))
    assert abs(eager - folded).max() <= 1e-4 * max(1, abs(eager).max())
