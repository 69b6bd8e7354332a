"""Stands in for the command lm_eval where a test is about running it: writes results at once, or dies where told to.

The environment says what it does:

    FAKE_STARTS   file that gets the model arguments of each start, a line each
    FAKE_FAULTS   JSON, part of the model arguments -> a fault:
                  crash       prints, ends with status 3, writes nothing
                  traceback   ends with an exception
                  silent      ends well, writes nothing
                  wrong       evaluates with another window than it was told to
                  version     evaluates another version of the task
                  start, results, torn results, samples, torn samples, end
                              kills its parent and itself: at the start, with the results alone written, ...
                  orphan      kills its parent alone and ends five seconds later
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from tests.result_files import build_run

SCORES = {"recompute": [1, 1, 1, 0], "off": [1, 0, 0, 0]}


def main() -> None:
    args = parse()
    with open(os.environ["FAKE_STARTS"], "a") as starts:
        starts.write(args.model_args + "\n")
    faults: dict[str, str] = json.loads(os.environ.get("FAKE_FAULTS", "{}"))
    fault = next((fault for part, fault in faults.items() if part in args.model_args), "")
    print("loading\nworking: 10%\rworking: 90%", flush=True)
    before(fault)
    evaluate(args, fault)
    after(args, fault)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--log_samples", action="store_true", required=True)
    for name in ("model", "model_args", "tasks", "output_path", "batch_size", "device", "limit", "gen_kwargs", "seed"):
        parser.add_argument(f"--{name}")
    return parser.parse_args()


def evaluate(args: argparse.Namespace, fault: str) -> None:
    given = arguments_of(args.model_args)
    window = 7 if fault == "wrong" else given.get("max_context", 0)
    policy = given.get("pruning", "off")
    build_run(
        Path(args.output_path),
        SCORES[policy][: int(args.limit or 4)],
        task=args.tasks,
        model=given["pretrained"],
        kind=args.model,
        policy=policy,
        max_context=window,
        model_args=given,
        version=2.0 if fault == "version" else 1.0,
        columns={"depth": [3, 3, 4, 4][: int(args.limit or 4)]},
        change=lambda results, samples: results.update(date=time.time_ns()),
    )


def arguments_of(text: str) -> dict[str, Any]:
    """As lm-eval reads them, as far as a grid writes them."""
    if text.startswith("{"):
        return json.loads(text)
    pairs = (pair.split("=", 1) for pair in text.split(","))
    return {key: int(value) if value.isnumeric() else value for key, value in pairs}


def before(fault: str) -> None:
    if fault == "crash":
        print("CUDA error: no kernel image\n", file=sys.stderr)
        sys.exit(3)
    if fault == "traceback":
        raise ValueError("something is wrong")
    if fault == "silent":
        sys.exit(0)
    if fault == "start":
        die()
    if fault == "orphan":
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(5)


def after(args: argparse.Namespace, fault: str) -> None:
    """Undoes what would not have been written yet."""
    [results] = Path(args.output_path).rglob("results_*.json")
    [samples] = Path(args.output_path).rglob("samples_*.jsonl")
    if fault in ("results", "torn results"):
        samples.unlink()
    if fault == "torn results":
        os.truncate(results, 100)
    if fault == "samples":
        samples.write_text(samples.read_text().partition("\n")[0] + "\n")
    if fault == "torn samples":
        os.truncate(samples, samples.stat().st_size - 10)
    if fault in ("results", "torn results", "samples", "torn samples", "end"):
        die()


def die() -> None:
    os.kill(os.getppid(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
