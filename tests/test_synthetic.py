"""What all synthetic problems share: seeds, splits, the flat twin, the rows to train on."""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
import sys
from functools import partial
from typing import Any

import pytest

from hcot_lmeval import answers
from hcot_lmeval.markup import PRESETS, get_markup
from hcot_lmeval.synthetic import ALPHABET, SPLITS, TASKS, Problem, flat_trace, gold_trace, training_rows
from hcot_lmeval.synthetic.arith import sample_problem
from hcot_lmeval.synthetic.problem import distinct
from hcot_lmeval.trace import LiveContext, Malformed, push_all
from tests.synthetic_traces import ids_of, words

SMALL: dict[str, dict[str, Any]] = {"arith": {"depths": [2, 3]}, "qbf": {"sizes": [3, 5]}, "sat": {"sizes": [4, 5]}}
every_task = pytest.mark.parametrize("task", TASKS)


def take(task: str, split: str = "train", count: int = 20, seed: int = 0, **options: Any) -> list[Problem]:
    return list(itertools.islice(TASKS[task](split, seed, **(options or SMALL[task])), count))


# ---- traces


@every_task
def test_flat_twin_has_a_separator_for_every_marker(task: str) -> None:
    separators = dict(zip(get_markup("hcot").markers, "(:)", strict=True))
    for problem in take(task):
        flat, gold = words(flat_trace(problem)), words(gold_trace(problem))
        assert flat == [separators.get(word, word) for word in gold]
        assert not set("(:)") & set(problem.prompt + gold_trace(problem))  # nothing else is written so


@every_task
@pytest.mark.parametrize("markup", PRESETS)
def test_traces_in_every_notation(task: str, markup: str) -> None:
    """A flat notation cannot nest, which shows as that one malformation and no other."""
    ids, markers = ids_of(gold_trace(take(task, count=1)[0], markup), markup)
    faults = {step.malformed for step in push_all(LiveContext(markers), ids)} - {None}
    # the outer splits and closes of nested blocks find no block of their own in a flat notation
    nested = {Malformed.NESTED_OPEN, Malformed.STRAY_SPLIT, Malformed.STRAY_CLOSE}
    assert faults == (set() if get_markup(markup).nested else nested)


@every_task
def test_characters_are_those_of_the_alphabet(task: str) -> None:
    notation = {*get_markup("hcot").markers, *get_markup("hcot").think, "\\boxed{"}
    for problem in take(task, **{"depths" if task == "arith" else "sizes": [3, 8]}):
        text = problem.prompt + gold_trace(problem) + flat_trace(problem)
        assert set(words(text)) - notation <= set(ALPHABET)
    assert len(set(ALPHABET)) == len(ALPHABET)


@every_task
def test_the_checker_of_the_tasks_accepts_the_gold_answer_and_no_other(task: str) -> None:
    for problem in take(task, count=4):
        wrong = str((int(problem.answer) + 1) % (10 if task == "arith" else 2))
        assert answers.grade(gold_trace(problem), problem.answer).correct is True
        assert answers.grade(gold_trace(problem), wrong).correct is False


# ---- streams and splits


@every_task
def test_same_arguments_same_problems_other_seed_others(task: str) -> None:
    assert take(task, seed=3) == take(task, seed=3)
    assert take(task, seed=3) != take(task, seed=4)
    assert take(task, "test", seed=3) != take(task, seed=3)


@every_task
def test_splits_never_overlap(task: str) -> None:
    counts = {"train": 150, "validation": 30, "test": 30}
    seen = {split: {p.fingerprint for p in take(task, split, counts[split])} for split in SPLITS}
    for one, other in itertools.combinations(SPLITS, 2):
        assert not seen[one] & seen[other]
    assert {split: len(prints) for split, prints in seen.items()} == counts  # all distinct


def test_splits_do_not_depend_on_the_process() -> None:
    """`hash` of a string differs between processes; a fingerprint must not."""
    code = "from tests.test_synthetic import take, TASKS; print([take(t, count=3)[2].fingerprint for t in TASKS])"
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in "12"
    }
    assert outputs == {f"{[take(task, count=3)[2].fingerprint for task in TASKS]}\n".encode()}


def test_split_shares() -> None:
    rng = random.Random(0)
    splits = [sample_problem(4, rng).split for _ in range(3000)]
    shares = [splits.count(split) / 3000 for split in SPLITS]
    assert shares == pytest.approx([0.8, 0.1, 0.1], abs=0.03)


def test_a_kind_that_is_used_up_repeats_itself() -> None:
    """There are 300 problems of depth 1, about 30 of which are test problems."""
    problems = list(itertools.islice(distinct([partial(sample_problem, 1)], "test", random.Random(0)), 60))
    prints = [problem.fingerprint for problem in problems]
    assert 20 < len(set(prints)) < 60
    assert len(set(prints[:15])) == 15  # no repetition while there is choice
    assert len({problem.prompt for problem in problems}) > len(set(prints))


# ---- rows to train on


@every_task
def test_rows_are_question_trace_and_answer(task: str) -> None:
    rows = list(training_rows(task, "train", size=6, seed=2, **SMALL[task]))
    problems = take(task, count=6, seed=2)
    assert [row["question"] for row in rows] == [p.prompt for p in problems]
    assert [row["hierarchical_cot"] for row in rows] == [gold_trace(p) for p in problems]
    assert [row["expected_answer"] for row in rows] == [p.answer for p in problems]
    flat = list(training_rows(task, "train", size=6, seed=2, flat=True, **SMALL[task]))
    assert [row | {"hierarchical_cot": flat_trace(p)} for row, p in zip(rows, problems, strict=True)] == flat
    pencil = next(training_rows(task, "train", markup="pencil", seed=2, **SMALL[task]))
    assert pencil["hierarchical_cot"] == gold_trace(problems[0], "pencil")
    json.dumps(rows)


@every_task
def test_rows_by_default(task: str) -> None:
    assert len(list(itertools.islice(training_rows(task, "train"), 20))) == 20


@pytest.mark.parametrize(
    "task, split, options, message",
    [
        ("sudoku", "train", {}, "task='sudoku' is unknown; choose one of arith, qbf, sat"),
        ("qbf", "dev", {}, "split='dev' is unknown; choose one of train, validation, test"),
        (
            "qbf",
            "train",
            {"size_s": [3]},
            r"option 'size_s' of task 'qbf' is unknown.*Known are size, seed, flat, markup, sizes",
        ),
        ("arith", "train", {"sizes": [3]}, "Known are size, seed, flat, markup, depths"),
        ("sat", "train", {"sizes": [2]}, r"sizes=\[2\]: a list of numbers within 3..10"),
        ("sat", "train", {"sizes": []}, r"sizes=\[\]: a list"),
        ("qbf", "train", {"sizes": 4}, "sizes=4: a list"),
        ("arith", "train", {"depths": [0, 1]}, r"depths=\[0, 1\]: a list of numbers within 1..8"),
        ("qbf", "train", {"size": 0}, "size=0: a positive number"),
        ("qbf", "train", {"markup": "pencl"}, "choose one of hcot, pencil"),
    ],
)
def test_bad_options_are_errors_at_once(task: str, split: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        training_rows(task, split, **options)
