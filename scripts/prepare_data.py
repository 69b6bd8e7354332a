"""Prepares training data; see ``python scripts/prepare_data.py --help``."""

import sys

from hcot_lmeval.command import run

if __name__ == "__main__":
    sys.exit(run("prepare", sys.argv[1:]))
