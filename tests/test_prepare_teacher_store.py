"""Nothing is asked twice, whatever happens to the process; no limit is crossed; an estimate asks nothing."""

from __future__ import annotations

import asyncio
import json
import random
import re
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hcot_lmeval.prepare.reasons import TEMPORARY
from hcot_lmeval.prepare.teacher.options import Budget, TeacherOptions, input_tokens
from hcot_lmeval.prepare.teacher.questions import AnswerStore, Failure, Form, Message, Reply, Spent, Task
from hcot_lmeval.prepare.teacher.runner import Teacher, ask, estimated
from hcot_lmeval.store import StoreError
from tests.scripted_teacher import Say, ScriptedTeacher, Status
from tests.teacher_runs import GOOD, KEYS, MODELS, Number, ask_all, make_task, options_for

# --- the store --------------------------------------------------------------------------------------------------------


replies = st.builds(
    Reply,
    key=st.text("abcdef", min_size=1, max_size=3),
    text=st.text(),
    failure=st.none() | st.builds(Failure, st.sampled_from(["schema", "truncated", *sorted(TEMPORARY)]), st.text()),
    spent=st.builds(Spent, *[st.integers(1, 99)] * 3, st.none() | st.floats(0, 1), st.floats(0, 9)),
)


@given(said=st.lists(replies, unique_by=lambda reply: reply.key), torn=st.binary(max_size=40), seed=st.integers())
@settings(max_examples=50)
def test_what_was_kept_is_there_again(tmp_path_factory, said, torn, seed):
    path = tmp_path_factory.mktemp("store") / "answers.jsonl"
    with AnswerStore(path) as store:
        for reply in said:
            store.add(reply)
    with path.open("ab") as file:
        file.write(torn.replace(b"\n", b""))  # as a kill in the middle of a line leaves it
    random.Random(seed).shuffle(said)
    with AnswerStore(path) as store:
        assert len(list(store)) == sum(reply.is_final for reply in said)
        for reply in said:
            assert store.get(reply.key) == (reply if reply.is_final else None)
            assert (reply.key in store) == reply.is_final
        assert store.spent[:3] == tuple(sum(reply.spent[place] for reply in said) for place in range(3))
        assert store.spent.usd == pytest.approx(sum(reply.spent.usd or 0 for reply in said))
        store.add(Reply("new", "x"))
    with AnswerStore(path) as store:
        assert store.get("new") == Reply("new", "x")


def test_a_final_reply_is_kept_once_and_a_failure_may_be_followed(tmp_path):
    with AnswerStore(tmp_path / "a" / "answers.jsonl") as store:
        store.add(Reply("k", failure=Failure("timeout", ""), spent=Spent(2)))
        assert store.get("k") is None
        store.add(Reply("k", "said", spent=Spent(1)))
        with pytest.raises(ValueError, match="has a reply to k already"):
            store.add(Reply("k", "again"))
        assert store.get("k").text == "said" and store.spent.requests == 3


def test_another_file_is_not_cut_off(tmp_path):
    path = tmp_path / "notes.jsonl"
    path.write_text('{"mine": 1}\n{"mine": 2}\n')
    with pytest.raises(StoreError, match=r"holds \{'mine': 1\}, which is no reply; move it away"):
        AnswerStore(path)
    assert path.read_text() == '{"mine": 1}\n{"mine": 2}\n'


def test_two_runs_at_once_are_refused(tmp_path):
    path = tmp_path / "answers.jsonl"
    with AnswerStore(path), pytest.raises(StoreError, match="is in use by another run; wait until that one has ended"):
        AnswerStore(path)
    AnswerStore(path).__exit__()


# --- what is asked ----------------------------------------------------------------------------------------------------


def test_a_run_that_is_left_keeps_what_it_has(tmp_path, keys):
    with ScriptedTeacher([Say(GOOD)]) as server:
        options = options_for(server, concurrency=2)
        tasks = [make_task(options, str(n)) for n in range(10)]
        with AnswerStore(tmp_path / "answers.jsonl") as store:
            found = ask(tasks, Teacher.reply, options=options, store=store)
            next(found)
            found.close()
        assert len(ask_all(options, tasks, tmp_path)) == 10
    assert 10 <= len(server.requests) <= 12


def test_questions_are_taken_as_there_is_room(tmp_path, keys):
    taken = []

    def tasks(options):
        for number in range(100):
            taken.append(number)
            yield make_task(options, str(number))

    with ScriptedTeacher([Say(GOOD)]) as server, AnswerStore(tmp_path / "answers.jsonl") as store:
        options = options_for(server, concurrency=3)
        found = ask(tasks(options), Teacher.reply, options=options, store=store)
        next(found)
        assert len(taken) <= 6
        found.close()


def test_the_same_question_is_asked_once_in_a_run(tmp_path, keys):
    with ScriptedTeacher([Say(GOOD)]) as server, AnswerStore(tmp_path / "answers.jsonl") as store:
        options = options_for(server)
        assert len(list(ask([make_task(options)] * 5, Teacher.reply, options=options, store=store))) == 5
    assert len(server.requests) == 1


def test_the_key_of_a_question_is_all_that_the_reply_depends_on():
    options = TeacherOptions(teacher=MODELS["openai"])
    one = make_task(options)
    assert make_task(TeacherOptions(teacher=MODELS["openai"], concurrency=1, max_usd=3.0)).key == one.key
    others = [
        make_task(options, "v"),
        make_task(TeacherOptions(teacher="openai:gpt-5")),
        make_task(TeacherOptions(teacher=MODELS["openai"], temperature=0.5)),
        make_task(TeacherOptions(teacher=MODELS["openai"], base_url="http://localhost/v1")),
        Task("else", one.messages, one.form, options.identity),
        Task("test", one.messages, Form, options.identity),
    ]
    assert len({task.key for task in others} | {one.key}) == 7


# --- limits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "most"),
    [
        ({"max_requests": 7}, 7),
        ({"max_requests": 0}, 0),
        ({"max_teacher_tokens": 1000, "output_tokens": 50}, 8),  # 110 each; a ninth may need more than is left
        ({"max_usd": 0.001, "output_tokens": 50, "price_input": 1.0, "price_output": 2.0}, 7),  # 0.00012 each
    ],
)
def test_it_stops_before_a_limit(tmp_path, keys, limit, most):
    with ScriptedTeacher(lambda asked: Say(GOOD, usage=(100, 10))) as server:
        options = options_for(server, **limit)
        tasks = [make_task(options, str(n)) for n in range(20)]
        found = ask_all(options, tasks, tmp_path)
        assert len(found) == 20 and len(server.requests) <= most
        refused = [reply for reply in found.values() if reply.failure is not None]
        assert len(refused) == 20 - len(server.requests)
        name = next(iter(limit))
        assert all(r.failure.code == "budget" and f"{name}=" in r.failure.detail for r in refused)
        if most:
            assert len(server.requests) >= most - 1
        again = len(server.requests)
        ask_all(options, tasks, tmp_path)
        assert len(server.requests) == again  # what was spent earlier counts
        done = ask_all(options_for(server, output_tokens=options.output_tokens), tasks, tmp_path)
    assert not any(reply.failure for reply in done.values()) and len(server.requests) == 20


def test_failed_attempts_are_requests_too(tmp_path, keys):
    with ScriptedTeacher([Status(500)]) as server:
        options = options_for(server, max_requests=4, attempts=3, concurrency=1)
        found = ask_all(options, [make_task(options, str(n)) for n in range(3)], tmp_path)
    assert len(server.requests) == 4
    assert [reply.failure.code for reply in found.values()] == ["server_error", "server_error", "budget"]


def test_money_needs_a_price(tmp_path, keys):
    with ScriptedTeacher([Say(GOOD, usage=(1000, 100))]) as server:
        options = options_for(server, "local", max_usd=1.0)
        with pytest.raises(ValueError, match=r"max_usd=1: no price of local:qwen is known; give --price-input"):
            ask_all(options, [make_task(options)], tmp_path)
        options = options_for(server, "local", price_input=3.0, price_output=10.0)
        assert next(iter(ask_all(options, [make_task(options)], tmp_path).values())).spent.usd == pytest.approx(0.004)
    assert len(server.requests) == 1


def test_a_timeout_counts_as_if_it_had_been_answered(tmp_path, keys):
    with ScriptedTeacher([Say(GOOD, seconds=0.4)]) as server:
        options = options_for(server, timeout=0.15, attempts=1, output_tokens=500)
        reply = next(iter(ask_all(options, [make_task(options)], tmp_path).values()))
    assert reply.failure.code == "timeout" and reply.spent.output_tokens == 500 and reply.spent.usd > 0


tasks_and_usage = st.lists(st.tuples(st.integers(0, 3000), st.floats(0, 1), st.floats(0, 1)), max_size=30)


@given(tasks_and_usage, st.integers(0, 3000), st.integers(1, 8), st.integers())
@settings(max_examples=60)
def test_a_budget_is_never_crossed_and_refuses_only_what_cannot_fit(work, limit, width, seed):
    """The server may use any number of tokens up to what was asked for."""
    options = TeacherOptions(teacher=MODELS["openai"], output_tokens=100, max_teacher_tokens=limit)
    rng = random.Random(seed)

    async def one(budget, gate, size, share_in, share_out):
        task = Task("t", (Message("user", "x" * size),), Number, {})
        async with gate:
            reserved = await budget.reserve(task)
            if isinstance(reserved, str):
                assert budget.spent.plus(budget.most(task)).tokens > limit
                return
            for _ in range(rng.randrange(4)):
                await asyncio.sleep(0)
            used = Spent(1, int(share_in * reserved.input_tokens), int(share_out * 100))
            await budget.settle(reserved, used, task.size)
            assert budget.spent.tokens <= limit

    async def everything():
        budget, gate = Budget(options, Spent()), asyncio.Semaphore(width)
        await asyncio.wait_for(asyncio.gather(*(one(budget, gate, *each) for each in work)), 20)
        assert budget.spent.tokens <= limit

    asyncio.run(everything())


# --- the estimate -----------------------------------------------------------------------------------------------------


def test_an_estimate_needs_neither_key_nor_network(monkeypatch, tmp_path):
    for name in KEYS:
        monkeypatch.delenv(name, raising=False)
    pytest.importorskip("genai_prices")
    options = TeacherOptions(teacher=MODELS["openai"], base_url="http://127.0.0.1:9/v1", output_tokens=1000)
    tasks = [make_task(options, "u" * 3000 + str(n % 8)) for n in range(10)]
    with AnswerStore(tmp_path / "replies.jsonl") as store:
        store.add(Reply(tasks[0].key, GOOD))
    asking = SimpleNamespace(questions=lambda task: [task])
    size = sum(input_tokens(task) for task in tasks[1:8])
    told = estimated(tmp_path, asking, tasks, options).splitlines()
    assert told[0] == "requests        7 (3 replies are there already)"
    assert told[1] == f"input tokens    {size:,}" and size >= 7000
    assert told[2] == f"output tokens   {7 * int(0.2 * input_tokens(tasks[1])):,}, at most 7,000"
    assert re.fullmatch(r"US dollars      0\.0\d, at most 0\.0\d", told[3])
    unknown = TeacherOptions(teacher="local:m", base_url="http://x/v1")
    assert "no price is known" in estimated(tmp_path / "none", asking, tasks, unknown)


def test_the_store_holds_plain_lines(tmp_path, keys):
    with ScriptedTeacher([Say(GOOD, usage=(7, 3))]) as server:
        options = options_for(server)
        task = make_task(options)
        ask_all(options, [task], tmp_path)
    [line] = (tmp_path / "answers.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert record.pop("seconds") >= 0 and record.pop("usd") > 0
    assert record == {
        "key": task.key,
        "text": GOOD,
        "failure": None,
        "usage": {"input_tokens": 7, "output_tokens": 3},
        "attempts": 1,
        "model": "gpt-5-mini",
    }
