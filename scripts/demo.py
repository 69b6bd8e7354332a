"""Trains a tiny model that prunes its thoughts, runs it with and without pruning, and compares the two.

    python scripts/demo.py                  # everything, into ./demo_run; a finished training is not repeated
    python scripts/demo.py --limit 20       # fewer problems

The model is made on the spot, no network is needed, two CPU cores suffice. Training sees random nested arithmetic
problems (`hcot_lmeval.synthetic`), evaluation is the plain command of lm-evaluation-harness on problems held out.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

TASK = "hcot_arith"
CURRICULUM = ((0.18, (1, 2, 3)), (0.17, (1, 2, 3, 4)), (0.65, (1, 2, 3, 4, 5, 6)))
"""(share of the steps, depths of the problems): short problems first, of which a batch holds more."""
HELD_OUT_BATCHES = 8
EXAMPLE_DEPTH = 3
ROOM = 6
"""Times the live context of the pruned run; enough for the longest of the test traces (734 tokens)."""
CAVEAT = (
    "The weights were trained on pruned contexts alone. Unpruned they fail for want of practice as much as of room:\n"
    "the lower rows say what pruning is to this model, not how well a model trained without it would do."
)
SETTINGS = "training.json"
"""Beside the weights: the settings of the training and its curve."""


def main() -> None:
    args = parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", str(args.threads))
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin while they wait stall on a busy machine
    checkpoint = args.out / "model"
    settings = {
        "steps": args.steps,
        "seed": args.seed,
        "curriculum": [[share, list(depths)] for share, depths in CURRICULUM],
        "code": training_code(),
    }
    if is_trained(checkpoint, settings):
        print(f"{checkpoint} was trained with these settings already")
    else:
        train(checkpoint, settings)
    print(example(checkpoint))
    # the first two differ in nothing but pruning; the last gives the baseline room for every whole trace
    settings_of = {"pruned": ("recompute", 1), "unpruned": ("off", 1), "unpruned, more room": ("off", ROOM)}
    evaluations = {
        f"{name}, context {factor * args.max_context}": {"pruning": policy, "max_context": factor * args.max_context}
        for name, (policy, factor) in settings_of.items()
    }
    outputs = {name: evaluate(checkpoint, args, name, options) for name, options in evaluations.items()}
    print(report(outputs, args.max_context))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo_run"), help="directory for weights and results")
    parser.add_argument("--steps", type=int, default=1500, help="optimiser steps of the training")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and training problems")
    parser.add_argument("--limit", type=int, default=100, help="number of test problems (at most 100)")
    parser.add_argument("--max-context", type=int, default=128, help="live tokens allowed, prompt included")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    return parser.parse_args()


def training_code() -> str:
    """A digest of the code that makes problems and model, so that a checkpoint of older code is made anew."""
    package = Path(__file__).parents[1] / "hcot_lmeval"
    files = [package / "synthetic.py", package / "trace.py", *sorted((package / "training").glob("*.py"))]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def is_trained(checkpoint: Path, settings: dict[str, Any]) -> bool:
    record = checkpoint / SETTINGS
    return record.is_file() and json.loads(record.read_text(encoding="utf-8"))["settings"] == settings


def train(checkpoint: Path, settings: dict[str, Any]) -> None:
    """Trains the model and saves it with its tokenizer; the settings come last, as the sign that all is there."""
    import itertools

    from hcot_lmeval.training.loop import LoopConfig, arithmetic_plans, batches
    from hcot_lmeval.training.loop import train as optimise
    from hcot_lmeval.training.tiny import tiny_model, tiny_tokenizer

    seed, curriculum = settings["seed"], settings["curriculum"]
    tokenizer = tiny_tokenizer()
    model = tiny_model(tokenizer, seed)
    config = LoopConfig(steps=settings["steps"])

    def stream(split: Any, depths: list[int], count: int) -> Any:
        plans = arithmetic_plans(tokenizer, split, depths, seed=seed)
        return itertools.islice(batches(plans, config, tokenizer.pad_token_id), count)

    print(f"training {model.num_parameters():,} parameters ...", flush=True)
    stages = [stream("train", depths, math.ceil(share * config.steps)) for share, depths in curriculum]
    held_out = list(stream("validation", curriculum[-1][1], HELD_OUT_BATCHES))
    start = time.monotonic()
    curve = optimise(model, itertools.chain(*stages), held_out, config)
    seconds = time.monotonic() - start
    print(f"{seconds:.0f} s, held-out loss {curve[-1]['held_out_loss']:.4f} nats a token")
    model.save_pretrained(checkpoint)
    tokenizer.save_pretrained(checkpoint)
    record = {"settings": settings, "seconds": round(seconds, 1), "curve": curve}
    (checkpoint / SETTINGS).write_text(json.dumps(record, indent=1), encoding="utf-8")


def evaluate(checkpoint: Path, args: argparse.Namespace, name: str, options: dict[str, Any]) -> Path:
    """Runs lm-eval as a user would and returns its output directory.

    Raises:
        subprocess.CalledProcessError: lm-eval failed; what it said stands on the terminal.
    """
    output = args.out / "results" / "-".join(name.replace(",", "").split())
    # without a journal, or a second demo would find all requests answered and measure no speed
    model_args = {"pretrained": checkpoint, **options, "journal": "off"}
    command = ["lm_eval", "--model", "hcot", "--model_args", ",".join(f"{k}={v}" for k, v in model_args.items())]
    command += ["--tasks", TASK, "--device", "cpu", "--batch_size", "32", "--limit", str(args.limit)]
    command += ["--log_samples", "--output_path", str(output)]
    print(f"\n$ {shlex.join(command)}", flush=True)
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    subprocess.run([sys.executable, "-m", *command], check=True, env=os.environ | offline)
    return output


def example(checkpoint: Path) -> str:
    """Lets the model solve one small problem; returns what it wrote and what of it was left in the end."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hcot_lmeval.engine import Engine, Request, SamplingParams
    from hcot_lmeval.synthetic import problems
    from hcot_lmeval.tokens import encode_prompt

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    prompt = next(problems("test", [EXAMPLE_DEPTH])).prompt
    request = Request("example", tuple(encode_prompt(tokenizer, prompt)), SamplingParams(max_gen_toks=1000))
    engine = Engine(model, tokenizer, max_context=500)
    [completion] = engine.generate([request])
    return f"\nproblem    {prompt}\ngenerated  {completion.text}\nleft       {engine.decode(completion.live_ids)}"


def report(outputs: dict[str, Path], max_context: int) -> str:
    """Returns the comparison of the runs."""
    from hcot_lmeval.report.table import comparison, read_run

    runs = [read_run(name, output, TASK) for name, output in outputs.items()]
    problems = len(runs[0].samples)
    head = f"{problems} held-out problems of {TASK}, one model"
    return f"\n{head}\n\n{comparison(runs, by='depth')}\n\n{CAVEAT}"


if __name__ == "__main__":
    main()
