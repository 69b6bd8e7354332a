"""Compiled documents: they equal the plan of the trace, cuts are made between blocks, stages are what it packs."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hcot_lmeval.grammar import Grammar, is_legal_trace, label_tokens
from hcot_lmeval.trace import IGNORE, Kind, LiveContext, Malformed, compile_trace, push_all
from hcot_lmeval.training.data.documents import (
    COLUMNS,
    Document,
    Example,
    TooLong,
    compile_document,
    faults,
    longest_beginning,
    split_stages,
)
from tests.random_traces import SHAPES, random_trace
from tests.reference import CLOSE, EOS, LEAD, MARKERS, OPEN, POLICIES, SPLIT, rewrite, stages
from tests.strategies import cases

THINK, THINK_END = 7, 2
HCOT = MARKERS["hcot"]


def grammar(markers) -> Grammar:
    return Grammar(markers, (THINK, THINK_END), frozenset({EOS}))


def example(ids, prompt_len) -> Example:
    return Example(tuple(ids[:prompt_len]), tuple(ids[prompt_len:]))


def expected_document(ids, prompt_len, markers, policy) -> Document:
    """The plan of the trace, and the labels of its targets one by one."""
    plan = compile_trace(ids, prompt_len, markers, policy)
    labels = iter(label_tokens(ids, prompt_len, grammar(markers)))
    beside = [(0, 0) if target == IGNORE else next(labels)[:2] for target in plan.targets]
    states, classes = ([int(pair[i]) for pair in beside] for i in (0, 1))
    return Document(plan.ids, plan.positions, plan.death, plan.targets, states, classes)


def boundaries(ids, prompt_len, markers) -> list[int]:
    """Where a trace may be cut, the longest beginning first; its own end is one of them."""
    context = LiveContext(markers, "off")
    for token in ids[:prompt_len]:
        context.push_inert(token)
    kinds = [step.kind for step in push_all(context, ids[prompt_len:])]
    found = {len(ids)} | {prompt_len + i + 1 for i, kind in enumerate(kinds) if kind is Kind.CLOSE}
    found |= {prompt_len + i for i, kind in enumerate(kinds) if kind is Kind.OPEN and i > 0}
    return sorted(found, reverse=True)


@given(cases(), st.integers(0, 60))
@settings(max_examples=200)
def test_document_is_the_plan_of_the_longest_beginning_that_fits(case, max_length):
    ids, prompt_len, markers, policy = case
    if len(ids) == prompt_len:
        return
    fitting = (
        n for n in boundaries(*case[:3]) if len(compile_trace(ids[:n], prompt_len, markers, policy)) <= max_length
    )
    stop = next(fitting, None)
    if stop is None:
        with pytest.raises(TooLong):
            compile_document(example(ids, prompt_len), grammar(markers), policy, max_length=max_length)
        return
    document = compile_document(example(ids, prompt_len), grammar(markers), policy, max_length=max_length)
    assert document == expected_document(ids[:stop], prompt_len, markers, policy)
    assert longest_beginning(example(ids, prompt_len), markers, policy, max_length) == stop


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_long_documents_at_every_length(shape, policy):
    for seed in range(3):
        ids, prompt_len = random_trace(seed, HCOT, 150, shape)
        possible = boundaries(ids, prompt_len, HCOT)
        sizes = {n: len(compile_trace(ids[:n], prompt_len, HCOT, policy)) for n in possible}
        for max_length in range(sizes[possible[-1]], sizes[possible[0]] + 2, 7):
            stop = next(n for n in possible if sizes[n] <= max_length)
            document = compile_document(example(ids, prompt_len), grammar(HCOT), policy, max_length=max_length)
            assert document == expected_document(ids[:stop], prompt_len, HCOT, policy)


@given(cases())
def test_every_generated_token_is_a_target_once(case):
    ids, prompt_len, markers, policy = case
    document = compile_document(example(ids, prompt_len), grammar(markers), policy, max_length=10_000)
    assert [t for t in document.targets if t != IGNORE] == ids[prompt_len:]
    assert document.learned == len(ids) - prompt_len
    assert {len(getattr(document, name)) for name in COLUMNS} == {len(document)}


def test_cut_trace_ends_behind_a_block_and_has_no_end_of_turn():
    trace = [9, OPEN, 10, SPLIT, 11, CLOSE, 12, OPEN, 13, SPLIT, 14, CLOSE, EOS]
    whole = compile_document(Example((8,), tuple(trace)), grammar(HCOT), "off", max_length=14)
    assert whole.targets[:-1] == trace
    for max_length in (8, 9, 12, 13):
        cut = compile_document(Example((8,), tuple(trace)), grammar(HCOT), "off", max_length=max_length)
        assert cut.ids == [8, *trace[: 7 if max_length < 13 else 12]]  # before the second block, or behind it
        assert EOS not in cut.targets


def test_trace_without_a_boundary_that_fits_is_refused():
    with pytest.raises(TooLong, match="12 tokens"):
        compile_document(Example((8,), (9,) * 20), grammar(HCOT), "recompute", max_length=12)
    with pytest.raises(TooLong):  # a cut before the first token would leave nothing to learn
        compile_document(Example((8,) * 10, (OPEN, *(9,) * 20)), grammar(HCOT), "recompute", max_length=12)
    with pytest.raises(TooLong):  # the prompt alone is too long
        compile_document(Example((8,) * 30, (OPEN, CLOSE, 9)), grammar(HCOT), "recompute", max_length=12)


# --- stages -----------------------------------------------------------------------------------------------------------


def reference_stages(ids, prompt_len, markers) -> list[tuple[list[int], int]]:
    """The twin's stages; where a block had nothing to throw away it starts one that continues the last: joined."""
    joined: list[tuple[list[int], int]] = []
    for stage in stages(ids, prompt_len, markers):
        if joined and stage.ids[: stage.first_target] == joined[-1][0]:
            joined[-1] = (stage.ids, joined[-1][1])
        else:
            joined.append((stage.ids, stage.first_target))
    return joined


def check_stages(documents, ids, prompt_len, markers):
    expected = reference_stages(ids, prompt_len, markers)
    assert [document.ids for document in documents] == [tokens for tokens, _ in expected]
    labels = iter(label_tokens(ids, prompt_len, grammar(markers)))
    for document, (tokens, first) in zip(documents, expected, strict=True):
        size = len(tokens)
        assert document.positions == list(range(size))
        assert document.death == [size] * size
        assert document.targets == [IGNORE] * (first - 1) + tokens[first:] + [IGNORE]
        beside = [(0, 0) if t == IGNORE else next(labels)[:2] for t in document.targets]
        assert list(zip(document.states, document.classes, strict=True)) == beside
    assert next(labels, None) is None


@given(cases(policy="recompute"))
@settings(max_examples=150)
def test_stages_are_those_of_the_twin(case):
    ids, prompt_len, markers, _ = case
    documents = split_stages(example(ids, prompt_len), grammar(markers), "recompute", max_length=10_000)
    check_stages(documents, ids, prompt_len, markers)


@pytest.mark.parametrize("notation", sorted(MARKERS))
def test_long_traces_have_the_stages_of_the_twin(notation):
    markers = MARKERS[notation]
    for seed in range(12):
        ids, prompt_len = random_trace(seed, markers, 120)
        check_stages(
            split_stages(example(ids, prompt_len), grammar(markers), "recompute", max_length=10_000),
            ids,
            prompt_len,
            markers,
        )


@given(cases(policy="recompute"), st.integers(1, 30))
@settings(max_examples=150)
def test_stages_are_cut_so_that_each_fits(case, max_length):
    ids, prompt_len, markers, _ = case
    if len(ids) == prompt_len:
        return
    longest = {
        n: max(len(tokens) for tokens, _ in reference_stages(ids[:n], prompt_len, markers))
        for n in boundaries(*case[:3])
    }
    stop = next((n for n, size in longest.items() if size <= max_length), None)
    if stop is None:
        with pytest.raises(TooLong):
            split_stages(example(ids, prompt_len), grammar(markers), "recompute", max_length=max_length)
    else:
        documents = split_stages(example(ids, prompt_len), grammar(markers), "recompute", max_length=max_length)
        check_stages(documents, ids[:stop], prompt_len, markers)


@given(cases(policy="recompute"))
def test_stages_and_plan_learn_the_same_tokens_in_the_same_states(case):
    ids, prompt_len, markers, policy = case
    parts = split_stages(example(ids, prompt_len), grammar(markers), "recompute", max_length=10_000)
    whole = compile_document(example(ids, prompt_len), grammar(markers), policy, max_length=10_000)

    def learned(document):
        rows = zip(document.targets, document.positions, document.states, document.classes, strict=True)
        return [row for row in rows if row[0] != IGNORE]

    assert [row for part in parts for row in learned(part)] == learned(whole)


@pytest.mark.parametrize("make", [compile_document, split_stages])
def test_empty_prompts_are_refused(make):
    with pytest.raises(ValueError, match=r"prompt"):
        make(Example((), (9, EOS)), grammar(HCOT), "off", max_length=9)


# --- faults -----------------------------------------------------------------------------------------------------------


def check_faults(ids, prompt_len, markers):
    """The kinds of the rule are those of the twin; without a fault of any kind the grammar accepts the trace."""
    found = faults(example(ids, prompt_len), grammar(markers))
    assert [kind for kind in found if kind in set(Malformed)] == sorted(rewrite(ids, prompt_len, markers).faults)
    accepted = is_legal_trace(ids, prompt_len, grammar(markers)) and EOS not in ids[prompt_len:-1]
    assert accepted == (not found)


@given(cases(), st.lists(st.tuples(st.integers(0, 30), st.sampled_from([THINK, THINK_END, EOS])), max_size=3))
@settings(max_examples=200)
def test_faults_are_those_of_the_twin_and_of_the_grammar(case, inserted):
    ids, prompt_len, markers, _ = case
    for place, token in inserted:
        ids = [*ids[: prompt_len + place], token, *ids[prompt_len + place :]]
    check_faults(ids, prompt_len, markers)


def test_faults_of_long_traces_are_those_of_the_twin():
    for notation, seed in ((n, s) for n in sorted(MARKERS) for s in range(12)):
        check_faults(*random_trace(seed, MARKERS[notation], 80), MARKERS[notation])


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ([THINK, OPEN, 9, SPLIT, 10, CLOSE, THINK_END, 11, EOS], []),
        ([THINK, OPEN, 9, THINK_END, SPLIT, 10, CLOSE, EOS], ["marker_in_answer", "think_in_thought"]),
        ([THINK, 9, THINK_END, OPEN, 9, SPLIT, 10, CLOSE, EOS], ["marker_in_answer"]),
        ([THINK, 9, THINK_END, 10, THINK_END, EOS], ["think_in_answer"]),
        ([THINK, 9, EOS, 10, THINK_END, EOS], ["early_end"]),
        ([OPEN, 9, SPLIT, THINK, EOS], ["think_in_solution", "unclosed"]),
        ([9, 9, 9], []),
    ],
)
def test_faults_beyond_the_rule(completion, expected):
    assert faults(Example((8,), tuple(completion)), grammar(HCOT)) == expected


def test_missing_leads_are_faults():
    marks = MARKERS["memento"]
    for solution, expected in (([LEAD, 9], []), ([9], ["missing_lead"]), ([], ["missing_lead"])):
        trace = (OPEN, 9, SPLIT, *solution, CLOSE, EOS)
        assert faults(Example((8,), trace), grammar(marks)) == expected


def test_random_traces_are_cut_often():
    """Were nothing ever cut, the tests above would say little."""
    rng, cut = random.Random(0), 0
    for seed in range(40):
        ids, prompt_len = random_trace(seed, HCOT, 60)
        document = compile_document(
            example(ids, prompt_len), grammar(HCOT), "recompute", max_length=prompt_len + rng.randrange(30, 60)
        )
        cut += document.learned < len(ids) - prompt_len
    assert cut > 20
