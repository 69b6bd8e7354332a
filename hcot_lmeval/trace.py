"""The pruning rule. Everything else in this package is derived from this file; it imports the standard library alone.

A *trace* is the prompt and every token generated after it, nothing removed. The *live context* is what the model sees
of it. A *policy* says what happens when a block ``[open] thought [split] solution [close]`` is closed:

``off``        nothing; the baseline.
``recompute``  the thought is cut out of the text and the solution is read again without it. The live context is
               forwarded exactly as if the thought had never been there: the position of a token is its live index.
``evict``      ``[close]`` is read with the thought still visible, then the thought's keys and values are dropped. The
               solution keeps what it saw, and every token keeps the position it had in the trace.

`LiveContext` applies the rule token by token and says, as a `Step`, what a decoder has to do. `compile_trace` executes
the steps of a whole trace on paper: every forwarded token gets a position, a next-token target and a *death*, the index
of the first forwarded token that no longer sees it. Masks, losses and log-probabilities need nothing else:

    visible(q, k)  <=>  k <= q < death[k]

Malformed traces are data. Each malformed token has one meaning (see `Malformed`) and is reported in its step.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from hcot_lmeval.markup import MarkerIds

IGNORE = -100
"""Target of a forwarded token whose output predicts nothing (the convention of `torch.nn.CrossEntropyLoss`)."""


class Policy(StrEnum):
    """What the closing marker of a block does to the live context."""

    OFF = "off"
    RECOMPUTE = "recompute"
    EVICT = "evict"


class Kind(StrEnum):
    """The part that one token plays in the trace."""

    TEXT = "text"
    OPEN = "open"
    SPLIT = "split"
    CLOSE = "close"


class Malformed(StrEnum):
    """Departures from ``[open] thought [split] solution [close]``; `meaning` says what the rule makes of each.

    A step reports all but the last, which is known at the end alone.
    """

    meaning: str

    def __new__(cls, value: str, meaning: str = "") -> Malformed:
        member = str.__new__(cls, value)
        member._value_, member.meaning = value, meaning
        return member

    STRAY_SPLIT = "stray_split", "a splitting marker with no block open: plain text"
    STRAY_CLOSE = "stray_close", "a closing marker with no block open: plain text"
    UNSPLIT_CLOSE = "unsplit_close", "a block closed without a solution: it is over and nothing is pruned"
    REPEATED_SPLIT = "repeated_split", "a second splitting marker in one block: the solution starts at the last one"
    NESTED_OPEN = "nested_open", "an opening marker within a block, in a notation without nesting: plain text"
    MISSING_LEAD = "missing_lead", "a solution that lacks the notation's lead token: pruned like any other"
    UNCLOSED = "unclosed", "a block still open when the trace ends: it stays in the context"


class Step(NamedTuple):
    """What one token did, as instructions for whoever holds the keys and values of the live context.

    In this order: keep the first `rewind` rows, forward the tokens `forward` behind them, drop the row spans `drop`.
    The output of the last forwarded token predicts the next one.
    """

    kind: Kind
    malformed: Malformed | None
    depth: int
    """Blocks open after this token."""
    rewind: int
    """Rows that stay before anything is forwarded; all of them unless the policy is recompute and a block closed."""
    forward: tuple[int, ...]
    """Token ids to forward, never empty."""
    positions: tuple[int, ...]
    """Their position ids."""
    source: tuple[int, ...]
    """Their indices in the trace; those before the last one of the trace are forwarded for a second time."""
    drop: tuple[tuple[int, int], ...] = ()
    """Row spans [start, stop), ascending, that vanish after the forward."""
    pruned: tuple[int, ...] = ()
    """Indices in the trace of the tokens that left the live context: the thought, and markers that do not survive."""

    @property
    def is_prune(self) -> bool:
        return bool(self.pruned)


@dataclass(slots=True)
class _Block:
    """An open block; both fields are indices into the live context."""

    open: int
    split: int | None = None


Spans = tuple[tuple[int, int], ...]
"""Spans [start, stop) of the live context, ascending and apart from each other."""

_NO_MARKERS = MarkerIds(open=-1, split=-2, close=-3)
"""Ids that no vocabulary has."""


class LiveContext:
    """The live context of one trace, one token at a time.

    Args:
        markers: the marker ids, or None for a model without markers (then every token is text).
        policy: what a closing marker does.

    Attributes:
        live: token ids in the context, oldest first.
        source: for each of them its index in the trace.
        length: tokens pushed so far (the length of the trace).
        peak: the largest number of live tokens so far; a token that closes a block under ``evict`` counts before the
            thought is dropped, since that is when memory is needed.
    """

    def __init__(self, markers: MarkerIds | None, policy: Policy | str = Policy.RECOMPUTE) -> None:
        self.policy = Policy(policy)
        if markers is None and self.policy is not Policy.OFF:
            raise ValueError(f"policy {self.policy.value!r} needs marker ids; only 'off' runs without them")
        self.live: list[int] = []
        self.source: list[int] = []
        self.length = 0
        self.peak = 0
        self._blocks: list[_Block] = []
        self._marks = _NO_MARKERS if markers is None else markers
        self._acting = self._marks.ids

    @property
    def depth(self) -> int:
        """Blocks open now."""
        return len(self._blocks)

    @property
    def in_solution(self) -> bool:
        """Whether the innermost open block has its ``[split]`` behind it."""
        return bool(self._blocks) and self._blocks[-1].split is not None

    @property
    def thoughts(self) -> Spans:
        """The live spans of the thoughts of open blocks, with the markers that would go; one without end goes on."""
        spans: list[tuple[int, int]] = []
        for block in self._blocks:
            if block.split is None:
                return (*spans, (block.open + ("open" in self._marks.keep), len(self.live)))
            spans.append(self._thought(block.open, block.split))
        return tuple(spans)

    def rows_needed(self, token: int) -> int:
        """Returns how many live tokens have to fit at once for `push(token)`."""
        spans = self._spans_to_prune(token) if self.policy is Policy.RECOMPUTE else ()
        if not spans:
            return len(self.live) + 1
        after = len(self.live) - _size(spans) + self._survives(token)
        return max(len(self.live), after)

    def push_inert(self, token: int) -> Step:
        """Appends a token that cannot act, whatever it spells: the prompt's."""
        return self._append(token, Kind.TEXT)

    def push_text(self, count: int, token: int = -4) -> None:
        """Appends `count` tokens at once that cannot act, for those who count them; `token` stands for each."""
        self.live += [token] * count
        self.source += range(self.length, self.length + count)
        self.length += count
        self.peak = max(self.peak, len(self.live))

    def push(self, token: int) -> Step:
        """Appends one generated token and applies the rule."""
        if token not in self._acting:
            return self._append(token, Kind.TEXT)
        if token == self._marks.open:
            return self._open(token)
        if token == self._marks.split:
            return self._split(token)
        if token == self._marks.close:
            return self._close(token)
        return self._append(token, Kind.TEXT)

    def _append(self, token: int, kind: Kind, malformed: Malformed | None = None) -> Step:
        rows, index = len(self.live), self.length
        self.live.append(token)
        self.source.append(index)
        self.length += 1
        self.peak = max(self.peak, rows + 1)
        position = index if self.policy is Policy.EVICT else rows
        return Step(kind, malformed, len(self._blocks), rows, (token,), (position,), (index,))

    def _open(self, token: int) -> Step:
        if self._blocks and not self._marks.nested:
            return self._append(token, Kind.TEXT, Malformed.NESTED_OPEN)
        self._blocks.append(_Block(len(self.live)))
        return self._append(token, Kind.OPEN)

    def _split(self, token: int) -> Step:
        if not self._blocks:
            return self._append(token, Kind.TEXT, Malformed.STRAY_SPLIT)
        again = self._blocks[-1].split is not None
        self._blocks[-1].split = len(self.live)
        return self._append(token, Kind.SPLIT, Malformed.REPEATED_SPLIT if again else None)

    def _close(self, token: int) -> Step:
        if not self._blocks:
            return self._append(token, Kind.TEXT, Malformed.STRAY_CLOSE)
        spans = self._spans_to_prune(token)
        block = self._blocks.pop()
        if block.split is None:
            return self._append(token, Kind.CLOSE, Malformed.UNSPLIT_CLOSE)
        malformed = self._lead_fault(block.split)
        if not spans:
            return self._append(token, Kind.CLOSE, malformed)
        prune = self._recompute if self.policy is Policy.RECOMPUTE else self._evict
        return prune(token, spans)._replace(malformed=malformed)

    def _lead_fault(self, split: int) -> Malformed | None:
        lead = self._marks.lead
        if lead is None or self.live[split + 1 : split + 2] == [lead]:
            return None
        return Malformed.MISSING_LEAD

    def _spans_to_prune(self, token: int) -> Spans:
        """The live spans, ascending, that leave the context with `push(token)`; asking changes nothing."""
        block = self._blocks[-1] if self._blocks else None
        if self.policy is Policy.OFF or token != self._marks.close or block is None or block.split is None:
            return ()
        start, stop = self._thought(block.open, block.split)
        empty = start == stop and "close" in self._marks.keep  # between surviving markers: nothing to throw away
        return () if empty else ((start, stop),)

    def _survives(self, token: int) -> bool:
        """Whether `token`, with which spans leave the context, stays itself."""
        return "close" in self._marks.keep

    def _thought(self, open: int, split: int) -> tuple[int, int]:
        """The live span that a prune removes: the thought and the markers around it that do not survive."""
        keep = self._marks.keep
        return open + ("open" in keep), split + ("split" not in keep)

    def _recompute(self, token: int, spans: Spans) -> Step:
        start = spans[0][0]
        pruned = self._cut(spans)
        tail, source = self.live[start:], self.source[start:]
        alone = not tail and start == 0  # nothing else would survive, and the next token has to follow something
        if alone or self._survives(token):
            tail, source = [*tail, token], [*source, self.length]
        else:
            pruned.append(self.length)
        if not tail:  # nothing survives behind the prefix: its last token is read again, for an output to sample from
            start -= 1
            tail, source = [self.live[start]], [self.source[start]]
        self.live[start:], self.source[start:] = tail, source
        self.length += 1
        positions = tuple(range(start, start + len(tail)))
        return Step(
            Kind.CLOSE, None, len(self._blocks), start, tuple(tail), positions, tuple(source), (), tuple(pruned)
        )

    def _evict(self, token: int, spans: Spans) -> Step:
        step = self._append(token, Kind.CLOSE)
        end = len(self.live)
        if not self._survives(token):
            spans = (*spans, (end - 1, end))
        return step._replace(drop=spans, pruned=tuple(self._cut(spans)))

    def _cut(self, spans: Spans) -> list[int]:
        """Removes live spans and returns their `source`. By slices: thoughts are long, and rows wait meanwhile."""
        pruned: list[int] = []
        for start, stop in spans:
            pruned += self.source[start:stop]
        for start, stop in reversed(spans):
            del self.live[start:stop], self.source[start:stop]
        return pruned


def _size(spans: Spans) -> int:
    return sum(stop - start for start, stop in spans)


@dataclass(frozen=True)
class Plan:
    """A compiled trace: the tokens that an exact decoder forwards, in that order. All lists but `live` have one length.

    Attributes:
        ids: token ids.
        positions: position ids.
        death: ``visible(q, k) <=> k <= q < death[k]``; `len(ids)` for tokens that outlive the trace.
        targets: the token that each output predicts, or `IGNORE`. Every generated token is a target exactly once.
        source: index of each token in the trace; under ``recompute`` some appear more than once.
        live: the rows of `ids` that are in the live context at the end.
    """

    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    death: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    source: list[int] = field(default_factory=list)
    live: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.ids)

    def visible(self, query: int, key: int) -> bool:
        """The whole attention mask."""
        return key <= query < self.death[key]


_ALIVE = 1 << 62


def compile_trace(
    ids: Sequence[int],
    prompt_len: int,
    markers: MarkerIds | None,
    policy: Policy | str = Policy.RECOMPUTE,
    *,
    prompt_acts: bool = False,
) -> Plan:
    """Compiles a trace into what an exact decoder forwards.

    Args:
        ids: the trace, prompt first, nothing removed.
        prompt_len: tokens of `ids` that are the prompt; at least 1, for the first generated token needs a predecessor.
        markers: the marker ids; None only with policy ``off``.
        policy: what a closing marker does.
        prompt_acts: whether markers in the prompt act too (few-shot traces); by default they are text.

    Raises:
        ValueError: `prompt_len` is not within 1..len(ids).
    """
    if not 1 <= prompt_len <= len(ids):
        raise ValueError(f"prompt_len={prompt_len} is outside 1..{len(ids)} (the trace's length)")
    return compile_in(LiveContext(markers, policy), ids, prompt_len, prompt_acts=prompt_acts)


def compile_in(context: LiveContext, ids: Sequence[int], prompt_len: int, *, prompt_acts: bool = False) -> Plan:
    """Compiles a trace in a fresh live context of any kind; see `compile_trace`."""
    plan = Plan()
    for index, token in enumerate(ids):
        inert = index < prompt_len and not prompt_acts
        step = context.push_inert(token) if inert else context.push(token)
        if index >= prompt_len:
            plan.targets[-1] = token
        _execute(step, plan)
    plan.death[:] = [min(death, len(plan)) for death in plan.death]
    return plan


def _execute(step: Step, plan: Plan) -> None:
    _end_rows(plan, step.rewind, len(plan.live))
    for token, position, source in zip(step.forward, step.positions, step.source, strict=True):
        plan.live.append(len(plan.ids))
        plan.ids.append(token)
        plan.positions.append(position)
        plan.death.append(_ALIVE)
        plan.targets.append(IGNORE)
        plan.source.append(source)
    for start, stop in reversed(step.drop):
        _end_rows(plan, start, stop)


def _end_rows(plan: Plan, start: int, stop: int) -> None:
    """The live rows [start, stop) are seen by nobody from now on."""
    for row in plan.live[start:stop]:
        plan.death[row] = len(plan.ids)
    del plan.live[start:stop]


def live_ids(
    ids: Sequence[int], prompt_len: int, markers: MarkerIds | None, policy: Policy | str = Policy.RECOMPUTE
) -> list[int]:
    """Returns the live context at the end of a trace."""
    context = LiveContext(markers, policy)
    for token in ids[:prompt_len]:
        context.push_inert(token)
    push_all(context, ids[prompt_len:])
    return context.live


def push_all(context: LiveContext, tokens: Iterable[int]) -> list[Step]:
    """Pushes generated tokens and returns their steps."""
    return [context.push(token) for token in tokens]
