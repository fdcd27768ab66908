"""Recipes as files: YAML, finding, copying, headers."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdzoo.errors import InputError
from sdzoo.training.recipe import Recipe, SdzooSettings
from sdzoo.training.recipe_file import (
    RecipeHeader,
    copy_recipe,
    find_recipe,
    load_recipe,
    recipe_header,
    recipes_folder,
    shipped_recipes,
)

MINIMAL = "model: sd_resnet20\nepochs: 3\nlr: 0.1\nwarmup_epochs: 0\n"
REPOSITORY = Path(__file__).parents[2]
SHIPPED = sorted((REPOSITORY / "recipes").glob("*.yaml"))


@pytest.fixture
def written(tmp_path: Path) -> Path:
    return tmp_path / "recipe.yaml"


def load(path: Path, text: str) -> Recipe:
    path.write_text(text, encoding="utf-8")
    return load_recipe(path)


def refused(path: Path, text: str) -> str:
    """Return the error that the recipe ``text`` gives; one line, which names the file."""
    with pytest.raises(InputError) as caught:
        load(path, text)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_keys_left_out_have_their_defaults(written: Path) -> None:
    recipe = load(written, MINIMAL)
    assert recipe == Recipe(model="sd_resnet20", epochs=3, lr=0.1, warmup_epochs=0)


def test_what_is_wrong_is_said_at_once_with_the_file(written: Path) -> None:
    message = refused(written, "model: 5\nlr: fast\nhflib: 0.5\nhflip: 1.5\nsdzoo: {held_out: many}\n")
    for fault in (
        "model: 5",
        "lr: 'fast'",
        "hflib: unknown key; nearest: hflip",
        "hflip is 1.5",
        "sdzoo.held_out: 'many'",
        "epochs: missing",
    ):
        assert message.count(fault) == 1


@pytest.mark.parametrize("text", ["", "\n\n", "# only a comment\n", "---\n", "{}", "null"])
def test_empty_file(written: Path, text: str) -> None:
    assert "is empty" in refused(written, text)


@pytest.mark.parametrize(
    ("text", "kind"),
    [("- model: sd_resnet20\n", "a list"), ("sd_resnet20", "a str"), ("2026-01-01", "a date"), ("3", "a")],
)
def test_something_else_than_a_mapping(written: Path, text: str, kind: str) -> None:
    message = refused(written, text)
    assert f"is {kind}" in message
    assert "mapping of keys to values" in message


def test_duplicate_keys(written: Path) -> None:
    assert "given twice: epochs, lr" in refused(written, MINIMAL + "lr: 0.2\nepochs: 4\n")


def test_duplicate_keys_further_down(written: Path) -> None:
    assert "given twice: eps" in refused(written, MINIMAL + "opt_kwargs: {eps: 1.0, eps: 2.0}\n")


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-4", 1e-4), ("5E-3", 5e-3), ("1.e-4", 1e-4), (".5e-3", 5e-4), ("+2e+1", 20.0), ("1.5e2", 150.0), ("3", 3.0)],
)
def test_numbers_in_every_usual_spelling(written: Path, text: str, value: float) -> None:
    """PyYAML alone reads 1e-4 as a string."""
    weight_decay = load(written, MINIMAL + f"weight_decay: {text}\n").weight_decay
    assert weight_decay == value
    assert isinstance(weight_decay, float)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"drop_path": 0.5, "drop": 0.1, "lr": 1e-4, "weight_decay": 5e-4, "warmup_lr": 1e-10},
        {"mean": [0.1, 0.2, 0.3], "std": [1.0, 2.0, 3.0], "crop_pct": 0.875, "interpolation": "bicubic"},
        {
            "model_kwargs": {"schedule": "uniform", "survival_probs": None},
            "opt_kwargs": {"eps": 1e-8, "betas": [0.9, 1.0]},
        },
        {
            "train_split": "yes",
            "val_split": "~",
            "opt_kwargs": {"a": ["12", "1e5"]},
            "decay_milestones": [2, 5],
            "sched": "multistep",
        },
        {"no_aug": True, "clip_grad": 1e300},
        {"sdzoo": SdzooSettings(held_out=5000, test_split="test", trainable="head"), "val_split": "train"},
    ],
)
def test_round_trip(written: Path, changes: dict[str, Any]) -> None:
    base = Recipe(model="sd_resnet110", epochs=3, lr=0.1, warmup_epochs=0)
    recipe = dataclasses.replace(base, **changes)
    assert load(written, recipe.to_yaml()) == recipe


@pytest.mark.parametrize("name", ["1e5", "1E-4", "2.e+3"])
def test_round_trip_of_strings_that_look_like_numbers(written: Path, name: str) -> None:
    recipe = Recipe(model="sd_resnet20", epochs=3, lr=0.1, warmup_epochs=0, model_kwargs={"norm_layer": name})
    assert load(written, recipe.to_yaml()) == recipe


def test_to_yaml_writes_every_key() -> None:
    text = Recipe(model="m", epochs=1, lr=1.0).to_yaml()
    for field in dataclasses.fields(Recipe):
        assert re.search(rf"^{field.name}:", text, re.MULTILINE)


def test_find_recipe_takes_a_path(written: Path) -> None:
    written.write_text(MINIMAL)
    assert find_recipe(written) == written
    assert find_recipe(str(written)) == written


@pytest.mark.parametrize("name", ["sd_resnet21", "recipes", "", "no/such/file.yaml"])
def test_find_recipe_lists_what_ships(name: str) -> None:
    with pytest.raises(InputError) as caught:
        find_recipe(name)
    assert "\n" not in str(caught.value)
    assert f'"{name}"' in str(caught.value)
    for path in SHIPPED:
        assert path.stem in str(caught.value)


def test_recipes_lie_in_the_checkout() -> None:
    assert {path.name for path in SHIPPED} <= {path.name for path in recipes_folder().iterdir()}


def test_copy_is_the_recipe_that_ships(tmp_path: Path) -> None:
    copy = copy_recipe("smoke", tmp_path)
    assert copy == tmp_path / "smoke.yaml"
    assert copy.read_bytes() == find_recipe("smoke").read_bytes()
    assert list(tmp_path.iterdir()) == [copy]


def test_copy_overwrites_nothing(tmp_path: Path) -> None:
    (tmp_path / "smoke.yaml").write_text("mine")
    with pytest.raises(InputError, match="already exists"):
        copy_recipe("smoke", tmp_path)
    assert (tmp_path / "smoke.yaml").read_text() == "mine"


def test_copy_into_no_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a folder"):
        copy_recipe("smoke", tmp_path / "nowhere")


HEADER = """\
# A net,
# and data.
# Paper:     none: our own
# Command:   sdzoo train x
#            --data-dir y
# Hardware:  a box
# Expected:  top-1 50 % (Somebody, 2016)
# Measured:  not run

model: x # Paper: not this one
"""


def test_header(written: Path) -> None:
    written.write_text(HEADER)
    assert recipe_header(written) == RecipeHeader(
        what="A net, and data.",
        paper="none: our own",
        command="sdzoo train x --data-dir y",
        hardware="a box",
        expected="top-1 50 % (Somebody, 2016)",
        measured="not run",
    )


def test_header_that_lacks_fields(written: Path) -> None:
    written.write_text(HEADER.replace("# Measured:  not run\n", "").replace("Hardware:  a box", "Hardware:"))
    with pytest.raises(InputError, match=r"lacks: hardware, measured$"):
        recipe_header(written)


def test_shipped_recipes_are_by_name() -> None:
    assert [(name, path.name) for name, path in shipped_recipes().items()] == [(p.stem, p.name) for p in SHIPPED]


@pytest.mark.parametrize("name", ["nowhere.yaml", "."])
def test_file_that_cannot_be_read(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=re.escape(str(tmp_path))):
        load_recipe(tmp_path / name)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"\xff\xfe\x00", id="not UTF-8"),
        pytest.param(b"a: [1, 2", id="open bracket"),
        pytest.param(b"a:\n\t- b", id="tab"),
        pytest.param(b"\x00", id="zero byte"),
        pytest.param(b"a: *b", id="unknown anchor"),
        pytest.param(b"a: !!python/object/apply:os.getcwd []", id="code"),
        pytest.param(b"a: 1\n---\nb: 2", id="two documents"),
        pytest.param(b"? [1]\n: 2", id="unhashable key"),
        pytest.param(b"a: 2026-13-45", id="impossible date"),
        pytest.param(b"a: !!int x", id="tagged int that is none"),
        pytest.param(b"a: !!bool maybe", id="tagged bool that is none"),
        pytest.param(b"a: !!timestamp x", id="tagged timestamp that is none"),
        pytest.param(b"a: 0b_", id="binary number without digits"),
        pytest.param(b"!!map x", id="tagged mapping that is a scalar"),
        pytest.param(b"!!map [x]", id="tagged mapping that is a list"),
        pytest.param(b"seed: 1" + b"0" * 5000, id="more digits than Python converts"),
        pytest.param(MINIMAL.encode() + b"weight_decay: 1" + b"0" * 400, id="int too large for a float"),
        pytest.param(b"[" * 3000, id="nested too deeply"),
    ],
)
def test_yaml_that_breaks_readers(written: Path, content: bytes) -> None:
    written.write_bytes(content)
    with pytest.raises(InputError) as caught:
        load_recipe(written)
    assert "\n" not in str(caught.value)
    assert str(written) in str(caught.value)


FUZZ = settings(max_examples=200, deadline=None, derandomize=True, database=None)
KEYS = st.sampled_from([field.name for field in dataclasses.fields(Recipe)]) | st.text(max_size=8)
SETTINGS = st.sampled_from([field.name for field in dataclasses.fields(SdzooSettings)])
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12) | st.dates()
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(SCALARS, inner, max_size=3))
TOKENS = [
    "!!map",
    "!!int",
    "!!float",
    "!!set",
    "!!binary",
    "&a",
    "*a",
    "<<:",
    "? ",
    "- ",
    ": ",
    "[",
    "{",
    "\n",
    "0x",
    "1e9",
]


def loads_or_is_refused(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    message = ""
    try:
        assert isinstance(load_recipe(path), Recipe)
    except InputError as error:
        message = str(error)
    assert "\n" not in message


@FUZZ
@given(content=st.binary(max_size=200))
def test_any_bytes_load_or_are_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    loads_or_is_refused(tmp_path_factory.getbasetemp() / "bytes.yaml", content)


@FUZZ
@given(text=st.text(max_size=200) | st.lists(st.sampled_from(TOKENS) | st.text(max_size=4), max_size=12).map("".join))
def test_any_text_loads_or_is_refused(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    loads_or_is_refused(tmp_path_factory.getbasetemp() / "text.yaml", text.encode("utf-8", "surrogatepass"))


@FUZZ
@given(values=st.dictionaries(KEYS, VALUES, max_size=6), settings=st.dictionaries(SETTINGS, VALUES, max_size=3))
def test_any_mapping_loads_or_is_refused(
    tmp_path_factory: pytest.TempPathFactory, values: dict[str, Any], settings: dict[str, Any]
) -> None:
    values = values | {"sdzoo": settings} if settings else values
    text = MINIMAL + "".join(f"{key!r}: {value!r}\n" for key, value in values.items())
    loads_or_is_refused(tmp_path_factory.getbasetemp() / "mapping.yaml", text.encode("utf-8", "surrogatepass"))
