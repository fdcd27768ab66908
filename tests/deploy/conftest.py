"""One model and its ONNX file, for all tests of the deployment part."""

from __future__ import annotations

from pathlib import Path

import pytest
from nets import calibrated
from torch import nn

from sdzoo.deploy.onnx_export import export_onnx


@pytest.fixture(scope="session")
def model() -> nn.Module:
    """Return a calibrated ``sd_resnet20`` in evaluation, p falling to 0.3. Read only."""
    return calibrated("sd_resnet20", drop_path_rate=0.7)


@pytest.fixture(scope="session")
def exported(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the ONNX file of ``model``, alone in its folder. Read only."""
    path = tmp_path_factory.mktemp("exported") / "model.onnx"
    export_onnx(model, path)
    return path
