"""Compares models with and without pruning; see ``python scripts/compare.py --help``."""

import sys

from hcot_lmeval.command import run

if __name__ == "__main__":
    sys.exit(run("compare", sys.argv[1:]))
