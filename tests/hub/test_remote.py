from __future__ import annotations

import contextlib
import errno
import io
import logging
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hub_server import READ, WRITE, HubServer, Refused, _Handler
from huggingface_hub import CommitOperationAdd, HfApi, constants
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import _http

from sdzoo.errors import InputError
from sdzoo.hub import remote
from sdzoo.hub.remote import HubError, client, is_private, one_line

REPO = "org/net"
DEAD = "http://127.0.0.1:9"  # the port that discards; nothing listens


@pytest.mark.parametrize(
    ("endpoint", "private"),
    [
        ("https://huggingface.co", True),
        ("http://127.0.0.1:8000", True),
        ("http://127.9.9.9", True),
        ("http://localhost:1", True),
        ("http://[::1]:80", True),
        ("http://huggingface.co", False),
        ("http://10.0.0.1", False),
        ("http://127.0.0.1.example.org", False),
        ("http://localhost.example.org", False),
    ],
)
def test_a_token_goes_only_to_https_or_this_machine(
    endpoint: str, private: bool, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert is_private(endpoint) == private
    monkeypatch.setenv("HF_TOKEN", WRITE)
    assert client(endpoint).token == (WRITE if private else False)
    if private:
        assert client(f"{endpoint}/", token=READ).token == READ
        assert client(f"{endpoint}/").endpoint == endpoint
    else:
        with pytest.raises(InputError, match="a token goes only to https or to this machine"):
            client(endpoint, token=READ)


@pytest.mark.parametrize("endpoint", ["huggingface.co", "ftp://a", "https://", "http://[", "https://me:pw@a"])
def test_what_is_no_address_is_refused(endpoint: str) -> None:
    shown = endpoint.replace("me:pw", "...").rstrip("/")
    with pytest.raises(InputError, match=re.escape(f'"{shown}" is not the address of a Hub (HF_ENDPOINT), as https:')):
        client(endpoint)


def test_by_default_the_client_is_who_is_logged_in_at_the_hub_of_the_environment(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (client().endpoint, client().token) == (hub.url, False)
    monkeypatch.setenv("HF_TOKEN", READ)
    assert client().token == READ


@pytest.mark.parametrize(
    ("endpoint", "settings", "sent"),
    [
        ("http://127.0.0.1:1", {"HTTP_PROXY": "http://p"}, False),
        ("http://127.0.0.1:1", {"http_proxy": "http://p", "NO_PROXY": ".0.0.1,127.0.0.0/8"}, False),
        ("http://localhost:1", {"ALL_PROXY": "http://p", "NO_PROXY": "127.0.0.1"}, False),
        ("http://127.0.0.1:1", {"HTTP_PROXY": "http://p", "NO_PROXY": "localhost, 127.0.0.1"}, True),
        ("http://127.0.0.1:1", {"HTTP_PROXY": "http://p", "NO_PROXY": "*"}, True),
        ("http://127.0.0.1:1", {"HTTPS_PROXY": "http://p"}, True),
        ("https://hub.example", {"HTTP_PROXY": "http://p", "HTTPS_PROXY": "http://p"}, True),
    ],
)
def test_a_token_for_this_machine_goes_through_no_proxy(
    endpoint: str, settings: dict[str, str], sent: bool, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    assert client(endpoint).token is False
    monkeypatch.setenv("HF_TOKEN", READ)
    if sent:
        assert client(endpoint).token == READ
    else:
        with pytest.raises(
            InputError, match="would go through the HTTP proxy that is set, in the clear: set NO_PROXY="
        ):
            client(endpoint)


def test_who_reads_unnamed_is_not_named(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", READ)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    assert (client().token, client(token=WRITE).token, client(writes=True).token) == (False, WRITE, READ)
    with pytest.raises(InputError, match="HF_HUB_DISABLE_IMPLICIT_TOKEN is set"), one_line(REPO, client()):
        info()(client())


def info(repo: str = REPO, revision: str | None = None) -> Callable[[HfApi], object]:
    return lambda api: api.model_info(repo, revision=revision)


def fetch(name: str = "a.txt") -> Callable[[HfApi], object]:
    return lambda api: api.hf_hub_download(REPO, name)


def commit(api: HfApi) -> object:
    return api.create_commit(REPO, [CommitOperationAdd("b.bin", b"1" * 99)], commit_message="b")


def tag(api: HfApi) -> object:
    return api.create_tag(REPO, tag="v1.0")


CASES = {
    "no such repository": (
        info("org/none"),
        "",
        InputError,
        "org/net: .* no such repository or wants .*; log in with: hf auth",
    ),
    "nor with a token": (
        info("org/none"),
        READ,
        InputError,
        "org/net: .* no such repository, or your token",
    ),
    "no such revision": (info(revision="v9"), "", InputError, "org/net: there is no such revision at http"),
    "no such file": (fetch("b.txt"), "", InputError, r"org/net holds no b\.txt"),
    "a bad name": (info("../net"), "", InputError, '"org/net" is not the name of a repository: '),
    "a token unknown": (info(), "hf_bad", InputError, "does not know your token; log in"),
    "no token": (commit, "", InputError, "log in with: hf auth login, or set HF_TOKEN"),
    "a read-only token": (commit, READ, InputError, "make one that may write to it at http.*/settings/tokens"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_the_user_can_set_right_is_said_in_one_line(case: str, hub: HubServer) -> None:
    call, token, kind, said = CASES[case]
    hub.add(REPO, {"a.txt": b"a"})
    with pytest.raises(kind, match=said) as caught, one_line(REPO, HfApi(endpoint=hub.url, token=token or False)):
        call(HfApi(endpoint=hub.url, token=token or False))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("endpoint", "status", "call", "said"),
    [
        ("commit", 412, commit, "was changed by someone else meanwhile"),
        ("commit", 500, commit, "answered 500 .*try again later"),
        ("batch", 429, commit, "answered 429"),
        ("tag", 409, tag, "that exists already"),
    ],
)
def test_what_the_hub_refuses_is_said_with_its_status(
    endpoint: str, status: int, call: Callable[[HfApi], object], said: str, hub: HubServer
) -> None:
    hub.add(REPO, {"a.txt": b"a"})

    def fail() -> int:
        hub.interfere[endpoint] = fail  # also when it is tried again
        return status

    fail()
    api = client(token=WRITE)
    with pytest.raises(HubError, match=said) as caught, one_line(REPO, api):
        call(api)
    assert caught.value.status == status
    assert "\n" not in str(caught.value)
    assert len(hub.repos[REPO].commits) == 1


def test_an_upload_that_breaks_off(hub: HubServer) -> None:
    hub.add(REPO, {"a.txt": b"a"})
    hub.cut_uploads = 10
    api = client(token=WRITE)
    with pytest.raises(HubError) as caught, one_line(REPO, api):
        commit(api)
    assert caught.value.status is None
    assert len(hub.repos[REPO].commits) == 1


@pytest.mark.parametrize("token", ["", READ])
def test_a_gated_repository(token: str, hub: HubServer) -> None:
    hub.add(REPO, {"a.txt": b"a"}, allowed={WRITE})
    said = f"org/net@v1.0 is gated: ask for access at {hub.url}/org/net" + ("$" if token else "; then log in with")
    with pytest.raises(InputError, match=said), one_line("org/net@v1.0", client(token=token)):
        fetch()(client(token=token))
    with one_line(REPO, client(token=WRITE)):
        fetch()(client(token=WRITE))


def test_a_token_that_was_withheld_is_said_to_be(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "is_private", lambda endpoint: False)
    monkeypatch.setenv("HF_TOKEN", READ)
    with (
        pytest.raises(InputError, match=r"no token is sent to http.*: it is neither") as caught,
        one_line(REPO, client()),
    ):
        info()(client())
    assert "log in" not in str(caught.value)


@pytest.mark.parametrize("call", [info(), fetch()])
def test_nobody_answers(call: Callable[[HfApi], object], hub: HubServer) -> None:
    api = client(DEAD)
    with (
        pytest.raises(HubError, match=r"^http://127\.0\.0\.1:9 cannot be reached( \(.*\))?$") as caught,
        one_line(REPO, api),
    ):
        call(api)
    assert "\n" not in str(caught.value)


def test_offline(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set"), one_line(REPO, client()):
        info()(client())
    assert hub.asked == []


def test_what_a_hub_says_cannot_move_the_cursor(hub: HubServer) -> None:
    error = OSError("\x1b[2Jcleared\r\n\u202ereversed" + "x" * 999)
    with pytest.raises(HubError) as caught, one_line(REPO, client()):
        raise error
    assert str(caught.value).isprintable() and len(str(caught.value)) < 400


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "no space left"), RuntimeError("b")])
def test_what_is_not_the_hubs_is_left_alone(error: Exception, hub: HubServer, tmp_path: Path) -> None:
    with pytest.raises(type(error)) as caught, one_line(REPO, client()):
        raise error
    assert caught.value is error


@pytest.mark.parametrize("code", ["", "EntryNotFound", "RepoNotFound", "GatedRepo"])
@pytest.mark.parametrize("status", [401, 403, 404, 500])
def test_what_another_host_answers_is_not_the_hubs_word(
    status: int, code: str, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def elsewhere(handler: _Handler, body: bytes, **given: str) -> None:
        if handler.hub is not hub:
            raise Refused(status, "made to fail", code)
        handler._send(302, b"", {"Location": f"{other.url}/org/stored/resolve/main/9f8e"})

    monkeypatch.setattr(_Handler, "_resolve", elsewhere)
    api = client(token=READ)
    with contextlib.closing(HubServer()) as other, pytest.raises(HubError) as caught, one_line(REPO, api):
        http_get(f"{hub.url}/{REPO}/resolve/main/a.txt", io.BytesIO(), headers={"authorization": f"Bearer {READ}"})
    assert caught.value.status == status
    said = f"{REPO}: {hub.url} sent on to {other.url}, which answered {status} "
    assert str(caught.value).startswith(said) and str(caught.value).endswith("; try again later")


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("https://hub.example", "https://HUB.example:443/a/b?c", True),
        ("http://hub.example:80", "http://hub.example/", True),
        ("http://[::1]:80", "http://[::1]:80/a", True),
        ("http://hub.example:80", "https://hub.example", False),
        ("http://hub.example:81", "http://hub.example", False),
        ("https://hub.example", "https://hub.example.org", False),
        ("https://hub.example", "https://hub.example@evil.org", False),
    ],
)
def test_which_addresses_are_of_one_host(one: str, other: str, same: bool) -> None:
    assert (remote._place(one) == remote._place(other)) == same


def test_what_a_server_warns_of_cannot_move_the_cursor(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_http, "_WARNED_TOPICS", set())
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    logging.getLogger("huggingface_hub").addHandler(handler)
    hub.add(REPO, {"a.txt": b"a"})
    for topic, inside in (("a", True), ("b", False)):
        hub.headers = {"X-HF-Warning": f"{topic}; \x1b[2Jcleared 100 %s"}
        with one_line(REPO, client()) if inside else contextlib.nullcontext():
            http_get(f"{hub.url}/{REPO}/resolve/main/a.txt", io.BytesIO())
    logging.getLogger("huggingface_hub").removeHandler(handler)
    said = stream.getvalue().splitlines()
    assert said == [r"\x1b[2Jcleared 100 %s", "\x1b[2Jcleared 100 %s"], "others are left to themselves"
