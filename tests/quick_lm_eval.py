"""The command lm_eval without what takes long: the report on the machine, and the index of its own tasks.

``DIE_AFTER=N`` in the environment: SIGKILLs its parent and itself in the middle of the N-th line of the journal.
"""

from __future__ import annotations

import json
import os
import signal
from functools import partialmethod
from pathlib import Path
from unittest import mock

from lm_eval.__main__ import cli_evaluate
from lm_eval.tasks import TaskManager

TASKS = Path(__file__).parents[1] / "tasks" / "synthetic"


def die_after(lines: int) -> None:
    from hcot_lmeval.lm.journal import Journal

    write, written = Journal._write, [0]

    def torn(self: Journal, record: dict) -> int:
        written[0] += "key" in record
        if written[0] < lines:
            return write(self, record)
        os.write(self._file.fileno(), json.dumps(record).encode()[:25])
        os.kill(os.getppid(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)

    Journal._write = torn


if __name__ == "__main__":
    if "DIE_AFTER" in os.environ:
        die_after(int(os.environ["DIE_AFTER"]))
    TaskManager.__init__ = partialmethod(TaskManager.__init__, include_defaults=False)
    with mock.patch("lm_eval.evaluator.add_env_info"):
        cli_evaluate()
