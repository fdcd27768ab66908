from __future__ import annotations

import random
import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_sets import (
    CONFIG,
    HEAVY,
    assert_same,
    epoch_of,
    named_generator,
    named_seed,
    noise,
    normalised,
    pixels_of,
    recipe,
    stacked,
    training,
    write_folder,
)

from sdzoo.errors import InputError
from sdzoo.training.data import image_set
from sdzoo.training.data.corrupt import CorruptImage, CorruptImages, check_few, read, refuse
from sdzoo.training.data.loader import EvaluationData, open_split
from sdzoo.training.data.sources import HeldOut, open_source
from sdzoo.training.distributed import Shard

COUNT = 2000  # two may be corrupt
PLAIN = {"no_aug": True, "train_crop_mode": None, "batch_size": 100}


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return 2000 pictures of 8 pixels; tests damage copies of single files and put them back."""
    root = tmp_path_factory.mktemp("large")
    write_folder(root, count=1000, classes=2, size=8)
    return root


SMALL = {**CONFIG, "input_size": (3, 8, 8)}


class damaged:  # noqa: N801
    """Files that are damaged for the length of a test."""

    def __init__(self, root: Path, *indices: int, content: bytes = b"\x89PNG\r\n\x1a\nno") -> None:
        self.files = [root / "train" / f"c{i // 1000}" / f"{i % 1000:04d}.png" for i in indices]
        self.content = content

    def __enter__(self) -> list[str]:
        self.before = [file.read_bytes() for file in self.files]
        for file in self.files:
            file.write_bytes(self.content)
        return [str(file) for file in self.files]

    def __exit__(self, *_: object) -> None:
        for file, content in zip(self.files, self.before, strict=True):
            file.write_bytes(content)


def evaluation(root: Path, split: str = "train", **options: Any) -> EvaluationData:
    return open_split("", root, split, options.pop("config", SMALL), batch_size=64, **options)


@pytest.mark.parametrize("memory", [True, False])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_corrupt_image_is_replaced_by_one_that_its_index_chooses_with_that_ones_label(
    large: Path, monkeypatch: pytest.MonkeyPatch, memory: bool, workers: int
) -> None:
    if not memory:
        monkeypatch.setattr(image_set, "MEMORY_LIMIT_GIB", 0)
    # the second one's first substitute is corrupt too
    second = named_seed(7, "substitute", 17, 0) % COUNT
    with damaged(large, 17, second) as names:
        data = training(large, config=SMALL, workers=workers, **PLAIN)
        images, labels = stacked(epoch_of(data))
        assert set(data.corrupt) == set(names)
        assert all("cannot be decoded" in reason or "not an image" in reason for reason in data.corrupt.values())
    order = torch.randperm(COUNT, generator=named_generator(7, "order", 0)).tolist()
    for index, attempt in ((17, 1), (second, 0)):
        taken = named_seed(7, "substitute", index, attempt) % COUNT
        place = order.index(index)
        expected = pixels_of(large / "train" / f"c{taken // 1000}" / f"{taken % 1000:04d}.png")
        torch.testing.assert_close(images[place], normalised(expected), rtol=0, atol=1e-5)
        assert labels[place] == taken // 1000
    others = [place for place, index in enumerate(order) if index not in (17, second)]
    assert labels[others].tolist() == [order[place] // 1000 for place in others]


def test_more_than_one_in_a_thousand_stops_the_run_and_names_some(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with damaged(large, 1, 1500):
        assert len(training(large, config=SMALL, **PLAIN).corrupt) == 2
    with damaged(large, 1, 1500, 1999) as names:
        with pytest.raises(InputError, match=r"3 of 2000 training images cannot be used.*0\.1%.*100") as caught:
            training(large, config=SMALL, **PLAIN)
        assert all(name in str(caught.value) for name in names)
        monkeypatch.setattr(image_set, "MEMORY_LIMIT_GIB", 0)
        for workers in (0, 2):
            data = training(large, config=SMALL, workers=workers, **PLAIN)
            with pytest.raises(InputError, match="3 of 2000") as caught:
                epoch_of(data)
            assert "\n" not in str(caught.value)


def test_a_hundred_are_as_many_as_any_set_may_have() -> None:
    found = {f"image {i}": "damaged" for i in range(101)}
    images = CorruptImages(10**6)
    images.add(dict(list(found.items())[:100]))
    images.add({"image 0": "damaged"})
    assert len(images.found) == 100, "the same one again is not another"
    with pytest.raises(InputError, match=r"101 of 1000000.*and 96 more"):
        images.add(found)
    check_few({}, 0)
    check_few({"a": "b"}, 1000)
    with pytest.raises(InputError, match="1 of 999"):
        check_few({"a": "b"}, 999)


def test_a_set_of_nothing_but_damage_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for file in write_folder(tmp_path):
        file.write_bytes(b"damaged")
    with pytest.raises(InputError, match="of 24 training images cannot be used"):
        training(tmp_path)
    monkeypatch.setattr(image_set, "MEMORY_LIMIT_GIB", 0)
    with pytest.raises(InputError, match="of 24 training images cannot be used"):
        epoch_of(training(tmp_path, **HEAVY))
    with pytest.raises(InputError, match="skip corrupt"):
        list(evaluation(tmp_path).batches())
    data = evaluation(tmp_path, skip_corrupt=True)
    assert list(data.batches()) == []
    assert data.images == 0


@pytest.mark.parametrize("memory", [True, False])
@pytest.mark.parametrize("workers", [0, 2])
def test_an_evaluation_stops_at_once_and_names_the_file_or_leaves_it_out_and_says_so(
    large: Path, monkeypatch: pytest.MonkeyPatch, memory: bool, workers: int
) -> None:
    if not memory:
        monkeypatch.setattr(image_set, "MEMORY_LIMIT_GIB", 0)
    clean = stacked(list(evaluation(large).batches()))
    with damaged(large, 70, 1500) as names:
        with pytest.raises(InputError) as caught:
            list(evaluation(large, workers=workers).batches())
        assert names[0] in str(caught.value)
        data = evaluation(large, workers=workers, skip_corrupt=True)
        images, labels = stacked(list(data.batches()))
        assert (data.images, set(data.corrupt)) == (COUNT - 2, set(names))
        kept = [index for index in range(COUNT) if index not in (70, 1500)]
        assert torch.equal(images, clean[0][kept])
        assert torch.equal(labels, clean[1][kept])
        assert len(list(data.batches())) and data.images == COUNT - 2, "a second pass counts nothing twice"
        parts = [evaluation(large, shard=Shard(rank, 3), skip_corrupt=True) for rank in range(3)]
        assert sum(len(labels) for part in parts for _, labels in part.batches()) == COUNT - 2


def test_in_what_is_held_out_a_corrupt_image_stops_the_evaluation_and_training_does_not_see_it(large: Path) -> None:
    order = torch.randperm(COUNT, generator=named_generator(7, "held_out")).tolist()
    with damaged(large, order[5]) as names:
        assert training(large, config=SMALL, held_out=100, **PLAIN).corrupt == {}
        with pytest.raises(InputError, match=names[0]):
            evaluation(large, held_out=HeldOut(100, 7))


@pytest.mark.parametrize("options", [PLAIN, {"color_jitter": 0.4, "batch_size": 100}], ids=["plain", "jitter"])
def test_what_is_substituted_does_not_depend_on_workers_or_memory(
    large: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    with damaged(large, 3, 1000):
        expected = epoch_of(training(large, config=SMALL, **options))
        monkeypatch.setattr(image_set, "MEMORY_LIMIT_GIB", 0)
        for workers in (0, 2):
            assert_same(epoch_of(training(large, config=SMALL, workers=workers, **options)), expected)


@pytest.mark.parametrize("kind", ["16 bits", "tiny", "missing", "folder", "empty", "text"])
def test_images_that_no_model_takes(tmp_path: Path, kind: str) -> None:
    file = write_folder(tmp_path, count=2)[1]
    source = open_source("", tmp_path, "train")
    file.unlink()
    if kind == "16 bits":
        Image.fromarray(np.zeros((32, 32), np.uint16)).save(file)
    elif kind == "tiny":
        Image.new("RGB", (1, 1)).save(file)
    elif kind == "folder":
        file.mkdir()
    elif kind != "missing":
        file.write_bytes(b"" if kind == "empty" else b"hello")
    with pytest.raises(CorruptImage) as caught:
        read(source, 1)
    assert caught.value.name == str(file)
    part = {"16 bits": "more than 8 bits", "tiny": "1x1", "missing": "does not exist", "folder": "folder"}
    assert part.get(kind, "not an image") in caught.value.reason
    if file.is_file():
        with pytest.raises(InputError, match=str(file)):
            evaluation(tmp_path, config=CONFIG)


def test_damage_of_any_kind_is_one_line_and_never_another_error(tmp_path: Path) -> None:
    """Truncated, overwritten and random files of several formats: each is either a picture or a CorruptImage."""
    draws = random.Random(0)
    folder = tmp_path / "train" / "a"
    folder.mkdir(parents=True)
    picture = Image.fromarray(noise(1)[0])
    kinds = {"png": "PNG", "jpg": "JPEG", "jpeg": "JPEG"}
    hidden = {
        "gif": "GIF",
        "webp": "WEBP",
        "tiff": "TIFF",
        "bmp": "BMP",
        "ppm": "PPM",
        "ico": "ICO",
        "jp2": "JPEG2000",
        "tga": "TGA",
        "pcx": "PCX",
    }
    whole: list[bytes] = []
    for kind, name in (kinds | hidden).items():
        target = tmp_path / f"whole.{kind}"
        try:
            picture.save(target, name)
        except (KeyError, OSError):  # Pillow may be built without
            continue
        whole.append(target.read_bytes())
    contents = []
    for content in whole:
        contents += [content[: draws.randrange(len(content))] for _ in range(15)]
        for _ in range(15):
            changed = bytearray(content)
            for _ in range(draws.choice((1, 4, 40))):
                changed[draws.randrange(min(len(changed), 200))] = draws.randrange(256)
            contents.append(bytes(changed))
    contents += [draws.randbytes(draws.randrange(300)) for _ in range(30)]
    contents += [content[:8] + draws.randbytes(200) for content in whole for _ in range(5)]
    for index, content in enumerate(contents):
        (folder / f"{index:05d}.png").write_bytes(content)
    source = open_source("", tmp_path, "train")
    corrupt: dict[str, str] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's own words about damage
        for index in range(len(source)):
            try:
                assert read(source, index).mode == "RGB"
            except CorruptImage as error:
                corrupt[error.name] = error.reason
        assert all(reason and "\n" not in reason for reason in corrupt.values())
        assert set(corrupt) <= {source.name(index) for index in range(len(source))}
        assert 100 < len(corrupt) < len(contents)
        data = evaluation(tmp_path, skip_corrupt=True, config=CONFIG)
    assert set(data.corrupt) == set(corrupt)
    assert sum(len(labels) for _, labels in data.batches()) == len(contents) - len(corrupt) == data.images


@pytest.mark.parametrize("error", [struct.error("unpack requires 4 bytes"), IndexError(), KeyError("x"), EOFError()])
def test_whatever_a_decoder_raises_is_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    write_folder(tmp_path, count=1)
    source = open_source("", tmp_path, "train")

    def fail(_: int) -> Any:
        raise error

    monkeypatch.setattr(source, "image", fail)
    with pytest.raises(CorruptImage) as caught:
        read(source, 1)
    assert caught.value.reason
    error = MemoryError()  # is the machine's, not the file's
    with pytest.raises(MemoryError):
        read(source, 1)


def test_a_refusal_shows_a_few_of_many() -> None:
    refuse({})
    with pytest.raises(InputError, match=r"^n0: bad; n1: bad; n2: bad; n3: bad; n4: bad; and 3 more"):
        refuse({f"n{i}": "bad" for i in range(8)})


def test_recipes_of_these_tests_have_no_faults() -> None:
    for options in ({}, HEAVY, PLAIN):
        assert [fault for fault in recipe(**options).faults() if "workers" not in fault] == []
