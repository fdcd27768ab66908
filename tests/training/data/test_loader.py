from __future__ import annotations

import multiprocessing
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_sets import (
    CONFIG,
    HEAVY,
    RAND,
    all_of,
    any_md5,
    assert_same,
    epoch_of,
    named_generator,
    noise,
    normalised,
    pixels_of,
    recipe,
    stacked,
    training,
    write_cifar,
    write_folder,
)

from sdzoo.errors import InputError
from sdzoo.training.data import image_set
from sdzoo.training.data.augment import training_steps
from sdzoo.training.data.loader import open_evaluation_data, open_split
from sdzoo.training.data.sources import open_source
from sdzoo.training.data.streaming import Loader, Samples, lost_workers_named
from sdzoo.training.distributed import LostProcess, Shard

__all__ = ["any_md5"]
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")

WAYS: dict[str, dict[str, Any]] = {
    "pad4": {"reprob": 0.3},
    "jitter": {"color_jitter": 0.4},
    "heavy": HEAVY,
    "rand": RAND | {"train_crop_mode": None},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return 54 training images (6 steps of 8) and 21 for validation, a little larger than the model's input."""
    root = tmp_path_factory.mktemp("folder")
    write_folder(root, "train", 18, size=40)
    write_folder(root, "val", 7, size=40)
    return root


def evaluation(root: Path, split: str = "val", **options: Any) -> Any:
    return open_split("", root, split, CONFIG, **{"batch_size": 4, **options})


@pytest.mark.parametrize("way", WAYS)
def test_workers_do_not_change_the_result(folder: Path, way: str) -> None:
    alone, helped = (training(folder, workers=workers, batch_size=8, **WAYS[way]) for workers in (0, 2))
    for epoch in (0, 1):
        assert_same(epoch_of(helped, epoch), epoch_of(alone, epoch))
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert_same(epoch_of(training(folder, batch_size=8, **WAYS[way])), epoch_of(alone))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("world", "accum"), [(2, 1), (1, 2), (2, 2)])
def test_ranks_and_micro_batches_together_are_the_single_process(
    folder: Path, way: str, world: int, accum: int
) -> None:
    alone = epoch_of(training(folder, batch_size=8, **WAYS[way]), 1)
    size = 8 // world // accum
    parts = [
        epoch_of(training(folder, Shard(rank, world), batch_size=size, grad_accum_steps=accum, **WAYS[way]), 1)
        for rank in range(world)
    ]
    assert all(len(part) == accum * len(alone) for part in parts)
    for step, (images, labels) in enumerate(alone):
        for rank in range(world):
            for micro in range(accum):
                place = slice(rank + world * micro, None, world * accum)
                got_images, got_labels = parts[rank][step * accum + micro]
                assert torch.equal(got_images, images[place])
                assert torch.equal(got_labels, labels[place])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_goes_on_at_any_step(folder: Path, way: str, workers: int) -> None:
    data = training(folder, batch_size=4, grad_accum_steps=2, workers=workers, **WAYS[way])
    whole = epoch_of(data, 1)
    assert data.exact_position and len(whole) == 2 * data.steps == 12
    for start in (1, 5):
        assert_same(epoch_of(data, 1, start), whole[2 * start :])
        fresh = training(folder, batch_size=4, grad_accum_steps=2, workers=workers, **WAYS[way])
        assert_same(epoch_of(fresh, 1, start), whole[2 * start :])
    assert epoch_of(data, 1, data.steps) == []


@pytest.mark.parametrize("way", ["pad4", "jitter"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_set_in_memory_and_one_that_streams_are_the_same(
    folder: Path, monkeypatch: pytest.MonkeyPatch, way: str, workers: int
) -> None:
    held = training(folder, batch_size=8, held_out=10, **WAYS[way])
    kept = evaluation(folder)
    monkeypatch.setattr(image_set, "MEMORY_LIMIT_GIB", 0)
    streamed = training(folder, batch_size=8, held_out=10, workers=workers, **WAYS[way])
    assert_same(epoch_of(streamed), epoch_of(held))
    streaming = evaluation(folder, workers=workers)
    assert_same(list(streaming.batches()), list(kept.batches()))
    assert_same(list(streaming.batches()), list(kept.batches()))
    assert streaming.images == 21


def test_an_epoch_left_half_way_does_not_spill_into_the_next(folder: Path) -> None:
    data = training(folder, batch_size=8, workers=2, **HEAVY)
    expected = epoch_of(data, 0)
    left = data.epoch(1)
    next(left)
    assert_same(epoch_of(data, 0), expected)


def test_workers_are_not_in_the_runs_process_group_and_end_with_the_data(folder: Path) -> None:
    """Ctrl-C reaches every process of the terminal; the run finishes its step, for which it needs its workers."""
    before = set(multiprocessing.active_children())
    data = training(folder, batch_size=4, workers=2, **HEAVY)
    batches = data.epoch(0)
    next(batches)
    workers = set(multiprocessing.active_children()) - before
    assert len(workers) == 2
    assert all(os.getpgid(worker.pid or 0) != os.getpgid(0) for worker in workers)
    del data, batches
    for worker in workers:
        worker.join(10)
        assert not worker.is_alive()


@pytest.mark.parametrize("memory", [True, False])
def test_what_is_held_out_is_validated_and_the_rest_trained_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch, memory: bool
) -> None:
    if not memory:
        monkeypatch.setattr(image_set, "MEMORY_LIMIT_GIB", 0)
    made = recipe(held_out=14, batch_size=40, no_aug=True, val_split="train", crop_pct=1.0)
    kept = open_evaluation_data(made, folder, "train", CONFIG)
    trained = training(folder, made=made)
    assert (kept.images, trained.images, trained.steps) == (14, 40, 1)
    chosen = torch.randperm(54, generator=named_generator(7, "held_out"))[:14].sort().values
    assert all_of(kept)[1].tolist() == (chosen // 18).tolist()
    seen = {image.numpy().tobytes() for image in all_of(kept)[0]}
    again = open_evaluation_data(made, folder, "train", CONFIG, Shard(1, 2))
    assert {image.numpy().tobytes() for image in all_of(again)[0]} < seen
    for epoch in (0, 1):
        images = {image.numpy().tobytes() for image in stacked(epoch_of(trained, epoch))[0]}
        assert len(images) == 40 and not images & seen
    everything = {image.numpy().tobytes() for image in all_of(evaluation(folder, "train"))[0]}
    assert images | seen == everything
    assert trained.fingerprint != kept.fingerprint
    assert open_evaluation_data(made, folder, "val", CONFIG).images == 21, "another split is whole"


@pytest.mark.parametrize("split", ["train", "training"])
def test_what_is_trained_on_is_never_what_is_measured_on(folder: Path, split: str) -> None:
    """timm reads the folder train under both names."""
    with pytest.raises(InputError, match="is what the recipe trains on"):
        open_evaluation_data(recipe(val_split=split), folder, split, CONFIG)
    assert open_evaluation_data(recipe(held_out=5), folder, split, CONFIG).images == 5


@pytest.mark.parametrize("way", ["heavy", "rand"])
def test_data_sets_can_be_sent_to_workers_that_are_not_forked(folder: Path, way: str) -> None:
    made = recipe(**WAYS[way])
    fixed, random = training_steps(made, CONFIG)
    samples = Samples(open_source("", folder, "train"), [*fixed, *random], 7)
    items = [(1, index) for index in (3, 50, 8)]
    one, other = (each.__getitems__(items) for each in (samples, pickle.loads(pickle.dumps(samples))))
    assert torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels)


def test_pictures_are_augmented_in_one_thread_as_in_a_worker(folder: Path) -> None:
    seen = []

    def note(image: Any) -> Any:
        seen.append(torch.get_num_threads())
        return image

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        Samples(open_source("", folder, "train"), [note], 7).__getitems__([(0, 1)])
        assert (seen, torch.get_num_threads()) == ([1], 3)
    finally:
        torch.set_num_threads(before)


def test_held_out_more_than_there_is(folder: Path) -> None:
    with pytest.raises(InputError, match="held_out is 54; train has 54 images"):
        training(folder, held_out=54)


@pytest.mark.parametrize("memory", [True, False])
@pytest.mark.parametrize(("world", "batch_size"), [(2, 4), (4, 3), (30, 2)])
def test_an_evaluation_takes_every_sample_once_over_all_ranks(
    folder: Path, monkeypatch: pytest.MonkeyPatch, memory: bool, world: int, batch_size: int
) -> None:
    if not memory:
        monkeypatch.setattr(image_set, "MEMORY_LIMIT_GIB", 0)
    images, labels = all_of(evaluation(folder))
    assert labels.tolist() == [0] * 7 + [1] * 7 + [2] * 7
    for rank in range(world):
        data = evaluation(folder, shard=Shard(rank, world), batch_size=batch_size, workers=2 if rank == 0 else 0)
        got = list(data.batches())
        assert data.images == 21
        expected = images[rank::world]
        assert sum(len(part) for _, part in got) == len(expected)
        assert all(len(part) == batch_size for _, part in got[:-1])
        if len(expected):
            assert torch.equal(stacked(got)[0], expected)
            assert torch.equal(stacked(got)[1], labels[rank::world])


def test_evaluation_images_are_timms_resize_and_crop(tmp_path: Path) -> None:
    files = write_folder(tmp_path, "val", 1, size=64)
    data = open_split("", tmp_path, "val", {**CONFIG, "crop_pct": 0.5})
    images, labels = all_of(data)
    assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
    for image, file in zip(images, files, strict=True):
        torch.testing.assert_close(image, normalised(pixels_of(file)[:, 16:48, 16:48]), rtol=0, atol=1e-5)


@pytest.mark.usefixtures("any_md5")
@pytest.mark.parametrize("memory", [True, False])
def test_cifar_is_trained_on_as_it_is_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: bool) -> None:
    pixels, labels = write_cifar(tmp_path)
    if not memory:
        monkeypatch.setattr(image_set, "MEMORY_LIMIT_GIB", 0)
    made = recipe(dataset="torch/cifar10", held_out=50, batch_size=100, no_aug=True, val_split="train")
    data = training(tmp_path, made=made)
    left = sorted(torch.randperm(150, generator=named_generator(7, "held_out"))[50:].tolist())
    order = torch.randperm(100, generator=named_generator(7, "order", 0)).tolist()
    images, got = stacked(epoch_of(data))
    assert got.tolist() == [labels[left[index]] for index in order]
    expected = torch.stack([normalised(torch.from_numpy(pixels[left[index]])) for index in order])
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-5)
    assert open_evaluation_data(made, tmp_path, "train", CONFIG).images == 50
    assert open_evaluation_data(made, tmp_path, "test", CONFIG).images == 30
    zoomed = open_split("torch/cifar10", tmp_path, "test", {**CONFIG, "crop_pct": 0.5})
    for image, stored in zip(all_of(zoomed)[0], pixels[150:], strict=True):
        picture = Image.fromarray(stored.transpose(1, 2, 0)).resize((64, 64), Image.Resampling.BILINEAR)
        inner = torch.from_numpy(np.array(picture.crop((16, 16, 48, 48)))).permute(2, 0, 1)
        torch.testing.assert_close(image, normalised(inner), rtol=0, atol=1e-5)
    larger = training(tmp_path, config={**CONFIG, "input_size": (3, 48, 48)}, made=made)
    assert epoch_of(larger)[0][0].shape == (100, 3, 48, 48)
    grey = training(tmp_path, config={**CONFIG, "input_size": (1, 32, 32), "mean": (0.5,), "std": (0.5,)}, made=made)
    assert epoch_of(grey)[0][0].shape == (100, 1, 32, 32)


@pytest.mark.parametrize("way", ["pad4", "heavy", "rand"])
def test_grey_models_are_augmented_too(folder: Path, way: str) -> None:
    config = {**CONFIG, "input_size": (1, 32, 32), "mean": (0.5,), "std": (0.5,)}
    images, _ = stacked(epoch_of(training(folder, config=config, batch_size=8, **WAYS[way])))
    assert images.shape == (48, 1, 32, 32) and images.isfinite().all()


def test_more_ranks_than_work(folder: Path) -> None:
    with pytest.raises(
        InputError, match=r"54 training images do not fill one step of 64 \(batch_size 4 x 8 ranks x grad"
    ):
        training(folder, Shard(3, 8), grad_accum_steps=2)
    assert training(folder, batch_size=54).steps == 1
    assert training(folder, batch_size=28).steps == 1


def test_fingerprints_tell_data_apart_and_nothing_else(folder: Path) -> None:
    one = training(folder).fingerprint
    same = training(folder, Shard(1, 2), batch_size=8, workers=2, **HEAVY).fingerprint
    assert len(one) == 64 and one == same
    assert training(folder, train_split="val").fingerprint == evaluation(folder).fingerprint
    others = [
        training(folder, held_out=5).fingerprint,
        training(folder, held_out=5, seed=8).fingerprint,
        evaluation(folder).fingerprint,
    ]
    assert len({one, *others}) == 4
    assert evaluation(folder, shard=Shard(1, 2)).fingerprint == evaluation(folder).fingerprint


@pytest.mark.parametrize("shard", [Shard(), Shard(1, 2)])
def test_pictures_of_the_same_size_that_replace_others_are_noticed(tmp_path: Path, shard: Shard) -> None:
    files = write_folder(tmp_path)
    Image.fromarray(noise(1, 5)[0]).save(files[0], compress_level=0)
    size = files[0].stat().st_size

    def prints() -> list[str]:
        return [training(tmp_path, **HEAVY).fingerprint, evaluation(tmp_path, "train", shard=shard).fingerprint]

    before = prints()
    Image.fromarray(noise(1, 6)[0]).save(files[0], compress_level=0)
    assert files[0].stat().st_size == size
    assert not set(before) & set(prints())


def test_sets_too_large_for_memory_are_told_apart_by_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdzoo.training.data.image_set.MEMORY_LIMIT_GIB", 0)
    files = write_folder(tmp_path)
    monkeypatch.setattr(Path, "read_bytes", lambda self: pytest.fail(f"{self} is read for its digest"))
    before = training(tmp_path).fingerprint
    files[0].write_bytes(b"0" * files[0].stat().st_size)
    assert training(tmp_path).fingerprint == before
    files[0].write_bytes(b"0")
    assert training(tmp_path).fingerprint != before


def test_only_the_first_rank_downloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(self: Any) -> None:
        asked.append(self.base_folder)
        raise OSError("no network")

    monkeypatch.setattr("torchvision.datasets.CIFAR10.download", download)
    for rank in (1, 0):
        said = r"nor downloaded from http.* \(no network\)" if rank == 0 else "a run with dataset_download: true"
        with pytest.raises(InputError, match=f"torch/cifar10 cannot be read in .*{said}"):
            training(tmp_path, Shard(rank, 2), dataset="torch/cifar10", dataset_download=True)
        assert len(asked) == (rank == 0)
    with pytest.raises(InputError):
        training(tmp_path, dataset="torch/cifar10")
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ConnectionResetError(104, "Connection reset by peer"), LostProcess),
        (EOFError(), LostProcess),
        (ConnectionResetError("Caught ConnectionResetError in DataLoader worker process 0."), ConnectionResetError),
    ],
)
def test_a_worker_that_dies_while_it_hands_over_is_a_lost_process(
    error: Exception, expected: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> Iterator[None]:
        yield None
        raise error

    loader = Loader([1])  # type: ignore[arg-type]
    monkeypatch.setattr(loader, "loader", broken())
    with pytest.raises(expected), lost_workers_named():
        list(loader)
