"""Draw the README's picture of the survival schedules.

python benchmarks/schedule_plot.py -o docs/schedules.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

from sdzoo.plots import draw_schedules


def main() -> None:
    """Draw it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/schedules.png"))
    output = parser.parse_args().output
    output.parent.mkdir(parents=True, exist_ok=True)
    draw_schedules(output)
    print(f"wrote {output}")


if __name__ == "__main__":
    main()
