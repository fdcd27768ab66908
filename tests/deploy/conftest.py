"""Models, pictures and exports, made once for all tests of the deployment part. All are read only."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from nets import Net, calibrated, evaluate
from PIL import Image
from samples import LABELS, blots, normalised_pixels
from torch import nn

from sdzoo.deploy.export import export
from sdzoo.deploy.onnx_export import export_onnx
from sdzoo.deploy.predictor import Predictor, model_predictor
from sdzoo.deploy.runtime import load_predictor

PER_CLASS, CALIBRATION = 100, 256
MAX_DROP = 10.0  # nothing was trained: int8 tips more answers than it does of a trained net


@pytest.fixture(scope="session")
def model() -> nn.Module:
    """Return a calibrated ``sd_resnet20`` in evaluation, p falling to 0.3."""
    return calibrated("sd_resnet20", drop_path_rate=0.7)


@pytest.fixture(scope="session")
def exported(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the ONNX file of ``model``, alone in its folder."""
    path = tmp_path_factory.mktemp("exported") / "model.onnx"
    export_onnx(model, path)
    return path


@pytest.fixture(scope="session")
def predictor(exported: Path) -> Predictor:
    return load_predictor(exported)


@pytest.fixture(scope="session")
def torch_predictor(model: nn.Module) -> Predictor:
    return model_predictor(model)


@pytest.fixture(scope="session")
def classifier(model: nn.Module) -> Net:
    """Return ``model`` with a classifier that answers every class equally often on blots."""
    changed = copy.deepcopy(model)
    images = torch.from_numpy(normalised_pixels(blots(256, seed=1)))
    logits = evaluate(changed, images)
    with torch.no_grad():
        changed.get_parameter("fc.weight").div_(logits.std(0)[:, None])
        changed.get_parameter("fc.bias").sub_(logits.mean(0)).div_(logits.std(0))
    return changed


@pytest.fixture(scope="session")
def labelled(classifier: Net, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of 1000 pictures in class folders: those that ``classifier`` is surest of, by its answers."""
    folder = tmp_path_factory.mktemp("labelled")
    pixels = blots(2500, seed=2)
    logits = torch.cat([evaluate(classifier, torch.from_numpy(normalised_pixels(p))) for p in np.split(pixels, 10)])
    best = logits.topk(2, dim=1).values
    margin = best[:, 0] - best[:, 1]
    for number, label in enumerate(LABELS):
        (folder / label).mkdir()
        own = torch.where(logits.argmax(1) == number, margin, -1)
        for index in own.topk(PER_CLASS).indices.tolist():
            assert own[index] > 0, "too few blots of this class"
            Image.fromarray(pixels[index]).save(folder / label / f"{index}.png")
    return folder


@pytest.fixture(scope="session")
def few(labelled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of every fifth picture of ``labelled``, for int8, which may be judged on fewer."""
    folder = tmp_path_factory.mktemp("few")
    for label in LABELS:
        (folder / label).mkdir()
        for file in sorted((labelled / label).iterdir())[::5]:
            (folder / label / file.name).symlink_to(file)
    return folder


@pytest.fixture(scope="session")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of just as many pictures as int8 takes, none of them in ``labelled``."""
    folder = tmp_path_factory.mktemp("calibration")
    for index, image in enumerate(blots(CALIBRATION, seed=3)):
        Image.fromarray(image).save(folder / f"{index}.png")
    return folder


@pytest.fixture(scope="session")
def onnx_folder(classifier: Net, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("onnx") / "out"
    export(classifier, "onnx", folder)
    return folder


@pytest.fixture(scope="session")
def in_graph_folder(classifier: Net, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("in-graph") / "out"
    export(classifier, "onnx", folder, preprocess="in-graph")
    return folder


@pytest.fixture(scope="session")
def fp16_folder(classifier: Net, labelled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fp16") / "out"
    export(classifier, "onnx", folder, precision="fp16", images=labelled)
    return folder


@pytest.fixture(scope="session")
def int8_folder(classifier: Net, few: Path, calibration: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("int8") / "out"
    export(classifier, "onnx", folder, precision="int8", images=few, calibration=calibration, max_drop=MAX_DROP)
    return folder
