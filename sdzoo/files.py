"""Files and folders that are whole or not there."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path

from sdzoo.errors import InputError

AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of Linux
OLD = "old"  # in the temporary folder: what was replaced


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
def atomic_folder(path: str | Path, own: Callable[[Path], Collection[str]]) -> Iterator[Path]:
    """Yield a temporary folder beside ``path``; flush it to disk and rename it to ``path`` if the block succeeds.

    On any failure the temporary folder is removed and a folder already at ``path`` is as it was. Where the system can
    swap two folders, there is a whole one at ``path`` at every moment, even if the process is killed.

    Args:
        path: The folder to make. One that is there is replaced if nothing but ``own`` is in it.
        own: Given a folder that is there and not empty, returns the files in it that may go, relative and with ``/``;
            raises InputError if it is of another kind. Hidden files and Python's caches go with them, hidden folders,
            as .git, do not.

    Raises:
        InputError: if ``path`` is something else or holds other files, which are named, or the folder that it shall
            lie in is missing or not writable.
        OSError: naming ``path``, if writing fails, as on a full disk.
    """
    path = Path(path)
    if path.name in ("", ".."):
        raise InputError(f"{path} cannot be replaced; name a folder in it")
    if path.exists() and not path.is_dir():
        raise InputError(f"{path} is a file; name a folder")
    place = path.resolve()  # what a symbolic link leads to is replaced, not the link
    parent = place.parent
    if not parent.is_dir():
        raise InputError(f"{parent} is not a folder; create it first")
    if left := [] if place.exists() else sorted(parent.glob(f".{escape(place.name)}.*/{OLD}")):
        raise InputError(f"{path} was lost when a process was killed; what it held is {left[0]}: move it back")
    _check_own(path, own)
    try:
        temporary = Path(tempfile.mkdtemp(prefix=f".{place.name}.", dir=parent))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(f"cannot write {path}: {error.strerror}") from error
        raise InputError(f"cannot write into {parent}: {error.strerror}") from None
    try:
        new = temporary / "new" / path.name
        new.mkdir(parents=True)
        yield new
        for file in new.rglob("*"):
            if file.is_file():
                with open(file, "rb+") as handle:
                    os.fsync(handle.fileno())
        _rename_over(new, place, temporary / OLD)
        _flush_folder(parent)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _check_own(path: Path, own: Callable[[Path], Collection[str]]) -> None:
    """Raise InputError, naming them, if the folder ``path`` holds files that are not ``own``."""
    files = (file.relative_to(path) for file in path.rglob("*") if file.is_symlink() or not file.is_dir())
    there = {file.as_posix() for file in files if _is_somebodys(file)}
    if not there:
        return
    try:
        others = sorted(there - set(own(path)))
    except InputError as error:
        raise InputError(f"{error}; name another folder") from None
    if others:
        more = f" and {len(others) - 3} more" * (len(others) > 3)
        raise InputError(f"{path} holds other things ({', '.join(others[:3])}{more}); name another folder")


def _is_somebodys(file: Path) -> bool:
    *folders, name = file.parts
    return any(folder[0] == "." for folder in folders) or not (name[0] == "." or "__pycache__" in folders)


def _rename_over(new: Path, place: Path, old: Path) -> None:
    """Rename ``new`` to ``place``; what is there is then ``new`` or ``old``."""
    if place.is_dir() and _swap(new, place):
        return
    try:
        if place.is_dir():
            place.rename(old)
        new.rename(place)
    except BaseException:  # also an interrupt between the two
        if old.is_dir() and not place.exists():
            old.rename(place)
        raise


def _swap(a: Path, b: Path) -> bool:
    """Let two folders change names in one step, which Linux can on most file systems; return whether it was done."""
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError, TypeError):  # other systems
        return False
    return renameat2(AT_FDCWD, os.fsencode(a), AT_FDCWD, os.fsencode(b), RENAME_EXCHANGE) == 0


def _flush_folder(folder: Path) -> None:
    """Bring a rename to the disk; without it, a power cut may undo it."""
    if os.name != "posix":  # elsewhere a folder cannot be opened
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
