"""A teacher is asked over HTTP in its own protocol, its reply is read strictly, and the key is nowhere to be seen."""

from __future__ import annotations

import json
import logging
import os
import pickle
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hcot_lmeval.prepare.teacher.client import Client
from hcot_lmeval.prepare.teacher.options import PROVIDERS, TeacherOptions, find_key
from hcot_lmeval.prepare.teacher.questions import Message, Reply, Task, schema_of
from hcot_lmeval.prepare.teacher.runner import TeacherError
from hcot_lmeval.settings import parse_settings
from tests.scripted_teacher import Raw, Say, ScriptedTeacher, Status
from tests.teacher_runs import CANARY, GOOD, MODELS, Number, ask_all, ask_one, make_task, options_for

pytestmark = pytest.mark.usefixtures("keys")
ROOT = Path(__file__).resolve().parents[1]
providers = pytest.mark.parametrize("provider", MODELS)


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
        task = Task("test", messages, Number, {})
        reply = ask_all(options, [task], tmp_path)[task.key]
    assert (reply.text, reply.value, reply.failure, reply.spent.requests) == (GOOD, Number(a=1), None, 1)
    assert (reply.spent.input_tokens, reply.spent.output_tokens) == (1000, 200)
    assert (reply.spent.usd is None) == (provider == "local")
    [asked] = server.requests
    assert asked.path == PATHS[provider] and asked.key == CANARY
    assert asked.system == "s"
    other = "model" if provider == "gemini" else "assistant"
    assert asked.turns == [("user", "u"), (other, "v"), ("user", "w")]
    kept = ("type", "required", "additionalProperties")
    assert {key: asked.schema[key] for key in kept} == {key: schema_of(Number)[key] for key in kept}
    assert asked.schema["properties"]["a"]["anyOf"] == [{"type": "integer"}, {"type": "null"}]
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


@pytest.mark.parametrize(
    ("provider", "sent"),
    [("openai", '"reasoning_effort": "low"'), ("claude", '"thinking": {'), ("gemini", '"thinkingConfig": {')],
)
def test_a_teacher_can_be_told_how_much_to_think(tmp_path, provider, sent):
    with ScriptedTeacher([Say(GOOD)]) as server:
        assert ask_one(server, tmp_path, provider, thinking="low").value == Number(a=1)
    assert sent in json.dumps(server.requests[0].body)


def test_a_setting_that_would_be_dropped_is_an_error(tmp_path):
    with ScriptedTeacher([Say(GOOD)]) as server:
        with pytest.raises(TeacherError, match=r"cannot ask openai:gpt-5-mini like this .*temperature.* not supported"):
            ask_one(server, tmp_path, temperature=0.5)
        with pytest.raises(ValueError, match="thinking=low: local:qwen is not known to be told"):
            ask_one(server, tmp_path, "local", thinking="low")
    assert server.requests == []


def completion(message, model="m"):
    """What a server with OpenAI's protocol replies that does not count tokens."""
    choice = {"index": 0, "message": {"role": "assistant", **message}, "finish_reason": "stop"}
    return {"id": "c", "object": "chat.completion", "created": 1, "model": model, "choices": [choice]}


def test_the_model_that_answers_is_kept(tmp_path):
    body = completion({"content": GOOD}, "gpt-5-mini-2026-08-07")
    with ScriptedTeacher([Raw(json.dumps(body).encode())]) as server:
        reply = ask_one(server, tmp_path)
    assert reply.model == "gpt-5-mini-2026-08-07"
    assert reply.spent.input_tokens > 60 and reply.spent.output_tokens == 3 and reply.spent.usd > 0  # estimated


def test_a_refusal_is_one_however_it_is_told(tmp_path):
    openai = completion({"content": None, "refusal": "I will not"})
    gemini = {"promptFeedback": {"blockReason": "SAFETY"}, "usageMetadata": {"promptTokenCount": 5}}
    for provider, body in (("openai", openai), ("gemini", gemini)):
        with ScriptedTeacher([Raw(json.dumps(body).encode())]) as server:
            assert ask_one(server, tmp_path / provider, provider).failure.code == "refused"


def test_a_server_without_a_key_gets_none(tmp_path, monkeypatch):
    monkeypatch.delenv("TEACHER_API_KEY")
    with ScriptedTeacher([Say(GOOD)]) as server:
        assert ask_one(server, tmp_path, "local").value == Number(a=1)
    assert CANARY not in str(server.requests)  # that of OpenAI is set, and not meant for others


def test_another_server_gets_nothing_that_is_meant_for_openai(tmp_path, monkeypatch):
    for name, value in (
        ("CUSTOM_HEADERS", f"X-Gateway: {CANARY}2"),
        ("ORG_ID", f"{CANARY}2"),
        ("PROJECT_ID", f"{CANARY}2"),
    ):
        monkeypatch.setenv(f"OPENAI_{name}", value)
    with ScriptedTeacher([Say(GOOD)]) as server:
        assert ask_one(server, tmp_path, "local").value == Number(a=1)
        assert ask_one(server, tmp_path / "b", "openai").value == Number(a=1)
    other, openai = (str(asked.headers) for asked in server.requests)
    assert f"{CANARY}2" not in other and openai.count(f"{CANARY}2") == 3
    assert os.environ["OPENAI_ORG_ID"] == f"{CANARY}2"


def test_an_old_model_is_told_the_form_in_words_alone(tmp_path):
    with ScriptedTeacher([Say(GOOD)]) as server:
        options = TeacherOptions(teacher="claude:claude-3-5-haiku-latest", base_url=server.url("claude"))
        assert ask_all(options, [make_task(options)], tmp_path)
    assert server.requests[0].schema is None


# --- reading JSON -----------------------------------------------------------------------------------------------------


def read(text):
    return make_task(TeacherOptions(teacher=MODELS["openai"])).read(Reply("k", text))


@pytest.mark.parametrize("text", ['```json\n{"a": 1}\n```', '\n{"a": 1} ', '```\n{"a": 1}\n```'])
def test_a_fence_around_all_of_it_is_taken_off(text):
    assert read(text).value == Number(a=1)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from("abc"), inner),
)


@given(values)
@example({"a": True})
@example({"a": "1"})
@example({"a": None, "b": None})
@example({})
def test_forms_are_closed(data):
    good = isinstance(data, dict) and set(data) == {"a"} and (data["a"] is None or type(data["a"]) is int)
    assert (read(json.dumps(data)).failure is None) == good


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


LOGGED = """
import sys
from pathlib import Path
from tests.scripted_teacher import Say, ScriptedTeacher
from tests.teacher_runs import ask_one
with ScriptedTeacher([Say('{"a": 1}')]) as server:
    print(ask_one(server, Path(sys.argv[2]), sys.argv[1]).value)
"""


@pytest.mark.parametrize("provider", ["openai", "claude"])
def test_the_environment_cannot_turn_logging_on(tmp_path, monkeypatch, provider):
    """In a process of its own, since the libraries look when they are imported."""
    for name in ("OPENAI_LOG", "ANTHROPIC_LOG"):
        monkeypatch.setenv(name, "debug")
    command = [sys.executable, "-c", LOGGED, provider, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("a=1\n", "")


@pytest.mark.parametrize("key", ["a", "EMPTY", "hunter2"])
def test_a_placeholder_for_a_key_leaves_replies_alone(tmp_path, monkeypatch, key):
    monkeypatch.setenv("TEACHER_API_KEY", key)
    with ScriptedTeacher([Say(f'"{key}"'), Status(400, message=f"bad key: {key}.")]) as server:
        assert ask_one(server, tmp_path, "local").text == f'"{key}"'
        reply = ask_one(server, tmp_path / "b", "local")
    assert reply.failure.detail == "HTTP 400: bad key: [key]."


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
        ({"concurrency": 0}, "concurrency: Input should be greater than 0 .given: 0"),
        ({"max_usd": -1.0}, "max_usd: Input should be greater than or equal to 0"),
        ({"price_input": 1.0}, "belong together"),
        ({"thinking": "high"}, "leaves no room for thinking=high; give at least 32768"),
        ({"structured": "xml"}, "structured: Input should be 'auto', 'schema' or 'text' .given: xml"),
    ],
)
def test_options_say_what_is_allowed(given, told):
    with pytest.raises(ValueError, match=told) as caught:
        parse_settings(TeacherOptions, given)
    assert CANARY not in str(caught.value)
    with pytest.raises(ValueError, match="1 validation error") as caught:
        TeacherOptions(**given)
    assert CANARY not in str(caught.value)


def test_importing_costs_nothing():
    code = (
        "import sys, hcot_lmeval.prepare.teacher.runner, hcot_lmeval.prepare.teacher.protocols\n"
        "print(sorted({'pydantic_ai', 'genai_prices', 'httpx', 'openai', 'tqdm'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
