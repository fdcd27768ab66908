"""CIFAR ResNets with subsampling shortcuts: the weights in circulation load, and compute what they computed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import timm.models
import torch
import torch.nn.functional as F
from nets import Net, close, evaluate, linear_decay_by_hand, random_images
from torch import Tensor, nn

import sdzoo
from sdzoo.errors import InputError

SCHEDULES: list[dict[str, Any]] = [
    {},
    {"drop_path_rate": 0.8},
    {"schedule": "uniform", "drop_path_rate": 0.3},
    {"schedule": "constant_depth"},
    {"survival_probs": [0.2, 0.9, 0.4, 1.0, 0.1, 0.7, 0.6, 0.3, 0.8]},
]
every_schedule = pytest.mark.parametrize("asked", SCHEDULES, ids=["default", "rate", "uniform", "constant", "listed"])


class Block(nn.Module):
    """A block as the CIFAR ResNets in circulation have it: ``shortcut`` is option A of He et al., no parameters."""

    def __init__(self, in_planes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.padding = planes // 4 if stride != 1 or in_planes != planes else 0
        self.gate = 1

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        if self.padding:
            shortcut = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.padding, self.padding), "constant", 0)
        if not self.gate:
            return F.relu(shortcut)
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + shortcut)


class Literature(nn.Module):
    """A CIFAR ResNet of 6n + 2 layers under the names that its published weights have."""

    def __init__(self, n: int, classes: int = 10, width: int = 16) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        chans = width
        for stage in (1, 2, 3):
            blocks = []
            for index in range(n):
                planes = width * 2 ** (stage - 1)
                blocks.append(Block(chans, planes, 2 if stage > 1 and index == 0 else 1))
                chans = planes
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
        self.linear = nn.Linear(chans, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        for stage in (1, 2, 3):
            x = self.get_submodule(f"layer{stage}")(x)
        return self.linear(F.avg_pool2d(x, x.shape[3]).flatten(1))


def literature(n: int, classes: int = 10, width: int = 16, size: int = 16) -> Literature:
    """Return a net with trained-like weights, in evaluation: affine random, statistics of a forward."""
    torch.manual_seed(n)
    net = Literature(n, classes, width)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.3, 1.2)
            nn.init.normal_(module.bias, 0, 0.3)
            module.momentum = 1.0
    with torch.no_grad():
        net(random_images(16, size))
    return net.eval()


@pytest.fixture(scope="module")
def _published() -> Literature:
    return literature(3)


@pytest.fixture
def published(_published: Literature) -> Literature:
    """Return 20 layers with trained-like weights."""
    return copy.deepcopy(_published)


def th(state: dict[str, Tensor], folder: Path) -> str:
    """Save as most of them are: of a DataParallel, in a checkpoint."""
    checkpoint = {"state_dict": {f"module.{name}": value for name, value in state.items()}, "best_prec1": 91.7}
    torch.save(checkpoint, folder / "resnet.th")
    return str(folder / "resnet.th")


def plain(state: dict[str, Tensor], folder: Path) -> str:
    torch.save(state, folder / "resnet.pt")
    return str(folder / "resnet.pt")


def safe(state: dict[str, Tensor], folder: Path) -> str:
    safetensors.torch.save_file(state, folder / "resnet.safetensors")
    return str(folder / "resnet.safetensors")


def by_pretrained(file: str, name: str, **kwargs: Any) -> Net:
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": file}, **kwargs)


def by_load_checkpoint(file: str, name: str, **kwargs: Any) -> Net:
    model = timm.create_model(name, **kwargs)
    timm.models.load_checkpoint(model, file)
    return model


def by_checkpoint_path(file: str, name: str, **kwargs: Any) -> Net:
    return timm.create_model(name, checkpoint_path=file, **kwargs)


def by_load_state_dict(file: str, name: str, **kwargs: Any) -> Net:
    model = timm.create_model(name, **kwargs)
    model.load_state_dict(timm.models.load_state_dict(file))
    return model


def by_assign(file: str, name: str, **kwargs: Any) -> Net:
    model = timm.create_model(name, device="meta", **kwargs)
    model.load_state_dict(timm.models.load_state_dict(file), assign=True)
    return model


PATHS = [by_pretrained, by_load_checkpoint, by_checkpoint_path, by_load_state_dict, by_assign]
every_path = pytest.mark.parametrize("path", PATHS)
every_file = pytest.mark.parametrize("save", [th, plain, safe])


def probs_of(asked: dict[str, Any], blocks: int = 9) -> list[float]:
    """Return what ``asked`` means, by hand."""
    if "survival_probs" in asked:
        return asked["survival_probs"]
    if asked.get("schedule") == "constant_depth":
        return [1.0] * blocks
    final = 1 - asked.get("drop_path_rate", 0.5)
    return [final] * blocks if asked.get("schedule") == "uniform" else linear_decay_by_hand(blocks, final)


def test_the_branches_and_the_shortcuts_matter_to_these_tests(published: Literature, images: Tensor) -> None:
    reference = evaluate(published, images)
    for module in published.modules():
        if isinstance(module, Block):
            module.gate = 0
    assert (evaluate(published, images) - reference).abs().max() > 0.1 * reference.abs().max()


@every_schedule
@every_path
@every_file
def test_they_load_along_every_way_whatever_the_schedule(
    save: Callable[..., str],
    path: Callable[..., Net],
    asked: dict[str, Any],
    published: Literature,
    images: Tensor,
    tmp_path: Path,
) -> None:
    model = path(save(published.state_dict(), tmp_path), "sd_resnet20", shortcut="subsample", **asked)
    assert sdzoo.survival_probs(model) == pytest.approx(probs_of(asked), abs=1e-6)
    close(evaluate(published, images), evaluate(model, images), tol=1e-5)


@pytest.mark.parametrize(
    ("name", "n"),
    [
        ("sd_resnet32", 5),
        ("sd_resnet44", 7),
        ("sd_resnet56", 9),
        ("sd_resnet110", 18),
        pytest.param("sd_resnet1202", 200, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("asked", [{}, {"schedule": "uniform", "drop_path_rate": 0.7}], ids=["default", "uniform"])
def test_every_depth_loads(name: str, n: int, asked: dict[str, Any], tmp_path: Path) -> None:
    source, images = literature(n), random_images(4, 16)
    file = th(source.state_dict(), tmp_path)
    for path in (by_pretrained, by_load_checkpoint):
        model = path(file, name, shortcut="subsample", **asked)
        assert len(sdzoo.survival_probs(model)) == 3 * n
        close(evaluate(source, images), evaluate(model, images), tol=1e-5)


@pytest.mark.parametrize("classes", [100, 1, 0])
def test_another_number_of_classes_keeps_the_features(classes: int, published: Literature, tmp_path: Path) -> None:
    file, images = th(published.state_dict(), tmp_path), random_images()
    model = by_pretrained(file, "sd_resnet20", shortcut="subsample", num_classes=classes)
    reference = by_pretrained(file, "sd_resnet20", shortcut="subsample")
    with torch.no_grad():
        assert torch.equal(model.eval().forward_features(images), reference.eval().forward_features(images))
    assert evaluate(model, images).shape == (4, classes or 64)
    hundred = literature(3, classes=100)
    model = by_load_checkpoint(th(hundred.state_dict(), tmp_path), "sd_resnet20", shortcut="subsample", num_classes=100)
    close(evaluate(hundred, images), evaluate(model, images), tol=1e-5)


def test_other_channels_and_features(published: Literature, tmp_path: Path) -> None:
    file, images = th(published.state_dict(), tmp_path), random_images(4, 32, 1)
    grey = by_pretrained(file, "sd_resnet20", shortcut="subsample", in_chans=1)
    close(evaluate(published, images.expand(-1, 3, -1, -1)), evaluate(grey, images), tol=1e-5)
    features = by_pretrained(file, "sd_resnet20", shortcut="subsample", features_only=True).eval()
    model = by_pretrained(file, "sd_resnet20", shortcut="subsample").eval()
    with torch.no_grad():
        expected = model.forward_intermediates(random_images(), intermediates_only=True)
        for a, b in zip(expected, features(random_images()), strict=True):
            close(a, b, tol=1e-6)


def test_double_precision_loads_to_double_precision(published: Literature, images: Tensor, tmp_path: Path) -> None:
    file = plain(published.double().state_dict(), tmp_path)
    model = by_load_state_dict(file, "sd_resnet20", shortcut="subsample", dtype=torch.float64, **SCHEDULES[2])
    close(evaluate(published, images.double()), evaluate(model, images.double()), tol=1e-12)


def test_what_was_loaded_is_saved_under_the_names_of_this_family(
    published: Literature, images: Tensor, tmp_path: Path
) -> None:
    model = by_pretrained(th(published.state_dict(), tmp_path), "sd_resnet20", shortcut="subsample")
    assert set(model.state_dict()) == set(timm.create_model("sd_resnet20", device="meta").state_dict())
    timm.models.save_for_hf(model, str(tmp_path / "saved"), safe_serialization=True)
    back = timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True)
    close(evaluate(published, images), evaluate(back, images), tol=1e-5)


# --- what would change the function is refused


@every_path
@every_file
def test_they_are_refused_by_the_shortcuts_of_the_paper(
    save: Callable[..., str], path: Callable[..., Net], published: Literature, tmp_path: Path
) -> None:
    with pytest.raises((RuntimeError, InputError), match='create the model with shortcut="subsample"'):
        path(save(published.state_dict(), tmp_path), "sd_resnet20")


def test_a_refusal_with_another_number_of_classes(published: Literature, tmp_path: Path) -> None:
    with pytest.raises((RuntimeError, InputError), match='create the model with shortcut="subsample"'):
        by_pretrained(th(published.state_dict(), tmp_path), "sd_resnet20", num_classes=100)


def test_weights_that_ship_with_pooling_shortcuts_are_not_given_others() -> None:
    with pytest.raises((RuntimeError, InputError), match=r"shortcut"):
        timm.create_model("sd_resnet20.cifar10_jpeg", pretrained=True, shortcut="subsample")


@every_path
def test_another_width_is_refused_with_keys_and_shapes(path: Callable[..., Net], tmp_path: Path) -> None:
    file = th(Literature(3, width=32).state_dict(), tmp_path)
    with pytest.raises((RuntimeError, InputError)) as refused:
        path(file, "sd_resnet20", shortcut="subsample")
    message = str(refused.value)
    for words in ("conv1.weight", "layer1.0.conv1.weight", "[32, 3, 3, 3]", "[16, 3, 3, 3]", "[32, 32, 3, 3]"):
        assert words in message
    if path is not by_pretrained:
        assert "fc.weight" in message or "linear.weight" in message


@pytest.mark.parametrize(("n", "name"), [(3, "sd_resnet32"), (5, "sd_resnet20")])
def test_another_depth_is_refused_by_key(n: int, name: str, tmp_path: Path) -> None:
    file = th(Literature(n).state_dict(), tmp_path)
    for path in PATHS:
        with pytest.raises(RuntimeError, match=r"layer1\.3\.conv1\.weight"):
            path(file, name, shortcut="subsample")


@pytest.mark.parametrize("strict", [True, False])
def test_a_part_of_a_branch_is_refused(strict: bool, published: Literature) -> None:
    state = published.state_dict()
    del state["layer2.1.bn2.weight"]
    model = timm.create_model("sd_resnet20", shortcut="subsample")
    with pytest.raises(RuntimeError, match=r"layer2\.1: the weights hold \d+ of its tensors but not bn2\.weight"):
        model.load_state_dict(state, strict=strict)


@pytest.mark.parametrize(("shortcut", "nearest"), [("subsampel", "subsample"), ("pol", "pool"), ("A", None), (1, None)])
def test_an_unknown_shortcut_is_refused_with_the_nearest(shortcut: Any, nearest: str | None) -> None:
    with pytest.raises(InputError, match=rf"shortcut is .?{shortcut}.*known: pool, subsample") as refused:
        timm.create_model("sd_resnet20", shortcut=shortcut)
    assert (f"nearest: {nearest}" in str(refused.value)) if nearest else ("nearest" not in str(refused.value))


def test_a_linear_layer_beside_the_net_is_left_alone(published: Literature, images: Tensor) -> None:
    def pair() -> Net:
        net = timm.create_model("sd_resnet20", shortcut="subsample")
        return nn.ModuleDict({"net": net, "linear": nn.Linear(3, 2), "other": timm.create_model("sd_resnet32")})

    saved, loaded = pair(), pair()
    saved["net"].load_state_dict(published.state_dict())
    result = loaded.load_state_dict(saved.state_dict())
    assert not result.missing_keys and not result.unexpected_keys
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in saved.state_dict().items())
    close(evaluate(published, images), evaluate(loaded["net"], images), tol=1e-5)


def test_loading_leaves_the_callers_weights_as_they_were(published: Literature) -> None:
    state = {name: value.clone() for name, value in published.state_dict().items()}
    timm.create_model("sd_resnet20", shortcut="subsample").load_state_dict(state)
    assert list(state) == list(published.state_dict())
    assert all(torch.equal(value, state[name]) for name, value in published.state_dict().items())


# --- training, folding, odd sizes


@pytest.mark.parametrize("bits", [[1, 0, 1, 0, 0, 1, 1, 0, 1], [1] * 9, [0] * 9, [0, 0, 0, 1, 1, 1, 0, 0, 0]])
def test_the_gates_train_as_the_equation_says(bits: list[int], published: Literature, images: Tensor) -> None:
    model: Net = timm.create_model("sd_resnet20", shortcut="subsample", schedule="constant_depth").double()
    model.load_state_dict(published.double().state_dict())
    sdzoo.set_draw_probs(model, [0.5] * 9)
    by_hand = published.train()
    for block, bit in zip((m for m in by_hand.modules() if isinstance(m, Block)), bits, strict=True):
        block.gate = bit
    targets, images = torch.arange(4), images.double()
    expected = by_hand(images)
    F.cross_entropy(expected, targets).backward()
    with sdzoo.fixed_gates(model.train(), bits):
        out = model(images)
    close(expected, out, tol=1e-10)
    F.cross_entropy(out, targets).backward()
    grads = {name.replace("linear", "fc"): parameter.grad for name, parameter in by_hand.named_parameters()}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        grad = grads[name]
        close(torch.zeros_like(parameter) if grad is None else grad, parameter.grad, tol=1e-10)


def test_random_gates_are_drawn_and_a_rescaled_net_trains(published: Literature, images: Tensor) -> None:
    model: Net = timm.create_model("sd_resnet20", shortcut="subsample", schedule="uniform")
    model.load_state_dict(published.state_dict())
    sgd = torch.optim.SGD(model.train().parameters(), lr=0.05)
    draws, losses = set(), []
    for _ in range(12):
        sgd.zero_grad()
        loss = F.cross_entropy(model(images), torch.arange(4))
        loss.backward()
        sgd.step()
        draws.add(tuple(sdzoo.live_blocks(model)))
        losses.append(float(loss.detach()))
    assert len(draws) > 6
    assert sum(losses[-3:]) < sum(losses[:3])


@pytest.mark.parametrize("size", [(32, 32), (33, 31), (5, 7), (1, 1)])
def test_a_net_with_subsampling_shortcuts_folds(size: tuple[int, int], published: Literature) -> None:
    model: Net = timm.create_model("sd_resnet20", shortcut="subsample")
    model.load_state_dict(published.state_dict())
    images = torch.randn(3, 3, *size)
    close(evaluate(model, images), evaluate(sdzoo.fold(model.eval()), images), tol=1e-4)


def test_the_shortcut_is_the_literatures() -> None:
    net: Net = timm.create_model("sd_resnet20", shortcut="subsample")
    block = net.layer2[0]
    x = torch.arange(2 * 16 * 5 * 7.0).reshape(2, 16, 5, 7)
    out = block.shortcut(x)
    assert out.shape == (2, 32, 3, 4)
    assert torch.equal(out[:, 8:24], x[:, :, ::2, ::2])
    assert not out[:, :8].any() and not out[:, 24:].any()
