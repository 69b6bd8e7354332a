"""Nested arithmetic: the problems are what they claim, the gold traces right and legal."""

from __future__ import annotations

import itertools
import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hcot_lmeval.synthetic import TEST_DEPTHS, arith_dataset, arith_problems, gold_trace, problems
from hcot_lmeval.synthetic.arith import MAX_DEPTH, ArithProblem, Definition, sample_problem
from hcot_lmeval.trace import Policy
from tests.synthetic_traces import check_legality, run, words

seeded = given(depth=st.integers(1, 7), seed=st.integers(0, 10**6))


def draw(depth: int, seed: int) -> ArithProblem:
    return sample_problem(depth, random.Random(seed))


def solve(prompt: str) -> int:
    """Reads the prompt alone and lets Python do the arithmetic: nothing of the module under test is used."""
    *definitions, question = prompt.rstrip("?").split(";")
    env = dict(definition.split("=") for definition in definitions)

    def expand(name: str) -> str:
        return "(" + re.sub("[a-z]", lambda match: expand(match[0]), env[name]) + ")"

    return eval(expand(question)) % 10


@seeded
@settings(max_examples=60)
def test_gold_answer_is_right_by_an_independent_evaluation(depth: int, seed: int) -> None:
    problem = draw(depth, seed)
    assert problem.value == solve(problem.prompt)
    assert gold_trace(problem).endswith(f"</think>\\boxed{{{solve(problem.prompt)}}}")


@seeded
@settings(max_examples=60)
def test_every_block_of_the_gold_trace_is_an_evaluation_with_the_right_value(depth: int, seed: int) -> None:
    problem = draw(depth, seed)
    env, stack = problem.prompt.rpartition(";")[0], []
    tokens = iter(words(gold_trace(problem)))
    for token in tokens:
        if token == "[THOUGHT]":
            stack.append(next(tokens))
        elif token == "[SOLUTION]":
            assert next(tokens) == str(solve(f"{env};{stack.pop()}?"))
            assert next(tokens) == "[RETURN]"
    assert not stack


@pytest.mark.parametrize("policy", [Policy.RECOMPUTE, Policy.EVICT])
@seeded
@settings(max_examples=30)
def test_gold_traces_are_legal_and_only_the_value_survives(policy: Policy, depth: int, seed: int) -> None:
    problem = draw(depth, seed)
    steps = check_legality(problem, policy)
    assert max(step.depth for step in steps) == problem.depth


def test_the_live_context_grows_slowly_and_the_trace_fast() -> None:
    """The point of these problems: two more levels quadruple the trace and add a constant to the peak."""

    def sizes(depth: int) -> tuple[float, float]:
        runs = [run(problem)[0] for problem in itertools.islice(problems("train", [depth]), 20)]
        return sum(context.peak for context in runs) / 20, sum(context.length for context in runs) / 20

    (peak4, length4), (peak6, length6), (peak8, length8) = sizes(4), sizes(6), sizes(8)
    assert length8 > 2.5 * length6 > 2.5 * 2 * length4
    assert peak8 - peak6 == pytest.approx(peak6 - peak4, abs=12)


def test_problems_are_pinned() -> None:
    """Published results name a seed; if this fails, raise the version of the task."""
    assert [problem.prompt for problem in itertools.islice(problems("test", [1, 2, 3]), 3)] == PINNED
    assert [problem.prompt for problem in itertools.islice(arith_problems("test", 0, [1, 2, 3]), 3)] == PINNED


PINNED = ["o=8-4;o?", "h=7+1;d=l+l;l=8*3;d?", "o=3*d;d=m+m;b=1-7;j=b-m;m=4+3;o?"]


def test_fingerprint_ignores_names_order_and_unreached_definitions() -> None:
    problem = ArithProblem((Definition("a", "b", "-", "3"), Definition("b", "4", "*", "4")), "a", 2)
    renamed = ArithProblem(
        (Definition("a", "4", "*", "4"), Definition("x", "1", "+", "1"), Definition("q", "a", "-", "3")), "q", 2
    )
    changed = ArithProblem((Definition("a", "3", "-", "b"), Definition("b", "4", "*", "4")), "a", 2)
    assert problem.fingerprint == renamed.fingerprint != changed.fingerprint


@pytest.mark.parametrize("depth", [0, MAX_DEPTH + 1])
def test_depth_out_of_range(depth: int) -> None:
    with pytest.raises(ValueError, match=rf"depth={depth} is outside 1\.\.{MAX_DEPTH}"):
        sample_problem(depth, random.Random(0))


def test_unknown_split() -> None:
    with pytest.raises(ValueError, match="'dev' is unknown; choose one of train, validation, test"):
        next(problems("dev", [1]))  # type: ignore[arg-type]


def test_dataset_for_the_harness() -> None:
    data = arith_dataset(size=8, pretrained="ignored")["test"]
    assert data["depth"] == [*TEST_DEPTHS, *TEST_DEPTHS]
    assert [int(answer) for answer in data["answer"]] == [solve(prompt) for prompt in data["problem"]]
