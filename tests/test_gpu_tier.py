"""``make test-gpu``: says what it would run where there is no GPU, and keeps what came out where there is one."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "tests" / "gpu"
MODULES = sorted(FOLDER.glob("test_*.py"))


def functions_of(module: Path) -> list[tuple[str, str]]:
    """Return name and first docstring line of each test function."""
    tree = ast.parse(module.read_text(encoding="utf-8"))
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
    return [(node.name, (ast.get_docstring(node) or "").split("\n")[0]) for node in functions]


def test_without_a_gpu_it_says_what_it_would_run(tmp_path: Path) -> None:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, FOLDER], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    _, found, listed = done.stdout.partition("no GPU here: nothing was run.")
    assert found
    expected = [test for module in MODULES for test in functions_of(module)]
    assert len(expected) > 8
    for name, said in expected:
        assert said
        assert re.search(rf"^  {name}(\[.+\])? +{re.escape(said)}$", listed, re.MULTILINE), name
    assert list(tmp_path.iterdir()) == []


def test_other_targets_leave_these_tests_out() -> None:
    makefile = (ROOT / "Makefile").read_text()
    assert '-m "not slow and not gpu" --ignore=tests/export_kits/test_browser.py\n' in makefile
    assert "\ntest-gpu: .venv/installed\n\t$(BIN)/python tests/gpu\n" in makefile
    for module in MODULES:
        assert "\npytestmark = pytest.mark.gpu\n" in module.read_text(encoding="utf-8"), module


@pytest.fixture
def results() -> Any:
    """Return the plugin that gathers outcomes."""
    spec = importlib.util.spec_from_file_location("gpu_results", FOLDER / "results.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Results()


def report(name: str, when: Any, outcome: Any, why: Any = None, **measured: object) -> pytest.TestReport:
    return pytest.TestReport(name, ("f.py", 1, name), {}, outcome, why, when, user_properties=list(measured.items()))


def test_outcomes_and_numbers_are_kept(results: Any, tmp_path: Path) -> None:
    told = [
        *(report("good", when, "passed", time_ratio=0.5) for when in ("setup", "call", "teardown")),
        report("skipped", "setup", "skipped", ("f.py", 1, "Skipped: needs 2 GPUs")),
        report("bad", "call", "failed", "assert 1 == 2", time_ratio=0.7),
        report("untidy", "call", "passed", speed=2),
        report("untidy", "teardown", "failed", "could not clean up"),
    ]
    for one in told:
        results.pytest_runtest_logreport(one)
    results.write(tmp_path / "gpu_results.json")
    content = json.loads((tmp_path / "gpu_results.json").read_text())
    assert {
        name: {key: value for key, value in test.items() if key != "seconds"} for name, test in content["tests"].items()
    } == {
        "good": {"outcome": "passed", "measured": {"time_ratio": 0.5}},
        "skipped": {"outcome": "skipped", "why": "needs 2 GPUs"},
        "bad": {"outcome": "failed", "why": "assert 1 == 2", "measured": {"time_ratio": 0.7}},
        "untidy": {"outcome": "failed", "why": "could not clean up", "measured": {"speed": 2}},
    }
    assert {"devices", "cuda", "python", "versions"} < content.keys()
    assert {"torch", "timm"} < content["versions"].keys()
