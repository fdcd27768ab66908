"""What the tests of the kits share: the folder that they serve, and a way to import a kit's file."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import timm
from cards import put_card

import sdzoo
from sdzoo.deploy.card import digests

ROOT = Path(__file__).parents[2]
KITS = ROOT / "export"
IGNORING = ("sh", "-c", "trap '' INT; exec \"$@\"", "sh")  # runs what follows with SIGINT ignored


def export_folder(folder: Path, preprocess: str = "client") -> Path:
    """Export the pretrained ``sd_resnet20`` to ONNX into ``folder`` and return it."""
    model = timm.create_model("sd_resnet20", pretrained=True).eval()
    sdzoo.export(model, "onnx", folder, preprocess=preprocess)
    return folder


def without_classifier(folder: Path, target: str = "onnx", backend: str | None = None) -> Path:
    """Export a model that gives features into ``folder`` and return it."""
    sdzoo.export(timm.create_model("sd_resnet20", num_classes=0).eval(), target, folder, backend=backend)
    return folder


def not_finite(folder: Path) -> Path:
    """Make the model in the exported ``folder`` give NaN, each sha256 fitting, and return the folder."""
    import onnx  # not everywhere that this module is imported
    from onnx_files import save_sealed

    path = folder / json.loads((folder / "card.json").read_text())["file"]
    proto = onnx.load(path)
    (bias,) = (tensor for tensor in proto.graph.initializer if tensor.name == "fc.bias")
    bias.CopyFrom(onnx.numpy_helper.from_array(np.full(bias.dims, np.nan, np.float32), bias.name))
    save_sealed(proto, path)
    return put_card(folder, files=digests(folder))


def load_file(path: Path) -> ModuleType:
    """Return the module in ``path``, which is no package's."""
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}_{path.stem}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
