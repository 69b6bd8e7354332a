"""Answer checking: what counts as an answer, which answers are equal, and that no answer can stall or kill a run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hcot_lmeval import answers
from hcot_lmeval.answers import extract_answer, grade, is_equivalent
from hcot_lmeval.answers import pool as pool_module
from hcot_lmeval.answers.extract import strip_blocks
from hcot_lmeval.answers.pool import Pool, Worker, shared_pool
from hcot_lmeval.markup import PRESETS, resolve_markers
from hcot_lmeval.response import Response
from hcot_lmeval.trace import LiveContext, push_all

CASES = json.loads((Path(__file__).parent / "data" / "answer_cases.json").read_text())
DATA = os.environ.get("HCOT_LMEVAL_TEST_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="set HCOT_LMEVAL_TEST_DATA to a folder with the public data sets")


def ids(case: dict) -> str:
    return f"{case.get('group', case.get('why'))}: {case['gold']} | {case.get('answer', case.get('response'))}"[:80]


# -- what is right and what is wrong -----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES["responses"], ids=ids)
def test_response(case):
    """Responses to questions whose answer is an integer, as in AIME, written in every way seen in real outputs."""
    verdict = grade(case["response"], case["gold"])
    assert verdict.correct is case["correct"], (case, verdict)


@pytest.mark.parametrize("case", CASES["pairs"], ids=ids)
def test_pair(case):
    """Sets, tuples, intervals, inequalities, units, texts, formulas and malformed reference answers."""
    verdict = is_equivalent(case["answer"], case["gold"], seconds=60)
    assert verdict.correct is case["correct"], (case, verdict)


def test_integers_need_no_worker(monkeypatch):
    monkeypatch.setattr(answers, "shared_pool", lambda: pytest.fail("an integer was sent to a worker"))
    for text in ("033", "33.0", r"m+n=33", "33^\\circ", "３３", "33."):
        assert is_equivalent(text, "33").correct is True
        assert is_equivalent(text, "34").correct is False


@given(
    st.integers(0, 10**12), st.integers(0, 4), st.sampled_from(["{}", "${}$", "\\text{{{}}}", "x = {}", "{}.0", "+{}"])
)
def test_any_spelling_of_an_integer(value, zeros, form):
    text = form.format("0" * zeros + str(value))
    assert grade(rf"so \boxed{{{text}}}.", str(value)).correct is True
    assert grade(rf"so \boxed{{{text}}}.", str(value + 1)).correct is False


@given(st.fractions(), st.fractions())
def test_fractions_are_compared_exactly(one, other):
    assert is_equivalent(rf"\frac{{{one.numerator}}}{{{one.denominator}}}", f"{other}").correct is (one == other)


@settings(max_examples=150)
@given(st.text(alphabet="\\{}()[]$%^_&=<>|,.;:+-*/! 0123456789abfrctextpmdqi \n", max_size=40))
def test_malformed_answers_are_data(text):
    """No exception, here or in the worker, and no such text is the gold answer unless it says it."""
    verdict = is_equivalent(text, r"\frac{7}{3}+y")
    assert verdict.reason in ("different", "unparsed_answer", "too_large", "timeout", "memory"), verdict


# -- extraction --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{\(8\sqrt{2}\)}", r"\(8\sqrt{2}\)"),
        (r"\boxed{\frac{1}{2}} then \boxed{\frac{1}{3}}", r"\frac{1}{3}"),
        (r"\boxed{1} \text{ and } \boxed{2}", r"1 \text{ and } 2"),
        (r"\boxed{1}, \boxed{1}", "1"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed 7 it is", "7"),
        (r"\boxed{a \} b}", r"a \} b"),
        (r"\boxedx{3}", None),
        (r"\boxed{3", None),
        ("<think>\\boxed{3}", None),
        ("nothing", None),
    ],
)
def test_extract(text, answer):
    assert extract_answer(text) == answer


def test_a_response_is_its_answer_part():
    """A Response's string was cut after the thinking already; a think tag written inside it is plain text."""
    assert extract_answer(Response(r"\boxed{33} <think>", thinking=r"so \boxed{32}")) == "33"
    assert extract_answer(Response("", thinking=r"so \boxed{33}", raw=r"<think>so \boxed{33}")) is None


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The answer is 33.", "33"),
        ("**Answer:** $33$", "33"),
        ("Final Answer: The largest $n$ is 34.", "34"),
        ("Thus m + n = 25 + 169 = **194**", "194"),
        (r"The answer is 12, but \boxed{33}", "33"),
        (r"The answer is 12, so \boxed{33", None),
        ("<think>The answer is 33.", None),
        ("I do not know.", None),
    ],
)
def test_fallback_is_separate(text, answer):
    assert extract_answer(text, fallback=True) == answer
    assert extract_answer(text) == (answer if r"\boxed{33}" in text else None)


HCOT, MEMENTO, PENCIL = PRESETS["hcot"], PRESETS["memento"], PRESETS["pencil"]


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("a[THOUGHT]b[SOLUTION]c[RETURN]d", "acd"),
        ("a[THOUGHT]c[RETURN]d", "acd"),  # what a prune leaves behind
        ("[THOUGHT]a[SOLUTION]b[SOLUTION]c[RETURN]", "c"),  # the solution starts at the last split
        ("[THOUGHT]a[SOLUTION]b[SOLUTION]c", "c"),
        ("[THOUGHT]a[THOUGHT]b[SOLUTION]c[RETURN]d[SOLUTION]e[RETURN]", "e"),
        ("x[THOUGHT]a[SOLUTION]b[THOUGHT]c", "xb"),
        ("x[THOUGHT]a[THOUGHT]b[SOLUTION]c[RETURN]", "x"),
        ("a[RETURN]b[SOLUTION]c", "abc"),  # with no block open, markers are text
        ("a[CALL]b[SEP]c[RETURN]d", "acd"),
        ("a[CALL]b[CALL]c[SEP]d[RETURN]e", "a"),
        ("a[CALL]b[THOUGHT]c[SEP]d[RETURN]", "ad"),  # another notation's marker is text
        ("a<|block_start|>b<|block_end|><|summary_start|>c<|summary_end|>d", "acd"),
        ("a<|block_start|>b<|block_start|>c<|block_end|><|summary_start|>d<|summary_end|>e", "ade"),  # flat: text
        ("a<|block_start|><|block_end|><|summary_start|>c<|summary_end|>d", "acd"),
        ("a<|block_start|>b<|block_end|>c", "ac"),
        ("a<|summary_start|>b", "ab"),
    ],
)
def test_blocks_follow_the_pruning_rule(text, left):
    assert strip_blocks(text) == left


@given(st.sampled_from([HCOT, MEMENTO, PENCIL]), st.data())
def test_blocks_of_text_are_blocks_of_tokens(markup, data):
    """What is left of a text is what the rule leaves of its tokens, less the markers and open blocks' thoughts."""
    pieces = [markup.open, *data.draw(st.lists(st.sampled_from([*markup.markers, "a", "b", "c"]), max_size=25))]
    names = [*markup.markers, "a", "b", "c"]
    context = LiveContext(resolve_markers(markup, names.index), "recompute")
    push_all(context, [names.index(piece) for piece in pieces])
    hidden = {at for start, stop in context.thoughts for at in range(start, stop)}
    live = [names[token] for at, token in enumerate(context.live) if at not in hidden]
    assert strip_blocks("".join(pieces)) == "".join(piece for piece in live if piece in "abc")


def test_extraction_is_linear():
    """A quadratic expression takes a minute or more over any of these."""
    started = time.perf_counter()
    for text in (
        r"\boxed{" * 30_000, r"\boxed{1}" * 20_000, "[THOUGHT]" * 20_000, "{" * 300_000, "<think>" * 30_000,
        r"\( " * 60_000, "**answer** " * 10_000, "answer $ " * 10_000, "x" + " " * 300_000 + "I hope it is correct",
        "[THOUGHT]a[SOLUTION]b" * 3000 + "[RETURN]" * 3000,
    ):  # fmt: skip
        extract_answer(text, fallback=True)
    assert time.perf_counter() - started < 20


def test_long_answers_are_read_under_the_time_limit(monkeypatch):
    """In the caller's process no expression meets a long text; the worker's are linear."""
    monkeypatch.setattr(answers, "normalize", lambda text: pytest.fail("a long answer was read in this process"))
    for answer in (
        "a" * 3990,
        r"\text{ and" + " and" * 900 + "}",
        "1" * 3990 + ".",
        r"\text{a and }" * 300,
        ", " * 1900 + "x",
    ):
        verdict = grade(rf"\boxed{{{answer}}}", "5")
        assert (verdict.correct, verdict.reason in ("different", "unparsed_answer")) == (False, True), verdict


# -- isolation ---------------------------------------------------------------------------------------------------------

HOSTILE = [r"9^{9^{9}}", r"33^{33^{33}}", r"2^{2^{2^{2^{2^{2}}}}}", r"\tan(10^{10^{10}})", r"100000000!", "x" * 100_000]


@pytest.mark.parametrize("answer", HOSTILE, ids=lambda text: text[:30])
def test_what_cannot_be_checked_is_not_wrong(answer):
    started = time.monotonic()
    verdict = grade(rf"\boxed{{{answer}}}", r"\frac{x}{2}")
    assert verdict.correct is None
    assert verdict.reason in ("too_large", "too_long", "timeout", "memory")
    assert time.monotonic() - started < answers.SECONDS + 30  # the limit, and starting a worker


def test_time_limit_kills_and_the_next_check_works():
    started = time.monotonic()
    verdict = is_equivalent(r"\gcd(10^{10^9},7)", "1", seconds=1.0)
    assert (verdict.correct, verdict.reason) in [(None, "timeout"), (None, "memory")]
    assert time.monotonic() - started < 30
    assert is_equivalent(r"\sqrt{4}+x", "x+2").correct is True


def test_memory_limit():
    worker = Worker(memory_bytes=400 << 20)
    try:
        reply = worker.check("1", r"\gcd(10^{10^9},7)", 60.0)  # 10^(10^9) has 415 MB
        assert reply["status"] == "memory"
        assert not worker.alive
    finally:
        worker.kill()


def test_deep_nesting_and_long_answers():
    assert is_equivalent("(" * 200 + "x" + ")" * 200, "x").reason == "too_deep"
    assert is_equivalent("1" * 5000, "33").reason == "too_long"


def test_a_worker_killed_from_outside_is_replaced():
    pool = Pool(1)
    assert pool.check("x+1", "1+x")["equal"] is True
    os.kill(pool.pids()[0], signal.SIGKILL)
    assert pool.check("x+2", "2+x")["equal"] is True
    pool.close()


def test_the_next_worker_is_started_before_the_time_limit(monkeypatch):
    """A check behind one that was killed does not wait for the import of the libraries."""
    pool, started = Pool(1), []
    monkeypatch.setattr(pool_module, "Worker", lambda: started.append(time.monotonic()) or Worker())
    begin = time.monotonic()
    assert pool.check("1", r"\gcd(10^{10^9},13)", 2.0)["status"] in ("timeout", "memory")
    killed = time.monotonic()
    assert len(started) == 2 and started[1] < killed
    assert pool.check("x+1", "1+x")["equal"] is True
    assert len(started) == 2 and begin < killed
    pool.close()


def test_a_dead_worker_is_reported():
    worker = Worker()
    worker.wait()
    os.kill(worker.pid, signal.SIGKILL)
    assert worker.check("x", "y", 5.0)["status"] == "worker_died"
    worker.kill()


def test_threads():
    """Many threads, few workers, one of them stuck: every verdict is its own question's."""
    pairs = [(f"{n}x+1", f"1+{n}x", True) if n % 2 else (f"{n}x+1", f"2+{n}x", False) for n in range(2, 26)]

    def check(pair):
        return is_equivalent(pair[1], pair[0]).correct is pair[2]

    with ThreadPoolExecutor(8) as threads:
        stuck = threads.submit(is_equivalent, r"\gcd(10^{10^9},11)", "1", seconds=1.0)
        assert all(threads.map(check, pairs))
        assert stuck.result().correct is None


def test_repeated_checks_are_remembered(monkeypatch):
    is_equivalent("y+y", "2y")
    monkeypatch.setattr(Worker, "check", lambda *_: pytest.fail("compared twice"))
    assert is_equivalent("y+y", "2y").correct is True


def test_a_forked_child_has_its_own_workers():
    assert is_equivalent("z+z", "2z").correct is True
    before = shared_pool().pids()
    child = os.fork()
    if child == 0:  # pragma: no cover
        good = is_equivalent("z+z+z", "3z").correct is True and not set(before) & set(shared_pool().pids())
        shared_pool().close()
        os._exit(0 if good else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert is_equivalent("z+z+z+z", "4z").correct is True


def test_no_worker_outlives_a_killed_parent():
    """Idle and busy workers alike, when the parent gets SIGKILL."""
    script = textwrap.dedent(
        r"""
        import threading, time
        from hcot_lmeval.answers.pool import Worker
        idle, busy = Worker(), Worker()
        idle.wait(), busy.wait()
        threading.Thread(target=busy.check, args=("1", "\\gcd(10^{10^9},7)", 3.0), daemon=True).start()
        time.sleep(0.5)
        print(idle.pid, busy.pid, flush=True)
        time.sleep(60)
        """
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=_environment())
    workers = [int(pid) for pid in parent.stdout.readline().split()]
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert len(workers) == 2
    deadline = time.monotonic() + 30
    while any(_running(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(_running(pid) for pid in workers)


def _running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def _environment(**extra: str) -> dict[str, str]:
    root = str(Path(answers.__file__).parents[2])
    return {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]), **extra}


def test_importing_is_light():
    code = "import sys, hcot_lmeval.answers; print([m for m in ('sympy', 'math_verify', 'torch') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=_environment(), check=True)
    assert done.stdout.strip() == "[]"


def test_without_math_verify_the_error_is_loud(tmp_path):
    (tmp_path / "math_verify.py").write_text("raise ImportError('no math_verify here')")
    code = "from hcot_lmeval.answers import is_equivalent\nis_equivalent('x+1', '1+x')"
    environment = _environment()
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), _environment()["PYTHONPATH"]])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode != 0
    assert "no math_verify here" in done.stderr
    assert "pip install" in done.stderr


def test_an_empty_gold_answer_is_an_error():
    with pytest.raises(ValueError, match="empty"):
        is_equivalent("3", " ")


def test_numbers_may_be_gold_answers():
    assert grade(r"\boxed{033}", 33).correct is True
    assert is_equivalent("0.5", Fraction(1, 2)).correct is True


# -- public data -------------------------------------------------------------------------------------------------------


def _rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (Path(DATA) / name).read_text().splitlines()]


@needs_data
def test_grading_pairs():
    """At least 280 of the 283 clear pairs right, and no wrong answer accepted."""
    clear = [row for row in _rows("grading_pairs.jsonl") if not (row["policy_dependent"] or row["label_suspect"])]
    wrong = []
    for row in clear:
        if row["form"] == "text":
            verdict = grade(row["prediction"], row["gold"], fallback=True)
        else:
            verdict = is_equivalent(row["prediction"], row["gold"])
        if (verdict.correct is True) != row["expected"]:
            wrong.append((row["id"], row["expected"], verdict))
    assert len(clear) == 283
    assert not [row for row in wrong if not row[1]], "a wrong answer was accepted"
    assert len(wrong) <= 3, wrong


@needs_data
def test_generations():
    """Real outputs with another grader's verdicts. With `fallback`, all 160 agree. Without it, one differs: amc-0113
    ends in "m + n = 25 + 169 = **194**" without a box, which that grader accepts as the last number.
    """
    rows = _rows("generations/amc23_generations.jsonl")
    lax = [
        row["id"]
        for row in rows
        if (grade(row["generation"], row["answer"], fallback=True).correct is True) != row["correct"]
    ]
    strict = [row["id"] for row in rows if (grade(row["generation"], row["answer"]).correct is True) != row["correct"]]
    assert (len(rows), lax, strict) == (160, [], ["amc-0113"])


@needs_data
@pytest.mark.parametrize(
    "name", ["polymath/en/low", "polymath/en/medium", "polymath/en/high", "polymath/en/top", "math500/test"]
)
def test_every_gold_answer_can_be_checked(name):
    """Each is equal to itself in a box, and told from a wrong answer, so none is unreadable.

    One gold answer of PolyMath lacks a closing brace; in a box it is written with it.
    """
    for row in _rows(f"{name}.jsonl"):
        gold = row["answer"]
        boxed = gold + "}" * (gold.count("{") - gold.count("}"))
        assert grade(rf"so \boxed{{{boxed}}}.", gold).correct is True, gold
        assert is_equivalent("123457", gold, seconds=60).correct is False, gold  # on a busy machine, too


def test_main_thread_is_not_needed():
    """math-verify's own alarms would fail here."""
    verdicts = []
    thread = threading.Thread(target=lambda: verdicts.append(is_equivalent("w+w", "2w").correct))
    thread.start()
    thread.join()
    assert verdicts == [True]


@pytest.mark.parametrize("seconds", ["x", 0, -1, None, True, float("nan")])
def test_a_limit_that_is_no_time_is_refused(seconds):
    with pytest.raises(ValueError, match=f"seconds={seconds!r} is no time"):
        is_equivalent("1", "2", seconds=seconds)
