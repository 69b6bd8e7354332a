"""Times the preparation of data: rows through segment, check, stats and export, with rows/s and peak memory.

    python scripts/bench_prepare.py                          # 10,000 rows, minutes on two cores
    python scripts/bench_prepare.py --rows 1000 --workers 1
    python scripts/bench_prepare.py --against aime24 polymath --format parquet --json bench_prepare.json

The rows are random text in the form of chains of thought: paragraphs of sentences with discourse markers and
formulas, 700 words on average, log-normal; the same seed, the same rows. One in a hundred is a copy of an earlier one,
and as many have a wrong answer, so that something is rejected. Each step is a process of its own, as a user starts it;
memory is the largest resident size of it and its workers together, read every 50 ms.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).with_name("prepare_data.py")
WORDS = 700
"""Of a row, on average."""
SYLLABLES = "ba co di fu ga he ji ko lu ma ne po qui ra so ti un ve wo xi".split()
STARTS = (
    "Now,|So|Therefore|Wait,|Next,|But|Let me check:|Alternatively,|Thus|First,|Then|Since|Hence|We see that".split("|")
)
POLL_SECONDS = 0.05


def main() -> None:
    args = parse_args()
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        source, run = Path(folder) / "flat.jsonl", Path(folder) / "run"
        with source.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in flat_rows(args.rows, args.seed))
        print(f"{args.rows:,} rows, {source.stat().st_size / 2**20:.0f} MiB, {args.workers} workers\n")
        print(f"{'step':<9}{'seconds':>9}{'rows/s':>9}{'peak MiB':>10}")
        results = [timed(name, command, args.rows) for name, command in commands(args, source, run)]
        summary = json.loads((run / "check" / "manifest.json").read_text(encoding="utf-8"))["summary"]
        told = ", ".join(f"{code} {found['rows']}" for code, found in summary["reasons"].items())
        print(f"\nchecked: {summary['passed']} of {summary['rows']} passed; rejected: {told or 'none'}")
    if args.json:
        settings = {key: str(value) for key, value in vars(args).items()}
        args.json.write_text(json.dumps({"settings": settings, "steps": results, "check": summary}, indent=1) + "\n")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000, help="(%(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="processes of a step (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the rows (%(default)s)")
    parser.add_argument("--against", nargs="+", default=[], metavar="TASK", help="evaluation tasks to look for")
    parser.add_argument("--format", choices=("jsonl", "parquet"), default="jsonl", help="of the export (%(default)s)")
    parser.add_argument("--scratch", metavar="DIR", help="where to keep files meanwhile (that for temporary files)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    return parser.parse_args()


def commands(args: argparse.Namespace, source: Path, run: Path) -> Iterator[tuple[str, list[str]]]:
    """Yields each step with its arguments."""
    workers = ["--workers", str(args.workers)]
    yield "segment", ["segment", str(source), "--out", str(run), *workers]
    yield "check", ["check", str(run), *workers, *(["--against", *args.against] if args.against else [])]
    yield "stats", ["stats", str(run), *workers]
    yield "export", ["export", str(run), "--format", args.format]


def timed(name: str, command: list[str], rows: int) -> dict[str, Any]:
    """Runs a step, prints a line, and returns what it says."""
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    peak = 0.0
    while process.poll() is None:
        peak = max(peak, memory(process.pid))
        time.sleep(POLL_SECONDS)
    seconds = time.perf_counter() - started
    if process.returncode:
        sys.exit(f"{name} failed:\n{process.stdout.read().decode()}")  # type: ignore[union-attr]
    print(f"{name:<9}{seconds:>9.1f}{rows / seconds:>9.0f}{peak:>10.0f}", flush=True)
    return {"step": name, "seconds": seconds, "rows_per_second": rows / seconds, "peak_mib": peak}


def memory(pid: int) -> float:
    """Resident MiB of a process and all that it has started."""
    import psutil

    total = 0
    try:
        process = psutil.Process(pid)
        for one in [process, *process.children(recursive=True)]:
            total += one.memory_info().rss
    except psutil.NoSuchProcess:
        pass  # it has just ended
    return total / 2**20


# --- rows -------------------------------------------------------------------------------------------------------------


def flat_rows(count: int, seed: int) -> Iterator[dict[str, Any]]:
    """Yields rows in the columns of OpenMathReasoning."""
    rng = random.Random(seed)
    vocabulary = ["".join(rng.choices(SYLLABLES, k=rng.randint(1, 4))) for _ in range(3000)]
    copied: dict[str, Any] = {}
    for number in range(count):
        if number % 100 == 99:
            yield {**copied, "id": f"copy-{number}"}
            continue
        answer = rng.randint(0, 999)
        said = answer + 1 if number % 100 == 50 else answer
        row = {
            "id": f"row-{number}",
            "problem": sentence(rng, vocabulary) + " Find $n$.",
            "generated_solution": f"<think>\n{thinking(rng, vocabulary)}\n</think>\nThe answer is \\boxed{{{said}}}.",
            "expected_answer": str(answer),
        }
        copied = row if number % 100 < 50 else copied
        yield row


def thinking(rng: random.Random, vocabulary: list[str]) -> str:
    """Paragraphs of two to six sentences."""
    wanted, said, paragraphs = rng.lognormvariate(0, 0.6) * WORDS * 0.84, 0, []
    while said < wanted:
        sentences = [sentence(rng, vocabulary) for _ in range(rng.randint(2, 6))]
        paragraphs.append(" ".join(sentences))
        said += len(paragraphs[-1].split())
    return "\n\n".join(paragraphs)


def sentence(rng: random.Random, vocabulary: list[str]) -> str:
    """Six to eighteen words, one of them perhaps a formula."""
    words = rng.choices(vocabulary, k=rng.randint(6, 18))
    if rng.random() < 0.5:
        words.append(
            f"$x_{rng.randint(1, 9)} = {rng.randint(2, 99)} \\cdot {rng.randint(2, 99)} = {rng.randint(4, 9801)}$"
        )
    return f"{rng.choice(STARTS)} {' '.join(words)}."


if __name__ == "__main__":
    main()
