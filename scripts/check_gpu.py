"""Checks and times the engine's path for GPUs; see ``python scripts/check_gpu.py --help``."""

import sys

from bench.gpu.cli import main

if __name__ == "__main__":
    sys.exit(main())
