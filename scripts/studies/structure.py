"""Trains under-trained models with each structure loss and says what it does to illegal traces and to accuracy.

    python scripts/studies/structure.py                      # every loss, three seeds, half a minute a run on one core
    python scripts/studies/structure.py --seeds 5 --steps 2000 --out study
    python scripts/studies/structure.py --losses none mass     # some of them

The losses differ in nothing but what is added to the cross-entropy: same data, same weights at the start for a seed,
same order. Each model then solves the same held-out problems by free-running pruned generation, greedily and sampled at
temperature 1. Finished runs are kept: started again, the script goes on where it was. It writes results.json and .md.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tiny_runs

LOSSES: dict[str, dict[str, Any]] = {
    "none": {"structure": "none"},
    "mass 1": {"structure": "mass", "weight": 1.0},
    "mass 5": {"structure": "mass", "weight": 5.0},
    "unlikelihood 1": {"structure": "unlikelihood", "weight": 1.0},
    "markers x5": {"structure": "none", "marker_weight": 5.0},
}
"""What is compared: the section ``loss`` of the settings."""
COLUMNS = ("held-out loss", "illegal", "accuracy", "completed", "illegal at T=1", "accuracy at T=1")
TEMPERATURES = (0.0, 1.0)


def main() -> None:
    args = parse_args()
    results: dict[str, list[dict[str, float]]] = {}
    for loss in args.losses:
        results[loss] = [one_run(loss, seed, args) for seed in range(args.seeds)]
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "results.json").write_text(json.dumps({"settings": described(args), "runs": results}, indent=1))
    table = markdown(results, args)
    (args.out / "results.md").write_text(table + "\n")
    print(f"\n{table}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("study_structure"), help="directory of runs and results")
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=list(LOSSES), help="losses to compare")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each loss, with seeds 0, 1, ...")
    parser.add_argument("--steps", type=int, default=250, help="optimiser steps of a run")
    parser.add_argument("--problems", type=int, default=200, help="held-out problems to solve")
    return parser.parse_args()


def described(args: argparse.Namespace) -> dict[str, Any]:
    from hcot_lmeval.provenance import hardware, versions

    settings = {"steps": args.steps, "seeds": args.seeds, "problems": args.problems, "depths": tiny_runs.DEPTHS}
    return {**settings, "hardware": hardware(), "versions": versions()}


def one_run(loss: str, seed: int, args: argparse.Namespace) -> dict[str, float]:
    """Trains and measures one model, or reads what an earlier call measured."""
    output = args.out / "runs" / f"{loss.replace(' ', '-')}-seed{seed}"
    file = output / "measured.json"
    if not file.is_file():
        print(f"\n{loss}, seed {seed}", flush=True)
        tiny_runs.train(output, args.steps, held_out=400, seed=seed, loss=LOSSES[loss])
        file.write_text(json.dumps(measure(output, args.problems)))
    return json.loads(file.read_text())


def measure(output: Path, count: int) -> dict[str, float]:
    """Lets a finished model solve held-out problems."""
    import itertools

    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hcot_lmeval.synthetic import problems
    from hcot_lmeval.tokens import encode_prompt
    from hcot_lmeval.training.monitor.curves import read_records
    from hcot_lmeval.training.monitor.evaluation import free_run

    tokenizer = AutoTokenizer.from_pretrained(output / "model")
    model = AutoModelForCausalLM.from_pretrained(output / "model")
    chosen = itertools.islice(problems("test", tiny_runs.DEPTHS), count)
    asked = [(encode_prompt(tokenizer, problem.prompt), problem.answer) for problem in chosen]
    limits: dict[str, Any] = {"max_context": 256, "max_gen_toks": 400, "batch_size": 50}
    runs = [
        free_run(model, tokenizer, asked, policy="recompute", markup="hcot", temperature=t, **limits).metrics
        for t in TEMPERATURES
    ]
    [*_, loss] = [record["eval_loss"] for record in read_records(output / "curves.jsonl") if "eval_loss" in record]
    greedy, sampled = runs
    values = (loss, greedy["illegal_traces"], greedy["accuracy"], greedy["completion"])
    return dict(zip(COLUMNS, (*values, sampled["illegal_traces"], sampled["accuracy"]), strict=True))


def markdown(results: dict[str, list[dict[str, float]]], args: argparse.Namespace) -> str:
    """Returns the table: means over the seeds, and the standard deviation between them."""
    lines = [f"| loss | {' | '.join(COLUMNS)} |", "|---" * (1 + len(COLUMNS)) + "|"]
    for loss, runs in results.items():
        cells = [_cell([run[column] for run in runs], _format(column)) for column in COLUMNS]
        lines.append(f"| {loss} | {' | '.join(cells)} |")
    note = (
        f"{args.seeds} seeds x {args.problems} problems, {args.steps} steps; mean ± standard deviation over the seeds."
    )
    return "\n".join([*lines, "", note])


def _format(column: str) -> Callable[[float], str]:
    return (lambda x: f"{x:.3f}") if "loss" in column else (lambda x: f"{100 * x:.1f} %")


def _cell(values: Sequence[float], show: Callable[[float], str]) -> str:
    spread = f" ± {show(statistics.stdev(values))}" if len(values) > 1 else ""
    return show(statistics.fmean(values)) + spread


if __name__ == "__main__":
    main()
