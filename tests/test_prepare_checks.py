"""Every fault has its code; repairs touch no words; duplicates and problems of evaluation tasks are found."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hcot_lmeval.markup import PRESETS
from hcot_lmeval.prepare.checks import (
    Checker,
    CheckOptions,
    EvaluationRows,
    check_and_repair,
    fingerprint,
    load_problems,
)
from hcot_lmeval.prepare.measure import cut, departure, make_counter
from hcot_lmeval.prepare.outline import Block, Outline, assemble, find_control, fold, spelled_markers
from hcot_lmeval.prepare.reasons import CHECKING
from hcot_lmeval.prepare.rows import PreparedRow, SourceRow

HCOT = PRESETS["hcot"]
PIECES = ("We need to add two and three. ", "Two and three make 5. ", "So it is 5. ", "Now I am done with it all. ")
RESPONSE = "\n\nThe answer is \\boxed{5}."
COUNT = make_counter(None)


ONE = (Block(0, 3, split=2),)


def row(blocks=ONE, *, pieces=PIECES, response=RESPONSE, answer="5", question="2 + 3?"):
    outline = Outline(len(pieces), blocks)
    source = SourceRow("a", question, "".join(pieces), response, answer)
    return PreparedRow(source, assemble(pieces, outline, HCOT), outline, pieces, {"method": "test"})


def bare(trace, *, original="", response=RESPONSE, answer="5", question="2 + 3?"):
    """A row that came from no outline."""
    return PreparedRow(SourceRow("a", question, original, response, answer), trace)


def codes(one, **options):
    return [fault.code for fault in Checker(CheckOptions(**options))(one)]


def test_a_good_row_has_no_fault():
    assert codes(row()) == []
    assert codes(bare(row().trace, original="".join(PIECES))) == []
    assert codes(bare(row().trace)) == []


NESTED = (Block(0, 4, solution="ok"), Block(0, 3, split=2), Block(0, 2, solution="Five."))
FAULTS = [
    ("no_blocks", row(()), {}),
    ("too_deep", row(NESTED), {"max_depth": 2}),
    ("solution_not_shorter", row((Block(0, 1, solution="We need to add two and three, which we do now."),)), {}),
    ("empty_thought", bare("[THOUGHT] [SOLUTION] [RETURN] a b"), {}),
    ("empty_solution", bare("[THOUGHT]a b c[SOLUTION] [RETURN]"), {}),
    ("malformed", bare("[THOUGHT]a b[SOLUTION]c"), {}),
    ("malformed", bare("a[RETURN]b[SOLUTION]"), {}),
    ("malformed", bare("[THOUGHT]a b[SOLUTION]c[RETURN]<think>"), {}),
    ("words_changed", replace(row(), trace=row().trace.replace("done", "finished")), {}),
    (
        "words_changed",
        replace(row(), trace=f"{PIECES[0]}[THOUGHT]" + row().trace.removeprefix(f"[THOUGHT]{PIECES[0]}")),
        {},
    ),
    ("words_changed", replace(row(), pieces=("Other. ", *PIECES[1:])), {}),
    ("words_changed", bare(row().trace + " More words.", original="".join(PIECES)), {}),
    ("words_changed", bare(row().trace.replace("need to", ""), original="".join(PIECES)), {}),
    ("words_changed", bare(row().trace.replace("make 5", "make 6"), original="".join(PIECES)), {}),
    ("answer_missing", row(response="\nIt is five."), {}),
    ("answer_missing", row(response=""), {}),
    ("answer_differs", row(response="\\boxed{6}"), {}),
    ("marker_in_source", row(question="What does [THOUGHT] do?"), {}),
    ("marker_in_source", row(response=RESPONSE + "</think>"), {}),
    ("control_token_in_source", row(response=RESPONSE + "<|im_end|>"), {}),
    ("too_long", row(), {"max_tokens": 10}),
    ("too_short", row(), {"min_tokens": 1000}),
    ("peak_too_high", row(), {"max_peak": 20}),
]


@pytest.mark.parametrize(("code", "one", "options"), FAULTS)
def test_each_fault_has_its_code(code, one, options):
    found = Checker(CheckOptions(**options))(one)
    assert code in [fault.code for fault in found], found
    assert all(fault.code in CHECKING and fault.detail for fault in found)


def test_every_code_of_a_check_is_tested_here_or_below():
    elsewhere = {
        "duplicate",
        "near_duplicate",
        "repeated_id",
        "contaminated",
        "answer_unchecked",
        "solution_insufficient",
        "unjudged",
    }
    assert {code for code, _, _ in FAULTS} | elsewhere == CHECKING.keys()


def test_answers_are_checked_as_the_tasks_do():
    assert codes(row(answer="10/2")) == []  # by the same checker: mathematics, not text
    assert codes(row(answer=r"\frac{10}{2}")) == []
    assert codes(row(response="\nThe answer is 5."), answers="stated") == []
    assert codes(row(response="\nThe answer is 6."), answers="stated") == ["answer_differs"]
    assert codes(row(response="nothing"), answers="off") == []
    assert codes(row(response="nothing", answer=None)) == []
    boxed = (*PIECES[:3], "Now it is \\boxed{5}. ")
    assert codes(row(response="", pieces=boxed)) == []  # without a response, the trace has to say it
    assert codes(row(response="\\boxed{5}", answer="x" * 5000)) == ["answer_unchecked"]


@pytest.mark.parametrize(
    "text",
    [
        "[THOUGHT]",
        "［THOUGHT］",
        "[THO\u200bUGHT]",
        "[\u2060RETURN\ufe0f]",
        "[𝐒𝐎𝐋𝐔𝐓𝐈𝐎𝐍]",
        "＜/think＞",
        "<th\u00adink>",
        "［ＲＥＴＵＲＮ］",
    ],
)
def test_markers_are_found_in_any_characters(text):
    assert spelled_markers(f"so {text} it", HCOT)
    assert codes(row(question=f"What is {text}?")) == ["marker_in_source"]


@pytest.mark.parametrize(
    "text", ["[thought]", "THOUGHT", "a [SOLUTION", "【x】", "x < think > y", "f[RETURNS]", "人\u200b工"]
)
def test_what_is_no_marker_passes(text):
    assert not spelled_markers(text, HCOT)


def test_control_tokens_are_found():
    assert find_control("a <|endoftext|> b") == "<|endoftext|>"
    assert find_control("a <｜end▁of▁sentence｜> b") == "<|end▁of▁sentence|>"
    assert find_control("a <pad> b</s>") == "<pad>" and find_control("a</s>") == "</s>"
    assert find_control("|x| < 1 and 2 <|y|, z|> 3") is None
    assert find_control("a <| b |> c") is None


@given(st.text())
def test_folding_is_idempotent_where_it_matters(text):
    folded = fold(text)
    assert all((mark in folded) == (mark in fold(folded)) for mark in (*HCOT.markers, *HCOT.think))


# --- words ------------------------------------------------------------------------------------------------------------


def test_solutions_may_be_added_and_nothing_else():
    original = "Two and three make 5. So it is 5. Done."
    trace = "[THOUGHT]Two and three make 5.[SOLUTION]2 + 3 = 5[RETURN] So it is 5. Done."

    def behind(text):
        return departure(original, cut(text, HCOT, COUNT), HCOT)

    assert behind(trace) is None
    assert behind(trace.replace("three make", "3 give")) == ""
    assert behind(trace.replace("Done", "Gone")) == "Twoandthreemake5."
    assert behind(trace.removesuffix(" Done.")).endswith("make5.Soitis5.")
    assert behind(trace + " And more.") == "Twoandthreemake5."


@settings(max_examples=60)
@given(st.data())
def test_assembled_traces_are_explained_whatever_the_blocks(data):
    pieces = data.draw(st.lists(st.sampled_from(["One two. ", "So x = 3.5. ", "(a) Wait", ", no.\n", "5"]), min_size=2))
    start = data.draw(st.integers(0, len(pieces) - 2))
    stop = data.draw(st.integers(start + 1, len(pieces)))
    outline = Outline(len(pieces), (Block(start, stop, solution=data.draw(st.sampled_from(["x = 3.5", "So.", "5"]))),))
    trace = assemble(pieces, outline, HCOT)
    assert departure("".join(pieces), cut(trace, HCOT, COUNT), HCOT) is None


# --- repair -----------------------------------------------------------------------------------------------------------


def mended(one, **options):
    return check_and_repair(one, Checker(CheckOptions(**options)))


def test_blocks_at_fault_are_opened_up_and_the_words_stay():
    long = "We need to add two and three, which we do right now, in this place, word by word, as long as it takes."
    one = row((Block(0, 2, solution=long), Block(2, 4, solution="done")))
    fixed, faults, did = mended(one)
    assert (faults, did) == ([], ["opened block 0: solution_not_shorter"])
    assert fixed.outline.blocks == (Block(2, 4, solution="done"),)
    assert fixed.trace.replace("[THOUGHT]", "").replace("[SOLUTION]done[RETURN]", "") == "".join(PIECES)
    assert fixed.made_by["repairs"] == did


def test_depth_is_cut_from_within():
    fixed, faults, did = mended(row(NESTED), max_depth=2)
    assert (faults, did) == ([], ["opened block 2: too_deep"])
    assert fixed.outline.depth == 2
    shallow, faults, _ = mended(row(NESTED), max_depth=1)
    assert (faults, shallow.outline.depth) == ([], 1)


def test_a_broken_trace_is_assembled_anew():
    one = row()
    fixed, faults, did = mended(replace(one, trace=one.trace.replace("[RETURN]", "")))
    assert (fixed.trace, faults, did) == (one.trace, [], ["assembled anew"])


def test_what_helps_nothing_is_left_as_it_was():
    one = row(response="\\boxed{6}")
    assert mended(one)[0] is one
    broken = bare("[RETURN]no block at all")
    fixed, faults, did = mended(broken)
    assert (fixed, did) == (broken, []) and [fault.code for fault in faults] == ["malformed"]
    assert mended(row((Block(0, 2, solution="x " * 99), Block(2, 4, solution="done"))), repair=False)[2] == []


@settings(max_examples=100)
@given(st.lists(st.sampled_from(["a b ", "c. ", "d ", *HCOT.markers, *HCOT.think]), max_size=14).map("".join))
def test_whatever_others_wrote_is_checked_and_left_alone(trace):
    fixed, faults, did = mended(bare(trace, response=RESPONSE), allow_flat=True)
    assert (fixed.trace, did) == (trace, []) and all(fault.code in CHECKING for fault in faults)


def test_options_name_what_is_allowed():
    with pytest.raises(ValueError, match=r"'oops' is no code of a check; known are malformed, no_blocks"):
        CheckOptions(tolerate=("oops",))
    with pytest.raises(ValueError, match="Input should be 'boxed', 'stated' or 'off'"):
        CheckOptions(answers="x")
    with pytest.raises(ValueError, match="less than or equal to 1"):
        CheckOptions(contamination=2)
    with pytest.raises(ValueError, match="near does nothing under duplicates=off"):
        CheckOptions(duplicates="off", near=0.9)


# --- duplicates -------------------------------------------------------------------------------------------------------


def test_the_same_words_have_one_fingerprint():
    same = ["A b. C d e!", "a  b c, d E", "ａ b c d e", "a b c\nd e..."]
    assert len({fingerprint(text) for text in same}) == 1
    assert len({fingerprint(text) for text in (same[0], "a b c d", "", "a b c d e f")}) == 4


# --- contamination ----------------------------------------------------------------------------------------------------

EVERY_MORNING = (
    "Every morning Aya goes for a $9$-kilometer-long walk and stops at a coffee shop afterwards. When she walks at a "
    "constant speed of $s$ kilometers per hour, the walk takes her 4 hours."
)
BOILERPLATE = "can be written as $\\frac{m}{n}$ where $m$ and $n$ are relatively prime positive integers. Find $m+n$."


def test_problems_are_found_in_whatever_stands_around():
    tasks = EvaluationRows([("aime 1", EVERY_MORNING), ("short", "What is 7 + 6 + 8?"), ("too short", "Solve it")])
    disguised = "Here: " + EVERY_MORNING.upper().replace("$", " ").replace("9", "９") + " Answer in a box."
    assert tasks.find(disguised).name == "aime 1" and tasks.find(disguised).share == 1
    assert tasks.find("Hm. what is 7+6+8? It is 21.").name == "short"
    assert tasks.find("solve it now, will you") is None
    assert tasks.find(EVERY_MORNING[:60]) is None  # a third of it
    assert len(tasks) == 3


def test_a_common_ending_is_no_contamination():
    tasks = EvaluationRows(
        [("aime 2", "A circle of radius 3 meets a square of side 5 and their common area " + BOILERPLATE)]
    )
    assert tasks.find("The probability that a random walk of ten steps ends where it began " + BOILERPLATE) is None


def test_scripts_without_spaces_are_compared_by_characters():
    problem = "每天早上，艾雅都会步行九公里，然后在一家咖啡店停下来。"
    tasks = EvaluationRows([("zh", problem)])
    assert tasks.find(f"题目：{problem} 请回答。").share == 1
    assert tasks.find("每天早上，我都会喝一杯水，然后去上班。") is None


def test_contamination_is_reported_and_dropped_by_option(tmp_path):
    path = tmp_path / "tasks.jsonl"
    path.write_text(json.dumps({"id": 3, "problem": EVERY_MORNING}) + "\n")
    one = row(question=EVERY_MORNING)
    options = CheckOptions(against=(str(path),))
    (fault,) = Checker(options)(one)
    assert (fault.code, fault.detail) == ("contaminated", f"100 % of the 8-grams of {path} 3")
    assert "contaminated" in options.tolerated
    assert "contaminated" not in options.model_copy(update={"drop_contaminated": True}).tolerated
    assert Checker(options)(row()) == []
    with pytest.raises(ValueError, match="neither a file nor a task; choose one of aime24, aime25"):
        load_problems(["aime26"])


@given(st.lists(st.text("abc9é每", min_size=1), min_size=8).map(" ".join), st.text())
def test_a_text_holds_itself(text, around):
    assert EvaluationRows([("it", text)]).find(f"{around} {text} {around}").share == 1
