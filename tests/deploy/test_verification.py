from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from samples import FILES, blots, normalised_pixels

from sdzoo.deploy.verification import Images, check_apart, default_images, images_of, normalised
from sdzoo.errors import InputError
from sdzoo.images import input_config

CONFIG = input_config(timm.create_model("sd_resnet20"))


def numbered(count: int) -> Images:
    return Images("numbers", [f"n{i}" for i in range(count)], lambda i: np.full((1, 1, 1), i, np.uint8))


def folder_of(root: Path, *names: str) -> Path:
    for index, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(blots(1, seed=index)[0]).save(root / name)
    return root


# Batches


@pytest.mark.parametrize(
    ("count", "sizes"),
    [
        (3, [1, 2, 17, 64]),
        (84, [1, 2, 17, 64]),
        (85, [1, 2, 17, 64, 1]),
        (200, [1, 2, 17, 64, 64, 52]),
    ],
)
def test_batches_of_1_2_17_and_64_and_then_all_that_are_left(count: int, sizes: list[int]) -> None:
    given = numbered(count)
    batches = list(given.batches())
    assert [len(batch) for batch in batches] == sizes
    seen = torch.cat(batches).flatten().tolist()
    assert seen == [index % count for index in range(sum(sizes))]
    assert [given.name(place) for place in (0, 1, len(seen) - 1)] == [f"n{seen[place]}" for place in (0, 1, -1)]


@pytest.mark.parametrize("count", [1, 3, 50, 83, 84, 200])
def test_labelled_batches_have_all_sizes_and_count_each_image_once(count: int) -> None:
    given = numbered(count)
    given = Images(given.origin, given.names, given._read, ("a",), torch.arange(count))
    pairs = list(given.labelled_batches())
    assert [len(labels) for _, labels in pairs][:4] == [1, 2, 17, 64]
    assert torch.cat([labels for _, labels in pairs]).tolist() == [*range(count), *[-1] * (84 - count)]
    assert torch.equal(torch.cat([images for images, _ in pairs]), torch.cat(list(given.batches())))
    assert given.labels is not None
    assert given.labels.tolist() == list(range(count))  # its own are left alone


# What there is without a folder


def test_default_is_each_bundled_picture_eight_ways() -> None:
    given = default_images(CONFIG)
    assert (len(given), given.made, given.labels) == (80, True, None)
    assert given.origin == "10 real pictures, 8 ways each"
    got = {image.tobytes() for image in given.read(range(80)).permute(0, 2, 3, 1).contiguous().numpy()}
    expected = set()
    for file in FILES:
        pixels = np.asarray(Image.open(file))  # 32 pixels: nothing to resize
        for image in (pixels, pixels[::-1], pixels[:, ::-1], pixels[::-1, ::-1]):
            expected |= {image.tobytes(), (255 - image).tobytes()}
    assert len(expected) == 80
    assert got == expected


def test_names_of_the_default_say_how() -> None:
    given = default_images(CONFIG)
    plain = np.asarray(Image.open(FILES[0])).transpose(2, 0, 1)
    by_name = dict(zip(given.names, given.read(range(80)).numpy(), strict=True))
    name = FILES[0].name
    np.testing.assert_array_equal(by_name[name], plain)
    np.testing.assert_array_equal(by_name[f"{name}, mirrored, negative"], 255 - plain[:, :, ::-1])
    np.testing.assert_array_equal(by_name[f"{name}, upside down"], plain[:, ::-1])


@pytest.mark.parametrize("in_chans", [1, 4])
def test_default_of_other_channels_is_seeded_noise(in_chans: int) -> None:
    config = input_config(timm.create_model("sd_resnet20", in_chans=in_chans))
    given = default_images(config)
    assert (given.origin, given.made) == ("seeded noise", True)
    images = given.read(range(len(given)))
    assert (images.dtype, tuple(images.shape)) == (torch.uint8, (84, in_chans, 32, 32))
    assert images.float().mean().item() == pytest.approx(127.5, abs=1)
    np.random.seed(5)
    torch.testing.assert_close(default_images(config).read(range(84)), images, rtol=0, atol=0)


def test_normalised_is_pixel_over_255_minus_mean_over_std() -> None:
    pixels = blots(3, seed=0)
    got = normalised(torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()), CONFIG)
    np.testing.assert_allclose(got.numpy(), normalised_pixels(pixels), rtol=0, atol=1e-5)


# A folder


def test_class_folders_give_labels(tmp_path: Path) -> None:
    given = images_of(folder_of(tmp_path, "dog/2.png", "cat/10.png", "cat/9.png"), CONFIG)
    assert given.classes == ("cat", "dog")
    assert given.names == ("cat/9.png", "cat/10.png", "dog/2.png")
    assert given.labels is not None
    assert given.labels.tolist() == [0, 0, 1]
    assert (given.origin, given.made) == (f"3 pictures of {tmp_path.name}", False)
    np.testing.assert_array_equal(given.read([1])[0].permute(1, 2, 0), blots(1, seed=1)[0])


def test_a_folder_without_classes_has_no_labels(tmp_path: Path) -> None:
    given = images_of(folder_of(tmp_path, "b.png", "a.png"), CONFIG)
    assert (given.classes, given.labels, given.names) == ((), None, ("a.png", "b.png"))


def test_pictures_of_another_colour_mode_are_converted(tmp_path: Path) -> None:
    """Folders of real pictures hold grey ones."""
    Image.fromarray(blots(1, seed=1)[0]).convert("L").save(tmp_path / "grey.png")
    (image,) = images_of(tmp_path, CONFIG).read([0])
    assert torch.equal(image, image[:1].expand(3, -1, -1))


def test_a_damaged_picture_is_named_when_it_is_read(tmp_path: Path) -> None:
    folder_of(tmp_path, "a.png")
    (tmp_path / "b.png").write_bytes(b"")
    given = images_of(tmp_path, CONFIG)
    with pytest.raises(InputError, match=r"b\.png is not an image"):
        given.read([0, 1])


@pytest.mark.parametrize("kind", ["missing", "empty", "file"])
def test_folders_that_cannot_be_used(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "pictures"
    if kind == "empty":
        path.mkdir()
        (path / "notes.txt").write_text("nothing")
    elif kind == "file":
        path.write_text("nothing")
    with pytest.raises(InputError, match="expected pictures in") as caught:
        images_of(path, CONFIG)
    assert str(path) in str(caught.value)


def test_classes_are_the_models(tmp_path: Path) -> None:
    given = images_of(folder_of(tmp_path, "dog/1.png", "cat/1.png"), CONFIG)
    given.check_classes(["cat", "dog"], 2)
    given.check_classes(None, 2)
    given.check_classes(None, 0)  # no classifier: nothing to compare them with
    with pytest.raises(InputError, match=r"classes of 2 pictures of .* are cat, dog; the model's are dog, cat$"):
        given.check_classes(["dog", "cat"], 2)
    with pytest.raises(InputError, match="are of 2 classes; the model has 10"):
        given.check_classes(None, 10)
    with pytest.raises(InputError, match=r"the model's are 0, 1, 2, 3, 4 and 95 more$"):
        given.check_classes([str(index) for index in range(100)], 100)


def test_pictures_without_classes_fit_any_model(tmp_path: Path) -> None:
    images_of(folder_of(tmp_path, "1.png"), CONFIG).check_classes(["cat", "dog"], 2)


def test_copies_are_no_other_pictures(tmp_path: Path) -> None:
    """Whatever they are called. What is said to be of two classes judges nothing."""
    folder_of(tmp_path, "cat/1.png", "dog/1.png", "cat/3.png")
    shutil.copy(tmp_path / "cat/1.png", tmp_path / "cat/0.png")
    (tmp_path / "cat/2.png").symlink_to(tmp_path / "cat/1.png")
    shutil.copy(tmp_path / "cat/3.png", tmp_path / "dog/0.png")
    said = "left out: 2 copies, 2 files in two classes"
    with pytest.warns(UserWarning, match=f"^{tmp_path}: {said}$"):
        given = images_of(tmp_path, CONFIG)
    assert given.digests == [hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in given.names]
    assert given.labels is not None
    assert (given.names, given.labels.tolist()) == (("cat/0.png", "dog/1.png"), [0, 1])
    assert given.origin == f"2 pictures of {tmp_path.name} ({said})"
    batches = [indices for batch in given.order() for indices in batch]
    assert {index: batches.count(index) for index in batches} == {0: 42, 1: 42}  # they weigh alike
    one, other = (blots(1, seed)[0] for seed in (0, 1))
    np.testing.assert_array_equal(given.read([0, 1]).numpy().transpose(0, 2, 3, 1), [one, other])


def test_nothing_but_pictures_in_two_classes(tmp_path: Path) -> None:
    shutil.copy(folder_of(tmp_path, "cat/1.png", "dog/1.png") / "cat/1.png", tmp_path / "dog/1.png")
    with (
        pytest.warns(UserWarning, match="2 files in two"),
        pytest.raises(InputError, match="nothing but copies in two"),
    ):
        images_of(tmp_path, CONFIG)


def test_a_picture_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (folder_of(tmp_path, "1.png") / "2.png").symlink_to("nowhere")
    with pytest.raises(InputError, match=f"cannot read {tmp_path}/2.png: No such file"):
        images_of(tmp_path, CONFIG)


# Calibrating and judging


def test_a_picture_in_both_folders_is_found_whatever_its_name(tmp_path: Path) -> None:
    judging = folder_of(tmp_path / "judging", "cat/1.png", "dog/2.png")
    calibrating = folder_of(tmp_path / "calibrating", "x.png")
    Image.fromarray(blots(1, seed=9)[0]).save(calibrating / "x.png")
    given = images_of(judging, CONFIG)
    check_apart(images_of(calibrating, CONFIG), given)
    shutil.copy(judging / "dog/2.png", calibrating / "y.png")
    with pytest.raises(InputError) as caught:
        check_apart(images_of(calibrating, CONFIG), given)
    assert f"{calibrating}/y.png is also {judging}/dog/2.png" in str(caught.value)


def test_a_folder_is_not_apart_from_itself(tmp_path: Path) -> None:
    folder_of(tmp_path, "1.png")
    with pytest.raises(InputError, match="calibrate on other images"):
        check_apart(images_of(tmp_path, CONFIG), images_of(tmp_path, CONFIG))
