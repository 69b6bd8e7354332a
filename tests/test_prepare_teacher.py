"""A teacher is asked over HTTP in its own protocol; what goes wrong is told by a code, tried again or not, and the key
is nowhere to be seen."""

from __future__ import annotations

import json
import logging
import pickle
import random
import subprocess
import sys
import traceback

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted_teacher import Raw, Reset, Say, ScriptedTeacher, Status
from teacher_runs import CANARY, KEYS, MODELS, SCHEMA, ask_all, ask_one, make_task, options_for

from hcot_lmeval.prepare.teacher.client import Client
from hcot_lmeval.prepare.teacher.options import ALIASES, PROVIDERS, TeacherOptions, find_key
from hcot_lmeval.prepare.teacher.questions import FAILURES, Message, Reply, Task, Unusable, mismatches, parse
from hcot_lmeval.prepare.teacher.retry import LONGEST, PATIENCE, delay
from hcot_lmeval.prepare.teacher.runner import TeacherError

pytest.importorskip("pydantic_ai")
GOOD = '{"a": 1}'
providers = pytest.mark.parametrize("provider", MODELS)


@pytest.fixture(autouse=True)
def keys(monkeypatch):
    for name in KEYS:
        monkeypatch.setenv(name, CANARY)
    for name in ("OPENAI_BASE_URL", "ANTHROPIC_BASE_URL", "GOOGLE_GEMINI_BASE_URL"):
        monkeypatch.setenv(name, "http://127.0.0.1:9/elsewhere")  # the environment has no say in where questions go


# --- the three protocols ----------------------------------------------------------------------------------------------


PATHS = {
    "openai": "/v1/chat/completions",
    "local": "/v1/chat/completions",
    "claude": "/v1/messages",
    "gemini": "/v1beta/models/gemini-2.5-flash:generateContent",
}


@providers
def test_questions_are_asked_in_the_protocol_of_the_server(tmp_path, provider):
    with ScriptedTeacher([Say(GOOD, usage=(1000, 200))]) as server:
        options = options_for(server, provider, output_tokens=77)
        messages = (Message("system", "s"), Message("user", "u"), Message("assistant", "v"), Message("user", "w"))
        task = Task.make("test", "row", messages, SCHEMA, {})
        reply = ask_all(options, [task], tmp_path)[task.key]
    assert (reply.text, reply.data, reply.failure, reply.attempts) == (GOOD, {"a": 1}, None, 1)
    assert (reply.usage.input_tokens, reply.usage.output_tokens) == (1000, 200)
    assert (reply.usd is None) == (provider == "local")
    [asked] = server.requests
    assert asked.path == PATHS[provider] and asked.key == CANARY
    assert asked.system == "s"
    other = "model" if provider == "gemini" else "assistant"
    assert asked.turns == [("user", "u"), (other, "v"), ("user", "w")]
    assert {key: value for key, value in asked.schema.items() if key != "title"} == SCHEMA
    assert asked.output_tokens == 77
    name = options.model
    assert asked.body.get("model", name) == name and name in asked.path + asked.body.get("model", "")
    assert asked.body.get("stream", False) is False


@providers
def test_settings_reach_the_server_and_only_those_that_are_given(tmp_path, provider):
    with ScriptedTeacher([Say(GOOD)]) as server:
        ask_one(server, tmp_path, provider)
        ask_one(server, tmp_path / "b", provider, structured="text")
        if provider in ("local", "gemini"):
            ask_one(server, tmp_path / "c", provider, temperature=0.25)
    plain, text, *warm = server.requests
    assert "temperature" not in json.dumps(plain.body) and text.schema is None
    assert all('"temperature": 0.25' in json.dumps(asked.body) for asked in warm)
    if provider == "local":
        assert "max_tokens" in plain.body and "max_completion_tokens" not in plain.body


def test_a_server_without_a_key_gets_none(tmp_path, monkeypatch):
    monkeypatch.delenv("TEACHER_API_KEY")
    with ScriptedTeacher([Say(GOOD)]) as server:
        assert ask_one(server, tmp_path, "local").data == {"a": 1}
    assert CANARY not in str(server.requests)  # that of OpenAI is set, and not meant for others


def test_an_old_model_is_told_the_form_in_words_alone(tmp_path):
    with ScriptedTeacher([Say(GOOD)]) as server:
        options = TeacherOptions(teacher="claude:claude-3-5-haiku-latest", base_url=server.url("claude"))
        assert ask_all(options, [make_task(options)], tmp_path)
    assert server.requests[0].schema is None


# --- what goes wrong --------------------------------------------------------------------------------------------------


@providers
@pytest.mark.parametrize(
    ("reply", "code"),
    [
        (Say(GOOD, "length"), "truncated"),
        (Say("", "length"), "truncated"),
        (Say("I cannot", "refusal"), "refused"),
        (Say(""), "empty_reply"),
        (Say('{"a": 1'), "wrong_json"),
        (Say("Sure! " + GOOD), "wrong_json"),
        (Say('{"a": NaN}'), "wrong_json"),
        (Say('{"a": 1, "a": 2}'), "wrong_json"),
        (Say('{"b": 1}'), "schema"),
        (Say('{"a": true}'), "schema"),
        (Say("[]"), "schema"),
        (Status(400), "bad_request"),
        (Status(422), "bad_request"),
    ],
)
def test_replies_of_no_use_have_a_code_and_are_not_asked_for_again(tmp_path, provider, reply, code):
    with ScriptedTeacher([reply, Say(GOOD)]) as server:
        found = ask_one(server, tmp_path, provider)
        assert (found.failure.code, found.attempts, found.data) == (code, 1, None)
        assert ask_one(server, tmp_path, provider).failure.code == code
    assert len(server.requests) == 1 and code in FAILURES


@providers
@pytest.mark.parametrize(
    ("reply", "code"),
    [
        (Status(408), "server_error"),
        (Status(409), "server_error"),
        (Status(425), "server_error"),
        (Status(429), "rate_limited"),
        (Status(500), "server_error"),
        (Status(529), "server_error"),
        (Reset(), "connection"),
        (Raw(b"<html>", "application/json"), "broken_response"),
        (Say(GOOD, seconds=0.4), "timeout"),
    ],
)
def test_what_may_pass_is_tried_again(tmp_path, provider, reply, code):
    quick = {"timeout": 0.2} if code == "timeout" else {}
    with ScriptedTeacher([reply, reply, Say(GOOD)]) as server:
        found = ask_one(server, tmp_path, provider, **quick)
        assert (found.failure, found.attempts, found.data) == (None, 3, {"a": 1})
    with ScriptedTeacher([reply]) as server:
        found = ask_one(server, tmp_path / "b", provider, attempts=2, **quick)
        assert (found.failure.code, found.attempts) == (code, 2)
        server.script = [Say(GOOD)]
        assert ask_one(server, tmp_path / "b", provider, **quick).data == {"a": 1}  # the next run asks again
    assert code in FAILURES


def test_a_server_that_is_not_there_is_told(tmp_path):
    with ScriptedTeacher([]) as server:
        options = options_for(server, attempts=2)
    reply = next(iter(ask_all(options, [make_task(options)], tmp_path).values()))
    assert (reply.failure.code, reply.attempts) == ("connection", 2)


@providers
@pytest.mark.parametrize(("status", "told"), [(401, "does not accept the key in"), (403, "key"), (404, "is not there")])
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
        options = options_for(server, concurrency=1)
        replies = ask_all(options, [make_task(options, "1")], tmp_path)
    assert all(reply.data and reply.seconds >= 1.0 for reply in replies.values())
    with ScriptedTeacher([Status(429, (("Retry-After", str(int(PATIENCE) + 1)),))]) as server:
        reply = ask_one(server, tmp_path / "b")
    assert reply.attempts == 1 and "more than 600 s" in reply.failure.detail


def test_so_many_requests_at_once_and_no_more(tmp_path):
    with ScriptedTeacher(lambda asked: Say(GOOD, seconds=0.03)) as server:
        options = options_for(server, concurrency=5)
        assert len(ask_all(options, [make_task(options, str(n)) for n in range(20)], tmp_path)) == 20
    assert server.most == 5 and len(server.requests) == 20


# --- a reply is mended ------------------------------------------------------------------------------------------------


def accept_even(reply):
    if reply.data["a"] % 2:
        raise Unusable("odd", f"{reply.data['a']} is odd")


def test_the_fault_of_a_reply_is_told_once_and_not_asked_twice(tmp_path):
    with ScriptedTeacher([Say('{"a": 3}'), Say('{"a": 4}')]) as server:
        options = options_for(server)
        task = make_task(options, accept=accept_even, repair="No: {{fault}}")
        for _ in range(2):
            reply = ask_all(options, [task], tmp_path)[task.key]
            assert (reply.data, reply.failure, reply.attempts, reply.usage.tokens) == ({"a": 4}, None, 2, 220)
    assert [len(asked.turns) for asked in server.requests] == [1, 3]
    assert server.requests[1].turns[1:] == [("assistant", '{"a": 3}'), ("user", "No: odd: 3 is odd")]
    with ScriptedTeacher([Say("{}"), Say('{"a": 5}')]) as server:
        task = make_task(options_for(server), accept=accept_even, repair="No: {{fault}}")
        reply = ask_all(options_for(server), [task], tmp_path / "b")[task.key]
    assert reply.failure.code == "odd" and reply.failure.detail.endswith("(asked twice)")


def test_what_cannot_be_mended_is_not(tmp_path):
    with ScriptedTeacher([Say('{"a', "length")]) as server:
        options = options_for(server)
        ask_all(options, [make_task(options, accept=accept_even, repair="No: {{fault}}")], tmp_path)
    assert len(server.requests) == 1


# --- reading JSON -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ['```json\n{"a": 1}\n```', '\n{"a": 1} ', '```\n{"a": 1}\n```'])
def test_a_fence_around_all_of_it_is_taken_off(text):
    assert parse(Reply("k", text), SCHEMA).data == {"a": 1}


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from("abc"), inner),
)


@given(values)
def test_schemas_are_closed(data):
    good = isinstance(data, dict) and set(data) == {"a"} and (data["a"] is None or type(data["a"]) is int)
    assert (mismatches(data, SCHEMA) == []) == good


# --- the key ----------------------------------------------------------------------------------------------------------


@providers
def test_the_key_shows_up_nowhere(tmp_path, provider, caplog, capfd):
    """Servers repeat the key in what they say, and everything is logged that can be."""
    script = [
        Status(500, message=f"key {CANARY} failed"),
        Status(400, message=f"bad key: {CANARY}, or sk-ab****wxyz"),
        Say(f'"{CANARY}"'),
        Status(403, message=CANARY),
    ]
    shown = []
    with caplog.at_level(logging.DEBUG), ScriptedTeacher(script) as server:
        options = options_for(server, provider, concurrency=1)
        try:
            ask_all(options, [make_task(options, str(n)) for n in range(9)], tmp_path)
        except TeacherError as error:
            shown += ["".join(traceback.format_exception(error)), repr(error), repr(error.__context__)]
        client = Client(options)
        shown += [repr(client), str(vars(client)), repr(options), str(options.identity)]
        shown += [repr(find_key(options.provider)), str(vars(find_key(options.provider)))]
    assert len(server.requests) == 4 and all(asked.key == CANARY for asked in server.requests)
    shown += [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    shown += [caplog.text, *capfd.readouterr()]
    assert "[key]" in "".join(shown)
    assert CANARY not in "".join(shown) and "wxyz" not in "".join(shown)
    with pytest.raises(TypeError, match="not pickled"):
        pickle.dumps(find_key(options.provider))


def test_a_missing_key_is_named(tmp_path, monkeypatch):
    for provider, name in (("openai", "OPENAI_API_KEY"), ("claude", "ANTHROPIC_API_KEY"), ("gemini", "GOOGLE_API_KEY")):
        for key in PROVIDERS[provider].keys:
            monkeypatch.delenv(key, raising=False)
        options = TeacherOptions(teacher=MODELS[provider])
        with pytest.raises(ValueError, match=f"needs a key: set .*{name} in the environment"):
            ask_all(options, [make_task(options)], tmp_path)


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"teacher": "gpt-5"}, "give PROVIDER:MODEL, PROVIDER one of gemini, claude, openai, local"),
        ({"teacher": "openai:"}, "give PROVIDER:MODEL"),
        ({"teacher": "local:qwen"}, "needs --base-url, as in http://localhost:8000/v1"),
        ({"teacher": "local:q", "base_url": "localhost:8000"}, "give http"),
        ({"teacher": "local:q", "base_url": f"http://me:{CANARY}@host/v1"}, "give http://host/v1 alone"),
        ({"teacher": "local:q", "base_url": f"http://host/v1?key={CANARY}"}, "a key belongs into TEACHER_API_KEY"),
        ({"concurrency": 0}, "concurrency=0: give more than 0"),
        ({"max_usd": -1.0}, "max_usd=-1.0: give at least 0"),
        ({"price_input": 1.0}, "belong together"),
        ({"structured": "xml"}, "choose one of auto, schema, text"),
    ],
)
def test_options_say_what_is_allowed(given, told):
    with pytest.raises(ValueError, match=told) as caught:
        TeacherOptions(**given)
    assert CANARY not in str(caught.value)


def test_providers_have_other_names():
    for alias, name in ALIASES.items():
        options = TeacherOptions(teacher=f"{alias}:a:b", base_url="http://x/v1")
        assert (options.provider.name, options.model) == (name, "a:b")
        assert options.identity["teacher"] == f"{name}:a:b"


def test_importing_costs_nothing():
    code = (
        "import sys, hcot_lmeval.prepare.teacher.runner, hcot_lmeval.prepare.protocols.segment\n"
        "print(sorted({'pydantic', 'pydantic_ai', 'genai_prices', 'httpx', 'openai', 'tqdm'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
