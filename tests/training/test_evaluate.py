from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sdzoo.errors import InputError
from sdzoo.training.data.augment import normaliser
from sdzoo.training.data.loader import EvaluationData
from sdzoo.training.data.streaming import Batch
from sdzoo.training.distributed import Processes, Shard
from sdzoo.training.evaluate import DataSplit, Evaluation, evaluate, evaluate_predictor, recalibration_data

NORMALISE = normaliser((0.5, 0.4, 0.3), (0.2, 0.25, 0.3), torch.device("cpu"))


class Images(NamedTuple):
    """Images ``(N, C, H, W)`` as uint8, their labels, and the names of the classes."""

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]

    def in_batches(self, batch_size: int = 250, part: slice = slice(None)) -> EvaluationData:
        def raw() -> Iterator[Batch]:
            parts = torch.arange(len(self.labels))[part].split(batch_size)
            return (Batch(self.images[part], self.labels[part], part, {}) for part in parts)

        return EvaluationData(lambda: "", self.classes, len(self.labels), raw, NORMALISE, skip_corrupt=False)


def image_set(count: int, classes: int, seed: int = 0) -> Images:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 3, 4, 4), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, classes, (count,), generator=generator)
    return Images(images, labels, tuple(f"class{index}" for index in range(classes)))


def classifier(classes: int) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, classes))


def expected(model: nn.Module, data: Images) -> dict[str, float]:
    """Return top-1, top-5 and loss, image by image in float64."""
    model = model.double().eval()
    top1 = top5 = 0
    loss = 0.0
    for image, label in zip(data.images.numpy(), data.labels.tolist(), strict=True):
        x = (image / 255 - np.array([0.5, 0.4, 0.3])[:, None, None]) / np.array([0.2, 0.25, 0.3])[:, None, None]
        logits: list[float] = model(torch.from_numpy(x[None]))[0].tolist()
        rank = sorted(logits, reverse=True).index(logits[label])
        top1 += rank < 1
        top5 += rank < 5
        loss += math.log(sum(math.exp(value) for value in logits)) - logits[label]
    count = len(data.labels)
    return {"top1": 100 * top1 / count, "top5": 100 * top5 / count, "loss": loss / count}


@pytest.mark.parametrize("batch_size", [1, 10, 23, 250], ids=lambda size: f"batches of {size}")
@pytest.mark.parametrize("classes", [10, 5, 3])
def test_figures_whatever_the_batch_size(batch_size: int, classes: int) -> None:
    """23 images: batches of 10 leave a last one of 3, which must weigh 3 images and not a batch."""
    data = image_set(23, classes)
    result = evaluate(classifier(classes), data.in_batches(batch_size))
    truth = expected(classifier(classes), data)
    assert result.images == 23
    assert result.top1_percent == pytest.approx(truth["top1"], abs=1e-9)
    assert result.top5_percent == pytest.approx(truth["top5"], abs=1e-9)
    assert result.loss == pytest.approx(truth["loss"], rel=1e-5)
    assert 0 < truth["top1"] < 100, "the figures must be able to differ"


@pytest.mark.parametrize(("classes", "there"), [(9, 4), (4, 9)])
def test_data_of_another_number_of_classes_is_refused_whatever_the_names(classes: int, there: int) -> None:
    with pytest.raises(InputError, match=f"the data has {there} classes, the model {classes}"):
        evaluate(classifier(classes), image_set(23, there).in_batches(10))


@pytest.mark.parametrize("training", [True, False])
def test_training_mode_is_restored_and_nothing_is_changed(training: bool) -> None:
    model = classifier(10).train(training)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random_state = torch.get_rng_state()
    evaluate(model, image_set(23, 10).in_batches(10))
    assert all(module.training is training for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_modules_frozen_in_evaluation_stay_so() -> None:
    model = classifier(10).train()
    model[2].eval()
    evaluate(model, image_set(23, 10).in_batches(10))
    assert [module.training for module in model] == [True, True, False, True, True]


def test_model_with_too_few_classes_is_refused_and_its_mode_restored() -> None:
    model = classifier(5).train()
    with pytest.raises(InputError, match="10 classes, the model 5"):
        evaluate(model, image_set(23, 10).in_batches())
    assert model.training


def test_mode_is_restored_when_the_model_fails() -> None:
    class Failing(nn.Module):
        def forward(self, x: Tensor) -> Any:
            raise ZeroDivisionError

    model = Failing().train()
    with pytest.raises(ZeroDivisionError):
        evaluate(model, image_set(3, 3).in_batches())
    assert model.training


def test_half_precision_logits_are_summed_in_float32() -> None:
    class Half(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.full((len(x), 4), 30.0, dtype=torch.float16)

    assert evaluate(Half(), image_set(3000, 4).in_batches(3000)).loss == pytest.approx(math.log(4), rel=1e-5)


CONFIG: dict[str, Any] = {
    "input_size": (3, 32, 32),
    "interpolation": "bilinear",
    "crop_pct": 1.0,
    "mean": (0.5, 0.5, 0.5),
    "std": (0.25, 0.25, 0.25),
}


def brightest_channel(images: np.ndarray) -> np.ndarray:
    """Return logits of blue, green, red: each the mean of its channel."""
    assert images.dtype == np.float32
    assert np.abs(images).max() <= 2, "(x - 0.5) / 0.25 of x in [0, 1]"
    return images.mean(axis=(2, 3))[:, ::-1].copy()


@pytest.mark.parametrize("labels", [None, ["blue", "green", "red"]])
def test_predictor_is_evaluated_on_a_folder(image_folder: Path, labels: list[str] | None) -> None:
    result = evaluate_predictor(brightest_channel, labels, CONFIG, DataSplit(image_folder, "test"))
    assert (result.images, result.top1_percent, result.top5_percent) == (9, 100.0, 100.0)


def test_predictor_that_knows_nothing_is_at_chance(image_folder: Path) -> None:
    result = evaluate_predictor(
        lambda x: np.tile(np.array([0, 1, 0], np.float32), (len(x), 1)), None, CONFIG, DataSplit(image_folder, "test")
    )
    assert result.top1_percent == pytest.approx(100 / 3, abs=1e-9)
    assert result.loss == pytest.approx(math.log(2 + math.e) - 1 / 3, rel=1e-5)


@pytest.mark.parametrize("labels", [["red", "green", "blue"], ["blue", "green"], ["a", "b", "c"]])
def test_predictor_of_other_classes_is_refused(image_folder: Path, labels: list[str]) -> None:
    """The same names in another order would count the wrong ones."""
    with pytest.raises(InputError, match="are not the model's") as caught:
        evaluate_predictor(brightest_channel, labels, CONFIG, DataSplit(image_folder, "test"))
    assert "\n" not in str(caught.value)


def test_corrupt_images_are_left_out_and_named(make_image_folder: Any) -> None:
    folder = make_image_folder({"test": 3})
    bad = sorted((folder / "test" / "red").iterdir())[1]
    bad.write_bytes(b"no picture")
    with pytest.raises(InputError, match=bad.name):
        evaluate_predictor(brightest_channel, None, CONFIG, DataSplit(folder, "test"))
    result = evaluate_predictor(brightest_channel, None, CONFIG, DataSplit(folder, "test", skip_corrupt=True))
    assert (result.images, result.top1_percent, result.corrupt) == (8, 100.0, (str(bad),))


def drawn_for_batchnorm(folder: Path, number: int) -> Tensor:
    return torch.cat([images for images, _ in recalibration_data(CONFIG, DataSplit(folder, "train"), number).batches()])


@pytest.mark.parametrize("number", [40, 66])
def test_images_for_batchnorm_are_drawn_from_all_classes_and_mixed(image_folder: Path, number: int) -> None:
    """66 pictures lie in the order of their classes: the first 40 would leave one out, the first 22 are of one."""
    drawn = drawn_for_batchnorm(image_folder, number)
    assert drawn.shape == (number, 3, 32, 32)
    classes = brightest_channel(drawn.numpy()).argmax(axis=1)
    assert all(set(part) == {0, 1, 2} for part in (classes[:12], classes[-12:]))
    assert torch.equal(drawn, drawn_for_batchnorm(image_folder, number))
    assert len({image.numpy().tobytes() for image in drawn}) == number


def test_images_for_batchnorm_that_are_not_there(image_folder: Path) -> None:
    """Said before one is asked for."""
    with pytest.raises(InputError, match=r"--recalibrate-bn 67: .*train has 66 images"):
        recalibration_data(CONFIG, DataSplit(image_folder, "train"), 67)
    with pytest.raises(InputError, match="wds/x is read from end to end"):
        recalibration_data(CONFIG, DataSplit(image_folder, "train", "wds/x"), 6)


def test_parts_of_several_processes_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of 3 has samples ``rank::3`` of 23. What they tell each other is noted first, and then its sum told them."""
    data = image_set(23, 10)
    whole = evaluate(classifier(10), data.in_batches())
    told: list[tuple[float, ...]] = []

    def note(_: Processes, *values: float) -> list[float]:
        told.append(values)
        return list(values)

    def in_parts() -> list[Evaluation]:
        shards = [Shard(rank, 3) for rank in range(3)]
        return [
            evaluate(
                classifier(10),
                data.in_batches(4, slice(shard.rank, None, 3)),
                Processes(shard, torch.device("cpu")),
            )
            for shard in shards
        ]

    monkeypatch.setattr(Processes, "total", note)
    assert [result.images for result in in_parts()] == [8, 8, 7]
    sums = [sum(values) for values in zip(*told, strict=True)]
    monkeypatch.setattr(Processes, "total", lambda *_: sums)
    for result in in_parts():
        assert (result.images, result.top1_percent, result.top5_percent) == (23, whole.top1_percent, whole.top5_percent)
        assert result.loss == pytest.approx(whole.loss, rel=1e-6)


def test_without_images_there_is_nothing_to_say() -> None:
    with pytest.raises(InputError, match="there are no images to evaluate on"):
        evaluate(classifier(10), image_set(4, 10).in_batches(part=slice(0)))
