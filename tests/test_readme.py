"""The README: its table, its code and its commands are true."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sdzoo import weights
from sdzoo.cli import _parser
from sdzoo.registry import models
from sdzoo.training.recipe_file import find_recipe
from sdzoo.zoo import summarise

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.DOTALL)
COMMANDS = [line for _, text in BLOCKS for line in text.splitlines() if line.startswith("sdzoo ")]


def test_the_table_of_models_is_what_the_models_are() -> None:
    rows = dict(re.findall(r"^\| `(sd_\w+)` \| (.*) \|$", README, re.MULTILINE))
    assert set(rows) == set(models())
    for name, row in rows.items():
        s = summarise(name)
        tags = ", ".join(f"`{weight.partition('.')[2]}`" for weight in s.bundled)
        expected = [
            f"{s.parameters:,}",
            f"{s.macs / 1e6:,.0f} M",
            f"{s.training_macs / 1e6:,.0f} M",
            s.layers,
            s.blocks,
            f"{s.expected_live_blocks:.2f}",
            tags,
        ]
        assert [cell.strip() for cell in row.split("|")] == [str(value) for value in expected], name


def test_the_figure_of_the_bundled_weights_is_the_cards() -> None:
    measured = weights.card("sd_resnet20.cifar10_jpeg")["test_top1_percent"]
    assert f"reaches {measured:.2f} % top-1 on the test split" in README


@pytest.mark.parametrize("code", [text for language, text in BLOCKS if language == "python"])
def test_the_python_runs(code: str, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "sdzoo" / "assets", tmp_path / "sdzoo" / "assets")
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    # -P: the copied assets must not shadow the package
    script = f"import sys; sys.path[:] = [p for p in sys.path if p != '']\n{code}"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_are_understood(command: str) -> None:
    arguments = _parser().parse_args(shlex.split(command, comments=True)[1:])
    if hasattr(arguments, "recipe"):
        assert find_recipe(arguments.recipe).is_file()
    for image in getattr(arguments, "image", []):
        assert (ROOT / image).is_file()


def test_the_two_commands_are_targets() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\w+)", README, re.MULTILINE):
        assert f"\n{target}:" in makefile
