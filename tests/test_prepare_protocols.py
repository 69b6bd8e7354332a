"""Questions hold what the teacher needs; replies are read strictly; windows become one outline again."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hcot_lmeval.markup import PRESETS
from hcot_lmeval.prepare.checks import Checker, CheckOptions
from hcot_lmeval.prepare.measure import block_sizes, cut, make_counter
from hcot_lmeval.prepare.outline import Block, Outline, assemble
from hcot_lmeval.prepare.reasons import FAILURES, REASONS, Refused
from hcot_lmeval.prepare.rows import PreparedRow, SourceRow
from hcot_lmeval.prepare.segmenter import SegmenterOptions
from hcot_lmeval.prepare.sentences import split_sentences
from hcot_lmeval.prepare.teacher.judge import Judge
from hcot_lmeval.prepare.teacher.options import TeacherOptions
from hcot_lmeval.prepare.teacher.protocols import (
    Asking,
    AskingOptions,
    Refine,
    RefineOptions,
    Segment,
    cut_windows,
    load_prompt,
    parse_prompt,
)
from hcot_lmeval.prepare.teacher.questions import Failure, Reply
from tests.scripted_teacher import Say, ScriptedTeacher
from tests.teacher_runs import MODELS, ask_all, options_for

HCOT = PRESETS["hcot"]
TEACHER = TeacherOptions(teacher=MODELS["openai"])
WHOLE = AskingOptions()
BLOCKS = SegmenterOptions()
SMALL = AskingOptions(window_tokens=60)
TEXT = "".join(f"Sentence {n} is about x = {n}. " for n in range(40))
ROW = SourceRow("r", "What is x?", TEXT)
PIECES = split_sentences(TEXT)
OTHERS = {"malformed", "solution_insufficient"}


def asking(name, options=WHOLE, teacher=TEACHER):
    return Asking(load_prompt(name), teacher, options)


def segment(options=WHOLE, blocks=BLOCKS, teacher=TEACHER):
    return Segment(asking("segment", options, teacher), HCOT, blocks)


def refine(options=WHOLE, **more):
    return Refine(asking("refine", options), RefineOptions(**more))


def judge(options=WHOLE):
    return Judge(asking("judge", options), Checker(CheckOptions(repair=False)))


def read(tasks, *said):
    """The replies of a teacher that says these values, as JSON, or texts."""
    texts = [each if isinstance(each, str) else json.dumps(each) for each in said]
    return [task.read(Reply(task.key, text)) for task, text in zip(tasks, texts, strict=True)]


def made(protocol, row, *said):
    """The row that comes of these replies."""
    return PreparedRow.from_record(protocol.entry(row, read(protocol.questions(row), *said))["row"])


def block(start, end, solution="S.", solution_from=None, kind="subproblem"):
    return {"start": start, "end": end, "kind": kind, "solution": solution, "solution_from": solution_from}


# --- prompts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["segment", "refine", "judge"])
def test_prompts_are_whole(name):
    prompt = load_prompt(name)
    assert prompt.label == f"{name}/{prompt.version}" and prompt.version >= 1
    assert prompt.sections.keys() == {"system", "user", "repair"}
    assert prompt.sections["repair"].count("{{fault}}") == 1


# --- worked examples: what a teacher is to imitate has to be what we accept -------------------------------------------


def example(name):
    """The sentences of the example, and its reply."""
    told = load_prompt(name).sections["system"]
    [reply] = re.findall(r"^\{\".*\}$", told, re.MULTILINE)
    found = re.findall(r"^\[(\d+)\] (.*)$", told, re.MULTILINE)
    assert [int(number) for number, _ in found] == list(range(len(found)))
    return [f"{text} " for _, text in found], reply


def require_short(row):
    sizes = block_sizes(cut(row.trace, HCOT, make_counter(None)), HCOT)
    assert sizes and all(0 < size.solution < size.thought for size in sizes)


def test_the_example_of_segment_is_good():
    pieces, reply = example("segment")
    row = made(segment(), SourceRow("r", "q", "".join(pieces)), reply)
    assert row.pieces == tuple(pieces)
    assert row.outline.depth == 2 and {block.kind for block in row.outline.blocks} == {"subproblem", "backtrack"}
    assert {block.split is None for block in row.outline.blocks} == {True, False}
    require_short(row)


def test_the_example_of_refine_is_good():
    pieces, reply = example("refine")
    told = load_prompt("refine").sections["system"]
    listed = re.search(r"^Blocks that were found in them:\n(.*?)\n\n", told, re.M | re.S)
    old = Outline(len(pieces), (Block(5, 11, split=10), Block(6, 9, split=8)))
    row = PreparedRow(SourceRow("r", "q", "".join(pieces)), assemble(pieces, old, HCOT), old, tuple(pieces))
    [task] = refine().questions(row)
    assert listed[1] in task.messages[1].text
    refined = made(refine(), row, reply)
    assert [(b.start, b.stop) for b in refined.outline.blocks if b.kind == "backtrack"] == [(1, 5), (11, 13)]
    require_short(refined)


def test_the_example_of_judge_is_good():
    [line] = re.findall(r"^<block 0>.*$", load_prompt("judge").sections["system"], re.MULTILINE)
    marks = {"</block": "[RETURN]", "<solution": "[SOLUTION]", "<block": "[THOUGHT]"}
    trace = re.sub(r"(</?\w+) \d>", lambda tag: marks[tag[1]], line)
    [task] = judge().about(PreparedRow(SourceRow("r", "q", ""), trace))
    assert line in task.messages[1].text
    [reply] = read([task], example("judge")[1])
    assert [verdict.sufficient for verdict in reply.value] == [True, False]


# --- places -----------------------------------------------------------------------------------------------------------


def test_places_are_filled_once_and_all_of_them():
    prompt = parse_prompt("p", "version: 3\n\n# user\nA {{a}} and {{b}}.\n# system\nx")
    assert prompt.render("user", a="{{b}}", b="\\1") == "A {{b}} and \\1."
    assert (prompt.label, prompt.render("system")) == ("p/3", "x")
    for wrong in ({"a": 1}, {"a": 1, "b": 2, "c": 3}):
        with pytest.raises(KeyError):
            prompt.render("user", **wrong)
    with pytest.raises(ValueError, match=r"p\.md has to begin with `version: N`"):
        parse_prompt("p", "# user\nx")


def test_the_version_is_part_of_the_key():
    one, other = (
        Segment(Asking(parse_prompt("segment", text), TEACHER), HCOT).questions(ROW)[0].key
        for text in ("version: 1\n" + BODY, "version: 2\n" + BODY)
    )
    assert one != other


BODY = (
    "# system\n{{max_depth}}{{target_tokens}}{{min_tokens}}{{max_tokens}}\n"
    "# user\n{{question}}{{first}}{{last}}{{count}}{{sentences}}\n# repair\n{{fault}}"
)


# --- windows ----------------------------------------------------------------------------------------------------------


lengths = st.lists(st.integers(0, 40), max_size=60)


@given(lengths, st.integers(1, 120))
def test_windows_cover_everything_and_are_as_long_as_they_may_be(sizes, size):
    windows = cut_windows(sizes, size)
    assert [n for start, stop in windows for n in range(start, stop)] == list(range(len(sizes)))
    assert all(start < stop for start, stop in windows)
    assert all(stop - start == 1 or sum(sizes[start:stop]) <= size for start, stop in windows)
    assert all(sum(sizes[start : stop + 1]) > size for start, stop in windows[:-1])


@st.composite
def outlines(draw, start, stop):
    """Properly nested blocks within sentences."""
    found = []

    def fill(low, high, depth):
        while low < high and draw(st.booleans()):
            begin = draw(st.integers(low, high - 1))
            end = draw(st.integers(begin + 1, high))
            found.append(Block(begin, end, f"s{len(found)}"))
            if depth:
                fill(begin, end, depth - 1)
            low = end

    fill(start, stop, 2)
    return list(Outline(stop, tuple(found)).blocks)


# --- segment ----------------------------------------------------------------------------------------------------------


def test_segment_shows_the_numbers_and_says_what_is_wanted():
    protocol = segment(blocks=SegmenterOptions(max_depth=3, target_tokens=222))
    [task] = protocol.questions(ROW)
    system, user = (message.text for message in task.messages)
    assert "At most 3 blocks" in system and "222 tokens" in system
    assert "What is x?" in user and "[0] Sentence 0 is about x = 0.\n[1] Sentence 1" in user
    assert "Sentences 0 to 39 of a chain of thought of 40 sentences" in user and "{{" not in system + user
    assert task.kind == "segment" and task.repair
    told = protocol.made_by
    assert told["prompt"] == load_prompt("segment").label and told["teacher"] == MODELS["openai"]
    assert told["options"]["max_depth"] == 3


def test_segment_reads_both_kinds_of_solutions_and_nesting():
    row = made(segment(), ROW, {"blocks": [block(0, 9), block(2, 5, None, 5, "backtrack"), block(12, 15, "", 14)]})
    assert row.outline.blocks == (Block(0, 10, "S."), Block(2, 6, split=5, kind="backtrack"), Block(12, 16, split=14))
    assert row.trace.count("[THOUGHT]") == 3
    assert made(segment(), ROW, {"blocks": []}).outline == Outline(40)


FAULTS = [
    ([block(0, 5), block(3, 8)], "overlap"),
    ([block(0, 40)], "out_of_range"),
    ([block(-1, 4)], "out_of_range"),
    ([block(5, 4)], "empty_block"),
    ([block(0, 4, None)], "empty_solution"),
    ([block(0, 4, " ")], "empty_solution"),
    ([block(0, 4, "S.", 3)], "both_solutions"),
    ([block(0, 4, None, 0)], "empty_block"),
    ([block(0, 4, None, 9)], "out_of_range"),
    ([block(0, 4, "so [RETURN]")], "marker_in_solution"),
    ([block(0, 9), block(0, 8), block(0, 7)], "too_deep"),
    *(
        ([block(0, 4) | change], "schema")
        for change in ({"kind": "detour"}, {"kind": None}, {"first": 0}, {"start": "0"})
    ),
]


@pytest.mark.parametrize(("blocks", "code"), FAULTS)
def test_segment_refuses_what_is_no_outline(blocks, code):
    [reply] = read(segment().questions(ROW), {"blocks": blocks})
    assert reply.failure.code == code and code in REASONS and reply.failure.detail


def test_a_failure_is_passed_on_with_where_it_happened():
    protocol = segment(SMALL)
    first, *rest = protocol.questions(ROW)
    good = read(rest, *[{"blocks": []}] * len(rest))
    assert len(rest) > 2
    with pytest.raises(Refused, match=r"cut off \(sentences 0 to \d+\)"):
        protocol.entry(ROW, [Reply(first.key, failure=Failure("truncated", "cut off")), *good])


@pytest.mark.parametrize(
    ("protocol", "row", "key", "found"),
    [
        (segment(SMALL), ROW, "blocks", block(0, 1)),
        (refine(SMALL), None, "backtracks", {"start": 0, "end": 1, "solution": "s"}),
    ],
)
def test_a_block_of_sentences_that_were_not_shown_is_refused(protocol, row, key, found):
    [reply] = read(protocol.questions(row or PREPARED)[-1:], {key: [found]})
    assert reply.failure.code == "out_of_range"
    assert reply.failure.detail.startswith("the block over sentences 0 to 1; shown were")


def teach(asked):
    """A teacher that makes a block of every five sentences, by their numbers."""
    numbers = [int(n) for n in re.findall(r"^\[(\d+)\]", asked.turns[0][1], re.MULTILINE)]
    starts = [n for n in numbers if n % 5 == 0 and n + 4 in numbers]
    return Say(json.dumps({"blocks": [block(n, n + 4, f"x = {n + 4}") for n in starts]}))


@pytest.mark.parametrize("options", [WHOLE, AskingOptions(window_tokens=100)])
def test_segment_over_the_wire(tmp_path, keys, options):
    with ScriptedTeacher(teach) as server:
        protocol = segment(options, teacher=options_for(server))
        tasks = protocol.questions(ROW)
        replies = ask_all(protocol.asking.teacher, tasks, tmp_path)
    row = PreparedRow.from_record(protocol.entry(ROW, [replies[task.key] for task in tasks])["row"])
    windows = protocol.asking.windows(PIECES)
    whole = [n for n in range(0, 40, 5) if any(start <= n and n + 5 <= stop for start, stop in windows)]
    assert row.outline.blocks == tuple(Block(n, n + 5, f"x = {n + 4}") for n in whole)
    assert len(server.requests) == len(tasks) == len(windows) == (1 if options is WHOLE else 4) and len(whole) >= 5


# --- refine -----------------------------------------------------------------------------------------------------------


OLD = Outline(40, (Block(0, 10, split=8), Block(20, 30, "s")))
PREPARED = PreparedRow(ROW, assemble(PIECES, OLD, HCOT), OLD, tuple(PIECES))


def dead(start, end, solution="It leads nowhere."):
    return {"start": start, "end": end, "solution": solution}


def test_refine_adds_blocks_of_its_own_kind():
    [task] = refine().questions(PREPARED)
    assert "0 to 7; 8 to 9\n20 to 29" in task.messages[1].text
    row = made(refine(), PREPARED, {"backtracks": [dead(12, 15), dead(21, 25), dead(18, 32)]})
    kinds = {(b.start, b.stop): b.kind for b in row.outline.blocks}
    assert kinds == {
        (0, 10): "subproblem",
        (12, 16): "backtrack",
        (18, 33): "backtrack",
        (20, 30): "subproblem",
        (21, 26): "backtrack",
    }
    assert row.trace == assemble(PIECES, row.outline, HCOT)
    assert made(refine(), PREPARED, {"backtracks": []}).outline == OLD


@pytest.mark.parametrize(
    ("found", "code"),
    [
        ([dead(5, 12)], "overlap"),
        ([dead(7, 8)], "overlap"),
        ([dead(0, 9)], "overlap"),
        ([dead(35, 40)], "out_of_range"),
        ([dead(35, 38, " ")], "empty_solution"),
        ([dead(12, 19), dead(12, 18), dead(12, 17), dead(12, 16)], "too_deep"),
    ],
)
def test_refine_refuses_what_does_not_fit(found, code):
    [reply] = read(refine().questions(PREPARED), {"backtracks": found})
    assert reply.failure.code == code
    entry = refine().entry(PREPARED, [reply])
    assert entry["remark"] == code and entry["row"]["hierarchical_cot"] == PREPARED.text
    assert entry["row"]["made_by"]["refined"]["failure"]["code"] == code


def test_refine_needs_an_outline():
    bare = PreparedRow(ROW, TEXT)
    assert refine().questions(bare) == []
    assert refine().entry(bare, [])["remark"] == "no_outline"


@given(st.data())
@settings(max_examples=40)
def test_refined_outlines_keep_the_old_blocks(data):
    """Whatever windows reply, the old blocks stay and the new ones lie in them or around them."""
    old = Outline(40, tuple(data.draw(outlines(0, 40))))
    row = PreparedRow(ROW, assemble(PIECES, old, HCOT), old, tuple(PIECES))
    protocol = refine(SMALL, max_depth=9)
    said = []
    for (start, stop), task in zip(protocol.asking.windows(PIECES), protocol.questions(row), strict=True):
        found = []
        for one in data.draw(outlines(start, stop)):
            more = [*found, dead(one.start, one.stop - 1)]
            found = found if read([task], {"backtracks": more})[0].failure else more
        said.append({"backtracks": found})
    refined = made(protocol, row, *said)
    assert [b for b in refined.outline.blocks if b.kind == "subproblem"] == list(old.blocks)


# --- codes ------------------------------------------------------------------------------------------------------------


def test_every_code_is_explained():
    assert FAILURES.keys() | OTHERS <= REASONS.keys()
