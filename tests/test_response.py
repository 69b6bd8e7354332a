"""A Response is a plain string to everybody who does not ask for more."""

import copy
import json
import pickle

import pytest

from hcot_lmeval.response import Response
from hcot_lmeval.vocabulary import split_thinking

THINK = ("<think>", "</think>")


def response() -> Response:
    return Response("42", stats={"generated_tokens": 7}, thinking="hm", raw="<think>hm</think>42", finish_reason="eos")


@pytest.mark.parametrize(
    ("text", "opened", "thinking", "answer"),
    [
        ("42", False, "", "42"),  # never thought: all answer
        ("42", True, "42", ""),  # the prompt began the thinking and it did not end
        ("hm</think>\n42", True, "hm", "42"),
        ("<think>hm</think>\n\n42", False, "hm", "42"),
        ("<think>hm", False, "hm", ""),  # cut off while thinking
        ("hm</think>42", False, "hm", "42"),  # an end without a beginning
        ("<think>a</think>b<think>c</think>d", False, "ab" + "c", "d"),  # the answer begins after the last one
        ("<think>a</think>b<think>c", False, "abc", ""),  # thinking again: no answer yet
        ("<think></think>", False, "", ""),
        ("so <think>hm</think>42", False, "so hm", "42"),
        ("", False, "", ""),
        ("", True, "", ""),
    ],
)
def test_answer_is_what_follows_the_thinking(text, opened, thinking, answer):
    assert split_thinking(text, THINK, opened=opened) == (thinking, answer)


def test_without_thinking_tokens_everything_is_answer():
    assert split_thinking("<think>hm</think>42", None, opened=True) == ("", "<think>hm</think>42")


def test_is_a_string_to_json_dicts_and_comparisons():
    assert response() == "42"
    assert json.dumps([response()]) == '["42"]'
    assert {response(): 1}["42"] == 1
    assert type(str(response())) is str
    assert type(response().strip()) is str


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda r: pickle.loads(pickle.dumps(r))])
def test_copies_keep_the_story(duplicate):
    again = duplicate(response())
    assert type(again) is Response
    assert (again, vars(again)) == ("42", vars(response()))


def test_getnewargs_is_the_plain_string():
    (plain,) = response().__getnewargs__()
    assert type(plain) is str
    assert plain == "42"


def test_survives_json_as_a_dict():
    again = Response.from_dict(json.loads(json.dumps(response().as_dict())))
    assert (again, vars(again)) == ("42", vars(response()))


def test_raw_is_the_answer_unless_said_otherwise():
    assert Response("42").raw == "42"
    assert Response("42", raw="").raw == ""
