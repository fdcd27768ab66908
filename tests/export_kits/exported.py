"""What the tests of the kits share: the folder that they serve, and a way to import a kit's file."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import timm

import sdzoo

ROOT = Path(__file__).parents[2]
KITS = ROOT / "export"
IGNORING = ("sh", "-c", "trap '' INT; exec \"$@\"", "sh")  # runs what follows with SIGINT ignored


def export_folder(folder: Path, preprocess: str = "client") -> Path:
    """Export the pretrained ``sd_resnet20`` to ONNX into ``folder`` and return it."""
    model = timm.create_model("sd_resnet20", pretrained=True).eval()
    sdzoo.export(model, "onnx", folder, preprocess=preprocess)
    return folder


def load_file(path: Path) -> ModuleType:
    """Return the module in ``path``, which is no package's."""
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}_{path.stem}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
