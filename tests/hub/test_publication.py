"""The folder that is published: what lies in it, what it computes, and what it does not say."""

from __future__ import annotations

import dataclasses
import getpass
import hashlib
import json
import re
import shutil
import socket
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from small_run import DATA, edit_recipe, edit_result
from timm.optim import list_optimizers
from torch import nn

import sdzoo
from sdzoo.digest import state_sha256
from sdzoo.errors import InputError, ParityError
from sdzoo.hub import measured, publication
from sdzoo.hub.layout import CARD, read_sums
from sdzoo.hub.load import verify_hub
from sdzoo.hub.private import check_private, private_names_in, private_texts, public_recipe, public_text
from sdzoo.hub.publication import Details, Subject, open_subject, write_folder
from sdzoo.hub.publish import publish
from sdzoo.registry import models
from sdzoo.schedule import SCHEDULES
from sdzoo.training.checkpoint import describe, load_model, save_weights
from sdzoo.training.data.names import DATASETS
from sdzoo.training.recipe import Recipe, SdzooSettings
from sdzoo.training.recipe_file import load_recipe
from sdzoo.training.recipe_yaml import load_yaml

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
    assert read_sums((published / "SHA256SUMS").read_text()).keys() == {file.name for file in published.iterdir()} - {
        "SHA256SUMS"
    }
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


PROBS = [1 - 0.4 * block / 9 for block in range(1, 10)]
CONV = 16 * 16 * 9 * 32 * 32  # multiply-accumulates of each 3x3 convolution, but of the first in stages 2 and 3: half
BRANCHES = [CONV * (1.5 if block in (3, 6) else 2) for block in range(9)]
ENDS = 3 * 16 * 9 * 32 * 32 + 64 * 3


def test_every_entry_and_every_row_is_the_runs_or_the_models(write: Write, run: Path) -> None:
    seconds = {"data": 1000.0, "step": 2000.0, "log": 4000.0, "validation": 8000.0}
    edit_result(run, seconds=seconds, corrupt_training_images=["a.png"])
    out = write()
    result = json.loads((run / "result.json").read_text())
    state = safetensors.torch.load_file(run / "best.safetensors")
    val, test = result["val_top1_percent"], result["test_top1_percent"]
    said = json.loads((out / "eval_results.json").read_text())
    assert said.pop("survival_probs") == pytest.approx(PROBS)
    macs = said.pop("macs")
    assert macs["evaluation"] == ENDS + sum(BRANCHES)
    assert macs["training"] == pytest.approx(ENDS + sum(p * cost for p, cost in zip(PROBS, BRANCHES, strict=True)))
    assert said == {
        "model": "sd_resnet20",
        "parameters": 269_722 - 7 * 65,
        "state_sha256": state_sha256(state),
        "data": DATA,
        "training_images": 36,
        "corrupt_images": 1,
        "epochs": 2,
        "training_s": 15_000.0,
        "environment": result["environment"],
        "forced_in_epochs": [],
        "figures": {
            "best_epoch": result["best_epoch"],
            "val": {"split": "val", "percent": val, "images": 12},
            "test": {"split": "test", "percent": test, "images": 9},
            "runs": 1,
        },
    }
    (ran,) = result["environment"]
    table = re.findall(r"^\| ([^|]+) \| (.+) \|$", (out / CARD).read_text(), re.MULTILINE)
    assert dict(table) == {
        "data": f"{DATA}: 36 training images, 1 of them corrupt and substituted",
        "recipe": "`recipe.yaml`, every value in `recipe_resolved.yaml`",
        "epochs": "2",
        "training time": "4.2 hours",
        "hardware": f"{ran['machine']}; processes: 1, threads of each: 1",
        "software": f"sdzoo {sdzoo.__version__}, torch {torch.__version__}, timm {timm.__version__}",
        "weights": f"of epoch {result['best_epoch']}, chosen on val",
        "top-1 on val": f"{val:.2f} % of 12 images (`val`)",
        "top-1 on test": f"**{test:.2f} %** of 9 images (`test`), measured after training",
        "runs": "1",
        "parameters": "269,267",
        "multiply-accumulates": f"{macs['evaluation'] / 1e6:.0f} M an image; in training, on average over the gates, "
        f"{macs['training'] / 1e6:.0f} M",
        "survival probabilities": "linear decay, p_1 = 0.9556 to p_L = 0.6, 9 blocks; they are in the file",
        "sha256 of `model.safetensors`": f"`{hashlib.sha256((out / 'model.safetensors').read_bytes()).hexdigest()}`",
        "published by": f"sdzoo {sdzoo.__version__}",
    }


def test_what_was_said_of_other_weights_is_not_said_of_these(tmp_path: Path) -> None:
    model = timm.create_model("sd_resnet20").eval()
    others = dict.fromkeys(("origin_url", "paper_ids", "paper_name", "notes", "description", "tag"), "theirs")
    model.pretrained_cfg = {**model.pretrained_cfg, **others}  # type: ignore[dict-item]
    write_folder(Subject(tmp_path, model, None), tmp_path / "out", DETAILS)
    assert "theirs" not in (tmp_path / "out" / "config.json").read_text()


def test_the_home_of_the_user_is_searched_for(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/srv/sam")
    with pytest.raises(InputError, match=r"README\.md would hold /srv/sam, which"):
        write(Details("t", "mit", data_name="those of /srv/sam"))


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
    proof = f"({parity['inputs']}, {parity['runtime']})"
    assert parity["runtime"].startswith("onnxruntime") and proof in (published / "README.md").read_text()
    assert rf"\|difference\| {parity['max_abs_diff']:.2g}" in (published / "README.md").read_text()


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
        *[
            ({"initial_checkpoint": path}, {"initial_checkpoint": "ring.pth"})
            for path in (
                *("/home/frodo/ring.pth", "~/ring.pth", "C:\\frodo\\ring.pth", "../../acme/ring.pth", "./ring.pth"),
                *("runs/../acme/ring.pth", "runs/ring.pth", "-/home/frodo/ring.pth", "*/home/frodo/ring.pth"),
                *(")/home/frodo/ring.pth", "a./home/frodo/ring.pth", "{a,b}/home/ring.pth", "torch/frodo/ring.pth"),
            )
        ],
        *[
            ({"initial_checkpoint": secret}, {"initial_checkpoint": "<private>"})
            for secret in (
                *("file:///mnt/acme/ring.pth", "pipe:cat /mnt/acme/ring.pth", "pipe:../acme/ring.tar"),
                *(" pipe:ssh frodo@gandalf cat ring.tar", "a.tar::pipe:curl acme", "tars/a.tar::pipe:curl acme"),
                *("wds/https://acme/ring.tar", "ssh frodo@gandalf", "ssh gandalf cat ring", "ssh gandalf cat /x/ring"),
                *(
                    "https://frodo:pw@acme/a/ring.pth?key=1",
                    "https://frodo:pw@acme",
                    "https://acme/ring.pth;token=SECRET",
                ),
                *("s3:acme/ring.pth", "wds/s3://KEY:SECRET@acme/ring.pth", "frodo@gandalf:ring.pth"),
                *("gandalf:data/ring.pth", "gandalf:8080", "gandalf.acme.com", "10.0.0.1", "[::1]@gandalf/ring.pth"),
                *("data/ring.pth?token=SECRET", "data/ring.pth&x=1", "hub:org/net@v1.0", "~frodo", "..", "/", "a=b"),
                *(
                    "hf_abcdefghijklmnopqrstuvwxyzABCDEFGH",
                    "AKIAIOSFODNN7EXAMPLE",
                    "ghp_16C7e42F292c6912E7710c838347Ae178B4a",
                ),
                *("--token hf_abc", "/mnt/AKIAIOSFODNN7EXAMPLE", "train-hf_abcdefghijklmnopqrstuvwxyzABCDEFGH"),
                *("3f2504e0-4f89-41d3-9a0c-0305e82c3301", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"),
                *("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.dozjgNryP4J3jVmN", "ring.pth\n", "a" * 8 + "-a" * 60),
            )
        ],
        *[
            ({"train_split": plain}, {"train_split": plain})
            for plain in (
                *(
                    "train[:90%]",
                    "train[10:20]",
                    "train_00..10:1200",
                    "ring-{000..004}.tar",
                    "ring-{000..004}.tar|1200",
                ),
                *("validation", "val-v1.5", "cifar10jpeg", "train+val", "W\u00f6rter_2"),
            )
        ],
        *[
            ({name: plain}, {name: plain})
            for name, plain in {
                "initial_checkpoint": "resnet50_a1_0-14fe96d1.pth",
                "aa": "rand-m9-mstd0.5-inc1",
                "dataset": "torch/cifar10",
                "model": "sd_resnet20.cifar10_jpeg",
                "opt_kwargs": {"betas": (0.9, 0.95), "foreach": True, "decay": None, 3: 1e-4},
                "model_kwargs": {"schedule": "stagewise"},
            }.items()
        ],
        ({"train_split": "/mnt/acme/train/"}, {"train_split": "train"}),
        ({"sdzoo": SdzooSettings(test_split="/mnt/acme/test")}, {"sdzoo": SdzooSettings(test_split="test")}),
        ({"model_kwargs": {"a": ["/x/y", "z", 3]}}, {"model_kwargs": {"a": ["y", "z", 3]}}),
        ({"model_kwargs": {"/x/y": ("/x/z", 3)}}, {"model_kwargs": {"y": ("z", 3)}}),
        ({"model_kwargs": {("/x/y", 1): date(2026, 1, 2)}}, {"model_kwargs": {("y", 1): "2026-01-02"}}),
        ({"opt_kwargs": {"ssh gandalf": b"frodo"}}, {"opt_kwargs": {"<private>": "<private>"}}),
        ({"data_dir": None, "dataset": "wds/ring"}, {"dataset": "wds/ring"}),
    ],
)
def test_a_recipe_leaves_with_what_is_known_to_be_harmless(
    given: dict[str, Any], published_as: dict[str, Any], finished_run: Path
) -> None:
    recipe = dataclasses.replace(load_recipe(finished_run / "recipe.yaml"), data_dir=None)
    found = public_recipe(dataclasses.replace(recipe, **given))
    assert found == dataclasses.replace(recipe, **{"data_dir": None, **published_as})
    changed = given != published_as and "data_dir" not in given
    assert {key.split(".")[0] for _, key in private_texts(dataclasses.replace(recipe, **given))} == (
        set(given) if changed else set()
    )


def test_every_key_is_named_whose_text_was_cut(finished_run: Path) -> None:
    recipe = load_recipe(finished_run / "recipe.yaml")
    cut = dataclasses.replace(recipe, data_dir="my train", train_split="my train", val_split="my train")
    assert {key for _, key in private_texts(cut)} == {"data_dir", "train_split", "val_split"}


@pytest.mark.parametrize("file", sorted(Path(sdzoo.__file__).parents[1].glob("recipes/*.yaml")), ids=lambda f: f.name)
def test_of_the_recipes_here_nothing_is_cut(file: Path) -> None:
    values = load_yaml(file.read_text())
    recipe = Recipe(**values | {"data_dir": None, "sdzoo": SdzooSettings(**values.get("sdzoo", {}))})
    assert public_recipe(recipe) == recipe and not private_texts(recipe)


def test_the_names_of_models_optimizers_and_schedules_are_kept() -> None:
    names = [*models(), *models(pretrained=True), *list_optimizers(), *SCHEDULES, *DATASETS[:-1]]
    assert [name for name in names if public_text(name) != name] == []


def test_what_would_still_name_this_machine_is_not_written(
    write: Write, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "sd_resnet20")  # the only host that a run's record would name
    with pytest.raises(InputError, match=r"not published: README\.md would hold sd_resnet20"):
        write()
    monkeypatch.setattr(socket, "gethostname", lambda: "green")  # is a class
    with pytest.raises(InputError, match=r"not published: config\.json would hold green"):
        write()
    monkeypatch.setattr(socket, "gethostname", lambda: f"{DATA}.example")
    with pytest.raises(InputError, match=f'data set\'s name "{DATA}" holds that of host or user: call it with --data'):
        write()
    assert write(Details("t", "mit", data_name="colours")).is_dir()
    shutil.rmtree(tmp_path / "out")
    monkeypatch.undo()
    with pytest.raises(InputError, match=r"not published: README.md would hold /"):
        write(Details("t", "mit", data_name=str(run)))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("data", ["frodo-photos", "frodo_photos", "photos-of-Frodo", "gandalf"])
def test_host_and_user_are_found_in_a_name(data: str, run: Path, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "Gandalf.example")
    monkeypatch.setattr(getpass, "getuser", lambda: "frodo")
    edit_result(run, data=data)
    with pytest.raises(InputError, match="holds that of host or user"):
        write()


@pytest.mark.parametrize("changes", [{"dataset": "wds/my ring"}, {"dataset": "", "data": "my ring"}])
def test_a_data_set_whose_name_is_not_published_is_to_be_named(
    changes: dict[str, str], run: Path, write: Write
) -> None:
    edit_recipe(run, dataset=changes["dataset"])
    edit_result(run, data=changes.get("data", changes["dataset"]))
    with pytest.raises(InputError, match="calls its data set is not published as it is: call it with --data"):
        write()
    out = write(Details("t", "mit", data_name="Ring"))
    assert "trained from scratch on Ring" in (out / CARD).read_text()
    assert not [file.name for file in out.iterdir() if b"my ring" in file.read_bytes()]


def test_a_word_that_is_not_a_name_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "localhost")
    for user, text in (("frodo", "frodos frodo1"), ("bob", "bob, a bob-cat"), ("root", "the root of it")):
        monkeypatch.setattr(getpass, "getuser", lambda user=user: user)
        assert not private_names_in(text)
        assert private_names_in(f"/home/{user}") == private_names_in(f"{user}/x") == [user]


@pytest.mark.parametrize("name", ["daniel", "weinberger", "deep", "vision", "torch", "python", "timm", "block"])
def test_who_is_called_by_a_word_of_every_card_can_publish(
    name: str, run: Path, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Daniel Sedra is cited in each. In a path it is found all the same."""
    monkeypatch.setattr(getpass, "getuser", lambda: name)
    monkeypatch.setattr(socket, "gethostname", lambda: name)
    write()
    for said in (f"/home/{name}/{name}_best", f"{name}-val"):  # of a path the last part is published
        edit_recipe(run, train_split=said)
        with pytest.raises(InputError, match=f"not published: .* would hold .*{name}"):
            write()


@pytest.mark.parametrize("changes", [{"dataset": "wds/frodo"}, {"opt_kwargs": {"frodo": 1}}], ids=["shards", "a key"])
def test_what_is_called_as_the_user_is(
    changes: dict[str, Any], run: Path, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(getpass, "getuser", lambda: "frodo")
    edit_recipe(run, **changes)
    with pytest.raises(InputError, match=r"not published: .* would hold .*frodo"):
        write()


def test_a_publisher_may_be_called_as_on_the_hub(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(getpass, "getuser", lambda: "frodo")
    write(Details("net", "mit", "hf-hub:frodo/net@v1.0"))


SECRET = "/mnt/acme-secret/"


@pytest.mark.parametrize(
    "changes",
    [
        {"initial_checkpoint": f"{SECRET}ring.safetensors"},
        {"val_split": f"{SECRET}val"},
        {"sdzoo": {"test_split": f"{SECRET}test"}},
        {"initial_checkpoint": "../../acme-secret/ring.safetensors"},
        {"initial_checkpoint": "https://frodo:acme-secret@acme-secret/ring.safetensors"},
    ],
)
def test_no_path_of_the_recipe_is_in_any_file(changes: dict[str, Any], write: Write, run: Path) -> None:
    if "sdzoo" in changes:
        changes = {"sdzoo": load_yaml((run / "recipe.yaml").read_text())["sdzoo"] | changes["sdzoo"]}
    edit_recipe(run, **changes)
    out = write()
    assert not [file.name for file in out.iterdir() if b"acme-secret" in file.read_bytes()]
    source = r"&#60;private&#62;" if "://" in str(changes) else "ring.safetensors"
    assert "initial_checkpoint" not in changes or f"fine-tuned from {source} on" in (out / CARD).read_text()


@pytest.mark.parametrize(
    ("left", "found"),
    [
        ("pipe:curl -s https://acme/y.tar -H 'X-Key: SECRET'", "https://acme/y.tar"),
        ("https://acme-secret/ring.pth", "https://acme-secret/ring.pth"),
        ("frodo@gandalf:ring.pth", "frodo@gandalf:ring.pth"),
    ],
)
def test_what_an_address_left_is_searched_for(left: str, found: str, run: Path, write: Write, monkeypatch: Any) -> None:
    edit_recipe(run, initial_checkpoint=left)
    monkeypatch.setattr(measured, "public_recipe", lambda recipe: recipe)
    with pytest.raises(InputError, match=rf"not published: README\.md would hold .*{re.escape(found)}"):
        write()


@pytest.mark.parametrize(
    "secret", ["pipe:x", "s3://me:pw@acme", "?token=1", ";api_key=1", "hf_" + "a" * 34, "AKIAIOSFODNN7EXAMPLE"]
)
def test_what_looks_like_a_secret_is_not_published(secret: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(f"a: {secret}")
    with pytest.raises(InputError, match=r"recipe\.yaml would hold"):
        check_private(tmp_path, ())


@pytest.mark.parametrize("name", ["Asian_small_clawed_otter", "asiaticelephantisbig1", "hf_resnetlonglonglong", "sk-8"])
def test_what_begins_like_a_secret_is_none(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"label_names": [name]}))
    check_private(tmp_path, ())


def test_what_was_cut_of_harmless_words_alone_may_stand_elsewhere(run: Path, write: Write) -> None:
    edit_recipe(run, train_split="training images")  # as the card says of each
    write()


def test_of_what_was_cut_each_word_is_searched_for(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("a: acme/y.tar of a carrier")
    check_private(tmp_path, ("curl of a carrier",))
    with pytest.raises(InputError, match=r"recipe\.yaml would hold acme/y\.tar"):
        check_private(tmp_path, ("pipe:curl 'acme/y.tar'",))


def test_a_card_is_searched_as_it_is_read(tmp_path: Path) -> None:
    """``|`` and ``*`` are written there as ``&#124;`` and ``&#42;``."""
    (tmp_path / CARD).write_text("a&#124;key=1 of ring&#42;")
    check_private(tmp_path, ())
    with pytest.raises(InputError, match=r"README\.md would hold ring\*"):
        check_private(tmp_path, ("ring*",))
    (tmp_path / CARD).write_text("a&#38;key=1")
    with pytest.raises(InputError, match=r"README\.md would hold &key="):
        check_private(tmp_path, ())


def test_a_place_is_searched_for_in_files_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"\xff/srv/acme/ring\0")
    check_private(tmp_path, ("/srv/other/ring", "/acme"))
    with pytest.raises(InputError, match=r"model\.onnx would hold /srv/acme/ring"):
        check_private(tmp_path, ("/srv/acme/ring",))


def test_what_was_cut_from_the_recipe_is_searched_for(write: Write, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edit_recipe(run, val_split=f"{SECRET}val")
    monkeypatch.setattr(measured, "public_recipe", lambda recipe: recipe)
    with pytest.raises(InputError, match=f"not published: README.md would hold {SECRET}val"):
        write()


def test_what_is_cut_is_said(run: Path) -> None:
    edit_recipe(run, val_split="a:b", opt_kwargs={"key of mine": 1}, initial_checkpoint="ring.pth")
    said: list[str] = []
    publish(run, "org/net", license="mit", dry_run=True, progress=said.append)
    assert "cut from the recipe, being a path or nothing that is known to be public: opt_kwargs, val_split" in said


def test_a_data_set_that_has_a_name_keeps_it(write: Write, run: Path) -> None:
    for name in ("a\nmodel-index: []", "\x1b[2J", "x" * 101):
        with pytest.raises(InputError, match="is not one printable line of at most 100"):
            write(Details("t", "mit", data_name=name))
    edit_recipe(run, dataset="torch/cifar10")
    edit_result(run, data="torch/cifar10")
    with pytest.raises(InputError, match="which knows its data as torch/cifar10"):
        write(Details("t", "mit", data_name="ImageNet-1k"))
    best = shutil.copyfile(run / "best.safetensors", run.parent / "net.safetensors")
    with pytest.raises(InputError, match="not for a checkpoint"):
        write(Details("t", "mit", data_name="x"), source=best, no_metrics=True)


def test_a_run_that_goes_on_meanwhile_is_not_published(
    write: Write, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def later(path: Path) -> nn.Module:
        model = load_model(path)
        model.get_parameter("fc.bias").data[1] += 1
        save_weights(path, model, describe(model, ("blue", "green", "red")))
        return load_model(path)

    subject = open_subject(run)
    edit_result(run, seconds={"step": 1.0})
    with pytest.raises(InputError, match="changed while it was read; run again"):
        write_folder(subject, tmp_path / "out", DETAILS)
    monkeypatch.setattr(publication, "load_model", later)
    with pytest.raises(InputError, match=r"best\.safetensors has changed"):
        write()
    assert not (tmp_path / "out").exists()


def test_what_was_published_is_no_run(published: Path) -> None:
    with pytest.raises(InputError, match="is what was published, not a run: name the run's folder"):
        open_subject(published)


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
