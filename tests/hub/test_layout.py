from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from sdzoo.errors import InputError
from sdzoo.hub.layout import MAX_FILES, MAX_SUMS_BYTES, OURS, published_files, read_sums, write_sums
from sdzoo.hub.load import verify_hub

A, B = "a" * 64, "0123456789abcdef" * 4


@pytest.fixture
def small(tmp_path: Path) -> Path:
    for name, content in {"b.txt": b"two\r\n", "a.bin": bytes(range(256)), ".hidden": b"none"}.items():
        (tmp_path / name).write_bytes(content)
    write_sums(tmp_path)
    return tmp_path


def test_the_sums_are_those_of_sha256sum_sorted_by_name(small: Path) -> None:
    a, b = (hashlib.sha256(content).hexdigest() for content in (bytes(range(256)), b"two\r\n"))
    assert (small / "SHA256SUMS").read_bytes() == f"{a}  a.bin\n{b}  b.txt\n".encode()
    before = (small / "SHA256SUMS").read_bytes()
    assert read_sums(before.decode()) == {"a.bin": a, "b.txt": b}
    write_sums(small)  # of itself it says nothing
    assert (small / "SHA256SUMS").read_bytes() == before
    verify_hub(small)


@pytest.mark.parametrize(
    "text",
    [
        "",
        f"{A}  a",
        f"{A}  a\n{B}  b",
        f"{A}  a\n\n",
        f"{A} *a\n",
        f"{A} a\n",
        f"{A[1:]}  a\n",
        f"{A.upper()}  a\n",
        f"{A}  a\n{B}  a\n",
        f"{A}  ../a\n",
        f"{A}  /etc/passwd\n",
        f"{A}  a/b\n",
        f"{A}  a\\b\n",
        f"{A}  ..\n",
        f"{A}  .hidden\n",
        f"{A}  -rf\n",
        f"{A}  C:a\n",
        f"{A}  a\0\n",
        f"{A}  \x1b[2Ja\n",
        f"{A}  a b\n",
        f"{A}  \u0430\n",
        f"{A}  {'a' * 129}\n",
        f"{A}  SHA256SUMS\n",
        f"{A}  a\r\n",
        "".join(f"{A}  {number}\n" for number in range(MAX_FILES + 1)),
        f"{A}  a\n" * (MAX_SUMS_BYTES // 68 + 1),
    ],
)
def test_hostile_sums_are_refused_in_one_printable_line(text: str) -> None:
    with pytest.raises(InputError, match="SHA256SUMS") as caught:
        read_sums(text)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 500


def test_as_many_files_as_allowed_are_read() -> None:
    names = [f"{'x' * 125}{number:03d}" for number in range(MAX_FILES)]
    assert read_sums("".join(f"{B}  {name}\n" for name in names)) == dict.fromkeys(names, B)


def test_what_does_not_agree_is_named(small: Path) -> None:
    (small / "a.bin").write_bytes(bytes(range(255)) + b"\xfe")
    (small / "b.txt").unlink()
    (small / "model.pth").write_bytes(b"pickle")
    (small / ".DS_Store").write_bytes(b"of no account")
    said = "is not what its SHA256SUMS says: changed: a.bin; missing: b.txt; not in SHA256SUMS: model.pth$"
    with pytest.raises(InputError, match=said):
        verify_hub(small)


@pytest.mark.parametrize("check", [verify_hub, write_sums])
def test_links_and_folders_are_refused(small: Path, check: object) -> None:
    assert callable(check)
    (small / "b.txt").unlink()
    (small / "b.txt").symlink_to("a.bin")
    with pytest.raises(InputError, match=r"b\.txt is a symbolic link"):
        check(small)
    (small / "b.txt").unlink()
    (small / "b.txt").mkdir()
    with pytest.raises(InputError, match=r"b\.txt is not a file"):
        check(small)
    with pytest.raises(InputError, match="is not a folder"):
        check(small / "nothing")


def test_a_name_that_cannot_be_listed_is_not_published(small: Path) -> None:
    (small / "a b").write_bytes(b"")
    before = (small / "SHA256SUMS").read_bytes()
    with pytest.raises(InputError, match=r"'[0-9a-f]{64}  a b' is not a sha256"):
        write_sums(small)
    assert (small / "SHA256SUMS").read_bytes() == before


def test_a_folder_without_sums_or_with_endless_ones(small: Path) -> None:
    (small / "SHA256SUMS").write_bytes(b"a" * (MAX_SUMS_BYTES + 1))
    with pytest.raises(InputError, match="at most 32,768"):
        verify_hub(small)
    (small / "SHA256SUMS").unlink()
    with pytest.raises(InputError, match="holds no SHA256SUMS"):
        verify_hub(small)


def test_only_what_was_published_may_be_replaced(tmp_path: Path) -> None:
    for name in OURS - {"SHA256SUMS"}:
        (tmp_path / name).touch()
    write_sums(tmp_path)
    assert published_files(tmp_path) == OURS
    for text in ("not mine", f"{A}  model.safetensors\n", f"{A}  thesis.iso\n", None):
        (tmp_path / "SHA256SUMS").unlink()
        if text is not None:
            (tmp_path / "SHA256SUMS").write_text(text)
        with pytest.raises(InputError, match="holds other things than a published model"):
            published_files(tmp_path)
    (tmp_path / "thesis.tex").touch()
    (tmp_path / "SHA256SUMS").write_text("".join(f"{A}  {n}\n" for n in ("config.json", "model.safetensors", "x.tex")))
    with pytest.raises(InputError, match="see its SHA256SUMS"):
        published_files(tmp_path)
