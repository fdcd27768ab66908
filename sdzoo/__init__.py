"""ResNets with stochastic depth for timm. Importing sdzoo registers its models: ``timm.create_model("sd_resnet110")``."""

from sdzoo import sd_resnet_cifar as _sd_resnet_cifar
from sdzoo.fold import fold
from sdzoo.gate import fixed_gates, live_blocks
from sdzoo.schedule import constant_depth, linear_decay, uniform
from sdzoo.survival import set_survival, survival_probs

__all__ = [
    "constant_depth",
    "fixed_gates",
    "fold",
    "linear_decay",
    "live_blocks",
    "set_survival",
    "survival_probs",
    "uniform",
]
__version__ = "0.1.0"
