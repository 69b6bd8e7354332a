"""Times engines on equal work; see ``python scripts/bench.py --help``."""

import sys

from bench.cli import main

if __name__ == "__main__":
    sys.exit(main())
