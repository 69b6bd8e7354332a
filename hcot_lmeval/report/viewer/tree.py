"""Where every token of a trace ended up: segments, blocks and the live context over time, as its events tell it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from hcot_lmeval.events import (
    Close,
    Event,
    Fault,
    Marker,
    Open,
    Prefill,
    Prune,
    Split,
    Statistics,
    Sweep,
    Tokens,
    statistics,
)
from hcot_lmeval.report.viewer.reading import Trace, ViewerError
from hcot_lmeval.trace import Kind, Malformed


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
    """What became of a trace.

    Attributes:
        events: in order.
        segments: the generated tokens in order, without gaps.
        blocks: in the order of opening.
        growth: the live context over time in runs. ``(g, after)``: g tokens came, each one live token more, and then
            one that threw something away and left `after` live tokens; the last run has None.
        started: live tokens after the prompt.
    """

    events: Sequence[Event]
    segments: list[Segment]
    blocks: list[Block]
    growth: list[tuple[int, int | None]]
    started: int

    @cached_property
    def statistics(self) -> Statistics:
        return statistics(self.events)


KINDS = {Open: Kind.OPEN, Split: Kind.SPLIT, Close: Kind.CLOSE, Prune: Kind.CLOSE, Sweep: Kind.TEXT}


def outline_of(first: int, events: Sequence[Event]) -> Outline:
    """Reads what became of every token off the events of a trace.

    Args:
        first: index of the first generated token.
        events: what happened to it and all that follow.
    """
    marked: dict[int, Segment] = {}
    gone: dict[int, int] = {}
    pruned: dict[int, int] = {}
    growth: list[tuple[int, int | None]] = []
    started = count = grown = depth = 0
    for event in events:
        if isinstance(event, Prefill):
            started = event.live
        elif isinstance(event, Fault):  # comes before the token that it is about
            marked[event.index] = Segment(Kind.TEXT, event.index, 1, depth, fault=Malformed(event.kind))
        elif isinstance(event, Tokens):
            count, grown = count + len(event.ids), grown + len(event.ids)
        elif isinstance(event, Marker):
            count, grown, depth = count + 1, grown + 1, event.depth
            if not isinstance(event, Sweep):
                fault = marked[event.index].fault if event.index in marked else None
                marked[event.index] = Segment(KINDS[type(event)], event.index, 1, depth, fault=fault)
            if isinstance(event, Prune):
                gone.update(dict.fromkeys(event.pruned, event.index))
                pruned[event.index] = len(event.pruned)
                growth.append((grown - 1, event.live))
                grown = 0
    segments = _segments(marked, gone, first, first + count)
    return Outline(events, segments, _blocks(segments, pruned), [*growth, (grown, None)], started)


def _segments(marked: Mapping[int, Segment], gone: Mapping[int, int], start: int, stop: int) -> list[Segment]:
    """The tokens [start, stop): the marked ones, and between them text, cut where the fate changes."""
    segments: list[Segment] = []
    depth = 0
    for index in range(start, stop):
        segment, fate, last = marked.get(index), gone.get(index), segments[-1] if segments else None
        if segment is not None:
            segment.gone, depth = fate, segment.depth
            segments.append(segment)
        elif last is not None and last.start not in marked and last.gone == fate:
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
    """Returns where each segment begins in the text, and at last where the text ends.

    Raises:
        ViewerError: the notes do not say it.
    """
    try:
        return [*(trace.offsets[segment.start] for segment in segments), len(trace.text)]
    except KeyError as error:
        raise ViewerError(f"{trace.name}: nothing says where token {error} begins; were the notes changed?") from None


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
