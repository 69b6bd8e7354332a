"""The pruning rule: one line for every kind of trace, then the invariants over whatever hypothesis can think of.

In the tables ``[`` ``/`` ``]`` are the open, split and close markers, ``+`` the lead, letters are text, and what stands
before ``|`` is the prompt.
"""

from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hcot_lmeval.trace import IGNORE, Kind, LiveContext, Policy, compile_trace, live_ids, push_all
from tests import strategies
from tests.invariants import check_trace
from tests.reference import CLOSE, LEAD, MARKERS, OPEN, POLICIES, SPLIT, pruned, rewrite

SIGNS = {"[": OPEN, "/": SPLIT, "]": CLOSE, "+": LEAD}


def parse(written: str) -> tuple[list[int], int]:
    """Returns the ids of a written trace and the length of its prompt."""
    prompt, bar, generated = written.partition("|")
    assert bar
    return [SIGNS.get(c, ord(c)) for c in prompt + generated], len(prompt)


def write(ids: list[int]) -> str:
    signs = {i: c for c, i in SIGNS.items()}
    return "".join(signs.get(i) or chr(i) for i in ids)


# notation, trace, live context at the end, malformed tokens in order
EXAMPLES = [
    ("hcot", "p|abc", "pabc", []),  # no block at all
    ("hcot", "p|a[bc/d]e", "pa[d]e", []),  # one block
    ("hcot", "p|[/]", "p[]", []),  # an empty block
    ("hcot", "p|[b/]", "p[]", []),  # an empty solution
    ("hcot", "p|[/d]", "p[d]", []),  # an empty thought
    ("hcot", "p|[a/b][c/d]", "p[b][d]", []),  # one after the other
    ("hcot", "p|[a[b/c]d/e]f", "p[e]f", []),  # nested in the thought
    ("hcot", "p|[a/b[c/d]e]f", "p[b[d]e]f", []),  # nested in the solution
    ("hcot", "p|[[[a/b]/c]/d]", "p[d]", []),  # three deep
    ("hcot", "p|[a[b/c]", "p[a[c]", []),  # cut off behind an inner block
    ("hcot", "p|a/b", "pa/b", ["stray_split"]),
    ("hcot", "p|a]b", "pa]b", ["stray_close"]),
    ("hcot", "p|a/b]c", "pa/b]c", ["stray_split", "stray_close"]),
    ("hcot", "p|[a]b", "p[a]b", ["unsplit_close"]),  # the block is over:
    ("hcot", "p|[a]b/c]", "p[a]b/c]", ["unsplit_close", "stray_split", "stray_close"]),  # a later split is not its own
    ("hcot", "p|[a[b]c/d]", "p[d]", ["unsplit_close"]),  # the outer block is none the worse for it
    ("hcot", "p|[a/b/c]d", "p[c]d", ["repeated_split"]),  # the last split counts
    ("hcot", "p|[a/b/c/d]", "p[d]", ["repeated_split", "repeated_split"]),
    ("hcot", "p|[a/b[c/d]/e]", "p[e]", ["repeated_split"]),  # a closed block between the two splits is thought
    ("hcot", "p|[a/[b/c/d]", "p[a/[d]", ["repeated_split"]),  # within the inner block; the outer one stays open
    ("hcot", "p|[a/b]]c", "p[b]]c", ["stray_close"]),
    ("hcot", "p|[a/b", "p[a/b", []),  # unclosed: stays, reported at the end alone
    ("hcot", "p[a/|b]c", "p[a/b]c", ["stray_close"]),  # what the prompt opens stays inert
    ("hcot", "p[a/b]|c", "p[a/b]c", []),
    ("hcot", "p[|[a/b]", "p[[b]", []),
    ("hcot", "p|[a/+b]", "p[+b]", []),  # not a marker in this notation
    ("pencil", "p|a[bc/d]e", "pade", []),
    ("pencil", "p|[a[b/c]d/e]f", "pef", []),
    ("pencil", "p|[a/b[c/d]e]f", "pbdef", []),
    ("pencil", "p|[b/]", "p", []),  # back to the prompt
    ("pencil", "p|[/][/]x", "px", []),
    ("pencil", "p|[a[b/]/c]", "pc", []),  # the inner block leaves nothing behind
    ("pencil", "p|[a/[b/]c]", "pc", []),
    ("pencil", "p|[a]b", "p[a]b", ["unsplit_close"]),
    ("pencil", "p|[a[b]c/d]", "pd", ["unsplit_close"]),
    ("pencil", "p|[a/b/c]d", "pcd", ["repeated_split"]),
    ("pencil", "p|/]", "p/]", ["stray_split", "stray_close"]),
    ("memento", "p|a[bc/+d]e", "pa[/+d]e", []),
    ("memento", "p|[a/+b][c/+d]", "p[/+b][/+d]", []),
    ("memento", "p|[/+d]e", "p[/+d]e", []),  # an empty thought: nothing to prune
    ("memento", "p|[/]e", "p[/]e", ["missing_lead"]),
    ("memento", "p|[a/]e", "p[/]e", ["missing_lead"]),
    ("memento", "p|[a/b]e", "p[/b]e", ["missing_lead"]),  # pruned like any other
    ("memento", "p|[a/b+]e", "p[/b+]e", ["missing_lead"]),
    ("memento", "p|+a", "p+a", []),  # a lead anywhere else is text
    ("memento", "p|[a[b/+c]d]", "p[/+c]d]", ["nested_open", "stray_close"]),  # flat: the first close ends it
    ("memento", "p|[a/+b[c]d", "p[/+b[c]d", ["nested_open"]),  # in the solution too
    ("memento", "p|[a/+b/+c]", "p[/+c]", ["repeated_split"]),
    ("memento", "p|[a]b", "p[a]b", ["unsplit_close"]),
    ("memento", "p|[a[b]c/+d]", "p[a[b]c/+d]", ["nested_open", "unsplit_close", "stray_split", "stray_close"]),
]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("notation", "trace", "live", "malformed"), EXAMPLES)
def test_examples(notation, trace, live, malformed, policy):
    ids, prompt_len = parse(trace)
    markers = MARKERS[notation]
    context = LiveContext(markers, policy)
    for token in ids[:prompt_len]:
        assert context.push_inert(token).malformed is None
    steps = push_all(context, ids[prompt_len:])
    assert [step.malformed for step in steps if step.malformed] == malformed
    assert write(context.live) == (trace.replace("|", "") if policy == "off" else live)
    assert live_ids(ids, prompt_len, markers, policy) == context.live
    check_trace(ids, prompt_len, markers, policy)


@pytest.mark.parametrize(("notation", "trace", "live", "malformed"), EXAMPLES)
def test_the_slow_twin_agrees_with_the_examples(notation, trace, live, malformed):
    """Engine and slow twin cannot be wrong in the same way where the table says what is right."""
    ids, prompt_len = parse(trace)
    assert write(pruned(ids, prompt_len, MARKERS[notation], "recompute")) == live
    faults = rewrite(ids, prompt_len, MARKERS[notation]).faults
    assert sorted(faults.elements()) == sorted([*malformed, *["unclosed"] * faults["unclosed"]])


def test_the_plan_in_full():
    """One block in the three policies, every number written out."""
    ids, prompt_len = parse("p|[t/s]e")
    p, o, t, x, s, c, e = ids
    off = compile_trace(ids, prompt_len, MARKERS["hcot"], "off")
    assert (off.ids, off.positions, off.death) == (ids, [0, 1, 2, 3, 4, 5, 6], [7] * 7)
    assert off.targets == [*ids[1:], IGNORE]
    recompute = compile_trace(ids, prompt_len, MARKERS["hcot"], "recompute")
    assert recompute.ids == [p, o, t, x, s, s, c, e]  # the close is a target of the old context, never an input there
    assert recompute.positions == [0, 1, 2, 3, 4, 2, 3, 4]
    assert recompute.death == [8, 8, 5, 5, 5, 8, 8, 8]
    assert recompute.targets == [o, t, x, s, c, IGNORE, e, IGNORE]
    assert recompute.source == [0, 1, 2, 3, 4, 4, 5, 6]
    assert recompute.live == [0, 1, 5, 6, 7]
    evict = compile_trace(ids, prompt_len, MARKERS["hcot"], "evict")
    assert (evict.ids, evict.positions, evict.targets) == (ids, off.positions, off.targets)
    assert evict.death == [7, 7, 6, 6, 7, 7, 7]  # the close itself still sees the thought
    assert evict.live == [0, 1, 4, 5, 6]


def test_the_steps_of_a_prune():
    ids, prompt_len = parse("p|[t/s]")
    for policy, rewind, forward, positions, drop in (
        (Policy.OFF, 5, ids[5:], (5,), ()),
        (Policy.RECOMPUTE, 2, ids[4:], (2, 3), ()),
        (Policy.EVICT, 5, ids[5:], (5,), ((2, 4),)),
    ):
        context = LiveContext(MARKERS["hcot"], policy)
        context.push_inert(ids[0])
        step = push_all(context, ids[prompt_len:])[-1]
        assert (step.kind, step.depth, step.rewind) == (Kind.CLOSE, 0, rewind)
        assert (step.forward, step.positions, step.drop) == (tuple(forward), positions, drop)
        assert step.pruned == (() if policy is Policy.OFF else (2, 3))


def test_when_nothing_survives_the_last_token_is_read_again():
    ids, prompt_len = parse("pq|[a/]")
    context = LiveContext(MARKERS["pencil"], "recompute")
    for token in ids[:prompt_len]:
        context.push_inert(token)
    step = push_all(context, ids[prompt_len:])[-1]
    assert (step.rewind, step.forward, step.positions, step.source) == (1, (ids[1],), (1,), (1,))
    assert context.live == ids[:2]


def test_peak_counts_what_an_eviction_still_holds():
    ids, prompt_len = parse("p|[abc/s]")
    peaks = {}
    for policy in POLICIES:
        context = LiveContext(MARKERS["hcot"], policy)
        for token in ids[:prompt_len]:
            context.push_inert(token)
        push_all(context, ids[prompt_len:])
        peaks[policy] = context.peak
    assert peaks == {"off": 8, "recompute": 7, "evict": 8}


def test_without_markers_everything_is_text():
    ids, prompt_len = parse("p|[a/b]")
    plan = compile_trace(ids, prompt_len, None, "off")
    assert plan.ids == ids
    assert {step.kind for step in push_all(LiveContext(None, "off"), ids)} == {Kind.TEXT}
    for policy in ("recompute", "evict"):
        with pytest.raises(ValueError, match=f"policy '{policy}' needs marker ids"):
            LiveContext(None, policy)


@pytest.mark.parametrize("prompt_len", [-1, 0, 4])
def test_prompt_len_out_of_range(prompt_len):
    with pytest.raises(ValueError, match=rf"prompt_len={prompt_len} is outside 1\.\.3"):
        compile_trace([9, 9, 9], prompt_len, MARKERS["hcot"])


def test_unknown_policy():
    with pytest.raises(ValueError, match="prune"):
        LiveContext(MARKERS["hcot"], "prune")


def test_prompt_acts():
    ids, prompt_len = parse("p[a/b]q[c/|d]")
    for notation, live in (("hcot", "p[b]q[d]"), ("pencil", "pbqd")):
        acting = compile_trace(ids, prompt_len, MARKERS[notation], prompt_acts=True)
        assert write([acting.ids[row] for row in acting.live]) == live
        inert = compile_trace(ids, prompt_len, MARKERS[notation])
        assert write([inert.ids[row] for row in inert.live]) == "p[a/b]q[c/d]"


def test_a_prompt_that_prunes_itself_away_still_has_positions():
    """``[/]`` with nothing before it: pencil keeps none of it, yet the next token needs something to follow."""
    ids, prompt_len = parse("[/]|x")
    for policy in POLICIES:
        plan = compile_trace(ids, prompt_len, MARKERS["pencil"], policy, prompt_acts=True)
        assert min(plan.positions) >= 0
        assert [t for t in plan.targets if t != IGNORE] == ids[prompt_len:]


@settings(max_examples=400)
@given(strategies.cases())
@example((*parse("p|[/]a"), MARKERS["memento"], "recompute"))
@example((*parse("p|[/][a/]b"), MARKERS["pencil"], "recompute"))
def test_invariants(case):
    check_trace(*case)


@settings(max_examples=150)
@given(strategies.cases())
def test_invariants_when_the_prompt_acts(case):
    check_trace(*case, prompt_acts=True)


@settings(max_examples=150)
@given(
    strategies.cases(notation="memento"),
    st.frozensets(st.sampled_from(["open", "split", "close"])),
    st.booleans(),
    st.sampled_from([None, LEAD]),
)
def test_invariants_of_any_notation(case, keep, nested, lead):
    """Whatever survives, nested or flat, led or not: the rule does not know its presets."""
    ids, prompt_len, markers, policy = case
    check_trace(ids, prompt_len, replace(markers, keep=keep, nested=nested, lead=lead), policy)


@settings(max_examples=200)
@given(st.lists(st.integers(-2, 12), max_size=30), strategies.notations, strategies.policies)
def test_nothing_raises(ids, notation, policy):
    context = LiveContext(MARKERS[notation], policy)
    context.push_inert(9)
    for token in ids:
        context.rows_needed(token)
        assert context.push(token).forward
    compile_trace([9, *ids], 1, MARKERS[notation], policy)


@settings(max_examples=200)
@given(strategies.cases())
def test_prefixes_compile_to_prefixes(case):
    """What comes later never changes what an earlier token was forwarded as: incremental equals compiled."""
    ids, prompt_len, markers, policy = case
    whole = compile_trace(ids, prompt_len, markers, policy)
    for stop in range(prompt_len, len(ids)):
        part = compile_trace(ids[:stop], prompt_len, markers, policy)
        n = len(part)
        assert (part.ids, part.positions, part.source) == (whole.ids[:n], whole.positions[:n], whole.source[:n])
        assert part.targets[:-1] == whole.targets[: n - 1]
        assert part.death == [min(death, n) for death in whole.death[:n]]


@given(strategies.cases(policy="recompute"))
def test_the_policies_agree_on_what_is_live(case):
    ids, prompt_len, markers, _ = case
    assert live_ids(ids, prompt_len, markers, "recompute") == live_ids(ids, prompt_len, markers, "evict")


@given(strategies.well_formed(MARKERS["hcot"]))
def test_well_formed_traces_have_no_faults(ids):
    assert not rewrite(ids, 0, MARKERS["hcot"]).faults
    assert not [s for s in push_all(LiveContext(MARKERS["hcot"]), ids) if s.malformed]
