"""Runs the bundled models with and without pruning at one context window, and compares them.

    python scripts/demo.py                  # everything, into ./demo_run
    python scripts/demo.py --limit 20       # fewer problems

Minutes on two CPU cores, without a network: ``tiny-hcot`` pruned, the same weights unpruned, and ``tiny-flat``, its
twin of the same size that was trained on the same steps written flat. The evaluation is the plain command of
lm-evaluation-harness, on nested arithmetic that none of them has seen.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

TASK = "hcot_arith"
EXAMPLE_DEPTH = 3
ROOM = 6
"""Times the live context of the pruned run; enough for the longest of the test traces (734 tokens)."""


class Run(NamedTuple):
    """A row of the table: a bundled model, a policy, and times `--max-context`."""

    name: str
    model: str
    pruning: str
    factor: int = 1


RUNS = (
    Run("tiny-hcot, pruned", "tiny-hcot", "recompute"),
    Run("tiny-hcot, unpruned", "tiny-hcot", "off"),
    Run("tiny-flat", "tiny-flat", "off"),
    Run("tiny-flat, more room", "tiny-flat", "off", ROOM),
)
CAVEAT = (
    "The second row is the first model in contexts that it was not trained on: it says what pruning is to this model.\n"
    "The third is the fair baseline: a model of the same size, trained on the same problems and steps, at the same\n"
    "context window; the last row gives it room for every whole trace."
)


def main() -> None:
    args = parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", str(args.threads))
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin while they wait stall on a busy machine
    print(example())
    outputs = {f"{run.name}, context {run.factor * args.max_context}": evaluate(run, args) for run in RUNS}
    print(report(outputs))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo_run"), help="directory for the results")
    parser.add_argument("--limit", type=int, default=100, help="number of test problems (at most 100)")
    parser.add_argument("--max-context", type=int, default=128, help="live tokens allowed, prompt included")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    return parser.parse_args()


def evaluate(run: Run, args: argparse.Namespace) -> Path:
    """Runs lm-eval as a user would and returns its output directory.

    Raises:
        subprocess.CalledProcessError: lm-eval failed; what it said stands on the terminal.
    """
    output = args.out / "results" / "-".join(run.name.replace(",", "").split())
    model_args = {
        "pretrained": run.model,
        "pruning": run.pruning,
        "max_context": run.factor * args.max_context,
        "journal": "off",  # or a second demo would find all requests answered and measure no speed
    }
    command = ["lm_eval", "--model", "hcot", "--model_args", ",".join(f"{k}={v}" for k, v in model_args.items())]
    command += ["--tasks", TASK, "--device", "cpu", "--batch_size", "32", "--limit", str(args.limit)]
    command += ["--log_samples", "--output_path", str(output)]
    print(f"\n$ {shlex.join(command)}", flush=True)
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    subprocess.run([sys.executable, "-m", *command], check=True, env=os.environ | offline)
    return output


def example() -> str:
    """Lets the model solve one small problem; returns what it wrote and what of it was left in the end."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hcot_lmeval.assets import resolve
    from hcot_lmeval.engine import Engine, Request, SamplingParams
    from hcot_lmeval.synthetic import problems
    from hcot_lmeval.tokens import encode_prompt

    checkpoint = resolve("tiny-hcot")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    prompt = next(problems("test", [EXAMPLE_DEPTH])).prompt
    request = Request("example", tuple(encode_prompt(tokenizer, prompt)), SamplingParams(max_gen_toks=1000))
    engine = Engine(model, tokenizer, max_context=500)
    [completion] = engine.generate([request])
    return f"\nproblem    {prompt}\ngenerated  {completion.text}\nleft       {engine.decode(completion.live_ids)}"


def report(outputs: dict[str, Path]) -> str:
    """Returns the comparison of the runs."""
    from hcot_lmeval.report.table import comparison, read_run

    runs = [read_run(name, output, TASK) for name, output in outputs.items()]
    head = f"{len(runs[0].samples)} held-out problems of {TASK}"
    return f"\n{head}\n\n{comparison(runs, by='depth')}\n\n{CAVEAT}"


if __name__ == "__main__":
    main()
