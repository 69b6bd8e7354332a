"""Run as a process of its own by test_lm_runs.py: an evaluation that can be killed, or that is one of several ranks.

    python tests/lm_process.py CHECKPOINT OUT [name=value ...]

Writes the results of rank 0 to OUT. `die_after=N` makes the process SIGKILL itself in the middle of the N-th line of
the journal, so that the line is torn.
"""

import json
import os
import signal
import sys

import lm_eval
import lm_eval.evaluator
import torch
from lm_eval.tasks import TaskManager
from lm_eval.utils import setup_logging
from lm_tasks import generation_task

from hcot_lmeval.journal import Journal
from hcot_lmeval.lm import HcotLM

TASK = {"docs": 7, "repeats": 2, "do_sample": True, "temperature": 1.0, "max_gen_toks": 40}


def die_after(lines: int) -> None:
    write, written = Journal._write, [0]

    def torn(self: Journal, record: dict) -> int:
        if "key" in record:
            written[0] += 1
        if written[0] == lines:
            os.write(self._file.fileno(), json.dumps(record).encode()[:25])
            os.kill(os.getpid(), signal.SIGKILL)
        return write(self, record)

    Journal._write = torn


def main(checkpoint: str, out: str, *pairs: str) -> None:
    torch.set_num_threads(1)
    setup_logging()
    lm_eval.evaluator.add_env_info = lambda results: None  # 20 seconds, and no matter of ours
    arguments = dict(pair.split("=") for pair in pairs)
    if "die_after" in arguments:
        die_after(int(arguments.pop("die_after")))
    lm = HcotLM(pretrained=checkpoint, device="cpu", dtype="float64", max_context=256, batch_size=3, **arguments)
    manager = TaskManager(include_defaults=False)
    result = lm_eval.simple_evaluate(lm, tasks=[generation_task(**TASK)], task_manager=manager)
    with open(f"{out}.{lm.rank}", "w") as file:
        json.dump({"rank": lm.rank, "world": lm.world_size, "generated": lm.engine.live.requests_done}, file)
    if result is not None:
        with open(out, "w") as file:
            json.dump({"samples": result["samples"], "hcot": result["config"]["hcot"]}, file, default=str)


if __name__ == "__main__":
    main(*sys.argv[1:])
