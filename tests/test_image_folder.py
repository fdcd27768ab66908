from __future__ import annotations

import os
from pathlib import Path

import pytest
from PIL import Image

from sdzoo.errors import InputError
from sdzoo.image_folder import read_image_folder


def write(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(root / name)
    return root


def refused(root: Path, need_classes: bool = True) -> str:
    with pytest.raises(InputError) as caught:
        read_image_folder(root, need_classes)
    assert "\n" not in str(caught.value)
    assert str(root) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("need_classes", [True, False])
def test_pictures_by_class(tmp_path: Path, need_classes: bool) -> None:
    found = read_image_folder(write(tmp_path, "dog/2.png", "cat/10.png", "cat/9.jpg", "dog/1.png"), need_classes)
    assert found.root == tmp_path
    assert found.classes == ("cat", "dog")
    assert found.files == ("cat/9.jpg", "cat/10.png", "dog/1.png", "dog/2.png")
    assert found.labels == (0, 0, 1, 1)


def test_pictures_without_classes(tmp_path: Path) -> None:
    found = read_image_folder(write(tmp_path, "b.png", "a10.png", "a9.png"), need_classes=False)
    assert (found.files, found.labels, found.classes) == (("a9.png", "a10.png", "b.png"), (0, 0, 0), ())


def test_pictures_without_classes_where_those_are_needed(tmp_path: Path) -> None:
    message = refused(write(tmp_path, "a.png"))
    assert message == f"{tmp_path} holds images outside of any class; expected {tmp_path}/<class>/<image>"


@pytest.mark.parametrize("need_classes", [True, False])
def test_some_pictures_outside_of_any_class(tmp_path: Path, need_classes: bool) -> None:
    assert "holds images outside of any class" in refused(write(tmp_path, "a.png", "cat/b.png"), need_classes)


@pytest.mark.parametrize("need_classes", [True, False])
def test_nothing_there(tmp_path: Path, need_classes: bool) -> None:
    expected = f"expected {tmp_path}/<class>/<image>" if need_classes else f"expected pictures in {tmp_path}"
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "notes.txt").write_text("no picture")
    assert refused(tmp_path, need_classes) == f"{tmp_path} holds no images; {expected}"
    assert "is not a folder; expected" in refused(tmp_path / "missing", need_classes)
    assert "is not a folder; expected" in refused(tmp_path / "cat" / "notes.txt", need_classes)


def test_names_that_cannot_be_sorted(tmp_path: Path) -> None:
    assert "holds a name that cannot be sorted" in refused(write(tmp_path, "cat/1²3.png", "cat/1.png"))


def test_names_that_timm_cannot_tell_apart_have_an_order(tmp_path: Path) -> None:
    """ "1" and "01" are one number to it."""
    found = read_image_folder(write(tmp_path, "1/a.png", "01/a.png", "001/a.png"))
    assert found.classes == ("001", "01", "1")
    assert [(found.files[i], found.labels[i]) for i in range(3)] == [("001/a.png", 0), ("01/a.png", 1), ("1/a.png", 2)]


def test_a_trailing_slash_and_a_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "pictures/cat/a.png")
    monkeypatch.chdir(tmp_path)
    for root in (Path("pictures"), Path("pictures/"), Path(f".{os.sep}pictures"), tmp_path / "pictures"):
        assert read_image_folder(root).files == ("cat/a.png",)
