"""Rows as data sets and chat models write them: each is read as it is meant, or rejected with a reason."""

from __future__ import annotations

import datetime
import gzip
import json
import re
from dataclasses import asdict
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hcot_lmeval.columns import ROLES, is_prose, read_answer, read_verdict
from hcot_lmeval.files import Record, find_inputs
from hcot_lmeval.prepare.checks import Checker, CheckOptions
from hcot_lmeval.prepare.cli import main
from hcot_lmeval.prepare.reading import read_prepared, read_rows
from hcot_lmeval.prepare.rows import PreparedRow, SourceRow, Unreadable
from hcot_lmeval.prepare.steps import unread
from tests.prepare_files import flat_row, read_jsonl, write_rows

R, A = "First.\nThen 2.", "It is \\boxed{2}."
USER = {"role": "user", "content": "Q?"}
TEXT = {"type": "text", "text": A}
BOTH = f"<think>{R}</think>{A}"


def chat(**said):
    return {"messages": [USER, {"role": "assistant", "content": A, **said}]}


def read(tmp_path, *rows, columns=None):
    return list(read_rows(find_inputs([write_rows(tmp_path / "rows.jsonl", list(rows))]), columns))


# --- where reasoning and response stand -------------------------------------------------------------------------------

FORMS = {
    "OpenMathReasoning": {"problem": "Q?", "generated_solution": BOTH, "pass_rate_72b_tir": "0.9"},
    "OpenThoughts": {
        "system": "Your role...",
        "conversations": [
            {"from": "user", "value": "Q?"},
            {
                "from": "assistant",
                "value": f"<|begin_of_thought|>{R}<|end_of_thought|>\n\n<|begin_of_solution|>{A}<|end_of_solution|>",
            },
        ],
    },
    "OpenThoughts, metadata": {"problem": "Q?", "deepseek_reasoning": R, "deepseek_solution": A},
    "R1, prompt as messages": {"prompt": [USER], "response": BOTH},
    "R1, API": {"question": "Q?", "reasoning_content": R, "content": A},
    "the beginning is in the prompt": {"question": "Q?", "response": BOTH.removeprefix("<think>")},
    "thinking beside the content": chat(thinking=R),
    "reasoning_content": chat(reasoning_content=R),
    "reasoning": chat(reasoning=R),
    "reasoning as parts": chat(reasoning=[{"type": "text", "text": R}]),
    "parts of Claude": chat(content=[{"type": "thinking", "thinking": R, "signature": "x"}, TEXT]),
    "parts of OpenAI": chat(content=[{"type": "reasoning", "text": R}, {"type": "output_text", "text": A}]),
    "parts of Gemini": {
        "conversation": [
            {"role": "user", "parts": [{"text": "Q?"}]},
            {"role": "model", "parts": [{"text": R, "thought": True}, {"text": A}]},
        ]
    },
    "parts with tags": chat(content=[{"type": "text", "text": BOTH}]),
    "parts that are strings": chat(content=["<think>", R, "</think>", A]),
    "a question of parts": {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Q?"}]},
            {**USER, "role": "gpt", "content": BOTH},
        ]
    },
    "an unanswered question at the end": {"messages": [*chat(thinking=R)["messages"], {**USER, "content": "And 3?"}]},
    "said twice": chat(thinking=R, content=BOTH),
    "an empty section beside": chat(thinking=R, content=f"<think>\n\n</think>{A}"),
    "prompt and completion as messages": {"prompt": [USER], "completion": chat(thinking=R)["messages"][1:]},
    "reasoning beside messages": {**chat(), "reasoning": R},
    "tags within the reasoning": {"question": "Q?", "reasoning": f"<think>{R}</think>", "response": A},
    "all within the reasoning": {"question": "Q?", "reasoning": BOTH},
    "a reasoning that is a switch": {"input": "Q?", "output": BOTH, "reasoning": "on"},
    "a switch beside messages": {**chat(content=BOTH), "reasoning": "off"},
    "s1K-1.1": {
        "question": "Q?",
        "gemini_thinking_trajectory": "g",
        "gemini_attempt": "g",
        "gemini_grade": "No",
        "deepseek_thinking_trajectory": R,
        "deepseek_attempt": A,
        "deepseek_grade": "Yes",
    },
    "s1K": {"question": "Q?", "thinking_trajectories": [R], "attempt": A},
    "OpenR1-Math": {
        "problem": "Q?",
        "generations": [BOTH],
        "correctness_math_verify": [True],
        "is_reasoning_complete": [True],
        "messages": [USER, {**USER, "role": "assistant", "content": "<think>other</think>other"}],
    },
    "verdicts are absent": {"problem": "Q?", "generations": [BOTH], "correctness_math_verify": None},
    "Multilingual-Thinking": {"user": "Q?", "analysis": R, "final": A, **chat(thinking=R)},
    "medical-o1": {"Question": "Q?", "Complex_CoT": R, "Response": A},
    "Chinese-R1-Distill": {"input": "Q?", "reasoning_content": R, "content": A},
    "other case": {"Problem": "Q?", "Generation": BOTH},
    "gpt-oss": {
        "prompt": "Q?",
        "output": f"<|channel|>analysis<|message|>{R}<|end|><|start|>assistant<|channel|>final<|message|>{A}",
    },
    "Gemma 4": {"prompt": "Q?", "output": f"<|channel>thought\n{R}<channel|>{A}"},
    "Magistral": {"prompt": "Q?", "output": f"[THINK]{R}[/THINK]{A}"},
    "the whole response as the answer": {"question": "Q?", "reasoning": R, "answer": A},
}


@pytest.mark.parametrize("form", FORMS)
def test_reasoning_and_response_are_found(tmp_path, form):
    (row,) = read(tmp_path, FORMS[form])
    assert isinstance(row, SourceRow), row
    assert (row.question, row.reasoning, row.response.strip()) == ("Q?", R, A)


def test_what_an_instruction_is_about_belongs_to_it(tmp_path):
    (row,) = read(tmp_path, {"instruction": "Add.", "input": "2 and 3", "output": BOTH})
    assert row.question == "Add.\n\n2 and 3"


REJECTED = {
    "not_text": [
        {"question": 3, "response": BOTH},
        chat(content=[{"type": "image_url", "image_url": "x"}, {"type": "text", "text": BOTH}]),
        {"messages": [{**USER, "content": [{"type": "image"}]}, {**USER, "role": "assistant", "content": BOTH}]},
        chat(content=7),
        chat(content=[None]),
        chat(content=[{"type": "redacted_thinking", "data": "x"}, TEXT]),
        {"question": "Q?", "response": [{"a": 1}]},
        {"question": ["Q", 2], "response": BOTH},
        {"question": ["Q?", "and R?"], "response": BOTH},
    ],
    "no_question": [
        {"question": "", "response": BOTH},
        {"question": " \r\n\t", "response": BOTH},
        {"question": {"a": 1}, "response": BOTH},
        {"question": None, "messages": None, "response": BOTH},
        {"messages": [{**USER, "role": "assistant", "content": BOTH}]},
    ],
    "no_text": [
        {"question": "Q?", "response": None},
        {"question": "Q?", "response": 5},
        {"question": "Q?", "generations": []},
        {"question": "Q?", "reasoning": " ", "response": ""},
        {"question": "Q?", "reasoning": None, "response": " "},
        {"messages": [USER]},
    ],
    "no_thinking": [chat(), {"question": "Q?", "reasoning": "on", "output": A}],
    "several_thoughts": [
        chat(thinking="other", content=BOTH),
        {"question": "Q?", "reasoning": BOTH, "response": "another"},
        {"question": "Q?", "reasoning": R, "answer": BOTH},
    ],
    "several_turns": [
        {"messages": [*chat(thinking=R)["messages"], *chat(thinking=R)["messages"]]},
        {"prompt": [USER, {**USER, "role": "assistant"}, USER], "completion": BOTH},
        {
            "messages": [
                USER,
                {**USER, "role": "assistant"},
                {**USER, "role": "tool"},
                chat(content=BOTH)["messages"][1],
            ]
        },
    ],
    "marked_wrong": [
        {"question": "Q?", "deepseek_thinking_trajectory": R, "deepseek_attempt": A, "deepseek_grade": "No"},
        {"question": "Q?", "generations": [BOTH], "correctness_math_verify": [None], "correctness_llama": [False]},
        {"question": "Q?", "response": BOTH, "correct": False},
    ],
    "uneven_lists": [
        {"question": "Q?", "generations": [BOTH, BOTH], "correctness_math_verify": [True]},
        {"question": "Q?", "thinking_trajectories": [R, R], "attempt": A},
        {"question": "Q?", "reasoning": [R, R], "response": [A]},
    ],
    "no_answer": [
        {"question": "Q?", "response": BOTH, "answer": answer}
        for answer in (float("nan"), float("inf"), -float("inf"), "NaN", {"a": 1}, ["1", "2"], [[1, 2]])
    ],
    "lone_surrogate": [
        {"question": "\ud83d?", "response": BOTH},
        {"question": "Q?", "response": f"{BOTH}\udc00"},
        {"question": "Q?", "response": BOTH, "answer": "\ud83d"},
        {"question": "Q?", "response": BOTH, "id": "\ud83d"},
        {"question": "Q?", "response": BOTH, "source": "\ud83d"},
        {"question": "Q?", "response": BOTH, "tags": [{"name": "\ud83d"}]},
        {"question": "Q?", "response": BOTH, "\ud83d": 1},
        chat(thinking=f"{R}\ud83d"),
    ],
}


@pytest.mark.parametrize("code", REJECTED)
def test_what_cannot_be_trained_on_is_rejected_with_its_reason(tmp_path, code):
    for row in REJECTED[code]:
        found = read(tmp_path, row)
        assert {each.code for each in found if isinstance(each, Unreadable)} == {code}, (row, found)
        assert not any(isinstance(each, SourceRow) for each in found), row


def test_a_column_of_several_traces_gives_a_row_each_and_the_wrong_ones_are_counted(tmp_path):
    says = [f"<think>Way {number}.</think>{A}" for number in range(3)] + ["<think>cut"]
    row = {"uuid": "u", "problem": "Q?", "generations": says, "correctness_math_verify": [True, False, None, True]}
    found = read(tmp_path, {**row, "correctness_llama": [False, True, True, True]})
    assert [(each.id, each.reasoning) for each in found if isinstance(each, SourceRow)] == [
        ("u-1", "Way 0."),
        ("u-3", "Way 2."),
    ]
    wrong = [each for each in found if isinstance(each, Unreadable)]
    assert [(each.code, each.record["generations"]) for each in wrong] == [
        ("marked_wrong", says[1]),
        ("unclosed_thinking", says[3]),
    ]
    assert wrong[0].where.endswith("line 1, trace 2")
    both = {"question": "Q?", "reasoning": ["a", "b"], "response": ["1", "2"]}
    assert [(each.reasoning, each.response) for each in read(tmp_path, both)] == [("a", "1"), ("b", "2")]
    given = {"problem": "Q?", "generation": BOTH, "verified": False, "correct": True}
    (wrong,) = read(tmp_path, given, columns={"verdict": "verified"})
    assert wrong.code == "marked_wrong"
    assert isinstance(read(tmp_path, {**given, "correct": False}, columns={"verdict": ""})[0], SourceRow)


# --- expected answers -------------------------------------------------------------------------------------------------

PROSE = "We add the two numbers that were given to us and see that the sum of both of them is $28$."


@pytest.mark.parametrize(
    ("response", "value", "said", "answer"),
    [
        ("", "28", "", "28"),
        ("", "\\boxed{28}", "\\boxed{28}", "28"),
        ("", "\\boxed{The answer is \\boxed{28}.}", "\\boxed{The answer is \\boxed{28}.}", "28"),
        ("", "The answer is 28.", "The answer is 28.", "28"),
        ("", PROSE, PROSE, None),
        ("It is 28.", "So \\(x = \\boxed{28}\\).", "It is 28.", "28"),
        ("It is 28.", PROSE, "It is 28.", PROSE),
        ("", "3 apples and 4 pears", "", "3 apples and 4 pears"),
        ("", "61.5 \\mathrm{mi}/\\mathrm{hr}", "", "61.5 \\mathrm{mi}/\\mathrm{hr}"),
        ("", 28.0, "", "28"),
        ("", 2.5, "", "2.5"),
        ("", 1e22, "", "1" + "0" * 22),
        ("", 10**19 + 1, "", "10000000000000000001"),
        ("", 1e-7, "", "0.0000001"),
        ("", ["7"], "", "7"),
        ("", " ", "", None),
        ("", None, "", None),
        ("", True, "", "True"),
    ],
)
def test_a_response_never_becomes_the_expected_answer(tmp_path, response, value, said, answer):
    (row,) = read(tmp_path, {"question": "Q?", "generation": f"<think>{R}</think>{response}", "answer": value})
    assert (row.response.strip(), row.answer) == (said, answer)
    record = {"question": "Q?", "hierarchical_cot": f"<think>{R}</think>{response}", "expected_answer": value}
    prepared = PreparedRow.from_record(record)
    assert (prepared.source.response.strip(), prepared.source.answer) == (said, answer)
    assert PreparedRow.from_record(prepared.record()) == prepared


def test_answers_and_verdicts_of_all_kinds():
    assert read_answer(Decimal("28.5")) == "28.5" and read_answer("Infinity") == "Infinity"
    assert [read_verdict(value) for value in (True, "Yes", "no", [False], 0, "1", "wrong", None, "", 3, "28")] == [
        *(True, True, False, False, False, True, False),
        *(None, None, None, None),
    ]
    assert not is_prose("$P(x)=c(x^2+3)$ for any constant $c$")
    assert not is_prose("\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}" * 9)


# --- files ------------------------------------------------------------------------------------------------------------

GOOD = json.dumps({"question": "Q?", "response": BOTH}).encode()


@pytest.mark.parametrize(
    ("name", "content", "passed", "rejected"),
    [
        ("bom.jsonl", b"\xef\xbb\xbf" + GOOD + b"\r\n" + GOOD, 2, 0),
        ("crlf.jsonl", GOOD + b"\r\n\r\n" + GOOD + b"\r\n", 2, 0),
        ("plain.jsonl.gz", GOOD, 1, 0),
        ("zipped.jsonl", gzip.compress(GOOD + b"\n" + GOOD, mtime=0), 2, 0),
        ("empty.jsonl", b"", 0, 0),
        ("latin1.jsonl", GOOD + b"\n" + GOOD.replace(b"Q?", b"\xe9"), 1, 1),
        ("twice.jsonl", GOOD + b"\n" + GOOD[:-1] + b', "question": "R?"}', 1, 1),
        ("deep.jsonl", GOOD + b'\n{"question": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", 1, 1),
        ("nested.jsonl", GOOD + b'\n{"question": "Q?", "a": ' + b"[" * 600 + b"]" * 600 + b"}", 1, 1),
        ("long.jsonl", GOOD.replace(b"First.", b"Fir st. " * 10_000), 1, 0),
        ("control.jsonl", GOOD.replace(b"First.", b"\\u0000\\u001b[31m\\u2028"), 1, 0),
        ("raw.jsonl", GOOD + b"\n" + GOOD.replace(b"First.", b"\x00"), 1, 1),
        ("digits.jsonl", GOOD[:-1] + b', "answer": ' + b"7" * 5000 + b', "n": ' + b"7" * 5000 + b"}", 1, 0),
        ("far.jsonl", GOOD + b"\n" + GOOD[:-1] + b', "answer": 1e999}', 1, 1),
        ("nan.jsonl", GOOD + b"\n" + GOOD[:-1] + b', "score": NaN, "id": NaN}', 2, 0),
    ],
)
def test_every_line_of_a_file_is_a_row_or_a_rejected_one(tmp_path, name, content, passed, rejected):
    (tmp_path / name).write_bytes(content)
    words = ["segment", tmp_path / name, "--out", tmp_path / "run", "--quiet"]
    assert main([str(word) for word in words]) == (0 if passed else 1)
    folder = tmp_path / "run" / "segment"
    rows = read_jsonl(folder / "rows.jsonl")
    assert (len(rows), len(read_jsonl(folder / "rejected.jsonl"))) == (passed, rejected)
    assert all("NaN" not in json.dumps(row) for row in rows)
    if name == "digits.jsonl":
        assert rows[0]["expected_answer"] == "7" * 5000


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("utf16.jsonl", GOOD.decode().encode("utf-16"), "utf16.jsonl is UTF-16; write it as JSONL"),
        ("be.jsonl", GOOD.decode().encode("utf-16-le"), "be.jsonl is UTF-16; write it as JSONL"),
        ("array.jsonl", b"[" + GOOD + b"]", "array.jsonl is a JSON array; write it as JSONL"),
        ("table.jsonl", b"question,answer\n1,2\n", "table.jsonl begins with 'question,answer"),
        ("torn.jsonl.gz", gzip.compress(GOOD + b"\n" + GOOD, mtime=0)[:-9], "damaged behind line 1 .*--limit 1 reads"),
        ("case.jsonl", GOOD[:-1] + b', "Question": "R?"}', "line 1: the columns question and Question differ in case"),
    ],
)
def test_what_is_no_file_of_rows_is_one_line(tmp_path, capsys, name, content, told):
    (tmp_path / name).write_bytes(content)
    words = ["segment", str(tmp_path / name), "--out", str(tmp_path / "run"), "--quiet"]
    assert main(words) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(told, line), line
    if "limit" in told:
        assert main([*words, "--limit", "1"]) == 0


def test_one_of_two_columns_can_be_named(tmp_path):
    row = {"question": "Q?", "Question": "R?", "generation": BOTH}
    path = write_rows(tmp_path / "rows.jsonl", [row])
    (found,) = read_rows(find_inputs([path]), {"question": "Question"})
    assert found.question == "R?"


def test_no_digit_of_a_number_is_lost(tmp_path):
    text = json.dumps({"question": "Q?", "generation": BOTH, "answer": 0, "score": 0})
    values = {"12345678901234567890.0": "12345678901234567890", "1.5e3": "1500", "12345678901234567.25": None}
    for written, read_as in values.items():
        (tmp_path / "rows.jsonl").write_text(text.replace('"answer": 0', f'"answer": {written}'))
        (found,) = read_rows(find_inputs([tmp_path / "rows.jsonl"]))
        assert found.answer == (read_as or written)
    with pytest.raises(ValueError, match="write it as text"):
        read_answer(12345678901234567890.0)


def test_values_that_json_does_not_have_are_no_obstacle(tmp_path):
    import pyarrow
    import pyarrow.parquet

    more = {"when": datetime.datetime(2026, 1, 1), "raw": b"\xff", "price": Decimal("1.5")}
    rows = [
        {"id": 7, "question": "Q?", "response": BOTH, **more},
        {"id": 7, "question": "Q?", "response": A, **more},
        {"id": None, "question": None, "response": BOTH, **more},
    ]
    schema = pyarrow.Table.from_pylist(rows).schema
    text = pyarrow.StringArray.from_buffers(1, pyarrow.array([0, 1], "int32").buffers()[1], pyarrow.py_buffer(b"\xff"))
    broken = pyarrow.Table.from_pylist(rows[:1], schema).set_column(1, "question", text)
    table = pyarrow.concat_tables([pyarrow.Table.from_pylist(rows, schema), broken])
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    assert main(["segment", str(tmp_path / "rows.parquet"), "--out", str(tmp_path / "run"), "--quiet"]) == 0
    reasons = [row["reason"] for row in read_jsonl(tmp_path / "run" / "segment" / "rejected.jsonl")]
    assert reasons == ["no_thinking", "no_question", "broken_line"]
    (tmp_path / "no.parquet").write_bytes(GOOD)
    with pytest.raises(ValueError, match=r"no.parquet is no parquet file, or a damaged one"):
        list(read_rows(find_inputs([tmp_path / "no.parquet"])))


def test_rows_of_two_forms_in_one_table(tmp_path):
    """Each leaves the columns of the other empty."""
    empty = dict.fromkeys(("question", "response", "messages"))
    rows = [{"question": "Q?", "response": BOTH}, chat(content=BOTH)]
    found = [read(tmp_path, empty | row)[0] for row in rows]
    assert [(row.question, row.reasoning) for row in found] == [(row.question, R) for row in found]


def test_no_row_with_half_a_character_passes_any_step(tmp_path):
    good = {"question": "Q?", "hierarchical_cot": "[THOUGHT]a b c[SOLUTION]d[RETURN]", "expected_answer": None}
    bad = [{**good, key: "\ud83d"} for key in ("question", "hierarchical_cot", "expected_answer", "id")]
    bad += [{**good, "meta": {"a": "\ud83d"}}, {**good, "meta": '{"a": "\\ud83d"}'}, {**good, "meta": [1]}]
    path = write_rows(tmp_path / "rows.jsonl", [good, *bad])
    assert main(["check", str(path), "--out", str(tmp_path / "run"), "--quiet"]) == 0
    reasons = [row["reason"] for row in read_jsonl(tmp_path / "run" / "check" / "rejected.jsonl")]
    assert reasons == ["lone_surrogate"] * 6 + ["broken_record"]
    assert main(["export", str(path), "--out", str(tmp_path), "--to", str(tmp_path / "x.jsonl"), "--quiet"]) == 0
    assert len(read_jsonl(tmp_path / "x.jsonl")) == 1
    assert main(["export", str(path), "--out", str(tmp_path), "--to", str(tmp_path / "x.csv"), "--quiet"]) == 1


LEAVES = st.one_of(
    st.sampled_from(["Q?", "", BOTH, "<think>a", "</think>", "\ud83d", "off", "\x00", "[THOUGHT]a[SOLUTION]b[RETURN]"]),
    *(st.none(), st.booleans(), st.integers(), st.floats(), st.just(b"\xff"), st.just(datetime.date(2026, 1, 1))),
)
KEYS = st.sampled_from(["role", "content", "parts", "type", "text", "thinking", "thought", "user", "start", "blocks"])
MESSAGES = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": LEAVES})
VALUES = st.recursive(
    LEAVES | st.lists(MESSAGES, max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=6,
)
NAMES = sorted({name for names in ROLES.values() for name in names})
NESTED = ("id", "expected_answer", "original", "outline", "sentences", "made_by", "meta")
TRACES = st.fixed_dictionaries(
    {"question": st.just("Q?"), "hierarchical_cot": LEAVES}, optional=dict.fromkeys(NESTED, VALUES)
)


class Given:
    """An input that holds a good row and another one."""

    def __init__(self, record):
        good = {"question": "Q?", "response": BOTH, "hierarchical_cot": BOTH}
        self.records = lambda: iter([Record("first", good), Record("here", record)])


@given(st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=6), TRACES)
@settings(max_examples=150)
def test_whatever_stands_in_a_column_is_read_or_rejected(flat, prepared):
    check = Checker(CheckOptions())
    for row in [*read_rows([Given(flat)]), *read_prepared([Given(prepared)])]:
        if isinstance(row, Unreadable):
            json.loads(json.dumps(unread(row)))
        elif isinstance(row, SourceRow):
            assert row.question.strip() and row.reasoning.strip()
            json.dumps(asdict(row), ensure_ascii=False, allow_nan=False).encode()
        else:
            record = json.loads(json.dumps(row.record(), ensure_ascii=False, allow_nan=False).encode())
            assert PreparedRow.from_record(record) == row
            check(row)


def test_rows_of_the_same_name_stay_apart(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{**flat_row(number), "id": "same"} for number in range(3)])
    run = str(tmp_path / "run")
    assert main(["segment", str(path), "--out", run, "--quiet"]) == main(["check", run, "--quiet"]) == 0
    rows = read_jsonl(tmp_path / "run" / "check" / "rows.jsonl")
    assert [row["id"] for row in rows] == ["same"] * 3
    assert [[each["code"] for each in row.get("remarks", ())] for row in rows] == [[], *[["repeated_id"]] * 2]


def test_a_copy_is_one_whatever_its_name(tmp_path):
    rows = [{**flat_row(0), "id": name} for name in ("a", "a", "b")] + [{**flat_row(1), "id": "a"}]
    run = str(tmp_path / "run")
    assert main(["segment", str(write_rows(tmp_path / "rows.jsonl", rows)), "--out", run, "--quiet"]) == 0
    assert main(["check", run, "--quiet"]) == 0
    rejected = read_jsonl(tmp_path / "run" / "check" / "rejected.jsonl")
    assert [(row["id"], row["reason"], row["detail"]) for row in rejected] == [
        ("a", "duplicate", "all of a"),
        ("b", "duplicate", "all of a"),
    ]
