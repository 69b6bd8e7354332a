"""The comparison table, from files as lm-eval writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hcot_lmeval.report.table import comparison, read_run

STAMP = "2026-01-01T00-00-00.000001"


def write_run(directory: Path, right: list[bool], *, stamp: str = STAMP, model: str = "hcot", **stats: int) -> None:
    directory = directory / "org__model"
    directory.mkdir(parents=True, exist_ok=True)
    totals = {"peak_live_tokens": 99, "tokens_per_second": 1234.4}
    (directory / f"results_{stamp}.json").write_text(json.dumps({"config": {model: totals}}))
    base = {"generated_tokens": 10, "pruned_tokens": 4, "reforwarded_tokens": 2, "prune_events": 1}
    samples: list[dict[str, Any]] = [
        {
            "doc": {"depth": 3 + i % 2},
            "acc": float(r),
            "completed": 1.0,
            "requests": [base | {"peak_live_tokens": 40 + i} | stats],
        }
        for i, r in enumerate(right)
    ]
    (directory / f"samples_arith_{stamp}.jsonl").write_text("".join(json.dumps(s) + "\n" for s in samples))


def test_table_of_two_runs(tmp_path: Path) -> None:
    write_run(tmp_path / "a", [True, True, True, False])
    write_run(tmp_path / "b", [False, False, True, False], pruned_tokens=0)
    table = comparison([read_run(name, tmp_path / name, "arith") for name in "ab"], by="depth")
    head, _, first, second, *rest = table.splitlines()
    names = "run accuracy completed generated pruned re-forwarded prunes peak live tokens/s depth 3 depth 4"
    assert head.split() == names.split()
    assert first.split() == ["a", "75.0%", "100.0%", "10", "4", "2", "1.0", "42,", "99", "1234", "100%", "50%"]
    assert second.split()[:5] == ["b", "25.0%", "100.0%", "10", "0"]
    assert len({len(line) for line in (head, first, second)}) == 1
    assert sum(line.startswith(("peak live ", "depth 4 ")) for line in rest) == 2  # every column is explained


def test_newest_run_counts(tmp_path: Path) -> None:
    write_run(tmp_path, [False])
    write_run(tmp_path, [True], stamp=STAMP.replace("2026", "2027"))
    assert read_run("x", tmp_path, "arith").mean("acc") == 1


def test_missing_run_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="--log_samples --output_path"):
        read_run("x", tmp_path, "arith")


def test_run_of_another_model_is_refused(tmp_path: Path) -> None:
    write_run(tmp_path, [True], model="hf")
    with pytest.raises(ValueError, match="run lm_eval with --model hcot"):
        read_run("x", tmp_path, "arith")
