"""Where every token of a trace ended up: segments, blocks and the live context over time.

All of it follows from replaying the trace in a `LiveContext`; nothing here has an idea of its own of what a block is.
A trace that the engine wrote down is replayed too, and what the engine noted has to come out again, event by event.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

from hcot_lmeval.events import Event, Forced, Illegal, Loop, Recorder, Statistics, statistics
from hcot_lmeval.report.viewer.reading import Trace, ViewerError
from hcot_lmeval.trace import Kind, LiveContext, Malformed, Step


@dataclass(slots=True)
class Segment:
    """Neighbouring tokens of one kind and one fate; a marker is a segment of its own.

    Attributes:
        kind: text, open, split or close.
        start: index in the trace of the first token.
        count: how many tokens.
        depth: blocks open after it; for ``open`` and ``close`` this is within and around the block.
        gone: index of the token that threw it out of the live context, or None if it is live at the end.
        fault: the `Malformed` kind of the token; such a token is a segment of its own.
    """

    kind: Kind
    start: int
    count: int
    depth: int
    gone: int | None = None
    fault: Malformed | None = None

    @property
    def stop(self) -> int:
        return self.start + self.count

    def alive(self, moment: int) -> bool:
        """Whether it was in the live context just after the token at index `moment`."""
        return self.start <= moment and (self.gone is None or self.gone > moment)


@dataclass(slots=True)
class Block:
    """One block as written. Counts are tokens of the trace, blocks within included, markers of this block excluded.

    Attributes:
        open: index of its opening marker in `Outline.segments`.
        depth: blocks open within it, 1 for an outermost block.
        split: index of the segment where the solution starts (of a repeated split the last), or None.
        close: index of the segment that closes it, or None.
        thought: tokens written before the solution.
        solution: tokens written in the solution.
        pruned: tokens that left the live context when it closed.
    """

    open: int
    depth: int
    split: int | None = None
    close: int | None = None
    thought: int = 0
    solution: int = 0
    pruned: int = 0


@dataclass
class Outline:
    """A trace, replayed.

    Attributes:
        segments: the generated tokens in order, without gaps.
        blocks: in the order of opening.
        growth: the live context over time in runs. ``(g, after)``: g tokens came, each one live token more, and then
            one that threw something away and left `after` live tokens; the last run has None.
        started: live tokens after the prompt.
        live: indices in the trace of what is live at the end.
        events: what a `Recorder` tells of this trace, without times.
        remarks: what was noted of the decoder's controls, which no replay can know.
        statistics: counted from events and remarks.
    """

    segments: list[Segment]
    blocks: list[Block]
    growth: list[tuple[int, int | None]]
    started: int
    live: list[int]
    events: list[Event]
    remarks: list[Event] = field(default_factory=list)

    @cached_property
    def statistics(self) -> Statistics:
        return statistics([*self.events, *self.remarks])


def outline_of(trace: Trace) -> Outline:
    """Replays a trace.

    Raises:
        ViewerError: the engine noted something else than the replay tells.
    """
    outline = replay(trace.context(), trace.prompt_ids, trace.ids, trace.finish, trace.prompt_acts)
    if trace.recorded is not None:
        _compare(trace, outline.events)
        outline.remarks = [_as_event(event) for event in trace.recorded if event["type"] in REMARKS]
    return outline


IRRELEVANT = {"time", "shared", "stop", "pruned_text"}
"""Fields of noted events that a replay cannot know."""


REMARKS: dict[str, type[Event]] = {kind.__name__: kind for kind in (Illegal, Forced, Loop)}
"""Events that tell of the decoder and not of the trace."""


def _as_event(record: Mapping[str, Any]) -> Event:
    kind = REMARKS[record["type"]]
    return kind(**{f.name: record[f.name] for f in fields(kind)})


def _without_remarks(noted: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Noted events as they would be without remarks, which part runs of text."""
    kept: list[dict[str, Any]] = []
    parted = False
    for event in noted:
        if event["type"] in REMARKS:
            parted = True
        elif parted and kept and kept[-1]["type"] == event["type"] == "Tokens":
            kept[-1] = {**kept[-1], "ids": [*kept[-1]["ids"], *event["ids"]]}
            parted = False
        else:
            kept.append(event)
            parted = False
    return kept


def _compare(trace: Trace, events: Sequence[Event]) -> None:
    noted = _without_remarks(_bare(event) for event in trace.recorded or ())
    again = [_bare(_as_record(event)) for event in events]
    if noted == again:
        return
    pairs = enumerate(zip(noted, again, strict=False))
    place = next((i for i, (a, b) in pairs if a != b), min(len(noted), len(again)))
    told, found = (str(events[place : place + 1])[:200] for events in (noted, again))
    raise ViewerError(
        f"{trace.name}: event {place + 1} of the notes is {told}, and a replay of the tokens says {found}; "
        "the notes were changed, or written by a version with another rule"
    )


def _as_record(event: Event) -> dict[str, Any]:
    return {"type": type(event).__name__, **{f.name: getattr(event, f.name) for f in fields(event)}}


def _bare(event: Mapping[str, Any]) -> dict[str, Any]:
    listed = ((key, list(value) if isinstance(value, tuple) else value) for key, value in event.items())
    return {key: value for key, value in listed if key not in IRRELEVANT}


def replay(
    context: LiveContext, prompt: Sequence[int], ids: Sequence[int], finish: str = "", prompt_acts: bool = False
) -> Outline:
    """Pushes a trace through a fresh live context and writes down what becomes of every token.

    Args:
        context: a live context of any kind to which nothing was pushed yet.
        prompt: token ids of the prompt.
        ids: generated token ids.
        finish: why the generation ended, for the events.
        prompt_acts: whether markers of the prompt open and close blocks.
    """
    recorder = Recorder(clock=lambda: 0.0)
    for token in prompt:
        _ = context.push(token) if prompt_acts else context.push_inert(token)
    recorder.prefill(len(prompt), len(context.live), 0)
    writer = _Writer(context)
    for index, token in enumerate(ids, len(prompt)):
        step = context.push(token)
        recorder.step(index, token, step, len(context.live))
        writer.take(index, step)
    recorder.finish(finish, None, context.depth)
    return writer.outline(recorder.events, len(prompt))


class _Writer:
    """Collects kinds and fates token by token; a fate is known only when a later token seals it."""

    def __init__(self, context: LiveContext) -> None:
        self._context = context
        self._started = len(context.live)
        self._inside = list(context.source)  # trace indices in the context, kept up to date at prunes
        self._gone: dict[int, int] = {}
        self._steps: list[tuple[int, Kind, int, Malformed | None]] = []  # marked tokens: index, kind, depth, fault
        self._pruned: dict[int, int] = {}
        self._growth: list[tuple[int, int | None]] = []
        self._since = 0  # plain tokens since the last prune
        self._next = context.length

    def take(self, index: int, step: Step) -> None:
        self._inside.append(index)
        self._next = index + 1
        if step.kind is not Kind.TEXT or step.malformed is not None:
            self._steps.append((index, step.kind, step.depth, step.malformed))
        if not step.is_prune:
            self._since += 1
            return
        still = set(self._context.source)
        self._gone.update((i, index) for i in self._inside if i not in still)
        self._inside = [i for i in self._inside if i in still]
        self._pruned[index] = len(step.pruned)
        self._growth.append((self._since, len(self._context.live)))
        self._since = 0

    def outline(self, events: list[Event], prompt_len: int) -> Outline:
        segments = self._segments(prompt_len)
        return Outline(
            segments=segments,
            blocks=_blocks(segments, self._pruned),
            growth=[*self._growth, (self._since, None)],
            started=self._started,
            live=list(self._context.source),
            events=events,
        )

    def _segments(self, start: int) -> list[Segment]:
        segments: list[Segment] = []
        depth = 0
        for index, kind, depth_after, fault in self._steps:
            segments += self._runs(start, index, depth)
            segments.append(Segment(kind, index, 1, depth_after, self._gone.get(index), fault))
            start, depth = index + 1, depth_after
        return segments + self._runs(start, self._next, depth)

    def _runs(self, start: int, stop: int, depth: int) -> list[Segment]:
        """The text between two marked tokens, cut where the fate changes."""
        runs: list[Segment] = []
        for index in range(start, stop):
            gone = self._gone.get(index)
            if runs and runs[-1].gone == gone:
                runs[-1].count += 1
            else:
                runs.append(Segment(Kind.TEXT, index, 1, depth, gone))
        return runs


def _blocks(segments: Sequence[Segment], pruned: dict[int, int]) -> list[Block]:
    """Pairs the markers. A block of the prompt that a generated marker splits or closes has no place here."""
    blocks: list[Block] = []
    waiting: list[Block] = []
    for place, segment in enumerate(segments):
        if segment.kind is Kind.OPEN:
            waiting.append(Block(place, segment.depth))
            blocks.append(waiting[-1])
        elif segment.kind is Kind.SPLIT and waiting and waiting[-1].depth == segment.depth:
            waiting[-1].split = place
        elif segment.kind is Kind.CLOSE and waiting and waiting[-1].depth == segment.depth + 1:
            block = waiting.pop()
            block.close, block.pruned = place, pruned.get(segment.start, 0)
    for block in blocks:
        _count(block, segments)
    return blocks


def _count(block: Block, segments: Sequence[Segment]) -> None:
    begin = segments[block.open].start + 1
    end = segments[-1].stop if block.close is None else segments[block.close].start
    middle = end if block.split is None else segments[block.split].start
    block.thought = middle - begin
    block.solution = 0 if block.split is None else end - middle - 1
