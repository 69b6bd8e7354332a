"""Loops: what repeats itself is found, at the right token, and what does not is left alone."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hcot_lmeval.control import REPEATS, LoopDetector

OPEN, CLOSE = 3, 5


def first_alarm(ids: list[int], tokens: int) -> int | None:
    """Index of the token with which a loop is found; markers open and close blocks."""
    detector, depth = LoopDetector(tokens), 0
    for index, token in enumerate(ids):
        depth = max(0, depth + (token == OPEN) - (token == CLOSE))
        if detector.push(token, depth):
            return index
    return None


def is_periodic(ids: list[int], tokens: int) -> bool:
    """The slow twin: some suffix repeats with some period, `REPEATS` times and over so many tokens."""
    for period in range(1, len(ids) // REPEATS + 1):
        run = 0
        while run + period < len(ids) and ids[-1 - run] == ids[-1 - run - period]:
            run += 1
        if run >= max(tokens, (REPEATS - 1) * period):
            return True
    return False


@settings(max_examples=300)
@given(st.data())
def test_a_repeated_lap_is_found_at_the_token_that_makes_it_a_loop(data: st.DataObject) -> None:
    """Laps of few different tokens, of runs of one token, and of text; behind text that looks like them."""
    most = data.draw(st.sampled_from([8, 9, 11, 40]))
    lap = [8] * data.draw(st.integers(0, 30)) + data.draw(st.lists(st.integers(8, most), min_size=1, max_size=60))
    before = data.draw(st.lists(st.integers(8, most + 1), max_size=40))
    tokens = data.draw(st.integers(1, 80))
    needed = len(lap) + max(tokens, (REPEATS - 1) * len(lap))
    ids = before + lap * (needed // len(lap) + 1)
    expected = next(i for i in range(len(ids)) if is_periodic(ids[: i + 1], tokens))
    assert first_alarm(ids, tokens) == expected


@settings(max_examples=300)
@given(st.lists(st.integers(8, 9), max_size=200), st.integers(4, 40))
def test_no_alarm_without_a_repetition(ids: list[int], tokens: int) -> None:
    found = first_alarm(ids, tokens)
    if found is not None:
        assert is_periodic(ids[: found + 1], tokens)


def test_text_that_varies_is_no_loop() -> None:
    rng = random.Random(0)
    counted = [token for n in range(400) for token in (20, 21, 22, 30 + n % 10, 40 + n // 10)]
    assert first_alarm(counted, 64) is None
    assert first_alarm([rng.randrange(8, 12) for _ in range(5000)], 64) is None


def test_identical_blocks_between_varying_text() -> None:
    block = [OPEN, *range(50, 80), CLOSE]
    ids = [token for n in range(8) for token in (*block, 100 + n, 200 + n)]
    found = first_alarm(ids, 64)
    assert found == REPEATS * (len(block) + 2) - 3  # the last token of the fourth copy
    varied = [token for n in range(8) for token in (OPEN, *range(50, 80), 100 + n, CLOSE, 200 + n)]
    assert first_alarm(varied, 64) is None


def test_short_identical_blocks_may_come_often() -> None:
    ids = [token for n in range(8) for token in (OPEN, 50, CLOSE, 100 + n)]
    assert first_alarm(ids, 64) is None


def test_blocks_within_different_parents_are_no_siblings() -> None:
    child = [OPEN, *range(50, 80), CLOSE]
    ids = [token for n in range(6) for token in (OPEN, 100 + n, *child, CLOSE)]
    assert first_alarm(ids, 64) is None


@pytest.mark.parametrize("lap", [[8], list(range(8, 40))])
def test_forgetting_starts_anew(lap: list[int]) -> None:
    detector, ids = LoopDetector(32), lap * 400
    alarms = []
    for index, token in enumerate(ids):
        if detector.push(token, 0):
            alarms.append(index)
            detector.forget()
    assert len(alarms) > 1
    assert min(b - a for a, b in itertools.pairwise(alarms)) >= 32
