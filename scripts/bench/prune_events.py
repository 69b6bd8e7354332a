"""What a prune event costs: its step in the engine, against a bare prefill of the tokens that it reads again."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

from bench.output import Report
from bench.work import CLOSE, FIRST_WORD, MARKERS, OPEN, SPLIT
from hcot_lmeval.engine import Engine, Request, SamplingParams
from hcot_lmeval.engine.decoder import Decoder
from hcot_lmeval.engine.slots import Chunk, KVPool
from hcot_lmeval.trace import Policy

BEFORE, AFTER = 3, 2
"""Tokens that are generated before the return, at most the solution, and after it: events come amid decoding."""


class Place(NamedTuple):
    """Where a block ends.

    Attributes:
        solution: tokens of the solution; with the return one more is read again.
        context: live tokens before the block.
        thought: tokens that are thrown away.
    """

    solution: int
    context: int
    thought: int


@dataclass(frozen=True)
class EventTime:
    """A prune event beside a prefill, timed by turns.

    Attributes:
        place: where.
        events: seconds from the logits that chose the return to those behind it: the rule, the rewind, the step.
        prefills: seconds of one forward of as many tokens behind a context of the same length, and nothing else.
    """

    place: Place
    events: tuple[float, ...]
    prefills: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """How many times the prefill the event costs: the median of the repeats."""
        return statistics.median(self.ratios)

    @property
    def ratios(self) -> list[float]:
        return [event / prefill for event, prefill in zip(self.events, self.prefills, strict=True)]

    def as_dict(self) -> dict[str, Any]:
        """Everything by name."""
        return {**self.place._asdict(), "events": self.events, "prefills": self.prefills, "ratio": self.ratio}


def places(solutions: Sequence[int], contexts: Sequence[int], thoughts: Sequence[int]) -> list[Place]:
    """Returns every combination."""
    return [Place(*numbers) for numbers in product(solutions, contexts, thoughts)]


def time_events(
    model: Any, where: Sequence[Place], repeats: int, report: Report, options: Mapping[str, Any] | None = None
) -> list[EventTime]:
    """Times a prune event of one row at each place, after one run to warm up.

    Context, thought and solution are read as a prompt whose markers act, so that no time goes into decoding them; the
    last words of the solution are decoded.

    Args:
        model: a causal language model of transformers.
        where: the places.
        repeats: times at each place.
        report: called with what is being done.
        options: more fields of `EngineOptions`.
    """
    fixed: dict[str, Any] = {"markers": MARKERS, "eos_ids": (), "self_check": False, "prompt_acts": True}
    engine = Engine(model, policy=Policy.RECOMPUTE, **{**fixed, **(options or {})})
    found = []
    for place in where:
        report(f"solution {place.solution}, context {place.context}, thought {place.thought}")
        pairs = [(_event(engine, place), _prefill(engine, place)) for _ in range(repeats + 1)][1:]
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
    (done,) = engine.stream([request], None, lambda *_: times.append(time.perf_counter()))
    live = place.context + place.solution + 2 + AFTER
    if done.token_ids != forced or len(done.live_ids) != live:
        raise AssertionError(f"{len(done.live_ids)} tokens are live at the end, not {live}: the thought was not pruned")
    closed = forced.index(CLOSE)
    return times[closed + 1] - times[closed]


def _prefill(engine: Engine, place: Place) -> float:
    """Forwards as many tokens as the event does, behind as many live ones; random keys and values do for the time."""
    start, count = place.context + 1, place.solution + 1
    decoder = engine.decoder
    pool = KVPool(decoder.layers, slots=1, length=start + count, huge_pages=True)
    for tensor in (*pool.keys.values(), *pool.values.values()):
        tensor.normal_()
    words = _words(engine, count)
    single, whole = Chunk(0, start, words[:1], range(start + 1)), Chunk(0, start, words, range(start + count))
    with decoder.attached():
        for _ in range(min(BEFORE, place.solution)):  # amid decoding, too
            _forward(decoder, pool, single)
        before = time.perf_counter()
        _forward(decoder, pool, whole)
        return time.perf_counter() - before


def _forward(decoder: Decoder, pool: KVPool, chunk: Chunk) -> None:
    decoder.forward(pool, [chunk]).argmax(-1).tolist()  # reading the result waits for the device


def _words(engine: Engine, count: int) -> list[int]:
    rng = random.Random(count)
    return [rng.randrange(FIRST_WORD, engine.decoder.config.vocab_size) for _ in range(count)]
