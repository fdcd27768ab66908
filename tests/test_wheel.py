"""The built wheel in an environment of its own, away from the checkout; .ci/run builds it and names the environment."""

import os
import subprocess
from pathlib import Path

import pytest

BIN = os.environ.get("SDZOO_WHEEL_BIN")
pytestmark = pytest.mark.skipif(BIN is None, reason="no wheel installed: .ci/run builds one and sets SDZOO_WHEEL_BIN")


def run(tmp_path: Path, program: str, *arguments: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [Path(BIN or "") / program, *arguments],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_lists_every_model(tmp_path: Path) -> None:
    listed = run(tmp_path, "sdzoo", "list")
    for name in ("20", "32", "44", "56", "110", "1202", "152_cifar"):
        assert f"sd_resnet{name} " in listed


def test_the_pretrained_model_classifies_and_exports(tmp_path: Path) -> None:
    picture = Path(__file__).parents[1] / "sdzoo" / "assets" / "truck.jpg"
    run(tmp_path, "sdzoo", "export", "sd_resnet20", "-o", "model.onnx")
    said = run(tmp_path, "sdzoo", "predict", str(picture), "--model", "model.onnx")
    assert "truck" in said.splitlines()[1].replace(str(picture), "")


def test_imports_come_from_the_wheel_and_the_recipe_is_found(tmp_path: Path) -> None:
    code = (
        "import sdzoo; from sdzoo.training.recipe_file import find_recipe, load_recipe\n"
        "path = find_recipe('sd_resnet20.cifar10_jpeg'); print(sdzoo.__file__, path, load_recipe(path).model)"
    )
    package, recipe, model = run(tmp_path, "python", "-c", code).split()
    assert "site-packages" in package
    assert "site-packages" in recipe
    assert model == "sd_resnet20"
