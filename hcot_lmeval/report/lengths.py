"""How long thoughts and solutions are, how deep blocks go, and how the live context grows and falls: from notes.

This module imports the standard library alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from hcot_lmeval.events import Close, Open, Prefill, Prune, Split, Sweep, Tokens
from hcot_lmeval.notes import Note


@dataclass
class BlockLengths:
    """Of the blocks that were closed: tokens between their markers, blocks within them included.

    Attributes:
        thoughts: between opening and splitting marker.
        solutions: between splitting and closing marker.
        depths: blocks open just after the opening marker, 1 for the outermost.
    """

    thoughts: list[int] = field(default_factory=list)
    solutions: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)

    @classmethod
    def joined(cls, parts: Iterable[BlockLengths]) -> BlockLengths:
        """Returns the blocks of all parts."""
        whole = cls()
        for part in parts:
            whole.thoughts += part.thoughts
            whole.solutions += part.solutions
            whole.depths += part.depths
        return whole


def block_lengths(note: Note) -> BlockLengths:
    """Returns the lengths of the blocks that one response closed; a block without a solution is left out."""
    found = BlockLengths()
    stack: list[tuple[Open, int | None]] = []
    for event in note.events:
        if isinstance(event, Open):
            stack.append((event, None))
        elif isinstance(event, Split) and stack:
            stack[-1] = (stack[-1][0], event.index)
        elif isinstance(event, (Close, Prune)) and not isinstance(event, Sweep) and stack:
            opened, split = stack.pop()
            if split is not None:
                found.thoughts.append(split - opened.index - 1)
                found.solutions.append(event.index - split - 1)
                found.depths.append(opened.depth)
    return found


def live_curve(note: Note) -> list[int]:
    """Returns the live tokens after the prompt and after each generated token."""
    live: list[int] = []
    for event in note.events:
        if isinstance(event, Prefill):
            live.append(event.live)
        elif isinstance(event, Tokens):
            live += range(live[-1] + 1, live[-1] + 1 + len(event.ids))
        elif isinstance(event, Prune):
            live.append(event.live)
        elif isinstance(event, (Open, Split, Close)):
            live.append(live[-1] + 1)
    return live
