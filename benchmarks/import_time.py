"""What ``import sdzoo`` costs above ``import timm``.

    python benchmarks/import_time.py

Fresh processes take turns; in each, timm is imported first, so that what is left is sdzoo's own.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys

CODE = """
import time
a = time.perf_counter()
import timm
b = time.perf_counter()
import sdzoo
c = time.perf_counter()
print(b - a, c - b)
"""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    samples = []
    for _ in range(rounds + 1):
        done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
        samples.append(tuple(float(number) for number in done.stdout.split()))
    timm_s, above_s = zip(*samples[1:], strict=True)
    lower, median, upper = statistics.quantiles([1000 * s for s in above_s], n=4, method="inclusive")
    ratios = [(a + b) / a for a, b in samples[1:]]
    print(f"import timm: median {statistics.median(timm_s):.2f} s; import sdzoo after it: median {median:.0f} ms more")
    print(f"quartiles {lower:.0f} - {upper:.0f} ms, {rounds} fresh processes; ratio {statistics.median(ratios):.3f}")


if __name__ == "__main__":
    main()
