"""What holds for every folder in export/, without running it."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest
from exported import KITS

from sdzoo.assets import pictures

FOLDERS = sorted(path for path in KITS.iterdir() if path.is_dir())


def sources(folder: Path, *suffixes: str) -> list[Path]:
    """Return the kit's own files; what its fetch script brought is not its own."""
    brought = {"node_modules", "runtime", "__pycache__", "build"}
    files = [path for path in folder.rglob("*") if path.suffix in suffixes]
    return [path for path in files if not brought & set(path.relative_to(folder).parts)]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_readme_gives_the_commands(folder: Path) -> None:
    text = (folder / "README.md").read_text(encoding="utf-8")
    fenced = "\n".join(re.findall(r"^```\w*\n(.*?)^```", text, flags=re.M | re.S))
    commands = re.findall(r"^(?:    )?(?:pip|python|node|sdzoo|cmake|\./).*", f"{fenced}\n{text}", flags=re.M)
    assert len(commands) >= 2


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_kit_imports_neither_sdzoo_nor_torch(folder: Path) -> None:
    for file in sources(folder, ".py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        imported |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert not {name.split(".")[0] for name in imported} & {"sdzoo", "torch", "torchvision", "timm"}, file


def test_copies_of_pictures_py_are_equal() -> None:
    original = (KITS / "onnxruntime" / "pictures.py").read_bytes()
    copies = list(KITS.glob("*/**/pictures.py"))
    assert len(copies) >= 2
    for copy in copies:
        assert copy.read_bytes() == original, copy


def test_table_of_kits_names_each_folder() -> None:
    table = (KITS / "README.md").read_text(encoding="utf-8")
    assert [folder.name for folder in FOLDERS if f"]({folder.name}/" not in table] == []


def test_lines_of_the_smallest_kit_are_as_many_as_the_table_says() -> None:
    said = re.findall(r"(\d+) (?:lines )?of `([\w.]+)`", (KITS / "README.md").read_text(encoding="utf-8"))
    assert len(said) == 3
    for count, name in said:
        (file,) = (KITS / "onnxruntime").rglob(name)
        assert len(file.read_text(encoding="utf-8").splitlines()) == int(count), name


def test_demo_pictures_of_the_page_are_those_of_sdzoo() -> None:
    page = (KITS / "browser" / "index.html").read_text(encoding="utf-8")
    for name, picture in pictures().items():
        assert (KITS / "browser" / "demo" / picture.name).read_bytes() == picture.read_bytes()
        assert f'value="{name}"><img src="demo/{name}.jpg" alt="{name}"' in page


def test_onnxruntime_web_is_pinned_and_sealed() -> None:
    wanted = json.loads((KITS / "browser" / "package.json").read_text())["dependencies"]["onnxruntime-web"]
    packages = json.loads((KITS / "browser" / "package-lock.json").read_text())["packages"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", wanted)
    assert packages["node_modules/onnxruntime-web"]["version"] == wanted
    assert all("integrity" in package for name, package in packages.items() if name)
