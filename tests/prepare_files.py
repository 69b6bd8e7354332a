"""Flat rows that look like what models write, for tests of the preparation of data."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from hcot_lmeval.files import Record
from hcot_lmeval.markup import PRESETS
from hcot_lmeval.prepare.outline import assemble
from hcot_lmeval.prepare.reading import read_row
from hcot_lmeval.prepare.rows import PreparedRow
from hcot_lmeval.prepare.segmenter import SegmenterOptions, segment
from hcot_lmeval.prepare.sentences import split_sentences

STARTS = ("Now, ", "So ", "Wait, ", "Next, ", "Therefore ", "Let me check: ", "")
WORDS = "we take the sum of all terms and then look at what is left over in this case for each number".split()


def flat_row(number: int, sentences: int = 40) -> dict[str, Any]:
    """A row in the columns of OpenMathReasoning; its answer is its number."""
    rng = random.Random(number)
    said = []
    for place in range(sentences):
        words = " ".join(rng.choices(WORDS, k=rng.randint(6, 16)))
        end = f" $x_{place} = {rng.randint(1, 99)}$." if rng.random() < 0.4 else "."
        said.append(f"{rng.choice(STARTS)}{words}{end}" + ("\n\n" if rng.random() < 0.2 else " "))
    return {
        "id": f"row-{number}",
        "problem": f"What is {number} + 0, written as a number?",
        "generated_solution": f"<think>\n{''.join(said)}\n</think>\n\nIt is $\\boxed{{{number}}}$.",
        "expected_answer": str(number),
    }


def prepared(record: dict[str, Any]) -> PreparedRow:
    """The row of a flat record, segmented."""
    row = read_row(Record("here", record))
    pieces = tuple(split_sentences(row.reasoning))
    outline = segment(pieces, options=SegmenterOptions(target_tokens=60, min_tokens=30, max_tokens=120))
    return PreparedRow(row, assemble(pieces, outline, PRESETS["hcot"]), outline, pieces, {"method": "segmenter"})


def write_flat(path: Path, numbers: range, **changes: Any) -> Path:
    """Writes rows as JSONL."""
    return write_rows(path, [{**flat_row(number), **changes} for number in numbers])


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
