"""Repairs of common faults. Words of the source are never touched: blocks are opened up, stray markers taken out.

A row that came from an outline is assembled anew, without the blocks at fault. Of any other row the markers are taken
out; what a dissolved block had as its solution stays in the trace, so that the check of the words decides again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from hcot_lmeval.markup import Markup
from hcot_lmeval.prepare.checks import Checker, Fault
from hcot_lmeval.prepare.measure import Block, Stretch, cut, whole_blocks
from hcot_lmeval.prepare.outline import Outline, OutlineError, assemble
from hcot_lmeval.prepare.rows import PreparedRow

OF_BLOCKS = frozenset({"too_deep", "empty_thought", "empty_solution", "solution_not_shorter", "solution_insufficient"})
"""Codes that are mended by opening a block up."""
OF_MARKERS = frozenset({"malformed"})
ROUNDS = 4
"""Opening up a block may leave another one at fault; so many times it is tried."""


def check_and_repair(
    row: PreparedRow, check: Checker, judged: Sequence[Fault] = ()
) -> tuple[PreparedRow, list[Fault], list[str]]:
    """Checks a row and repairs what can be repaired.

    Args:
        row: as it came.
        check: tells the faults.
        judged: faults that were found elsewhere, of the row as it is.

    Returns:
        The row, its faults, and what was repaired; where nothing helped, the row as it came.
    """
    faults = [*check(row), *judged]
    if not check.options.repair:
        return row, faults, []
    mended, left, done = row, faults, list[str]()
    for _ in range(ROUNDS):
        step = _repair(mended, left, check.markup)
        if step is None:
            break
        mended, did = step
        done += did
        left = check(mended)
    if not done or _weight(left, check) >= _weight(faults, check):
        return row, faults, []
    return replace(mended, made_by={**mended.made_by, "repairs": done}), left, done


def _weight(faults: Sequence[Fault], check: Checker) -> int:
    return sum(fault.code not in check.options.tolerated for fault in faults)


def _repair(row: PreparedRow, faults: Sequence[Fault], markup: Markup) -> tuple[PreparedRow, list[str]] | None:
    """One round; None where there is nothing to do."""
    codes = {fault.code for fault in faults}
    bad = {fault.block: fault.code for fault in faults if fault.code in OF_BLOCKS and fault.block is not None}
    if row.outline is not None and row.pieces is not None:
        return _reassembled(row, row.outline, row.pieces, bad, codes, markup)
    if codes & OF_MARKERS:
        return _without_strays(row, markup)
    if bad:
        trace = _cut(row.trace, markup)
        blocks = (block for number, block in enumerate(whole_blocks(trace, markup)) if number in bad)
        return replace(row, trace=_joined(trace, _marks(blocks, markup))), _opened(bad)
    return None


def _reassembled(
    row: PreparedRow, outline: Outline, pieces: tuple[str, ...], bad: dict[int, str], codes: set[str], markup: Markup
) -> tuple[PreparedRow, list[str]] | None:
    broken = codes & {"malformed", "words_changed"} and "".join(pieces) == row.source.reasoning
    if not bad and not broken:
        return None
    kept = tuple(block for number, block in enumerate(outline.blocks) if number not in bad)
    try:
        left = Outline(outline.sentences, kept)
        trace = assemble(pieces, left, markup)
    except OutlineError:
        return None
    if trace == row.trace:
        return None
    did = _opened(bad) if bad else ["assembled anew"]
    return replace(row, trace=trace, outline=left), did


def _opened(bad: dict[int, str]) -> list[str]:
    return [f"opened block {number}: {code}" for number, code in sorted(bad.items())]


def _cut(trace: str, markup: Markup) -> list[Stretch]:
    count: Callable[[Sequence[str]], list[int]] = lambda texts: [1] * len(texts)  # noqa: E731
    return cut(trace, markup, count)


def _joined(trace: Sequence[Stretch], without: set[int]) -> str:
    return "".join(stretch.text for place, stretch in enumerate(trace) if place not in without)


def _without_strays(row: PreparedRow, markup: Markup) -> tuple[PreparedRow, list[str]] | None:
    """Takes out the markers that belong to no whole block, and thinking tokens."""
    trace = _cut(row.trace, markup)
    whole = _marks(whole_blocks(trace, markup), markup)
    strays = {place for place, stretch in enumerate(trace) if stretch.mark and place not in whole}
    if not strays:
        return None
    repairs = [f"took out {trace[place].mark}" for place in sorted(strays)]
    return replace(row, trace=_joined(trace, strays)), repairs


def _marks(blocks: Iterable[Block], markup: Markup) -> set[int]:
    """The places of the markers of some blocks."""
    lead = markup.lead is not None
    return {place for begin, split, close in blocks for place in (begin, split, split + lead, close)}
