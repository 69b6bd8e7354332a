"""Rows from files, directories and generators come out with the same columns, and what is missing is said at once."""

import json
import subprocess
import sys
import textwrap

import datasets
import pytest

from hcot_lmeval import synthetic
from hcot_lmeval.training.config import SourceConfig
from hcot_lmeval.training.data.sources import FEATURES, load_source

ROWS = [
    {"question": f"{n}?", "hierarchical_cot": f"[THOUGHT]{n}[SOLUTION]x[RETURN]", "expected_answer": n}
    for n in range(5)
]
CHAT = [
    {"messages": [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}]},
    {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "c?"}]},
    {"messages": []},
]


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)


def save(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    table = datasets.Dataset.from_list(rows)
    (table.to_parquet if path.suffix == ".parquet" else table.to_json)(str(path))
    return str(path)


def load(path, **options):
    return load_source(SourceConfig(path=str(path), **options))


def expected(path, rows=ROWS):
    return [
        {
            "question": row["question"],
            "messages": None,
            "trace": row["hierarchical_cot"],
            "answer": str(row["expected_answer"]),
            "source": str(path),
            "row": number,
        }
        for number, row in enumerate(rows)
    ]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.parquet"])
def test_files(tmp_path, name):
    path = save(tmp_path / name, ROWS)
    rows = load(path)
    assert list(rows) == expected(path)
    assert rows.features == FEATURES


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_patterns_take_files_in_their_order(tmp_path, suffix):
    for start in (3, 0):
        save(tmp_path / "many" / f"part-{start}.{suffix}", ROWS[start : start + 3])
    assert list(load(f"many/*.{suffix}")) == expected(f"many/*.{suffix}")


def test_directories_are_read_as_the_hub_would(tmp_path):
    save(tmp_path / "data" / "train.jsonl", ROWS[:3])
    save(tmp_path / "data" / "test.jsonl", ROWS[3:])
    assert [row["question"] for row in load("data")] == ["0?", "1?", "2?"]
    assert [row["question"] for row in load("data", split="test")] == ["3?", "4?"]
    with pytest.raises(ValueError, match=r"data.*Unknown split"):
        load("data", split="dev")


def test_columns_with_other_names(tmp_path):
    names = {"question": "problem", "trace": "solution", "answer": "gold"}
    path = save(tmp_path / "x.jsonl", [dict(zip(names.values(), row.values(), strict=True)) for row in ROWS])
    assert list(load(path, columns=names)) == expected(path)


def test_other_columns_are_dropped_and_answers_may_lack(tmp_path):
    path = save(tmp_path / "x.jsonl", [{"question": "q", "hierarchical_cot": "t", "more": 1}])
    assert list(load(path)) == [
        {"question": "q", "messages": None, "trace": "t", "answer": None, "source": path, "row": 0}
    ]


def test_conversations(tmp_path):
    rows = list(load(save(tmp_path / "chat.jsonl", CHAT)))
    assert [row["trace"] for row in rows] == ["b", None, None]  # the second does not end with the assistant
    assert [row["messages"] for row in rows] == [
        [{"role": "user", "content": "a?"}],
        [{"role": "system", "content": "s"}],
        [],
    ]
    assert {row["question"] for row in rows} == {None}


THOUGHT, ANSWER = "[THOUGHT]5+53[SOLUTION]58[RETURN]", "It is \\boxed{58}."
TEXT = {"type": "text", "text": ANSWER}
BESIDE = {
    "reasoning_content": {"content": ANSWER, "reasoning_content": THOUGHT},
    "reasoning": {"content": ANSWER, "reasoning": THOUGHT},
    "thinking": {"content": ANSWER, "thinking": THOUGHT},
    "with its tokens": {"content": ANSWER, "thinking": f"<think>{THOUGHT}</think>"},
    "a thinking part": {"content": [{"type": "thinking", "thinking": THOUGHT, "signature": "x"}, TEXT]},
    "a reasoning part": {"content": [{"type": "reasoning", "text": THOUGHT}, TEXT]},
    "in the content as well": {"content": f"<think>{THOUGHT}</think>\n\n{ANSWER}", "reasoning_content": THOUGHT},
    "beside parts": {"content": [{"type": "output_text", "text": "It is "}, "\\boxed{58}."], "reasoning": THOUGHT},
}


@pytest.mark.parametrize("message", BESIDE.values(), ids=BESIDE)
def test_reasoning_beside_the_content_is_part_of_the_trace(message):
    asked = {"role": "user", "content": [{"type": "text", "text": "5+"}, {"type": "text", "text": "53?"}]}
    with open("chat.jsonl", "w") as file:
        file.write(json.dumps({"messages": [asked, {"role": "assistant"} | message]}) + "\n")
    [row] = load("chat.jsonl")
    assert row["messages"] == [{"role": "user", "content": "5+53?"}]
    assert row["trace"] == f"<think>{THOUGHT}</think>\n\n{ANSWER}"


def test_parts_that_are_no_text_leave_no_content():
    asked = [{"role": "user", "content": [{"type": "image", "image": "x.png"}, {"type": "text", "text": "?"}]}]
    with open("chat.jsonl", "w") as file:
        file.write(json.dumps({"messages": [*asked, {"role": "assistant", "content": "b"}]}) + "\n")
    assert load("chat.jsonl")[0]["messages"] == [{"role": "user", "content": None}]


@pytest.mark.parametrize("message", ["b", {"from": "gpt", "value": "b"}, {"role": "assistant", "content": {"a": 1}}])
def test_messages_of_another_form_are_told(message):
    with open("chat.jsonl", "w") as file:
        file.write(json.dumps({"messages": [message]}) + "\n")
    with pytest.raises(ValueError, match=r"chat\.jsonl, row 0: a (message|text).*'?b|1'?"):
        load("chat.jsonl")


@pytest.mark.parametrize(
    ("answer", "expected"), [(7, "7"), (" x ", "x"), ("", None), (None, None), (float("nan"), None), (["7"], "7")]
)
def test_answers_are_texts(answer, expected):
    with open("x.jsonl", "w") as file:
        file.write(json.dumps(ROWS[0] | {"expected_answer": answer}) + "\n")
    assert load("x.jsonl")[0]["answer"] == expected


def test_several_answers_are_no_answer():
    with open("x.jsonl", "w") as file:
        file.write(json.dumps(ROWS[0] | {"expected_answer": ["7", "8"]}) + "\n")
    with pytest.raises(ValueError, match=r"x\.jsonl, row 0: the expected answer is \['7', '8'\]; name a column"):
        load("x.jsonl")


def test_question_and_trace_are_taken_where_messages_are_there_too(tmp_path):
    path = save(tmp_path / "both.jsonl", [ROWS[0] | CHAT[0]])
    assert load(path)[0]["trace"] == ROWS[0]["hierarchical_cot"]
    assert load(path, columns={"messages": "messages"})[0]["trace"] == "b"


def test_limit_takes_the_beginning(tmp_path):
    path = save(tmp_path / "x.jsonl", ROWS)
    assert list(load(path, limit=2)) == expected(path, ROWS[:2])
    assert len(load(path, limit=99)) == len(ROWS)


def test_changed_files_are_read_again(tmp_path):
    load(save(tmp_path / "x.jsonl", ROWS))
    assert len(load(save(tmp_path / "x.jsonl", ROWS * 2))) == 2 * len(ROWS)


@pytest.mark.parametrize(
    ("columns", "telling"),
    [
        ({}, ["'hierarchical_cot'", "It has: question, solution", "Wanted: question", "columns"]),
        ({"trace": "cot"}, ["'cot'", "It has: question, solution"]),
        ({"trace": "solution", "answer": "gold"}, ["'gold'"]),
        ({"messages": "talk"}, ["'talk'"]),
        ({"prompt": "question"}, ["prompt unknown", "known are question, trace, answer, messages"]),
    ],
)
def test_missing_columns_are_one_clear_error(tmp_path, columns, telling):
    path = save(tmp_path / "x.jsonl", [{"question": "q", "solution": "s"}])
    with pytest.raises(ValueError) as caught:
        load(path, columns=columns)
    assert all(part in str(caught.value) for part in [*telling, path]), caught.value


@pytest.mark.parametrize("path", ["absent.jsonl", "absent/*.parquet", "./absent", "/no/where"])
def test_missing_files_are_one_clear_error(path):
    with pytest.raises(FileNotFoundError, match="no file matches"):
        load(path)


def test_unknown_data_sets_are_one_clear_error():
    with pytest.raises(FileNotFoundError, match=r"nobody/nothing.*no file here"):
        load("nobody/nothing")


def test_files_that_cannot_be_read_are_one_clear_error(tmp_path):
    (tmp_path / "broken.jsonl").write_text('{"question": "q"\n')
    with pytest.raises(ValueError, match=r"broken\.jsonl, line 1 is no JSON object"):
        load("broken.jsonl")
    (tmp_path / "rows.csv").write_text("question\nq\n")
    with pytest.raises(ValueError, match=r"rows\.csv names \.csv files"):
        load("rows.csv")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"empty\.jsonl"):
        load("empty.jsonl")


def test_settings_that_mean_nothing_are_refused(tmp_path):
    path = save(tmp_path / "x.jsonl", ROWS)
    with pytest.raises(ValueError, match="split belong to directories"):
        load(path, split="test")
    with pytest.raises(ValueError, match="options mean nothing"):
        load(path, options={"size": 3})
    with pytest.raises(ValueError, match="made on the spot"):
        load("synthetic:arith", name="x")
    with pytest.raises(ValueError, match=r"synthetic:arith, synthetic:qbf, synthetic:sat"):
        load("synthetic:chess")


# --- problems made on the spot ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", sorted(synthetic.TASKS))
def test_problems_made_on_the_spot(task):
    path = f"synthetic:{task}"
    rows = load(path, split="validation", options={"size": 6, "seed": 3})
    made = list(synthetic.training_rows(task, "validation", size=6, seed=3))
    assert list(rows) == expected(path, made)
    assert len(load(path, options={"size": 6}, limit=2)) == 2


def test_problems_are_in_the_notation_of_the_run_or_their_own():
    source = SourceConfig(path="synthetic:arith", options={"size": 2})
    assert "[CALL]" in load_source(source, "pencil")[0]["trace"]
    assert "[THOUGHT]" in load_source(source)[0]["trace"]
    own = SourceConfig(path="synthetic:arith", options={"size": 2, "markup": "pencil"})
    assert "[CALL]" in load_source(own)[0]["trace"]


@pytest.mark.parametrize(
    ("options", "telling"),
    [({"options": {"size": 0}}, "size=0"), ({"options": {"sise": 3}}, "sise"), ({"split": "dev"}, "dev")],
)
def test_options_of_problems_are_checked_at_once(options, telling):
    with pytest.raises(ValueError, match=f"^synthetic:arith: .*{telling}"):
        load("synthetic:arith", **options)


def test_problems_come_from_the_cache():
    first = load("synthetic:arith", options={"size": 5})
    assert load("synthetic:arith", options={"size": 5})._fingerprint == first._fingerprint
    assert load("synthetic:arith", options={"size": 5, "seed": 1})._fingerprint != first._fingerprint


def test_ctrl_c_while_workers_map_ends_this_process_alone() -> None:
    """In a process of its own: the data's libraries may have threads, which a fork does not like."""
    source = """
        import os, signal
        from hcot_lmeval.training.data.sources import interrupted_as_one
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            with interrupted_as_one():
                worker = os.fork()
                try:
                    os.kill(os.getpid(), signal.SIGINT)
                    os._exit(7)
                finally:  # of the parent alone
                    assert os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]) == 7
                    raise TimeoutError("as datasets does, which has waited for its workers")
        except KeyboardInterrupt:
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
            print("interrupted")
        try:
            with interrupted_as_one():
                raise TimeoutError
        except TimeoutError:
            print("timed out")
        """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(source)], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n") == ["interrupted", "timed out", ""]


@pytest.mark.parametrize("kind", ["file", "synthetic"])
def test_a_cache_that_cannot_be_written_to_is_named(tmp_path, monkeypatch, kind):
    """`datasets` keeps what it reads below HF_HOME, which by default lies in HOME."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "1 + 1?", "hierarchical_cot": "2", "expected_answer": "2"}\n')
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", "/proc/nowhere")
    with pytest.raises(OSError, match=r"cannot be written to .*/proc/nowhere.*; set HF_HOME to a directory that can"):
        load_source(SourceConfig(path=str(path) if kind == "file" else "synthetic:arith"))
