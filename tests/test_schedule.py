"""The order of the rows: every phase in its steps, every row once an epoch, and always the same for a seed."""

from __future__ import annotations

from collections import Counter

import pytest

from hcot_lmeval.trace import Policy
from hcot_lmeval.training.trainer import Phase, Schedule, steps_of


def rows(name: str, count: int) -> list[dict]:
    return [{"ids": [name, i]} for i in range(count)]


def names(schedule: Schedule) -> list[tuple]:
    return [tuple(schedule[i]["ids"]) for i in range(len(schedule))]


def make(seed: int = 0) -> Schedule:
    phases = [Phase(Policy.OFF, rows("a", 5), 3), Phase(Policy.EVICT, rows("b", 7), 4)]
    return Schedule(phases, rows_per_step=4, seed=seed)


def test_phases_follow_each_other_and_epochs_are_whole() -> None:
    schedule = make()
    found = names(schedule)
    assert schedule.starts == [0, 3, 7] and len(found) == 28
    assert {name for name, _ in found[:12]} == {"a"} and {name for name, _ in found[12:]} == {"b"}
    for start in (0, 5):
        assert Counter(found[start : start + 5]) == Counter(("a", i) for i in range(5))
    for start in (12, 19):
        assert Counter(found[start : start + 7]) == Counter(("b", i) for i in range(7))


def test_order_depends_on_the_seed_alone() -> None:
    assert names(make()) == names(make())
    assert names(make()) != names(make(1))
    backwards = make()
    assert [tuple(backwards[i]["ids"]) for i in reversed(range(28))] == names(make())[::-1]


def test_epochs_are_shuffled_anew() -> None:
    found = names(Schedule([Phase(Policy.OFF, rows("a", 50), 2)], rows_per_step=50))
    assert found[:50] != found[50:] != sorted(found[50:])


def test_a_phase_without_rows_is_told() -> None:
    with pytest.raises(ValueError, match=r"phases\.1 \(evict\) has no rows"):
        Schedule([Phase(Policy.OFF, rows("a", 1), 1), Phase(Policy.EVICT, [], 1)], rows_per_step=1)


@pytest.mark.parametrize("epochs, count, steps", [(1, 10, 5), (1, 11, 6), (0.01, 3, 1), (2.5, 8, 10)])
def test_epochs_become_steps(epochs, count, steps) -> None:
    assert steps_of(epochs, count, rows_per_step=2) == steps
