"""Control: no trace breaks what was asked, whoever writes it and however it is sampled.

The writers are random scores in which markers are frequent; what they write goes through the sampler and the rows of
the engine, without a model. That a model behaves no worse is tested at the end, through the engine.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings

from hcot_lmeval.control import Budget, Cause, Controller, ControlOptions, LoopDetector
from hcot_lmeval.engine import Engine, Request, SamplingParams
from hcot_lmeval.engine.rows import Limits, Row
from hcot_lmeval.engine.sampling import sample
from hcot_lmeval.events import Forced, Illegal, Loop, statistics
from hcot_lmeval.grammar import Cursor, Grammar, State, is_legal_trace, label_tokens
from hcot_lmeval.trace import LiveContext, Policy
from tests import strategies
from tests.full import FULL
from tests.reference import CLOSE, EOS, LEAD, MARKERS, OPEN, SPLIT
from tests.test_grammar import GRAMMARS, NOTATIONS, THINK, THINK_END
from tests.tiny import favour, tiny_model

VOCAB = 24
PROMPT = (10, 11, 12)
PLENTY = Budget(10**6, 10**6)
SAMPLINGS = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 1.0},
    "hot, top-k": {"temperature": 1.5, "top_k": 5},
    "top-p, min-p": {"temperature": 0.8, "top_p": 0.7, "min_p": 0.02},
}


def make_row(
    number: int, notation: str, policy: Policy, options: ControlOptions, *, context: int = 10**6, **params: Any
) -> Row:
    markers, thinking = NOTATIONS[notation], number % 3 > 0
    request = Request(str(number), PROMPT, SamplingParams(**{"seed": number, "max_gen_toks": 60, **params}), thinking)
    grammar = GRAMMARS[notation]
    controller = Controller(options, grammar, thinking=thinking, prunes=policy is not Policy.OFF)
    loops = None if options.loop_tokens is None else LoopDetector(options.loop_tokens)
    limits = Limits(context, 10**6, frozenset({EOS}))
    row = Row(request, number, 0, LiveContext(markers, policy), limits, controller=controller, loops=loops)
    row.load_prompt(acts=False)
    row._steps.clear()  # nobody forwards anything here
    return row


def scores_of(rows: Sequence[Row], seed: int) -> torch.Tensor:
    """Random scores; every marker, thinking token and end is as likely as all text together."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(len(rows), VOCAB, generator=generator) * 2
    scores[:, :8] += 1.5
    return scores


def write(rows: list[Row], seed: int) -> list[Row]:
    """Lets random scores write all rows to their ends."""
    running = list(rows)
    for step in itertools.count():
        if not running:
            return rows
        scores = scores_of(running, seed * 1000 + step)
        for row, choice in zip(running, sample(scores, [row.draw() for row in running]), strict=True):
            row.accept(choice)
            row._steps.clear()
        running = [row for row in running if not row.finished]
    raise AssertionError


def events(row: Row, kind: type) -> list[Any]:
    return [event for event in row.recorder.events if isinstance(event, kind)]


def random_options(seed: int) -> ControlOptions:
    """The grammar with every combination of caps."""
    pick = [None if seed >> bit & 1 else value for bit, value in enumerate((2, 6, 3, 12))]
    depth, block, solution, answer = pick
    caps = {"max_depth": depth, "max_block_tokens": block, "max_solution_tokens": solution}
    return ControlOptions("grammar", **caps, force_answer=answer, closing_tokens=seed % 3)


# --- the promise ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("notation", NOTATIONS)
@pytest.mark.parametrize("policy", Policy)
def test_under_the_grammar_no_trace_is_illegal(notation: str, policy: Policy) -> None:
    """12 pairs of notation and policy x 4 ways to sample x 16 combinations of caps x 4, or 14: 10,000 traces."""
    each = 14 if FULL else 4
    grammar, count, written, forced = GRAMMARS[notation], 0, Counter[str](), Counter[str]()
    for (number, sampling), seed in itertools.product(enumerate(SAMPLINGS.values()), range(16)):
        options = random_options(seed)
        first = 100 * seed + 10_000 * number
        rows = write([make_row(first + n, notation, policy, options, **sampling) for n in range(each)], seed + number)
        for row in rows:
            check_legal(row, grammar, options)
            written.update(State(label.state).name for label in label_tokens(row.generated, 0, grammar))
            forced.update(event.cause for event in events(row, Forced))
        count += len(rows)
    assert count == 4 * 16 * each
    assert {"OUTSIDE", "THOUGHT", "SOLUTION", "ANSWER"} <= written.keys()  # the traces are worth looking at
    assert {Cause.GRAMMAR, Cause.THOUGHT, Cause.SOLUTION, Cause.ENDING} <= forced.keys()
    assert NOTATIONS[notation].nested <= (Cause.DEPTH in forced)


def check_legal(row: Row, grammar: Grammar, options: ControlOptions) -> None:
    ended = row.finished == "eos"
    assert is_legal_trace((*PROMPT, *row.generated), len(PROMPT), grammar, finished=ended), row.generated
    assert not events(row, Illegal)
    blocks = LiveContext(grammar.markers, Policy.OFF)
    depths = [blocks.push(token).depth for token in row.generated]
    if options.max_depth is not None:
        assert max(depths, default=0) <= options.max_depth
    if options.force_answer is not None and row.finished == "length":
        assert depths[-1] == 0  # the budget ended in the answer, with no block open
        assert not row.request.thinking or THINK_END in row.generated


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("notation", NOTATIONS)
def test_what_was_legal_stays_the_same(notation: str, sampling: str) -> None:
    """The same noise: up to the first token that the grammar changes, the constrained trace is the free one."""
    same = longer = 0
    for number in range(150 if FULL else 60):
        seen = []
        for constraints in (None, "grammar"):
            options = ControlOptions(constraints)
            row = make_row(number, notation, Policy.RECOMPUTE, options, max_gen_toks=25, **SAMPLINGS[sampling])
            seen.append(write([row], number)[0])
        free, held = seen
        illegal = next((e.index for e in events(free, Illegal)), None)
        changed = next((e.index for e in events(held, Forced)), None)
        assert illegal == changed
        stop = None if illegal is None else illegal - len(PROMPT)
        assert held.generated[:stop] == free.generated[:stop]
        same += illegal is None
        longer += illegal is not None
        if illegal is not None:
            assert next(e.wanted for e in events(held, Forced)) == free.generated[stop]
    assert longer > 10 and same > 0


def test_without_options_nothing_changes() -> None:
    for number in range(50):
        row = make_row(number, "hcot", Policy.RECOMPUTE, ControlOptions(), temperature=1.0)
        twin = make_row(number, "hcot", Policy.RECOMPUTE, ControlOptions(), temperature=1.0)
        twin.controller = None
        assert write([row], number)[0].generated == write([twin], number)[0].generated
        assert not events(row, Forced)


def test_log_probabilities_before_and_after_the_mask() -> None:
    options = ControlOptions("grammar", max_block_tokens=4)
    rows = [
        make_row(n, "hcot", Policy.RECOMPUTE, options, temperature=0.7, logprobs=True, max_gen_toks=1)
        for n in range(40)
    ]
    write(rows, 5)
    raw = (scores_of(rows, 5000) / 0.7).log_softmax(-1)
    for row, scores in zip(rows, raw, strict=True):
        [choice] = row.choices
        legal = sorted(set(range(VOCAB)) - {SPLIT, CLOSE})
        assert choice.logprob == pytest.approx(scores[choice.token].item(), abs=1e-6)
        assert choice.legal_logprob == pytest.approx(
            (scores[choice.token] - scores[legal].logsumexp(0)).item(), abs=1e-6
        )


# --- the sizes and caps -----------------------------------------------------------------------------------------------


def sizes(ids: Sequence[int]) -> tuple[int, int | None]:
    """The slow twin: thought and solution of the innermost open block in what a prune would have left."""
    markers = MARKERS["hcot"]
    context = LiveContext(markers, Policy.RECOMPUTE)
    for token in ids:
        context.push(token)
    block = context._blocks[-1]
    if block.split is None:
        return len(context.live) - block.open - 1, None
    return block.split - block.open - 1, len(context.live) - block.split - 1


@settings(max_examples=300)
@given(strategies.well_formed(MARKERS["hcot"]))
def test_sizes_are_those_after_pruning(ids: list[int]) -> None:
    controller = Controller(ControlOptions(), GRAMMARS["hcot"])
    for end, token in enumerate(ids, start=1):
        controller.push(token)
        empty = [i for i in range(1, end) if ids[i] == SPLIT and ids[i - 1] == OPEN]  # is not pruned, nor smaller
        if controller.cursor.depth and not empty:
            size = controller._sizes[-1]
            assert (size.thought, size.solution if size.split else None) == sizes(ids[:end])


def follow(options: ControlOptions, ids: Sequence[int], budget: Budget = PLENTY, **kwargs: Any) -> Controller:
    controller = Controller(options, GRAMMARS["hcot"], **kwargs)
    for token in ids:
        controller.directive(budget)
        controller.push(token)
    return controller


def test_a_long_thought_gets_its_split() -> None:
    options = ControlOptions(max_block_tokens=3)
    assert follow(options, [OPEN, 20, 21]).directive(PLENTY).forced is None
    assert follow(options, [OPEN, 20, 21, 22]).directive(PLENTY)[1:] == (SPLIT, Cause.THOUGHT)
    # a finished block within counts as its solution and two markers
    inner = [OPEN, 20, 21, SPLIT, 22, CLOSE]
    assert follow(options, [OPEN, *inner]).directive(PLENTY).forced == SPLIT
    assert follow(options, [OPEN, *inner[:-2], CLOSE]).directive(PLENTY).forced is None


def test_a_long_solution_gets_its_close() -> None:
    options = ControlOptions(max_solution_tokens=2)
    assert follow(options, [OPEN, 20, SPLIT, 21]).directive(PLENTY).forced is None
    assert follow(options, [OPEN, 20, SPLIT, 21, 22]).directive(PLENTY)[1:] == (CLOSE, Cause.SOLUTION)


def test_the_depth_is_limited() -> None:
    options = ControlOptions(max_depth=2)
    assert follow(options, [OPEN, 20]).directive(PLENTY).illegal == frozenset()
    deep = follow(options, [OPEN, 20, OPEN])
    assert deep.directive(PLENTY).illegal == {OPEN}
    assert deep.cause(OPEN) is Cause.DEPTH


def test_causes_under_grammar_and_depth() -> None:
    options = ControlOptions("grammar", max_depth=1)
    controller = follow(options, [OPEN, 20])
    assert {OPEN, CLOSE, EOS} <= controller.directive(PLENTY).illegal
    assert [controller.cause(i) for i in (OPEN, CLOSE)] == [Cause.DEPTH, Cause.GRAMMAR]


def test_a_lead_is_forced_where_it_is_due() -> None:
    grammar = GRAMMARS["memento"]
    for options, cause in (
        (ControlOptions("grammar"), Cause.GRAMMAR),
        (ControlOptions(max_block_tokens=1), Cause.THOUGHT),
    ):
        controller = Controller(options, grammar)
        for token in (OPEN, 20, SPLIT):
            controller.push(token)
        assert controller.directive(PLENTY)[1:] == (LEAD, cause)
    free = Controller(ControlOptions(max_depth=1), grammar)
    for token in (OPEN, 20, SPLIT):
        free.push(token)
    assert free.directive(PLENTY).forced is None


def test_an_acting_prompt_leaves_blocks_open() -> None:
    controller = Controller(ControlOptions("grammar"), GRAMMARS["hcot"])
    controller.begin([10, OPEN, 11, SPLIT, 12])
    assert controller.cursor.state is State.SOLUTION
    assert CLOSE not in controller.directive(PLENTY).illegal
    controller.push(CLOSE)
    assert controller.cursor.state is State.OUTSIDE


# --- the forced answer ------------------------------------------------------------------------------------------------


def ending(ids: Sequence[int], options: ControlOptions, budget: Budget, **kwargs: Any) -> list[int]:
    """What is forced when the budget becomes `budget` behind `ids`, as long as anything is; the model writes 30."""
    controller, forced = follow(options, ids, **kwargs), []
    while len(forced) < 50:
        directive = controller.directive(budget)
        token = 30 if directive.forced is None else directive.forced
        if directive.forced is None and not controller._sizes:
            return forced
        forced.append(token)
        controller.push(token)
    raise AssertionError("never ends")


def test_open_blocks_are_closed_and_the_thinking_ends() -> None:
    options = ControlOptions(force_answer=10, closing_tokens=2)
    budget = Budget(tokens=11, room=1000)
    assert ending([OPEN, 20, OPEN, 21], options, budget, thinking=True) == [
        SPLIT, 30, 30, CLOSE, SPLIT, 30, 30, CLOSE, THINK_END
    ]  # fmt: skip
    assert ending([20], options, budget, thinking=True) == [THINK_END]
    assert ending([20], options, budget, thinking=False) == []
    assert ending([OPEN, 20, SPLIT, 21, 22, 23], options, budget) == [CLOSE]
    assert ending([THINK, 20, THINK_END, 21], options, budget) == []
    none = replace(options, closing_tokens=0)
    assert ending([OPEN, 20, OPEN, 21], none, budget, thinking=True) == [SPLIT, CLOSE, SPLIT, CLOSE, THINK_END]


def test_while_the_answer_is_forced_no_block_opens() -> None:
    options = ControlOptions(force_answer=10)
    controller = follow(options, [20], Budget(5, 1000), thinking=True)
    assert controller.directive(Budget(5, 1000)).forced is None or controller.ending
    controller.push(THINK_END)
    assert OPEN in controller.directive(Budget(4, 1000)).illegal
    assert controller.cause(OPEN) is Cause.ENDING


def test_the_reserve_is_kept() -> None:
    """The answer is forced no sooner than needed for its reserve and what closing the blocks may take."""
    options, ids = ControlOptions(force_answer=10, closing_tokens=2), [OPEN, 20, 21]
    each = 2 + 3
    assert follow(options, ids).directive(Budget(10 + each + 2, 10**6)).forced is None
    assert follow(options, ids).directive(Budget(10 + each + 1, 10**6)).forced == SPLIT


def test_the_room_in_the_context_is_a_budget_too() -> None:
    options, ids = ControlOptions(force_answer=10, closing_tokens=2), [OPEN, *range(20, 70)]
    tokens = 10**6
    assert follow(options, ids, prunes=True).directive(Budget(tokens, 7)).forced is None  # 50 tokens will be pruned
    assert follow(options, ids, prunes=True).directive(Budget(tokens, 6)).forced == SPLIT
    assert follow(options, ids, prunes=False).directive(Budget(tokens, 17)).forced is None
    assert follow(options, ids, prunes=False).directive(Budget(tokens, 16)).forced == SPLIT


@pytest.mark.parametrize("policy", Policy)
def test_a_context_that_fills_up_still_gets_an_answer(policy: Policy) -> None:
    """Rows that think in a context of 40 tokens and do not end: each leaves the thinking with its reserve."""
    options = ControlOptions("grammar", force_answer=8, closing_tokens=1, max_depth=3)
    rows = [
        make_row(3 * n + 1, "hcot", policy, options, context=40, min_gen_toks=300, max_gen_toks=300) for n in range(60)
    ]
    write(rows, 3)
    for row in rows:
        assert row.finished == "context"
        assert len(row.generated) - 1 - row.generated.index(THINK_END) >= 8


# --- loops ------------------------------------------------------------------------------------------------------------


def test_a_loop_ends_a_row_or_forces_its_answer() -> None:
    for answer, finished in ((None, "loop"), (5, "eos")):
        options = ControlOptions("grammar", loop_tokens=20, force_answer=answer, closing_tokens=0)
        row = make_row(1, "hcot", Policy.RECOMPUTE, options, max_gen_toks=500)
        scores = torch.zeros(1, VOCAB)
        scores[0, OPEN], scores[0, 15], scores[0, EOS] = 1, 3, 2
        first = True
        while not row.finished:
            wanted = scores.clone()
            if first:
                wanted[0, OPEN] = 9
            if THINK_END in row.generated:
                wanted[0, EOS] = 9
            first = False
            row.accept(sample(wanted, [row.draw()])[0])
            row._steps.clear()
        assert row.finished == finished
        assert len(events(row, Loop)) == statistics(row.recorder.events).loops == 1
        assert len(row.generated) < 60
        if answer:
            assert row.generated[-4:] == [SPLIT, CLOSE, THINK_END, EOS]


def test_closing_many_blocks_is_no_loop() -> None:
    """Fourteen blocks are closed by force, one like the other; a loop in the answer behind them still counts."""
    options = ControlOptions("grammar", loop_tokens=8, force_answer=30, closing_tokens=0)
    row = make_row(1, "hcot", Policy.RECOMPUTE, options, max_gen_toks=120)
    plain = [token for n in range(14) for token in (OPEN, 10 + n % 9, 10 + n % 7)]
    while not row.finished:
        scores = torch.zeros(1, VOCAB)
        scores[0, plain[len(row.generated)] if len(row.generated) < len(plain) else 15] = 9
        row.accept(sample(scores, [row.draw()])[0])
        row._steps.clear()
    assert row.finished == "loop"
    assert row.generated[-9:] == [15] * 9
    assert row.context.depth == 0 and THINK_END in row.generated
    assert len(events(row, Loop)) == 1


def test_a_forced_answer_keeps_the_cap_of_solutions() -> None:
    options = ControlOptions(max_solution_tokens=3, force_answer=20, closing_tokens=32)
    row = make_row(1, "hcot", Policy.RECOMPUTE, options, max_gen_toks=60)
    while not row.finished:
        scores = torch.zeros(1, VOCAB)
        scores[0, OPEN if not row.generated else 15] = 9
        row.accept(sample(scores, [row.draw()])[0])
        row._steps.clear()
    split = row.generated.index(SPLIT)
    assert row.generated[split : split + 5] == [SPLIT, 15, 15, 15, CLOSE]


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"constraints": "regex"}, "constraints='regex' is not allowed; choose one of grammar"),
        ({"max_depth": 0}, "max_depth=0 is not allowed; give a whole number from 1 up"),
        ({"max_block_tokens": -5}, "max_block_tokens=-5"),
        ({"max_solution_tokens": 2.5}, "max_solution_tokens=2.5"),
        ({"force_answer": True}, "force_answer=True"),
        ({"closing_tokens": -1}, "closing_tokens=-1 is not allowed; give a whole number from 0 up"),
        ({"closing_tokens": None}, "closing_tokens=None"),
        ({"loop_tokens": "many"}, "loop_tokens='many'"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ControlOptions(**options)


def test_the_options_in_force() -> None:
    assert ControlOptions().controls == {}
    assert ControlOptions(force_answer=9).controls == {"force_answer": 9, "closing_tokens": 32}
    assert not ControlOptions(loop_tokens=5).steers
    assert ControlOptions(max_depth=2).steers


# --- through the engine -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["qwen2", "qwen3", "llama"])
def model(request: pytest.FixtureRequest):
    return favour(tiny_model(request.param, torch.float64, vocab_size=64), [EOS, OPEN, SPLIT, CLOSE, THINK_END], 2.5)


def requests_of(count: int, **params: Any) -> Iterator[Request]:
    for n in range(count):
        settings = SamplingParams(
            **{"max_gen_toks": 48, "temperature": n % 2 * 1.2, "seed": n, "logprobs": True} | params
        )
        yield Request(str(n), (*PROMPT, 20 + n), settings, thinking=n % 3 > 0)


@pytest.mark.parametrize("policy", Policy)
def test_no_model_breaks_the_grammar_in_the_engine(model, policy: Policy) -> None:
    options: dict[str, Any] = {
        "markers": MARKERS["hcot"], "policy": policy, "eos_ids": (EOS,), "think_ids": (THINK, THINK_END),
        "self_check": False, "poison": True,
    }  # fmt: skip
    free = Engine(model, slots=5, **options).generate(requests_of(24))
    held = Engine(model, slots=5, constraints="grammar", **options).generate(requests_of(24))
    assert sum(done.statistics.illegal_tokens > 0 for done in free) > 10  # the free ones need it
    for one, other in zip(free, held, strict=True):
        assert other.statistics.illegal_tokens == 0
        assert is_legal_trace(
            (*other.request.prompt_ids, *other.token_ids), 4, GRAMMARS["hcot"], finished=other.finish_reason == "eos"
        )
        if one.statistics.illegal_tokens == 0:
            assert one.token_ids == other.token_ids
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-9)
        assert all(after >= before - 1e-9 for before, after in zip(other.logprobs, other.legal_logprobs, strict=True))
        assert one.legal_logprobs == one.logprobs


def test_every_batch_gives_the_same_controlled_traces(model) -> None:
    options: dict[str, Any] = {
        "markers": MARKERS["hcot"], "policy": "recompute", "eos_ids": (EOS,), "think_ids": (THINK, THINK_END),
        "self_check": False, "constraints": "grammar", "max_depth": 2, "max_block_tokens": 6, "force_answer": 12,
        "closing_tokens": 2,
    }  # fmt: skip
    alone = Engine(model, slots=1, **options).generate(requests_of(16))
    batch = Engine(model, slots=7, **options).generate(requests_of(16))
    assert [done.token_ids for done in alone] == [done.token_ids for done in batch]
    assert sum(sum(done.statistics.forced.values()) for done in alone) > 30


def test_stop_ids_do_not_end_a_block(model) -> None:
    stop = 30
    requests = list(requests_of(12, stop_ids=(stop,), temperature=1.5, max_gen_toks=120))
    options: dict[str, Any] = {"markers": MARKERS["hcot"], "policy": "recompute", "eos_ids": (), "self_check": False}
    for done in Engine(model, constraints="grammar", **options).generate(requests):
        assert done.finish_reason != "stop" or done.statistics.malformed.get("unclosed", 0) == 0


def test_controls_need_markers(model) -> None:
    with pytest.raises(ValueError, match="constraints=grammar needs the markers"):
        Engine(model, policy="off", constraints="grammar", self_check=False)


def test_a_cursor_begins_where_the_prompt_left_off() -> None:
    cursor = Cursor(GRAMMARS["hcot"])
    cursor.begin([10, OPEN, 11])
    assert (cursor.state, cursor.depth, cursor.in_solution) == (State.THOUGHT, 1, False)
