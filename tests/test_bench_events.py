"""Prune events of the benchmark, and the verdict of its guard; no test here fails for a time."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from bench import cli, events
from bench.cli import Measurement
from bench.engines import Timing, make_model
from bench.events import EventTime, Place, guard, time_events


def quiet(doing: str) -> None:
    """Nobody watches."""


def test_an_event_is_one_that_prunes():
    places = [Place(solution, context, 16) for solution, context in ((1, 20), (6, 40))]
    found = time_events(make_model("tiny"), places, 2, quiet)
    assert [event.place for event in found] == places
    assert all(len(event.ratios) == 2 and min(event.events + event.forwards) > 0 for event in found)


def test_a_thought_that_stays_stops_the_benchmark(monkeypatch):
    monkeypatch.setattr(events, "Policy", SimpleNamespace(RECOMPUTE="off"))
    with pytest.raises(AssertionError, match="the thought was not pruned"):
        time_events(make_model("tiny"), [Place(6, 40, 16)], 1, quiet)


def test_the_table_has_medians():
    table = events.event_table([EventTime(Place(4, 256, 64), (0.004, 0.006, 0.5), (0.002, 0.002, 0.002))])
    assert table.splitlines()[-1].split() == ["4", "256", "64", "6.00", "2.00", "3.00"]


@pytest.mark.parametrize(
    ("ours", "slow", "passed"),
    [
        ([1.0, 1.0], [1.0, 1.0], [True, True]),
        ([1.2, 9.9], [9.9, 2.4], [True, True]),  # one good repeat is enough: something else ran in the other
        ([1.3, 1.3], [1.0, 1.0], [False, True]),
        ([1.0, 1.0], [2.6, 2.6], [True, False]),
    ],
)
def test_what_is_slow_in_every_repeat_is_found(monkeypatch, capsys, ours, slow, passed):
    """`generate` and the forward take a second in each repeat."""

    def measure(setting, names, repeats, report):
        assert names == ["generate", "recompute"]
        runs = [[Timing(s, (), 0) for s in seconds] for seconds in ([1.0] * len(ours), ours)]
        return [Measurement(name, setting.work, timings) for name, timings in zip(names, runs, strict=True)]

    def timed(model, places, repeats, report, options):
        return [EventTime(place, tuple(slow), (1.0,) * len(slow)) for place in places]

    monkeypatch.setattr(events, "measure", measure)
    monkeypatch.setattr(events, "time_events", timed)
    monkeypatch.setattr(events, "BATCHES", (1,))
    found = guard(quiet)
    assert [finding.passed for finding in found] == passed
    assert [str(finding).startswith("SLOW") for finding in found] == [not ok for ok in passed]
    assert cli.main(["guard", "--threads", "1"]) == (0 if all(passed) else 1)
    assert "recompute over generate, batch 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [(["prune", "--solution", "0"], "'0' is not a whole number from 1 up"), (["guard", "--option", "loop"], "loop")],
)
def test_what_cannot_be_timed_is_said_at_once(capsys, arguments, told):
    with pytest.raises(SystemExit):
        cli.main(arguments)
    assert told in capsys.readouterr().err
