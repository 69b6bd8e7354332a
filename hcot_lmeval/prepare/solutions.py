"""What to keep of a thought, in its own words: the sentences that end it as a result, or short quotations from it.

The unit is the smallest span that can be understood: a sentence, or one that ends in a colon together with what it
announces.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from hcot_lmeval.prepare.discourse import Sentence

Span = tuple[int, int]
"""Sentences [start, stop)."""

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
