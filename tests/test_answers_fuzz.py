"""No text that a model can write stalls, kills or confuses the extraction and grading of answers.

By default a few hundred seeded texts; ``HCOT_LMEVAL_FULL=1`` runs 100,000 of up to 100,000 characters (half an hour).
"""

from __future__ import annotations

import json
import os
import random
import time
from collections import Counter
from pathlib import Path

from hcot_lmeval.answers import SECONDS, extract_answer, grade
from hcot_lmeval.markup import PRESETS
from hcot_lmeval.scoring.language import without_formulas

FULL = os.environ.get("HCOT_LMEVAL_FULL") == "1"
TEXTS, LONGEST = (100_000, 100_000) if FULL else (400, 20_000)
GRACE = 0.5  # seconds beyond the time limit of one check; waiting for a worker to start is not part of the check
CASES = json.loads((Path(__file__).parent / "data" / "answer_cases.json").read_text())
GOLDS = ["5", r"\frac{x}{2}", "(1,2)", r"\text{(B)}", r"x=3, y=4", r"\sqrt{3}", "[0,1)", r"0<x<2", r"5 \text{ cm}"]

# What some expression has to read again from every place, or what opens and never closes.
FRAGMENTS = [
    r"\( ", r"\[ ", "$ ", "$$ ", "$", r"\boxed{", r"\boxed ", r"\boxed{1},", r"\boxed{1} and ", r"\fbox{",
    r"\begin{a}", r"\begin{cases}", r"\end{cases}", r"\text{ and ", r"\text{a and }", r"\text{a or b}", r"\text{cm}",
    r"\text{", "{", "}", "{}", "(", ")", "(a)", "(A,", "[", "]", "|", r"\{", r"\}", r"\left(", r"\right)", r"\frac",
    r"\frac{", r"\frac12", r"\sqrt[", r"\sqrt{", "√(", r"\choose", r"{\choose ", r"\overline{", r"1\overline{3}",
    r"\label{", r"\hspace{", r"\color{", r"\pm ", r"\cup ", r"\leq ", r"\in ", r"\approx ", r"\sim ", r"\mod 3",
    r"\pmod{", r"\circ", r"^{\circ}", r"\%", "°", "^", "_", "^{", "_{", "x_1", r"L_\odot ", "=", "a=", "=a", "a=1,",
    "a=1,b=2;", "<", "(<", ">", ",", ";", ":", ".", "1.", "1,", "0.", "1", "11 ", "٣", "½", "²", "漢", "。", "\u200b",
    "\0", "\ud83d", "\\", "\\\\", "\\\\[", "&", "*", "**", "**(", "-", "+", "/", "!", "'", "~", " ", "\n", "\t", "a",
    "aa ", "A", "e", "2e-4", "i", "d", "where ", "for x ", " and ", "or ", "**answer** ", "answer ", "answer is ",
    "The answer is $", "I hope it is correct ", "I hope", "<think>", "</think>", "<|im_end|>", "```", r"\sin ",
    r"\log_", r"\sum_{", r"\int ", r"\lim ", r"\gcd(", r"\lfloor ", r"\rfloor ", r"\operatorname{floor}(",
    r"\mathrm{~m}", "m/s", "9^{9^{9}}", "100000000!",
    *(marker for markup in PRESETS.values() for marker in markup.markers),
]  # fmt: skip


def texts(generator: random.Random) -> list[str]:
    """Whole texts to cut and to spoil."""
    found = [case["response"] for case in CASES["responses"]] + [case["answer"] for case in CASES["pairs"]]
    path = Path(os.environ.get("HCOT_LMEVAL_TEST_DATA", "")) / "generations" / "amc23_generations.jsonl"
    if path.exists():
        found += [json.loads(line)["generation"] for line in path.read_text().splitlines()] * 5
    generator.shuffle(found)
    return found


def hostile(generator: random.Random, real: list[str]) -> str:
    """A text of log-uniform length: repetitions, mixtures, random characters, real texts cut and spoiled."""
    size = int(LONGEST ** generator.random())
    kind = generator.randrange(6)
    if kind == 0:
        text = generator.choice(FRAGMENTS) * size
    elif kind == 1:
        text = "".join(generator.choices(FRAGMENTS, k=generator.randint(2, 4))) * size
    elif kind == 2:
        text = "".join(generator.choices(generator.sample(FRAGMENTS, 12), k=min(size, 20_000)))
    elif kind == 3:
        alphabet = generator.choice(
            ["\\{}()[]$^_ 1a,", "0123456789.,-", "abc \n", "".join(map(chr, range(32, 0x3000, 7)))]
        )
        text = "".join(generator.choices(alphabet, k=min(size, 20_000)))
    elif kind == 4:
        whole = generator.choice(real)
        text = whole[: generator.randint(0, len(whole))] + generator.choice(FRAGMENTS) * generator.randint(0, 50)
    else:
        whole = list(generator.choice(real))
        for _ in range(generator.randint(1, 20)):
            whole.insert(generator.randint(0, len(whole)), generator.choice(FRAGMENTS))
        text = "".join(whole)
    text = text[:size] if kind < 4 else text
    frame = generator.choice(["{}", "{}", r"\boxed{{{}}}", r"so \boxed{{{}", "The answer is {}.", r"\boxed{{1}} {}"])
    return frame.replace("{{", "{").replace("}}", "}").replace("{}", text) if "{}" in frame else text


def test_no_text_stalls_or_raises():
    """Extraction takes less than two seconds, a check no longer than its limit; none fails in an unforeseen way."""
    generator, seen, slowest, failures = random.Random(0), Counter(), [("", 0.0)] * 2, []
    real = texts(generator)
    grade(r"\boxed{x}", "y")  # the worker's start is not part of a check
    for number in range(TEXTS):
        text = hostile(generator, real)
        gold = generator.choice(GOLDS)
        started = time.perf_counter()
        extract_answer(text, fallback=True)
        prose = without_formulas(text)
        middle = time.perf_counter()
        verdict = grade(text, gold, fallback=True)
        times = middle - started, time.perf_counter() - middle
        seen[verdict.reason] += 1
        slowest = [max(old, (text, new), key=lambda pair: pair[1]) for old, new in zip(slowest, times, strict=True)]
        if times[0] > 2 or times[1] > SECONDS + GRACE or verdict.reason == "error" or len(prose) > len(text):
            failures.append((times, gold, verdict, len(text), text[:200]))
        if FULL and number % 1000 == 0:
            print(number, dict(seen), [(round(t, 2), x[:60]) for x, t in slowest], len(failures), flush=True)
    if FULL:
        print(dict(seen), [(round(t, 2), x[:60]) for x, t in slowest])
    assert not failures, failures[:20]
