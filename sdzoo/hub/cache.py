"""huggingface_hub's cache, in its own layout, filled by us: its download takes an ETag, a stranger's word, for a path.

What is asked for, a commit and a size, is known beforehand; nothing that an answer says becomes a name or a length.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_url, try_to_load_from_cache
from huggingface_hub.file_download import http_get, repo_folder_name
from huggingface_hub.utils import build_hf_headers

from sdzoo.errors import shown
from sdzoo.hub.remote import HubError, one_line

COMMIT = re.compile(r"[0-9a-f]{40}")
INCOMPLETE = "incomplete-"
ABANDONED_S = 86_400.0  # nothing was written for so long: its process was killed


def cached(cache: Path, repo: str, revision: str, name: str) -> Path | None:
    """Return the path of the file ``name`` in ``cache``, None if it is not there; ``revision`` as it was noted."""
    found = try_to_load_from_cache(repo, name, cache, revision)
    return Path(found) if isinstance(found, str) else None


def note(cache: Path, repo: str, revision: str, commit: str) -> None:
    """Write down that ``revision``, a branch or a tag, means ``commit``.

    Raises:
        OSError: if the cache cannot be written.
    """
    place = _folder(cache, repo) / "refs" / revision
    if not place.is_file() or place.read_text() != commit:
        with _replacing(place, _folder(cache, repo), cache) as temporary:
            temporary.write_text(commit)


def download(api: HfApi, cache: Path, repo: str, commit: str, name: str, size: int) -> Path:
    """Return the path in ``cache`` of the file ``name``, fetched anew, never by Xet; what breaks off is resumed.

    Args:
        api: Whom to ask.
        cache: Where it goes; a file that is there is replaced once the new one has come.
        repo: ``org/name``.
        commit: 40 hexadecimal digits.
        name: Plain, without a folder.
        size: Bytes that were promised: more are never written.

    Raises:
        InputError: if it is not there, or may not be read.
        HubError: if the Hub fails, calls a commit what is none, or sends another number of bytes.
        OSError: if the cache cannot be written.
    """
    if not COMMIT.fullmatch(commit):  # as a Hub may have answered; it is about to be a folder's name
        raise HubError(f'{repo}: the Hub calls "{shown(commit)}" a commit')
    place = _folder(cache, repo) / "snapshots" / commit / name
    url = hf_hub_url(repo, name, revision=commit, endpoint=api.endpoint)
    headers = build_hf_headers(token=api.token) | {"Accept-Encoding": "identity"}
    asked = f"{repo}@{commit}"
    with (
        _replacing(place, _folder(cache, repo), cache) as temporary,
        _AtMost(temporary, size, f"{name} of {asked}") as file,
        one_line(asked, api),
    ):
        http_get(url, file, headers=headers, expected_size=size, displayed_filename=name)
    return place


class _AtMost(io.BufferedRandom):
    """A new file that takes no more than the bytes it was promised."""

    def __init__(self, path: Path, size: int, what: str) -> None:
        super().__init__(io.FileIO(path, "w+"))
        self._size, self._what = size, what

    def write(self, data: Any, /) -> int:
        if self.tell() + len(data) > self._size:
            raise HubError(f"{self._what} has more bytes than the {self._size:,} that the Hub promised")
        return super().write(data)


def _folder(cache: Path, repo: str) -> Path:
    return cache / repo_folder_name(repo_id=repo, repo_type="model")


@contextmanager
def _replacing(place: Path, folder: Path, cache: Path) -> Iterator[Path]:
    """Yield a temporary path in ``folder`` that becomes ``place`` if the block succeeds."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(folder)
        with tempfile.TemporaryDirectory(prefix=INCOMPLETE, dir=folder) as scratch:
            temporary = Path(scratch, "file")
            yield temporary
            place.parent.mkdir(parents=True, exist_ok=True)
            os.replace(temporary, place)
    except OSError as error:
        if error.errno is None:  # the Hub's
            raise
        raise OSError(f"the cache {cache} (HF_HOME) cannot be written: {error.strerror}") from None


def _remove_abandoned(folder: Path) -> None:
    for scratch in folder.glob(f"{INCOMPLETE}*"):
        with suppress(OSError):  # as another process has removed it
            if time.time() - max(path.lstat().st_mtime for path in (scratch, *scratch.iterdir())) > ABANDONED_S:
                shutil.rmtree(scratch)
