"""The bundled weights reach what their card says, in PyTorch and as an exported file, on the real test split."""

import os
from pathlib import Path

import pytest

from sdzoo import weights
from sdzoo.deploy.onnx_export import export_onnx
from sdzoo.deploy.predictor import model_predictor
from sdzoo.deploy.runtime import load_predictor
from sdzoo.training.evaluate import DataSplit, evaluate_predictor
from sdzoo.zoo import open_model

DATA = os.environ.get("SDZOO_CIFAR10_JPEG")
NAME = "sd_resnet20.cifar10_jpeg"
pytestmark = [
    pytest.mark.cifar,
    pytest.mark.skipif(DATA is None, reason="SDZOO_CIFAR10_JPEG does not name the JPEG CIFAR-10 folder"),
]


@pytest.mark.parametrize("split", ["val", "test"])
def test_pytorch_and_onnx_reach_the_figure_on_the_card(split: str, tmp_path: Path) -> None:
    model = open_model(NAME)
    export_onnx(model, tmp_path / "model.onnx")
    for predictor in (model_predictor(model), load_predictor(tmp_path / "model.onnx", "cpu")):
        result = evaluate_predictor(predictor, predictor.labels, predictor.config, DataSplit(DATA or "", split))
        card = weights.card(NAME)
        assert result.images == card[f"{split}_images"]
        assert result.top1_percent == pytest.approx(card[f"{split}_top1_percent"], abs=0.03)  # three images of 10 000
