"""Trains a model; see ``python scripts/train.py sft --help``."""

import sys

from hcot_lmeval.command import run

if __name__ == "__main__":
    sys.exit(run("train", sys.argv[1:]))
