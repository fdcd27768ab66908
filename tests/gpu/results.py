"""What came of the tests that need a GPU, for a file: the devices, versions, and of each test its outcome."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

import pytest

# torch and sdzoo are imported where they are used: pytest wants to be first

PACKAGES = ("sdzoo", "torch", "torchvision", "timm", "onnxruntime-gpu", "onnxruntime", "tensorrt", "tensorrt-rtx-cu13")


class Results:
    """A plugin of pytest that gathers outcomes, and the numbers that tests give to ``record_property``.

    Attributes:
        tests: By the test's id, what came of it.
        has_gpu: Whether there is one; without, no test is run.
        would_run: Then, a line for each of them.
    """

    def __init__(self) -> None:
        self.tests: dict[str, dict[str, Any]] = {}
        self.has_gpu = False
        self.would_run: list[str] = []

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Without a GPU, leave no test to run."""
        import torch

        self.has_gpu = torch.cuda.is_available()
        if not self.has_gpu:
            width = max((len(item.name) for item in items), default=0)
            self.would_run = [f"  {item.name:<{width}}  {_first_line(item)}" for item in items]
            items.clear()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note a phase of a test: its call, or a fault or a skip before or after that."""
        if report.when != "call" and report.passed:
            return
        told: dict[str, Any] = {"outcome": report.outcome, "seconds": round(report.duration, 2)}
        if report.user_properties:
            told["measured"] = dict(report.user_properties)
        if isinstance(report.longrepr, tuple):  # of a skip: file, line and reason
            told["why"] = report.longrepr[2].removeprefix("Skipped: ")
        elif report.failed:
            told["why"] = report.longreprtext[-2000:]
        self.tests[report.nodeid] = self.tests.get(report.nodeid, {}) | told

    def write(self, path: Path) -> None:
        """Write all of it as JSON."""
        import torch

        from sdzoo.files import atomic_path

        content = {
            "devices": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
            "cuda": torch.version.cuda,
            "python": platform.python_version(),
            "versions": {name: version for name in PACKAGES if (version := _version(name))},
            "tests": self.tests,
        }
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _first_line(item: pytest.Item) -> str:
    doc = getattr(getattr(item, "function", None), "__doc__", None) or ""
    return doc.strip().partition("\n")[0]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
