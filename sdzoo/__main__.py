"""``python -m sdzoo``."""

import sys

from sdzoo.cli import main

sys.exit(main())
