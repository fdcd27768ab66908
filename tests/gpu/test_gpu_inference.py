"""Inference on a GPU: ONNX Runtime's CUDA provider against eager PyTorch."""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from nets import calibrated, random_images

import sdzoo
from sdzoo.deploy.predictor import Predictor, model_predictor
from sdzoo.deploy.runtime import load_predictor

pytestmark = pytest.mark.gpu

Record = Callable[[str, object], None]

# In a process of its own: whether CUDA's libraries round to TF32 is settled when they are loaded.
DIFFERENCE = """
import json, sys
import numpy as np
from sdzoo.deploy.runtime import load_predictor
predictor = load_predictor(sys.argv[1], "cuda")
images, expected = np.load(sys.argv[2]), np.load(sys.argv[3])
difference = float(np.abs(predictor(images) - expected).max())
print(json.dumps([predictor.provider, difference / max(1.0, float(np.abs(expected).max()))]))
"""


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
    """An export under the CUDA provider agrees with eager PyTorch on the CPU; by how much with TF32 is recorded."""
    import numpy as np

    model, images = calibrated("sd_resnet110"), random_images(16).numpy()
    sdzoo.export_onnx(model, tmp_path / "model.onnx")
    np.save(tmp_path / "images.npy", images)
    np.save(tmp_path / "expected.npy", model_predictor(model)(images))
    files = [str(tmp_path / name) for name in ("model.onnx", "images.npy", "expected.npy")]
    relative = {}
    for name, override in (("float32", {"NVIDIA_TF32_OVERRIDE": "0"}), ("TF32", {})):
        done = subprocess.run(
            [sys.executable, "-c", DIFFERENCE, *files], capture_output=True, text=True, env=os.environ | override
        )
        assert done.returncode == 0, done.stderr
        provider, relative[name] = json.loads(done.stdout.splitlines()[-1])
        assert provider == "CUDAExecutionProvider"
        record_property(f"relative_difference_{name}", relative[name])
    assert relative["float32"] <= 1e-4
    assert relative["TF32"] <= 1e-2


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
