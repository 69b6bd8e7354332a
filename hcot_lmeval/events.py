"""What happens during one generation, as typed events, and what can be counted from them.

The engine tells a `Recorder` every step of a row; nothing is summarised away. `Statistics` are derived from the events
alone, so that what was written down (`hcot_lmeval.notes`) can always be counted again.

Times are seconds since the request was admitted to the batch. Indices count tokens of the trace, prompt included.
This module imports the standard library alone.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from hcot_lmeval.trace import Kind, Malformed, Step


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened."""

    time: float


@dataclass(frozen=True, slots=True)
class Prefill(Event):
    """The prompt was read: `tokens` long, `live` of them in the context, `shared` copied from a row that had them."""

    tokens: int
    live: int
    shared: int = 0


@dataclass(frozen=True, slots=True)
class Tokens(Event):
    """A run of text tokens, the first at `index`; `time` is that of the last one."""

    index: int
    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Marker(Event):
    """The marker `id` at `index` acted on the trace; `depth` blocks are open now."""

    index: int
    depth: int
    id: int


@dataclass(frozen=True, slots=True)
class Open(Marker):
    """A block was opened."""


@dataclass(frozen=True, slots=True)
class Split(Marker):
    """The thought of the innermost block ended and its solution began."""


@dataclass(frozen=True, slots=True)
class Close(Marker):
    """A block was closed without a prune: the policy is off, it had no solution, or there was nothing to throw away."""


@dataclass(frozen=True, slots=True)
class Prune(Marker):
    """A block was closed and its thought thrown away.

    Attributes:
        pruned: indices of the tokens that left the context (the thought, and the markers that do not survive).
        reforwarded: tokens that had been forwarded before and were forwarded again.
        peak: live tokens held at once while this happened.
        live: live tokens afterwards.
    """

    pruned: tuple[int, ...]
    reforwarded: int
    peak: int
    live: int


@dataclass(frozen=True, slots=True)
class Sweep(Prune):
    """The thinking ended, and the thoughts that had waited for it were thrown away at once (ablation ``oracle``)."""


@dataclass(frozen=True, slots=True)
class Fault(Event):
    """The token at `index` departs from the notation; `kind` is a `Malformed` value."""

    index: int
    kind: str


@dataclass(frozen=True, slots=True)
class Illegal(Event):
    """The token `id` at `index` came where the grammar (`hcot_lmeval.grammar`) forbids it, in the state `state`."""

    index: int
    id: int
    state: str


@dataclass(frozen=True, slots=True)
class Forced(Event):
    """The token `id` at `index` is not the one that the model would have written there, which is `wanted`.

    Attributes:
        cause: the option that changed it, a `hcot_lmeval.control.Cause`.
    """

    index: int
    id: int
    cause: str
    wanted: int


@dataclass(frozen=True, slots=True)
class Loop(Event):
    """The trace was found to repeat itself, with the token at `index`."""

    index: int


COMPLETE = frozenset({"eos", "stop"})
"""The finish reasons with which a model ends by itself; the others are not its own."""


@dataclass(frozen=True, slots=True)
class Finish(Event):
    """The row ended.

    Attributes:
        reason: eos, stop, length (max_gen_toks), context (max_context) or loop.
        stop: what matched.
        unclosed: blocks still open.
    """

    reason: str
    stop: str | int | None
    unclosed: int


EVENTS: dict[str, type[Event]] = {
    e.__name__: e for e in (Prefill, Tokens, Open, Split, Close, Prune, Sweep, Fault, Illegal, Forced, Loop, Finish)
}


@dataclass(frozen=True)
class Statistics:
    """Counts of one request. The invariant ``prompt + generated - pruned = live`` holds for every one of them.

    Attributes:
        prompt_tokens: tokens of the prompt.
        generated_tokens: every token sampled, pruned later or not, the end token included.
        pruned_tokens: tokens thrown away by prunes.
        reforwarded_tokens: tokens forwarded for a second time, the price of policy recompute.
        live_tokens: live context at the end.
        peak_live_tokens: largest live context, the memory needed.
        live_token_steps: sum over generated tokens of the live context just after each, the area under the saw-tooth.
        prune_events: times at which something was thrown away; without an ablation, blocks closed with a prune.
        blocks: blocks closed, with or without a prune.
        max_depth: most blocks open at once.
        malformed: `Malformed` kind to count; kinds that did not occur are absent.
        illegal_tokens: tokens that the grammar forbids at their place; besides malformed markers those are ends and
            ``</think>`` within a block, and markers behind ``</think>``.
        forced: cause (the name of an option) to the number of tokens that came out otherwise than the model wanted.
        loops: times at which the trace was found to repeat itself.
        finish_reason: eos, stop, length, context or loop.
        wall_seconds: from admission to the batch until the end.
        tokens_per_second: generated_tokens / wall_seconds of this row alone; rows run side by side.
    """

    prompt_tokens: int = 0
    generated_tokens: int = 0
    pruned_tokens: int = 0
    reforwarded_tokens: int = 0
    live_tokens: int = 0
    peak_live_tokens: int = 0
    live_token_steps: int = 0
    prune_events: int = 0
    blocks: int = 0
    max_depth: int = 0
    malformed: dict[str, int] = field(default_factory=dict)
    illegal_tokens: int = 0
    forced: dict[str, int] = field(default_factory=dict)
    loops: int = 0
    finish_reason: str = ""
    wall_seconds: float = 0.0
    tokens_per_second: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Returns the fields as plain JSON values."""
        return asdict(self)


def statistics(events: Sequence[Event]) -> Statistics:
    """Counts what happened in one request."""
    count: Counter[str] = Counter()
    malformed: Counter[str] = Counter()
    forced: Counter[str] = Counter()
    live = peak = depth = 0
    reason, wall = "", 0.0
    for event in events:
        grown = 0  # tokens that stay in the context
        match event:
            case Prefill():
                count.update(prompt=event.tokens, pruned=event.tokens - event.live)
                live = event.live
                peak = max(peak, live)
            case Tokens():
                grown = len(event.ids)
            case Open() | Split() | Close():
                grown, depth = 1, max(depth, event.depth)
                count["blocks"] += isinstance(event, Close)
            case Prune():
                count.update(prunes=1, generated=1, steps=event.live, blocks=not isinstance(event, Sweep))
                count.update(pruned=len(event.pruned), reforwarded=event.reforwarded)
                live, peak = event.live, max(peak, event.peak)
            case Fault():
                malformed[event.kind] += 1
            case Illegal():
                count["illegal"] += 1
            case Forced():
                forced[event.cause] += 1
            case Loop():
                count["loops"] += 1
            case Finish():
                reason, wall = event.reason, event.time
                malformed.update({Malformed.UNCLOSED.value: event.unclosed} if event.unclosed else {})
        count.update(generated=grown, steps=grown * live + grown * (grown + 1) // 2)
        live += grown
        peak = max(peak, live)
    return Statistics(
        prompt_tokens=count["prompt"],
        generated_tokens=count["generated"],
        pruned_tokens=count["pruned"],
        reforwarded_tokens=count["reforwarded"],
        live_tokens=live,
        peak_live_tokens=peak,
        live_token_steps=count["steps"],
        prune_events=count["prunes"],
        blocks=count["blocks"],
        max_depth=depth,
        malformed=dict(malformed),
        illegal_tokens=count["illegal"],
        forced=dict(forced),
        loops=count["loops"],
        finish_reason=reason,
        wall_seconds=wall,
        tokens_per_second=count["generated"] / wall if wall > 0 else 0.0,
    )


class Recorder:
    """Turns the steps of one row into events."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.events: list[Event] = []
        self._clock, self._start = clock, clock()
        self._run: list[int] = []
        self._run_index = 0

    def prefill(self, tokens: int, live: int, shared: int) -> None:
        """The prompt has been read."""
        self.events.append(Prefill(self._now(), tokens, live, shared))

    def step(self, index: int, token: int, step: Step, live: int) -> None:
        """The token at `index` of the trace was generated; afterwards `live` tokens are in the context."""
        if step.malformed is not None:
            self._flush()
            self.events.append(Fault(self._now(), index, step.malformed.value))
        if step.kind is Kind.TEXT and not step.is_prune:
            if not self._run:
                self._run_index = index
            self._run.append(token)
            return
        self._flush()
        self.events.append(self._marker(index, token, step, live))

    def illegal(self, index: int, token: int, state: str) -> None:
        """The token about to be told of came where the grammar forbids it."""
        self._flush()
        self.events.append(Illegal(self._now(), index, token, state))

    def forced(self, index: int, token: int, cause: str, wanted: int) -> None:
        """The token about to be told of is not the one that the model wanted."""
        self._flush()
        self.events.append(Forced(self._now(), index, token, cause, wanted))

    def loop(self, index: int) -> None:
        """With the token at `index`, the last one told of, the trace repeats itself."""
        self._flush()
        self.events.append(Loop(self._now(), index))

    def finish(self, reason: str, stop: str | int | None, unclosed: int) -> None:
        """The row ended with `unclosed` blocks open."""
        self._flush()
        self.events.append(Finish(self._now(), reason, stop, unclosed))

    def _marker(self, index: int, token: int, step: Step, live: int) -> Event:
        now = self._now()
        if step.is_prune:
            again = sum(source < index for source in step.source)
            peak = step.rewind + len(step.forward) if step.drop else live
            kind = Sweep if step.kind is Kind.TEXT else Prune
            return kind(now, index, step.depth, token, step.pruned, again, peak, live)
        marker = {Kind.OPEN: Open, Kind.SPLIT: Split, Kind.CLOSE: Close}[step.kind]
        return marker(now, index, step.depth, token)

    def _flush(self) -> None:
        if self._run:
            self.events.append(Tokens(self._now(), self._run_index, tuple(self._run)))
            self._run = []

    def _now(self) -> float:
        return round(self._clock() - self._start, 6)
