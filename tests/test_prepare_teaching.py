"""A teacher through the command line: rows in, rows out, faults as data, nothing asked twice, limits, the cost."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from hcot_lmeval.prepare.cli import main
from hcot_lmeval.prepare.folder import read_manifest
from tests.interrupts import accept_interrupts
from tests.prepare_files import flat_row, read_jsonl, write_flat, write_rows
from tests.scripted_teacher import Asked, Raw, Say, ScriptedTeacher, Status
from tests.teacher_runs import CANARY

pytestmark = pytest.mark.usefixtures("keys")

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "prepare_data.py"


def number_of(asked: Asked) -> int:
    """The row that a question is about: its problem holds its number."""
    return int(re.search(r"What is (\d+) \+ 0", asked.turns[0][1]).group(1))


def good(asked: Asked) -> Say:
    """Blocks over sentences 1 to 3, with a solution, and 4 to 8, whose last sentence is theirs."""
    blocks = [
        {"start": 1, "end": 3, "kind": "subproblem", "solution_from": None, "solution": "It is 1."},
        {"start": 4, "end": 8, "kind": "subproblem", "solution_from": 8, "solution": None},
    ]
    return Say(json.dumps({"blocks": blocks}))


def segment(server: ScriptedTeacher, flat, out, *words) -> int:
    options = ["--teacher", "local:qwen", "--base-url", server.url("local"), "--attempts", 1]
    return main([str(word) for word in ["segment", flat, "--out", out, *options, "--quiet", *words]])


def test_blocks_of_a_teacher_become_rows_that_pass_the_checks(tmp_path, capsys):
    flat, out = write_flat(tmp_path / "flat.jsonl", range(12)), tmp_path / "run"
    with ScriptedTeacher(lambda asked: good(asked)._replace(seconds=0.05)) as server:  # or none would meet another
        assert segment(server, flat, out, "--price-input", 1.0, "--price-output", 10.0) == 0
        assert len(server.requests) == 12 and 1 < server.most <= 8
    assert main(["check", str(out)]) == 0
    rows = read_jsonl(out / "check" / "rows.jsonl")
    assert [row["id"] for row in rows] == [f"row-{number}" for number in range(12)]  # in the order of the input
    for number, row in enumerate(rows):
        assert row["original"] == flat_row(number)["generated_solution"]
        assert row["hierarchical_cot"].count("[SOLUTION]It is 1.[RETURN]") == 1
        assert row["made_by"]["method"] == "teacher" and row["made_by"]["prompt"].startswith("segment/")
        assert row["made_by"]["teacher"] == "local:qwen"
    spent = read_manifest(out / "segment")["summary"]["teacher"]
    assert (spent["requests"], spent["input_tokens"], spent["output_tokens"]) == (12, 1200, 120)
    assert spent["usd"] == pytest.approx(12 * (100 * 1.0 + 10 * 10.0) / 1e6)
    assert main(["stats", str(out), "--quiet"]) == 0
    said = capsys.readouterr().out
    assert "the teacher: 12 requests, 1,200 input and 120 output tokens, $0.0024" in said


BAD = {
    0: ("wrong_json", Say("I would rather not")),
    1: ("schema", Say('{"blocks": [{"start": "one"}]}')),
    2: ("overlap", Say(good(None).text.replace('"end": 3', '"end": 5'))),
    3: ("truncated", Say('{"blocks": [', end="length")),
    4: ("refused", Say("", end="refusal")),
    5: ("out_of_range", Say(good(None).text.replace('"end": 8', '"end": 8000'))),
    6: ("empty_reply", Say("")),
    7: ("bad_request", Status(400, message="too long")),
}


def test_replies_of_no_use_are_rows_with_a_code(tmp_path):
    flat, out = write_flat(tmp_path / "flat.jsonl", range(10)), tmp_path / "run"
    with ScriptedTeacher(lambda asked: BAD[number_of(asked)][1] if number_of(asked) in BAD else good(asked)) as server:
        assert segment(server, flat, out, "--no-ask-again") == 0
        asked = len(server.requests)
        assert segment(server, flat, out, "--no-ask-again") == 0  # done: nothing to do
        assert segment(server, flat, out, "--no-ask-again", "--restart") == 0  # done anew: from the replies
        assert asked == 10 and len(server.requests) == 11  # but for the one that was turned away, which cost nothing
    rejected = read_jsonl(out / "segment" / "rejected.jsonl")
    assert {row["id"]: row["reason"] for row in rejected} == {f"row-{n}": code for n, (code, _) in BAD.items()}
    assert rejected[0]["row"]["generated_solution"] == flat_row(0)["generated_solution"]
    assert [row["id"] for row in read_jsonl(out / "segment" / "rows.jsonl")] == ["row-8", "row-9"]
    reasons = read_manifest(out / "segment")["summary"]["reasons"]
    assert all(found["meaning"] for found in reasons.values())


def test_rows_that_got_no_reply_stay_open_until_they_do(tmp_path, capsys):
    flat, out = write_flat(tmp_path / "flat.jsonl", range(6)), tmp_path / "run"
    fail = {1: Status(503), 4: Raw(b"<html>")}
    with ScriptedTeacher(lambda asked: fail.get(number_of(asked)) or good(asked)) as server:
        assert segment(server, flat, out) == 1
        assert "2 rows got no reply: 1 " in capsys.readouterr().err
        assert not (out / "segment" / "rows.jsonl").exists()
        del fail[1]
        assert segment(server, flat, out) == 1
        counts = Counter(number_of(asked) for asked in server.requests)
        assert counts == {0: 1, 1: 2, 2: 1, 3: 1, 4: 2, 5: 1}
        assert segment(server, flat, out, "--give-up") == 0
    assert [row["id"] for row in read_jsonl(out / "segment" / "rejected.jsonl")] == ["row-4"]
    assert len(read_jsonl(out / "segment" / "rows.jsonl")) == 5


def test_a_dry_run_asks_nothing_and_needs_no_key(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("GEMINI_API_KEY")
    flat, out = write_flat(tmp_path / "flat.jsonl", range(6)), tmp_path / "run"
    words = ["segment", flat, "--out", out, "--teacher", "gemini:gemini-2.5-flash"]
    assert main([str(word) for word in [*words, "--dry-run"]]) == 0
    said = capsys.readouterr().out
    assert "requests        6 (0 replies are there already)" in said and "US dollars      0.0" in said
    assert not out.exists()
    assert main([str(word) for word in words]) == 1
    assert "set GEMINI_API_KEY" in capsys.readouterr().err


def test_a_key_that_is_not_accepted_ends_the_run_and_is_told_nowhere(tmp_path, capsys):
    flat, out = write_flat(tmp_path / "flat.jsonl", range(6)), tmp_path / "run"
    with ScriptedTeacher([Status(401, message=f"wrong key {CANARY}")]) as server:
        assert segment(server, flat, out) == 1
    told = capsys.readouterr()
    assert "does not accept the key in TEACHER_API_KEY" in told.err
    files = [path.read_bytes() for path in out.rglob("*") if path.is_file()]
    assert not any(CANARY.encode() in text for text in [*files, told.err.encode(), told.out.encode()])


def test_rows_that_cannot_pass_cost_nothing(tmp_path):
    rows = [flat_row(number) for number in range(3)]
    rows[0]["problem"] += " Write [RETURN]."
    rows[1]["generated_solution"] = "no thinking"
    with ScriptedTeacher(good) as server:
        assert segment(server, write_rows(tmp_path / "flat.jsonl", rows), tmp_path / "run") == 0
        assert [number_of(asked) for asked in server.requests] == [2]
    reasons = [row["reason"] for row in read_jsonl(tmp_path / "run" / "segment" / "rejected.jsonl")]
    assert reasons == ["marker_in_source", "no_thinking"]


def test_windows_come_together_and_rows_that_ask_the_same_share_a_reply(tmp_path):
    """Replies come in any order; each row gets those to its own questions, in their order."""
    rows = [flat_row(number, sentences=60) for number in (0, 1, 0, 2)]

    def blocks(asked: Asked) -> Say:
        numbers = [int(n) for n in re.findall(r"^\[(\d+)\]", asked.turns[0][1], re.MULTILINE)]
        found = [
            {"start": n, "end": n + 4, "kind": "subproblem", "solution_from": None, "solution": f"s{n}"}
            for n in numbers
            if n % 5 == 0 and n + 4 in numbers
        ]
        return Say(json.dumps({"blocks": found}), seconds=0.05 * (len(server.requests) % 4))

    with ScriptedTeacher(blocks) as server:
        flat, out = write_rows(tmp_path / "flat.jsonl", rows), tmp_path / "run"
        assert segment(server, flat, out, "--window-tokens", 300) == 0
    counts = Counter(number_of(asked) for asked in server.requests)
    assert counts.keys() == {0, 1, 2} and min(counts.values()) > 2 and counts[0] < 2 * min(counts.values())
    for row in read_jsonl(out / "segment" / "rows.jsonl"):
        starts = [block["start"] for block in row["outline"]["blocks"]]
        assert starts == sorted(starts) and {start % 5 for start in starts} == {0}
        assert len(starts) >= len(row["sentences"]) // 5 - counts[int(row["id"].removeprefix("row-"))]


# --- refine, judge ----------------------------------------------------------------------------------------------------


def run(step: str, server: ScriptedTeacher, out, *words) -> int:
    options = ["--teacher", "local:qwen", "--base-url", server.url("local"), "--attempts", 1]
    return main([str(word) for word in [step, out, *options, "--quiet", *words]])


def protocol_of(asked: Asked) -> str:
    return "refine" if "backtracks" in asked.system else "judge" if "verdicts" in asked.system else "segment"


def scripted(**replies):
    """Good blocks, and what is given for the other protocols."""

    def script(asked: Asked):
        found = replies.get(protocol_of(asked), good)
        return found(asked) if callable(found) else found

    return script


def backtracks(asked: Asked) -> Say:
    number = number_of(asked)
    if number == 2:
        return Say("no")
    found = [{"start": 10, "end": 13, "solution": "This leads nowhere."}] if number else []
    return Say(json.dumps({"backtracks": found}))


def test_refine_adds_dead_ends_and_keeps_rows_that_it_cannot_refine(tmp_path, capsys):
    flat, out = write_flat(tmp_path / "flat.jsonl", range(4)), tmp_path / "run"
    with ScriptedTeacher(scripted(refine=backtracks)) as server:
        assert segment(server, flat, out) == 0
        assert run("refine", server, out, "--dry-run") == 0
        assert "requests        4 (0 replies" in capsys.readouterr().out
        assert run("refine", server, out, "--no-ask-again") == 0
    assert "1  wrong_json: reported, not rejected" in capsys.readouterr().out
    before, after = (read_jsonl(out / step / "rows.jsonl") for step in ("segment", "refine"))
    added = [len(b["outline"]["blocks"]) - len(a["outline"]["blocks"]) for a, b in zip(before, after, strict=True)]
    assert added == [0, 1, 0, 1]
    assert after[1]["outline"]["blocks"][-1] == {
        "start": 10, "stop": 14, "solution": "This leads nowhere.", "kind": "backtrack",
    }  # fmt: skip
    assert "[SOLUTION]This leads nowhere.[RETURN]" in after[1]["hierarchical_cot"]
    refined = [row["made_by"]["refined"] for row in after]
    assert [found.get("added") for found in refined] == [0, 1, None, 1]
    assert refined[2]["failure"]["code"] == "wrong_json" and refined[1]["prompt"].startswith("refine/")
    assert main(["check", str(out)]) == 0  # after refine, by itself
    assert [row["hierarchical_cot"] for row in read_jsonl(out / "check" / "rows.jsonl")] == [
        row["hierarchical_cot"] for row in after
    ]


def verdicts(asked: Asked) -> Say:
    number = number_of(asked)
    if number == 3:
        return Say("{}")
    found = [{"block": n, "sufficient": (number, n) != (1, 0), "reason": "x is not given"} for n in (0, 1)]
    return Say(json.dumps({"verdicts": found}))


def test_a_judge_opens_blocks_up_or_rejects_their_rows(tmp_path, capsys):
    rows = [flat_row(number) for number in range(5)]
    rows[4]["expected_answer"] = "77"
    flat, out = write_rows(tmp_path / "flat.jsonl", rows), tmp_path / "run"
    with ScriptedTeacher(scripted(judge=verdicts)) as server:
        assert segment(server, flat, out) == 0
        assert run("check", server, out, "--no-ask-again") == 0
        judged = [number_of(asked) for asked in server.requests if protocol_of(asked) == "judge"]
        assert sorted(judged) == [0, 1, 2, 3]  # the row with another answer is not worth a question
        assert run("check", server, out, "--no-ask-again", "--no-repair", "--restart") == 0
        assert len(server.requests) == 5 + 4
    found = {row["id"]: row for row in read_jsonl(out / "check" / "rejected.jsonl")}
    assert {name: row["reason"] for name, row in found.items()} == {
        "row-1": "solution_insufficient", "row-4": "answer_differs",
    }  # fmt: skip
    assert found["row-1"]["detail"] == "block 0: x is not given"
    assert "1  unjudged: reported, not rejected" in capsys.readouterr().out


def test_a_judged_block_is_opened_up_where_repairs_are_wanted(tmp_path):
    flat, out = write_flat(tmp_path / "flat.jsonl", range(3)), tmp_path / "run"
    with ScriptedTeacher(scripted(judge=verdicts)) as server:
        assert segment(server, flat, out) == 0
        assert run("check", server, out) == 0
    rows = read_jsonl(out / "check" / "rows.jsonl")
    assert [len(row["outline"]["blocks"]) for row in rows] == [2, 1, 2]
    assert rows[1]["made_by"]["repairs"] == ["opened block 0: solution_insufficient"]
    assert read_manifest(out / "check")["summary"]["teacher"]["requests"] == 3


def test_options_that_belong_elsewhere_are_refused(tmp_path, capsys):
    flat = str(write_flat(tmp_path / "flat.jsonl", range(1)))
    assert main(["segment", flat, "--out", str(tmp_path / "run"), "--dry-run"]) == 1
    assert "--dry-run belongs to a teacher; give --teacher PROVIDER:MODEL too" in capsys.readouterr().err
    words = ["--teacher", "local:m", "--base-url", "http://x", "--tokenizer", "m"]
    assert main(["segment", flat, "--out", str(tmp_path / "run"), *words]) == 1
    assert "--tokenizer is for segmenting without a teacher" in capsys.readouterr().err
    assert main(["segment", flat, "--out", str(tmp_path / "run"), *words[:4], "--workers", "2"]) == 1
    assert "how many requests are open, says --concurrency" in capsys.readouterr().err
    assert main(["refine", flat, "--out", str(tmp_path / "run")]) == 1
    assert "refine needs a teacher; give --teacher PROVIDER:MODEL" in capsys.readouterr().err


def started(server: ScriptedTeacher, flat, out, **more) -> subprocess.Popen:
    words = ["--teacher", "local:qwen", "--base-url", server.url("local"), "--concurrency", "4"]
    command = [sys.executable, str(SCRIPT), "segment", str(flat), "--out", str(out), *words]
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[1])}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, **more)


def test_nothing_is_asked_twice_after_a_kill_but_what_was_under_way(tmp_path):
    flat, out = write_flat(tmp_path / "flat.jsonl", range(60)), tmp_path / "run"
    enough = threading.Event()

    def slowly(asked: Asked) -> Say:
        time.sleep(0.02)
        if len(server.requests) > 20:
            enough.set()
        return good(asked)

    with ScriptedTeacher(slowly) as server:
        process = started(server, flat, out)
        assert enough.wait(60)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        time.sleep(0.1)
        replies = out / "replies.jsonl"
        kept = replies.read_bytes()
        stored = {json.loads(line)["key"] for line in kept.splitlines()[:-1]}
        with replies.open("ab") as file:
            file.write(kept.splitlines()[0][:50])  # a kill within a line
        before = len(server.requests)
        assert 10 < len(stored) <= before < 60
        assert segment(server, flat, out) == 0
        counts = Counter(number_of(asked) for asked in server.requests)
    assert len(counts) == 60
    assert counts.total() - 60 <= 4  # those that were under way when it was killed
    assert len(read_jsonl(out / "segment" / "rows.jsonl")) == 60
    assert replies.read_bytes().startswith(kept)


def test_an_interrupted_run_ends_at_once_and_quietly(tmp_path):
    flat, out = write_flat(tmp_path / "flat.jsonl", range(30)), tmp_path / "run"
    with ScriptedTeacher(
        lambda asked: good(asked)._replace(seconds=0.05 if len(server.requests) < 9 else 30)
    ) as server:
        process = started(server, flat, out, preexec_fn=accept_interrupts)
        while len(server.requests) < 11:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=100)[1]
    assert process.returncode == 130 and "Traceback" not in said and "never retrieved" not in said
    assert 5 <= len(read_jsonl(out / "replies.jsonl")) <= 8
