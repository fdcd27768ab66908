"""The card says what was measured, for people and for programs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_run import DATA

from sdzoo.hub.measured import Measured, Top1, read_measured
from sdzoo.hub.model_card import Facts, model_card, schedule_in_words
from sdzoo.macs import Macs
from sdzoo.schedule import constant_depth, linear_decay, stagewise, uniform

FACTS = Facts(
    title="sd_resnet20.colours",
    address="hf-hub:org/sd_resnet20.colours",
    arch="sd_resnet20",
    license="mit",
    data_name=None,
    parameters=269_267,
    macs=Macs(40_812_672, 29_000_000.0),
    survival_probs=linear_decay(9, 0.6),
    sha256="ab" * 32,
)


@pytest.fixture
def measured(finished_run: Path) -> Measured:
    found = read_measured(finished_run)
    assert found.figures is not None
    figures = dataclasses.replace(
        found.figures, best_epoch=2, val=Top1("val", 91.666, 12), test=Top1("test", 66.667, 9)
    )
    return dataclasses.replace(found, figures=figures, training_s=5430.0, corrupt_images=1)


def changed(measured: Measured, **recipe: Any) -> Measured:
    return dataclasses.replace(measured, recipe=dataclasses.replace(measured.recipe, **recipe))


def front(card: str) -> dict[str, Any]:
    """Return what stands in front of a card, for programs."""
    return yaml.safe_load(card.split("---\n")[1])


def test_programs_read_the_figures(measured: Measured) -> None:
    data = front(model_card(FACTS, measured))
    assert (data["library_name"], data["license"], data["metrics"]) == ("timm", "mit", ["accuracy"])
    assert data["pipeline_tag"] == "image-classification" and {"timm", "sdzoo"} <= set(data["tags"])
    assert "datasets" not in data, "a folder of one's own has no name on the Hub"
    (index,) = data["model-index"]
    assert index["name"] == FACTS.title
    found = {result["dataset"]["split"]: (result["dataset"]["name"], *result["metrics"]) for result in index["results"]}
    assert found == {
        split: (DATA, {"type": "accuracy", "value": value, "name": f"top-1 on {split}, percent"})
        for split, value in (("val", 91.67), ("test", 66.67))
    }


@pytest.mark.parametrize(
    "line",
    [
        "`sd_resnet20` with stochastic depth (Huang et al., 2016), trained from scratch on three_colours.",
        "| data | three_colours: 36 training images, 1 of them corrupt and substituted |",
        "| epochs | 2 |",
        "| weights | of epoch 2, chosen on val |",
        "| top-1 on val | 91.67 % of 12 images (`val`) |",
        "| top-1 on test | **66.67 %** of 9 images (`test`), measured after training |",
        "| runs | 1 |",
        "| training time | 90 minutes |",
        "| parameters | 269,267 |",
        "| multiply-accumulates | 41 M an image; in training, on average over the gates, 29 M |",
        "| survival probabilities | linear decay, p_1 = 0.9556 to p_L = 0.6, 9 blocks; they are in the file |",
        f"| sha256 of `model.safetensors` | `{'ab' * 32}` |",
        'model = timm.create_model("hf-hub:org/sd_resnet20.colours", pretrained=True).eval()',
        '`sdzoo.load_hub("org/sd_resnet20.colours")`',
        "![Loss, error, gradient and live blocks over the run](training_curve.png)",
        "The figures are of one run and hold for three_colours alone.",
        "  author = {Huang, Gao and Sun, Yu and Liu, Zhuang and Sedra, Daniel and Weinberger, Kilian Q.},",
    ],
)
def test_people_read_the_figures(line: str, measured: Measured) -> None:
    assert line in model_card(FACTS, measured).splitlines() or line in model_card(FACTS, measured)


def test_hardware_and_software_are_the_runs(measured: Measured) -> None:
    first = measured.environment[0] | {"machine": "M", "threads": 7, "sdzoo": "1", "torch": "2", "timm": "3"}
    other = first | {"device": "NVIDIA X", "world": 2, "threads": 3}
    card = model_card(FACTS, dataclasses.replace(measured, environment=[first, other, first]))
    here, there = "M; processes: 1, threads of each: 7", "NVIDIA X; M; processes: 2, threads of each: 3"
    assert f"| hardware | {here}; then {there} |" in card
    assert "| software | sdzoo 1, torch 2, timm 3 |" in card


@pytest.mark.parametrize(
    ("data", "given", "called", "hub_id"),
    [
        ("torch/cifar10", None, "CIFAR-10", ["uoft-cs/cifar10"]),
        ("torch/svhn", None, "SVHN", ["ufldl-stanford/svhn"]),
        ("cifar10", "CIFAR-10 (JPEG)", "CIFAR-10 (JPEG)", None),
    ],
)
def test_the_data_set_is_called_what_it_was(
    data: str, given: str | None, called: str, hub_id: list[str] | None, measured: Measured
) -> None:
    facts = dataclasses.replace(FACTS, data_name=given)
    card = model_card(facts, dataclasses.replace(measured, data=data))
    assert f"trained from scratch on {called}." in card and front(card).get("datasets") == hub_id


def test_a_name_shows_as_it_is(measured: Measured) -> None:
    name = "a|b <script> `c` [d](e) *f* & \\g"
    facts = dataclasses.replace(FACTS, data_name=name)
    assert measured.figures is not None
    val = dataclasses.replace(measured.figures.val, split="v`al|")
    one = dataclasses.replace(measured, figures=dataclasses.replace(measured.figures, val=val))
    card = model_card(facts, changed(one, initial_checkpoint="<private>"))
    shown = "a&#124;b &#60;script&#62; &#96;c&#96; &#91;d&#93;(e) &#42;f&#42; &#38; &#92;g"
    assert f"fine-tuned from &#60;private&#62; on {shown}." in card
    assert f"| data | {shown}: 36 training images" in card and f"hold for {shown} alone." in card
    assert r"of 12 images (`v'al\|`) |" in card
    assert front(card)["model-index"][0]["results"][0]["dataset"]["name"] == name


def test_what_was_not_measured_is_not_said(measured: Measured) -> None:
    assert measured.figures is not None
    untested = dataclasses.replace(measured, figures=dataclasses.replace(measured.figures, test=None))
    card = model_card(FACTS, untested)
    assert "| top-1 on test | not measured |" in card
    assert [result["dataset"]["split"] for result in front(card)["model-index"][0]["results"]] == ["val"]
    for without in (None, dataclasses.replace(measured, figures=None)):
        card = model_card(FACTS, without)
        assert "| top-1 | **not measured**: published without figures |" in card
        assert not front(card).keys() & {"model-index", "metrics"}
        assert "%" not in card and "training_curve.png" not in card and "The figures" not in card


def test_a_fine_tuned_model_says_from_what(measured: Measured) -> None:
    assert "fine-tuned from first.safetensors on" in model_card(
        FACTS, changed(measured, initial_checkpoint="first.safetensors")
    )
    assert "fine-tuned from the pretrained weights of sd_resnet20 on" in model_card(
        FACTS, changed(measured, pretrained=True)
    )


@pytest.mark.parametrize(
    ("probs", "words"),
    [
        (constant_depth(9), "constant depth: every p is 1"),
        (uniform(9, 0.7), "uniform, p = 0.7"),
        (linear_decay(4, 0.5), "linear decay, p_1 = 0.875 to p_L = 0.5"),
        (stagewise([0.9, 0.7, 0.8], [3, 3, 3]), "p_1 = 0.9 to p_L = 0.8, from 0.7 to 0.9"),
    ],
)
def test_schedules_in_words(probs: list[float], words: str) -> None:
    assert schedule_in_words(probs) == words


@pytest.mark.parametrize(("seconds", "words"), [(61.4, "61 seconds"), (4500, "75 minutes"), (90_000, "25.0 hours")])
def test_times_in_words(seconds: float, words: str, measured: Measured) -> None:
    assert f"| training time | {words} |" in model_card(FACTS, dataclasses.replace(measured, training_s=seconds))


def test_a_run_that_was_forced_is_not_said_to_be_made_by_its_recipe_alone(measured: Measured) -> None:
    """Which values were others is not said: paths may be among them."""
    plain, forced = (model_card(FACTS, dataclasses.replace(measured, forced=epochs)) for epochs in ((), (2, 5)))
    assert "the last of several: resumed by force in epochs 2, 5 |" in forced
    assert "by force" not in plain
