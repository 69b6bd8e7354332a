"""A whole evaluation, here or as a process of its own that can be killed or is one of several ranks.

    python tests/lm_process.py CHECKPOINT OUT [name=value ...]

Writes the results of rank 0 to OUT and the facts of each rank to OUT.RANK. `die_after=N` makes the process SIGKILL
itself in the middle of the N-th line of the journal, so that the line is torn.
"""

import json
import sys
from unittest import mock

import lm_eval
import torch
from lm_eval.tasks import TaskManager

from hcot_lmeval.lm import HcotLM
from tests.lm_tasks import generation_task
from tests.torn_lines import die_within_record

TASK = {"docs": 7, "repeats": 2, "do_sample": True, "temperature": 1.0, "max_gen_toks": 40}


def evaluate(checkpoint: str, **arguments: str) -> tuple[HcotLM, dict | None]:
    lm = HcotLM(pretrained=checkpoint, device="cpu", dtype="float64", max_context=256, batch_size=3, **arguments)
    manager = TaskManager(include_defaults=False)
    with mock.patch("lm_eval.evaluator.add_env_info"):  # takes 20 seconds and is no matter of ours
        result = lm_eval.simple_evaluate(lm, tasks=[generation_task(**TASK)], task_manager=manager)
    if result is None:
        return lm, None
    plain = {"samples": result["samples"]["tiny_generation"], "hcot": result["config"]["hcot"]}
    return lm, json.loads(json.dumps(plain, default=str))


def main(checkpoint: str, out: str, *pairs: str) -> None:
    torch.set_num_threads(1)
    arguments = dict(pair.split("=") for pair in pairs)
    if "die_after" in arguments:
        die_within_record(int(arguments.pop("die_after")))
    lm, result = evaluate(checkpoint, **arguments)
    facts = {"world": lm.world_size, "generated": lm.engine.live.requests_done}
    for path, value in ((f"{out}.{lm.rank}", facts), (out, result)):
        if value is not None:
            with open(path, "w") as file:
                json.dump(value, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
