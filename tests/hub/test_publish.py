"""Publishing over HTTP: what is on the Hub after it, and after whatever went wrong."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hub_server import READ, WRITE, HubServer, Repo, _Handler
from small_run import DATA
from torch import nn

import sdzoo
from sdzoo.calibration import calibrate_batchnorm
from sdzoo.cli import main
from sdzoo.errors import InputError, ParityError
from sdzoo.hub.layout import read_sums
from sdzoo.hub.publish import Published, publish
from sdzoo.hub.remote import HubError
from sdzoo.hub.upload import AGAIN
from sdzoo.training.checkpoint import describe, load_model, save_weights

REPO = "org/sd_resnet20.colours"
Publish = Callable[..., Published]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a small checkpoint, which is quick to publish. Read only."""
    model = timm.create_model("sd_resnet20", num_classes=3, drop_path_rate=0.4)
    calibrate_batchnorm(model, [torch.randn(8, 3, 32, 32)])
    file = tmp_path_factory.mktemp("checkpoint") / "net.safetensors"
    save_weights(file, model, describe(model.eval(), ()))
    return file


@pytest.fixture
def put(hub: HubServer, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Publish:
    """Return the publisher of ``checkpoint`` to ``REPO``, logged in."""
    monkeypatch.setenv("HF_TOKEN", WRITE)
    return lambda **options: publish(checkpoint, REPO, **{"license": "mit", "no_metrics": True} | options)


def commits(hub: HubServer) -> int:
    return sum(endpoint == "commit" for endpoint, _ in hub.asked)


def visible(hub: HubServer, repo: str = REPO) -> set[str]:
    """Return what the main branch shows, hidden files left out."""
    held = hub.repos[repo]
    return {name for name in held.commits[held.branches["main"]] if not name.startswith(".")}


def test_a_run_goes_there_and_comes_back(
    hub: HubServer, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", WRITE)
    assert main(["publish", str(run), "--repo", REPO, "--license", "apache-2.0", "--onnx", "--private"]) == 0
    held = hub.repos[REPO]
    oid = held.tags["v1.0"]
    assert held.private and held.branches["main"] == oid and commits(hub) == 1
    out = capsys.readouterr().out
    assert f"done: {REPO}, v1.0 is commit {oid}\nnext: sdzoo verify hub:{REPO}@v1.0\n" in out
    sums = read_sums(held.commits[oid]["SHA256SUMS"].decode())
    for name, digest in sums.items():
        assert re.search(rf"^ *[\d,]+ {digest[:12]}  {re.escape(name)}$", out, re.MULTILINE)
    assert visible(hub) == {*sums, "SHA256SUMS"}
    assert {"training_curve.png", "model.onnx", "recipe_resolved.yaml"} <= visible(hub)
    # timm's own way in another process, with nothing cached
    code = (
        "import sys, sdzoo, timm, torch\n"
        f"model = timm.create_model('hf-hub:{REPO}', pretrained=True).eval()\n"
        "torch.save(model(torch.load(sys.argv[1])), sys.argv[2])"
    )
    images = torch.randn(4, 3, 32, 32)
    torch.save(images, tmp_path / "images.pt")
    environment = hub.environment(tmp_path / "other_cache", WRITE) | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    subprocess.run(
        [sys.executable, "-c", code, tmp_path / "images.pt", tmp_path / "logits.pt"], env=environment, check=True
    )
    expected = load_model(run / "best.safetensors")(images)
    assert torch.equal(torch.load(tmp_path / "logits.pt"), expected)
    assert torch.equal(sdzoo.load_hub(f"{REPO}@v1.0")(images), expected)


def test_more_than_ten_megabytes_go_there_and_come_back(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", WRITE)
    model = timm.create_model("sd_wide_resnet16_4")
    calibrate_batchnorm(model, [torch.randn(2, 3, 32, 32)])
    save_weights(tmp_path / "wide.safetensors", model, describe(model.eval(), ()))
    done = publish(tmp_path / "wide.safetensors", "org/wide", license="mit", no_metrics=True)
    assert done.commit is not None and done.commit == hub.repos["org/wide"].tags["v1.0"]
    assert len(hub.repos["org/wide"].commits[done.commit]["model.safetensors"]) > 10e6
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(sdzoo.load_hub("org/wide")(images), model(images))


def test_again_changes_nothing(hub: HubServer, put: Publish) -> None:
    assert put() == put() == dataclasses.replace(put(pr=True), tag="v1.0")
    assert commits(hub) == 1 and len(hub.repos[REPO].commits) == 2, "the first one is the empty repository"
    said: list[str] = []
    del hub.repos[REPO].tags["v1.0"]
    assert put(progress=said.append).commit == hub.repos[REPO].tags["v1.0"]
    assert commits(hub) == 1 and f"main of {REPO} holds these files already" in said


def test_the_card_of_a_version_loads_this_version(hub: HubServer, put: Publish, checkpoint: Path) -> None:
    put()
    hub.repos[REPO].branches["next"] = hub.repos[REPO].branches["main"]
    done = put(revision="next", tag="v2.0")
    card = hub.repos[REPO].commits[done.commit or ""]["README.md"].decode()
    assert f'timm.create_model("hf-hub:{REPO}@v2.0"' in card and f'sdzoo.load_hub("{REPO}@v2.0")' in card
    images = torch.randn(2, 3, 32, 32)
    model = timm.create_model(f"hf-hub:{REPO}@v2.0", pretrained=True).eval()
    assert torch.equal(model(images), load_model(checkpoint)(images))


def test_an_existing_repository_is_filled_and_what_an_earlier_version_left_is_removed(
    hub: HubServer, put: Publish
) -> None:
    hub.add(REPO, {".gitattributes": b"", "model.onnx": b"old", "README.md": b"old"})
    said: list[str] = []
    put(progress=said.append)
    assert visible(hub) == {"model.safetensors", "config.json", "README.md", "eval_results.json", "SHA256SUMS"}
    assert f"committing 5 files to main of {REPO}, replacing README.md, removing model.onnx" in said


def test_a_dry_run_asks_nobody_and_writes_nothing(
    hub: HubServer, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["publish", str(checkpoint), "--no-metrics", "--license", "mit", "--dry-run"]
    assert main([*given, "--repo", REPO]) == 0
    out = capsys.readouterr().out
    assert f"to {REPO}, branch main, then the tag v1.0, public if it is new, license mit:" in out
    assert "model.safetensors" in out and f"next: sdzoo publish {checkpoint}" in out and "--dry-run" not in out
    assert main([*given, "--to", str(tmp_path / "zoo")]) == 0
    assert main([*given, "--to", str(tmp_path / "a" / "b")]) == 2
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").touch()
    assert main([*given, "--to", str(tmp_path / "thesis")]) == 2
    assert main([*given, "--to", str(tmp_path / "thesis" / "thesis.tex")]) == 2
    assert not hub.asked and not hub.repos and not (tmp_path / "zoo").exists()


def test_into_a_folder(hub: HubServer, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "zoo"
    assert main(["publish", str(checkpoint), "--no-metrics", "--license", "mit", "--to", str(out)]) == 0
    assert f"done: {out}\nnext: sdzoo verify local-dir:{out}" in capsys.readouterr().out and not hub.asked
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(sdzoo.load_hub(out)(images), load_model(checkpoint)(images))


def test_a_pull_request_leaves_main_and_has_its_tag_later(
    hub: HubServer, checkpoint: Path, put: Publish, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.add(REPO, {".gitattributes": b""})
    given = ["publish", str(checkpoint), "--no-metrics", "--license", "mit", "--repo", REPO]
    assert main([*given, "--pr"]) == 0
    assert "next, once it is merged: sdzoo publish" in (out := capsys.readouterr().out)
    assert "--pr" not in out.partition("next")[2] and "adds the tag v1.0" in out
    held = hub.repos[REPO]
    assert not held.tags and not visible(hub) and held.branches.keys() == {"main", "refs/pr/1"}
    assert put(pr=True) == Published(None, held.branches["refs/pr/1"], None, "refs/pr/1"), "none is opened twice"
    held.branches["main"] = held.branches["refs/pr/1"]  # merged
    assert put().tag == "v1.0" and held.tags["v1.0"] == held.branches["main"]
    assert commits(hub) == 1
    assert main([*given, "--pr"]) == 0
    assert f"done: main of {REPO}, commit {held.branches['main']}\nnext: sdzoo publish" in capsys.readouterr().out


def change(hub: HubServer) -> None:
    """Somebody else commits."""
    held = hub.repos[REPO]
    held.commit(held.commits[held.branches["main"]] | {"README.md": b"theirs"})


def test_a_commit_of_someone_else_in_between_is_not_overwritten(hub: HubServer, put: Publish) -> None:
    hub.interfere["commit"] = lambda: change(hub)
    with pytest.raises(HubError, match=r"changed by someone else meanwhile.*nothing was committed to .*same command"):
        put()
    assert visible(hub) == {"README.md"} and not hub.repos[REPO].tags
    assert put().tag == "v1.0"


def fails_at(endpoint: str, status: int = 500) -> Callable[[HubServer], None]:
    def set_up(hub: HubServer) -> None:
        hub.interfere[endpoint] = lambda: status

    return set_up


def cut(hub: HubServer) -> None:
    hub.cut_uploads = 1000


EMPTY = rf"whose main is empty \(if it is new and not wanted: http.*/{REPO}/settings\)"
BEFORE, AFTER = f"; {REPO} holds no such commit, {EMPTY}; run the same", "commit [0-9a-f]{40} is on main of"
BREAKS: dict[str, tuple[Callable[[HubServer], Any], str, bool]] = {
    "upload cut": (cut, BEFORE, False),
    "commit": (fails_at("commit"), f"answered 500.*{BEFORE}", False),
    "upload refused": (fails_at("batch", 403), f"; nothing was committed to {REPO}, {EMPTY}$", False),
    "tag": (fails_at("tag"), f"answered 500.*{AFTER} .*without the tag v1.0", True),
    "damaged on the way back": (lambda hub: setattr(hub, "flips", 99), f"what came back from .*model.*{AFTER}", True),
}


@pytest.mark.parametrize("what", BREAKS)
def test_after_a_failure_the_error_says_what_is_there_and_again_completes(
    what: str, hub: HubServer, put: Publish
) -> None:
    break_it, message, there = BREAKS[what]
    break_it(hub)
    with pytest.raises((HubError, ParityError, InputError), match=message) as caught:
        put()
    assert isinstance(caught.value, InputError) or str(caught.value).endswith(AGAIN)
    assert not hub.repos[REPO].tags and bool(visible(hub)) == there
    hub.cut_uploads, hub.flips = None, 0
    before = commits(hub)
    assert put().commit == hub.repos[REPO].tags["v1.0"]
    assert commits(hub) == before + (not there)


@pytest.mark.parametrize("pr", [False, True])
def test_a_commit_whose_answer_was_lost_is_found(
    pr: bool, hub: HubServer, put: Publish, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(REPO, {".gitattributes": b""})
    commit = _Handler._commit

    def lost(handler: _Handler, body: bytes, **given: str) -> None:
        commit(handler, body, **given)
        handler._hang_up()

    monkeypatch.setattr(_Handler, "_commit", lost)
    where = "refs/pr/1" if pr else "main"
    with pytest.raises(HubError, match=f"; commit [0-9a-f]{{40}} is on {where} of {REPO}, without the tag") as caught:
        put(pr=pr)
    assert "cache" not in str(caught.value)
    monkeypatch.undo()


def test_a_hub_that_cannot_be_asked_what_it_holds(hub: HubServer, put: Publish) -> None:
    def gone() -> int:
        hub.interfere["refs"] = lambda: 500
        return 500

    hub.interfere["commit"] = gone
    with pytest.raises(HubError, match=f"answered 500.*; {REPO} could not be asked whether it holds the commit; run"):
        put()


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "sdzoo: interrupted; "),
        (RuntimeError("size\nmismatch"), 1, f"what came back from {REPO} does not load: size mismatch; "),
    ],
)
def test_whatever_stops_it_says_what_is_there(
    error: BaseException, code: int, said: str, hub: HubServer, put: Publish, checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def stops(*given: object) -> None:
        raise error

    monkeypatch.setattr("sdzoo.hub.publish.check_loads", stops)
    assert main(["publish", str(checkpoint), "--repo", REPO, "--license", "mit", "--no-metrics"]) == code
    err = capsys.readouterr().err
    oid = hub.repos[REPO].branches["main"]
    assert said in err and f"commit {oid} is on main of {REPO}, without the tag v1.0; {AGAIN}" in err


def test_a_fault_of_the_program_keeps_its_cause(hub: HubServer, put: Publish, monkeypatch: pytest.MonkeyPatch) -> None:
    def stops(*given: object) -> None:
        raise KeyError("x")

    monkeypatch.setattr("sdzoo.hub.publish.check_loads", stops)
    with pytest.raises(RuntimeError, match=r"KeyError\('x'\); commit .* is on main") as caught:
        put()
    assert isinstance(caught.value.__cause__, KeyError)


def test_what_has_its_tag_is_said_to_have_it(hub: HubServer, put: Publish) -> None:
    oid = put().commit
    hub.flips = 99
    with pytest.raises(ParityError, match=f"commit {oid} is on main of {REPO}, with the tag v1.0; {AGAIN}"):
        put()
    change(hub)
    said = f"commit {oid} is not, or no longer, the last of main of {REPO}, with the tag v1.0; {AGAIN}"
    with pytest.raises(ParityError, match=said):
        put()

    def gone() -> int:
        hub.interfere["refs"] = lambda: 500
        return 500

    del hub.repos[REPO].tags["v1.0"]
    hub.flips, hub.interfere["tag"] = 0, gone
    hub.repos[REPO].branches["main"] = str(oid)
    with pytest.raises(HubError, match=f"commit {oid} was on main of {REPO}, which could not be asked whether it has"):
        put()


def test_a_tag_whose_answer_was_lost_is_said_to_be_there(
    hub: HubServer, put: Publish, monkeypatch: pytest.MonkeyPatch
) -> None:
    tag = _Handler._tag

    def lost(handler: _Handler, body: bytes, **given: str) -> None:
        tag(handler, body, **given)
        handler._hang_up()

    monkeypatch.setattr(_Handler, "_tag", lost)
    with pytest.raises(HubError, match=f"is on main of {REPO}, with the tag v1.0; {AGAIN}"):
        put()


def test_only_an_empty_repository_is_called_empty(hub: HubServer, put: Publish) -> None:
    hub.add(REPO, {".gitattributes": b"", "README.md": b"old"})
    fails_at("commit", 400)(hub)
    with pytest.raises(HubError, match=f"; nothing was committed to {REPO}; {AGAIN}$"):
        put()
    held = hub.add(REPO, {".gitattributes": b"", "README.md": b"old"})
    held.commit({".gitattributes": b""}, "next")
    fails_at("commit", 400)(hub)
    with pytest.raises(HubError, match=f"; nothing was committed to {REPO}; {AGAIN}$"):
        put(revision="next")


EVIL = "\x1b[2Jevil"


@pytest.mark.parametrize(
    ("endpoint", "lie", "said"),
    [
        ("refs", {"tags": [{"name": "v1.0", "ref": "refs/tags/v1.0", "targetCommit": EVIL}]}, "is no commit"),
        ("refs", {"branches": [{"name": "main", "ref": "refs/heads/main", "targetCommit": EVIL}]}, "is no commit"),
        ("refs", {"pullRequests": [{"name": "", "ref": EVIL, "targetCommit": "0" * 40}]}, "is no pull request"),
        ("refs", {"pullRequests": [{"name": "", "ref": "refs/pr/1", "targetCommit": EVIL}]}, "is no commit"),
        ("info", {"sha": EVIL}, "is no commit"),
        ("commit", {"commitOid": EVIL}, "is no commit"),
    ],
)
def test_what_a_hub_calls_a_commit_or_a_pull_request_is_one(
    endpoint: str, lie: dict[str, Any], said: str, hub: HubServer, put: Publish
) -> None:
    hub.lies[endpoint] = lambda answer: answer | lie
    with pytest.raises(HubError, match=rf'did not answer as a Hub does.*\\x1b\[2Jevil" {said}') as caught:
        put()
    assert str(caught.value).isprintable()


def test_what_a_hub_warns_of_cannot_move_the_cursor(hub: HubServer, put: Publish) -> None:
    hub.lies["validate"] = lambda answer: answer | {"warnings": [{"message": EVIL}]}
    with pytest.warns(UserWarning, match=r"README\.md: - \\x1b\[2Jevil$"):
        assert put().tag == "v1.0"


def test_a_file_that_the_hub_has_under_another_sha256_is_not_tagged(hub: HubServer, put: Publish) -> None:
    def lie(answer: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [entry | ({"lfs": entry["lfs"] | {"oid": "0" * 64}} if "lfs" in entry else {}) for entry in answer]

    hub.lies["tree"] = lie
    with pytest.raises(ParityError, match=r"does not hold what was sent: model\.safetensors; .* without the tag v1\.0"):
        put()
    assert not hub.repos[REPO].tags


def test_a_pull_request_without_an_address_is_none(hub: HubServer, put: Publish) -> None:
    hub.add(REPO, {".gitattributes": b""})
    hub.lies["commit"] = lambda answer: answer | {"pullRequestUrl": None}
    with pytest.raises(HubError, match=r'"None" is no pull request\); commit .* is on refs/pr/1 of'):
        put(pr=True)


def test_a_branch_is_not_forgotten_where_the_tag_is_there(hub: HubServer, put: Publish) -> None:
    said: list[str] = []
    oid = put().commit
    with pytest.raises(InputError, match="has no branch next; it has: main"):
        put(revision="next")
    change(hub)
    assert put(progress=said.append).commit == oid
    assert f"v1.0 (not the last commit of main, which is left as it is) of {REPO} holds these files already" in said


def test_no_repository_is_made_for_a_branch_that_it_cannot_have(hub: HubServer, put: Publish) -> None:
    with pytest.raises(InputError, match=f"{REPO} is not there, or not for you; a new one has no branch next"):
        put(revision="next")
    assert not hub.repos


def test_an_etag_is_no_path_on_the_way_back(hub: HubServer, put: Publish, tmp_path: Path) -> None:
    (victim := tmp_path / "victim").write_text("precious")
    hub.headers = {"ETag": f'"{victim}"', "X-Linked-Etag": f'"{victim}"', "X-Repo-Commit": "../../evil"}
    put()
    assert victim.read_text() == "precious"


def test_a_file_that_came_about_meanwhile_is_a_difference(
    hub: HubServer, put: Publish, monkeypatch: pytest.MonkeyPatch
) -> None:
    oid = put().commit
    held = hub.repos[REPO]
    held.commit(held.commits[str(oid)] | {"\x1b[2Jevil.pkl": b"pickle"})
    with pytest.raises(InputError, match=r"holds other files: \\x1b\[2Jevil\.pkl; what is published"):
        put(tag="v2.0")
    commit = Repo.commit
    monkeypatch.setattr(Repo, "commit", lambda self, files, branch="main": commit(self, files | {"evil.pkl": b""}))
    hub.add(REPO, {".gitattributes": b""})
    held.tags.clear()
    hub.repos[REPO].commits[hub.repos[REPO].branches["main"]] = {".gitattributes": b""}
    with pytest.raises(ParityError, match=r"does not hold what was sent: evil\.pkl; commit"):
        put()


@pytest.mark.parametrize("name", [None, "colours"])
def test_the_plan_says_what_the_card_calls_the_data(name: str | None, run: Path) -> None:
    said: list[str] = []
    publish(run, "org/net", license="mit", dry_run=True, data_name=name, progress=said.append)
    note = f'the card calls the data set "{DATA}", after its folder; to call it otherwise: --data NAME'
    assert (note in said) == (name is None)


def test_a_folder_whose_name_no_card_can_have(run: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--to 'a\\nb': the card cannot be called so"):
        publish(run, None, license="mit", to=tmp_path / "a\nb")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("a")]


def test_the_tag_is_on_the_commit_that_was_checked(hub: HubServer, put: Publish) -> None:
    hub.interfere["tag"] = lambda: change(hub)  # the branch goes on before the tag
    done = put()
    held = hub.repos[REPO]
    assert held.tags["v1.0"] == done.commit != held.branches["main"]


def test_what_the_hub_holds_is_compared(hub: HubServer, put: Publish, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = Repo.commit

    def otherwise(repo: Repo, files: dict[str, bytes], branch: str = "main") -> str:
        return commit(repo, files | ({"config.json": b"{}"} if "config.json" in files else {}), branch)

    monkeypatch.setattr(Repo, "commit", otherwise)
    with pytest.raises(ParityError, match=r"does not hold what was sent: config\.json; commit .* without the tag"):
        put()
    assert not hub.repos[REPO].tags


def test_what_comes_back_is_computed_with(hub: HubServer, put: Publish, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(folder: Path, model: nn.Module) -> None:
        assert (folder / "config.json").is_file()
        raise ParityError("logits differ")

    monkeypatch.setattr("sdzoo.hub.publish.check_loads", fails)
    with pytest.raises(ParityError, match=r"logits differ; commit .* without the tag"):
        put()
    assert not hub.repos[REPO].tags


def test_a_tag_is_never_moved(hub: HubServer, put: Publish) -> None:
    held = hub.add(REPO, {".gitattributes": b""})
    held.tags["v1.0"] = held.branches["main"]
    with pytest.raises(
        InputError, match=r"has the tag v1.0 already, on commit .* never moved; name another with --tag"
    ):
        put()
    assert commits(hub) == 0 and not visible(hub)
    assert put(tag="v2.0").tag == "v2.0"

    def taken() -> None:
        held.tags["v3.0"] = next(iter(held.commits))

    hub.interfere["tag"] = taken  # between the look and the tag
    with pytest.raises(InputError, match=r"has the tag v3.0 already.*without the tag v3.0"):
        put(tag="v3.0")


def test_a_tag_that_came_about_meanwhile_on_the_same_commit_is_fine(hub: HubServer, put: Publish) -> None:
    def tagged() -> None:
        hub.repos[REPO].tags["v1.0"] = hub.repos[REPO].branches["main"]

    hub.interfere["tag"] = tagged
    assert put().tag == "v1.0"


@pytest.mark.parametrize(
    ("token", "message"), [(None, "log in with: hf auth login"), (READ, "your token may not do that")]
)
def test_without_the_right_token(
    token: str | None, message: str, hub: HubServer, put: Publish, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(REPO, {".gitattributes": b""})
    monkeypatch.setenv("HF_TOKEN", token) if token else monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(InputError, match=message):
        put()
    assert not visible(hub) and not hub.repos[REPO].tags


def test_a_hub_that_is_away(hub: HubServer, put: Publish) -> None:
    hub.close()
    with pytest.raises(HubError, match="cannot be reached"):
        put()


def test_a_repository_of_other_things_is_left_alone(hub: HubServer, put: Publish) -> None:
    hub.add(REPO, {".gitattributes": b"", "pytorch_model.bin": b"pickle", "src/train.py": b""})
    with pytest.raises(InputError, match=r"holds other files: pytorch_model.bin, src/train.py; what is published"):
        put()
    assert visible(hub) == {"pytorch_model.bin", "src/train.py"}
    hub.add(REPO, {".gitattributes": b"", ".x/model.pkl": b"pickle", "../../evil": b""})
    with pytest.raises(InputError, match=r"holds other files: \.\./\.\./evil, \.x/model\.pkl; what"):
        put()


def test_a_public_repository_does_not_become_private(hub: HubServer, put: Publish) -> None:
    hub.add(REPO, {".gitattributes": b""})
    with pytest.raises(InputError, match="is there already and public"):
        put(private=True)
    put()
    with pytest.raises(InputError, match="is there already and public"):
        put(private=True, tag="v2.0")
    hub.add(REPO, {".gitattributes": b""})
    with pytest.raises(InputError, match="has no branch next; it has: main"):
        put(revision="next")
    hub.repos[REPO].branches["next"] = hub.repos[REPO].branches["main"]
    assert put(revision="next").commit == hub.repos[REPO].branches["next"]
    assert not visible(hub)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(
            ({"repo": bad}, "is no repository; it is ORG/NAME")
            for bad in ("net", "a/b/c", "a/..", "a/b--c", "a/-b", "")
        ),
        ({"repo": "a/b.git"}, "is no repository"),
        ({"repo": "a/" + "b" * 95}, "at most 96"),
        ({"repo": None}, "name one place to publish to"),
        ({"to": "zoo"}, "name one place to publish to"),
        ({"license": "My Own"}, 'license is "My Own"; name it as the Hub does: apache-2.0'),
        ({"tag": "v 1"}, 'tag "v 1" is not a name'),
        ({"tag": "a" * 40}, "is not a name"),
        ({"tag": "refs/heads/x"}, "is not a name"),
        ({"revision": "../x"}, 'revision "../x" is not a name'),
        ({"tag": "main"}, 'tag "main" is the name of a branch'),
        ({"tag": "next", "revision": "next"}, 'tag "next" is the name of a branch'),
        ({"pr": True, "revision": "next"}, "a pull request goes to main"),
        *(
            ({"repo": None, "to": "zoo"} | {name: value}, "are for a repository, --repo, not for a folder, --to")
            for name, value in {"pr": True, "private": True, "tag": "v9", "revision": "next"}.items()
        ),
        ({"no_metrics": False}, "is a checkpoint without its run"),
    ],
)
def test_what_is_asked_is_checked_first(
    options: dict[str, Any], message: str, hub: HubServer, put: Publish, checkpoint: Path
) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        publish(checkpoint, **{"repo": REPO, "license": "mit", "no_metrics": True} | options)
    assert not hub.asked


def test_the_licence_is_asked_for(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["publish", str(checkpoint), "--repo", REPO])
    assert "--license" in capsys.readouterr().err


@pytest.mark.skipif(
    not (os.environ.get("SDZOO_HUB_TEST_REPO") and os.environ.get("HF_TOKEN")),
    reason="not run: publishes to the real Hub; name a repository in SDZOO_HUB_TEST_REPO, with HF_TOKEN",
)
def test_the_real_hub(checkpoint: Path) -> None:
    repo = os.environ["SDZOO_HUB_TEST_REPO"]
    done = publish(checkpoint, repo, license="mit", no_metrics=True, private=True, tag="test")
    assert publish(checkpoint, repo, license="mit", no_metrics=True, tag="test") == done
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(sdzoo.load_hub(f"{repo}@test")(images), load_model(checkpoint)(images))
