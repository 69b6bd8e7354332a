"""Where the blocks of a trace are, apart from its words: an outline over numbered sentences.

    pieces = split_sentences(text)                       # "".join(pieces) == text
    outline = Outline(len(pieces), (Block(1, 4, split=3), Block(4, 6, solution="So x = 3.")))
    trace = assemble(pieces, outline, markup)            # 0[THOUGHT]1 2[SOLUTION]3[RETURN][THOUGHT]4 5[SOLUTION]So x
                                                                                                     # = 3.[RETURN]6

Whoever finds the blocks, a teacher or `prepare.segmenter`, only ever names numbers, so that the words cannot change.
What is added is the markers and the solutions of those blocks that have none of their own in the text.

An `Outline` is valid or does not exist; faults are a `Refused` with one of the codes in `reasons.CODES`.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

from pydantic import BaseModel, ValidationError

from hcot_lmeval.markup import PRESETS, Markup
from hcot_lmeval.prepare.reasons import Refused

KINDS = ("subproblem", "backtrack")
"""A part of the way; a dead end or redundant branch that was wrapped afterwards."""


@dataclass(frozen=True)
class Block:
    """A thought over sentences, and what came out of it.

    Attributes:
        start: index of the first sentence of the thought.
        stop: one past the last sentence of the block.
        solution: words that are added because the text has none. The thought is then [start, stop).
        split: first sentence of the solution where it stands in the text, [split, stop). The thought is then
            [start, split). Exactly one of `solution` and `split` is given.
        kind: one of `KINDS`.

    Raises:
        Refused: the block makes no sense, whatever it is over.
    """

    start: int
    stop: int
    solution: str | None = None
    split: int | None = None
    kind: str = "subproblem"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise Refused("unknown_kind", f"{self} in place of {' or '.join(KINDS)}")
        if self.start < 0:
            raise Refused("out_of_range", f"{self} begins before sentence 0")
        if self.start >= self.stop or self.split == self.start:
            raise Refused("empty_block", f"{self}")
        if self.solution is not None and self.split is not None:
            raise Refused("both_solutions", f"{self}")
        if (self.split is None and not (self.solution or "").strip()) or self.split == self.stop:
            raise Refused("empty_solution", f"{self}")
        if self.split is not None and not self.start < self.split < self.stop:
            raise Refused("out_of_range", f"{self} is split outside of itself")
        if found := spelled_markers(self.solution or ""):
            raise Refused("marker_in_solution", f"{', '.join(found)} in {self}")

    def __str__(self) -> str:
        return f"the block over sentences {self.start} to {self.stop - 1}"

    @property
    def thought(self) -> range:
        """The sentences of the thought."""
        return range(self.start, self.stop if self.split is None else self.split)

    def holds(self, other: Block) -> bool:
        """Whether `other` lies within the thought, or within the solution."""
        parts = (self.start, len(self.thought) + self.start, self.stop)
        return any(low <= other.start and other.stop <= high for low, high in pairwise(parts))


@dataclass(frozen=True)
class Outline:
    """Properly nested blocks over sentences.

    Attributes:
        sentences: how many there are.
        blocks: in the order in which they open. They may be given in any order; of two over the same sentences the
            one that comes first is the outer one.

    Raises:
        Refused: a block ends behind the last sentence, or two blocks overlap.
    """

    sentences: int
    blocks: tuple[Block, ...] = ()

    def __post_init__(self) -> None:
        ordered = tuple(sorted(self.blocks, key=lambda block: (block.start, -block.stop)))
        object.__setattr__(self, "blocks", ordered)
        for block in ordered:
            if block.stop > self.sentences:
                raise Refused("out_of_range", f"{block}, of which there are {self.sentences}")
        for _ in self._stacks():
            pass

    @property
    def depth(self) -> int:
        """The largest number of blocks within each other; 0 without blocks."""
        return max((len(stack) for stack in self._stacks()), default=0)

    def require_depth(self, limit: int) -> None:
        """Raises a `Refused` (``too_deep``) where blocks are nested deeper than `limit`."""
        for stack in self._stacks():
            if len(stack) > limit:
                raise Refused("too_deep", f"{stack[-1]} has depth {len(stack)}, allowed is {limit}")

    def _stacks(self) -> Iterator[list[Block]]:
        """Yields for each block those that are open when it opens, itself the last."""
        stack: list[Block] = []
        for block in self.blocks:
            while stack and stack[-1].stop <= block.start:
                stack.pop()
            if stack and not stack[-1].holds(block):
                raise Refused("overlap", f"{stack[-1]} and {block}")
            stack.append(block)
            yield stack

    def to_json(self) -> dict[str, Any]:
        """Returns plain values; defaults are left out."""
        optional = {"split": None, "solution": None, "kind": KINDS[0]}
        blocks = [
            {"start": block.start, "stop": block.stop}
            | {key: getattr(block, key) for key, default in optional.items() if getattr(block, key) != default}
            for block in self.blocks
        ]
        return {"sentences": self.sentences, "blocks": blocks}

    @classmethod
    def from_json(cls, data: Any) -> Outline:
        """Reads what `to_json` has written, or what a teacher has.

        Raises:
            Refused: ``not_an_outline``, or what the blocks amount to.
        """
        try:
            found = _OutlineData.model_validate(data)
        except ValidationError as error:
            faults = (f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())
            raise Refused("not_an_outline", "; ".join(faults)) from None
        return cls(found.sentences, tuple(Block(**block.model_dump(exclude_none=True)) for block in found.blocks))


class _BlockData(BaseModel, extra="forbid", strict=True):
    start: int
    stop: int
    solution: str | None = None
    split: int | None = None
    kind: str | None = None


class _OutlineData(BaseModel, extra="forbid", strict=True):
    sentences: int
    blocks: list[_BlockData]


def assemble(pieces: Sequence[str], outline: Outline, markup: Markup) -> str:
    """Writes the trace: every piece untouched, markers and added solutions between them.

    Raises:
        Refused: ``other_pieces``, ``too_deep`` for a notation without nesting, ``marker_in_source``,
            ``marker_in_solution`` (for a notation that is no preset).
    """
    if len(pieces) != outline.sentences:
        raise Refused("other_pieces", f"{len(pieces)} in place of {outline.sentences}")
    if not markup.nested:
        outline.require_depth(1)
    _refuse_markers("".join(pieces), outline, markup)
    split = markup.split + (markup.lead or "")
    out: list[str] = []
    marks: set[int] = set()  # their places in `out`
    opening = list(reversed(outline.blocks))
    stack: list[Block] = []

    def mark(text: str) -> None:
        marks.add(len(out))
        out.append(text)

    for index in range(len(pieces) + 1):
        while stack and stack[-1].stop == index:
            if (solution := stack.pop().solution) is not None:
                mark(split)
                out.append(solution)
            mark(markup.close)
        if stack and stack[-1].split == index:
            mark(split)
        while opening and opening[-1].start == index:
            stack.append(opening.pop())
            mark(markup.open)
        out += pieces[index : index + 1]
    trace, starts = "".join(out), accumulate(map(len, out), initial=0)
    pattern = "|".join(map(re.escape, sorted((markup.open, split, markup.close), key=len, reverse=True)))
    found = [mark.start() for mark in re.finditer(pattern, trace)]
    if found != [start for place, start in enumerate(starts) if place in marks]:  # what text and marker spell together
        raise Refused("marker_in_source", "where a marker meets the words around it")
    return trace


def _refuse_markers(text: str, outline: Outline, markup: Markup) -> None:
    if found := spelled_markers(text, markup):
        raise Refused("marker_in_source", f"{', '.join(found)} in it")
    for block in outline.blocks:
        if found := spelled_markers(block.solution or "", markup):
            raise Refused("marker_in_solution", f"{', '.join(found)} in {block}")


# --- text that spells a control token: it would open a block, or end one, where nobody meant to -----------------------

CONTROL = re.compile(r"<\|[^\s<>|]{1,40}\|>|</?s>|<(?:bos|eos|pad|unk|mask|start_of_turn|end_of_turn)>")
"""What control tokens look like: ``<|im_end|>``, in their compatibility form DeepSeek's, ``<pad>``, ``</s>``."""
UNSEEN = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180f\u3164\uffa0")
"""Characters without a glyph that are not of the category Cf; variation selectors are found by their range."""


def spelled_markers(text: str, markup: Markup | None = None) -> list[str]:
    """Returns the markers and thinking tokens that a text spells: of `markup`, or of any preset.

    A text is searched as it stands and folded: full-width brackets, mathematical letters and zero-width spaces hide
    nothing.
    """
    markups = PRESETS.values() if markup is None else (markup,)
    marks = dict.fromkeys(mark for each in markups for mark in (*each.markers, *each.think))
    folded = fold(text)
    return [mark for mark in marks if mark in text or fold(mark) in folded]


def find_control(text: str) -> str | None:
    """Returns the first text that looks like a control token of some vocabulary, or None."""
    found = CONTROL.search(fold(text))
    return found.group() if found else None


def fold(text: str) -> str:
    """Returns the compatibility form of a text without what cannot be seen."""
    if text.isascii():
        return text
    seen = "".join(char for char in text if not _is_unseen(char))
    return "".join(char for char in unicodedata.normalize("NFKC", seen) if not _is_unseen(char))


def _is_unseen(char: str) -> bool:
    if char.isascii():
        return False
    return (
        char in UNSEEN
        or "\ufe00" <= char <= "\ufe0f"
        or "\U000e0100" <= char <= "\U000e01ef"
        or unicodedata.category(char) == "Cf"
    )
