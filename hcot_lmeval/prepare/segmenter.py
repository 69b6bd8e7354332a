"""Blocks without a teacher: where a chain of thought turns, steps on or concludes, a block ends.

Every place between two sentences gets a score from paragraph breaks, words such as "Now", "Wait" and "Therefore"
(`prepare.sentences`), and whether a result stands right before it. Blocks are the segmentation with the best sum of

    score of the place where a block ends  -  (log(length / target))²  -  price of a block

found exactly by dynamic programming. The solution of a block is the result that ends it, where the text has one, or
else a short quotation. Where the text is long, blocks in a row become the thought of a larger
block, whose solution comes from theirs, for those are what a reader still sees. What follows the last block, the
conclusion, stays as it is; so does a span from which nothing short can be quoted.

The same sentences and options give the same outline.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

from pydantic import Field, model_validator

from hcot_lmeval.prepare.outline import Block, Outline, spelled_markers
from hcot_lmeval.prepare.reasons import Refused
from hcot_lmeval.prepare.sentences import Sentence, read_sentences
from hcot_lmeval.settings import Section


class SegmenterOptions(Section, title="blocks"):
    """How long blocks are, in the tokens of `measure`."""

    target_tokens: int = Field(200, description="length that a block should have")
    min_tokens: int = Field(80, ge=1, description="shorter blocks are avoided; a shorter trace gets none")
    max_tokens: int = Field(500, description="longer blocks are avoided")
    solution_tokens: int = Field(80, ge=1, description="length that a solution should not exceed")
    solution_share: float = Field(
        0.4, gt=0, lt=1, description="nor this share of its block, when it is several sentences"
    )
    conclusion_tokens: int = Field(100, ge=0, description="length that the part behind the last block may have")
    max_depth: int = Field(2, ge=0, description="blocks within each other; 0 finds none")
    group: int = Field(4, ge=2, description="blocks in a row that become a larger one, about")

    @model_validator(mode="after")
    def _check(self) -> SegmenterOptions:
        if not self.min_tokens <= self.target_tokens <= self.max_tokens:
            raise ValueError(
                f"min_tokens={self.min_tokens}, target_tokens={self.target_tokens}, max_tokens={self.max_tokens} "
                "are not in ascending order"
            )
        return self


Span = tuple[int, int]
"""Sentences [start, stop)."""
USUAL = SegmenterOptions()
_TOKEN = re.compile(r"[\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|\\?[^\W\d_]+|\d|(?:[^\w\s]|_){1,2}")


def count_tokens(text: str) -> int:
    """Returns about how many tokens a text has: words, digits, pairs of signs, characters of scripts without spaces."""
    return sum(1 for _ in _TOKEN.finditer(text))


def segment(
    pieces: Sequence[str],
    *,
    options: SegmenterOptions = USUAL,
    measure: Callable[[str], int] = count_tokens,
) -> Outline:
    """Finds the blocks of a trace.

    Args:
        pieces: its sentences.
        options: how long blocks should be, how deep.
        measure: the length of a text; a tokenizer gives better figures than the default.

    Returns:
        An outline no deeper than `options.max_depth`. Every solution is shorter than its thought, in tokens and in
        characters.

    Raises:
        Refused: ``marker_in_source``.
    """
    if found := spelled_markers("".join(pieces)):
        raise Refused("marker_in_source", f"{', '.join(found)} cannot be told from a marker of the trace")
    material = Material(read_sentences(pieces), [measure(piece) for piece in pieces], measure)
    search = _Segmenter(material, _boundary_scores(material), options)
    return Outline(len(pieces), tuple(block for node in search.nodes() for block in node.blocks))


def _boundary_scores(material: Material) -> list[float]:
    """How good it is to begin a block with each sentence."""
    sentences = material.sentences
    inside = {i for start, stop in material.units(0, len(sentences)) for i in range(start + 1, stop)}
    scores = [0.0]
    for index, (before, sentence) in enumerate(pairwise(sentences), 1):
        score = (-1.0, 0.2, 1.0)[min(before.breaks, 2)]
        score += 1.5 * sentence.plays("turn") + 1.0 * sentence.plays("step") + 0.3 * sentence.plays("shift")
        score += 2.0 * sentence.is_header + 0.5 * min(3.0, max(0.0, before.result))
        score -= 1.2 * sentence.plays("conclude") + 1.0 * sentence.plays("hold")
        score -= 1.5 * (sentence.is_item and (before.is_item or before.announces))
        score -= 1.5 * (sentence.is_display and before.is_display) + 1.0 * sentence.goes_on + 2.0 * before.breaks_off
        score -= 3.0 * (index in inside) + 1.0 * before.asks + 1.0 * before.plays("plan")
        scores.append(score)
    return scores


@dataclass(frozen=True)
class _Node:
    """Sentences [start, stop) that stay together.

    Attributes:
        start: the first one.
        stop: one past the last one.
        top: the block over them, or None where they are left as they are.
        inner: the blocks within `top`.
        units: what of them is still seen behind them and can be quoted.
    """

    start: int
    stop: int
    top: Block | None
    inner: tuple[Block, ...]
    units: tuple[Span, ...]

    @property
    def blocks(self) -> tuple[Block, ...]:
        return self.inner if self.top is None else (self.top, *self.inner)


_PRICE = 2.0
"""What a block costs, so that a cut is only made where it is better than this."""
_STEEPNESS = 2.0
"""Of the quadratic loss in log(length / target): blocks of e times the target lose this much."""

_LENIENCE = 0.75
"""How much less than the best result before it a last result may be worth, and still end a larger block."""


class _Segmenter:
    """One trace that is being segmented."""

    def __init__(self, material: Material, scores: Sequence[float], options: SegmenterOptions) -> None:
        self.material = material
        self.scores = scores
        self.options = options
        self._losses: dict[int, dict[int, float]] = defaultdict(dict)  # scale -> length -> loss

    def nodes(self) -> list[_Node]:
        """Returns the trace's nodes in order, larger blocks made of smaller ones as often as allowed."""
        stop, options = self._conclusion(), self.options
        if options.max_depth == 0 or self.material.length(0, stop) < options.min_tokens:
            return []
        nodes = [self._leaf(*span) for span in self._cut([(i, i + 1) for i in range(stop)], 1)]
        for level in range(1, options.max_depth):
            scale = options.group**level
            if self.material.length(0, stop) < 2 * scale * options.target_tokens:
                break
            spans = self._cut([(node.start, node.stop) for node in nodes], scale)
            nodes = [node for span in spans for node in self._group([n for n in nodes if _within(n, span)])]
        return nodes

    def _conclusion(self) -> int:
        """Where the last part begins, which stays outside of blocks; it has at least the last sentence."""
        sentences = self.material.sentences
        room = min(self.options.conclusion_tokens, sum(self.material.tokens) // 4)
        first = last = max(0, len(sentences) - 1)
        while first > 0 and self.material.length(first - 1, len(sentences)) <= room:
            first -= 1
        start = next((i for i in range(first, last) if sentences[i].plays("final")), last)
        while start > first and (
            sentences[start - 1].announces
            or (sentences[start].breaks == 0 and sentences[start].plays("hold"))
            or (sentences[start - 1].plays("conclude") and sentences[start - 1].result >= 2)
        ):
            start -= 1
        return start

    def _cut(self, items: Sequence[Span], scale: int) -> list[Span]:
        """Returns the best segmentation of items in a row into spans of about `scale` times the target."""
        gains = [self.scores[start] for start, _ in items]
        cuts = best_cuts(gains, lambda stop: self._starts(items, stop, scale))
        return [(items[start][0], items[stop - 1][1]) for start, stop in pairwise(cuts)]

    def _starts(self, items: Sequence[Span], stop: int, scale: int) -> list[tuple[int, float]]:
        """Where a span that ends before item `stop` may start, and what its length costs."""
        end, reach, found = items[stop - 1][1], 1.5 * scale * self.options.max_tokens, list[tuple[int, float]]()
        for start in range(stop - 1, -1, -1):
            length = max(1, self.material.length(items[start][0], end))
            if found and length > reach:
                break
            if length not in self._losses[scale]:
                self._losses[scale][length] = self._loss(length / scale)
            found.append((start, self._losses[scale][length]))
        return found

    def _loss(self, length: float) -> float:
        options = self.options
        beyond = max(0.0, math.log(options.min_tokens / length), math.log(length / options.max_tokens))
        return _PRICE + _STEEPNESS * math.log(length / options.target_tokens) ** 2 + 8 * beyond

    def _leaf(self, start: int, stop: int) -> _Node:
        """A block over sentences without blocks, or what they are where no short solution can be had."""
        units, length = self.material.units(start, stop), self.material.length(start, stop)
        split = trailing_result(self.material, start, stop, self._limit(length))
        fits = split is not None and self.material.length(split, stop) <= self.options.solution_tokens
        if split is not None and fits and self._is_shorter(self.material.text(split, stop), (start, split)):
            kept = tuple(unit for unit in units if unit[0] >= split)
            return _Node(start, stop, Block(start, stop, split=split), (), kept)
        chosen = self._quote(units, length)
        solution = quotation(self.material, chosen)
        if not solution or not self._is_shorter(solution, (start, stop)):
            return _Node(start, stop, None, (), tuple(units))
        return _Node(start, stop, Block(start, stop, solution=solution), (), chosen)

    def _group(self, nodes: Sequence[_Node]) -> list[_Node]:
        """One node around several, or those themselves where that gains nothing."""
        if len(nodes) < 2:
            return list(nodes)
        start, stop, last = nodes[0].start, nodes[-1].stop, nodes[-1]
        if self._ends_group(nodes):
            split = None if last.top is None else last.top.split
            inner = (*(block for node in nodes[:-1] for block in node.blocks), *last.inner)
            return [_Node(start, stop, Block(start, stop, split=split), inner, last.units)]
        units = [unit for node in nodes for unit in node.units]
        live = sum(self.material.length(*unit) for unit in units)
        chosen = self._quote(units, live)
        solution = quotation(self.material, chosen)
        if not solution or not self._is_shorter(solution, *units):
            return list(nodes)
        inner = tuple(block for node in nodes for block in node.blocks)
        return [_Node(start, stop, Block(start, stop, solution=solution), inner, chosen)]

    def _ends_group(self, nodes: Sequence[_Node]) -> bool:
        """Whether the result that ends the last node can end them all: it is about as good as the best before it."""
        *before, last = nodes
        if last.top is None or last.top.split is None:
            return False
        worth, units = self.material.worth, [unit for node in before for unit in node.units]
        return max(map(worth, last.units)) + _LENIENCE >= max(map(worth, units))

    def _quote(self, units: Sequence[Span], length: int) -> tuple[Span, ...]:
        single = min(self.options.solution_tokens, 0.6 * length)
        return tuple(quote(self.material, units, self._limit(length), max(single, self._limit(length))))

    def _limit(self, length: int) -> float:
        return min(self.options.solution_tokens, self.options.solution_share * length)

    def _is_shorter(self, solution: str, *spans: Span) -> bool:
        """Whether a solution is shorter than spans together, in tokens as in characters."""
        thought = "".join(self.material.text(*span).strip() for span in spans)
        return len(solution.strip()) < len(thought) and self.material.measure(solution) < self.material.measure(thought)


def best_cuts(gains: Sequence[float], losses: Callable[[int], Iterable[tuple[int, float]]]) -> list[int]:
    """Returns the best segmentation of items in a row, as cuts from 0 to their number, by dynamic programming.

    Args:
        gains: of a cut in front of each item; the first one does not count.
        losses: gives for a stop the starts that a span up to there may have, each with what the span costs.
    """
    best: list[tuple[float, int]] = [(0.0, 0)]
    for stop in range(1, len(gains) + 1):
        gain = 0.0 if stop == len(gains) else gains[stop]
        total, start = max((best[start][0] - loss, start) for start, loss in losses(stop))
        best.append((total + gain, start))
    cuts = [len(gains)]
    while cuts[-1]:
        cuts.append(best[cuts[-1]][1])
    return cuts[::-1]


def _within(node: _Node, span: Span) -> bool:
    return span[0] <= node.start and node.stop <= span[1]


# --- solutions --------------------------------------------------------------------------------------------------------
#
# What to keep of a thought, in its own words: the sentences that end it as a result, or short quotations from it. The
# unit is the smallest span that can be understood: a sentence, or one that ends in a colon with what it announces.

ENDS_AS_RESULT = 1.75
"""`Sentence.result` that the sentence at the end of a thought needs in order to be its solution."""
_ALSO_QUOTED = 1.5
"""Worth of a unit that is quoted beside the best one."""
_RECENT = 0.75
"""How much more the last unit of a thought is worth than its first: results come late."""
_QUOTES = 3


@dataclass(frozen=True)
class Material:
    """The sentences of a trace, with what is needed to judge and measure them.

    Attributes:
        sentences: all of them.
        tokens: how long each is.
        measure: how long a text is.
    """

    sentences: Sequence[Sentence]
    tokens: Sequence[int]
    measure: Callable[[str], int]

    @cached_property
    def _before(self) -> list[int]:
        """Tokens before each sentence, and of all."""
        return [0, *accumulate(self.tokens)]

    def length(self, start: int, stop: int) -> int:
        return self._before[stop] - self._before[start]

    def text(self, start: int, stop: int) -> str:
        return "".join(sentence.text for sentence in self.sentences[start:stop])

    def units(self, start: int, stop: int) -> list[Span]:
        """Returns the units of a span, in order and without gaps."""
        found = []
        while start < stop:
            end = self._unit_end(start, stop)
            found.append((start, end))
            start = end
        return found

    def _unit_end(self, start: int, stop: int) -> int:
        end = start + 1
        while end < stop and (self.sentences[end - 1].announces or self._listed(end, start)):
            end += 1
        return end

    def _listed(self, index: int, head: int) -> bool:
        """Whether a sentence is a further item or formula of those that the unit beginning with `head` announces."""
        here, before = self.sentences[index], self.sentences[index - 1]
        alike = (here.is_item and before.is_item) or (here.is_display and before.is_display)
        return index > head + 1 and self.sentences[head].announces and alike

    def worth(self, unit: Span) -> float:
        """How much a unit looks like a result; what announces something that does not follow is worth nothing."""
        first, last = self.sentences[unit[0]], self.sentences[unit[1] - 1]
        if last.announces:
            return -3.0
        return first.result if first is last else max(first.result, last.result) + 0.5


def trailing_result(material: Material, start: int, stop: int, limit: float) -> int | None:
    """Returns where the results begin that end a span, or None where it does not end in one.

    Several results have at most `limit` tokens together; the last one counts however long it is.
    """
    split = None
    for unit in reversed(material.units(start, stop)):
        too_long = split is not None and material.length(unit[0], stop) > limit
        if unit[0] == start or material.worth(unit) < ENDS_AS_RESULT or too_long:
            break
        split = unit[0]
    return split


def quote(material: Material, units: Sequence[Span], limit: float, single: float) -> list[Span]:
    """Returns the units that say best what came out of a thought, in their order.

    One has at most `single` tokens, several have at most `limit` together. Where all are longer, that is the shortest.
    """
    last = max(1, len(units) - 1)
    worths = {unit: material.worth(unit) + _RECENT * index / last for index, unit in enumerate(units)}
    fitting = [unit for unit in units if material.length(*unit) <= single and _says_something(material, unit)]
    if not fitting:
        spoken = [unit for unit in units if _says_something(material, unit)]
        return [min(spoken, key=lambda unit: (material.length(*unit), -unit[0]))] if spoken else []
    chosen: list[Span] = []
    for unit in sorted(fitting, key=lambda unit: (-worths[unit], -unit[0])):
        fits = sum(material.length(*each) for each in (*chosen, unit)) <= limit
        if not chosen or (fits and worths[unit] >= _ALSO_QUOTED and not _repeats(material, unit, chosen)):
            chosen.append(unit)
        if len(chosen) == _QUOTES:
            break
    return sorted(chosen)


def quotation(material: Material, units: Iterable[Span]) -> str:
    """Returns the words of units, one behind the other, without blank lines."""
    joined = "".join(
        material.text(*unit).rstrip() + ("\n" if material.sentences[unit[1] - 1].breaks else " ") for unit in units
    )
    return re.sub(r"\s*\n\s*", "\n", joined).strip()


def _says_something(material: Material, unit: Span) -> bool:
    return any(character.isalnum() for character in material.text(*unit))


def _repeats(material: Material, unit: Span, chosen: Sequence[Span]) -> bool:
    """Whether two thirds of the words of a unit are in those that were chosen."""
    words = set(re.findall(r"\w+", material.text(*unit)))
    known = set(re.findall(r"\w+", quotation(material, chosen)))
    return 3 * len(words & known) >= 2 * len(words)
