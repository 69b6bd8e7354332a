"""Speed, as far as a test can hold it: ratios within one run, never a time; see `hcot_lmeval.bench.guard`."""

from __future__ import annotations

import time

from hcot_lmeval.bench import guard
from hcot_lmeval.bench.guard import Finding
from hcot_lmeval.trace import LiveContext


def test_no_ratio_has_collapsed():
    found = guard.guard(lambda doing: None)
    assert len(found) == 3
    assert all(finding.passed for finding in found), "\n".join(map(str, found))


def test_a_bound_is_a_bound():
    assert Finding("x", 0.8, 0.8).passed and not Finding("x", 0.79, 0.8).passed
    assert str(Finding("x over y", 0.5, 0.8)) == "SLOW  x over y: 0.50, at least 0.80"


def test_what_becomes_slow_is_found(monkeypatch):
    """A rule that sleeps makes both kinds of ratio collapse."""
    close = LiveContext._close

    def slow(self, token):
        time.sleep(0.2)
        return close(self, token)

    monkeypatch.setattr(guard, "REPEATS", 1)
    monkeypatch.setattr(guard, "BATCHES", (1,))
    monkeypatch.setattr(LiveContext, "_close", slow)
    assert [finding.passed for finding in guard.guard(lambda doing: None)] == [False, False]
