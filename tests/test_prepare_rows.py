"""Rows of all forms are recognised, broken ones become data, and what is written can be read again."""

from __future__ import annotations

import gzip
import json
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hcot_lmeval.files import Input, InputOptions, count_records, find_inputs
from hcot_lmeval.markup import PRESETS
from hcot_lmeval.prepare.outline import Block, Outline, assemble
from hcot_lmeval.prepare.reading import SOLUTION_TAGS, read_prepared, read_rows, split_thinking
from hcot_lmeval.prepare.reasons import READING
from hcot_lmeval.prepare.rows import PreparedRow, SourceRow, Unreadable
from hcot_lmeval.vocabulary import PAIRS

SAID = "<think>\nFirst.\nThen 2.\n</think>\nIt is \\boxed{2}."
REASONING, RESPONSE = "\nFirst.\nThen 2.\n", "\nIt is \\boxed{2}."
R1 = {"prompt": "Q?", "response": SAID}
OPEN_MATH = {"id": "1", "problem": "Q?", "generated_solution": SAID, "expected_answer": "2", "pass_rate": "0.9"}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path, columns=None, limit=None):
    return list(read_rows(find_inputs([path]), columns, limit))


def test_columns_can_be_named(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"task": "Q?", "said": SAID, "id": 7, "right": 2.5, "response": "other"}])
    (row,) = read(path, {"question": "task", "text": "said", "answer": "right"})
    assert (row.id, row.question, row.reasoning, row.response, row.answer) == ("7", "Q?", REASONING, RESPONSE, "2.5")
    with pytest.raises(ValueError, match=r"no column for question=nothing. Present: task, said.*--column ROLE=NAME"):
        read(path, {"question": "nothing"})
    with pytest.raises(ValueError, match=r"role 'kestion' is unknown; known are id, question"):
        read(path, {"kestion": "task"})


def test_missing_columns_name_what_is_there_and_what_is_wanted(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"a": 1, "b": 2}])
    with pytest.raises(
        ValueError, match=r"rows.jsonl, line 1: no columns of.*Present: a, b. Needed: a question \(quest"
    ):
        read(path)


FAULTS = {
    "no_question": {"question": " ", "response": SAID},
    "no_text": {"question": "Q?", "response": None},
    "no_thinking": {"question": "Q?", "response": "It is 2."},
    "unclosed_thinking": {"question": "Q?", "response": "<think>First. Then"},
    "several_thoughts": {"question": "Q?", "response": SAID + "<think>again</think>"},
    "text_before_thinking": {"question": "Q?", "response": "Sure! " + SAID},
    "empty_thinking": {"question": "Q?", "response": "<think>\n\n</think>\nIt is 2."},
    "no_column": {"other": 1},
}


def test_broken_rows_are_data_with_a_code_and_the_rest_is_read(tmp_path):
    rows = [R1, *FAULTS.values(), R1]
    path = write(tmp_path / "rows.jsonl", rows)
    path.write_text(path.read_text() + '{"question": "to\n[1]\n\n', encoding="utf-8")
    found = read(path)
    assert [row.code for row in found if isinstance(row, Unreadable)] == [*FAULTS, "broken_line", "broken_line"]
    assert sum(isinstance(row, SourceRow) for row in found) == 2
    assert {row.code for row in found if isinstance(row, Unreadable)} <= READING.keys()
    assert found[3].record == FAULTS["no_thinking"] and found[3].where == f"{path}, line 4"


@given(st.text(), st.text())
def test_thinking_is_cut_exactly(reasoning, response):
    tags = [*(tag for pair in PAIRS for tag in pair), *SOLUTION_TAGS]
    if any(tag in f"{reasoning}</think>{response}".replace("</think>", "", 1) for tag in tags):
        return
    assert split_thinking(f"<think>{reasoning}</think>{response}") == (reasoning, response)


def test_files_of_every_kind_give_the_same_rows(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [{**OPEN_MATH, "id": str(i)} for i in range(200)]
    plain = write(tmp_path / "rows.jsonl", rows)
    with gzip.open(tmp_path / "zipped.jsonl.gz", "wb") as file:
        file.write(plain.read_bytes())
    with pyarrow.CompressedOutputStream(str(tmp_path / "small.jsonl.zst"), "zstd") as file:
        file.write(plain.read_bytes())
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet", row_group_size=30)
    expected = read(plain)
    assert len(expected) == 200
    for name in ("zipped.jsonl.gz", "small.jsonl.zst", "rows.parquet"):
        assert read(tmp_path / name) == expected
        assert count_records(find_inputs([tmp_path / name])) == 200
    assert len(read(tmp_path)) == 800  # a folder of them
    assert len(read(tmp_path, limit=250)) == 250
    assert count_records(find_inputs([tmp_path]), 250) == 250


def test_what_is_not_there_is_named(tmp_path):
    (tmp_path / "rows.csv").write_text("a,b\n")
    write(tmp_path / "rows.jsonl", [R1])
    for name, told in (("none.jsonl", "no file matches"), ("*.parquet", "no file matches"), ("word", "owner/name")):
        with pytest.raises(FileNotFoundError, match=told):
            find_inputs([name if name == "word" else tmp_path / name])
    with pytest.raises(ValueError, match=r"rows.csv is no .jsonl or .jsonl.gz or .jsonl.zst or .parquet file"):
        find_inputs([tmp_path / "rows.csv"])
    with pytest.raises(ValueError, match="given twice"):
        find_inputs([tmp_path / "rows.jsonl", tmp_path])


def test_the_hub_is_streamed_at_the_commit_that_was_found(monkeypatch):
    import datasets
    import huggingface_hub

    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return iter([OPEN_MATH] * 3)

    info = lambda self, name, revision: SimpleNamespace(sha="abc")  # noqa: E731
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", info)
    found = find_inputs(["nvidia/OpenMathReasoning"], InputOptions(split="cot"))
    rows = list(read_rows(found, limit=2))
    assert [row.question for row in rows] == ["Q?", "Q?"]
    assert asked == [(("nvidia/OpenMathReasoning", None), {"split": "cot", "revision": "abc", "streaming": True})]
    identity = {"hub": "nvidia/OpenMathReasoning", "subset": None, "split": "cot", "revision": "abc"}
    assert found[0].identity() == identity


def test_a_hub_out_of_reach_is_said_plainly(monkeypatch):
    import huggingface_hub

    def refuse(self, name, revision):
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", refuse)
    with pytest.raises(FileNotFoundError, match=r"'some/set' is no file here, and .*: ConnectionError: no network"):
        find_inputs(["some/set"])


# --- prepared rows ----------------------------------------------------------------------------------------------------


def prepared(response="\nIt is \\boxed{2}.") -> PreparedRow:
    pieces = ("One. ", "Two. ", "Three. ")
    outline = Outline(3, (Block(0, 2, solution="1"),))
    source = SourceRow("a", "Q?", "".join(pieces), response, "2", {"origin": "test"})
    return PreparedRow(source, assemble(pieces, outline, PRESETS["hcot"]), outline, pieces, {"method": "hand"})


@pytest.mark.parametrize("response", ["\nIt is \\boxed{2}.", ""])
def test_prepared_rows_survive_json_and_parquet(tmp_path, response):
    import pyarrow
    import pyarrow.parquet

    row = prepared(response)
    record = json.loads(json.dumps(row.record()))
    assert PreparedRow.from_record(record) == row
    assert ("</think>" in record["hierarchical_cot"]) == bool(response)
    nested = {key: json.dumps(value) if isinstance(value, (dict, list)) else value for key, value in record.items()}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([nested]), tmp_path / "rows.parquet")
    assert list(read_prepared(find_inputs([tmp_path / "rows.parquet"]))) == [row]


def test_rows_of_other_hands_are_read_without_their_original():
    row = PreparedRow.from_record(
        {"question": "Q?", "hierarchical_cot": "<think>[THOUGHT]a[SOLUTION]b[RETURN]</think>c"}
    )
    assert row.trace == "[THOUGHT]a[SOLUTION]b[RETURN]"
    assert (row.source.response, row.source.reasoning, row.outline) == ("c", "", None)


def test_broken_prepared_rows_are_data(tmp_path):
    good = prepared().record()
    bad = {
        "no_question": {**good, "question": None},
        "no_text": {**good, "hierarchical_cot": 3},
        "not_an_outline": {**good, "outline": {"blocks": []}},
        "broken_record": {**good, "sentences": "x"},
    }
    path = write(tmp_path / "rows.jsonl", [good, *bad.values()])
    found = list(read_prepared(find_inputs([path])))
    assert [row.code for row in found[1:]] == list(bad)
    flat = write(tmp_path / "flat.jsonl", [R1])
    with pytest.raises(ValueError, match=r"present: prompt, response. Flat traces go through `segment` first"):
        list(read_prepared(find_inputs([flat])))


def test_an_input_is_known_by_its_content(tmp_path):
    one, other = write(tmp_path / "a.jsonl", [{"a": 1}]), write(tmp_path / "b.jsonl", [{"a": 2}])
    digests = {Input(str(path), path).identity()["sha256"] for path in (one, other)}
    assert len(digests) == 2
