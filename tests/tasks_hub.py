"""A directory with a few rows of our own in the layout of the hub's data sets, and models that answer by script."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

LANGUAGES = "ar bn de en es fr id it ja ko ms pt ru sw te th vi zh".split()
LEVELS = ("low", "medium", "high", "top")
ROWS = 2
"""Rows of each level of PolyMath."""


def write_hub(root: Path) -> Path:
    """Writes the four data sets under their names on the hub."""
    numbers = range(1, 5)
    aime24 = [
        {"ID": f"2024-I-{i}", "Problem": f"What is ${i}+{i}$? {{{{7}}}}", "Solution": f"${2 * i}$", "Answer": 2 * i}
        for i in numbers
    ]
    aime25 = [{"problem": f"What is ${i}+1$?", "answer": str(i + 1), "id": str(i)} for i in numbers]
    math500 = [
        {"problem": f"Halve ${i}$.", "solution": "", "answer": f"\\frac{{{i}}}{{2}}", "subject": "Algebra", "level": 1}
        for i in numbers
    ]
    write_set(root / "Maxwell-Jia/AIME_2024", {"default": {"train": aime24}})
    write_set(root / "math-ai/aime25", {"default": {"test": aime25}})
    write_set(root / "HuggingFaceH4/MATH-500", {"default": {"test": math500}})
    polymath = {
        language: {level: [polymath_row(language, level, i) for i in range(ROWS)] for level in LEVELS}
        for language in LANGUAGES
    }
    write_set(root / "Qwen/PolyMath", polymath)
    return root


def polymath_row(language: str, level: str, index: int) -> dict[str, str]:
    question = f"{language} {level} ${index}+1$?"
    return {"id": f"{level}-{language}-{index}", "question": question, "answer": str(index + 1)}


def write_set(folder: Path, configs: dict[str, dict[str, list[dict[str, Any]]]]) -> None:
    """Writes one data set: configuration → split → rows."""
    header = ["---", "configs:"]
    for config, splits in configs.items():
        header += [f"- config_name: {config}", "  data_files:"]
        for split, rows in splits.items():
            path = folder / config / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            header += [f"  - split: {split}", f"    path: {config}/{split}.jsonl"]
    (folder / "README.md").write_text("\n".join([*header, "---", ""]), encoding="utf-8")


class Scripted(LM):
    """Answers the n-th request of a document with ``script(doc, n)`` and keeps what it was asked."""

    def __init__(self, script: Callable[[dict[str, Any], int], str]) -> None:
        super().__init__()
        self.script = script
        self.asked: list[Instance] = []

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        seen: dict[tuple[Any, Any], int] = {}
        responses = []
        for request in requests:
            key = (request.task_name, request.doc_id)
            responses.append(self.script(request.doc, seen.setdefault(key, 0)))
            seen[key] += 1
        self.asked = list(requests)
        return responses

    def loglikelihood(self, requests: Iterable[Instance]) -> list[tuple[float, bool]]:
        raise AssertionError("no task of ours asks for log-likelihoods")

    def loglikelihood_rolling(self, requests: Iterable[Instance]) -> list[float]:
        raise AssertionError("no task of ours asks for log-likelihoods")


def statistics(**changes: Any) -> dict[str, Any]:
    """The statistics of a generation of 100 tokens, 40 of them pruned."""
    return {
        "prompt_tokens": 10,
        "generated_tokens": 100,
        "pruned_tokens": 40,
        "reforwarded_tokens": 12,
        "live_tokens": 70,
        "peak_live_tokens": 80,
        "live_token_steps": 5000,
        "prune_events": 2,
        "blocks": 2,
        "max_depth": 1,
        "malformed": {},
        "illegal_tokens": 0,
        "forced": {},
        "loops": 0,
        "finish_reason": "eos",
        "wall_seconds": 2.0,
        "tokens_per_second": 50.0,
        **changes,
    }
