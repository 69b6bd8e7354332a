"""Runs the bundled models with and without pruning at three context windows, and compares them.

    python scripts/demo.py                  # everything, into ./demo_run
    python scripts/demo.py --limit 20       # fewer problems

Minutes on two CPU cores, without a network: ``tiny-hcot`` pruned, the same weights unpruned, and ``tiny-flat``, its
twin of the same size that was trained on the same steps written flat, on nested arithmetic that none of them has seen.
After one example this is `compare.py run` on the grid of scripts/configs/compare-demo.yaml, and `view_traces.py` on the
notes that it took.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout runs without being installed

GRID = Path(__file__).parent / "configs" / "compare-demo.yaml"
BASELINE = "tiny-flat, off"
EXAMPLE_DEPTH = 3
CAVEAT = """
tiny-flat is the baseline: a model of the same size, trained on the same problems and steps written flat, at the same
window. tiny-hcot with pruning off is the pruned model in contexts that it was not trained on: it says what pruning is
to this model, not what a model without pruning could do.
"""


def main() -> int:
    args = parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", str(args.threads))
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin while they wait stall on a busy machine
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        os.environ.setdefault(name, "1")
    print(example(), flush=True)
    status = compare(args) or view(args.out)
    if status == 0:
        print(headline(args.out), CAVEAT, f"Open {args.out / 'traces.html'} in a browser to read the traces.", sep="\n")
    return status


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path("demo_run"), help="directory for the results; what it holds is not run again"
    )
    parser.add_argument("--limit", type=int, default=100, help="number of test problems (at most 100)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    return parser.parse_args()


def example() -> str:
    """Lets the model solve one small problem; returns what it wrote and what of it was live in the end."""
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
    return f"\nproblem    {prompt}\ngenerated  {completion.text}\nlive       {engine.decode(completion.live_ids)}\n"


def compare(args: argparse.Namespace) -> int:
    """Evaluates the grid and prints the tables."""
    from hcot_lmeval.report.cli import main as compare_main

    options = ["--out", str(args.out), "--limit", str(args.limit), "--baseline", BASELINE]
    return compare_main(["run", str(GRID), *options])


def headline(out: Path) -> str:
    """Returns the accuracies over all problems once more; the tables above it are long."""
    [task] = json.loads((out / "comparison.json").read_text(encoding="utf-8"))["tasks"].values()
    rows = [row for row in task["tables"]["accuracy"]["rows"] if row["depth"] == "all"]
    windows = [name for name in rows[0] if name.isdecimal()]
    lines = [["accuracy, %, at a window of", *windows]]
    lines += [[row["run"], *(f"{100 * row[window]['value']:.0f}" for window in windows)] for row in rows]
    return "\n" + "\n".join(f"{name:<28}" + "".join(f"{cell:>6}" for cell in cells) for name, *cells in lines)


def view(out: Path) -> int:
    """Writes a page on which the traces can be read, with what was pruned folded in."""
    from hcot_lmeval.report.viewer.cli import main as view_main

    cell = next((out / "cells").glob("*--tiny-hcot--recompute--128--*"))
    return view_main([str(cell / "notes"), "--samples", str(cell / "results"), "--out", str(out / "traces.html")])


if __name__ == "__main__":
    sys.exit(main())
