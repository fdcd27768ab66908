from __future__ import annotations

import json
import os
import pickle
import re
import resource
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import timm.models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import sdzoo
from sdzoo import weights
from sdzoo.errors import InputError
from sdzoo.training.checkpoint import describe, load_model, load_state, read_checkpoint, save_run, save_weights

LABELS = ("ant", "bee", "cow")


def make_model(arch: str = "sd_resnet20", **options: Any) -> nn.Module:
    """Return a model in evaluation whose BatchNorms are as of a trained net: nothing in them is 0 or 1."""
    torch.manual_seed(0)
    model: Any = timm.create_model(arch, **{"num_classes": 3, "drop_path_rate": 0.3, **options})
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)
            module.momentum = 1.0
    model.train()
    with torch.no_grad(), sdzoo.fixed_gates(model, [True] * 9):
        model(torch.randn(16, model.in_chans, 32, 32))
    return model.eval()


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return make_model()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    channels = model.in_chans
    assert isinstance(channels, int)
    return model(torch.randn(5, channels, 32, 32, generator=torch.Generator().manual_seed(3)))


def refused(action: Callable[[], Any], path: Path) -> str:
    """Return the error of ``action``: one line, which names the file."""
    with pytest.raises(InputError) as caught:
        action()
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.fixture(params=["safetensors", "pth"])
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path, model: nn.Module) -> Path:
    """A whole checkpoint of either kind."""
    path = tmp_path / f"model.{request.param}"
    if request.param == "safetensors":
        save_weights(path, model, describe(model, LABELS))
    else:
        save_run(path, describe(model, LABELS) | {"state_dict": model.state_dict(), "epoch": 3})
    return path


def test_round_trip_gives_identical_logits(checkpoint: Path, model: nn.Module) -> None:
    loaded = load_model(checkpoint)
    assert not loaded.training
    assert torch.equal(logits(loaded), logits(model))
    assert sdzoo.survival_probs(loaded) == sdzoo.survival_probs(model)
    assert sdzoo.survival_probs(loaded)[-1] == pytest.approx(0.7, abs=1e-7)


@pytest.mark.parametrize(
    "options",
    [
        {"in_chans": 1},
        {"num_classes": 7},
        {"drop_path_rate": None, "survival_probs": [0.9, 0.1, 1.0, 0.5, 0.4, 0.3, 0.2, 0.8, 0.7]},
        {"mode": "sample"},
        {"drop_path_rate": 0.0},
    ],
)
def test_round_trip_of_models_made_otherwise(tmp_path: Path, options: dict[str, Any]) -> None:
    model = timm.create_model("sd_resnet20", **{"num_classes": 3, **options}).eval()
    labels = tuple(f"class{index}" for index in range(options.get("num_classes", 3)))
    save_weights(tmp_path / "a.safetensors", model, describe(model, labels))
    loaded = load_model(tmp_path / "a.safetensors")
    assert torch.equal(logits(loaded), logits(model))
    assert sdzoo.survival_probs(loaded) == sdzoo.survival_probs(model)


def test_round_trip_of_a_channels_last_model(tmp_path: Path, model: nn.Module) -> None:
    expected = logits(model)
    other = make_model()
    other.load_state_dict(model.state_dict())
    other.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    save_weights(tmp_path / "a.safetensors", other, describe(other, LABELS))
    torch.testing.assert_close(logits(load_model(tmp_path / "a.safetensors")), expected, rtol=0, atol=0)


def test_how_to_feed_the_model_and_its_labels_come_back(tmp_path: Path) -> None:
    overlay = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "interpolation": "bicubic", "crop_pct": 0.875}
    model = timm.create_model("sd_resnet20", num_classes=3, pretrained_cfg_overlay=overlay)
    save_weights(tmp_path / "a.safetensors", model, describe(model, LABELS))
    cfg: Any = load_model(tmp_path / "a.safetensors").pretrained_cfg
    assert {name: cfg[name] for name in ("interpolation", "crop_pct")} == {
        "interpolation": "bicubic",
        "crop_pct": 0.875,
    }
    assert tuple(cfg["mean"]) == (0.1, 0.2, 0.3)
    assert tuple(cfg["std"]) == (0.4, 0.5, 0.6)
    assert tuple(cfg["label_names"]) == LABELS


def test_safetensors_hold_every_tensor_and_say_which_model_they_are(tmp_path: Path, model: nn.Module) -> None:
    save_weights(tmp_path / "a.safetensors", model, describe(model, LABELS) | {"epoch": 3})
    state, description = read_checkpoint(tmp_path / "a.safetensors")
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in state.items())
    assert (description["arch"], description["labels"], description["epoch"]) == ("sd_resnet20", list(LABELS), 3)
    assert (description["num_classes"], description["in_chans"]) == (3, 3)


def test_timm_reads_last_pth_of_a_run(finished_run: Any) -> None:
    """The file of a run opens with timm's own functions, without sdzoo's."""
    last, best = finished_run.output / "last.pth", load_model(finished_run.output / "last.pth")
    state = timm.models.load_state_dict(str(last), use_ema=False)
    assert state.keys() == best.state_dict().keys()
    model = timm.create_model("sd_resnet20", num_classes=3).eval()
    timm.models.load_checkpoint(model, str(last), use_ema=False)
    assert torch.equal(logits(model), logits(best))


def test_timm_reads_safetensors(tmp_path: Path, model: nn.Module) -> None:
    save_weights(tmp_path / "a.safetensors", model, describe(model, LABELS))
    other = timm.create_model("sd_resnet20", num_classes=3, checkpoint_path=str(tmp_path / "a.safetensors")).eval()
    assert torch.equal(logits(other), logits(model))


class Evil:
    """What unpickling would turn into a call of ``os.mkdir``."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("suffix", ["pth", "pt", "bin", "safetensors"])
@pytest.mark.parametrize("kind", ["torch.save", "torch.save in the old format", "pickle"])
def test_code_in_a_pickle_is_refused_and_does_not_run(tmp_path: Path, suffix: str, kind: str, model: nn.Module) -> None:
    marker, path = tmp_path / "marker", tmp_path / f"evil.{suffix}"
    content = {"state_dict": model.state_dict(), "arch": "sd_resnet20", "note": Evil(marker)}
    if kind == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "torch.save")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, on pickle protocol 4
        message = refused(lambda: load_model(path), path)
    assert suffix == "safetensors" or "none of it ran" in message
    assert not marker.exists()
    harmful = path.rename(tmp_path / "harmful.pth")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.load(harmful, weights_only=False) if kind != "pickle" else pickle.loads(harmful.read_bytes())
    assert marker.exists(), "the file must be able to do harm, else this test shows nothing"


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.99, 0.9999])
def test_truncated(checkpoint: Path, kept: float) -> None:
    content = checkpoint.read_bytes()
    checkpoint.write_bytes(content[: int(len(content) * kept)])
    assert "not a whole" in refused(lambda: load_model(checkpoint), checkpoint)


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.3, 0.6, 0.9])
def test_truncated_in_the_old_format(tmp_path: Path, model: nn.Module, kept: float) -> None:
    path = tmp_path / "old.pth"
    torch.save({"state_dict": model.state_dict()}, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    refused(lambda: load_model(path, "sd_resnet20"), path)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("content", [b"garbage" * 100, bytes(500), b"PK\x03\x04" + bytes(500), b"\xff" * 9, b"<html>"])
def test_garbage(tmp_path: Path, suffix: str, content: bytes) -> None:
    """That the file may be damaged is said, not only that it holds more than tensors: nobody could know."""
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(content)
    assert re.search("not a |damaged", refused(lambda: load_model(path), path))


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_missing_file_and_folder(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    assert "does not exist" in refused(lambda: load_model(path), path)
    path.mkdir()
    refused(lambda: load_model(path), path)


def test_other_shapes_list_missing_and_unexpected_keys(checkpoint: Path) -> None:
    message = refused(lambda: load_model(checkpoint, "sd_resnet32"), checkpoint)
    assert "missing: layer1.3.bn1.bias, layer1.3.bn1.num_batches_tracked, " in message
    own = timm.create_model("sd_resnet32").state_dict().keys() - timm.create_model("sd_resnet20").state_dict().keys()
    rest = len(own) - 6
    assert f"and {rest} more" in message
    assert "unexpected" not in message


def test_deeper_weights_list_unexpected_keys(tmp_path: Path) -> None:
    deeper = timm.create_model("sd_resnet32", num_classes=3)
    save_weights(tmp_path / "a.safetensors", deeper, describe(deeper, LABELS))
    message = refused(lambda: load_model(tmp_path / "a.safetensors", "sd_resnet20"), tmp_path / "a.safetensors")
    assert "unexpected: layer1.3.bn1.bias, " in message
    assert "missing" not in message


def test_keys_of_another_shape_are_listed_with_both(tmp_path: Path, model: nn.Module) -> None:
    state = dict(model.state_dict())
    state["conv1.weight"] = torch.zeros(16, 1, 3, 3)
    state["extra"] = torch.zeros(1)
    del state["fc.bias"]
    path = tmp_path / "a.pth"
    save_run(path, describe(model, LABELS) | {"state_dict": state})
    message = refused(lambda: load_model(path), path)
    for part in ("missing: fc.bias", "unexpected: extra", "conv1.weight (16, 1, 3, 3) for (16, 3, 3, 3)"):
        assert part in message


def test_weights_of_another_architecture(checkpoint: Path) -> None:
    message = refused(lambda: load_model(checkpoint, "sd_resnet32"), checkpoint)
    assert "missing: layer1.3.bn1.bias" in message


def test_weights_for_a_model_that_is_not_sdzoos(checkpoint: Path) -> None:
    assert '"resnet18" is not a model' in refused(lambda: load_model(checkpoint, "resnet18"), checkpoint)


def test_unknown_model_offers_the_nearest(checkpoint: Path) -> None:
    message = refused(lambda: load_model(checkpoint, "sd_resnet111"), checkpoint)
    assert re.search(r'"sd_resnet111" is not a model; nearest: sd_resnet11', message)


def test_unknown_tag(checkpoint: Path) -> None:
    assert "no_such_tag" in refused(lambda: load_model(checkpoint, "sd_resnet20.no_such_tag"), checkpoint)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_file_that_does_not_say_which_model_it_is(tmp_path: Path, model: nn.Module, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    torch.save(state, path) if suffix == "pth" else safetensors.torch.save_file(state, path)
    assert "does not say which model it is; name it with --arch" in refused(lambda: load_model(path), path)
    ten_classes = timm.create_model("sd_resnet20")
    state = {name: tensor.contiguous() for name, tensor in ten_classes.state_dict().items()}
    torch.save(state, path) if suffix == "pth" else safetensors.torch.save_file(state, path)
    assert torch.equal(logits(load_model(path, "sd_resnet20")), logits(ten_classes.eval()))


def test_weights_without_survival_probabilities_keep_their_function(tmp_path: Path) -> None:
    """Weights of a constant-depth net: p = 1. The model keeps its own p and rescales."""
    constant = make_model(num_classes=10, drop_path_rate=0.0)
    state = {name: tensor for name, tensor in constant.state_dict().items() if "survival_prob" not in name}
    torch.save(state, tmp_path / "a.pth")
    loaded = load_model(tmp_path / "a.pth", "sd_resnet20")
    assert sdzoo.survival_probs(loaded)[-1] == 0.5
    expected = logits(constant)
    allowed = 1e-4 * max(1.0, expected.abs().max().item())
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=allowed)


@pytest.mark.parametrize("p", [0.0, 1.5, float("nan"), -0.1])
def test_survival_probability_out_of_range(tmp_path: Path, model: nn.Module, p: float) -> None:
    path, state = tmp_path / "a.pth", dict(model.state_dict())
    state["layer2.0.gate.survival_prob"] = torch.tensor(p)
    save_run(path, describe(model, LABELS) | {"state_dict": state})
    message = refused(lambda: load_model(path), path)
    assert "layer2.0.gate.survival_prob" in message
    assert "must lie in (0, 1]" in message


@pytest.mark.parametrize(
    "content",
    [
        pytest.param([1, 2], id="list"),
        pytest.param(torch.ones(3), id="tensor"),
        pytest.param(5, id="number"),
        pytest.param({}, id="empty mapping"),
        pytest.param({"epoch": 3, "arch": "sd_resnet20"}, id="no tensors"),
        pytest.param({"state_dict": {}}, id="empty state dict"),
        pytest.param({"state_dict": 5}, id="state dict a number"),
        pytest.param({"state_dict": None}, id="state dict None"),
        pytest.param({"state_dict": torch.ones(3)}, id="state dict a tensor"),
        pytest.param({"state_dict": [torch.ones(3)]}, id="state dict a list"),
        pytest.param({"state_dict": {"a": 5}}, id="state dict of numbers"),
        pytest.param(
            {"state_dict": {1: torch.ones(1), "a": torch.ones(1)}, "arch": "sd_resnet20"}, id="keys no strings"
        ),
        pytest.param({"state_dict": {"a": torch.ones(1)}, "arch": 5}, id="arch a number"),
    ],
)
def test_pth_that_holds_something_else(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "a.pth"
    torch.save(content, path)
    refused(lambda: load_model(path), path)


@pytest.mark.parametrize("header", ["[]", "5", "null", "nope", '{"arch": 5}', "{", "[" * 5000])
def test_safetensors_with_a_nonsensical_description(tmp_path: Path, model: nn.Module, header: str) -> None:
    path = tmp_path / "a.safetensors"
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    safetensors.torch.save_file(state, path, metadata={"sdzoo": header})
    refused(lambda: load_model(path), path)


@pytest.mark.parametrize(
    "changed",
    [
        {"num_classes": 10**15},
        {"num_classes": "three"},
        {"num_classes": -1},
        {"in_chans": 10**15},
        {"in_chans": 4},
        {"input_size": 5},
        {"input_size": [3, 32]},
        {"mean": "grey"},
        {"mean": [0.5, 0.5]},
        {"labels": 5},
        {"labels": ["only one"]},
        {"mode": "quantum"},
        {"arch": "resnet18"},
    ],
    ids=json.dumps,
)
def test_description_that_does_not_fit_the_weights(tmp_path: Path, model: nn.Module, changed: dict[str, Any]) -> None:
    """A stranger's file decides neither how much memory is taken nor which error is shown."""
    path = tmp_path / "a.safetensors"
    save_weights(path, model, describe(model, LABELS) | changed)
    refused(lambda: load_model(path), path)


def test_failed_load_state_says_where_the_weights_came_from(model: nn.Module) -> None:
    with pytest.raises(InputError, match=r"^upload 3 does not fit SDResNetCifar: missing: bn1"):
        load_state(model, {"conv1.weight": torch.zeros(16, 3, 3, 3)}, "upload 3")


FUZZ = settings(max_examples=150, deadline=None, derandomize=True, database=None)
PLACE = st.floats(0, 0.9999)
DAMAGE = st.tuples(st.none() | PLACE, st.lists(st.tuples(PLACE, st.integers(0, 255)), max_size=5))


def reads_or_is_refused(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    message = ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, on pickle protocols
        try:
            state, description = read_checkpoint(path)
            assert all(isinstance(tensor, Tensor) for tensor in state.values())
            assert isinstance(description, dict)
        except InputError as error:
            message = str(error)
    assert "\n" not in message


@FUZZ
@given(content=st.binary(max_size=300), suffix=st.sampled_from(["pth", "safetensors"]))
def test_any_bytes_are_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes, suffix: str) -> None:
    reads_or_is_refused(tmp_path_factory.getbasetemp() / f"bytes.{suffix}", content)


@pytest.fixture(scope="module")
def small_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of valid checkpoints of a few hundred bytes, so that damage hits what is not weights."""
    folder = tmp_path_factory.mktemp("small")
    state = {"a.weight": torch.randn(4, 3), "a.step": torch.tensor(3)}
    torch.save({"state_dict": state, "arch": "x", "rows": [{"lr": 0.1}]}, folder / "new.pth")
    torch.save({"state_dict": state, "arch": "x"}, folder / "old.pth", _use_new_zipfile_serialization=False)
    safetensors.torch.save_file(state, folder / "a.safetensors", metadata={"sdzoo": '{"arch": "x"}'})
    return folder


@pytest.mark.parametrize("name", ["new.pth", "old.pth", "a.safetensors"])
@FUZZ
@given(damage=DAMAGE)
def test_damaged_checkpoint_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory,
    small_files: Path,
    name: str,
    damage: tuple[float | None, list[tuple[float, int]]],
) -> None:
    content = bytearray((small_files / name).read_bytes())
    cut, changes = damage
    for place, byte in changes:
        content[int(place * len(content))] = byte
    kept = content if cut is None else content[: int(cut * len(content))]
    reads_or_is_refused(tmp_path_factory.getbasetemp() / f"damaged-{name}", bytes(kept))


@contextmanager
def file_size_limit(limit: int) -> Iterator[None]:
    """Let the system refuse every write beyond ``limit`` bytes of a file: the nearest to a full disk without one."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_disk_that_refuses_the_bytes_keeps_the_old_file(tmp_path: Path, model: nn.Module, suffix: str) -> None:
    """As the command catches it: InputError or OSError, in one line. What torch raises by itself is a RuntimeError."""
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(b"old")
    with file_size_limit(200_000), pytest.raises(Exception) as caught:  # noqa: PT011, PT012
        if suffix == "pth":
            save_run(path, {"state_dict": model.state_dict()})
        else:
            save_weights(path, model, describe(model, LABELS))
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == [path.name]
    assert isinstance(caught.value, (InputError, OSError)), repr(caught.value)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_with_some_of_its_survival_probabilities_is_refused(tmp_path: Path, model: nn.Module) -> None:
    state = dict(model.state_dict())
    del state["layer2.1.gate.survival_prob"]
    path = tmp_path / "a.pth"
    save_run(path, describe(model, LABELS) | {"state_dict": state})
    assert "missing: layer2.1.gate.survival_prob" in refused(lambda: load_model(path), path)


@pytest.mark.parametrize("place", [0.2, 0.5, 0.9])
def test_a_flipped_byte_among_the_weights_is_refused(tmp_path: Path, model: nn.Module, place: float) -> None:
    path = tmp_path / "a.safetensors"
    save_weights(path, model, describe(model, LABELS))
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1
    path.write_bytes(content)
    assert "is damaged: sha256" in refused(lambda: load_model(path), path)


def test_a_flipped_byte_in_a_copy_of_the_bundled_weights_is_refused(tmp_path: Path) -> None:
    content = bytearray(weights.path("sd_resnet20.cifar10_jpeg").read_bytes())
    content[len(content) // 2] ^= 1
    path = tmp_path / "copy.safetensors"
    path.write_bytes(content)
    assert "is damaged: sha256" in refused(lambda: load_model(path), path)


def test_what_changes_the_function_but_no_key_comes_back(tmp_path: Path) -> None:
    """No tensor tells of a subsampling shortcut or of another activation: the description does."""
    saved = make_model(shortcut="subsample", act_layer="silu", global_pool="max")
    save_weights(tmp_path / "weights.safetensors", saved, describe(saved, LABELS))
    assert torch.equal(logits(saved), logits(load_model(tmp_path / "weights.safetensors")))


@pytest.mark.parametrize(
    "arguments",
    [{"pretrained": True}, {"checkpoint_path": "x.pth"}, {"widths": [10**9, 16, 16]}, {"shortcut": ["pool"]}, [1], "x"],
)
def test_a_strangers_model_kwargs_are_checked_before_anything_is_built(arguments: Any, tmp_path: Path) -> None:
    saved = make_model()
    save_weights(tmp_path / "weights.safetensors", saved, describe(saved, LABELS) | {"model_kwargs": arguments})
    message = refused(lambda: load_model(tmp_path / "weights.safetensors"), tmp_path / "weights.safetensors")
    assert "describes its model wrongly" in message
