"""Reads the traces of synthetic problems, with nothing of the generators: tokens, ids, blocks."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from hcot_lmeval.markup import MarkerIds, get_markup
from hcot_lmeval.synthetic import Problem, gold_trace
from hcot_lmeval.trace import LiveContext, Policy, Step

BOX = "\\boxed{"
FIRST_SPECIAL = 0x110000
"""Ids of markers, thinking tokens and the box begin behind the last code point."""


def words(text: str, markup: str = "hcot") -> list[str]:
    """The text in tokens: markers, thinking tokens and the opening of the box whole, all else by character."""
    marks = get_markup(markup)
    whole = "|".join(re.escape(word) for word in (*marks.markers, *marks.think, BOX))
    return re.findall(f"{whole}|.", text)


def ids_of(text: str, markup: str = "hcot") -> tuple[list[int], MarkerIds]:
    """Code points, with special tokens behind them."""
    marks = get_markup(markup)
    special = {word: FIRST_SPECIAL + i for i, word in enumerate((*marks.markers, *marks.think, BOX))}
    opens, split, close = special[marks.open], special[marks.split], special[marks.close]
    lead = special[marks.lead] if marks.lead else None
    ids = [special[word] if word in special else ord(word) for word in words(text, markup)]
    return ids, MarkerIds(opens, split, close, marks.keep, marks.nested, lead)


def run(problem: Problem, markup: str = "hcot", policy: Policy = Policy.RECOMPUTE) -> tuple[LiveContext, list[Step]]:
    """The context after prompt and gold trace, and the steps of the trace."""
    prompt, markers = ids_of(problem.prompt, markup)
    context = LiveContext(markers, policy)
    for token in prompt:
        context.push_inert(token)
    return context, [context.push(token) for token in ids_of(gold_trace(problem, markup), markup)[0]]


def check_legality(problem: Problem, policy: Policy) -> list[Step]:
    """Asserts that the gold trace is well-formed and leaves nothing but the root's solution; returns its steps."""
    context, steps = run(problem, policy=policy)
    left = f"{problem.prompt}<think>[THOUGHT]{problem.answer}[RETURN]</think>{BOX}{problem.answer}}}"
    assert [step.malformed for step in steps if step.malformed] == []
    assert context.depth == 0
    assert context.live == ids_of(left)[0]
    assert sum(step.is_prune for step in steps) == problem.blocks
    return steps


@dataclass
class Block:
    """A block of a trace: the text of its thought outside of blocks, the blocks in it, its solution."""

    text: str = ""
    blocks: list[Block] = field(default_factory=list)
    solution: str = ""


def root_block(trace: str) -> Block:
    """Reads a well-formed trace with one block at its root."""
    (root,) = _read(iter(words(trace.removeprefix("<think>").rpartition("</think>")[0])), Block()).blocks
    return root


def _read(tokens, block: Block) -> Block:
    solving = False
    for token in tokens:
        if token == "[THOUGHT]":
            block.blocks.append(_read(tokens, Block()))
        elif token == "[SOLUTION]":
            solving = True
        elif token == "[RETURN]":
            break
        elif solving:
            block.solution += token
        else:
            block.text += token
    return block
