"""What the guard against slow changes says of given times; the times themselves are for `bench.py guard`."""

from __future__ import annotations

import pytest
from bench import guard
from bench.measure import Measurement
from bench.prune_events import EventTime
from bench.timing import Timing


def quiet(doing: str) -> None:
    """Nobody watches."""


@pytest.mark.parametrize(
    ("ours", "events", "passed"),
    [
        ([1.0, 1.0], [1.0, 1.0], [True, True]),
        ([1.2, 9.9], [9.9, 2.4], [True, True]),  # one good repeat is enough: something else ran in the other
        ([1.3, 1.3], [1.0, 1.0], [False, True]),
        ([1.0, 1.0], [2.6, 2.6], [True, False]),
    ],
)
def test_what_is_slow_in_every_repeat_is_found(monkeypatch, ours, events, passed):
    """`generate` and the prefill take a second in each repeat."""

    def measure(setting, names, repeats, report):
        assert names == ["generate", "recompute"]
        runs = [[Timing(s, (), 0) for s in seconds] for seconds in ([1.0] * len(ours), ours)]
        return [Measurement(name, timings) for name, timings in zip(names, runs, strict=True)], []

    def time_events(model, where, repeats, report, options):
        return [EventTime(place, tuple(events), (1.0,) * len(events)) for place in where]

    monkeypatch.setattr(guard, "measure", measure)
    monkeypatch.setattr(guard, "time_events", time_events)
    monkeypatch.setattr(guard, "BATCHES", (1,))
    found = guard.guard(quiet)
    assert [finding.passed for finding in found] == passed
    assert [str(finding).startswith("SLOW") for finding in found] == [not ok for ok in passed]
