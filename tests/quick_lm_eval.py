"""The command lm_eval without what takes long: the report on the machine, and the index of its own tasks.

``DIE_AFTER=N`` in the environment: SIGKILLs its parent and itself in the middle of the N-th line of the journal.
"""

from __future__ import annotations

import os
from functools import partialmethod
from pathlib import Path
from unittest import mock

from lm_eval.__main__ import cli_evaluate
from lm_eval.tasks import TaskManager

TASKS = Path(__file__).parents[1] / "tasks" / "synthetic"


if __name__ == "__main__":
    if "DIE_AFTER" in os.environ:
        from tests.torn_lines import die_within_record

        die_within_record(int(os.environ["DIE_AFTER"]), parent=True)
    TaskManager.__init__ = partialmethod(TaskManager.__init__, include_defaults=False)
    with mock.patch("lm_eval.evaluator.add_env_info"):
        cli_evaluate()
