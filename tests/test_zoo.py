from __future__ import annotations

import ast
import dataclasses
import fnmatch
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from timm.models import PretrainedCfg
from timm.models import _registry as timm_registry
from torch import Tensor, nn

from sdzoo import registry, weights, zoo
from sdzoo.digest import state_sha256
from sdzoo.errors import InputError
from sdzoo.gate import Gate
from sdzoo.macs import count_macs
from sdzoo.training.checkpoint import describe, save_weights

NAME = "sd_resnet20.cifar10_jpeg"
BLOCKS_PER_STAGE = {
    "sd_resnet20": 3,
    "sd_resnet32": 5,
    "sd_resnet44": 7,
    "sd_resnet56": 9,
    "sd_resnet110": 18,
    "sd_resnet152_cifar": 25,
    "sd_resnet1202": 200,
}
PARAMETERS = {
    "sd_resnet20": 269_722,
    "sd_resnet32": 464_154,
    "sd_resnet44": 658_586,
    "sd_resnet56": 853_018,
    "sd_resnet110": 1_727_962,
    "sd_resnet152_cifar": 2_408_474,
    "sd_resnet1202": 19_421_274,
}


def registered() -> set[str]:
    """Return the names of all functions in the package under ``@register_model``, as its text has them."""
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in Path(zoo.__file__).parent.rglob("*.py")]
    functions = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    return {f.name for f in functions if any("register_model" in ast.unparse(line) for line in f.decorator_list)}


def macs_by_hand(n: int) -> int:
    """Return kernel x channels in x channels out x pixels of every convolution, and the classifier."""
    stem = 9 * 3 * 16 * 32**2
    first = 2 * n * 9 * 16 * 16 * 32**2
    second = 9 * 16 * 32 * 16**2 + (2 * n - 1) * 9 * 32 * 32 * 16**2
    third = 9 * 32 * 64 * 8**2 + (2 * n - 1) * 9 * 64 * 64 * 8**2
    return stem + first + second + third + 64 * 10


def training_macs_by_hand(n: int) -> float:
    """Return the same with the convolutions of block l counted ``p_l = 1 - l / 6n`` times; shortcuts have none."""
    within = 2 * 9 * 16 * 16 * 32**2
    entry_2, entry_3 = 9 * (16 + 32) * 32 * 16**2, 9 * (32 + 64) * 64 * 8**2
    branches = [within] * n + [entry_2] + [within] * (n - 1) + [entry_3] + [within] * (n - 1)
    stem_and_head = 9 * 3 * 16 * 32**2 + 64 * 10
    return stem_and_head + sum((1 - block / (6 * n)) * macs for block, macs in enumerate(branches, start=1))


def add_model(patch: pytest.MonkeyPatch, name: str, module: str, model: type[nn.Module] = nn.Module) -> None:
    """Register ``model`` with timm until the test ends, as a function of ``module``."""

    def entrypoint(pretrained: bool = False, **_: Any) -> nn.Module:
        return model()

    entrypoint.__module__ = module
    patch.setitem(timm_registry._model_entrypoints, name, entrypoint)
    patch.setitem(timm_registry._model_pretrained_cfgs, name, PretrainedCfg(input_size=(3, 4, 4), num_classes=10))


def test_every_model_of_the_package_is_listed() -> None:
    assert set(registry.models()) == registered() >= set(BLOCKS_PER_STAGE)
    assert [name for name in registry.models() if name in BLOCKS_PER_STAGE] == list(BLOCKS_PER_STAGE)


def test_only_models_of_the_package_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever they are called, and whoever else calls theirs so."""
    before = registry.models()
    add_model(monkeypatch, "sd_resnet21", "sdzoo_of_someone_else")
    add_model(monkeypatch, "sd_resnet22", "mine.sdzoo")
    assert registry.models() == before
    add_model(monkeypatch, "another", "sdzoo.family")
    assert set(registry.models()) == {*before, "another"}
    with pytest.raises(InputError, match='"sd_resnet21" is not a model'):
        registry.check_name("sd_resnet21")


@pytest.mark.parametrize(
    "patterns", [["sd_resnet1*"], ["*110*"], ["sd_resnet20"], ["*110*", "sd_resnet?0"], ["*_cifar", "sd_resnet20"]]
)
def test_patterns_choose_models(patterns: list[str]) -> None:
    chosen = registry.models(patterns)
    assert chosen == [name for name in registry.models() if any(fnmatch.fnmatchcase(name, p) for p in patterns)]
    assert 0 < len(chosen) < len(registry.models())


@pytest.mark.parametrize("patterns", [[], ["sd_resnet20"], ["sd_resnet2*"], ["*.cifar10_jpeg"], [NAME]])
def test_those_with_weights_are_listed_with_their_tags(patterns: list[str]) -> None:
    listed = registry.models(patterns, pretrained=True)
    assert NAME in listed
    assert set(listed) <= {f"{model}.{tag}" for model in registry.models() for tag in registry.tags(model)}


@pytest.mark.parametrize(
    ("patterns", "pretrained", "says"),
    [
        (["sd_resent110*"], False, '"sd_resent110*" matches no model; nearest: sd_resnet110'),
        (["sd_resnet20", "sd_resnet11?1"], False, '"sd_resnet11?1" matches no model; nearest: sd_resnet110'),
        (["resnet50"], False, '"resnet50" matches no model'),  # timm's, not sdzoo's
        (["sd_resent20"], True, '"sd_resent20" matches no model; nearest: sd_resnet20'),
        (["sd_resnet32"], True, '"sd_resnet32" matches no model with weights; sdzoo list --pretrained shows those'),
        (["sd_resnet20", "*1202"], True, '"*1202" matches no model with weights'),
    ],
)
def test_a_pattern_that_matches_nothing_is_refused(patterns: list[str], pretrained: bool, says: str) -> None:
    with pytest.raises(InputError) as caught:
        registry.models(patterns, pretrained)
    assert str(caught.value).startswith(says)


@pytest.mark.parametrize("name", list(BLOCKS_PER_STAGE))
def test_summary(name: str) -> None:
    summary, n = zoo.summarise(name), BLOCKS_PER_STAGE[name]
    assert summary.name == name
    assert summary.input_size == (3, 32, 32)
    assert summary.parameters == PARAMETERS[name]
    assert summary.macs == macs_by_hand(n)
    assert summary.training_macs == pytest.approx(training_macs_by_hand(n), rel=1e-7)
    assert summary.layers == 6 * n + 2
    assert summary.blocks == 3 * n
    assert summary.survival_probs == pytest.approx([1 - block / (6 * n) for block in range(1, 3 * n + 1)], abs=1e-6)
    assert summary.expected_live_blocks == pytest.approx(3 * n - (3 * n + 1) / 4, abs=1e-4)


class TwoBranches(nn.Module):
    """A projection, which always runs, and two branches, each with a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.shortcut = nn.Conv2d(8, 16, 1, stride=2, bias=False)
        self.branch1 = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.branch2 = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 16, 1, bias=False))
        self.gate1, self.gate2 = Gate(0.25), Gate(0.25)

    def forward(self, x: Tensor) -> Tensor:
        x = self.shortcut(x)
        for gate, branch in ((self.gate1, self.branch1), (self.gate2, self.branch2)):
            if not self.training or gate.draw():
                x = x + branch(x)
        return x


class SmallNet(nn.Module):
    """A stem, one block and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1, bias=False)
        self.block = TwoBranches()
        self.norm = nn.BatchNorm1d(16)
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(self.block(self.stem(x)).mean((2, 3))))


def test_summary_counts_what_training_skips_and_what_it_never_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block of two gates is one block, its projection always runs, and a norm may see one pixel of an image."""
    add_model(monkeypatch, "small", "sdzoo.family", SmallNet)
    summary = zoo.summarise("small")
    always = 3 * 8 * 4**2 + 8 * 16 * 2**2 + 16 * 10
    branches = 9 * 16 * 16 * 2**2 + 16 * 16
    assert summary.macs == always + branches
    assert summary.training_macs == always + branches / 4
    assert summary.blocks == 1
    assert summary.survival_probs == (0.25,)
    assert summary.layers == 5


@pytest.mark.parametrize("name", ["sd_resnet20", NAME])
def test_summary_names_the_weights_that_ship(name: str) -> None:
    assert NAME in zoo.summarise(name).bundled
    assert zoo.summarise(name).name == name
    assert zoo.summarise("sd_resnet32").weights == ()


def test_summary_tells_the_weights_that_ship_from_those_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoo, "tags", lambda _: ["cifar10_jpeg", "on_the_hub"])
    zoo._measured.cache_clear()
    summary = zoo.summarise("sd_resnet20")
    zoo._measured.cache_clear()
    assert summary.weights == (NAME, "sd_resnet20.on_the_hub")
    assert summary.bundled == (NAME,)


def test_summary_is_of_the_tags_own_input_and_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = timm.get_pretrained_cfg("sd_resnet20")
    assert cfg is not None
    other = dataclasses.replace(cfg, input_size=(3, 64, 64), num_classes=3)
    monkeypatch.setitem(timm_registry._model_pretrained_cfgs, NAME, other)
    summary = zoo.summarise(NAME)
    assert summary.macs == 4 * (macs_by_hand(3) - 640) + 64 * 3
    assert summary.parameters == PARAMETERS["sd_resnet20"] - 7 * 65
    assert summary.input_size == (3, 64, 64)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("sd_resnet111", '"sd_resnet111" is not a model; nearest: sd_resnet110'),
        ("sd_resnet_20", "nearest: sd_resnet20"),
        ("sdresnet56.cifar10_jpeg", "nearest: sd_resnet56"),
        ("resnet18", '"resnet18" is not a model'),  # timm's, not sdzoo's
        ("", '"" is not a model'),
        ("sd_resnet20.cifar10", 'sd_resnet20 has no weights "cifar10"; it has: cifar10_jpeg'),
        ("sd_resnet1202.cifar10", 'sd_resnet1202 has no weights "cifar10"; it has none'),
    ],
)
def test_unknown_names_are_refused_with_what_there_is(name: str, says: str) -> None:
    for ask in (registry.check_name, zoo.summarise, zoo.open_model):
        with pytest.raises(InputError) as caught:
            ask(name)
        assert says in str(caught.value)


@pytest.mark.parametrize("name", ["sd_resnet20", NAME])
def test_open_by_name_gives_the_weights_that_ship(name: str) -> None:
    model = zoo.open_model(name)
    assert not model.training
    stored = safetensors.torch.load_file(weights.path(NAME))
    for key, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, stored[key], rtol=0, atol=0, msg=key)


def test_open_refuses_a_model_without_weights_and_names_those_with() -> None:
    with pytest.raises(InputError, match=r"sd_resnet32 has no weights: .*sd_resnet20\.cifar10_jpeg.* --pretrained"):
        zoo.open_model("sd_resnet32")


def test_open_says_whose_weights_the_hub_did_not_give(monkeypatch: pytest.MonkeyPatch) -> None:
    def create_model(*_: object, **__: object) -> nn.Module:
        raise LocalEntryNotFoundError("cannot find the file\ncheck your connection")

    monkeypatch.setattr(timm, "create_model", create_model)
    with pytest.raises(OSError, match=f"of {NAME} cannot be fetched from the Hub: cannot find the file check your con"):
        zoo.open_model(NAME)


def test_open_untrained_where_that_will_do() -> None:
    model = zoo.open_model("sd_resnet32", need_weights=False)
    assert not model.training
    assert sum(p.numel() for p in model.parameters()) == 464_154


@pytest.fixture
def checkpoint(tmp_path: Path) -> tuple[Path, nn.Module]:
    model = timm.create_model("sd_resnet32", num_classes=2)
    save_weights(tmp_path / "best.safetensors", model, describe(model, ("cat", "dog")))
    return tmp_path / "best.safetensors", model


def test_open_a_checkpoint(checkpoint: tuple[Path, nn.Module]) -> None:
    file, saved = checkpoint
    model = zoo.open_model(str(file))
    assert not model.training
    assert list(model.pretrained_cfg["label_names"]) == ["cat", "dog"]  # type: ignore[index]
    for key, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, saved.state_dict()[key], rtol=0, atol=0, msg=key)


@pytest.mark.parametrize("name", ["weights", "weights.bin", "sd_resnet20"])
def test_open_a_file_whatever_its_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one called like a model: what lies there was meant."""
    monkeypatch.chdir(tmp_path)
    torch.save(timm.create_model("sd_resnet32").state_dict(), name)
    assert len(zoo.open_model(name, "sd_resnet32").layer1) == 5  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["missing.safetensors", "missing.pth", "missing.pt", "no/such/folder/x.pth"])
def test_open_a_missing_checkpoint(name: str) -> None:
    with pytest.raises(InputError, match="does not exist"):
        zoo.open_model(name)


@pytest.mark.parametrize("name", ["runs/first", "/nowhere/sd_resnet20", "./sd_resnet20"])
def test_open_a_path_that_is_no_file(name: str) -> None:
    with pytest.raises(InputError):
        zoo.open_model(name)


def test_counting_leaves_the_model_alone() -> None:
    model = timm.create_model("sd_resnet20").train()
    before = state_sha256(model.state_dict())
    count_macs(model, (3, 32, 32))
    assert state_sha256(model.state_dict()) == before
    assert all(module.training for module in model.modules())
