"""The grammar: its table by hand, whole traces against a recogniser of another kind, and against the rule's faults.

In the tables ``[`` ``/`` ``+`` ``]`` are the open, split, lead and close markers, ``(`` and ``)`` the thinking tokens,
``.`` ends the sequence, and letters are text.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hcot_lmeval.grammar import Cursor, Grammar, Label, State, TokenClass, is_legal_trace, label_tokens
from hcot_lmeval.markup import MarkerIds
from hcot_lmeval.trace import LiveContext, Malformed
from tests import strategies
from tests.reference import CLOSE, EOS, LEAD, MARKERS, OPEN, SPLIT, rewrite

THINK, THINK_END = 7, 2
SIGNS = {"[": OPEN, "/": SPLIT, "+": LEAD, "]": CLOSE, "(": THINK, ")": THINK_END, ".": EOS}
LETTERS = {i: c for c, i in SIGNS.items()}
NOTATIONS = {**MARKERS, "nested with lead": replace(MARKERS["memento"], nested=True)}
"""The presets, and the combination that none of them is."""
GRAMMARS = {name: Grammar(marks, (THINK, THINK_END), frozenset({EOS})) for name, marks in NOTATIONS.items()}
OUTSIDE, THOUGHT, SOLUTION, AT_LEAD, ANSWER = State


def parse(written: str) -> list[int]:
    return [SIGNS.get(c, ord(c)) for c in written]


def write(ids: Sequence[int], markers: MarkerIds) -> str:
    """One letter for each token, ``t`` for text; what is no marker of the notation is text."""
    known = markers.ids | {THINK, THINK_END, EOS}
    return "".join(LETTERS[i] if i in known else "t" for i in ids)


def is_well_formed(ids: Sequence[int], markers: MarkerIds, *, finished: bool) -> bool:
    """The slow twin: replaces complete blocks by a letter until none is left, then looks at the rest.

    A legal beginning has open blocks in it, each within the one before; the last may lack its lead.
    """
    lead = "" if markers.lead is None else r"\+"
    inside = "[tb]*" if markers.nested else "t*"  # b: what was a block
    text, before = write(ids, markers), None
    while text != before:
        before, text = text, re.sub(rf"\[{inside}/{lead}{inside}\]", "b", text)
    whole = r"[tb(.]*(\)[t.]*)?"
    opened = rf"\[{inside}(/{lead}{inside})?"
    cut = rf"[tb(.]*({opened}){'*' if markers.nested else '?'}"
    at_lead = rf"[tb(.]*({opened}){'*' if markers.nested else '{0}'}\[{inside}/"
    return bool(re.fullmatch(whole if finished else rf"{whole}|{cut}|{at_lead}", text))


@st.composite
def traces(draw: st.DrawFn, *, markers_alone: bool = False) -> tuple[list[int], Grammar]:
    """Well-formed, broken and arbitrary traces, with thinking tokens and ends anywhere unless `markers_alone`."""
    grammar = GRAMMARS[draw(st.sampled_from(sorted(GRAMMARS)))]
    shape = draw(st.sampled_from([strategies.well_formed, strategies.broken, strategies.soup]))
    ids = list(draw(shape(grammar.markers)))
    if not markers_alone and draw(st.booleans()):  # as a completion is: mostly legal
        ids = [THINK, *ids, THINK_END, *draw(strategies.texts), EOS]
    anywhere = sorted({OPEN, SPLIT, LEAD, CLOSE} if markers_alone else LETTERS)
    for at, token in draw(st.lists(st.tuples(st.integers(0, 40), st.sampled_from(anywhere)), max_size=2)):
        ids.insert(at, token)
    return ids[: draw(st.integers(0, 60))] if draw(st.booleans()) else ids, grammar


# --- the table ------------------------------------------------------------------------------------------------------

ILLEGAL = [
    ("hcot", OUTSIDE, "/]"),
    (
        "hcot",
        THOUGHT,
        "]().",
    ),
    ("hcot", SOLUTION, "/()."),
    ("hcot", ANSWER, "[/]()"),
    ("pencil", THOUGHT, "]()."),
    ("memento", OUTSIDE, "/+]"),
    ("memento", THOUGHT, "[+]()."),  # flat: no block in a block
    ("memento", SOLUTION, "[/+()."),
    ("memento", AT_LEAD, "[/]()."),  # and all text
    ("memento", ANSWER, "[/+]()"),
    ("nested with lead", THOUGHT, "+]()."),
    ("nested with lead", SOLUTION, "/+()."),
    ("nested with lead", AT_LEAD, "[/]()."),
]


@pytest.mark.parametrize(("notation", "state", "signs"), ILLEGAL)
def test_illegal_ids_of_each_state(notation, state, signs) -> None:
    grammar = GRAMMARS[notation]
    assert grammar.illegal(state) == set(parse(signs))
    assert grammar.illegal(state) <= grammar.control_ids
    assert {i for i in grammar.control_ids if not grammar.is_legal(i, state)} == grammar.illegal(state)
    assert grammar.is_legal(ord("a"), state) == (state is not AT_LEAD)


def test_a_vocabulary_may_lack_thinking_tokens() -> None:
    grammar = Grammar(MARKERS["hcot"], (None, None), frozenset())
    assert [grammar.illegal(state) for state in (OUTSIDE, THOUGHT, SOLUTION)] == [{SPLIT, CLOSE}, {CLOSE}, {SPLIT}]
    assert grammar.control_ids == {OPEN, SPLIT, CLOSE}
    assert label_tokens([8, OPEN, THINK_END, EOS], 1, grammar)[2] == Label(THOUGHT, TokenClass.TEXT, True)


# --- single traces ----------------------------------------------------------------------------------------------------

# notation, trace, state before each token (O, T, S, L, A), class of each (t, m, s, a), tokens that are illegal
EXAMPLES = [
    ("hcot", "(a[b/c]d)e.", "OOOTTSSOOAA", "mtmtmsmtmam", ""),
    ("hcot", "[a[b/c]/d]", "OTTTTSSTSS", "mtmtmsmmsm", ""),
    ("hcot", "[/[a/b]c]", "OTSTTSSSS", "mmmtmsmsm", ""),  # behind an inner block the outer one goes on
    ("hcot", "a(b", "OOO", "tmt", ""),
    ("hcot", "a.", "OO", "tm", ""),  # no thinking section at all
    ("hcot", "+[+/+]", "OOTTSS", "tmtmsm", ""),  # no marker of this notation
    ("hcot", "a]/b", "OOOO", "tmmt", "]/"),
    ("hcot", "[a]b", "OTTO", "mtmt", "]"),
    ("hcot", "[/a/b]", "OTSSSS", "mmsmsm", "/"),
    ("hcot", "[.(/)]", "OTTTSA", "mmmmmm", ".()]"),
    ("hcot", ")a[b/c](.", "OAAAAAAAA", "mamamammm", "[/]("),
    ("hcot", "))", "OA", "mm", ")"),
    ("memento", "[a/+b]c", "OTTLSSO", "mtmmsmt", ""),
    ("memento", "[/a+b]", "OTLSSS", "mmsmsm", "a+"),  # the solution goes on without its lead
    ("memento", "[//+]", "OTLLS", "mmmmm", "/"),
    ("memento", "[/]a", "OTLO", "mmmt", "]"),
    ("memento", "[/)+", "OTLA", "mmmm", ")+"),
    ("memento", "[a[b/+c[d]", "OTTTTLSSSS", "mtmtmmsmsm", "[["),
    ("memento", "a+", "OO", "tm", "+"),
    ("nested with lead", "[[a/+b]/+[/+]]", "OTTTLSSTLSTLSS", "mmtmmsmmmmmmmm", ""),
    ("nested with lead", "[/[/+]a]", "OTLTLSSS", "mmmmmmsm", "["),
]


@pytest.mark.parametrize(("notation", "trace", "states", "classes", "illegal"), EXAMPLES)
def test_examples(notation, trace, states, classes, illegal) -> None:
    labels = label_tokens(parse("p[" + trace), 2, GRAMMARS[notation])  # what the prompt opens is inert
    assert "".join("OTSLA"[label.state] for label in labels) == states
    assert "".join("tmsa"[label.token_class] for label in labels) == classes
    assert "".join(c for c, label in zip(trace, labels, strict=True) if not label.legal) == illegal
    assert is_legal_trace(parse("p[" + trace), 2, GRAMMARS[notation], finished=False) == (not illegal)


@pytest.mark.parametrize(("trace", "legal", "so_far"), [("", True, True), ("[a", False, True), ("[/", False, True)])
def test_a_finished_trace_has_no_block_open(trace, legal, so_far) -> None:
    ids = parse("p" + trace)
    assert is_legal_trace(ids, 1, GRAMMARS["hcot"]) is legal
    assert is_legal_trace(ids, 1, GRAMMARS["hcot"], finished=False) is so_far


# --- any trace --------------------------------------------------------------------------------------------------------


@given(traces(), strategies.texts)
@settings(max_examples=200)
def test_a_trace_is_legal_where_the_twin_says_so(case, prompt) -> None:
    ids, grammar = case
    for finished in (False, True):
        expected = is_well_formed(ids, grammar.markers, finished=finished)
        assert is_legal_trace(prompt + ids, len(prompt), grammar, finished=finished) == expected


@given(traces())
@settings(max_examples=100)
def test_the_first_illegal_token_is_where_no_well_formed_trace_goes_on(case) -> None:
    ids, grammar = case
    labels = label_tokens(ids, 0, grammar)
    legal = [is_well_formed(ids[: n + 1], grammar.markers, finished=False) for n in range(len(ids))]
    assert [label.legal for label in labels[: sum(legal)]] == [True] * sum(legal)
    assert all(legal) or not labels[sum(legal)].legal


@given(traces(markers_alone=True), strategies.texts)
@settings(max_examples=150)
def test_the_rule_and_the_grammar_find_the_same_faults(case, prompt) -> None:
    """Without thinking tokens and ends the two differ in leads alone, of which the rule sees those of closed blocks."""
    ids, grammar = case
    prompt_len, markers = len(prompt), grammar.markers
    ids = prompt + ids
    faults = rewrite(ids, prompt_len, markers).faults
    found: Counter[str] = Counter()
    for token, label in zip(ids[prompt_len:], label_tokens(ids, prompt_len, grammar), strict=True):
        if not label.legal:
            found[fault_of(token, label.state, markers)] += 1
            found["missing_lead"] += label.state is AT_LEAD
    for kind in (Malformed.STRAY_SPLIT, Malformed.STRAY_CLOSE, Malformed.UNSPLIT_CLOSE, Malformed.REPEATED_SPLIT):
        assert found[kind] == faults[kind]
    assert found["nested_open"] == faults["nested_open"]
    assert found["missing_lead"] >= faults["missing_lead"]
    legal = is_legal_trace(ids, prompt_len, grammar)
    assert not (legal and faults)
    assert markers.lead is not None or legal == (not faults)


def fault_of(token: int, state: State, markers: MarkerIds) -> str:
    """The rule's name of an illegal token; text, leads and whatever else the rule does not mind have none."""
    solution = (SOLUTION, AT_LEAD)
    names = {
        (SPLIT, OUTSIDE): "stray_split",
        (CLOSE, OUTSIDE): "stray_close",
        (CLOSE, THOUGHT): "unsplit_close",
        **{(SPLIT, state): "repeated_split" for state in solution},
        **({} if markers.nested else {(OPEN, state): "nested_open" for state in (THOUGHT, *solution)}),
    }
    return names.get((token, state), "none")


@given(traces())
@settings(max_examples=80)
def test_state_and_depth_are_those_of_the_live_context(case) -> None:
    """The cursor tells its context of markers alone; here one is told of everything."""
    ids, grammar = case
    cursor, context = Cursor(grammar), LiveContext(grammar.markers, "recompute")
    answered = False
    for token in [9, *ids]:
        cursor.push(token)
        context.push(token)
        answered |= token == THINK_END
        assert cursor.depth == context.depth
        assert (cursor.state is ANSWER) == answered
        assert answered or (cursor.state is OUTSIDE) == (context.depth == 0)
        assert answered or (cursor.state in (SOLUTION, AT_LEAD)) == context.in_solution


@given(st.data(), st.sampled_from(sorted(GRAMMARS)), st.integers(0, 30))
@settings(max_examples=80)
def test_a_decoder_that_forbids_illegal_ids_writes_legal_traces(data, notation, length) -> None:
    """Any of the other tokens may come, and every beginning can be finished."""
    grammar = GRAMMARS[notation]
    cursor, ids = Cursor(grammar), list[int]()

    def write_next(choices: set[int]) -> None:
        token = data.draw(st.sampled_from(sorted(choices)))
        assert cursor.push(token).legal
        ids.append(token)

    for _ in range(length):
        lead = {LEAD} if cursor.state is AT_LEAD else {9}
        write_next((grammar.control_ids | lead) - cursor.illegal)
        assert is_well_formed(ids, grammar.markers, finished=False)
    finish = {THOUGHT: {SPLIT}, SOLUTION: {CLOSE}, AT_LEAD: {LEAD}}
    while cursor.state in finish:
        write_next(finish[cursor.state])
    assert is_well_formed(ids, grammar.markers, finished=True)
    assert is_legal_trace(ids, 0, grammar)


@given(traces())
@settings(max_examples=80)
def test_classes_follow_from_token_and_state(case) -> None:
    ids, grammar = case
    of_text = {SOLUTION: TokenClass.SOLUTION, AT_LEAD: TokenClass.SOLUTION, ANSWER: TokenClass.ANSWER}
    for token, label in zip(ids, label_tokens(ids, 0, grammar), strict=True):
        is_text = write([token], grammar.markers) == "t"
        assert label.token_class == (of_text.get(label.state, TokenClass.TEXT) if is_text else TokenClass.MARKER)
