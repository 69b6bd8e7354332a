"""Says why a checkpoint loops, breaks the notation or never ends; see `hcot_lmeval.diagnosis.cli`, or ``--help``."""

import sys

from hcot_lmeval.command import run

if __name__ == "__main__":
    sys.exit(run("diagnose", sys.argv[1:]))
