"""A profile of a run: written if there is anything in it, else its absence is said."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sdzoo.training.profiling import profiler_into


def profiled(folder: Path, steps: int) -> set[str]:
    """Return the files that a run of ``steps`` leaves."""
    with profiler_into(folder) as profiler:
        for _ in range(steps):
            torch.ones(3).add(1)
            profiler.step()
    return {path.name for path in folder.iterdir()}


# torch: a profile without any GPU says so
@pytest.mark.filterwarnings("ignore:.*CUDA.*:UserWarning")
@pytest.mark.parametrize("steps", [11, 15, 20, 30])
def test_what_there_is_is_written(tmp_path: Path, steps: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert profiled(tmp_path, steps) == {"profile.txt", "trace.json"}
    assert "aten::add" in (tmp_path / "profile.txt").read_text()
    said = capsys.readouterr().out
    assert f"wrote {tmp_path / 'profile.txt'}" in said and "no profile" not in said


@pytest.mark.filterwarnings("ignore:.*CUDA.*:UserWarning")
@pytest.mark.parametrize("steps", [0, 3, 8, 9])
def test_a_run_that_is_too_short_is_told_so(tmp_path: Path, steps: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert profiled(tmp_path, steps) == set()
    said = capsys.readouterr().out
    assert said == "no profile was written: it begins after 10 steps, and this run took no more\n"


@pytest.mark.filterwarnings("ignore:.*CUDA.*:UserWarning")
def test_a_run_that_fails_early_fails_with_its_own_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), profiler_into(tmp_path):
        raise ZeroDivisionError
