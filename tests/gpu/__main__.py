"""``make test-gpu``: run what needs a GPU and write ``gpu_results.json``; without a GPU say what would run.

``python tests/gpu -k speed``: what follows goes to pytest, to choose.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from results import Results

OUTPUT = Path("gpu_results.json")


def main() -> int:
    """Return pytest's exit code; 0 without a GPU if the tests could be collected."""
    results = Results()
    code = pytest.main([str(Path(__file__).parent), "-m", "gpu", "-v", "--no-header", *sys.argv[1:]], plugins=[results])
    if results.has_gpu:
        results.write(OUTPUT)
        print(f"wrote {OUTPUT}")
    elif code == pytest.ExitCode.NO_TESTS_COLLECTED and results.would_run:
        print(f"no GPU here: nothing was run. With one, these would be, and {OUTPUT} written:")
        print("\n".join(results.would_run))
        code = pytest.ExitCode.OK
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
