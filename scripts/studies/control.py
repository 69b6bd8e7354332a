"""What constraints, caps and forced answers do to illegal traces, completion, accuracy and tokens.

    python scripts/studies/control.py                       # trains two short runs, then evaluates 50 cells
    python scripts/studies/control.py --out study --limit 50

The models: tiny-hcot as it was trained and under the wrong policy (unpruned), and two that were stopped early. Each
writes greedily and at temperature 1, freely and under each means, through ``lm_eval --model hcot`` (see the grid in
OUT/greedy.yaml); the same problems and the same noise for all. Finished trainings and cells are kept. It writes
results.md beside the tables of the comparison.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # a checkout runs without being installed

MEANS: dict[str, dict[str, Any]] = {
    "free": {},
    "grammar": {"constraints": "grammar"},
    "caps": {"max_depth": 4, "max_block_tokens": 24, "max_solution_tokens": 4},
    "answer": {"force_answer": 16, "closing_tokens": 2, "loop_tokens": 64},
    "all": {
        **{"constraints": "grammar", "max_depth": 4, "max_block_tokens": 24, "max_solution_tokens": 4},
        **{"force_answer": 16, "closing_tokens": 2, "loop_tokens": 64},
    },
}
"""Name -> model arguments. A gold thought of this task has up to 14 tokens, a solution one, and blocks nest 3 deep."""
STEPS = (75, 150)
"""Optimiser steps of the trainings that were stopped early; the bundled models took 4,000."""
SAMPLING = {"greedy": {}, "sampled": {"do_sample": True, "temperature": 1.0}}
TASK, WINDOW, BUDGET = "hcot_arith_d3", 192, 300


def main() -> int:
    args = parse_args()
    for name, value in {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}.items():
        os.environ.setdefault(name, value)
    from tiny_runs import train

    trained = {f"{steps} steps": train(args.out / "runs" / f"{steps}-steps", steps) for steps in STEPS}
    from hcot_lmeval.report.cli import main as compare

    parts = []
    for name, kwargs in SAMPLING.items():
        grid, out = args.out / f"{name}.yaml", args.out / name
        write_grid(grid, trained, kwargs, args)
        status = compare(["run", str(grid), "--out", str(out), "--no-plots"])
        if status:
            return status
        parts += [f"### {name.capitalize()}", "", table(out), ""]
    (args.out / "results.md").write_text("\n".join(parts))
    print("\n".join(parts))
    return 0


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("study_control"), help="directory of models and results")
    parser.add_argument("--limit", type=int, default=100, help="problems of each cell")
    return parser.parse_args()


def write_grid(path: Path, trained: dict[str, Path], gen_kwargs: dict[str, Any], args: argparse.Namespace) -> None:
    """Writes the grid of all models and means."""
    import yaml

    models = [
        {"name": f"{model} ({means})", "pretrained": str(checkpoint), "policies": [policy], "model_args": options}
        for model, checkpoint, policy in (
            ("tiny-hcot", "tiny-hcot", "recompute"),
            ("tiny-hcot unpruned", "tiny-hcot", "off"),
            *((name, path, "recompute") for name, path in trained.items()),
        )
        for means, options in MEANS.items()
    ]
    grid = {
        "models": models,
        "windows": [WINDOW],
        "tasks": [TASK],
        "limit": args.limit,
        "batch_size": 50,
        "device": "cpu",
        "gen_kwargs": {"max_gen_toks": BUDGET, **gen_kwargs},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(grid, sort_keys=False))


def table(out: Path) -> str:
    """Returns a row for each cell: what happened, and the difference in accuracy to the same model writing freely."""
    from hcot_lmeval.report.reading import Reader
    from hcot_lmeval.report.statistics import paired

    reader = Reader(None, None, None)
    runs = {run.name.rsplit(", ", 2)[0]: run for run in reader.read([str(out)])}
    lines = [
        "| model (means) | right | against free: difference [95 %], p | ended | illegal | unclosed | tokens | forced |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, run in runs.items():
        free = runs[name.rpartition(" (")[0] + " (free)"]
        stats, count = run.requests, len(run.requests)
        test = paired(free.scores, run.scores)
        versus = f"{100 * test.difference:+.0f} [{100 * test.low:+.0f}, {100 * test.high:+.0f}], {test.p:.2g}"
        shares = [
            sum(s["finish_reason"] in ("eos", "stop") for s in stats),
            sum(s["illegal_tokens"] > 0 for s in stats),
            sum(s["malformed"].get("unclosed", 0) > 0 for s in stats),
        ]
        cells = [
            f"{100 * sum(run.scores.values()) / count:.0f} %",
            "" if run is free else versus,
            *(f"{100 * share / count:.0f} %" for share in shares),
            f"{sum(s['generated_tokens'] for s in stats) / count:.0f}",
            f"{sum(sum(s['forced'].values()) for s in stats) / count:.1f}",
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
