"""The 224-pixel family against timm's own networks: weights by file, every option of timm's, and the way back."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import timm.models
import torch
from nets import Net, close, evaluate, linear_decay_by_hand, random_images, without_probs
from timm.layers import BlurPool2d, DropBlock2d, DropPath, GroupNorm
from timm.models import resnet
from timm_nets import timm_blocks, trained_like, weighted
from torch import Tensor, nn

import sdzoo
from sdzoo.errors import InputError
from sdzoo.gate import Gate
from sdzoo.sd_resnet import SDResNet

# The network, its residual blocks, and its parameters in millions as timm's documentation has them.
FAMILY = {
    "resnet18": (8, 11.69),
    "resnet34": (16, 21.80),
    "resnet50": (16, 25.56),
    "resnet101": (33, 44.55),
    "resnet152": (50, 60.19),
    "resnext50_32x4d": (16, 25.03),
    "wide_resnet50_2": (16, 68.88),
    "seresnet50": (16, 28.09),
}
every_network = pytest.mark.parametrize("name", FAMILY)
UNIFORM = {"schedule": "uniform", "drop_path_rate": 0.2}


@pytest.fixture
def images() -> Tensor:
    """Return two 64-pixel images of noise."""
    return random_images(2, 64)


def on_meta(name: str, **kwargs: Any) -> Net:
    with torch.device("meta"):
        return timm.create_model(name, **kwargs)


@lru_cache(maxsize=4)
def _trained(name: str, options: tuple[tuple[str, Any], ...]) -> Net:
    torch.manual_seed(0)
    kwargs: dict[str, Any] = {key: dict(value) if key == "block_args" else value for key, value in options}
    return trained_like(timm.create_model(name, **kwargs), random_images(4, 64, seed=2))


def trained(name: str, **options: Any) -> Net:
    """Return timm's network like a trained one, in evaluation."""
    return copy.deepcopy(_trained(name, tuple(options.items())))


def matters(model: nn.Module, images: Tensor) -> Tensor:
    """Return the logits of timm's ``model``, in evaluation, which differ from those without its branches."""
    expected = evaluate(model, images)
    zeroed = weighted(model, [0.0] * len(timm_blocks(model)))
    assert (expected - evaluate(zeroed, images)).abs().max() > 0.02 * expected.abs().max()
    halved = weighted(model, linear_decay_by_hand(len(timm_blocks(model))))
    assert (expected - evaluate(halved, images)).abs().max() > 0.02 * expected.abs().max()
    return expected


@every_network
def test_the_network_is_timms_with_a_gate_a_block(name: str) -> None:
    blocks, millions = FAMILY[name]
    model, stock = on_meta(f"sd_{name}"), on_meta(name)
    keys = {f"{block}.gate.survival_prob" for block, _ in timm_blocks(stock)}
    assert len(keys) == blocks
    assert set(model.state_dict()) == {*stock.state_dict(), *keys}
    assert [(key, p.shape) for key, p in model.named_parameters()] == [
        (k, p.shape) for k, p in stock.named_parameters()
    ]
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.006)
    assert sdzoo.survival_probs(model) == pytest.approx(linear_decay_by_hand(blocks), abs=1e-7)
    assert isinstance(model, resnet.ResNet)
    assert model.feature_info == stock.feature_info
    assert not [module for module in model.modules() if isinstance(module, DropPath)]


@every_network
def test_every_tag_has_timms_configuration_and_safetensors_on_its_hub(name: str) -> None:
    tags = {pretrained.partition(".")[2] for pretrained in timm.list_pretrained(f"sd_{name}")}
    assert tags == {pretrained.partition(".")[2] for pretrained in timm.list_pretrained(name)}
    assert timm.get_pretrained_cfg(f"sd_{name}").tag == timm.get_pretrained_cfg(name).tag  # type: ignore[union-attr]
    for tag in tags:
        ours, theirs = timm.get_pretrained_cfg(f"sd_{name}.{tag}"), timm.get_pretrained_cfg(f"{name}.{tag}")
        assert ours is not None and theirs is not None
        assert ours.hf_hub_id == theirs.hf_hub_id == f"timm/{name}.{tag}"
        assert (ours.url, ours.file, ours.hf_hub_filename) == (None, None, "model.safetensors")
        mine, his = vars(ours).copy(), vars(theirs).copy()
        for key in ("url", "hf_hub_filename", "architecture"):
            del mine[key], his[key]
        assert mine == his


@pytest.mark.parametrize("name", ["resnet18", "seresnet50"])
def test_evaluation_weights_each_branch_by_its_p(name: str, images: Tensor) -> None:
    stock = trained(name, num_classes=10)
    model: Net = timm.create_model(f"sd_{name}", num_classes=10)
    model.load_state_dict(trained_with_p(model, stock))
    p = linear_decay_by_hand(len(timm_blocks(stock)))
    close(evaluate(weighted(stock, p), images), evaluate(model, images), tol=1e-5)
    assert (matters(stock, images) - evaluate(model, images)).abs().max() > 0.01


def trained_with_p(model: nn.Module, stock: nn.Module) -> dict[str, Tensor]:
    """Return the weights of ``stock`` as if they had been trained with the gates of ``model``."""
    return {**model.state_dict(), **stock.state_dict()}


@pytest.fixture(scope="module", params=["resnet18", "resnet34", "resnet50", "seresnet50", "resnext50_32x4d"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Net, dict[str, str]]:
    """Return a network's name, timm's model like a trained one, and the file of its weights as a configuration."""
    folder = tmp_path_factory.mktemp(request.param)
    model = trained(request.param)
    timm.models.save_for_hf(model, str(folder), safe_serialization=True)
    return request.param, model, {"file": str(folder / "model.safetensors")}


SETTINGS: list[dict[str, Any]] = [
    {},
    {"drop_path_rate": 0.3},
    UNIFORM,
    {"schedule": "constant_depth"},
    {"survival_probs": 0.7},
    {"mode": "sample"},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_pretrained_by_file_keeps_the_stock_function(
    settings: dict[str, Any], saved: tuple[str, Net, dict[str, str]], images: Tensor
) -> None:
    name, stock, file = saved
    blocks = len(timm_blocks(stock))
    if "survival_probs" in settings:
        settings = {"survival_probs": [0.7 - 0.3 * index / blocks for index in range(blocks)]}
    model = timm.create_model(f"sd_{name}", pretrained=True, pretrained_cfg_overlay=file, **settings)
    close(matters(stock, images), evaluate(model, images), tol=1e-4)
    expected = {
        (): linear_decay_by_hand(blocks),
        ("mode",): linear_decay_by_hand(blocks),
        ("drop_path_rate",): linear_decay_by_hand(blocks, 0.7),
        ("schedule", "drop_path_rate"): [0.8] * blocks,
        ("schedule",): [1.0] * blocks,
        ("survival_probs",): settings.get("survival_probs"),
    }[tuple(settings)]
    assert sdzoo.survival_probs(model) == pytest.approx(expected, abs=1e-6)


@pytest.fixture(scope="module")
def resnet18_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Net, dict[str, str]]:
    """Return timm's resnet18 like a trained one, and the file of its weights as a configuration."""
    folder, model = tmp_path_factory.mktemp("resnet18"), trained("resnet18")
    timm.models.save_for_hf(model, str(folder), safe_serialization=True)
    return model, {"file": str(folder / "model.safetensors")}


@pytest.mark.parametrize("settings", [{}, UNIFORM])
def test_pretrained_with_other_classes_channels_or_as_features(
    settings: dict[str, Any], resnet18_file: tuple[Net, dict[str, str]], images: Tensor
) -> None:
    stock, file = resnet18_file

    def both(**kwargs: Any) -> tuple[Net, Net]:
        ours = timm.create_model("sd_resnet18", pretrained=True, pretrained_cfg_overlay=file, **kwargs, **settings)
        theirs = timm.create_model("resnet18", pretrained=True, pretrained_cfg_overlay=file, **kwargs)
        return ours.eval(), theirs.eval()

    matters(stock, images)
    ours, theirs = both(num_classes=7)
    with torch.no_grad():
        close(theirs.forward_features(images), ours.forward_features(images), tol=1e-4)
        close(stock.forward_features(images), ours.forward_features(images), tol=1e-4)
    ours, theirs = both(num_classes=0)
    close(evaluate(theirs, images), evaluate(ours, images), tol=1e-4)
    ours, theirs = both(in_chans=1)
    close(evaluate(theirs, images[:, :1]), evaluate(ours, images[:, :1]), tol=1e-4)
    ours, theirs = both(in_chans=5)
    more = random_images(2, 64, 5)
    close(evaluate(theirs, more), evaluate(ours, more), tol=1e-4)
    ours, theirs = both(features_only=True)
    with torch.no_grad():
        levels, expected = ours(images), theirs(images)
    assert len(levels) == len(expected) == 5
    for level, other in zip(expected, levels, strict=True):
        close(level, other, tol=1e-4)
    assert ours.feature_info.channels() == theirs.feature_info.channels() == [64, 64, 128, 256, 512]
    assert ours.feature_info.reduction() == [2, 4, 8, 16, 32]


def test_weights_of_another_width_are_refused_with_keys_and_shapes(resnet18_file: tuple[Net, dict[str, str]]) -> None:
    _, file = resnet18_file
    with pytest.raises(RuntimeError, match=r"(?s)layer1.0.conv1.weight.*\[64, 64, 3, 3\].*\[\d+, \d+, \d, \d\]"):
        timm.create_model("sd_resnet50", pretrained=True, pretrained_cfg_overlay=file)
    with pytest.raises(RuntimeError, match=r"layer1\.2"):
        timm.create_model("sd_resnet34", pretrained=True, pretrained_cfg_overlay=file)


OPTIONS: dict[str, dict[str, Any]] = {
    "deep stem": {"stem_type": "deep", "stem_width": 16},
    "tiered stem": {"stem_type": "deep_tiered", "stem_width": 16},
    "avg_down": {"avg_down": True},
    "anti-alias": {"aa_layer": BlurPool2d},
    "average pooling": {"aa_layer": nn.AvgPool2d},
    "drop-block": {"drop_block_rate": 0.2},
    "stem without pooling": {"replace_stem_pool": True},
    "SiLU": {"act_layer": "silu"},
    "LeakyReLU": {"act_layer": "leaky_relu"},
    "stride 8": {"output_stride": 8},
    "stride 16": {"output_stride": 16},
    "reduced first": {"block_reduce_first": 2},
    "wide kernel": {"down_kernel_size": 3},
    "SE": {"block_args": (("attn_layer", "se"),)},
    "ECA": {"block_args": (("attn_layer", "eca"),)},
    "dropout": {"drop_rate": 0.3},
    "GroupNorm": {"norm_layer": partial(GroupNorm, num_groups=4)},
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@pytest.mark.filterwarnings("ignore:fold keeps")
def test_every_option_of_timms_resnet_works(name: str, option: str, images: Tensor) -> None:
    channels = (64, 16, 32, 64) if name == "resnet18" else (16, 32, 64, 128)  # its first shortcut is the identity
    options = {"layers": (1, 2, 1, 1), "channels": channels, "num_classes": 10, **OPTIONS[option]}
    stock = trained(name, **options)
    options["block_args"] = dict(options.get("block_args", ()))
    model: Net = timm.create_model(f"sd_{name}", **options)
    model.load_state_dict(trained_with_p(model, stock))
    blocks = len(timm_blocks(stock))
    matters(stock, images)
    expected = evaluate(weighted(stock, linear_decay_by_hand(blocks)), images)
    close(expected, evaluate(model, images), tol=1e-5)
    close(expected, evaluate(sdzoo.fold(model.eval()), images), tol=1e-4)
    close(expected, evaluate(sdzoo.to_timm(model), images), tol=1e-5)
    assert [type(m) for m in model.modules() if isinstance(m, DropBlock2d)] == [
        type(m) for m in stock.modules() if isinstance(m, DropBlock2d)
    ]
    random = any(isinstance(module, DropBlock2d) for module in model.modules())
    bits = [1] * blocks if random else [0, 1, 0, 1, 1]
    reference = weighted(stock, bits).train()
    outs = []
    with sdzoo.fixed_gates(model.train(), bits):
        for each in (reference, model):
            torch.manual_seed(4)  # of dropout and drop-block
            out = each(images)
            each.zero_grad()
            out.square().sum().backward()
            outs.append(out)
    close(*outs, tol=1e-5)
    theirs = dict(reference.named_parameters())
    for key, parameter in model.named_parameters():
        close(theirs[key].grad.flatten(), parameter.grad.flatten(), tol=2e-3)
    with sdzoo.fixed_gates(model, [0] * blocks):
        assert bool(model(images).isfinite().all())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_args": {"attn_layer": "cbam"}}, "resnet.BasicBlock.*CbamModule"),
        ({"norm_layer": partial(nn.BatchNorm2d, affine=False), "zero_init_last": False}, "BasicBlock.*BatchNorm2d"),
        ({"drop_path_rate": 1.0}, "drop_path_rate is 1.0"),
        ({"survival_probs": [0.5] * 7}, "survival_probs has 7 entries; the model has 8 blocks"),
        ({"schedule": "lineer"}, "nearest: linear"),
        ({"mode": "x"}, 'mode is "x"'),
    ],
)
def test_what_cannot_be_is_refused_at_creation(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        on_meta("sd_resnet18", **options)


def test_schedules_of_the_family() -> None:
    assert sdzoo.survival_probs(on_meta("sd_resnet18", schedule="stagewise", survival_probs=[1, 0.9, 0.8, 0.5])) == [
        *(1.0, 1.0, 0.9, 0.9),
        *(0.8, 0.8, 0.5, 0.5),
    ]
    assert sdzoo.survival_probs(on_meta("sd_resnet18", drop_path_rate=0.0)) == [1.0] * 8


# Back to timm.


def sd_like(stock: nn.Module, arch: str, **kwargs: Any) -> Net:
    """Return sdzoo's network with the branches of ``stock``, in evaluation: p weights them, so the function differs."""
    model: Net = timm.create_model(arch, **kwargs)
    model.load_state_dict(trained_with_p(model, stock))
    return model.eval()


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "seresnet50"])
@pytest.mark.parametrize("settings", [{}, UNIFORM])
def test_to_timm_is_stock_with_the_same_function(name: str, settings: dict[str, Any], images: Tensor) -> None:
    stock = trained(name, num_classes=10)
    model = sd_like(stock, f"sd_{name}", num_classes=10, **settings)
    state, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    probs = [0.8] * len(timm_blocks(stock)) if settings else linear_decay_by_hand(len(timm_blocks(stock)))
    expected = evaluate(weighted(stock, probs), images)
    plain: Net = sdzoo.to_timm(model)
    assert (type(plain), type(model)) == (resnet.ResNet, SDResNet)
    assert {type(module).__module__.partition(".")[0] for module in plain.modules()} == {"timm", "torch"}
    assert list(plain.state_dict()) == list(stock.state_dict())
    close(expected, evaluate(plain, images), tol=1e-5)
    assert plain.pretrained_cfg["architecture"] == plain.default_cfg["architecture"] == name
    assert not plain.training
    stock.load_state_dict(plain.state_dict())
    assert torch.equal(evaluate(plain, images), evaluate(stock, images))
    # The argument is as it was.
    assert model.pretrained_cfg["architecture"] == f"sd_{name}"
    after = model.state_dict()
    assert list(after) == list(state)
    assert all(torch.equal(value, after[key]) for key, value in state.items())
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(RuntimeError, match="survival probabilities are missing"):
        model.load_state_dict({k: v for k, v in state.items() if k != "layer1.0.gate.survival_prob"})
    # It trains as timm's, at constant depth, and loads what timm's loads.
    plain.load_state_dict(trained(name, num_classes=10).state_dict())
    close(matters(trained(name, num_classes=10), images), evaluate(plain, images), tol=1e-6)
    plain.train()
    torch.manual_seed(1)
    close(trained(name, num_classes=10).train()(images), plain(images), tol=1e-6)


def test_to_timm_in_double_precision() -> None:
    images = random_images(2, 64).double()
    model = sd_like(trained("seresnet50", num_classes=10), "sd_seresnet50", num_classes=10).double()
    close(evaluate(model, images), evaluate(sdzoo.to_timm(model), images), tol=1e-10)


STRANGER = """
import sys, timm, torch
model = timm.create_model(sys.argv[1], pretrained=True).eval()
torch.save((type(model).__module__, model(torch.load(sys.argv[2])), model.pretrained_cfg["architecture"]), sys.argv[3])
assert "sdzoo" not in sys.modules
"""


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {**UNIFORM, "num_classes": 5, "in_chans": 1},
        {"survival_probs": [0.5] * 8, "mode": "sample"},
        {"schedule": "stagewise", "survival_probs": [1, 0.9, 0.8, 0.5]},
    ],
)
def test_a_checkpoint_made_by_to_timm_loads_where_sdzoo_is_not(settings: dict[str, Any], tmp_path: Path) -> None:
    kwargs = {key: settings[key] for key in ("num_classes", "in_chans") if key in settings}
    model: Net = timm.create_model("sd_resnet18", **settings)
    model = trained_like(model, random_images(4, 64, kwargs.get("in_chans", 3)))
    images = random_images(2, 64, kwargs.get("in_chans", 3))
    timm.models.save_for_hf(sdzoo.to_timm(model), str(tmp_path), safe_serialization=True)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architecture"] == "resnet18"
    assert not {"schedule", "survival_probs", "mode", "drop_path_rate"} & set(config.get("model_args", {}))
    stored = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert not [key for key in stored if "gate" in key]
    torch.save(images, tmp_path / "images.pt")
    command = [sys.executable, "-c", STRANGER, f"local-dir:{tmp_path}", tmp_path / "images.pt", tmp_path / "out.pt"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    module, logits, architecture = torch.load(tmp_path / "out.pt")
    assert (module, architecture) == ("timm.models.resnet", "resnet18")
    close(evaluate(model, images), logits, tol=1e-5)


@pytest.mark.parametrize("option", ["anti-alias", "drop-block", "SE"])
def test_to_timm_of_a_model_that_got_stochastic_depth(option: str, images: Tensor) -> None:
    options = {"channels": (16, 32, 64, 128), "num_classes": 10, **OPTIONS[option]}
    stock = trained("resnet18", **options)
    gated = sdzoo.add_stochastic_depth(stock).eval()
    plain = sdzoo.to_timm(gated)
    assert type(plain) is resnet.ResNet
    assert list(plain.state_dict()) == list(stock.state_dict())
    close(matters(stock, images), evaluate(plain, images), tol=1e-5)
    assert [module for module in gated.modules() if isinstance(module, Gate)]
    plain.load_state_dict(stock.state_dict())
    assert torch.equal(evaluate(plain, images), evaluate(stock, images))


def test_to_timm_of_a_model_made_without_the_registry(images: Tensor) -> None:
    model: Net = SDResNet(resnet.BasicBlock, (1, 1, 1, 1), channels=(8, 16, 32, 64), num_classes=10).eval()
    trained_like(model, images)
    plain = sdzoo.to_timm(model)
    assert type(plain) is resnet.ResNet
    close(evaluate(model, images), evaluate(plain, images), tol=1e-5)


def part_in_training() -> Net:
    model = timm.create_model("sd_resnet18").eval()
    model.get_submodule("layer3.1.bn2").train()
    return model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: timm.create_model("sd_resnet18").train(), "training mode"),
        (part_in_training, "training mode"),
        (lambda: timm.create_model("sd_resnet20").eval(), "sdzoo's own SDResNetCifar"),
        (lambda: sdzoo.fold(timm.create_model("sd_resnet18").eval()), "no gates"),
        (lambda: timm.create_model("resnet18").eval(), "no gates"),
        (lambda: sdzoo.to_timm(timm.create_model("sd_resnet18").eval()), "no gates"),
    ],
)
def test_to_timm_refuses(model: Any, message: str) -> None:
    built = model()
    state, kinds = copy.deepcopy(built.state_dict()), [type(module) for module in built.modules()]
    with pytest.raises(InputError, match=message):
        sdzoo.to_timm(built)
    assert [type(module) for module in built.modules()] == kinds
    assert all(torch.equal(value, state[key]) for key, value in built.state_dict().items())


def test_a_saved_family_model_keeps_its_function_and_p(images: Tensor, tmp_path: Path) -> None:
    model: Net = sd_like(trained("resnet18", num_classes=10), "sd_resnet18", num_classes=10, **UNIFORM)
    timm.models.save_for_hf(model, str(tmp_path), safe_serialization=True)
    schedules: list[dict[str, Any]] = [{}, {"drop_path_rate": 0.6}]
    for settings in schedules:
        again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, **settings)
        close(evaluate(model, images), evaluate(again, images), tol=1e-4)
        assert type(again) is SDResNet
        if not settings:
            assert sdzoo.survival_probs(again) == [0.8] * 8
    plain = timm.create_model("resnet18", num_classes=10)
    plain.load_state_dict(without_probs(sdzoo.to_timm(model).state_dict()))
    close(evaluate(model, images), evaluate(plain, images), tol=1e-5)
