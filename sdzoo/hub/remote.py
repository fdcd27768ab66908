"""Talking to a Hub, through huggingface_hub's own client: whom a token goes to, and what its errors mean."""

from __future__ import annotations

import ipaddress
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from sdzoo.errors import InputError, shown

LOG_IN = "log in with: hf auth login, or set HF_TOKEN"
# What its HTTP library raises when there is no answer; which one it is depends on the client's version.
NoAnswer: type[Exception] = next(kind for kind in reversed(HfHubHTTPError.__mro__) if kind.__module__ != "builtins")
# What the client raises where an answer is not what it takes for granted: HTML, a list, no names, a text for a size.
MALFORMED = (ValueError, TypeError, LookupError, AttributeError, RecursionError)


class HubError(OSError):
    """A Hub did not do what it was asked for; ``status`` is that of its answer, None if there was none."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


def client(endpoint: str | None = None, token: str | None = None, writes: bool = False) -> HfApi:
    """Return a client of the Hub at ``endpoint`` (default: HF_ENDPOINT, else the public one).

    Args:
        endpoint: An address without path.
        token: By whom; default: who is logged in. It goes to https or to this machine, and else stays here.
        writes: Whether it will: HF_HUB_DISABLE_IMPLICIT_TOKEN is for reading.

    Raises:
        InputError: if ``endpoint`` is not such an address, or would be sent a ``token`` in the clear.
    """
    endpoint = (endpoint or constants.ENDPOINT).rstrip("/")
    if not is_private(endpoint):
        if token:
            raise InputError(f"a token goes only to https or to this machine; {endpoint} is neither")
        return HfApi(endpoint=endpoint, token=False)
    if not token and (writes or not constants.HF_HUB_DISABLE_IMPLICIT_TOKEN):
        token = get_token()
    if token and _has_proxy(endpoint):
        raise InputError(
            f"a token for {endpoint} would go through the HTTP proxy that is set, in the clear: set NO_PROXY="
            f"{urlsplit(endpoint).hostname}, or unset the token"
        )
    return HfApi(endpoint=endpoint, token=token or False)


def is_private(endpoint: str) -> bool:
    """Return whether nobody between here and ``endpoint`` can read along.

    Raises:
        InputError: if it is no http or https address.
    """
    try:
        parts = urlsplit(endpoint)
        scheme, host, user = parts.scheme, parts.hostname, parts.username
    except ValueError:
        scheme, host, user = "", None, None
    if not host or scheme not in ("http", "https") or user is not None:
        given = re.sub(r"//[^/]*@", "//...@", endpoint)
        raise InputError(f'"{given}" is not the address of a Hub (HF_ENDPOINT), as https://huggingface.co is')
    return scheme == "https" or host == "localhost" or _is_loopback(host)


def _has_proxy(endpoint: str) -> bool:
    """Return whether a proxy may be asked for an http ``endpoint``: only an exception in so many words rules it out."""
    parts, proxies = urlsplit(endpoint), getproxies()
    excepted = proxies.get("no", "")
    named = excepted.strip() == "*" or parts.hostname in [name.strip() for name in excepted.split(",")]
    return parts.scheme == "http" and not named and bool(proxies.get("http") or proxies.get("all"))


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@contextmanager
def one_line(repo: str, api: HfApi) -> Iterator[None]:
    """Say in one line, with what to do, what the client raises within: ``repo`` is what it was asked for.

    Raises:
        InputError: if the user can set it right: the name, the revision, the token.
        HubError: if the Hub failed, refused, or cannot be reached.
    """
    try:
        with _printable_log():
            yield
    except (InputError, HubError):
        raise
    except Exception as error:
        said = _in_one_line(_first_cause(error), repo, api.endpoint)
        if said is None:
            raise
        raise said from None


@contextmanager
def _printable_log() -> Iterator[None]:
    """Let what the client logs meanwhile, a server's words among it, not move the cursor."""

    def in_one_line(record: logging.LogRecord) -> bool:
        record.msg, record.args = _plain(record.getMessage(), 500), None
        return True

    known = logging.Logger.manager.loggerDict.items()
    loggers = [one for name, one in known if name.startswith("huggingface_hub") and isinstance(one, logging.Logger)]
    for logger in loggers:
        logger.addFilter(in_one_line)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(in_one_line)


@contextmanager
def printable_warnings() -> Iterator[None]:
    """Let what a server has the client warn of, as it does of a card, not move the cursor; not for many threads."""
    with warnings.catch_warnings(record=True) as caught:
        yield
    for warning in caught:
        warnings.warn(_plain(warning.message, 500), warning.category, stacklevel=4)


def _first_cause(error: Exception) -> Exception:
    # an upload's failure comes wrapped in a RuntimeError
    cause = error.__cause__
    return cause if type(error) is RuntimeError and isinstance(cause, Exception) else error


def _in_one_line(error: Exception, repo: str, endpoint: str) -> Exception | None:
    if isinstance(error, HFValidationError):
        return InputError(f'"{repo}" is not the name of a repository: {_plain(error)}')
    if isinstance(error, LocalEntryNotFoundError):
        return unreachable(endpoint)
    if isinstance(error, HfHubHTTPError):
        return _refusal(error, repo, endpoint)
    if isinstance(error, MALFORMED):
        why = f"{type(error).__name__}: {_plain(error)}"
        return HubError(f"{repo}: {endpoint} did not answer as a Hub does, or something between did ({why})")
    if isinstance(error, (NoAnswer, ConnectionError)):
        return unreachable(endpoint, _plain(error) or type(error).__name__)
    if isinstance(error, OSError) and error.errno is None:  # the client's own, as when fewer bytes came than announced
        return HubError(f"{repo} at {endpoint}: {_plain(error)}")
    return None


def unreachable(endpoint: str, why: str = "") -> HubError:
    """Return the error for a Hub that does not answer."""
    if constants.HF_HUB_OFFLINE:
        why = "HF_HUB_OFFLINE is set"
    return HubError(f"{endpoint} cannot be reached{f' ({why})' if why else ''}")


def _refusal(error: HfHubHTTPError, repo: str, endpoint: str) -> Exception:
    response: Any = error.response
    status, has_token = response.status_code, "authorization" in response.request.headers
    said = _plain(error.server_message or response.reason_phrase)
    if (place := _place(response.request.url)) != _place(endpoint):
        return HubError(
            f"{repo}: {endpoint} sent on to {place}, which answered {status} ({said}); try again later", status
        )
    log_in = LOG_IN + "; HF_HUB_DISABLE_IMPLICIT_TOKEN is set" * constants.HF_HUB_DISABLE_IMPLICIT_TOKEN
    if not is_private(endpoint):
        log_in = f"no token is sent to {endpoint}: it is neither https nor this machine"
    if isinstance(error, GatedRepoError):
        then = "" if has_token else f"; then {log_in}"
        return InputError(f"{repo} is gated: ask for access at {endpoint}/{repo.partition('@')[0]}{then}")
    if isinstance(error, RevisionNotFoundError):
        return InputError(f"{repo}: there is no such revision at {endpoint}")
    if isinstance(error, EntryNotFoundError):
        return InputError(f"{repo} holds no {_plain(response.request.url).rpartition('/')[2]}")
    if (isinstance(error, RepositoryNotFoundError) or status == 401) and not has_token:
        return InputError(f"{repo}: {endpoint} has no such repository or wants to know who asks; {log_in}")
    if isinstance(error, RepositoryNotFoundError):
        return InputError(f"{repo}: {endpoint} has no such repository, or your token may not see it")
    if status == 401:
        return InputError(f"{repo}: {endpoint} does not know your token; {LOG_IN}")
    if status == 403:
        return InputError(
            f"{repo}: your token may not do that; make one that may write to it at {endpoint}/settings/tokens, {LOG_IN}"
        )
    if status == 412:
        return HubError(f"{repo} was changed by someone else meanwhile ({said}): look at it, then run again", status)
    if status == 409:
        return HubError(f"{repo}: that exists already ({said})", status)
    return HubError(f"{repo}: {endpoint} answered {status} ({said}); try again later", status)


def _place(url: object) -> str:
    """Return the scheme, the host and, where it is another than the scheme's, the port of ``url``."""
    parts = urlsplit(str(url))
    port = "" if parts.port in (None, {"http": 80, "https": 443}.get(parts.scheme)) else f":{parts.port}"
    return _plain(f"{parts.scheme}://{parts.hostname}{port}")


def _plain(text: object, limit: int = 200) -> str:
    return shown(" ".join(str(text).split()), limit)
