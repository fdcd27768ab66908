"""The server of these tests, by huggingface_hub's client: a repository made, filled, tagged, read back."""

from __future__ import annotations

from pathlib import Path

import pytest
from hub_server import READ, WRITE, HubServer
from huggingface_hub import CommitOperationAdd, HfApi, constants
from huggingface_hub.errors import HfHubHTTPError

REPO = "org/net"


def commit(api: HfApi, content: bytes, **kwargs: object) -> str:
    names = ("README.md", "model.safetensors")
    operations = [CommitOperationAdd(name, content) for name in names]
    return api.create_commit(REPO, operations, commit_message="all", **kwargs).oid  # type: ignore[arg-type]


def test_a_repository_goes_there_and_comes_back(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100)  # only whole chunks are kept when a download breaks off
    api = HfApi(endpoint=hub.url, token=WRITE)
    api.create_repo(REPO, private=True)
    api.create_repo(REPO, exist_ok=True)
    first = api.model_info(REPO).sha
    oid = commit(api, b"0123456789" * 100, parent_commit=first)
    api.create_tag(REPO, tag="v1.0", revision=oid)
    assert [(tag.name, tag.target_commit) for tag in api.list_repo_refs(REPO).tags] == [("v1.0", oid)]
    hub.cut_download = 300
    path = api.hf_hub_download(REPO, "model.safetensors", revision="v1.0")
    assert Path(path).read_bytes() == b"0123456789" * 100
    assert hub.ranges == [None, "bytes=300-"]
    assert commit(api, b"0123456789" * 100) == oid, "nothing changed: no commit"
    with pytest.raises(HfHubHTTPError) as caught:
        commit(api, b"other", parent_commit=first)
    assert caught.value.response.status_code == 412
    with pytest.raises(HfHubHTTPError, match="write token"):
        commit(HfApi(endpoint=hub.url, token=READ), b"other")


def test_an_upload_that_breaks_off_leaves_nothing(hub: HubServer) -> None:
    api = HfApi(endpoint=hub.url, token=WRITE)
    api.create_repo(REPO)
    hub.cut_uploads = 100
    with pytest.raises(RuntimeError):
        commit(api, b"x" * 500_000)
    assert [file.path for file in api.list_repo_tree(REPO)] == [".gitattributes"]
    hub.cut_uploads = None
    commit(api, b"x" * 500_000)
    request = api.create_commit(REPO, [CommitOperationAdd("a", b"1")], commit_message="a", create_pr=True)
    assert request.pr_revision == "refs/pr/1"
    assert "a" not in hub.repos[REPO].commits[hub.repos[REPO].branches["main"]]
