from __future__ import annotations

import errno
import hashlib
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from sdzoo.digest import file_sha256
from sdzoo.errors import InputError
from sdzoo.files import atomic_folder, atomic_path


def test_file_is_replaced_when_the_block_succeeds(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"old")
    with atomic_path(path) as temporary:
        temporary.write_bytes(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["model.onnx"]


def test_temporary_file_lies_beside_the_file_and_keeps_its_suffix(tmp_path: Path) -> None:
    """Beside it, so that the rename stays on one file system; the suffix, since writers choose a format by it."""
    with atomic_path(tmp_path / "model.onnx") as temporary:
        assert temporary.parent == tmp_path
        assert temporary.suffix == ".onnx"
        assert temporary.name != "model.onnx"


@pytest.mark.parametrize(
    "error", [ValueError("bad"), OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()]
)
@pytest.mark.parametrize("old", [None, b"old"])
def test_failure_keeps_the_old_file_and_leaves_no_temporary_one(
    tmp_path: Path, error: BaseException, old: bytes | None
) -> None:
    path = tmp_path / "last.pth"
    if old is not None:
        path.write_bytes(old)
    with pytest.raises(type(error)), atomic_path(path) as temporary:  # noqa: PT012
        temporary.write_bytes(b"half")
        raise error
    assert os.listdir(tmp_path) == ([] if old is None else ["last.pth"])
    assert old is None or path.read_bytes() == old


def test_failure_to_rename_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    path = tmp_path / "last.pth"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="Input/output"), atomic_path(path) as temporary:
        temporary.write_bytes(b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["last.pth"]


def test_bytes_are_on_disk_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def record_fsync(number: int) -> None:
        calls.append(f"fsync {os.fstat(number).st_size} bytes")
        fsync(number)

    def record_replace(source: Path, target: Path) -> None:
        calls.append("replace")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    with atomic_path(tmp_path / "a") as temporary:
        temporary.write_bytes(b"12345")
    assert calls[:2] == ["fsync 5 bytes", "replace"]
    assert len(calls) == 3, "the folder too must be on the disk, or a power cut may undo the rename"


@pytest.fixture
def restored_umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.mark.usefixtures("restored_umask")
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_mode_is_that_of_a_file_made_the_usual_way(tmp_path: Path, umask: int, mode: int) -> None:
    os.umask(umask)
    with atomic_path(tmp_path / "a") as temporary:
        temporary.write_bytes(b"x")
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == mode
    assert os.umask(umask) == umask


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere is not a folder") as caught, atomic_path(tmp_path / "nowhere" / "a"):
        pytest.fail("the block must not run")
    assert "\n" not in str(caught.value)


def test_path_of_a_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a folder; name a file"), atomic_path(tmp_path):
        pytest.fail("the block must not run")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EDQUOT], ids=errno.errorcode.get)
def test_folder_that_takes_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Simulated: permissions do not bind root. EROFS is what a read-only mount says, and is no PermissionError.

    A full disk is the run's failure, not the input's.
    """
    kind = OSError if number in (errno.ENOSPC, errno.EDQUOT) else InputError

    def fail(**_: object) -> tuple[int, str]:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(tempfile, "mkstemp", fail)
    with pytest.raises(kind, match=os.strerror(number)) as caught, atomic_path(tmp_path / "a"):
        pytest.fail("the block must not run")
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [0, 1, 2**20, 2**20 + 1, 3_000_000])
def test_sha256(tmp_path: Path, size: int) -> None:
    content = bytes(range(256)) * (size // 256 + 1)
    (tmp_path / "a").write_bytes(content[:size])
    assert file_sha256(tmp_path / "a") == hashlib.sha256(content[:size]).hexdigest()


# Folders


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("there", ["nothing", "an empty folder", "one of its kind"])
def test_folder_is_made_or_replaced_whole(tmp_path: Path, there: str) -> None:
    out = tmp_path / "out"
    if there != "nothing":
        out.mkdir()
    if there == "one of its kind":
        (out / "card.json").write_bytes(b"old")
        (out / "old").write_bytes(b"old")
    with atomic_folder(out, "card.json") as temporary:
        assert temporary.name == "out"
        (temporary / "a").mkdir()
        (temporary / "a" / "b").write_bytes(b"new")
        assert contents(out) == ({"card.json": b"old", "old": b"old"} if there == "one of its kind" else {})
    assert contents(out) == {"a/b": b"new"}
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize(
    "error", [ValueError("bad"), OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=repr
)
@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("when", ["writing", "flushing", "renaming the old", "renaming the new"])
def test_failure_keeps_the_old_folder_and_leaves_no_temporary_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, old: bool, when: str
) -> None:
    out = tmp_path / "out"
    if old:
        out.mkdir()
        (out / "card.json").write_bytes(b"old")
    rename = Path.rename

    def fail(*_: object) -> None:
        raise error

    def fail_from(path: Path, target: Path) -> Path:
        if (path == out) == (when == "renaming the old") and not path.name.endswith(".old"):
            raise error
        return rename(path, target)

    def attempt() -> None:
        with monkeypatch.context() as patch, atomic_folder(out, "card.json") as temporary:
            (temporary / "card.json").write_bytes(b"new")
            if when == "writing":
                raise error
            if when == "flushing":
                patch.setattr(os, "fsync", fail)
            else:
                patch.setattr(Path, "rename", fail_from)

    if when == "renaming the old" and not old:
        attempt()  # nothing to rename
        assert contents(out) == {"card.json": b"new"}
        return
    with pytest.raises(type(error), match=f"cannot write {out}: No space" if isinstance(error, OSError) else None):
        attempt()
    assert contents(tmp_path) == ({"out/card.json": b"old"} if old else {})
    assert os.listdir(tmp_path) == (["out"] if old else [])


def test_folder_of_another_kind_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"mine")
    message = r"holds other things \(no card\.json\); name another folder"
    with pytest.raises(InputError, match=message), atomic_folder(tmp_path, "card.json"):
        pytest.fail("the block must not run")
    with (
        pytest.raises(InputError, match="is a file; name a folder"),
        atomic_folder(tmp_path / "photo.jpg", "card.json"),
    ):
        pytest.fail("the block must not run")
    assert contents(tmp_path) == {"photo.jpg": b"mine"}


def test_folder_in_one_that_is_missing(tmp_path: Path) -> None:
    with (
        pytest.raises(InputError, match="nowhere is not a folder; create it first"),
        atomic_folder(tmp_path / "nowhere" / "out", "card.json"),
    ):
        pytest.fail("the block must not run")


@pytest.mark.parametrize("path", [".", "..", "a/.."])
def test_folders_that_have_no_name_to_rename_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    (tmp_path / "a").mkdir()
    monkeypatch.chdir(tmp_path / "a")
    with pytest.raises(InputError, match="cannot be replaced; name a folder in it"), atomic_folder(path, "card.json"):
        pytest.fail("the block must not run")


def test_what_a_link_leads_to_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with atomic_folder(tmp_path / "link", "card.json") as temporary:
        (temporary / "card.json").write_bytes(b"new")
    assert (tmp_path / "link").is_symlink()
    assert contents(tmp_path / "real") == {"card.json": b"new"}
    assert sorted(os.listdir(tmp_path)) == ["link", "real"]


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EDQUOT], ids=errno.errorcode.get)
def test_place_that_takes_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    kind = OSError if number in (errno.ENOSPC, errno.EDQUOT) else InputError

    def fail(**_: object) -> str:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(tempfile, "mkdtemp", fail)
    with pytest.raises(kind, match=os.strerror(number)), atomic_folder(tmp_path / "a", "card.json"):
        pytest.fail("the block must not run")


@pytest.mark.usefixtures("restored_umask")
def test_modes_are_those_of_a_folder_made_the_usual_way(tmp_path: Path) -> None:
    os.umask(0o027)
    with atomic_folder(tmp_path / "out", "card.json") as temporary:
        (temporary / "card.json").write_bytes(b"x")
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o750
    assert stat.S_IMODE((tmp_path / "out" / "card.json").stat().st_mode) == 0o640
