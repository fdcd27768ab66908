"""Imports point down only (CONTRIBUTING.md), and importing sdzoo brings nothing heavy along."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import sdzoo

ROOT = Path(sdzoo.__file__).parent

# From the bottom up. A module may import from its own line too, but not in a circle; a package means all in it.
LAYERS: list[set[str]] = [
    {"errors", "files", "schedule", "extras", "hardware"},
    {"digest", "gate", "parity", "calibration", "macs"},
    {"branch_ends", "fold", "residual", "blocks", "timm_blocks", "stochastic_depth", "survival"},
    {"weights", "images", "image_folder", "assets", "registry", "description", "builder"},
    {"cifar_resnet", "sd_resnet_cifar", "sd_resnetv2_cifar", "sd_resnet"},
    {"training", "deploy"},
    {"zoo", "plots", "demo", "hub"},
    {"cli", "__main__"},
]
STANDARD = set(sys.stdlib_module_names)
OPTIONAL = {
    *("onnx", "onnxruntime", "openvino", "tensorrt", "tensorrt_rtx"),
    *("tritonclient", "grpc", "google", "ray", "matplotlib"),
}
# Themselves imported where they are used, after the extra was found to be there.
NEEDS_AN_EXTRA = {"deploy.onnx_graph", "deploy.preprocess", "deploy.half", "deploy.quantize"}
TORCH_FREE = LAYERS[0]
TIMM_FREE = LAYERS[0] | LAYERS[1]

FILES = {
    ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
    for file in sorted(ROOT.rglob("*.py"))
    if file != ROOT / "__init__.py"
}


def layer(module: str) -> int:
    found = [index for index, names in enumerate(LAYERS) if module.partition(".")[0] in names]
    assert found, f"sdzoo/{module.replace('.', '/')}.py has no layer: put it into LAYERS"
    return found[0]


def imports(file: Path, only_at_import: bool = False) -> set[str]:
    """Return the modules that a file imports, ``sdzoo.`` left off its own.

    What is imported for type checkers does not count, nor, with ``only_at_import``, what a function imports.
    """
    tree = ast.parse(file.read_text(encoding="utf-8"))
    left_out: set[ast.AST] = set()
    for node in ast.walk(tree):
        types_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        lazy = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) and only_at_import
        if types_only or lazy:
            left_out.update(child for child in ast.walk(node) if child is not node)
    found: set[str] = set()
    for node in ast.walk(tree):
        if node in left_out:
            continue
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            for alias in node.names:
                inside = f"{node.module}.{alias.name}"
                found.add(inside if inside.removeprefix("sdzoo.") in FILES else str(node.module))
    return {name.removeprefix("sdzoo.") for name in found}


def own(modules: set[str]) -> set[str]:
    return {name for name in modules if name in FILES}


@pytest.mark.parametrize("module", FILES)
def test_imports_point_down(module: str) -> None:
    for imported in own(imports(FILES[module])):
        assert layer(imported) <= layer(module), f"{module} imports {imported} from above"


@pytest.mark.parametrize("module", [name for name in FILES if name.startswith(("training", "deploy"))])
def test_training_and_deployment_do_not_know_each_other(module: str) -> None:
    other = "deploy" if module.startswith("training") else "training"
    assert not [name for name in imports(FILES[module]) if name.partition(".")[0] == other]


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {module: own(imports(file, only_at_import=True)) - {module} for module, file in FILES.items()}
    while leaves := [module for module, needs in graph.items() if not needs]:
        for module in leaves:
            del graph[module]
        for needs in graph.values():
            needs.difference_update(leaves)
    assert graph == {}


@pytest.mark.parametrize("module", [name for name in FILES if name.partition(".")[0] in TIMM_FREE])
def test_the_lower_layers_need_little(module: str) -> None:
    # the lowest stands on the standard library alone, the next on torch, and timm comes above them
    allowed = STANDARD if module in TORCH_FREE else STANDARD | {"torch"}
    others = {name.partition(".")[0] for name in imports(FILES[module]) - own(imports(FILES[module]))}
    assert others - allowed == set()


@pytest.mark.parametrize("module", FILES)
def test_optional_packages_are_imported_where_they_are_used(module: str) -> None:
    at_import = imports(FILES[module], only_at_import=True)
    if module not in NEEDS_AN_EXTRA:
        assert not at_import & NEEDS_AN_EXTRA
        assert not {name.partition(".")[0] for name in at_import} & OPTIONAL


def test_the_checks_above_see_an_import(tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    file.write_text(
        "import json\nfrom typing import TYPE_CHECKING\nfrom sdzoo import weights\nfrom sdzoo.gate import Gate\n"
        "if TYPE_CHECKING:\n    import ray\n\ndef f():\n    import onnx\n    from sdzoo.training import engine\n"
    )
    assert imports(file, only_at_import=True) == {"json", "typing", "weights", "gate"}
    assert imports(file) == {"json", "typing", "weights", "gate", "onnx", "training.engine"}


def names_after(code: str) -> list[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()


def test_importing_sdzoo_brings_nothing_heavy_along() -> None:
    code = f"import sys, timm; b = set(sys.modules); import sdzoo; print(*({OPTIONAL} & (set(sys.modules) - b)))"
    assert names_after(code) == []


def test_importing_sdzoo_leaves_training_and_deployment_for_later() -> None:
    later = ("sdzoo.training", "sdzoo.deploy", "sdzoo.cli", "sdzoo.zoo", "sdzoo.plots", "sdzoo.hub")
    assert names_after(f"import sys, sdzoo; print(*(name for name in sys.modules if name.startswith({later})))") == []


def test_public_names_are_sorted_and_there() -> None:
    assert sdzoo.__all__ == sorted(sdzoo.__all__)
    for name in sdzoo.__all__:
        assert getattr(sdzoo, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = sdzoo.nothing  # type: ignore[attr-defined]
