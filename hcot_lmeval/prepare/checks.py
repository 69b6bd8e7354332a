"""What may be wrong with a prepared row: each fault has a code, and each code a sentence.

    check = Checker(CheckOptions(max_depth=2, against=("aime24", "aime25")))
    for fault in check(row):
        print(fault.code, CHECKING[fault.code], fault.detail)

A fault is data: the row goes to the rejected ones with it, unless `CheckOptions.tolerate` names its code. Duplicates
are found between rows, hence later (`prepare.duplicates`); whether a solution says enough is for a teacher to judge.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Annotated, Literal, NamedTuple

from pydantic import Field, field_validator

from hcot_lmeval.markup import Markup, get_markup
from hcot_lmeval.prepare.contamination import EvaluationRows, load_problems
from hcot_lmeval.prepare.measure import (
    BlockSize,
    CountOptions,
    Stretch,
    block_sizes,
    costs,
    cut,
    faults_of,
    is_legal,
    load_tokenizer,
    make_counter,
)
from hcot_lmeval.prepare.outline import OutlineError, assemble
from hcot_lmeval.prepare.rows import PreparedRow
from hcot_lmeval.prepare.spelled import find_control, spelled_markers
from hcot_lmeval.prepare.words import compare
from hcot_lmeval.settings import read_off
from hcot_lmeval.trace import Policy
from hcot_lmeval.vocabulary import spelled_special

CHECKING = {
    "malformed": "the markers are not those of well-formed blocks",
    "no_blocks": "the trace has no block",
    "too_deep": "blocks are nested deeper than is allowed",
    "empty_thought": "a block has nothing before its solution",
    "empty_solution": "a block has no solution, or one that is blank",
    "solution_not_shorter": "a solution is not shorter than its thought",
    "solution_insufficient": "the judge says that a solution leaves out what the rest needs",
    "unjudged": "the judge's reply was of no use",
    "words_changed": "words of the source are missing, or there are new ones outside of solutions",
    "formulas_changed": "a number or formula of the source is missing, or there is a new one outside of solutions",
    "answer_missing": "the row has no final answer in a box",
    "answer_differs": "the final answer is not the expected one",
    "answer_unchecked": "the final answer could not be compared with the expected one",
    "marker_in_source": "the source spells a marker or thinking token",
    "control_token_in_source": "the source spells what looks like a control token",
    "too_long": "the trace is longer than is allowed",
    "too_short": "the trace is shorter than is allowed",
    "peak_too_high": "the live context under pruning grows larger than is allowed",
    "duplicate": "an earlier row has the same words",
    "near_duplicate": "an earlier row has nearly the same words",
    "repeated_id": "an earlier row has the same id",
    "contaminated": "the row holds a problem of an evaluation task",
}
"""Code of a `Fault` -> what it means."""


class Fault(NamedTuple):
    """Something wrong with a row.

    Attributes:
        code: a key of `CHECKING`.
        detail: what and where.
        block: number of the block in the order of opening, where it is one block's fault.
    """

    code: str
    detail: str
    block: int | None = None


class CheckOptions(CountOptions, title="what is allowed"):
    """What is allowed."""

    max_depth: int = Field(4, description="blocks within each other")
    allow_flat: bool = Field(False, description="let rows pass that have no block")
    answers: Annotated[Literal["boxed", "stated", "off"], read_off] = Field(
        "boxed", description="what counts as a final answer: the last box, also what is stated in words, or no check"
    )
    max_changed: float = Field(0.0, ge=0, le=1, description="share of the words that a rewriting may change")
    min_tokens: int | None = Field(None, description="least tokens of trace and response")
    max_tokens: int | None = Field(None, description="most tokens of trace and response")
    max_peak: int | None = Field(None, description="most live tokens under pruning (recompute), question included")
    duplicates: Annotated[Literal["trace", "question", "off"], read_off] = Field(
        "trace", description="which words make a duplicate"
    )
    near: float = Field(
        0.8, ge=0, le=1, description="from which share of common 5-grams on rows are near duplicates; 1: exact ones"
    )
    against: tuple[str, ...] = Field(
        (), description="evaluation tasks (aime24 aime25 math500 polymath) or files whose problems to look for"
    )
    contamination: float = Field(
        0.5, ge=0, le=1, description="from which share of a problem's 8-grams on a row holds it"
    )
    drop_contaminated: bool = Field(False, description="reject such rows in place of reporting them")
    tolerate: tuple[str, ...] = Field(
        ("answer_unchecked", "unjudged"), description="codes that are reported and do not reject a row"
    )
    repair: bool = Field(True, description="try to repair common faults")

    @field_validator("tolerate")
    @classmethod
    def _known(cls, codes: tuple[str, ...]) -> tuple[str, ...]:
        unknown = sorted(set(codes) - CHECKING.keys())
        if unknown:
            raise ValueError(f"{unknown[0]!r} is no code of a check; known are {', '.join(CHECKING)}")
        return codes

    @property
    def notation(self) -> Markup:
        return get_markup(self.markup)

    @property
    def tolerated(self) -> frozenset[str]:
        """Codes that do not reject a row."""
        return frozenset((*self.tolerate, "repeated_id")) | (
            frozenset() if self.drop_contaminated else {"contaminated"}
        )


class Checker:
    """Checks one row at a time.

    Args:
        options: what is allowed.
        problems: those that `options.against` names, where they have been read already.
    """

    def __init__(self, options: CheckOptions, problems: Sequence[tuple[str, str]] | None = None) -> None:
        self.options = options
        self._problems = problems
        self.markup = options.notation

    @cached_property
    def _count(self) -> Callable[[Sequence[str]], list[int]]:
        return make_counter(self.options.tokenizer)

    @cached_property
    def _evaluations(self) -> EvaluationRows:
        problems = load_problems(self.options.against) if self._problems is None else self._problems
        return EvaluationRows(problems, self.options.contamination)

    def __call__(self, row: PreparedRow) -> list[Fault]:
        """Returns the faults of a row, none where it has none."""
        trace = cut(row.trace, self.markup, self._count)
        checks = (self._source, self._structure, self._words, self._answer, self._lengths, self._contamination)
        return [fault for one in checks for fault in one(row, trace)]

    def _source(self, row: PreparedRow, trace: Sequence[Stretch]) -> Iterator[Fault]:
        source = row.source
        texts = {"question": source.question, "reasoning": source.reasoning, "response": source.response}
        for name, text in texts.items():
            if found := spelled_markers(text, self.markup):
                yield Fault("marker_in_source", f"{', '.join(found)} in the {name}")
            elif control := find_control(text) or self._special(text):
                yield Fault("control_token_in_source", f"{control} in the {name}")
        for number, stretch in enumerate(trace):  # what the trace has beside the source: its solutions
            if not stretch.mark and not source.reasoning and (found := spelled_markers(stretch.text, self.markup)):
                yield Fault("marker_in_source", f"{', '.join(found)} in part {number} of the trace")

    def _special(self, text: str) -> str:
        """The special tokens of the tokenizer, if there is one, that a text spells; training leaves such rows out."""
        name = self.options.tokenizer
        return ", ".join(spelled_special(load_tokenizer(name), text, self.markup)) if name else ""

    def _structure(self, row: PreparedRow, trace: Sequence[Stretch]) -> Iterator[Fault]:
        think = [stretch.mark for stretch in trace if stretch.mark in self.markup.think]
        if think or not is_legal(trace, self.markup):
            counts = Counter([*faults_of(trace, self.markup), *think])
            yield Fault("malformed", ", ".join(f"{kind} × {count}" for kind, count in counts.items()))
            return
        blocks = block_sizes(trace, self.markup)
        if not blocks and not self.options.allow_flat:
            yield Fault("no_blocks", f"{len(row.trace)} characters without a marker")
        for number, block in enumerate(blocks):
            yield from (Fault(code, detail, number) for code, detail in self._block(number, block))

    def _block(self, number: int, block: BlockSize) -> Iterator[tuple[str, str]]:
        if block.depth > self.options.max_depth:
            yield "too_deep", f"block {number} has depth {block.depth}, allowed is {self.options.max_depth}"
        if not block.thinks:
            yield "empty_thought", f"block {number}"
        if not block.solves:
            yield "empty_solution", f"block {number}"
        elif block.solution >= block.thought:
            yield "solution_not_shorter", f"block {number}: {block.solution} tokens for {block.thought}"

    def _words(self, row: PreparedRow, trace: Sequence[Stretch]) -> Iterator[Fault]:
        original = row.source.reasoning
        if not original:
            return
        if row.outline is not None and row.pieces is not None:
            try:
                kept = assemble(row.pieces, row.outline, self.markup) == row.trace and "".join(row.pieces) == original
                why = "assembled again, the trace is another text"
            except OutlineError as error:
                kept, why = False, error.detail
            if not kept:
                yield Fault("words_changed", why)
            return
        changes = compare(original, trace, self.markup)
        if changes.share > self.options.max_changed:
            changed = f"lost: {_some(changes.lost)}; added: {_some(changes.added)}"
            yield Fault("words_changed", f"{100 * changes.share:.2f} % of {changes.words} words; {changed}")
        if changes.formulas:
            yield Fault("formulas_changed", _some(changes.formulas))

    def _answer(self, row: PreparedRow, trace: Sequence[Stretch]) -> Iterator[Fault]:
        gold = row.source.answer
        if self.options.answers == "off" or gold is None:
            return
        from hcot_lmeval.answers import grade

        said = row.source.response if row.source.response.strip() else row.trace
        verdict = grade(said, gold, fallback=self.options.answers == "stated")
        if verdict.correct:
            return
        if verdict.reason == "no_answer":
            yield Fault("answer_missing", f"expected is {gold!r}")
        elif verdict.correct is None:
            yield Fault("answer_unchecked", f"{verdict.answer!r} for {gold!r}: {verdict.reason}")
        else:
            yield Fault("answer_differs", f"{verdict.answer!r} for {gold!r}")

    def _lengths(self, row: PreparedRow, trace: Sequence[Stretch]) -> Iterator[Fault]:
        options = self.options
        if options.min_tokens is options.max_tokens is options.max_peak is None:
            return
        question, response = self._count([row.source.question, row.source.response])
        tokens = sum(stretch.tokens for stretch in trace) + response
        if options.min_tokens is not None and tokens < options.min_tokens:
            yield Fault("too_short", f"{tokens} tokens, required are {options.min_tokens}")
        if options.max_tokens is not None and tokens > options.max_tokens:
            yield Fault("too_long", f"{tokens} tokens, allowed are {options.max_tokens}")
        if options.max_peak is not None:
            rest = Stretch("", row.source.response, response)
            peak = costs([*trace, rest], question, self.markup)[Policy.RECOMPUTE].peak
            if peak > options.max_peak:
                yield Fault("peak_too_high", f"{peak} live tokens, allowed are {options.max_peak}")

    def _contamination(self, row: PreparedRow, trace: Sequence[Stretch]) -> Iterator[Fault]:
        if self.options.against:
            found = self._evaluations.find(f"{row.source.question}\n{row.source.reasoning or row.trace}")
            if found is not None:
                yield Fault("contaminated", f"{100 * found.share:.0f} % of the 8-grams of {found.name}")


def _some(words: Sequence[str], most: int = 8) -> str:
    more = f" and {len(words) - most} more" if len(words) > most else ""
    return (" ".join(words[:most]) or "nothing") + more
