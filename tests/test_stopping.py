"""Stop strings: across tokens, in the answer part alone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hcot_lmeval.engine.rows import IncrementalText, StopStrings
from tests.tiny import tiny_tokenizer

THINK = ("<think>", "</think>")


def run(pieces: list[str], strings: list[str], thinking: bool = False, depths: list[int] | None = None):
    """Feeds one piece a token; returns (tokens consumed, stop string, text before it) or None."""
    stops = StopStrings(strings, lambda ids: "".join(pieces[i] for i in ids), THINK, thinking)
    for number in range(len(pieces)):
        stops.append(number, depths[number] if depths else 0)
        hit = stops.find()
        if hit:
            return number + 1, hit[0], stops.text[: hit[1]]
    return None


@pytest.mark.parametrize(
    ("pieces", "strings", "expected"),
    [
        (["a", "b", "STOP", "c"], ["STOP"], (3, "STOP", "ab")),
        (["a", "ST", "OP", "c"], ["STOP"], (3, "STOP", "a")),
        (["a S", "T", "O", "P c"], ["STOP"], (4, "STOP", "a ")),
        (["xST", "y", "STOP"], ["STOP"], (3, "STOP", "xSTy")),
        (["one\n", "\ntwo"], ["\n\n", "two"], (2, "\n\n", "one")),
        (["ab"], ["b", "a"], (1, "a", "")),
        (["nothing"], ["STOP"], None),
    ],
)
def test_the_first_match_ends_the_row(pieces, strings, expected):
    assert run(pieces, strings) == expected


def test_thinking_is_exempt():
    pieces = ["<think>", "STOP", "</think>", "ST", "OP"]
    assert run(pieces, ["STOP"]) == (5, "STOP", "<think>STOP</think>")
    assert run(pieces[1:], ["STOP"], thinking=True) == (4, "STOP", "STOP</think>")
    assert run(["STOP", " never closed"], ["STOP"], thinking=True) is None


def test_thinking_tags_may_span_tokens_and_repeat():
    pieces = ["<th", "ink>", "S", "</thi", "nk>", "x", "<think>", "S", "</think>", "y", "S"]
    assert run(pieces, ["S"]) == (11, "S", "".join(pieces[:-1]))
    assert run(["<think></think>S"], ["S"]) == (1, "S", "<think></think>")


def test_a_match_does_not_begin_in_the_thinking():
    assert run(["<think>", "S", "</think>", "T"], ["S</think>T", "T"]) == (4, "T", "<think>S</think>")


def test_open_blocks_are_exempt():
    pieces = ["[", "STOP", "]", "STOP"]
    assert run(pieces, ["STOP"], depths=[1, 1, 0, 0]) == (4, "STOP", "[STOP]")


@pytest.mark.parametrize("string", ["]", "RETURN", "x[RETURN]"])
def test_the_closing_marker_belongs_to_its_block(string):
    pieces = ["[THOUGHT]", "t", "[SOLUTION]", "x", "[RETURN]", "y", string]
    depths = [1, 1, 1, 1, 0, 0, 0]
    assert run(pieces, [string], depths=depths) == (7, string, "".join(pieces[:-1]))
    assert run(["x", "[RETURN]"], [string]) is not None, "with no block open it is text"


def test_what_was_passed_over_does_not_match_later():
    stops = StopStrings(["ab", "abcdef"], lambda ids: "".join("abcdefab"[i] for i in ids))
    for number in range(3):
        stops.append(number, 0)
        stops.pass_over()
    found = []
    for number in range(3, 8):
        stops.append(number, 0)
        found.append(stops.find())
    assert found == [None, None, ("abcdef", 0), ("abcdef", 0), ("abcdef", 0)]


@given(st.text(max_size=40))
def test_incremental_text_equals_the_whole(text):
    tokenizer = tiny_tokenizer()
    ids = tokenizer.encode(text, add_special_tokens=False)
    growing = IncrementalText(lambda part: tokenizer.decode(part))
    for token in ids:
        growing.append(token)
    whole = tokenizer.decode(ids)
    assert whole.startswith(growing.text)
    assert "�" in text or growing.text == whole
