"""Prepares training data; see ``python scripts/prepare_data.py --help``."""

import sys

from hcot_lmeval.prepare.cli import main

if __name__ == "__main__":
    sys.exit(main())
