"""ResNets with stochastic depth for timm.

Importing sdzoo registers its models: ``timm.create_model("sd_resnet110")``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

import sdzoo.sd_resnet_cifar
import sdzoo.sd_resnetv2_cifar  # noqa: F401  registers its models, as the others do
from sdzoo.fold import fold
from sdzoo.gate import fixed_gates, live_blocks, set_draw_probs
from sdzoo.residual import compile_blocks
from sdzoo.schedule import budget, constant_depth, linear_decay, stagewise, uniform, warm_up
from sdzoo.sd_resnet import to_timm
from sdzoo.stochastic_depth import add_stochastic_depth
from sdzoo.survival import set_survival, survival_probs

if TYPE_CHECKING:
    from sdzoo.deploy.benchmark import benchmark
    from sdzoo.deploy.export import export
    from sdzoo.deploy.onnx_export import export_onnx
    from sdzoo.deploy.runtime import load_predictor
    from sdzoo.deploy.verify import verify
    from sdzoo.hub.load import load_hub
    from sdzoo.hub.publish import publish
    from sdzoo.training.engine import train
    from sdzoo.training.evaluate import evaluate

__all__ = [
    "add_stochastic_depth",
    "benchmark",
    "budget",
    "compile_blocks",
    "constant_depth",
    "evaluate",
    "export",
    "export_onnx",
    "fixed_gates",
    "fold",
    "linear_decay",
    "live_blocks",
    "load_hub",
    "load_predictor",
    "publish",
    "set_draw_probs",
    "set_survival",
    "stagewise",
    "survival_probs",
    "to_timm",
    "train",
    "uniform",
    "verify",
    "warm_up",
]

# Imported when first asked for, so that ``import sdzoo`` costs little more than ``import timm``.
_LAZY = {
    "benchmark": "sdzoo.deploy.benchmark",
    "evaluate": "sdzoo.training.evaluate",
    "export": "sdzoo.deploy.export",
    "export_onnx": "sdzoo.deploy.onnx_export",
    "load_hub": "sdzoo.hub.load",
    "load_predictor": "sdzoo.deploy.runtime",
    "publish": "sdzoo.hub.publish",
    "train": "sdzoo.training.engine",
    "verify": "sdzoo.deploy.verify",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
