"""The folder that is published: what lies in it, what it computes, and what it does not say."""

from __future__ import annotations

import dataclasses
import getpass
import json
import re
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from small_run import DATA, edit_result
from torch import nn

import sdzoo
from sdzoo.errors import InputError, ParityError
from sdzoo.hub import publication
from sdzoo.hub.layout import check_sums
from sdzoo.hub.load import verify_hub
from sdzoo.hub.private import public_recipe
from sdzoo.hub.publication import Details, open_subject, write_folder
from sdzoo.training.checkpoint import describe, load_model, save_weights
from sdzoo.training.recipe_file import load_recipe

DETAILS = Details("sd_resnet20.colours", "mit", "hf-hub:org/sd_resnet20.colours")
FILES = {
    *("model.safetensors", "config.json", "README.md", "eval_results.json"),
    *("recipe.yaml", "recipe_resolved.yaml", "training_curve.png", "SHA256SUMS"),
}
Write = Callable[..., Path]


@pytest.fixture(scope="module")
def published(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the run, with ONNX. Read only."""
    out = tmp_path_factory.mktemp("published") / "sd_resnet20.colours"
    write_folder(open_subject(finished_run), out, Details("sd_resnet20.colours", "mit", onnx=True))
    return out


@pytest.fixture
def write(run: Path, tmp_path: Path) -> Write:
    """Return the writer of ``run`` into a folder of the test's own."""

    def written(details: Details = DETAILS, source: Path = run, **options: Any) -> Path:
        write_folder(open_subject(source, **options), tmp_path / "out", details)
        return tmp_path / "out"

    return written


def logits(model: nn.Module) -> torch.Tensor:
    images = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        return model.eval()(images)


def test_it_holds_the_layout_and_its_sums(published: Path) -> None:
    assert {file.name for file in published.iterdir()} == FILES | {"model.onnx", "labels.json", "parity.json"}
    assert check_sums(published).keys() == {file.name for file in published.iterdir()} - {"SHA256SUMS"}
    verify_hub(published)


@pytest.mark.parametrize("load", [lambda at: timm.create_model(f"local-dir:{at}", pretrained=True), sdzoo.load_hub])
def test_both_ways_of_loading_compute_what_was_trained(
    load: Callable[[Path], nn.Module], published: Path, finished_run: Path
) -> None:
    model = load(published)
    assert torch.equal(logits(model), logits(load_model(finished_run / "best.safetensors")))
    assert sdzoo.survival_probs(model)[-1] == pytest.approx(0.6)
    assert list(model.pretrained_cfg["label_names"]) == ["blue", "green", "red"]  # type: ignore[index]
    assert model.pretrained_cfg["license"] == "mit"  # type: ignore[index]


def test_the_code_on_the_card_runs(published: Path) -> None:
    code = re.findall(r"```python\n(.*?)```", (published / "README.md").read_text(), re.DOTALL)[0]
    assert len(code.strip().splitlines()) <= 6
    names: dict[str, Any] = {}
    exec(code.replace("FOLDER", str(published)), names)
    assert names["transform"].transforms and names["model"].num_classes == 3


def test_the_figures_are_for_programs_too(published: Path, finished_run: Path) -> None:
    said = json.loads((published / "eval_results.json").read_text())
    result = json.loads((finished_run / "result.json").read_text())
    assert said["figures"]["val"]["percent"] == result["val_top1_percent"]
    assert said["figures"]["test"] == {"split": "test", "percent": result["test_top1_percent"], "images": 9}
    assert (said["figures"]["best_epoch"], said["figures"]["runs"]) == (result["best_epoch"], 1)
    assert said["data"] == DATA and said["model"] == "sd_resnet20"
    # 269,722 for ten classes: the head has 64 weights and a bias for each
    assert said["parameters"] == 269_722 - 7 * 65


def test_the_recipe_is_what_was_given_and_in_full(published: Path, finished_run: Path) -> None:
    recipe = public_recipe(load_recipe(finished_run / "recipe.yaml"))
    assert load_recipe(published / "recipe.yaml") == load_recipe(published / "recipe_resolved.yaml") == recipe
    given = (published / "recipe.yaml").read_text()
    assert "drop_path: 0.4" in given and "test_split: test" in given and "momentum" not in given
    assert "momentum: 0.9" in (published / "recipe_resolved.yaml").read_text()


def test_onnx_computes_the_same_and_says_how_close(published: Path, finished_run: Path) -> None:
    model = load_model(finished_run / "best.safetensors")
    images = np.random.default_rng(0).standard_normal((3, 3, 32, 32)).astype(np.float32)
    expected = model(torch.from_numpy(images)).detach().numpy()
    np.testing.assert_allclose(sdzoo.load_predictor(published / "model.onnx")(images), expected, atol=1e-3, rtol=1e-3)
    assert json.loads((published / "labels.json").read_text()) == ["blue", "green", "red"]
    parity = json.loads((published / "parity.json").read_text())
    assert parity["max_abs_diff"] <= parity["allowed"]
    assert rf"max \|difference\| {parity['max_abs_diff']:.2g}" in (published / "README.md").read_text()


def test_nothing_of_this_machine_is_in_it(
    write: Write, run: Path, finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert str(finished_run.parent) in (run / "recipe.yaml").read_text(), "else this test says nothing"
    monkeypatch.setattr(socket, "gethostname", lambda: "gandalf.example")
    monkeypatch.setattr(getpass, "getuser", lambda: "frodo")
    out = write()
    for file in out.iterdir():
        for private in (finished_run.parent, run.parent, Path.home(), "gandalf", "frodo"):
            assert str(private).encode() not in file.read_bytes() or str(private) == "/", (file.name, private)


@pytest.mark.parametrize(
    ("given", "published_as"),
    [
        ({"data_dir": "data"}, {"data_dir": None}),
        ({"initial_checkpoint": "/home/frodo/ring.safetensors"}, {"initial_checkpoint": "ring.safetensors"}),
        ({"initial_checkpoint": "~/ring.safetensors"}, {"initial_checkpoint": "ring.safetensors"}),
        ({"initial_checkpoint": "C:\\frodo\\ring.pth"}, {"initial_checkpoint": "ring.pth"}),
        ({"model_kwargs": {"a": ["/x/y", "z", 3]}}, {"model_kwargs": {"a": ["y", "z", 3]}}),
        ({"initial_checkpoint": "runs/ring.pth"}, {"initial_checkpoint": "runs/ring.pth"}),
        ({"data_dir": None, "dataset": "wds/ring"}, {"dataset": "wds/ring"}),
    ],
)
def test_paths_leave_a_recipe(given: dict[str, Any], published_as: dict[str, Any], finished_run: Path) -> None:
    recipe = load_recipe(finished_run / "recipe.yaml")
    found = public_recipe(dataclasses.replace(recipe, **given))
    assert found == dataclasses.replace(recipe, **{"data_dir": None, **published_as})


def test_what_would_still_name_this_machine_is_not_written(
    write: Write, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "sd_resnet20")  # the only host that a run's record would name
    with pytest.raises(InputError, match=r"not published: eval_results\.json would hold sd_resnet20"):
        write()
    monkeypatch.setattr(socket, "gethostname", lambda: DATA)
    with pytest.raises(InputError, match=f'folder "{DATA}" is named like host or user: call it with --data'):
        write()
    assert write(Details("t", "mit", data_name="colours")).is_dir()
    shutil.rmtree(tmp_path / "out")
    monkeypatch.undo()
    with pytest.raises(InputError, match=r"not published: README.md would hold /"):
        write(Details("t", "mit", data_name=str(run)))
    assert not (tmp_path / "out").exists()


def test_the_same_run_gives_the_same_bytes_whatever_its_folder_is_called(
    write: Write, run: Path, tmp_path: Path
) -> None:
    first = {file.name: file.read_bytes() for file in write().iterdir()}
    out = write(source=run.rename(tmp_path / "secret"))
    assert {file.name: file.read_bytes() for file in out.iterdir()} == first, "it is replaced by its like"


def test_a_folder_of_other_things_is_left_alone(write: Write, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    with pytest.raises(InputError, match="holds other things"):
        write()
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["thesis.tex"]


def test_what_does_not_load_as_it_was_is_not_there(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def otherwise(path: Path, model: nn.Module, description: dict[str, Any]) -> None:
        other = load_model(tmp_path / "run" / "best.safetensors")
        other.get_parameter("fc.bias").data[1] += 1e-6
        save_weights(path, other, description)

    monkeypatch.setattr(publication, "save_weights", otherwise)
    with pytest.raises(ParityError, match="does not compute what was published: logits on 17 images differ by"):
        write()
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_finite_are_refused(write: Write, tmp_path: Path) -> None:
    model = timm.create_model("sd_resnet20").eval()
    model.get_parameter("fc.bias").data[1] = float("nan")
    save_weights(tmp_path / "nan.safetensors", model, describe(model, ()))
    with pytest.raises(ParityError, match="not finite"):
        write(source=tmp_path / "nan.safetensors", no_metrics=True)


def test_a_checkpoint_has_no_figures(write: Write, run: Path, tmp_path: Path) -> None:
    alone = Path((run / "best.safetensors").rename(tmp_path / "alone.safetensors"))
    with pytest.raises(InputError, match=r"is a checkpoint without its run.*--no-metrics"):
        write(source=alone)
    out = write(source=alone, no_metrics=True)
    assert {file.name for file in out.iterdir()} == {"model.safetensors", "config.json", "README.md"} | {
        "eval_results.json",
        "SHA256SUMS",
    }
    assert json.loads((out / "eval_results.json").read_text())["figures"] is None
    assert "published without figures" in (out / "README.md").read_text()
    sdzoo.load_hub(out)


def test_what_the_architecture_was_created_with_comes_along(write: Write, tmp_path: Path) -> None:
    model = timm.create_model("sd_resnet20", shortcut="subsample", num_classes=3, in_chans=1)
    save_weights(tmp_path / "net.safetensors", model, describe(model, ("a", "b", "c")))
    out = write(source=tmp_path / "net.safetensors", no_metrics=True)
    images = torch.randn(3, 1, 32, 32)
    for loaded in (timm.create_model(f"local-dir:{out}", pretrained=True), sdzoo.load_hub(out)):
        assert torch.equal(loaded.eval()(images), model.eval()(images))


def test_a_pickle_goes_in_and_none_comes_out(write: Write, tmp_path: Path) -> None:
    model = timm.create_model("sd_resnet20", drop_path_rate=0.3)
    torch.save(model.state_dict(), tmp_path / "net.pth")
    out = write(source=tmp_path / "net.pth", no_metrics=True, arch="sd_resnet20")
    assert sorted(file.suffix for file in out.iterdir()) == ["", ".json", ".json", ".md", ".safetensors"]
    assert torch.equal(logits(sdzoo.load_hub(out)), logits(model))


def test_best_means_its_run_and_metrics_may_be_left_out(write: Write, run: Path) -> None:
    assert open_subject(run / "best.safetensors").measured is not None
    with pytest.raises(InputError, match="--arch sd_resnet20 is for a checkpoint"):
        open_subject(run, arch="sd_resnet20")
    edit_result(run, val_top1_percent=None)
    out = write(no_metrics=True)
    assert {file.name for file in out.iterdir()} == FILES - {"training_curve.png"}
    assert json.loads((out / "eval_results.json").read_text())["figures"] is None
