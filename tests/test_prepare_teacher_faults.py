"""What goes wrong with a teacher is told by a code, tried again or not, mended once, or ends the run."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hcot_lmeval.prepare.reasons import FAILURES, Refused
from hcot_lmeval.prepare.teacher.options import TeacherOptions
from hcot_lmeval.prepare.teacher.questions import Reply
from hcot_lmeval.prepare.teacher.runner import LONGEST, PATIENCE, REFUSALS, TeacherError, delay
from tests.scripted_teacher import Raw, Reset, Say, ScriptedTeacher, Status
from tests.teacher_runs import CANARY, GOOD, MODELS, Number, ask_all, ask_one, make_task, options_for

pytestmark = pytest.mark.usefixtures("keys")
providers = pytest.mark.parametrize("provider", MODELS)


# --- what goes wrong --------------------------------------------------------------------------------------------------


@providers
@pytest.mark.parametrize(
    ("reply", "code"),
    [
        (Say(GOOD, "length"), "truncated"),
        (Say("", "length"), "truncated"),
        (Say("I cannot", "refusal"), "refused"),
        (Say(""), "empty_reply"),
        (Say('{"b": 1}'), "schema"),
    ],
)
def test_replies_of_no_use_have_a_code_and_are_not_asked_for_again(tmp_path, provider, reply, code):
    with ScriptedTeacher([reply, Say(GOOD)]) as server:
        found = ask_one(server, tmp_path, provider)
        assert (found.failure.code, found.spent.requests, found.value) == (code, 1, None)
        assert ask_one(server, tmp_path, provider).failure.code == code
    assert len(server.requests) == 1 and code in FAILURES


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ('{"a": 1', "wrong_json"),
        ("Sure! " + GOOD, "wrong_json"),
        ('{"a": NaN}', "schema"),
        ('{"a": "\\ud800"}', "wrong_json"),
        ("\ud800", "broken_text"),
        ("[" * 100_000, "wrong_json"),
        ('{"a": true}', "schema"),
        ('{"a": 1.0}', "schema"),
        ("[]", "schema"),
        ("```\n", "wrong_json"),
    ],
)
def test_json_is_read_strictly(text, code):
    reply = make_task(TeacherOptions(teacher=MODELS["openai"])).read(Reply("k", text))
    assert (reply.failure.code, reply.value, reply.text) == (code, None, text)


PASSING = [
    (Status(429), "rate_limited"),
    (Status(500), "server_error"),
    (Reset(), "connection"),
    (Raw(b"<html>", "application/json"), "broken_response"),
    (Say(GOOD, seconds=2.0), "timeout"),
]


@providers
@pytest.mark.parametrize(("reply", "code"), PASSING)
def test_what_may_pass_is_tried_again(tmp_path, provider, reply, code):
    """One question meets it twice, another one each time; the next run asks for that one again."""
    asked = Counter()

    def say(each):
        said = each.turns[0][1]
        asked[said] += 1
        return Say(GOOD) if asked[said] > (2 if said == "twice" else 3) else reply

    with ScriptedTeacher(say) as server:
        options = options_for(server, provider, timeout=1.0 if code == "timeout" else 60.0)
        twice, ever = tasks = [make_task(options, "twice"), make_task(options, "ever")]
        found = ask_all(options, tasks, tmp_path)
        one, other = found[twice.key], found[ever.key]
        assert (one.failure, one.spent.requests, one.value) == (None, 3, Number(a=1))
        assert (other.failure.code, other.spent.requests, other.value) == (code, 3, None)
        found = ask_all(options, tasks, tmp_path)
    assert [found[task.key].value for task in tasks] == [Number(a=1)] * 2
    assert asked == {"twice": 3, "ever": 4} and code in FAILURES


@pytest.mark.parametrize("status", [408, 409, 425, 502, 503, 504, 529])
def test_other_statuses_that_may_pass(tmp_path, status):
    with ScriptedTeacher([Status(status), Say(GOOD)]) as server:
        assert ask_one(server, tmp_path).value == Number(a=1)
    assert len(server.requests) == 2


@pytest.mark.parametrize(("provider", "status"), [*((name, 400) for name in MODELS), ("openai", 413), ("openai", 422)])
def test_a_question_that_is_turned_away_is_not_tried_again(tmp_path, provider, status):
    with ScriptedTeacher([Status(status, message="too long"), Say(GOOD)]) as server:
        found = ask_one(server, tmp_path, provider)
        assert (found.failure.code, found.spent.requests) == ("bad_request", 1) and "too long" in found.failure.detail
        assert ask_one(server, tmp_path, provider).value == Number(a=1)  # a later run may: it cost nothing


def test_settings_that_the_server_does_not_take_end_the_run_early(tmp_path):
    with ScriptedTeacher([Status(400, message="no such parameter")]) as server:
        options = options_for(server, concurrency=1)
        tasks = [make_task(options, str(n)) for n in range(30)]
        with pytest.raises(TeacherError, match=r"turned the first 8 questions away.*no such parameter"):
            ask_all(options, tasks, tmp_path)
        assert len(server.requests) == REFUSALS
        server.script = lambda asked: Say(GOOD) if asked.turns[0][1] == "0" else Status(400)
        found = ask_all(options, tasks, tmp_path)
    assert sum(reply.failure is not None for reply in found.values()) == 29  # one was answered: it is the questions


def test_a_server_that_is_not_there_is_told(tmp_path):
    with ScriptedTeacher([]) as server:
        options = options_for(server, attempts=2)
    reply = next(iter(ask_all(options, [make_task(options)], tmp_path).values()))
    assert (reply.failure.code, reply.spent.requests) == ("connection", 2)


@providers
@pytest.mark.parametrize(("status", "told"), [(401, "does not accept the key in"), (404, "is not there")])
def test_what_every_request_would_meet_ends_the_run_at_once(tmp_path, provider, status, told):
    with ScriptedTeacher([Status(status, message=f"wrong: {CANARY}")]) as server:
        options = options_for(server, provider, concurrency=2)
        with pytest.raises(TeacherError, match=told) as caught:
            ask_all(options, [make_task(options, str(n)) for n in range(50)], tmp_path)
    assert len(server.requests) <= 2
    assert "\n" not in str(caught.value) and MODELS[provider] in str(caught.value)


def test_an_empty_account_ends_the_run(tmp_path):
    with (
        ScriptedTeacher([Status(429, kind="insufficient_quota")]) as server,
        pytest.raises(TeacherError, match="credit"),
    ):
        ask_one(server, tmp_path)
    assert len(server.requests) == 1


# --- waiting ----------------------------------------------------------------------------------------------------------


@given(st.integers(0, 50), st.one_of(st.none(), st.floats(0, 2 * PATIENCE)), st.floats(0.01, 5), st.integers())
def test_waits_double_up_to_a_limit_and_respect_the_server(attempt, after, first, seed):
    wait = delay(attempt, after, first, random.Random(seed))
    if after is None:
        assert min(LONGEST, first * 2**attempt) / 2 <= wait <= min(LONGEST, first * 2**attempt)
    elif after > PATIENCE:
        assert wait is None
    else:
        assert after <= wait <= after + LONGEST / 10


def test_retry_after_holds_for_everybody(tmp_path):
    """The second question waits too, although nobody turned it away."""
    with ScriptedTeacher([Status(429, (("Retry-After", "1"),)), Say(GOOD)]) as server:
        options = options_for(server, concurrency=1, attempts=1)
        one, other = (make_task(options, said) for said in "12")
        replies = ask_all(options, [one, other], tmp_path)
    assert replies[one.key].failure.code == "rate_limited"
    assert replies[other.key].value == Number(a=1) and replies[other.key].spent.seconds > 0.9
    with ScriptedTeacher([Status(429, (("Retry-After", "1"),)), Say(GOOD)]) as server:
        assert ask_one(server, tmp_path / "a").spent.seconds >= 1.0
    with ScriptedTeacher([Status(429, (("Retry-After", str(int(PATIENCE) + 1)),))]) as server:
        reply = ask_one(server, tmp_path / "b")
    assert reply.spent.requests == 1 and "more than 600 s" in reply.failure.detail


def test_so_many_requests_at_once_and_no_more(tmp_path):
    with ScriptedTeacher(lambda asked: Say(GOOD, seconds=0.03)) as server:
        options = options_for(server, concurrency=5)
        assert len(ask_all(options, [make_task(options, str(n)) for n in range(20)], tmp_path)) == 20
    assert server.most == 5 and len(server.requests) == 20


# --- a reply is mended ------------------------------------------------------------------------------------------------


def accept_even(number):
    if number.a % 2:
        raise Refused("schema", f"{number.a} is odd")
    return number.a


def test_the_fault_of_a_reply_is_told_once_and_not_asked_twice(tmp_path):
    with ScriptedTeacher([Say('{"a": 3}'), Say('{"a": 4}')]) as server:
        options = options_for(server)
        task = make_task(options, accept=accept_even, repair="No: {{fault}}")
        for _ in range(2):
            reply = ask_all(options, [task], tmp_path)[task.key]
            assert (reply.value, reply.failure, reply.spent[:3]) == (4, None, (2, 200, 20))
    assert [len(asked.turns) for asked in server.requests] == [1, 3]
    assert server.requests[1].turns[1:] == [("assistant", '{"a": 3}'), ("user", "No: schema: 3 is odd")]
    with ScriptedTeacher([Say("{}"), Say('{"a": 5}')]) as server:
        task = make_task(options_for(server), accept=accept_even, repair="No: {{fault}}")
        reply = ask_all(options_for(server), [task], tmp_path / "b")[task.key]
    assert reply.failure.code == "schema" and reply.failure.detail.endswith("(asked twice)")


def test_what_cannot_be_mended_is_not(tmp_path):
    with ScriptedTeacher([Say('{"a', "length")]) as server:
        options = options_for(server)
        ask_all(options, [make_task(options, accept=accept_even, repair="No: {{fault}}")], tmp_path)
    assert len(server.requests) == 1
