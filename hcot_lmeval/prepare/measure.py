"""What a trace costs under each policy, counted from its markers and the lengths of the texts between them.

A trace of 10,000 tokens has some dozens of markers, and text cannot act.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

from pydantic import Field

from hcot_lmeval.assets import resolve
from hcot_lmeval.grammar import Grammar, is_legal_trace
from hcot_lmeval.markup import Markup, resolve_markers
from hcot_lmeval.prepare.segmenter import count_tokens
from hcot_lmeval.settings import MarkupName, Section
from hcot_lmeval.trace import LiveContext, Malformed, Policy

Counter = Callable[[Sequence[str]], list[int]]
"""Gives each text its number of tokens."""
PIECES = "pieces"
"""Name of the count without a tokenizer."""
TEXT = ""
"""The mark of a stretch of text."""


class CountOptions(Section, title="counting"):
    """In which notation traces are written, and by what their lengths are measured."""

    markup: MarkupName = "hcot"
    tokenizer: str | None = Field(
        None, description="count the tokens of this tokenizer (words, digits, pairs of signs)"
    )


class Stretch(NamedTuple):
    """A marker or thinking token, or a text between them.

    Attributes:
        mark: the marker; `TEXT` for a text.
        text: as written.
        tokens: how many; 1 for a mark.
    """

    mark: str
    text: str
    tokens: int


@dataclass(frozen=True)
class Cost:
    """What a decoder does for one trace under one policy; tokens, those of the prompt included.

    Attributes:
        peak: largest live context, the memory needed.
        forwarded: tokens that go through the model, again ones included.
        live: live context at the end.
    """

    peak: int
    forwarded: int
    live: int


class BlockSize(NamedTuple):
    """Tokens of a block as written, blocks within included, its own markers excluded.

    Attributes:
        depth: blocks open within it, 1 for an outermost block.
        thought: tokens before the solution.
        solution: tokens of the solution.
        thinks: whether the thought is more than space.
        solves: whether the solution is.
    """

    depth: int
    thought: int
    solution: int
    thinks: bool
    solves: bool


@lru_cache(maxsize=16)
def _grammar(markup: Markup) -> tuple[Mapping[str, int], Grammar]:
    """A notation over ids of its own: mark -> id, one id for all text, none that ends a trace; and the grammar."""
    ids = {mark: number for number, mark in enumerate((TEXT, *markup.markers, *markup.think))}
    begin, end = markup.think
    return ids, Grammar(resolve_markers(markup, ids.get), (ids[begin], ids[end]), frozenset())


@lru_cache(maxsize=2)
def load_tokenizer(name: str) -> Any:
    """Loads a tokenizer of transformers by name or path; also a bundled one."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(resolve(name))


def make_counter(tokenizer: str | None) -> Counter:
    """Returns a count of tokens: of a tokenizer of transformers, by name or path; None: `segmenter.count_tokens`."""
    if tokenizer is None:
        return lambda texts: [count_tokens(text) for text in texts]
    loaded = load_tokenizer(tokenizer)

    def count(texts: Sequence[str]) -> list[int]:
        filled = [text for text in texts if text]
        encoded = iter(loaded(filled, add_special_tokens=False, verbose=False)["input_ids"] if filled else ())
        return [len(next(encoded)) if text else 0 for text in texts]

    return count


def counter_name(tokenizer: str | None) -> str:
    """Returns what the counts are called."""
    if tokenizer is not None:
        return f"tokens of {tokenizer}"
    return f"{PIECES} (words, digits, pairs of signs; about the tokens of a model, but of none)"


def cut(text: str, markup: Markup, count: Counter) -> list[Stretch]:
    """Cuts a text into marks and the texts between them; joined again they are the text."""
    marks = (*markup.markers, *markup.think)
    parts = [part for part in re.split(f"({'|'.join(map(re.escape, marks))})", text) if part]
    counts = iter(count([part for part in parts if part not in marks]))
    return [Stretch(part, part, 1) if part in marks else Stretch(TEXT, part, next(counts)) for part in parts]


def is_legal(stretches: Sequence[Stretch], markup: Markup) -> bool:
    """Whether a well-formed trace could look so."""
    ids, grammar = _grammar(markup)
    return is_legal_trace([ids[stretch.mark] for stretch in stretches if stretch.tokens], 0, grammar)


def faults_of(stretches: Sequence[Stretch], markup: Markup) -> Iterator[str]:
    """Yields the `Malformed` kinds of a trace in their order, ``unclosed`` for each block left open."""
    ids, grammar = _grammar(markup)
    context = LiveContext(grammar.markers, Policy.OFF)
    for stretch in stretches:
        step = context.push(ids[stretch.mark]) if stretch.tokens else None
        if step is not None and step.malformed is not None:
            yield step.malformed.value
    yield from (Malformed.UNCLOSED.value for _ in range(context.depth))


class Block(NamedTuple):
    """The places of the markers of a block among the stretches of a trace; a lead stands right behind `split`."""

    open: int
    split: int
    close: int


def whole_blocks(stretches: Sequence[Stretch], markup: Markup) -> list[Block]:
    """Returns the blocks of a trace in the order in which they open: one opens, the last split counts, one closes.

    Of a well-formed trace these are all; in any other one the markers of no block are strays.
    """
    found: list[Block] = []
    open_: list[list[int]] = []
    for place, stretch in enumerate(stretches):
        if stretch.mark == markup.open and (markup.nested or not open_):
            open_.append([place])
        elif stretch.mark == markup.split and open_:
            if markup.lead is None or [each.mark for each in stretches[place + 1 : place + 2]] == [markup.lead]:
                open_[-1][1:] = [place]
        elif stretch.mark == markup.close and open_ and len(block := open_.pop()) > 1:
            found.append(Block(block[0], block[1], place))
    return sorted(found)


def block_sizes(stretches: Sequence[Stretch], markup: Markup) -> list[BlockSize]:
    """Returns the sizes of the blocks of a well-formed trace, in the order in which they open."""
    tokens = [0, *accumulate(stretch.tokens for stretch in stretches)]
    words = [0, *accumulate(stretch.mark == TEXT and not stretch.text.isspace() for stretch in stretches)]
    found, closing = list[BlockSize](), list[int]()
    for begin, split, close in whole_blocks(stretches, markup):
        while closing and closing[-1] < begin:
            closing.pop()
        closing.append(close)
        behind = split + 1 + (markup.lead is not None)
        thought, solution = tokens[split] - tokens[begin + 1], tokens[close] - tokens[behind]
        thinks, solves = words[split] > words[begin], words[close] > words[split]
        found.append(BlockSize(len(closing), thought, solution, thinks, solves))
    return found


def costs(stretches: Sequence[Stretch], prompt: int, markup: Markup) -> dict[Policy, Cost]:
    """Returns what a trace costs under each policy behind a prompt of so many tokens, at least 1."""
    ids, grammar = _grammar(markup)
    found = {}
    for policy in Policy:
        context, forwarded = LiveContext(grammar.markers, policy), max(1, prompt)
        context.push_text(forwarded)
        for mark, _, tokens in stretches:
            if mark == TEXT:
                context.push_text(tokens)
                forwarded += tokens
            else:
                forwarded += len(context.push(ids[mark]).forward)
        found[policy] = Cost(context.peak, forwarded, len(context.live))
    return found


def departure(original: str, stretches: Sequence[Stretch], markup: Markup) -> str | None:
    """Returns the words of the original behind which a trace goes on otherwise; None if it never does.

    A solution is either words of the original, which stand there next, or added as a whole; nothing else may differ
    but space.
    """
    blocks = whole_blocks(stretches, markup)
    begins, ends = {block.split for block in blocks}, {block.close for block in blocks}
    letters, inside = "".join(original.split()), 0
    ways = {0}  # how much of the original the texts so far may have used
    for place, stretch in enumerate(stretches):
        inside += (place in begins) - (place in ends)
        if stretch.mark == TEXT:
            said = "".join(stretch.text.split())
            used = {at + len(said) for at in ways if letters.startswith(said, at)}
            if not used and not inside:
                return letters[: max(ways)][-20:]
            ways = ways | used if inside else used
    return None if len(letters) in ways else letters[: max(ways)][-20:]
