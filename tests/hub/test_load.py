from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from hub_server import READ, WRITE, HubServer, Repo
from huggingface_hub import constants
from nets import random_images
from timm.models import save_for_hf
from torch import nn

from sdzoo import weights
from sdzoo.cli import main
from sdzoo.digest import file_sha256
from sdzoo.errors import InputError
from sdzoo.hub import load
from sdzoo.hub.layout import CONFIG, MODEL, SUMS, Damaged, write_sums
from sdzoo.hub.load import load_hub, open_hub, verify_hub
from sdzoo.hub.remote import HubError
from sdzoo.weights import published as registry
from sdzoo.zoo import open_model

REPO, BUNDLED = "org/sd_resnet20.cifar10", "sd_resnet20.cifar10_jpeg"


@pytest.fixture(scope="module")
def reference() -> nn.Module:
    return timm.create_model(BUNDLED, pretrained=True).eval()


@pytest.fixture
def repo(hub: HubServer, published: Path) -> Repo:
    made = hub.add(REPO, published)
    made.tags["v1.0"] = made.branches["main"]
    made.commit({"README.md": b"emptied"})
    return made


@pytest.fixture
def sha256(published: Path) -> str:
    return hashlib.sha256((published / MODEL).read_bytes()).hexdigest()


def same(a: nn.Module, b: nn.Module) -> bool:
    return torch.equal(a(random_images()), b(random_images()))


def gets(hub: HubServer) -> int:
    """Return how often the weights were sent, in whole or in part."""
    return len(hub.ranges)


def cached_weights(cache: Path) -> list[Path]:
    return [path for path in cache.rglob("snapshots/*/*") if path.stat().st_size > 1_000_000]


def test_the_weights_come_back_to_the_bit(
    hub: HubServer, repo: Repo, reference: nn.Module, sha256: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = load_hub(f"{REPO}@v1.0")
    assert not model.training and same(model, reference)
    assert model.pretrained_cfg["label_names"] == reference.pretrained_cfg["label_names"]  # type: ignore[index]
    at = f"{REPO}@{repo.tags['v1.0']}"
    said = f'unpinned (damage on the way only): {at}; to pin it: load_hub("{at}", sha256="{sha256}")\n'
    assert capsys.readouterr().out == said
    assert same(open_model(f"hub:{REPO}@v1.0"), reference)
    assert gets(hub) == 1, "the second came from the cache"


@pytest.mark.parametrize(
    ("by_commit", "with_sha256", "level"),
    [
        (True, True, "pinned: {}, sha256 {} as you gave it"),
        (True, False, "unpinned (damage on the way only): {}; "),
        (False, True, "unpinned (its weights are those that you gave the sha256 of): {}; "),
    ],
)
def test_the_level_is_said(
    by_commit: bool, with_sha256: bool, level: str, hub: HubServer, repo: Repo, sha256: str
) -> None:
    said: list[str] = []
    at = f"{REPO}@{repo.tags['v1.0']}"
    load_hub(at if by_commit else f"{REPO}@v1.0", sha256.upper() if with_sha256 else None, say=said.append)
    assert len(said) == 1 and said[0].startswith(level.format(at, sha256))


def test_what_sdzoo_knows_is_pinned_without_asking(
    hub: HubServer, repo: Repo, sha256: str, reference: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = registry.Published(REPO, repo.tags["v1.0"], sha256)
    monkeypatch.setattr(registry, "PUBLISHED", (known,))
    model, origin = open_hub(REPO)  # main has gone on since
    assert origin.pinned and same(model, reference)
    said = f"pinned: {REPO}@{known.commit}, sha256 {sha256} as sdzoo knows it; it is of the weights, not of licence"
    assert str(open_hub(f"{REPO}@v1.0")[1]) == f"{said} and card"
    monkeypatch.setattr(registry, "PUBLISHED", (registry.Published(REPO, known.commit, "0" * 64),))
    with pytest.raises(InputError, match=f"says its SHA256SUMS; it should have {'0' * 64}"):
        open_hub(REPO)
    made = timm.create_model("sd_resnet20", pretrained=True, pretrained_cfg_overlay={"file": None, **known.cfg()})
    assert same(made.eval(), reference), "timm's own way, by the line for default_cfgs"


def test_timms_own_way_loads_the_same(hub: HubServer, repo: Repo, reference: nn.Module) -> None:
    assert same(timm.create_model(f"hf-hub:{REPO}@v1.0", pretrained=True).eval(), reference)


@pytest.mark.parametrize("name", ["{}", "local-dir:{}"])
def test_a_folder(name: str, folder: Path, reference: nn.Module) -> None:
    model, origin = open_hub(name.format(folder))
    assert same(model, reference) and not origin.pinned
    assert open_hub(folder, origin.sha256)[1].pinned
    (folder / MODEL).write_bytes((folder / MODEL).read_bytes()[:-1] + b"\xff")
    with pytest.raises(InputError, match=r"model\.safetensors of .* has sha256 [0-9a-f]{64}; it should have"):
        open_hub(folder)


def test_a_folder_that_is_called_as_a_repository_is_meant(
    hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "org").mkdir()
    folder.rename(tmp_path / REPO)
    monkeypatch.chdir(tmp_path)
    assert open_hub(REPO)[1].source == REPO and not hub.asked
    shutil.copytree(tmp_path / REPO, tmp_path / f"hub:{REPO}")
    hub.add(REPO, {"README.md": b"other"})
    with pytest.raises(InputError, match=r"org/sd_resnet20.cifar10@[0-9a-f]{40} holds no config\.json"):
        verify_hub(f"hub:{REPO}")
    del hub.repos[REPO]
    with pytest.raises(InputError, match="no such repository"):
        open_hub(f"{REPO}@main")


OTHERWISE: dict[str, Callable[[dict[str, Any], dict[str, Any]], object]] = {
    "labels": lambda cfg, args: cfg.update(label_names=cfg["label_names"][::-1]),
    "no labels": lambda cfg, args: cfg.pop("label_names"),
    "crop_pct": lambda cfg, args: cfg.update(crop_pct=0.5),
    "interpolation": lambda cfg, args: cfg.update(interpolation="nearest"),
    "mean": lambda cfg, args: cfg.update(mean=[0.5] * 3),
    "std": lambda cfg, args: cfg.pop("std"),
    "input_size": lambda cfg, args: cfg.update(input_size=[3, 40, 40]),
    "mode": lambda cfg, args: args.update(mode="sample"),
    "no mode": lambda cfg, args: args.pop("mode"),
    "model_kwargs": lambda cfg, args: args.update(shortcut="subsample"),
}


@pytest.mark.parametrize("what", OTHERWISE)
def test_the_weights_vouch_for_the_configuration(what: str, folder: Path) -> None:
    sha256 = file_sha256(folder / MODEL)
    assert open_hub(folder, sha256)[1].pinned
    config = json.loads((folder / CONFIG).read_text())
    OTHERWISE[what](config["pretrained_cfg"], config["model_args"])
    (folder / CONFIG).write_text(json.dumps(config))
    write_sums(folder)
    with pytest.raises(InputError, match=f"says {what.removeprefix('no ')} is .*; config.json says"):
        open_hub(folder, sha256)


def test_weights_that_say_nothing_cannot_be_pinned(folder: Path, reference: nn.Module) -> None:
    safetensors.torch.save_file(reference.state_dict(), folder / MODEL)
    write_sums(folder)
    model, origin = open_hub(folder, file_sha256(folder / MODEL))
    assert same(model, reference) and not origin.pinned
    assert str(origin).startswith("unpinned (its weights do not say what config.json does")


@pytest.mark.parametrize(
    ("name", "tensor"), [("fc.bias", [1] * 300_000), ("fc.bias", [10**4000]), ("x" * 10_000, [1]), ("fc.bias", [-1])]
)
def test_a_hostile_header_makes_no_long_line(name: str, tensor: list[int], folder: Path) -> None:
    header = json.dumps({name: {"dtype": "F32", "shape": tensor, "data_offsets": [0, 4]}}).encode()
    (folder / MODEL).write_bytes(struct.pack("<Q", len(header)) + header + b"1234")
    write_sums(folder)
    with pytest.raises(InputError) as caught:
        open_hub(folder)
    assert len(str(caught.value)) < 1000


def test_verify_fetches_again_what_differed_and_not_without_end(
    hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "other.onnx").write_bytes(b"o" * 1000)
    write_sums(folder)
    hub.add(REPO, folder)
    hub.flips = 1
    verify_hub(REPO)
    assert gets(hub) == 3, "two files, and one of them again"
    monkeypatch.setattr(load, "MAX_FILE_BYTES", 1000)
    with pytest.raises(InputError, match="bytes; at most 3,000"):
        verify_hub(REPO)


def test_verify_asks_the_hub_and_not_the_cache(hub: HubServer, repo: Repo) -> None:
    assert "cache" not in verify_hub(f"{REPO}@v1.0")
    held = repo.commits[repo.tags["v1.0"]]
    held[MODEL] = held[MODEL][:-1] + b"\xff"
    with pytest.raises(Damaged, match=f"changed: {MODEL}"):
        verify_hub(f"{REPO}@v1.0")


def test_a_byte_flipped_on_the_way_is_fetched_again(hub: HubServer, repo: Repo, reference: nn.Module) -> None:
    hub.flips = 1
    assert same(open_hub(f"{REPO}@v1.0")[0], reference)
    assert gets(hub) == 2
    assert same(open_hub(f"{REPO}@v1.0")[0], reference)
    assert gets(hub) == 2, "what is in the cache is whole now"


@pytest.mark.parametrize("name", ["config.json", SUMS])
def test_a_small_file_damaged_in_the_cache_is_fetched_again(
    name: str, hub: HubServer, repo: Repo, cache: Path, reference: nn.Module
) -> None:
    open_hub(f"{REPO}@v1.0")
    path = next(cache.rglob(f"snapshots/*/{name}")).resolve()
    content = path.read_bytes()
    path.write_bytes(content.replace(b"a", b"b", 1))
    assert same(open_hub(f"{REPO}@v1.0")[0], reference)
    assert path.read_bytes() == content


def test_what_is_damaged_every_time_is_refused(hub: HubServer, repo: Repo, cache: Path) -> None:
    """And does not stay where timm, which does not check, would find it."""
    hub.flips = 2
    with pytest.raises(InputError, match=r"has sha256 [0-9a-f]{64}; it should have"):
        open_hub(f"{REPO}@v1.0")
    assert gets(hub) == 2, "once more, not for ever"
    assert not list(cache.rglob(MODEL))


def test_an_update_that_breaks_off_leaves_what_was_there_for_when_the_hub_is_away(
    hub: HubServer, repo: Repo, published: Path, reference: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo.branches["main"] = repo.tags["v1.0"]
    open_hub(REPO)
    repo.commit({file.name: file.read_bytes() for file in published.iterdir()} | {"README.md": b"new"})
    answers = iter([None])

    def only_the_first() -> int | None:  # config.json comes, and nothing after it
        hub.interfere["resolve"] = only_the_first
        return next(answers, 500)

    hub.interfere["resolve"] = only_the_first
    with pytest.raises(HubError):
        open_hub(REPO)
    hub.interfere.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    model, origin = open_hub(REPO)
    assert same(model, reference) and repo.tags["v1.0"] in str(origin)


def test_a_cache_in_which_no_branch_can_be_noted_serves_all_the_same(
    hub: HubServer, repo: Repo, cache: Path, reference: nn.Module
) -> None:
    repo.branches["main"] = repo.tags["v1.0"]
    open_hub(f"{REPO}@{repo.tags['v1.0']}")
    (next(cache.glob("models--*")) / "refs").write_text("not a folder")
    assert same(open_hub(REPO)[0], reference)


def test_a_wrong_sha256_is_refused_before_the_weights_are_fetched(hub: HubServer, repo: Repo, cache: Path) -> None:
    with pytest.raises(InputError, match=f"it should have {'0' * 64}"):
        open_hub(f"{REPO}@v1.0", "0" * 64)
    assert gets(hub) == 0
    for digits in ("abc", "", "0" * 65):
        with pytest.raises(InputError, match=f'sha256 is "{digits}"; 64 hexadecimal digits'):
            open_hub(f"{REPO}@v1.0", digits)
    open_hub(f"{REPO}@v1.0")
    with pytest.raises(InputError):
        open_hub(f"{REPO}@v1.0", "0" * 64)
    assert len(cached_weights(cache)) == 1, "what was good is still there"


def test_a_download_that_breaks_off_goes_on(hub: HubServer, tmp_path: Path) -> None:
    large = timm.create_model("sd_resnet20", num_classes=50_000).eval()
    (tmp_path / "large").mkdir()
    save_for_hf(large, str(tmp_path / "large"), safe_serialization=True)
    write_sums(tmp_path / "large")
    hub.add(REPO, tmp_path / "large")
    hub.cut_download = 12_000_000
    model, _ = open_hub(REPO)
    assert hub.ranges == [None, f"bytes={constants.DOWNLOAD_CHUNK_SIZE}-"]
    pairs = zip(model.state_dict().values(), large.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("revision", ["", "@v1.0", "@COMMIT"])
@pytest.mark.parametrize("away", ["offline", "dead", "failing"])
def test_from_the_cache_when_the_hub_is_away(
    away: str, revision: str, hub: HubServer, repo: Repo, reference: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo.branches["main"] = repo.tags["v1.0"]
    name = REPO + revision.replace("COMMIT", repo.tags["v1.0"])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        HubError, match=r"is not in the cache; .* needs no Hub: sd_resnet20.cifar10_jpeg, in "
    ) as caught:
        open_hub(name)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert "\n" not in str(caught.value) and str(weights.FOLDER) in str(caught.value)
    open_hub(name)
    if away == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    elif away == "failing":
        hub.interfere["info"] = lambda: 503
    else:
        hub.close()
    asked = len(hub.asked)
    model, origin = open_hub(name)
    assert same(model, reference) and origin.source == f"{REPO}@{repo.tags['v1.0']}"
    assert origin.knew_commit == (revision == "@COMMIT")
    assert origin.cached and f"{origin.source}, from the cache as the Hub did not answer" in str(origin)
    said = "" if away == "failing" else ", from the cache as the Hub did not answer"  # it fails once
    assert verify_hub(name).startswith(f"{origin.source}{said}: ")
    assert away == "failing" or len(hub.asked) == asked


def test_damage_in_the_cache_while_the_hub_is_away_is_refused(hub: HubServer, repo: Repo, cache: Path) -> None:
    open_hub(f"{REPO}@v1.0")
    (path,) = cached_weights(cache)
    damaged = path.read_bytes()[:-1] + b"\xff"
    path.write_bytes(damaged)
    hub.close()
    with pytest.raises(InputError, match="it should have"):
        open_hub(f"{REPO}@v1.0")
    assert path.read_bytes() == damaged, "nothing better was there to put in its place"


def test_what_is_too_large_in_the_cache_is_not_read(hub: HubServer, repo: Repo, cache: Path) -> None:
    open_hub(f"{REPO}@v1.0")
    next(cache.rglob(SUMS)).write_bytes(b"a" * 40_000)
    hub.close()
    with pytest.raises(InputError, match=r"SHA256SUMS of .* has 40,000 bytes; at most 32,768"):
        open_hub(f"{REPO}@v1.0")


def test_a_dead_hub_and_an_empty_cache(hub: HubServer, repo: Repo) -> None:
    hub.close()
    with pytest.raises(HubError, match=f"{hub.url} cannot be reached .*; {REPO}@v1.0 is not in the cache"):
        open_hub(f"{REPO}@v1.0")


def test_a_branch_that_goes_on_while_it_is_read(hub: HubServer, repo: Repo) -> None:
    files = repo.commits[repo.tags["v1.0"]]
    repo.commit(files)

    read = repo.branches["main"]

    def goes_on() -> None:
        repo.commit({"config.json": b"{}"})

    hub.interfere["resolve"] = goes_on
    assert open_hub(f"{REPO}@main")[1].source == f"{REPO}@{read}" != f"{REPO}@{repo.branches['main']}"


def test_the_cache_is_timms_too(hub: HubServer, repo: Repo, reference: nn.Module) -> None:
    open_hub(f"{REPO}@v1.0")
    hub.close()
    assert same(timm.create_model(f"hf-hub:{REPO}@v1.0", pretrained=True).eval(), reference)


def test_what_timm_has_cached_is_taken(hub: HubServer, repo: Repo, reference: nn.Module) -> None:
    timm.create_model(f"hf-hub:{REPO}@v1.0", pretrained=True)
    assert same(open_hub(f"{REPO}@v1.0")[0], reference) and gets(hub) == 1


def test_what_killed_processes_left_is_removed_once_it_is_old(hub: HubServer, repo: Repo, cache: Path) -> None:
    folder = cache / f"models--{REPO.replace('/', '--')}"
    for name, age in {"old": 90_000, "new": 80_000}.items():
        (scratch := folder / f"incomplete-{name}").mkdir(parents=True)
        (scratch / "file").write_bytes(b"part")
        for path, then in ((scratch / "file", time.time() - age), (scratch, time.time() - 90_000)):
            os.utime(path, (then, then))
    (folder / "incomplete-empty").mkdir()
    open_hub(f"{REPO}@v1.0")
    assert {file.name for file in folder.glob("incomplete-*")} == {"incomplete-new", "incomplete-empty"}


def test_a_cache_that_cannot_be_written(hub: HubServer, repo: Repo, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"^the cache .*/file/hub \(HF_HOME\) cannot be written: Not a directory$"):
        open_hub(REPO + "@v1.0", cache_dir=tmp_path / "file" / "hub")


def test_info_says_what_a_published_model_is(hub: HubServer, repo: Repo, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", f"hub:{REPO}@v1.0"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"parameters +269,722\n(.*\n)*survival +p_1 = .* in the weights\n", out), out
    assert "unpinned (" in out and "as they are there" in out


def test_private_and_gated(hub: HubServer, published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("org/private", published, private=True)
    hub.add("org/gated", published, allowed={WRITE})
    with pytest.raises(InputError, match=r"org/private: .* log in with: hf auth login, or set HF_TOKEN"):
        open_hub("org/private")
    monkeypatch.setenv("HF_TOKEN", READ)
    open_hub("org/private")
    with pytest.raises(InputError, match=f"org/gated@?.* is gated: ask for access at {hub.url}/org/gated"):
        open_hub("org/gated")
    monkeypatch.setenv("HF_TOKEN", WRITE)
    open_hub("org/gated")


@pytest.mark.parametrize(
    "name",
    [
        "",
        "net",
        "a/b/c",
        "../net",
        "org/..",
        "org/net@",
        "org/net@../x",
        "org/net@a/../x",
        "org/net@a@b",
        "/etc",
        "org/n\0t",
        "hub:net",
        "-/a",
        "a" * 5000,
        "org/" + "a" * 5000,
        "hub:/etc",
    ],
)
def test_bad_names_are_refused_before_the_network(name: str, hub: HubServer) -> None:
    with pytest.raises(
        InputError, match=r"is neither a folder nor the name of a rep|is not the name of a rep|holds no"
    ):
        open_hub(name)
    assert hub.asked == []


def test_verify_compares_every_file(hub: HubServer, repo: Repo, capsys: pytest.CaptureFixture[str]) -> None:
    files = repo.commits[repo.tags["v1.0"]]
    repo.commit({**files, ".gitattributes": b"made by the Hub"})
    hub.flips = 1
    assert main(["verify", f"hub:{REPO}"]) == 0
    assert capsys.readouterr().out == f"passed: {REPO}@{repo.branches['main']}: 2 files are what SHA256SUMS says\n"
    repo.commit({**files, "config.json": files["config.json"] + b"\n", "evil.pth": b"."})
    assert main(["verify", f"hub:{REPO}"]) == 2
    said = capsys.readouterr().err
    assert "is not what its SHA256SUMS says: changed: config.json; not in SHA256SUMS: evil.pth" in said
    assert main(["verify", f"hub:{REPO}@v1.0"]) == 0
    assert main(["verify", "sd_resnet20"]) == 2
    assert "name what to compare sd_resnet20 with" in capsys.readouterr().err


def test_commands_take_it_for_a_model(
    hub: HubServer, repo: Repo, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", BUNDLED, f"hub:{REPO}@v1.0"]) == 0
    assert main(["verify", BUNDLED, f"folded:local-dir:{folder}"]) == 0
    for name in (f"local-dir:{folder}", f"hub:{REPO}@v1.0"):
        assert main(["bench", name, "--samples", "2", "--targets", "eager", "--batch", "1", "--threads", "1"]) == 0
    assert main(["export", f"hub:{REPO}@v1.0", "--arch", "sd_resnet20", "-o", "x.onnx"]) == 2
    assert "is for a checkpoint" in capsys.readouterr().err
    shutil.rmtree(folder)
    assert main(["verify", f"local-dir:{folder}"]) == 2
    assert "is not a folder" in capsys.readouterr().err
