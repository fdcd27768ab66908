from __future__ import annotations

import errno
import hashlib
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from sdzoo import files
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


def listed(folder: Path) -> set[str]:
    """Return what ``folder`` calls its own: the lines of its file ``list``, and that file."""
    try:
        return {"list", *(folder / "list").read_text().split()}
    except FileNotFoundError:
        raise InputError(f"{folder} has no list") from None


def folder_of(path: Path, *names: str, listing: str | None = None) -> Path:
    """Return ``path``, made with files of these names; one named ``list`` holds ``listing``."""
    for name in (*names, *(["list"] if listing is not None else [])):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text("old" if name != "list" else str(listing))
    return path


@pytest.fixture(params=[True, False], ids=["swapped", "renamed"])
def swap(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Return whether two folders are swapped in one step; where the system cannot, that is skipped."""
    if not request.param:
        monkeypatch.setattr(files, "_swap", lambda *_: False)
        return False
    a, b = folder_of(tmp_path / "a", "x"), folder_of(tmp_path / "b", "y")
    able = files._swap(a, b)
    assert (contents(a), contents(b)) == (({"y": b"old"}, {"x": b"old"}) if able else ({"x": b"old"}, {"y": b"old"}))
    assert not files._swap(a, tmp_path / "absent")
    for folder in (a, b):
        shutil.rmtree(folder)
    return able or pytest.skip("this system cannot swap two folders")


@pytest.mark.usefixtures("swap")
@pytest.mark.parametrize("there", [None, (), ("list", "sub/model"), ("list", ".DS_Store", "sub/__pycache__/a.pyc")])
def test_folder_is_made_or_replaced_whole(tmp_path: Path, there: tuple[str, ...] | None) -> None:
    out = tmp_path / "old"  # as what it replaces is called meanwhile
    if there is not None:
        out.mkdir()
        folder_of(out, *there, listing="sub/model" if there else None)
    before = contents(tmp_path)
    with atomic_folder(out, listed) as temporary:
        assert temporary.name == "old"
        (temporary / "a").mkdir()
        (temporary / "a" / "b").write_bytes(b"new")
        assert contents(out).keys() == {name.removeprefix("old/") for name in before}
    assert contents(out) == {"a/b": b"new"}
    assert os.listdir(tmp_path) == ["old"]


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
        folder_of(out, listing="")
    rename = Path.rename

    def fail(*_: object) -> None:
        raise error

    def fail_from(path: Path, target: Path) -> Path:
        if (path == out) == (when == "renaming the old") and path.name != "old":
            raise error
        return rename(path, target)

    def attempt() -> None:
        with monkeypatch.context() as patch, atomic_folder(out, listed) as temporary:
            (temporary / "list").write_bytes(b"new")
            if when == "writing":
                raise error
            if when == "flushing":
                patch.setattr(os, "fsync", fail)
            else:
                patch.setattr(files, "_swap", lambda *_: False)
                patch.setattr(Path, "rename", fail_from)

    if when == "renaming the old" and not old:
        attempt()  # nothing to rename
        assert contents(out) == {"list": b"new"}
        return
    with pytest.raises(type(error), match=f"cannot write {out}: No space" if isinstance(error, OSError) else None):
        attempt()
    assert contents(tmp_path) == ({"out/list": b""} if old else {})
    assert os.listdir(tmp_path) == (["out"] if old else [])


KILLED = """
import os, sys
from pathlib import Path
from sdzoo import files
swap, rename = files._swap, Path.rename
def killed(act):
    def acting(*args):
        done = act(*args)
        return os._exit(9) if done else done
    return acting
files._swap = killed(swap) if sys.argv[2] == "True" else lambda *_: False
Path.rename = killed(rename)
with files.atomic_folder(sys.argv[1], lambda _: ["list"]) as folder:
    (folder / "list").write_text("new")
"""


def test_killed_at_the_rename(tmp_path: Path, swap: bool) -> None:
    """Swapped, there is a whole folder at the name; else the old one is found, and said, by whoever writes next."""
    out = folder_of(tmp_path / "out[1]", listing="old")
    command = [sys.executable, "-c", KILLED, str(out), str(swap)]
    assert subprocess.run(command, timeout=60, check=False).returncode == 9
    if swap:
        assert contents(out) == {"list": b"new"}
    else:
        assert not out.exists()
        with pytest.raises(InputError, match=r"out\[1\] was lost when a process was killed") as caught:
            atomic_folder(out, listed).__enter__()
        place = Path(str(caught.value).split("what it held is ")[1].removesuffix(": move it back"))
        assert contents(place) == {"list": b"old"}
        place.rename(out)
    folder_of(tmp_path / ".out[1].x" / files.OLD, "x")  # left by one that was killed later
    with atomic_folder(out, listed) as temporary:
        (temporary / "list").write_bytes(b"newer")
    assert contents(out) == {"list": b"newer"}


@pytest.mark.parametrize(
    ("names", "listing", "said"),
    [
        (["photo.jpg"], None, "has no list; name another folder"),
        (["model", "thesis.tex"], "model", r"holds other things \(thesis.tex\); name another folder"),
        (["sub/b", "a", "d", "c", "e"], "e", r"holds other things \(a, c, d and 1 more\); name another folder"),
        (["sub/model"], "model", r"holds other things \(sub/model\)"),
        (["model", ".git/HEAD"], "model", r"holds other things \(\.git/HEAD\)"),
    ],
)
def test_folder_with_other_files_is_left_alone(
    tmp_path: Path, names: list[str], listing: str | None, said: str
) -> None:
    folder_of(tmp_path, *names, listing=listing)
    before = contents(tmp_path)
    with pytest.raises(InputError, match=said), atomic_folder(tmp_path, listed):
        pytest.fail("the block must not run")
    assert contents(tmp_path) == before


def test_links_in_a_folder_are_other_files(tmp_path: Path) -> None:
    out = folder_of(tmp_path / "out", listing="")
    (out / "folder").symlink_to(tmp_path)
    (out / "nowhere").symlink_to(tmp_path / "absent")
    with pytest.raises(InputError, match=r"\(folder, nowhere\)"), atomic_folder(out, listed):
        pytest.fail("the block must not run")


def test_path_of_a_file_for_a_folder(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"mine")
    with pytest.raises(InputError, match="is a file; name a folder"), atomic_folder(tmp_path / "photo.jpg", listed):
        pytest.fail("the block must not run")
    assert contents(tmp_path) == {"photo.jpg": b"mine"}


def test_folder_in_one_that_is_missing(tmp_path: Path) -> None:
    with (
        pytest.raises(InputError, match="nowhere is not a folder; create it first"),
        atomic_folder(tmp_path / "nowhere" / "out", listed),
    ):
        pytest.fail("the block must not run")


@pytest.mark.parametrize("path", [".", "..", "a/.."])
def test_folders_that_have_no_name_to_rename_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    (tmp_path / "a").mkdir()
    monkeypatch.chdir(tmp_path / "a")
    with pytest.raises(InputError, match="cannot be replaced; name a folder in it"), atomic_folder(path, listed):
        pytest.fail("the block must not run")


def test_what_a_link_leads_to_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with atomic_folder(tmp_path / "link", listed) as temporary:
        (temporary / "list").write_bytes(b"new")
    assert (tmp_path / "link").is_symlink()
    assert contents(tmp_path / "real") == {"list": b"new"}
    assert sorted(os.listdir(tmp_path)) == ["link", "real"]


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EDQUOT], ids=errno.errorcode.get)
def test_place_that_takes_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    kind = OSError if number in (errno.ENOSPC, errno.EDQUOT) else InputError

    def fail(**_: object) -> str:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(tempfile, "mkdtemp", fail)
    with pytest.raises(kind, match=os.strerror(number)), atomic_folder(tmp_path / "a", listed):
        pytest.fail("the block must not run")


@pytest.mark.usefixtures("restored_umask")
def test_modes_are_those_of_a_folder_made_the_usual_way(tmp_path: Path) -> None:
    os.umask(0o027)
    with atomic_folder(tmp_path / "out", listed) as temporary:
        (temporary / "list").write_bytes(b"x")
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o750
    assert stat.S_IMODE((tmp_path / "out" / "list").stat().st_mode) == 0o640
