"""Where every token of a trace ended up: segments, blocks and the live context over time.

All of it follows from replaying the trace in a `LiveContext`; nothing here has an idea of its own of what a block is.
A trace that the engine wrote down is replayed too, and what the engine noted has to come out again, event by event.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

from hcot_lmeval.events import (
    Close,
    Event,
    Forced,
    Illegal,
    Loop,
    Open,
    Prefill,
    Prune,
    Recorder,
    Split,
    Statistics,
    Tokens,
    statistics,
)
from hcot_lmeval.report.viewer.reading import Trace, ViewerError
from hcot_lmeval.trace import Kind, LiveContext, Malformed


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
        noted = [event for event in trace.recorded if event["type"] in REMARKS]
        kinds = [REMARKS[event["type"]] for event in noted]
        outline.remarks = [
            kind(**{f.name: event[f.name] for f in fields(kind)}) for kind, event in zip(kinds, noted, strict=True)
        ]
    return outline


IRRELEVANT = {"time", "shared", "stop", "pruned_text"}
"""Fields of noted events that a replay cannot know."""

REMARKS: dict[str, type[Event]] = {kind.__name__: kind for kind in (Illegal, Forced, Loop)}
"""Events that tell of the decoder and not of the trace."""


def _compare(trace: Trace, events: Sequence[Event]) -> None:
    noted = _without_remarks(_bare(event) for event in trace.recorded or ())
    again = [_bare({"type": type(e).__name__, **{f.name: getattr(e, f.name) for f in fields(e)}}) for e in events]
    if noted == again:
        return
    pairs = enumerate(zip(noted, again, strict=False))
    place = next((i for i, (a, b) in pairs if a != b), min(len(noted), len(again)))
    told, found = (str(events[place : place + 1])[:200] for events in (noted, again))
    raise ViewerError(
        f"{trace.name}: event {place + 1} of the notes is {told}, and a replay of the tokens says {found}; "
        "the notes were changed, or written by a version with another rule"
    )


def _without_remarks(noted: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Noted events as they would be without remarks, which part runs of text."""
    kept: list[dict[str, Any]] = []
    parted = False
    for event in noted:
        if event["type"] in REMARKS:
            parted = True
            continue
        if parted and kept and kept[-1]["type"] == event["type"] == "Tokens":
            kept[-1] = {**kept[-1], "ids": [*kept[-1]["ids"], *event["ids"]]}
        else:
            kept.append(event)
        parted = False
    return kept


def _bare(event: Mapping[str, Any]) -> dict[str, Any]:
    listed = ((key, list(value) if isinstance(value, tuple) else value) for key, value in event.items())
    return {key: value for key, value in listed if key not in IRRELEVANT}


def replay(
    context: LiveContext, prompt: Sequence[int], ids: Sequence[int], finish: str = "", prompt_acts: bool = False
) -> Outline:
    """Pushes a trace through a fresh live context and writes down what becomes of every token.

    With `prompt_acts`, markers of the prompt open and close blocks too.
    """
    recorder = Recorder(clock=lambda: 0.0)
    for token in prompt:
        _ = context.push(token) if prompt_acts else context.push_inert(token)
    started = len(context.live)
    recorder.prefill(len(prompt), started, 0)
    inside = list(context.source)  # trace indices in the context, kept up to date at prunes
    gone: dict[int, int] = {}
    marked: list[Segment] = []
    pruned: dict[int, int] = {}
    growth: list[tuple[int, int | None]] = []
    grown = 0  # tokens since the last prune
    for index, token in enumerate(ids, len(prompt)):
        step = context.push(token)
        recorder.step(index, token, step, len(context.live))
        inside.append(index)
        if step.kind is not Kind.TEXT or step.malformed is not None:
            marked.append(Segment(step.kind, index, 1, step.depth, fault=step.malformed))
        grown += 1
        if step.is_prune:
            still = set(context.source)
            gone.update((i, index) for i in inside if i not in still)
            inside = [i for i in inside if i in still]
            pruned[index] = len(step.pruned)
            growth.append((grown - 1, len(context.live)))
            grown = 0
    recorder.finish(finish, None, context.depth)
    segments = _segments(marked, gone, len(prompt), len(prompt) + len(ids))
    live, blocks = list(context.source), _blocks(segments, pruned)
    return Outline(segments, blocks, [*growth, (grown, None)], started, live, recorder.events)


def _segments(marked: Sequence[Segment], gone: Mapping[int, int], start: int, stop: int) -> list[Segment]:
    """The tokens [start, stop): the marked ones, and between them text, cut where the fate changes."""
    segments: list[Segment] = []
    at = {segment.start: segment for segment in marked}
    depth = 0  # a token's fate is known only when a later one seals it, hence at the end
    for index in range(start, stop):
        segment, fate, last = at.get(index), gone.get(index), segments[-1] if segments else None
        if segment is not None:
            segment.gone, depth = fate, segment.depth
            segments.append(segment)
        elif last is not None and last.start not in at and last.gone == fate:
            last.count += 1
        else:
            segments.append(Segment(Kind.TEXT, index, 1, depth, fate))
    return segments


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
        begin = segments[block.open].start + 1
        end = segments[-1].stop if block.close is None else segments[block.close].start
        middle = end if block.split is None else segments[block.split].start
        block.thought = middle - begin
        block.solution = 0 if block.split is None else end - middle - 1
    return blocks


def borders(trace: Trace, segments: Sequence[Segment]) -> list[int]:
    """Returns where each segment begins in the text, and at last where the text ends."""
    first = len(trace.prompt_ids)
    return [*(trace.offsets[segment.start - first] for segment in segments), len(trace.text)]


def live_curve(events: Iterable[Event]) -> list[int]:
    """Returns the live tokens after the prompt and after each generated token."""
    live: list[int] = []
    for event in events:
        if isinstance(event, (Prefill, Prune)):
            live.append(event.live)
        elif isinstance(event, Tokens):
            live += range(live[-1] + 1, live[-1] + 1 + len(event.ids))
        elif isinstance(event, (Open, Split, Close)):
            live.append(live[-1] + 1)
    return live
