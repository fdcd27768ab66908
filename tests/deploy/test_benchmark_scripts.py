"""The benchmarks of deployment run, and print the ratios that their README names."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
RATIO = r"(\d+\.\d{3}) \(quartiles (\d+\.\d{3}) - (\d+\.\d{3}), 2 rounds\)"


def run(*arguments: str, code: int = 0) -> str:
    script = [sys.executable, str(ROOT / "benchmarks" / arguments[0]), *arguments[1:]]
    ran = subprocess.run(script, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    assert ran.returncode == code, ran.stderr
    return ran.stderr if code else ran.stdout


def pictures(folder: Path, count: int) -> str:
    random = np.random.default_rng(0)
    for index in range(count):
        Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    return str(folder)


@pytest.mark.slow
def test_inference() -> None:
    out = run("inference.py", "--model", "sd_resnet20", "--batch", "2", "--threads", "1", "--samples", "2")
    assert re.match(r"sd_resnet20, untrained, 1 threads; .*, torch \S+, timm \S+, onnx \S+, onnxruntime \S+\n", out)
    for slower in ("eager", "folded-channels-last", "timm-onnx"):
        assert re.search(rf"^batch   2  {slower} / onnx: {RATIO}$", out, re.M)
        different = re.search(rf"^onnx against {slower}: max \|difference\| (\S+), max \|logit\| (\S+)$", out, re.M)
        assert different
        assert float(different[1]) <= 1e-4 * max(1, float(different[2]))


@pytest.mark.slow
def test_quantised(tmp_path: Path) -> None:
    given = ("--model", "sd_resnet20", "--batch", "1", "--threads", "1", "--samples", "2")
    out = run("quantised.py", *given, "--calibration", pictures(tmp_path, 256))
    assert re.search(rf"^batch   1  fp32 / int8: {RATIO}$", out, re.M)
    sizes = re.search(r"^fp32 (\S+) MB, int8 (\S+) MB$", out, re.M)
    assert sizes
    assert float(sizes[2]) < 0.5 * float(sizes[1])


@pytest.mark.slow
def test_too_few_pictures_are_refused(tmp_path: Path) -> None:
    said = run("quantised.py", "--calibration", pictures(tmp_path, 255), code=2)
    assert f"{tmp_path} holds 255 pictures; at least 256" in said
