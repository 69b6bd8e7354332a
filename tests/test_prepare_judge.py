"""A teacher judges each block once, and sees what it needs for that."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hcot_lmeval.markup import PRESETS
from hcot_lmeval.prepare.measure import block_sizes, cut, make_counter
from hcot_lmeval.prepare.outline import Outline, assemble
from hcot_lmeval.prepare.rows import PreparedRow, SourceRow
from hcot_lmeval.prepare.teacher.judge import judged, parts
from hcot_lmeval.prepare.teacher.protocols import AskingOptions
from tests.test_prepare_protocols import HCOT, PIECES, judge, outlines, read

TRACE = "A. [THOUGHT]b [THOUGHT]c[SOLUTION]d[RETURN] e[SOLUTION]f[RETURN] G. [THOUGHT]h[SOLUTION]i[RETURN] J."
JUDGED = PreparedRow(SourceRow("r", "q?", "", "The answer is j."), TRACE)


def verdict(number, sufficient=True, reason="fine"):
    return {"block": number, "sufficient": sufficient, "reason": reason}


def test_judge_shows_the_blocks_by_their_numbers():
    [task] = judge().about(JUDGED)
    user = task.messages[1].text
    inner = "<block 1>c<solution 1>d</block 1>"
    assert f"A. <block 0>b {inner} e<solution 0>f</block 0> G. <block 2>h<solution 2>i</block 2> J." in user
    assert "The response:\nThe answer is j." in user and "blocks 0, 1, 2." in user
    assert "[THOUGHT]" not in user


def test_judge_gives_a_verdict_for_each_block():
    replies = read(judge().about(JUDGED), {"verdicts": [verdict(2, False, "no i"), verdict(0), verdict(1)]})
    assert judged(replies) == [("solution_insufficient", "block 2: no i", 2)]


@pytest.mark.parametrize("numbers", [[0, 1], [0, 1, 2, 3], [0, 1, 1], [0, 0, 1, 2], []])
def test_judge_must_speak_of_the_blocks_it_was_asked_about(numbers):
    [reply] = read(judge().about(JUDGED), {"verdicts": [verdict(n) for n in numbers]})
    assert reply.failure.code == "blocks_differ"
    assert [fault.code for fault in judged([reply])] == ["unjudged"]


def test_judge_takes_long_traces_part_by_part_and_shows_what_follows():
    trace = "".join(f"{PIECES[n]}[THOUGHT]{PIECES[n]}[SOLUTION]s{n}[RETURN]" for n in range(12))
    row = PreparedRow(SourceRow("r", "q?", "", "Done."), trace)
    tasks = judge(AskingOptions(window_tokens=80)).about(row)
    assert len(tasks) > 2
    asked = [[int(n) for n in re.findall(r"\d+", t.messages[1].text.rpartition("blocks ")[2])] for t in tasks]
    assert [n for numbers in asked for n in numbers] == list(range(12))
    assert "What follows, for your information:\n<block 3>Sentence 3" in tasks[0].messages[1].text
    assert "The response:\nDone." in tasks[-1].messages[1].text
    replies = read(tasks, *({"verdicts": [verdict(n, False) for n in numbers]} for numbers in asked))
    assert [fault.block for fault in judged(replies)] == list(range(12))


@pytest.mark.parametrize("trace", ["no blocks", "[THOUGHT]a[SOLUTION]b", "a[RETURN]"])
def test_judge_has_nothing_to_say_without_whole_blocks(trace):
    assert judge().about(PreparedRow(SourceRow("r", "q?", ""), trace)) == []


@given(st.data())
def test_parts_hold_every_block_once(data):
    outline = Outline(40, tuple(data.draw(outlines(0, 40))))
    for markup in (HCOT, PRESETS["pencil"]):
        stretches = cut(assemble(PIECES, outline, markup), markup, make_counter(None))
        found = list(parts(stretches, markup))
        numbers = [number for part in found for number in part.blocks]
        assert numbers == list(range(len(block_sizes(stretches, markup))))
        assert sum(part.tokens for part in found) == sum(stretch.tokens for stretch in stretches)
