"""Files and folders that are whole or not there."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sdzoo.errors import InputError


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; flush it to disk and rename it to ``path`` if the block succeeds.

    On any failure the temporary file is removed and a file already at ``path`` is as it was.

    Raises:
        InputError: if the folder does not exist or is not writable.
        OSError: naming ``path``, if writing fails, as on a full disk.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path} is a folder; name a file")
    if not path.parent.is_dir():
        raise InputError(f"{path.parent} is not a folder; create it first")
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):  # a full disk is no fault of the input
            raise OSError(f"cannot write {path}: {error.strerror}") from error
        raise InputError(f"cannot write into {path.parent}: {error.strerror}") from None
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        os.replace(temporary, path)
        _flush_folder(path.parent)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | Path, marker: str) -> Iterator[Path]:
    """Yield a temporary folder beside ``path``; flush it to disk and rename it to ``path`` if the block succeeds.

    On any failure the temporary folder is removed and a folder already at ``path`` is as it was.

    Args:
        path: The folder to make. One that is there is replaced if it is empty or holds ``marker``.
        marker: Name of the file by which a folder is known to be of the same kind.

    Raises:
        InputError: if ``path`` is something else, or the folder that it shall lie in is missing or not writable.
        OSError: naming ``path``, if writing fails, as on a full disk.
    """
    path = Path(path)
    if path.name in ("", ".."):
        raise InputError(f"{path} cannot be replaced; name a folder in it")
    if path.exists() and not path.is_dir():
        raise InputError(f"{path} is a file; name a folder")
    if path.is_dir() and not (path / marker).is_file() and any(path.iterdir()):
        raise InputError(f"{path} holds other things (no {marker}); name another folder")
    place = path.resolve()  # what a symbolic link leads to is replaced, not the link
    parent = place.parent
    if not parent.is_dir():
        raise InputError(f"{parent} is not a folder; create it first")
    try:
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=parent))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(f"cannot write {path}: {error.strerror}") from error
        raise InputError(f"cannot write into {parent}: {error.strerror}") from None
    old = temporary.with_name(temporary.name + ".old")
    try:
        new = temporary / path.name
        new.mkdir()
        yield new
        for file in new.rglob("*"):
            if file.is_file():
                with open(file, "rb+") as handle:
                    os.fsync(handle.fileno())
        try:
            if place.is_dir():
                place.rename(old)
            new.rename(place)
        except BaseException:  # also an interrupt between the two
            if old.is_dir() and not place.exists():
                old.rename(place)
            raise
        _flush_folder(parent)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _flush_folder(folder: Path) -> None:
    """Bring a rename to the disk; without it, a power cut may undo it."""
    if os.name != "posix":  # elsewhere a folder cannot be opened
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
