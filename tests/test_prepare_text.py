"""Sentences are cut without loss and not within mathematics; outlines are valid or refused, and lead there and back."""

from __future__ import annotations

import json
import os
import pickle
import re
import time
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hcot_lmeval.grammar import Grammar, is_legal_trace
from hcot_lmeval.markup import PRESETS, Markup
from hcot_lmeval.prepare.outline import Block, Outline, assemble, spelled_markers
from hcot_lmeval.prepare.reasons import CODES, Refused
from hcot_lmeval.prepare.sentences import read_sentences, split_sentences, whole_spans
from tests.reference import EOS, FIRST_TEXT, MARKERS

DATA = os.environ.get("HCOT_LMEVAL_TEST_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="set HCOT_LMEVAL_TEST_DATA to a folder with traces/")
THINK = (1000, 1001)


def real_traces() -> list[str]:
    path = Path(str(DATA)) / "traces" / "reasoning_traces.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [row["generated_solution"].partition("<think>")[2].partition("</think>")[0] for row in rows]


@pytest.mark.parametrize(
    "pieces",
    [
        ["Then x = 3.5. ", "So y = .5 follows. ", "Done!"],
        [r"We get $f(x) = 1. \text{Next! } y$ here. ", "Now go."],
        [r"So \( a. B \) and \[ c. \quad D! \] hold. ", "Next."],
        ["Then $$\na = 1.\nB = 2.\n$$ is\n", "Right."],
        ["\\begin{align}\na &= 1. \\\\[2pt]\n\nB &= 2.\n\\end{align}\n", "So."],
        ["\\begin{cases}a. B\n\\begin{cases}c\n\\end{cases}\nd\n\\end{cases}\n", "So."],
        ["So $x = 1.$ ", "Then \\( y = 2. \\) ", "Next."],
        ["It is \\boxed{5. \\text{Or so. Yes}}. ", "Done."],
        ["```python\nx = 1.\n\nprint('A. B')\n```\n", "That prints."],
        ["Use `a. B` here. ", "Then stop."],
        ["| a | b |\n|---|---|\n| 1. A | 2 |\n", "So there."],
        ["It holds (e.g. for 3. Or 4.) here. ", "So?"],
        ["For example, e.g. this, i.e. that, cf. Fig. 3 and Eq. (4) and no. 7. ", "The answer is no. ", "So we stop."],
        ["Then 3! = 6 and n! ways. ", "So 4! ", "Then 5! C(5, 2) more."],
        ["Sum 1 + 2 + ... + 9 is 45... ", "Wait... ", "No."],
        ["1. First item.\n", "2. Second item\n", "- third. ", "More\n", "* fourth"],
        ["1.\nthe item\n", "(a) the next\n"],
        ["So the answer is 5. ", "x is even. ", "Is it? ", "yes. no"],
        ["A line that is hard wrapped goes on behind its line break with a\nsmall letter. ", "Then this."],
        ["Short line\n", "then another\n\n", "x = 1\n", "y = 2"],
        ["\n \nWe begin.\n\n\n", "We end.\r\n", "Now."],
        ["所以答案是5。", "接下来我们计算。 ", "对吗？", "对"],
        ["तो उत्तर 5 है। ", "अब देखें।"],
        ["هل هذا صحيح؟ ", "نعم. ", "إذن نتابع."],
        ["Das gilt z.B. hier bzw. dort. ", "Also ja."],
        ["**So we stop.** ", 'He said "Stop." ', "Then (he left)."],
        ["It costs $5 and then. ", "So $6 more. ", "Right."],
    ],
)
def test_cuts(pieces):
    """Each list is a text and where it is cut."""
    assert split_sentences("".join(pieces)) == pieces


def test_blank_texts():
    assert split_sentences("") == []
    assert split_sentences(" \n\n") == [" \n\n"]


def test_what_is_never_closed_keeps_nothing_together():
    for opening in ("$", "$$", "\\(", "\\[", "\\begin{x}", "```\n", "\\text{", "("):
        assert len(split_sentences(f"So {opening} a is 1. Then.\n\nNext. Now.")) >= 3, opening


PROSE = st.sampled_from(
    [
        "So we go on. ",
        "Wait, no! ",
        "Is it 3.5? ",
        "Then\n",
        "Now:\n\n",
        "- one\n",
        "2. two\n",
        "所以。",
        "e.g. ",
        "(a. B) ",
    ]
)
INNER = st.lists(
    st.sampled_from(["x", ". Next", "! A", "? B", "。", "\\frac{1. A}{2}", "\\\\", "3.5", " = "]), min_size=1
)
DISPLAY = st.lists(st.sampled_from(["x = 1.\n", "Y! ", "& a. B \\\\\n", "2.5 "]), min_size=1).map("".join)
MATHEMATICS = st.one_of(
    INNER.map("".join).map(str.strip).filter(bool).map("${}$".format).filter(lambda text: not text.endswith("\\$")),
    INNER.map("".join).map("\\({}\\)".format).filter(lambda text: not text.endswith("\\\\)")),
    DISPLAY.map("\\[\n{}\\]".format),
    DISPLAY.map("$$\n{}$$".format),
    DISPLAY.map("\\begin{{align*}}{}\\end{{align*}}".format),
)


@given(st.lists(st.one_of(PROSE, MATHEMATICS.map(lambda text: text + " ")), max_size=12))
@settings(max_examples=300)
def test_mathematics_is_never_cut(parts):
    text, cuts = "".join(parts), set()
    pieces = split_sentences(text)
    assert "".join(pieces) == text
    for piece in pieces:
        cuts.add(len(piece) + max(cuts, default=0))
    at = 0
    for part in parts:
        if part.lstrip().startswith(("$", "\\")):
            assert not cuts & set(range(at + 1, at + len(part.rstrip()))), part
        at += len(part)


@given(st.text(alphabet="aB1.!?。 \n\r\\$()[]{}`|-*:,", max_size=60))
@settings(max_examples=500)
def test_nothing_is_lost_of_any_text(text):
    pieces = split_sentences(text)
    assert "".join(pieces) == text
    assert all(piece.strip() for piece in pieces) or not text.strip()
    spans = list(whole_spans(text))
    assert all(one[1] <= two[0] for one, two in pairwise(spans))


@needs_data
def test_real_traces_are_cut_without_loss_and_not_within_formulas():
    traces = real_traces()
    assert len(traces) == 26
    formula = re.compile(r"\\\[.*?\\\]|\\\([^\n]*?\\\)|\$\$.*?\$\$|\$[^$\n]+\$|\\boxed\{[^\n{}]*\}|\d\.\d", re.DOTALL)
    found = 0
    for trace in traces:
        pieces = split_sentences(trace)
        assert "".join(pieces) == trace
        assert all(piece.strip() for piece in pieces)
        assert max(map(len, pieces)) < 500 and len(pieces) > 25
        cuts, at = set(), 0
        for piece in pieces:
            at += len(piece)
            cuts.add(at)
        for formula_found in formula.finditer(trace):
            found += 1
            assert not cuts & set(range(formula_found.start() + 1, formula_found.end())), formula_found[0]
    assert found > 500


def test_long_texts_take_time_in_proportion():
    """Ten thousand openings that nothing closes: a search that starts anew at each would never end."""
    for opening in ("$ ", "\\( ", "\\[ ", "( ", "` ", "\\text{ ", "a. ", "\n"):
        assert "".join(split_sentences(opening * 10_000)) == opening * 10_000


LONG = {
    "fences that are never closed": lambda n: "".join("`" * (3 + i) + "\na\n" for i in range(int((2 * n) ** 0.5))),
    "fences of one kind": lambda n: "~~~x\n" * (n // 5),
    "hard-wrapped lines": lambda n: "a line of sixty characters and more that goes on in small letters\n" * (n // 66),
    "stops that end nothing": lambda n: "e.g. " * (n // 5),
    "colons": lambda n: ":" * n + "a",
    "values": lambda n: ": 1" * (n // 3) + "a",
    "spaces": lambda n: " " * n + "a" + "\n" * n,
}


@pytest.mark.parametrize("kind", LONG)
def test_long_texts_take_time_linear_in_them(kind):
    """Ten times the text takes at most thirty times as long; were it quadratic, a hundred times."""

    def seconds(size):
        text, best = LONG[kind](size), float("inf")
        for _ in range(2):
            began = time.process_time()
            for sentence in read_sentences(split_sentences(text)):
                assert sentence.result < 9 and sentence.announces in (True, False)
            best = min(best, time.process_time() - began)
        return best

    assert seconds(60_000) < 30 * max(seconds(6_000), 0.002)


# Outlines ------------------------------------------------------------------------------------------------------------

WORDS = st.text(alphabet="ab [](){}<|/>\nTHOUGHT", min_size=1, max_size=6)
SOLUTIONS = WORDS.filter(lambda text: text.strip() and not spelled_markers(text))


@st.composite
def outlines(draw: st.DrawFn, depth: int = 3) -> tuple[list[str], Outline]:
    """Pieces and properly nested blocks over them, in a random order of the outer ones."""
    pieces = draw(st.lists(WORDS, min_size=1, max_size=14).filter(lambda parts: not spelled_markers("".join(parts))))
    blocks = draw(_blocks(0, len(pieces), depth))
    return pieces, Outline(len(pieces), tuple(sorted(blocks, key=lambda block: (-block.stop, block.start))))


def _blocks(start: int, stop: int, depth: int) -> st.SearchStrategy[list[Block]]:
    @st.composite
    def build(draw: st.DrawFn) -> list[Block]:
        found: list[Block] = []
        at = start
        while depth and at < stop and draw(st.booleans()):
            first = draw(st.integers(at, stop - 1))
            end = draw(st.integers(first + 1, stop))
            split = draw(st.none() | st.integers(first + 1, end - 1)) if end - first > 1 else None
            solution = draw(SOLUTIONS) if split is None else None
            kind = draw(st.sampled_from(["subproblem", "backtrack"]))
            found.append(Block(first, end, solution, split, kind))
            for low, high in pairwise([first, *([] if split is None else [split]), end]):
                found += _proper(draw(_blocks(low, high, depth - 1)), low, high)
            at = end
        return found

    return build()


def _proper(blocks: list[Block], low: int, high: int) -> list[Block]:
    """Without blocks over all that their outer block is over: two of those have no order of their own."""
    return [block for block in blocks if (block.start, block.stop) != (low, high)]


def written(pieces: list[str], blocks: tuple[Block, ...], markup: Markup, start: int, stop: int) -> str:
    """The slow twin of `assemble`: recursion over what is within what."""
    out, at = "", start
    inside = [b for b in blocks if start <= b.start and b.stop <= stop]
    tops = [b for b in inside if not any(o is not b and o.start <= b.start and b.stop <= o.stop for o in inside)]
    for block in sorted(tops, key=lambda block: block.start):
        rest = tuple(b for b in inside if b is not block)
        end = block.stop if block.split is None else block.split
        solution = block.solution or written(pieces, rest, markup, end, block.stop)
        thought = written(pieces, rest, markup, block.start, end)
        out += "".join(pieces[at : block.start])
        out += f"{markup.open}{thought}{markup.split}{markup.lead or ''}{solution}{markup.close}"
        at = block.stop
    return out + "".join(pieces[at:stop])


def token_ids(trace: str, notation: str) -> list[int]:
    """The trace tokenised at its markers; every character between them is a token of text."""
    markup, ids = PRESETS[notation], MARKERS[notation]
    known = dict(
        zip(markup.markers, [ids.open, ids.split, *([ids.lead] if markup.lead else []), ids.close], strict=True)
    )
    parts = re.split(f"({'|'.join(map(re.escape, known))})", trace)
    return [i for part in parts for i in ([known[part]] if part in known else [FIRST_TEXT] * len(part))]


def is_legal(trace: str, notation: str) -> bool:
    grammar = Grammar(MARKERS[notation], THINK, frozenset({EOS}))
    return is_legal_trace([FIRST_TEXT, *token_ids(trace, notation)], 1, grammar)


@given(outlines(), st.sampled_from(sorted(PRESETS)))
@settings(max_examples=300)
def test_there_and_back(case, notation):
    pieces, outline = case
    markup = PRESETS[notation]
    assert Outline.from_json(json.loads(json.dumps(outline.to_json()))) == outline
    if not markup.nested and outline.depth > 1:
        with pytest.raises(Refused, match="depth 2, allowed is 1"):
            assemble(pieces, outline, markup)
        return
    trace = assemble(pieces, outline, markup)
    assert trace == written(pieces, outline.blocks, markup, 0, len(pieces))
    assert is_legal(trace, notation)
    assert trace.count(markup.open) == len(outline.blocks)


@given(outlines())
@settings(max_examples=200)
def test_depth_counts_blocks_around_a_sentence(case):
    _, outline = case
    around = [sum(b.start <= i < b.stop for b in outline.blocks) for i in range(outline.sentences)]
    assert outline.depth == max(around, default=0)
    outline.require_depth(outline.depth)
    if outline.depth:
        with pytest.raises(Refused) as fault:
            outline.require_depth(outline.depth - 1)
        assert fault.value.code == "too_deep"


@pytest.mark.parametrize(
    ("code", "blocks"),
    [
        ("unknown_kind", [{"start": 0, "stop": 2, "solution": "x", "kind": "detour"}]),
        ("out_of_range", [{"start": -1, "stop": 2, "solution": "x"}]),
        ("out_of_range", [{"start": 0, "stop": 10, "solution": "x"}]),
        ("out_of_range", [{"start": 2, "stop": 4, "split": 1}]),
        ("out_of_range", [{"start": 2, "stop": 4, "split": 5}]),
        ("empty_block", [{"start": 2, "stop": 2, "solution": "x"}]),
        ("empty_block", [{"start": 3, "stop": 2, "solution": "x"}]),
        ("empty_block", [{"start": 2, "stop": 4, "split": 2}]),
        ("empty_solution", [{"start": 2, "stop": 4, "split": 4}]),
        ("empty_solution", [{"start": 2, "stop": 4}]),
        ("empty_solution", [{"start": 2, "stop": 4, "solution": " \n"}]),
        ("both_solutions", [{"start": 2, "stop": 4, "split": 3, "solution": "x"}]),
        ("overlap", [{"start": 0, "stop": 4, "solution": "x"}, {"start": 3, "stop": 6, "solution": "x"}]),
        ("overlap", [{"start": 0, "stop": 6, "split": 4}, {"start": 3, "stop": 5, "solution": "x"}]),
        ("overlap", [{"start": 0, "stop": 6, "split": 4}, {"start": 0, "stop": 6, "solution": "x"}]),
        ("marker_in_solution", [{"start": 0, "stop": 2, "solution": "see [RETURN]"}]),
        ("marker_in_solution", [{"start": 0, "stop": 2, "solution": "</think>"}]),
        ("marker_in_solution", [{"start": 0, "stop": 2, "solution": "<|block_end|>"}]),
        ("not_an_outline", [{"start": 0}]),
        ("not_an_outline", [{"start": 0, "stop": 2.0, "solution": "x"}]),
        ("not_an_outline", [{"start": False, "stop": 2, "solution": "x"}]),
        ("not_an_outline", [{"start": 0, "stop": 2, "solution": "x", "end": 3}]),
        ("not_an_outline", ["0-2"]),
        ("not_an_outline", {"start": 0}),
    ],
)
def test_faults_have_codes(code, blocks):
    with pytest.raises(Refused) as fault:
        Outline.from_json({"sentences": 9, "blocks": blocks})
    assert fault.value.code == code
    assert str(fault.value).startswith(CODES[code])
    again = pickle.loads(pickle.dumps(fault.value))
    assert (again.code, str(again)) == (code, str(fault.value))


def test_null_is_the_same_as_nothing():
    data = {"start": 0, "stop": 2, "split": None, "solution": "x", "kind": None}
    assert Outline.from_json({"sentences": 2, "blocks": [data]}) == Outline(2, (Block(0, 2, "x"),))


def test_blocks_are_put_in_order_and_the_first_of_two_is_the_outer_one():
    inner, outer, later = Block(0, 3, split=2), Block(0, 3, "out"), Block(4, 5, "late")
    assert Outline(5, (later, outer, inner)).blocks == (outer, inner, later)
    assert assemble(list("abcde"), Outline(5, (later, outer, inner)), PRESETS["pencil"]) == (
        "[CALL][CALL]ab[SEP]c[RETURN][SEP]out[RETURN]d[CALL]e[SEP]late[RETURN]"
    )


@pytest.mark.parametrize("text", ["a [THOUGHT] b", "c[RETURN]", "a </think>", "<think>"])
def test_text_that_spells_a_marker_is_refused(text):
    with pytest.raises(Refused) as fault:
        assemble([text, "b"], Outline(2), PRESETS["hcot"])
    assert fault.value.code == "marker_in_source"


def test_a_marker_that_text_and_marker_spell_together_is_refused():
    markup = Markup("odd", "<<", "==", ">>", keep=frozenset())
    with pytest.raises(Refused) as fault:
        assemble(["a<", "b"], Outline(2, (Block(1, 2, "x"),)), markup)
    assert fault.value.code == "marker_in_source"


def test_other_pieces_are_refused():
    with pytest.raises(Refused) as fault:
        assemble(["a"], Outline(2), PRESETS["hcot"])
    assert fault.value.code == "other_pieces"
