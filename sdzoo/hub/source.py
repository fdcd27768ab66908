"""Where published files come from: a repository at one commit, or a folder; each as a stranger's."""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from huggingface_hub import HfApi, constants

from sdzoo import weights
from sdzoo.digest import file_sha256
from sdzoo.errors import InputError, shown
from sdzoo.hub.cache import COMMIT, cached, download, note
from sdzoo.hub.layout import CONFIG, MAX_SUMS_BYTES, OF_THE_HUB, SUMS, Damaged, plain_file, read_sums
from sdzoo.hub.model_config import MAX_CONFIG_BYTES
from sdzoo.hub.remote import HubError, client, one_line, unreachable
from sdzoo.weights.published import known

HUB, FOLDER = "hub:", "local-dir:"  # as names of models begin, the second as timm has it
_NAME = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>\w[\w./-]*))?", re.ASCII)
Result = TypeVar("Result")


class Source(ABC):
    """Files that belong together, by name."""

    @abstractmethod
    def can_come_again(self) -> bool:
        """Return whether what is damaged may be whole when it is fetched once more."""

    @abstractmethod
    def names(self) -> set[str] | None:
        """Return all that there is, but what a file manager or the Hub adds; None if that cannot be known."""

    @abstractmethod
    def file(self, name: str, max_bytes: int, again: bool = False) -> Path:
        """Return the path of ``name``; ``again``: fetched anew, whatever the cache holds.

        Raises:
            InputError: if it is not there, too large, or no plain file.
            HubError: if it is not in the cache either.
        """

    def total_bytes(self) -> int:
        """Return how much there is to fetch."""
        return 0

    @abstractmethod
    def remember(self) -> None:
        """Note that all of it was found to be whole."""

    def sums(self, again: bool = False) -> dict[str, str]:
        """Return what ``SHA256SUMS`` says.

        Raises:
            Damaged: as :func:`read_sums`; and as :meth:`file` does.
        """
        return read_sums(self.file(SUMS, MAX_SUMS_BYTES, again).read_text(encoding="utf-8", errors="replace"))

    def checked(self, name: str, sha256: str, max_bytes: int, again: bool = False) -> Path:
        """Return the path of ``name``, whose content has this ``sha256``.

        Raises:
            Damaged: if it has another; and as :meth:`file` does.
        """
        path = self.file(name, max_bytes, again)
        if (got := file_sha256(path)) != sha256:
            raise Damaged(f"{name} of {self} has sha256 {got}; it should have {sha256}")
        return path


@dataclass(frozen=True)
class Folder(Source):
    """A folder of the layout, none of its files a link."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    def can_come_again(self) -> bool:
        """Return False."""
        return False

    def remember(self) -> None:
        """Do nothing: it is where it is."""

    def names(self) -> set[str]:
        """Return all that there is, hidden files left out."""
        return {path.name for path in self.path.iterdir() if not path.name.startswith(".")}

    def file(self, name: str, max_bytes: int, again: bool = False) -> Path:
        """Return the path of ``name``, as :meth:`Source.file`."""
        return _at_most(plain_file(self.path, name), max_bytes, str(self))


@dataclass(frozen=True)
class Repo(Source):
    """A repository at one commit.

    Attributes:
        name: ``org/name``.
        commit: Its id.
        sizes: Bytes of every file; None if the Hub cannot be reached, and the cache must do.
        revision: By which it was asked for: the commit itself, a branch or a tag.
    """

    name: str
    commit: str
    api: HfApi
    cache: Path
    sizes: dict[str, int] | None
    revision: str

    def __str__(self) -> str:
        return f"{self.name}@{self.commit}"

    @property
    def pinned(self) -> bool:
        """Whether the commit was named, by the user or by sdzoo, and not found behind a branch or a tag."""
        return self.revision == self.commit

    def checked(self, name: str, sha256: str, max_bytes: int, again: bool = False) -> Path:
        """Return as :meth:`Source.checked`; what is damaged leaves the cache, where timm would take it."""
        try:
            return super().checked(name, sha256, max_bytes, again)
        except Damaged:
            if self.can_come_again() and (path := cached(self.cache, self.name, self.commit, name)):
                for file in {path, path.resolve()}:  # huggingface_hub's own are links
                    file.unlink(missing_ok=True)
            raise

    def remember(self) -> None:
        """Note, once all of it is found to be whole, what the branch or tag means: for when the Hub is away."""
        if self.sizes is not None and not self.pinned:
            with suppress(OSError):  # a cache that cannot be written serves all the same
                note(self.cache, self.name, self.revision, self.commit)

    def can_come_again(self) -> bool:
        """Return whether the Hub answers."""
        return self.sizes is not None

    def names(self) -> set[str] | None:
        """Return all that there is but what the Hub adds; None if that cannot be known."""
        return None if self.sizes is None else self.sizes.keys() - {OF_THE_HUB}

    def total_bytes(self) -> int:
        """Return how much there is to fetch, as far as it is known."""
        return sum((self.sizes or {}).values())

    def file(self, name: str, max_bytes: int, again: bool = False) -> Path:
        """Return the path of ``name`` in the cache, as :meth:`Source.file`: its size is known before it is fetched."""
        if self.sizes is not None:
            _check_size(self.sizes, name, max_bytes, str(self))
        path = None if again else cached(self.cache, self.name, self.commit, name)
        if path is None:
            if self.sizes is None:
                raise _not_cached(unreachable(self.api.endpoint), f"{name} of {self}")
            path = download(self.api, self.cache, self.name, self.commit, name, self.sizes[name])
        return _at_most(path, max_bytes, str(self))


def once_more(read: Callable[[bool], Result], source: Source) -> Result:
    """Return ``read(False)``; where what came is damaged and can come again, ``read(True)``."""
    try:
        return read(False)
    except Damaged:
        if not source.can_come_again():
            raise
    return read(True)


def open_source(name: str | Path, cache_dir: str | Path | None = None, api: HfApi | None = None) -> Source:
    """Return where to read ``name`` from: see :func:`sdzoo.hub.load.load_hub`. Of a repository, config.json is fetched.

    Raises:
        InputError: if there is no such folder, or the name is none of a repository, or it is not to be had.
        HubError: if the Hub cannot be reached and the cache holds nothing of it.
    """
    text = str(name)
    folder = Path(text.removeprefix(FOLDER))
    if not text.startswith(HUB) and os.path.isdir(folder):  # for pathlib, a name that is too long is an error
        return Folder(folder)
    if isinstance(name, Path) or text.startswith(FOLDER):
        raise InputError(f"{str(folder)[:200]} is not a folder")
    found = _NAME.fullmatch(text.removeprefix(HUB))
    if not found or ".." in text:
        kind = "is not" if text.startswith(HUB) else "is neither a folder nor"
        raise InputError(f'"{text[:200]}" {kind} the name of a repository: ORG/NAME or ORG/NAME@REVISION')
    revision = found["revision"]
    if revision and COMMIT.fullmatch(revision.lower()):
        revision = revision.lower()
    return _open_repo(found["repo"], revision, Path(cache_dir or constants.HF_HUB_CACHE), api or client())


def _open_repo(repo: str, revision: str | None, cache: Path, api: HfApi) -> Repo:
    if revision is None and (pin := known(repo)):
        revision = pin.commit
    asked = f"{repo}@{revision}" if revision else repo
    named = revision or constants.DEFAULT_REVISION
    try:
        commit, sizes = _listed(api, repo, revision, asked)
    except HubError as error:
        if error.status is not None and error.status < 500:
            raise
        path = cached(cache, repo, named, CONFIG)
        if path is None or not COMMIT.fullmatch(path.parent.name):
            raise _not_cached(error, asked) from None
        commit, sizes = path.parent.name, None
    if COMMIT.fullmatch(named) and commit != named:
        raise InputError(f"{asked} was asked for, and {api.endpoint} answered with commit {commit}")
    source = Repo(repo, commit, api, cache, sizes, named)
    source.file(CONFIG, MAX_CONFIG_BYTES)
    return source


def _listed(api: HfApi, repo: str, revision: str | None, asked: str) -> tuple[str, dict[str, int]]:
    """Return the commit that ``revision`` means, and the bytes of every file of it."""
    with one_line(asked, api):
        info = api.model_info(repo, revision=revision, files_metadata=True)
        commit, sizes = info.sha, {file.rfilename: file.size or 0 for file in info.siblings or []}
        if not isinstance(commit, str) or not COMMIT.fullmatch(commit):
            raise ValueError("no commit")
        if not all(isinstance(name, str) and type(size) is int and size >= 0 for name, size in sizes.items()):
            raise ValueError("names and sizes of files")
    return commit, sizes


def _not_cached(error: HubError, asked: str) -> HubError:
    shipped = ", ".join(sorted(file.name.removesuffix(".safetensors") for file in weights.FOLDER.glob("*.safetensors")))
    said = f"{asked} is not in the cache; what ships with sdzoo needs no Hub: {shipped}, in {weights.FOLDER}"
    return HubError(f"{error}; {said}", error.status)


def _check_size(sizes: dict[str, int], name: str, max_bytes: int, source: str) -> None:
    if name not in sizes:
        pickles = sorted(other for other in sizes if other.endswith((".bin", ".pth", ".pt", ".ckpt", ".pkl")))
        hint = "; sdzoo publishes nothing without" if name == SUMS else ""
        hint += f"; pickles, as '{shown(pickles[0])}', are never loaded" if pickles else ""
        raise InputError(f"{source} holds no {name}{hint}")
    if sizes[name] > max_bytes:
        raise InputError(f"{name} of {source} has {sizes[name]:,} bytes; at most {max_bytes:,}")


def _at_most(path: Path, max_bytes: int, source: str) -> Path:
    _check_size({path.name: path.stat().st_size}, path.name, max_bytes, source)
    return path
