"""The command line as a user runs it: step by step, killed and started again, alone on files, and what it says."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hcot_lmeval.prepare.cli import COMMANDS, main
from hcot_lmeval.prepare.folder import Journal, StepFolder, rows_of
from hcot_lmeval.prepare.steps import in_order
from tests.prepare_files import flat_row, read_jsonl, write_flat, write_rows

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "scripts" / "prepare_data.py"
BLOCKS = ["--target-tokens", "60", "--min-tokens", "30", "--max-tokens", "120"]


def run(*words) -> int:
    return main([str(word) for word in words])


def segmented(tmp_path, rows=range(8)) -> Path:
    out = tmp_path / "run"
    assert run("segment", write_flat(tmp_path / "flat.jsonl", rows), "--out", out, *BLOCKS, "--quiet") == 0
    return out


def test_all_steps_in_a_row(tmp_path, capsys):
    out = segmented(tmp_path)
    assert run("check", out, "--quiet") == 0
    assert run("stats", out, "--quiet") == 0
    assert run("export", out, "--format", "parquet", "--quiet") == 0
    said = capsys.readouterr().out
    assert "segment: 8 of 8 rows passed, 0 rejected" in said and "check: 8 of 8 rows passed" in said
    assert "Live context and forwarded tokens" in said and "train.parquet: 8 rows (id, question, hier" in said
    flat = {row["id"]: row for row in (flat_row(number) for number in range(8))}
    for row in read_jsonl(out / "check" / "rows.jsonl"):
        assert row["original"] == flat[row["id"]]["generated_solution"]  # word for word, tags and all
        assert row["made_by"]["method"] == "segmenter"
    manifest = json.loads((out / "export" / "train.parquet.manifest.json").read_text())
    assert [step["step"] for step in manifest["steps"]] == ["segment", "check"]
    inputs = manifest["steps"][0]["identity"]["inputs"]
    assert inputs[0]["file"] == "flat.jsonl" and len(inputs[0]["sha256"]) == 64


def test_rejected_rows_are_kept_with_reasons_and_nothing_is_lost(tmp_path, capsys):
    rows = [flat_row(number) for number in range(6)]
    rows[1]["generated_solution"] = "no thinking here"
    rows[2]["expected_answer"] = "77"
    rows[3] |= {key: rows[0][key] for key in ("problem", "generated_solution", "expected_answer")}
    rows[4]["problem"] += " Write [THOUGHT]."
    path = write_rows(tmp_path / "flat.jsonl", rows)
    with path.open("a") as file:
        file.write('{"torn": \n')
    out = tmp_path / "run"
    assert run("segment", path, "--out", out, *BLOCKS) == 0
    assert run("check", out, "--against", write_rows(tmp_path / "tasks.jsonl", [rows[5]])) == 0
    early, late = (read_jsonl(out / step / "rejected.jsonl") for step in ("segment", "check"))
    assert [(row["id"], row["reason"]) for row in early] == [("row-1", "no_thinking"), (None, "broken_line")]
    assert early[0]["row"] == rows[1]
    expected = [("row-2", "answer_differs"), ("row-3", "duplicate"), ("row-4", "marker_in_source")]
    assert [(row["id"], row["reason"]) for row in late] == expected
    assert late[1]["detail"] == "all of row-0" and late[0]["row"]["hierarchical_cot"]
    passed = read_jsonl(out / "check" / "rows.jsonl")
    assert [row["id"] for row in passed] == ["row-0", "row-5"]
    assert [remark["code"] for remark in passed[1]["remarks"]] == ["contaminated"]
    said = capsys.readouterr().out
    assert "1  no_thinking: the text has no thinking section" in said
    assert "1  contaminated: reported, not rejected" in said
    assert run("check", out, "--against", tmp_path / "tasks.jsonl", "--drop-contaminated", "--restart") == 0
    assert [row["reason"] for row in read_jsonl(out / "check" / "rejected.jsonl")][-1] == "contaminated"


def test_near_duplicates_are_rejected_or_reported_and_the_first_row_stays(tmp_path):
    rows = [flat_row(0), flat_row(1), flat_row(0) | {"id": "near"}]
    rows[2]["problem"] += " Please."
    assert rows[2]["problem"] != rows[0]["problem"]
    out = tmp_path / "run"
    assert run("segment", write_rows(tmp_path / "flat.jsonl", rows), "--out", out, *BLOCKS) == 0
    for more, passed, rejected, remarked in (
        ([], 2, ["near_duplicate"], 0),
        (["--near", 1], 3, [], 0),
        (["--tolerate", "near_duplicate"], 3, [], 1),
        (["--duplicates", "off"], 3, [], 0),
    ):
        assert run("check", out, *more, "--restart") == 0
        found = read_jsonl(out / "check" / "rows.jsonl")
        assert len(found) == passed and sum("remarks" in row for row in found) == remarked
        late = read_jsonl(out / "check" / "rejected.jsonl")
        assert [row["reason"] for row in late] == rejected
        assert all(row["id"] == "near" and row["detail"].endswith("% of row-0") for row in late)


def test_the_same_again_does_nothing_and_other_settings_are_refused(tmp_path, capsys):
    out = segmented(tmp_path)
    stamp = (out / "segment" / "rows.jsonl").stat().st_mtime_ns
    assert run("segment", tmp_path / "flat.jsonl", "--out", out, *BLOCKS, "--workers", 2) == 0
    assert (out / "segment" / "rows.jsonl").stat().st_mtime_ns == stamp
    assert run("segment", tmp_path / "flat.jsonl", "--out", out) == 1
    assert "made with other settings: options.target_tokens was 60, is " in capsys.readouterr().err
    write_flat(tmp_path / "flat.jsonl", range(3))
    assert run("segment", tmp_path / "flat.jsonl", "--out", out, *BLOCKS) == 1
    assert "the inputs have changed. Give another --out, or --restart" in capsys.readouterr().err
    assert run("segment", tmp_path / "flat.jsonl", "--out", out, *BLOCKS, "--restart") == 0
    assert len(read_jsonl(out / "segment" / "rows.jsonl")) == 3


def test_an_error_in_the_settings_leaves_nothing_that_refuses_the_right_ones(tmp_path, capsys):
    path = write_rows(tmp_path / "flat.jsonl", [{"task": flat_row(1)["problem"], **flat_row(1)}])
    assert run("segment", path, "--out", tmp_path / "run", "--column", "question=tusk") == 1
    assert "no column for question=tusk. Present: task, id" in capsys.readouterr().err
    assert run("segment", path, "--out", tmp_path / "run", "--column", "question=task", *BLOCKS) == 0


def test_an_error_in_a_worker_process_is_said_plainly(tmp_path, capsys):
    out = segmented(tmp_path)
    assert run("check", out, "--tokenizer", str(tmp_path / "none"), "--max-tokens", 9, "--workers", 2) == 1
    assert "none" in capsys.readouterr().err


def test_several_processes_write_the_same(tmp_path):
    out = segmented(tmp_path, range(30))
    for workers in (1, 3):
        assert run("check", out, "--out", tmp_path / f"by{workers}", "--workers", workers) == 0
    one, other = ((tmp_path / f"by{workers}" / "check" / "rows.jsonl").read_bytes() for workers in (1, 3))
    assert one == other and one.count(b"\n") == 30


def test_steps_run_alone_on_files(tmp_path):
    row = {"question": "1 + 1?", "hierarchical_cot": "[THOUGHT]one and one more[SOLUTION]2[RETURN] so \\boxed{2}"}
    path = write_rows(tmp_path / "theirs.jsonl", [row, {**row, "question": "2?"}])
    assert run("check", path, "--out", tmp_path / "a") == 0
    assert run("stats", path, "--out", tmp_path / "b") == 0
    assert run("export", path, "--to", tmp_path / "c.jsonl", "--out", tmp_path / "c", "--form", "chat") == 0
    assert read_jsonl(tmp_path / "c.jsonl")[0]["messages"][1]["content"].startswith("<think>[THOUGHT]one")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["segment", "nowhere.jsonl", "--out", "x"], "no file matches 'nowhere.jsonl'"),
        (["segment", "flat.jsonl", "--out", "x", "--column", "question"], "expected ROLE=NAME, as in question=problem"),
        (["check", "flat.jsonl"], "is not the folder of one run; name a folder with --out RUN"),
        (["check", "flat.jsonl", "--out", "x"], "Flat traces go through `segment` first"),
        (["check", "run", "--tolerate", "x"], "tolerate: 'x' is no code of a check; known are malformed"),
        (["export", "run", "--push", "name"], "push: 'name' is no data set on the hub; give owner/name"),
        (["export", "run", "--public"], "public is of an upload; give push=owner/name too"),
        (["check", "run", "--against", "aime"], "choose one of aime24, aime25, math500, polymath, or a file"),
    ],
)
def test_errors_name_what_is_allowed(tmp_path, monkeypatch, capsys, words, told):
    segmented(tmp_path, range(2))
    monkeypatch.chdir(tmp_path)
    assert run(*words) == 1
    assert told in capsys.readouterr().err


def test_nothing_to_export_and_nowhere_to_put_it_are_errors(tmp_path, capsys):
    out = segmented(tmp_path, range(2))
    assert run("export", out, "--to", "/proc/x.jsonl") == 1
    assert "/proc/x.jsonl cannot be written (No such file or directory); give another --to" in capsys.readouterr().err
    write_rows(out / "segment" / "rows.jsonl", [{"question": "q", "hierarchical_cot": ""}])
    assert run("export", out) == 1
    assert "there is no row to export: the first is " in capsys.readouterr().err
    assert run("stats", out) == 1
    assert "there is no row to count: " in (said := capsys.readouterr().err) and "no_text" in said


def test_rows_without_blocks_are_told(tmp_path, capsys):
    path = write_rows(tmp_path / "flat.jsonl", [flat_row(number, sentences=2) for number in range(3)])
    assert run("segment", path, "--out", tmp_path / "run") == 0
    assert "3  passed without a block, which `check` rejects; shorter blocks: --min-tokens N" in capsys.readouterr().out


def test_reasons_are_listed(capsys):
    with pytest.raises(SystemExit, match="0"):
        run("check", "--reasons")
    said = capsys.readouterr().out
    assert "solution_not_shorter" in said and "marker_in_source" in said and "no_thinking" in said


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_is_instant_and_imports_nothing_heavy(command):
    words = [*([command] if command else []), "--help"]
    code = f"import sys; sys.argv=['prepare_data.py', *{words}]; sys.path.insert(0, {str(ROOT)!r})\n" + (
        "from hcot_lmeval.prepare.cli import main\ntry: main()\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'datasets', 'transformers', 'pyarrow', 'matplotlib', 'tqdm', 'pydantic_ai'}\n"
        "print('HEAVY', sorted(heavy & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("HEAVY []\n")
    assert "examples:" in done.stdout


DATA = os.environ.get("HCOT_LMEVAL_TEST_DATA")


@pytest.mark.skipif(not DATA, reason="set HCOT_LMEVAL_TEST_DATA to a folder with traces/ and aime25/")
def test_real_traces_pass_with_their_words_and_the_evaluation_problem_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HCOT_LMEVAL_DATA", str(DATA))
    source, out = Path(str(DATA)) / "traces" / "reasoning_traces.jsonl", tmp_path / "run"
    assert run("segment", source, "--out", out) == 0
    assert run("check", out, "--against", "aime24", "aime25", "--max-depth", 2) == 0
    assert run("stats", out) == 0
    rows = {row["id"]: row for row in read_jsonl(out / "check" / "rows.jsonl")}
    flat = read_jsonl(source)
    assert len(rows) == len(flat) == 26
    for row in flat:
        text = rows[row["id"]]["original"]
        assert row["generated_solution"].removesuffix("</think>") == (text if "</think>" in text else f"<think>{text}")
    remarks = {name: row["remarks"] for name, row in rows.items() if "remarks" in row}
    assert [(name, remark["code"]) for name, [remark] in remarks.items()] == [("nemotron7b-aime25-0", "contaminated")]
    numbers = json.loads((out / "stats" / "stats.json").read_text())["numbers"]
    assert numbers["recompute peak"]["sum"] < 0.3 * numbers["off peak"]["sum"]


# --- killed runs go on ------------------------------------------------------------------------------------------------


def test_a_killed_step_goes_on_and_does_no_row_twice(tmp_path):
    flat, out = write_flat(tmp_path / "flat.jsonl", range(80)), tmp_path / "run"
    command = [sys.executable, str(SCRIPT), "segment", str(flat), "--out", str(out), *BLOCKS]
    journal = out / "segment" / "journal.jsonl"
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL)
    try:
        while not journal.exists() or journal.read_bytes().count(b"\n") < 10:
            assert process.poll() is None, "it was over before it could be killed"
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    kept = journal.read_bytes()
    assert not (out / "segment" / "rows.jsonl").exists()
    with journal.open("ab") as file:
        file.write(b'{"n": 79, "row": {"to')  # as a kill in the middle of a line leaves it
    assert kept.count(b"\n") < 80
    assert run("segment", flat, "--out", out, *BLOCKS, "--workers", 2) == 0
    assert run("segment", flat, "--out", tmp_path / "whole", *BLOCKS) == 0
    one, other = ((folder / "segment" / "rows.jsonl").read_bytes() for folder in (out, tmp_path / "whole"))
    assert one == other
    assert not journal.exists()


def test_a_journal_keeps_what_was_added_and_forgets_a_torn_line(tmp_path):
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal:
        for number in (3, 0, 2):
            journal.add(number, {"row": {"text": f"{number} é \ud800"}})
        with pytest.raises(ValueError, match="row 2 is in the journal already"):
            journal.add(2, {})
        with pytest.raises(ValueError, match="is in use by another run"):
            Journal(path)
    for torn in (b'{"n": 1, "ro', b"\x00\xff\n"):
        with path.open("ab") as file:
            file.write(torn)
        with Journal(path) as journal:
            assert set(journal.done) == {0, 2, 3}
            assert [entry["n"] for entry in journal.entries()] == [0, 2, 3]
    with Journal(path) as journal:
        journal.add(1, {"row": {}})
        assert [entry["n"] for entry in journal.entries()] == [0, 1, 2, 3]


def test_an_unfinished_step_is_not_read(tmp_path):
    folder = StepFolder(tmp_path, "segment", {}, [])
    assert folder.open() is False
    with pytest.raises(ValueError, match="is not finished; run `segment` again, with the arguments that it had"):
        rows_of(tmp_path)
    folder.finish(lambda entry: (True, entry), lambda: {"rows": 0})
    assert rows_of(tmp_path) == tmp_path / "segment" / "rows.jsonl"
    with pytest.raises(ValueError, match="has no step before segment"):
        rows_of(tmp_path, "segment")
    assert rows_of(tmp_path / "segment") == rows_of(tmp_path) and rows_of("else.jsonl") == "else.jsonl"


# --- workers ----------------------------------------------------------------------------------------------------------


def make_square():
    return square


def square(number):
    return number * number


@pytest.mark.parametrize("workers", [1, 2])
def test_work_comes_back_in_order_and_reads_no_further_than_it_needs(workers):
    taken = []

    def numbers():
        for number in range(1000):
            taken.append(number)
            yield number

    found = in_order(numbers(), make_square, workers)
    assert [next(found) for _ in range(10)] == [(n, n * n) for n in range(10)]
    assert len(taken) < 100
    found.close()
    assert list(in_order(range(20), make_square, workers)) == [(n, n * n) for n in range(20)]
