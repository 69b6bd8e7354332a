"""Compares models with and without pruning; see ``python scripts/compare.py --help``."""

import sys

from hcot_lmeval.report.cli import main

if __name__ == "__main__":
    sys.exit(main())
