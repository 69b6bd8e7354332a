"""Shows what was thought and what was thrown away; see `hcot_lmeval.report.viewer.cli`, or ``--help``."""

import sys

from hcot_lmeval.command import run

if __name__ == "__main__":
    sys.exit(run("view", sys.argv[1:]))
