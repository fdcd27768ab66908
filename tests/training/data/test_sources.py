from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_sets import any_md5, noise, pixels_of, write_cifar, write_folder

from sdzoo import extras
from sdzoo.errors import InputError
from sdzoo.training.data.sources import open_source

__all__ = ["any_md5"]


def refused(dataset: str, data_dir: Path, split: str, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        open_source(dataset, data_dir, split, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def save(path: Path, pixels: np.ndarray | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise(1)[0] if pixels is None else pixels).save(path)


def test_pictures_labels_classes_and_names_of_a_folder(tmp_path: Path) -> None:
    files = write_folder(tmp_path, count=3)
    (tmp_path / "train" / "c1" / "notes.txt").write_text("no picture")
    source = open_source("", tmp_path, "train")
    assert len(source) == 9
    assert source.classes == ("c0", "c1", "c2")
    assert source.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert [source.name(index) for index in range(9)] == [str(file) for file in files]
    for index, file in enumerate(files):
        np.testing.assert_array_equal(np.asarray(source.image(index)), np.asarray(Image.open(file)))


@pytest.mark.parametrize(
    ("there", "asked", "found"),
    [
        (["val", "train"], "validation", "val"),
        (["validation", "val"], "val", "val"),
        (["training"], "train", "training"),
        (["val"], "train", None),  # timm would take all of data_dir
        (["train", "val"], "test", None),
        (["train"], "train[:45000]", None),
        (["train"], "", None),
    ],
    ids=str,
)
def test_a_split_is_its_folder_or_one_that_timm_knows_by_another_name(
    tmp_path: Path, there: list[str], asked: str, found: str | None
) -> None:
    for name in there:
        save(tmp_path / name / "a" / "0.png")
    if found:
        assert f"{os.sep}{found}{os.sep}" in open_source("", tmp_path, asked).name(0)
    else:
        assert "is not a folder; expected" in refused("", tmp_path, asked)


def test_classes_and_files_that_timm_cannot_tell_apart_have_an_order_all_the_same(tmp_path: Path) -> None:
    """timm sorts "1" and "01" as equal, so that their labels would be those of Python's hash seed."""
    for name in ("0001", "01", "1", "001", "b", "B"):
        for file in ("7.png", "07.png"):
            save(tmp_path / "train" / name / file)
    source = open_source("", tmp_path, "train")
    assert source.classes == ("0001", "001", "01", "1", "B", "b")
    names = [Path(source.name(index)) for index in range(len(source))]
    assert names == [tmp_path / "train" / name / file for name in source.classes for file in ("07.png", "7.png")]
    assert [source.classes[label] for label in source.labels] == [name.parent.name for name in names]


def test_order_does_not_depend_on_the_file_system(tmp_path: Path) -> None:
    files = write_folder(tmp_path / "one")
    for file in reversed(files):
        target = tmp_path / "other" / file.relative_to(tmp_path / "one")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
    one, other = (open_source("", tmp_path / name, "train") for name in ("one", "other"))
    assert [np.asarray(one.image(i)).tobytes() for i in range(24)] == [
        np.asarray(other.image(i)).tobytes() for i in range(24)
    ]
    assert one.sha256() == other.sha256(), "nor does the digest depend on where it lies"


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK", "LA"])
def test_pictures_of_other_colour_modes_are_converted(tmp_path: Path, mode: str) -> None:
    file = tmp_path / "train" / "a" / ("0.tif" if mode == "CMYK" else "0.png")
    file.parent.mkdir(parents=True)
    kind = ".jpg" if mode == "CMYK" else ".png"
    Image.fromarray(noise(1)[0]).convert(mode).save(file.with_suffix(kind))
    expected = np.asarray(Image.open(file.with_suffix(kind)).convert("RGB"))
    np.testing.assert_array_equal(np.asarray(open_source("", tmp_path, "train").image(0)), expected)
    assert open_source("", tmp_path, "train", in_chans=1).image(0).mode == "L"


def test_folders_that_hold_nothing_to_train_on(tmp_path: Path) -> None:
    assert "is not a folder; expected" in refused("", tmp_path / "nowhere", "train")
    (tmp_path / "train").mkdir()
    assert "holds no images" in refused("", tmp_path, "train")
    (tmp_path / "train" / "a").mkdir()
    assert "holds no images" in refused("", tmp_path, "train")
    save(tmp_path / "train" / "0.png")
    assert "outside of any class" in refused("", tmp_path, "train")
    (tmp_path / "val").write_text("a file")
    assert "is not a folder" in refused("", tmp_path, "val")
    assert "2 channels" in refused("", tmp_path, "train", in_chans=2)


@pytest.mark.usefixtures("any_md5")
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_as_torchvision_stores_it(tmp_path: Path, name: str) -> None:
    pixels, labels = write_cifar(tmp_path, name)
    in_train = len(labels) - 30
    for split, part in (("train", slice(0, in_train)), ("test", slice(in_train, None))):
        source = open_source(f"torch/{name}", tmp_path, split)
        assert source.labels.tolist() == labels[part]
        assert source.classes == tuple(f"class {i}" for i in range(10 if name == "cifar10" else 100))
        for index, image in enumerate(pixels[part]):
            np.testing.assert_array_equal(np.asarray(source.image(index)), image.transpose(1, 2, 0))
    assert open_source(f"torch/{name}", tmp_path, "test", in_chans=1).image(0).mode == "L"


@pytest.mark.usefixtures("any_md5")
def test_svhn_trains_on_train_and_extra_and_its_digit_10_is_0(tmp_path: Path) -> None:
    scipy_io = pytest.importorskip("scipy.io")
    pixels = {part: noise(count, count) for part, count in (("train", 6), ("extra", 9), ("test", 4))}
    for part, images in pixels.items():
        digits = np.arange(1, len(images) + 1)[:, None] % 10
        digits[digits == 0] = 10
        scipy_io.savemat(
            tmp_path / f"{part}_32x32.mat", {"X": images.transpose(1, 2, 3, 0), "y": digits.astype(np.uint8)}
        )
    source = open_source("torch/svhn", tmp_path, "train")
    assert source.classes == tuple("0123456789")
    assert source.labels.tolist() == [1, 2, 3, 4, 5, 6, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    both = np.concatenate([pixels["train"], pixels["extra"]])
    for index, image in enumerate(both):
        np.testing.assert_array_equal(np.asarray(source.image(index)), image)
    assert len(open_source("torch/svhn", tmp_path, "test")) == 4
    os.remove(tmp_path / "extra_32x32.mat")
    assert "extra_32x32.mat" in refused("torch/svhn", tmp_path, "train")


def test_svhn_without_scipy_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "scipy" else found(name))
    with pytest.raises(extras.MissingExtra, match=r"scipy not installed.*sdzoo\[svhn\]"):
        open_source("torch/svhn", tmp_path, "train")


@pytest.mark.parametrize("name", ["torch/cifar10", "torch/cifar100", "torch/svhn"])
def test_a_missing_set_says_how_to_get_it(tmp_path: Path, name: str) -> None:
    if name == "torch/svhn":
        pytest.importorskip("scipy")
    message = refused(name, tmp_path, "train")
    assert name in message and str(tmp_path) in message
    assert "dataset_download: true" in message and "http" in message


@pytest.mark.parametrize("name", ["torch/cifar10", "torch/cifar100", "torch/svhn"])
@pytest.mark.parametrize("split", ["train[:45000]", "validation", "val", "extra", ""])
def test_only_splits_that_there_are_are_taken(tmp_path: Path, name: str, split: str) -> None:
    """timm gives the test set for every one of these."""
    message = refused(name, tmp_path, split)
    assert f'split "{split}" of {name}; allowed: train, test' in message


@pytest.mark.usefixtures("any_md5")
def test_a_damaged_cifar_is_refused(tmp_path: Path) -> None:
    write_cifar(tmp_path)
    (tmp_path / "cifar-10-batches-py" / "data_batch_3").write_bytes(b"")
    assert "torch/cifar10 cannot be read" in refused("torch/cifar10", tmp_path, "train")


@pytest.mark.parametrize(("name", "near"), [("torch/cifar11", "torch/cifar10"), ("hfds/x", None), ("cifar10", None)])
def test_other_data_sets_are_refused_with_those_there_are(tmp_path: Path, name: str, near: str | None) -> None:
    message = refused(name, tmp_path, "train")
    assert "torch/svhn" in message and "wds/..." in message
    if near:
        assert f"nearest: {near}" in message


def test_imagenet_is_its_unpacked_folders(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for wnid in ("n01440764", "n01443537"):
            save(tmp_path / split / wnid / f"{wnid}_1.png")
    for split in ("train", "val", "validation"):
        source = open_source("torch/imagenet", tmp_path, split)
        assert source.classes == ("n01440764", "n01443537")
        assert f"{os.sep}{'train' if split == 'train' else 'val'}{os.sep}" in source.name(0)
    assert "allowed: train, val" in refused("torch/imagenet", tmp_path, "test")
    message = refused("torch/imagenet", tmp_path / "nowhere", "train")
    assert "ImageNet(" in message and "image-net.org" in message


@pytest.mark.parametrize("contents", [False, True])
def test_digest_follows_names_sizes_labels_and_nothing_else(tmp_path: Path, contents: bool) -> None:
    files = write_folder(tmp_path / "data")

    def digest() -> str:
        return open_source("", tmp_path / "data", "train").sha256(contents)

    before = digest()
    os.utime(files[0])
    assert digest() == before
    content = files[0].read_bytes()
    files[0].write_bytes(content + b"0")
    assert digest() != before
    files[0].write_bytes(content[:-1] + b"0")
    assert (digest() != before) is contents
    files[0].write_bytes(content)
    assert digest() == before
    files[0].rename(files[0].with_name("9999.png"))
    assert digest() != before
    files[0].with_name("9999.png").rename(files[0])
    assert digest() == before
    files[0].rename(files[-1].with_name("0000x.png"))
    assert digest() != before


@pytest.mark.usefixtures("any_md5")
def test_digest_of_a_set_in_memory_follows_pixels_and_labels(tmp_path: Path) -> None:
    write_cifar(tmp_path)
    source: Any = open_source("torch/cifar10", tmp_path, "train")
    before = source.sha256()
    assert before == open_source("torch/cifar10", tmp_path, "train").sha256()
    assert before != open_source("torch/cifar10", tmp_path, "test").sha256()
    source.labels[3] += 1
    other = source.sha256()
    source.labels[3] -= 1
    source.pixels[5, 1, 2, 3] += 1
    assert len({before, other, source.sha256()}) == 3


def test_subsets_keep_what_belongs_together(tmp_path: Path) -> None:
    files = write_folder(tmp_path)
    chosen = torch.tensor([20, 3, 11])
    part = open_source("", tmp_path, "train").subset(chosen)
    assert part.labels.tolist() == [2, 0, 1]
    assert [part.name(i) for i in range(3)] == [str(files[i]) for i in chosen.tolist()]
    assert torch.equal(torch.from_numpy(np.array(part.image(1))).permute(2, 0, 1), pixels_of(files[3]))
