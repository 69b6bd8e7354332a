"""Questions and replies find back to their rows, in any order, shared or many to a row; no more wait than needed."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hcot_lmeval.prepare.conversation import Conversation


def question(key):
    return SimpleNamespace(key=key)


def talk(rows, ask):
    """Rows are lists of keys; an entry is what was replied to them."""
    return Conversation(
        enumerate(rows),
        lambda row: [question(key) for key in row],
        ask,
        lambda row, replies: {"keys": row, "said": [reply.text for reply in replies]},
    )


def shuffled(seed, ahead):
    """A teacher that takes up to `ahead` questions and answers any of them."""
    asked = []

    def ask(questions):
        rng, open_ = random.Random(seed), []
        for one in questions:
            asked.append(one.key)
            open_.append(one)
            if len(open_) >= ahead:
                key = open_.pop(rng.randrange(len(open_))).key
                yield SimpleNamespace(key=key, text=f"re {key}")
        for one in open_:
            yield SimpleNamespace(key=one.key, text=f"re {one.key}")

    return ask, asked


@given(st.lists(st.lists(st.sampled_from("abcdefgh"), max_size=4)), st.integers(0, 99), st.integers(1, 5))
def test_every_row_gets_its_replies_in_the_order_of_its_questions(rows, seed, ahead):
    ask, asked = shuffled(seed, ahead)
    found = dict(talk(rows, ask))
    assert found == {n: {"keys": row, "said": [f"re {key}" for key in row]} for n, row in enumerate(rows)}
    assert set(asked) == {key for row in rows for key in row}


def test_the_same_question_is_not_open_twice():
    ask, asked = shuffled(0, 10)
    assert len(list(talk([["a"], ["a"], ["b", "b"], ["a", "b"]], ask))) == 4
    assert sorted(asked) == ["a", "b"]


def test_rows_are_read_as_the_teacher_takes_questions():
    read = []

    def rows():
        for number in range(1000):
            read.append(number)
            yield [str(number)]

    ask, _ = shuffled(0, 3)
    first = next(iter(talk(rows(), ask)))
    assert first[1]["said"] and len(read) <= 4


def test_a_teacher_that_swallows_questions_is_a_fault_of_ours():
    with pytest.raises(RuntimeError, match="1 questions have no reply, among them b"):
        list(
            talk(
                [["a"], ["b"]],
                lambda questions: [SimpleNamespace(key=q.key, text="") for q in questions if q.key < "b"],
            )
        )
