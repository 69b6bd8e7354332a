"""``python -m hcot_lmeval`` is the command ``hcot``."""

import sys

from hcot_lmeval.command import main

if __name__ == "__main__":
    sys.exit(main())
