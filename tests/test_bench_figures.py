"""What is made of the times of the benchmark: steps, figures, the floor, and the verdict of the guard."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from bench import floor, guard
from bench.floor import Floor, FloorTime
from bench.machine import PeakMemory
from bench.measure import Measurement, figures, median_ratio
from bench.models import make_model
from bench.prune_events import EventTime
from bench.tables import engine_table
from bench.timing import StepClock, StepTime, Timing
from bench.work import CLOSE, OPEN, SPLIT, Script, Work, make_work


def quiet(doing: str) -> None:
    """Nobody watches."""


@pytest.fixture(scope="module")
def model():
    return make_model("tiny")


def test_ticks_become_steps():
    """Row 1 is late by a step, and both end a block with their fourth token."""
    work = Work(((10,), (11,)), ((OPEN, 15, SPLIT, CLOSE, 12, 13),) * 2)
    assert work.prunes == (frozenset({3}), frozenset({3}))
    clock = StepClock(work, prunes=True)
    for time, row, generated in [
        (1.0, 0, 0),
        (2.0, 0, 1), (2.5, 1, 0),
        (4.0, 0, 2), (4.1, 1, 1),
        (5.0, 0, 3), (5.1, 1, 2),
        (7.0, 0, 4), (7.2, 1, 3),
        (8.5, 1, 4), (8.6, 0, 5),
        (9.0, 1, 5),
    ]:  # fmt: skip
        clock.tick([row], generated, time)
    assert clock.steps() == (
        StepTime(1.0, False, 0),  # row 1 read its prompt
        StepTime(2.0, True, 0),
        StepTime(1.0, True, 0),
        StepTime(2.0, False, 1),  # row 0 read its solution again
        StepTime(1.5, False, 1),
        StepTime(0.5, False, 0),  # row 0 was ready
    )


def test_prune_events_cost_what_their_steps_take_beyond_ordinary_ones():
    steps = [StepTime(s, True, 0) for s in (1.0, 2.0, 9.0)] + [StepTime(5.0, False, 1), StepTime(12.0, False, 3)]
    timing = Timing(30.0, (), 0, (*steps, StepTime(99.0, False, 0)))
    assert timing.step == 2.0
    assert timing.prune == pytest.approx((3 + 10) / 4)
    assert Timing(1.0, (), 0).step is Timing(1.0, (), 0).prune is None
    assert Timing(1.0, (), 0, tuple(steps[:3])).prune is None


def timing(seconds: float, step: float) -> Timing:
    return Timing(seconds, (), 47, (StepTime(step, True, 0),))


def test_ratios_are_taken_within_each_repeat():
    """The second repeat ran on a machine half as fast: ratios of medians would be off, medians of ratios are not."""
    base = Measurement("generate", [timing(4, 0.4), timing(8, 0.8), timing(4, 0.4)], memory=10.0)
    fast = Measurement("recompute", [timing(2, 0.2), timing(4, 0.4), timing(1, 0.1)], memory=20.0)
    none = Measurement("vllm", reason="not installed")
    pairs = [(0.1, 0.2), (0.2, 0.4), (0.2, 0.1)]
    floors = [FloorTime({"linear": linear, "packed": packed}, 0.0, packed / 4) for linear, packed in pairs]
    work = make_work(2, Script(tokens=40, prompt=7, thought=9, solution=3, text=2), 512)
    found = {f.engine: f for f in figures([base, fast, none], floors, work)}
    assert found["generate"].times_base == 1
    assert found["recompute"].times_base == 2
    assert found["recompute"].of_floor == pytest.approx(0.5)
    assert found["recompute"].of_memory == pytest.approx(0.25)
    assert found["recompute"].step_ms == 200
    assert found["recompute"].tokens_per_second == 2 * 40 / 2
    assert found["recompute"].memory_mib == 20
    assert found["vllm"].reason == "not installed" and found["vllm"].step_ms is None
    assert next(iter(figures([fast], floors, work))).times_base is None
    assert median_ratio([1.0, 1.0], [2.0, None]) is None
    table = engine_table(list(found.values()), floors, work)
    assert "vllm: not run: not installed" in table and "x generate" in table
    assert "nothing is pruned" not in table
    unpruned = Work(work.prompts, ((OPEN, 15, 16),) * work.batch)
    assert "nothing is pruned: no row generates as far as its first return" in engine_table(
        list(found.values()), floors, unpruned
    )


def test_the_floor_streams_every_weight_once(model, monkeypatch):
    time = FloorTime({"linear": 0.5, "packed": 0.25}, 0.125, 0.0625)
    assert (time.kind, time.seconds, time.memory) == ("packed", 0.375, 0.1875)
    monkeypatch.setattr(floor, "STEPS", 2)
    monkeypatch.setattr(floor, "KEEP_WITHIN", float("inf"))
    made = Floor(model, batch=3, kv_bytes=4096)
    expected = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight  # so it is counted once
    sizes = []
    for products in made.kinds.values():
        outputs = [product(rows) for product, rows in zip(products, made.inputs, strict=True)]
        assert {len(out) for out in outputs} == {3}
        sizes.append(sum(out.shape[1] * rows.shape[1] for out, rows in zip(outputs, made.inputs, strict=True)))
    assert set(sizes) == {expected}
    assert sum(bits.numel() for bits in made.bits) == expected
    assert made.kv.nbytes == 4096
    assert made.run().seconds > 0
    monkeypatch.setattr(floor, "KV_BYTES", 4096)  # more is read in part
    made = Floor(model, batch=1, kv_bytes=3 * 4096)
    assert made.kv.nbytes == 4096 and made.kv_scale == 3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_processors_that_onednn_does_not_serve_have_a_floor_too(dtype, monkeypatch):
    monkeypatch.setattr(floor, "STEPS", 1)
    made = Floor(make_model("tiny", dtype), batch=2, kv_bytes=64)
    assert made.run().seconds > 0  # whatever this processor can do
    monkeypatch.setattr(floor, "packs", lambda _: False)
    assert set(Floor(make_model("tiny", dtype), batch=2, kv_bytes=64).run().weights) == {"linear"}


def test_memory_counts_what_was_in_use_at_once():
    memory = PeakMemory(torch.device("cpu"))
    if memory.mib() is None:
        pytest.skip("the system does not tell")
    block = np.ones(8_000_000)
    del block
    assert 55 < memory.mib() < 200
    memory.forget()
    assert memory.mib() < 30


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
