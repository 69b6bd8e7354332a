"""Nested arithmetic: the problems are what they claim, the gold traces right and legal, the splits disjoint."""

from __future__ import annotations

import itertools
import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hcot_lmeval.markup import PRESETS, MarkerIds, get_markup
from hcot_lmeval.synthetic import (
    MAX_DEPTH,
    SPLITS,
    TEST_DEPTHS,
    Definition,
    Problem,
    arith_dataset,
    flat_trace,
    gold_trace,
    problems,
    sample_problem,
)
from hcot_lmeval.trace import LiveContext, Malformed, Policy, push_all

seeded = given(depth=st.integers(1, 7), seed=st.integers(0, 10**6))


def draw(depth: int, seed: int) -> Problem:
    return sample_problem(depth, random.Random(seed))


def solve(prompt: str) -> int:
    """Reads the prompt alone and lets Python do the arithmetic: nothing of the module under test is used."""
    *definitions, question = prompt.rstrip("?").split(";")
    env = dict(definition.split("=") for definition in definitions)

    def expand(name: str) -> str:
        return "(" + re.sub("[a-z]", lambda match: expand(match[0]), env[name]) + ")"

    return eval(expand(question)) % 10


def words(text: str, markup: str = "hcot") -> list[str]:
    """The text in tokens: markers and thinking tokens whole, all else by character."""
    marks = get_markup(markup)
    whole = "|".join(re.escape(word) for word in (*marks.markers, *marks.think))
    return re.findall(f"{whole}|.", text)


def ids_of(text: str, markup: str) -> tuple[list[int], MarkerIds]:
    """Code points, with the markers from 0x110000 up."""
    marks = get_markup(markup)
    special = {word: 0x110000 + i for i, word in enumerate((*marks.markers, *marks.think))}
    opens, split, close = special[marks.open], special[marks.split], special[marks.close]
    lead = special[marks.lead] if marks.lead else None
    ids = [special[word] if word in special else ord(word) for word in words(text, markup)]
    return ids, MarkerIds(opens, split, close, marks.keep, marks.nested, lead)


@seeded
@settings(max_examples=60, deadline=None)
def test_gold_answer_is_right_by_an_independent_evaluation(depth: int, seed: int) -> None:
    problem = draw(depth, seed)
    assert problem.value == solve(problem.prompt)
    assert gold_trace(problem).endswith(f"</think>\\boxed{{{solve(problem.prompt)}}}")


@seeded
@settings(max_examples=60, deadline=None)
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
@settings(max_examples=30, deadline=None)
def test_gold_traces_are_legal_and_only_the_value_survives(policy: Policy, depth: int, seed: int) -> None:
    problem = draw(depth, seed)
    ids, markers = ids_of(gold_trace(problem), "hcot")
    context = LiveContext(markers, policy)
    steps = push_all(context, ids)
    assert [step.malformed for step in steps if step.malformed] == []
    assert context.depth == 0
    assert max(step.depth for step in steps) == problem.depth
    assert sum(step.is_prune for step in steps) == problem.blocks
    left, _ = ids_of(f"<think>[THOUGHT]{problem.value}[RETURN]</think>\\boxed{{{problem.value}}}", "hcot")
    assert context.live == left


@pytest.mark.parametrize("markup", PRESETS)
def test_traces_in_every_notation(markup: str) -> None:
    """A flat notation cannot nest, which shows as that one malformation and no other."""
    ids, markers = ids_of(gold_trace(draw(4, 0), markup), markup)
    faults = {step.malformed for step in push_all(LiveContext(markers), ids)} - {None}
    # the outer splits and closes of nested blocks find no block of their own in a flat notation
    nested = {Malformed.NESTED_OPEN, Malformed.STRAY_SPLIT, Malformed.STRAY_CLOSE}
    assert faults == (set() if get_markup(markup).nested else nested)


@seeded
@settings(max_examples=30, deadline=None)
def test_flat_twin_is_the_same_text_without_markers(depth: int, seed: int) -> None:
    problem = draw(depth, seed)
    flat, gold = words(flat_trace(problem)), words(gold_trace(problem))
    markers = get_markup("hcot").markers
    assert flat == [";" if word in markers else word for word in gold]


def test_the_live_context_grows_slowly_and_the_trace_fast() -> None:
    """The point of these problems: two more levels quadruple the trace and add a constant to the peak."""

    def sizes(depth: int) -> tuple[float, float]:
        peaks, lengths = [], []
        for problem in itertools.islice(problems("train", [depth]), 20):
            ids, markers = ids_of(problem.prompt + gold_trace(problem), "hcot")
            context = LiveContext(markers)
            push_all(context, ids)
            peaks.append(context.peak)
            lengths.append(len(ids))
        return sum(peaks) / 20, sum(lengths) / 20

    (peak4, length4), (peak6, length6), (peak8, length8) = sizes(4), sizes(6), sizes(8)
    assert length8 > 2.5 * length6 > 2.5 * 2 * length4
    assert peak8 - peak6 == pytest.approx(peak6 - peak4, abs=12)


def test_same_arguments_same_problems_other_seed_others() -> None:
    def first(split: str, seed: int) -> list[Problem]:
        return list(itertools.islice(problems(split, [2, 5], seed), 20))  # type: ignore[arg-type]

    assert first("train", 3) == first("train", 3)
    assert first("train", 3) != first("train", 4)
    assert [problem.depth for problem in first("test", 0)] == [2, 5] * 10


def test_problems_are_pinned() -> None:
    """Published results name a seed; if this fails, raise the version of the task."""
    assert [problem.prompt for problem in itertools.islice(problems("test", [1, 2, 3]), 3)] == PINNED


PINNED = ["o=8-4;o?", "h=7+1;d=l+l;l=8*3;d?", "o=3*d;d=m+m;b=1-7;j=b-m;m=4+3;o?"]


def test_splits_never_overlap() -> None:
    seen = {
        split: {problem.fingerprint for problem in itertools.islice(problems(split, [1, 2, 3]), 400)}
        for split in SPLITS
    }
    for one, other in itertools.combinations(SPLITS, 2):
        assert not seen[one] & seen[other]
    assert len(seen["train"]) > 300


def test_fingerprint_ignores_names_order_and_unreached_definitions() -> None:
    problem = Problem((Definition("a", "b", "-", "3"), Definition("b", "4", "*", "4")), "a", 2)
    renamed = Problem(
        (Definition("a", "4", "*", "4"), Definition("x", "1", "+", "1"), Definition("q", "a", "-", "3")), "q", 2
    )
    changed = Problem((Definition("a", "3", "-", "b"), Definition("b", "4", "*", "4")), "a", 2)
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
