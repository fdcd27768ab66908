from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import logging
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_sets import (
    CONFIG,
    HEAVY,
    all_of,
    assert_same,
    epoch_of,
    named_seed,
    normalised,
    recipe,
    stacked,
    training,
    write_shards,
)
from timm.data import create_transform

from sdzoo import extras
from sdzoo.errors import InputError
from sdzoo.training.data.loader import open_evaluation_data, open_split
from sdzoo.training.data.web_shards import content_key
from sdzoo.training.distributed import Shard

pytest.importorskip("webdataset")
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")

COUNTS = [20, 7, 13, 24]
WDS: dict[str, Any] = {"dataset": "wds/x", "no_aug": True, "batch_size": 8}


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, "timm")


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Return a folder of 64 training samples in 4 shards, and 25 for validation in 3."""
    write_shards(tmp_path, COUNTS)
    write_shards(tmp_path, [10, 10, 5], "val")
    return tmp_path


def written(root: Path, counts: list[int] = COUNTS, name: str = "train") -> dict[bytes, int]:
    """Return the label of each picture of a split, by its normalised pixels."""
    samples = write_shards(root / "again", counts, name)
    return {_pixels(content).numpy().tobytes(): label for _, content, label in samples}


def _pixels(content: bytes) -> torch.Tensor:
    image = torch.from_numpy(np.array(Image.open(io.BytesIO(content)).convert("RGB"))).permute(2, 0, 1)
    mean, std = (torch.tensor([255 * v for v in CONFIG[name]]).view(-1, 1, 1) for name in ("mean", "std"))
    return (image.float() - mean) / std


def evaluation(root: Path, **options: Any) -> Any:
    return open_split("wds/x", root, "val", CONFIG, **{"batch_size": 4, "num_classes": 3, **options})


def labels_by_pixels(batches: list[tuple[torch.Tensor, torch.Tensor]]) -> list[tuple[bytes, int]]:
    images, labels = stacked(batches)
    return [(image.numpy().tobytes(), int(label)) for image, label in zip(images, labels, strict=True)]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_of_one_reader_is_all_samples_with_their_labels_in_an_order_of_its_own(
    shards: Path, workers: int
) -> None:
    expected = written(shards)
    data = training(shards, workers=workers, **WDS)
    assert (data.images, data.steps, data.exact_position) == (64, 8, False)
    assert data.classes == ("0", "1", "2")
    epochs = [labels_by_pixels(epoch_of(data, epoch)) for epoch in (0, 1)]
    for epoch in epochs:
        assert len(epoch) == 64
        assert all(expected[pixels] == label for pixels, label in epoch)
        if workers == 0:
            assert {pixels for pixels, _ in epoch} == set(expected)
    assert epochs[0] != epochs[1]
    assert_same(epoch_of(training(shards, workers=workers, **WDS), 1), epoch_of(data, 1))


def test_the_shuffle_mixes_shards_and_follows_from_the_seed(shards: Path) -> None:
    first, again, other = (epoch_of(training(shards, seed=seed, **WDS)) for seed in (7, 7, 8))
    assert_same(first, again)
    assert not torch.equal(stacked(first)[0], stacked(other)[0])
    stored = list(written(shards))
    places = [stored.index(pixels) for pixels, _ in labels_by_pixels(first)]
    assert abs(np.corrcoef(places, range(64))[0, 1]) < 0.5
    assert len({np.searchsorted(np.cumsum(COUNTS), place, "right") for place in places[:16]}) > 2


def test_samples_of_one_shard_come_in_another_order_each_epoch(tmp_path: Path) -> None:
    write_shards(tmp_path, [32])
    data = training(tmp_path, **WDS)
    first, second = (labels_by_pixels(epoch_of(data, epoch)) for epoch in (0, 1))
    assert sorted(first) == sorted(second)
    assert first != second


def test_a_rank_reads_other_shards_each_epoch(tmp_path: Path) -> None:
    """4 shards of 16 for two ranks, of which each reads two an epoch: those of a permutation drawn for the epoch."""
    write_shards(tmp_path, [16] * 4)
    shard_of = {pixels: index // 16 for index, pixels in enumerate(written(tmp_path, [16] * 4))}
    data = training(tmp_path, Shard(0, 2), **WDS | {"batch_size": 4})
    for epoch in range(5):
        generator = torch.Generator().manual_seed(named_seed(7, "shards", epoch))
        expected = set(torch.randperm(4, generator=generator).tolist()[::2])
        assert {shard_of[pixels] for pixels, _ in labels_by_pixels(epoch_of(data, epoch))} == expected


@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_read_different_shards_and_as_many_batches(shards: Path, workers: int) -> None:
    """7 steps of 2 x 4: a rank whose shards hold fewer samples goes through them again."""
    expected = written(shards)
    ranks = [
        training(shards, Shard(rank, 2), workers=workers, **WDS | {"batch_size": 4, "grad_accum_steps": 2})
        for rank in range(2)
    ]
    seen = []
    for data in ranks:
        batches = epoch_of(data)
        assert (len(batches), data.steps) == (8, 4)
        seen.append({pixels for pixels, _ in labels_by_pixels(batches)})
        assert all(expected[pixels] == label for pixels, label in labels_by_pixels(batches))
    assert not seen[0] & seen[1]


def test_augmentation_follows_from_the_bytes_of_a_picture(shards: Path) -> None:
    """Two readers that share the shards in another way give every picture the same augmentation."""
    options = WDS | HEAVY | {"no_aug": False}
    one = {image.numpy().tobytes() for image in stacked(epoch_of(training(shards, **options)))[0]}
    halves = [stacked(epoch_of(training(shards, Shard(rank, 2), **options | {"batch_size": 4})))[0] for rank in (0, 1)]
    other = {image.numpy().tobytes() for half in halves for image in half}
    assert len(one) == 64 and other < one
    assert not one & {image.numpy().tobytes() for image in stacked(epoch_of(training(shards, **options), 1))[0]}
    assert content_key(b"x") == int(hashlib.blake2b(b"x", digest_size=8).hexdigest(), 16) // 2


def test_a_picture_is_timms_transform_seeded_by_its_bytes(shards: Path) -> None:
    made = recipe(**WDS | {"no_aug": False, "train_crop_mode": "rrc", "scale": [0.3, 1.0]})
    got = {image.numpy().tobytes() for image in stacked(epoch_of(training(shards, made=made), 1))[0]}
    transform: Any = create_transform(
        (3, 32, 32), is_training=True, scale=(0.3, 1.0), color_jitter=0.0, interpolation="random", normalize=False
    )
    mean, std = (torch.tensor([255 * v for v in CONFIG[name]]).view(-1, 1, 1) for name in ("mean", "std"))
    for _, content, _ in write_shards(shards / "again", COUNTS)[:5]:
        seed = named_seed(7, "augment", 1, content_key(content))
        random.seed(seed)
        torch.manual_seed(seed)
        image = (transform(Image.open(io.BytesIO(content))).float() - mean) / std
        assert image.numpy().tobytes() in got


def test_pad4_of_shards_follows_from_the_bytes_too(shards: Path) -> None:
    options = WDS | {"no_aug": False}
    one = {image.numpy().tobytes() for image in stacked(epoch_of(training(shards, **options)))[0]}
    other = stacked(epoch_of(training(shards, Shard(1, 2), **options | {"batch_size": 4})))[0]
    assert {image.numpy().tobytes() for image in other} < one


@pytest.mark.parametrize("workers", [0, 2, 5])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_an_evaluation_takes_every_sample_once_over_all_ranks(shards: Path, world: int, workers: int) -> None:
    expected = written(shards, [10, 10, 5], "val")
    seen = []
    for rank in range(world):
        data = evaluation(shards, shard=Shard(rank, world), workers=workers if rank == 0 else 0)
        batches = list(data.batches())
        assert data.images == 25
        assert all(len(labels) <= 4 for _, labels in batches)
        if batches:
            seen += labels_by_pixels(batches)
            assert_same(list(data.batches()), batches)
    assert len(seen) == 25 and dict(seen) == expected


def test_pictures_come_as_from_a_folder(shards: Path) -> None:
    samples = write_shards(shards / "again", [10, 10, 5], "val")
    images, labels = all_of(evaluation(shards))
    assert labels.tolist() == [label for _, _, label in samples]
    for image, (_, content, _) in zip(images, samples, strict=True):
        pixels = torch.from_numpy(np.array(Image.open(io.BytesIO(content)))).permute(2, 0, 1)
        torch.testing.assert_close(image, normalised(pixels), rtol=0, atol=1e-5)


def test_splits_by_their_shards_and_numbers_from_the_recipe(tmp_path: Path) -> None:
    write_shards(tmp_path, [10, 6], info=False)
    made = recipe(**WDS | {"train_split": "x-train-{0000..0001}.tar", "val_split": "x-train-0001.tar"})
    with pytest.raises(InputError, match="train_num_samples is needed"):
        training(tmp_path, made=made)
    assert len(all_of(open_evaluation_data(made, tmp_path, made.val_split, CONFIG))[1]) == 6
    told = recipe(**WDS, train_split="x-train-{0000..0001}.tar|16", val_split="x-train-0001.tar", val_num_samples=6)
    assert training(tmp_path, made=told).steps == 2
    assert len(all_of(open_evaluation_data(told, tmp_path, told.val_split, CONFIG))[1]) == 6
    wrong = open_split("wds/x", tmp_path, "x-train-0001.tar", CONFIG, num_samples=7, num_classes=3)
    with pytest.raises(InputError, match="hold 6 images; 7 were announced"):
        list(wrong.batches())


def rewritten(root: Path, counts: list[int], change: dict[int, dict[str, bytes]]) -> None:
    """Write one shard of ``sum(counts)`` samples, some members changed."""
    import tarfile

    samples = write_shards(root / "plain", counts)
    with tarfile.open(root / "x-train-0000.tar", "w") as tar:
        for index, (key, content, label) in enumerate(samples):
            members = {"png": content, "cls": str(label).encode()} | change.get(index, {})
            for kind, data in members.items():
                if kind.startswith("-"):
                    continue
                member = tarfile.TarInfo(f"{key}.{kind}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


@pytest.mark.parametrize("workers", [0, 1])
def test_corrupt_pictures_are_replaced_named_and_few(tmp_path: Path, workers: int) -> None:
    rewritten(tmp_path, [30], {4: {"png": b"damaged"}, 9: {"png": b""}})
    options = WDS | {"workers": workers, "train_split": "x-train-0000.tar"}
    data = training(tmp_path, train_num_samples=3000, **options | {"batch_size": 30})
    first = next(data.epoch(0))
    assert len(first[1]) == 30
    assert {name.rsplit(": ")[1] for name in data.corrupt} == {"000004", "000009"}
    assert all("x-train-0000.tar: 0000" in name and "not an image" in why for name, why in data.corrupt.items())
    with pytest.raises(InputError, match="of 32 training images cannot be used"):
        epoch_of(training(tmp_path, train_num_samples=32, **options | {"batch_size": 16}))
    strict = open_split("wds/x", tmp_path, "x-train-0000.tar", CONFIG, num_samples=30, num_classes=3, workers=workers)
    with pytest.raises(InputError, match=r"000004.*not an image"):
        list(strict.batches())
    lenient = open_split(
        "wds/x", tmp_path, "x-train-0000.tar", CONFIG, num_samples=30, num_classes=3, skip_corrupt=True, workers=workers
    )
    assert len(all_of(lenient)[1]) == lenient.images == 28
    assert len(lenient.corrupt) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cls": b"three"}, "no label that can be read"),
        ({"cls": b"3"}, "is of class 3; there are 3, from 0"),
        ({"cls": b""}, "no label that can be read"),
    ],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_labels_that_are_none_stop_the_run(
    tmp_path: Path, change: dict[str, bytes], message: str, workers: int
) -> None:
    rewritten(tmp_path, [16], {3: change})
    options = WDS | {"train_split": "x-train-0000.tar|16", "workers": workers}
    with pytest.raises(InputError, match=message) as caught:
        epoch_of(training(tmp_path, **options))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_truncated_shard_and_an_empty_one_stop_the_run(tmp_path: Path, workers: int) -> None:
    write_shards(tmp_path, [16], info=False)
    file = tmp_path / "x-train-0000.tar"
    content = file.read_bytes()
    options = WDS | {"train_split": "x-train-0000.tar|16", "workers": workers}
    for part in (content[:5000], b"", b"no tar at all" * 100):
        file.write_bytes(part)
        with pytest.raises(InputError, match=r"x-train-0000\.tar") as caught:
            epoch_of(training(tmp_path, **options))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_shards_of_which_nothing_can_be_used_stop_the_run(tmp_path: Path, workers: int) -> None:
    options = WDS | {"train_split": "x-train-0000.tar|16", "workers": workers}
    for change, message in ({"png": b"damaged"}, "of 16 training images"), ({"cls": b"-1"}, "no sample that can be"):
        rewritten(tmp_path, [16], dict.fromkeys(range(16), change))
        with pytest.raises(InputError, match=message):
            epoch_of(training(tmp_path, **options))


def test_labels_from_the_json_that_the_description_names(tmp_path: Path) -> None:
    rewritten(tmp_path, [16], {i: {"json": json.dumps({"other": i % 2}).encode()} for i in range(16)})
    split = {
        "name": "t",
        "num_samples": 16,
        "filenames": ["x-train-0000.tar"],
        "shard_lengths": [16],
        "alt_label": "other",
    }
    (tmp_path / "_info.json").write_text(json.dumps({"splits": {"t": split}}))
    data = open_split("wds/x", tmp_path, "t", CONFIG, num_classes=3)
    assert all_of(data)[1].tolist() == [i % 2 for i in range(16)]


def test_what_shards_cannot_do_is_refused(shards: Path) -> None:
    with pytest.raises(InputError, match="start of an epoch, not at step 3"):
        epoch_of(training(shards, **WDS), 0, 3)
    with pytest.raises(InputError, match="4 shards for 5 ranks"):
        training(shards, Shard(4, 5), **WDS)
    with pytest.raises(InputError, match="do not fill one step of 128"):
        training(shards, Shard(0, 2), **WDS | {"batch_size": 64})
    with pytest.raises(InputError, match="num_classes is needed"):
        training(shards, **WDS, num_classes=None)
    with pytest.raises(InputError, match='split "nothing" is not in'):
        training(shards, **WDS, train_split="nothing")
    with pytest.raises(InputError, match=r"1 of 1 shards do not exist: .*nowhere-0000\.tar"):
        training(shards, **WDS, train_split="nowhere-0000.tar|5")


def test_fingerprint_follows_the_shards(shards: Path) -> None:
    one = training(shards, **WDS).fingerprint
    assert one == training(shards, Shard(1, 2), **WDS | {"workers": 2, "batch_size": 4}).fingerprint
    assert one != evaluation(shards).fingerprint
    with open(shards / "x-train-0002.tar", "ab") as file:
        file.write(b"0" * 512)
    assert one != training(shards, **WDS).fingerprint


def test_without_webdataset_the_extra_is_named(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "webdataset" else found(name))
    with pytest.raises(extras.MissingExtra, match=r"webdataset not installed.*sdzoo\[webdataset\]"):
        training(shards, **WDS)
