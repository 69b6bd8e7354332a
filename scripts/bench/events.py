"""What a prune event costs beside a bare forward of as many tokens, and a short check of ratios for the tests."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from bench.cli import Report, measure
from bench.engines import Setting, make_model
from bench.work import CLOSE, FIRST_WORD, MARKERS, OPEN, SPLIT, Script, make_work
from hcot_lmeval.engine import Engine, Request, SamplingParams
from hcot_lmeval.engine.slots import Chunk, KVPool
from hcot_lmeval.trace import Policy

BEFORE, AFTER = 3, 2
"""Tokens that are generated before the return, at most the solution, and after it: events come amid decoding."""


class Place(NamedTuple):
    """Where a block ends.

    Attributes:
        solution: tokens of the solution; with the return one more is forwarded again.
        context: live tokens before the block.
        thought: tokens that are thrown away.
    """

    solution: int
    context: int
    thought: int


@dataclass(frozen=True)
class EventTime:
    """A prune event beside a forward, timed by turns.

    Attributes:
        place: where.
        events: seconds from the logits that chose the return to those behind it: the rule, the rewind, the step.
        forwards: seconds of one forward of as many tokens behind a context of the same length, and nothing else.
    """

    place: Place
    events: tuple[float, ...]
    forwards: tuple[float, ...]

    @property
    def ratios(self) -> list[float]:
        """How many times the forward the event took, in each repeat."""
        return [event / forward for event, forward in zip(self.events, self.forwards, strict=True)]

    def as_dict(self) -> dict[str, Any]:
        """Everything by name."""
        return {**asdict(self), "place": self.place._asdict(), "ratio": statistics.median(self.ratios)}


def time_events(
    model: Any, places: Sequence[Place], repeats: int, report: Report, options: Mapping[str, Any] | None = None
) -> list[EventTime]:
    """Times a prune event of one row at each place, after one run to warm up.

    Context, thought and solution are read as a prompt whose markers act, so that no time goes into decoding them; the
    last words of the solution are decoded.

    Args:
        model: a causal language model of transformers.
        places: where.
        repeats: times at each place.
        report: called with what is being done.
        options: more fields of `EngineOptions`.
    """
    fixed: dict[str, Any] = {"markers": MARKERS, "eos_ids": (), "self_check": False, "prompt_acts": True}
    engine = Engine(model, policy=Policy.RECOMPUTE, **{**fixed, **(options or {})})
    found = []
    for place in places:
        report(f"solution {place.solution}, context {place.context}")
        pairs = [(_event(engine, place), _forward(engine, place)) for _ in range(repeats + 1)][1:]
        found.append(EventTime(place, *zip(*pairs, strict=True)))
    return found


def _event(engine: Engine, place: Place) -> float:
    words = _words(engine, place.context + place.thought + place.solution + AFTER)
    thought, solution, after = place.context, place.context + place.thought, len(words) - AFTER
    decoded = after - min(BEFORE, place.solution)
    prompt = (*words[:thought], OPEN, *words[thought:solution], SPLIT, *words[solution:decoded])
    forced = (*words[decoded:after], CLOSE, *words[after:])
    times: list[float] = []
    request = Request("event", prompt, SamplingParams(max_gen_toks=len(forced)), forced_ids=forced)
    (done,) = engine.stream([request], on_logits=lambda *_: times.append(time.perf_counter()))
    live = place.context + place.solution + 2 + AFTER
    if done.token_ids != forced or len(done.live_ids) != live:
        raise AssertionError(f"{len(done.live_ids)} tokens are live at the end, not {live}: the thought was not pruned")
    closed = forced.index(CLOSE)
    return times[closed + 1] - times[closed]


def _forward(engine: Engine, place: Place) -> float:
    """Forwards as many tokens as the event does, behind as many live ones; random keys and values do for the time."""
    start, count = place.context + 1, place.solution + 1
    decoder = engine.decoder
    pool = KVPool(decoder.layers, slots=1, length=start + count, huge_pages=True)
    for tensor in (*pool.keys.values(), *pool.values.values()):
        tensor.normal_()
    words = _words(engine, count)
    single, whole = Chunk(0, start, words[:1], range(start + 1)), Chunk(0, start, words, range(start + count))
    with decoder.attached():
        for chunk in (*[single] * min(BEFORE, place.solution), whole):  # amid decoding, too
            before = time.perf_counter()
            decoder.forward(pool, [chunk]).argmax(-1).tolist()  # reading the result waits for the device
        return time.perf_counter() - before


def _words(engine: Engine, count: int) -> list[int]:
    rng = random.Random(count)
    return [rng.randrange(FIRST_WORD, engine.decoder.config.vocab_size) for _ in range(count)]


def event_table(found: Sequence[EventTime]) -> str:
    """Returns a line for each place: medians, in milliseconds, and that of the ratios."""
    from tabulate import tabulate

    heads = [*Place._fields, "ms/event", "ms/forward", "ratio"]
    rows = []
    for event in found:
        times = [1000 * statistics.median(seconds) for seconds in (event.events, event.forwards)]
        rows.append([*event.place, *(f"{ms:.2f}" for ms in times), f"{statistics.median(event.ratios):.2f}"])
    return tabulate(rows, heads, "simple", colalign=["right"] * len(heads), disable_numparse=True)


# --- the guard --------------------------------------------------------------------------------------------------------

SCRIPT = Script(tokens=120, prompt=24, thought=40, solution=6, text=4)
PLACE = Place(solution=16, context=192, thought=64)
BATCHES = (1, 4)
REPEATS = 4
"""What else runs on the machine may spoil a repeat, or several; the code is slow only if all of them are."""


class Finding(NamedTuple):
    """One ratio: how many times as fast the engine was as the other side, at its best, and the least that passes."""

    name: str
    ratio: float
    least: float

    @property
    def passed(self) -> bool:
        """Whether it has not collapsed."""
        return self.ratio >= self.least

    def __str__(self) -> str:
        return f"{'ok  ' if self.passed else 'SLOW'}  {self.name}: {self.ratio:.2f}, at least {self.least:.2f}"


def guard(report: Report, threads: int | None = None, options: Mapping[str, Any] | None = None) -> list[Finding]:
    """Measures the guarded ratios on a tiny model; each is the best of `REPEATS` in which both sides take turns.

    Args:
        report: called with what is being done.
        threads: CPU threads; as many as before by default.
        options: fields of `EngineOptions`.
    """
    model, found = make_model("tiny", threads=threads), []
    for batch in BATCHES:
        setting = Setting(model, make_work(batch, SCRIPT, model.config.vocab_size), options=options or {})
        base, ours = measure(setting, ["generate", "recompute"], REPEATS, report)
        ratios = [a.seconds / b.seconds for a, b in zip(base.timings, ours.timings, strict=True)]
        found.append(Finding(f"recompute over generate, batch {batch}", max(ratios), 0.8))
    (event,) = time_events(model, [PLACE], REPEATS, report, options)
    return [*found, Finding("a bare forward over a prune event", 1 / min(event.ratios), 0.4)]
