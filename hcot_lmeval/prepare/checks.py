"""What may be wrong with a prepared row: each fault has a code, and each code a sentence.

    check = Checker(CheckOptions(max_depth=2, against=("aime24", "aime25")))
    for fault in check(row):
        print(fault.code, CHECKING[fault.code], fault.detail)

A fault is data: the row goes to the rejected ones with it, unless `CheckOptions.tolerate` names its code. Duplicates
are found between rows, hence later (`prepare.steps`); whether a solution says enough is for a teacher to judge.

Some faults are repaired. Words of the source are never touched: a block at fault is opened up.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, field_validator, model_validator

from hcot_lmeval.columns import ROLES
from hcot_lmeval.files import file_digest, find_inputs
from hcot_lmeval.markup import Markup, get_markup
from hcot_lmeval.prepare.measure import (
    BlockSize,
    CountOptions,
    Stretch,
    block_sizes,
    costs,
    cut,
    departure,
    faults_of,
    is_legal,
    load_tokenizer,
    make_counter,
)
from hcot_lmeval.prepare.outline import Outline, assemble, find_control, spelled_markers
from hcot_lmeval.prepare.reasons import CHECKING, Refused
from hcot_lmeval.prepare.rows import PreparedRow
from hcot_lmeval.settings import read_off
from hcot_lmeval.trace import Policy
from hcot_lmeval.vocabulary import spelled_special


class Fault(NamedTuple):
    """Something wrong with a row.

    Attributes:
        code: a key of `reasons.CHECKING`.
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
    min_tokens: int | None = Field(None, description="least tokens of trace and response")
    max_tokens: int | None = Field(None, description="most tokens of trace and response")
    max_peak: int | None = Field(None, description="most live tokens under pruning (recompute), question included")
    duplicates: Annotated[Literal["trace", "question", "off"], read_off] = Field(
        "trace", description="which words make a duplicate"
    )
    near: float = Field(
        0.8, gt=0, le=1, description="from which share of common 5-grams on rows are near duplicates; 1: the same alone"
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

    @model_validator(mode="after")
    def _near_what(self) -> CheckOptions:
        if self.duplicates == "off" and "near" in self.model_fields_set:
            raise ValueError("near does nothing under duplicates=off; leave one of them out")
        return self

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
        if row.outline is None or row.pieces is None:
            if (behind := departure(original, trace, self.markup)) is not None:
                yield Fault("words_changed", f"behind {behind!r} the trace goes on with other words")
            return
        try:
            kept = assemble(row.pieces, row.outline, self.markup) == row.trace and "".join(row.pieces) == original
            why = "assembled again, the trace is another text"
        except Refused as error:
            kept, why = False, error.detail
        if not kept:
            yield Fault("words_changed", why)

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


# --- repair -----------------------------------------------------------------------------------------------------------

OF_BLOCKS = frozenset({"too_deep", "empty_thought", "empty_solution", "solution_not_shorter", "solution_insufficient"})
"""Codes that are mended by opening a block up."""
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
    """One round: a row that came from an outline is put together anew, without the blocks at fault.

    None where there is nothing to do. Other rows are left as they are: their markers are somebody else's work.
    """
    outline, pieces = row.outline, row.pieces
    if outline is None or pieces is None:
        return None
    bad = {fault.block: fault.code for fault in faults if fault.code in OF_BLOCKS and fault.block is not None}
    broken = {fault.code for fault in faults} & {"malformed", "words_changed"}
    if not bad and not (broken and "".join(pieces) == row.source.reasoning):
        return None
    kept = tuple(block for number, block in enumerate(outline.blocks) if number not in bad)
    try:
        left = Outline(outline.sentences, kept)
        trace = assemble(pieces, left, markup)
    except Refused:
        return None
    if trace == row.trace:
        return None
    did = [f"opened block {number}: {code}" for number, code in sorted(bad.items())] or ["assembled anew"]
    return replace(row, trace=trace, outline=left), did


# --- other rows, and problems of evaluations --------------------------------------------------------------------------
#
# Words are folded: case, punctuation, spaces and the forms of characters do not count, and of scripts without spaces
# each character is a word. A problem is looked for by its n-grams of words: a row that holds a large share of them
# holds the problem, whatever stands around it. A single common n-gram says nothing, for contests end their problems
# with the same sentences. A problem that is shorter than an n-gram has to stand there as a whole; one of less than
# `FEWEST` words is not looked for.

N = 8
"""Words of an n-gram."""
FEWEST = 4
"""Problems of fewer words are not looked for: they stand everywhere."""
TASKS = {
    "aime24": "Maxwell-Jia/AIME_2024",
    "aime25": "math-ai/aime25",
    "math500": "HuggingFaceH4/MATH-500",
    "polymath": "Qwen/PolyMath",
}
"""Evaluation task -> its data set."""
LANGUAGES = "ar bn de en es fr id it ja ko ms pt ru sw te th vi zh".split()
"""The configurations of PolyMath."""
QUESTION = ROLES["question"][:3]
"""Columns in which evaluation rows keep the problem; upper and lower case are the same."""

_SPACELESS = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"
_WORD = re.compile(rf"[{_SPACELESS}]|[^\W_{_SPACELESS}]+")


@dataclass(frozen=True)
class Overlap:
    """A problem that a text holds, and the share of its n-grams that are there."""

    name: str
    share: float


class EvaluationRows:
    """The n-grams of evaluation problems.

    Args:
        problems: pairs of a name and a problem; of problems with the same words the first name is kept.
        share: from which share of a problem's n-grams on a text holds it.
    """

    def __init__(self, problems: Iterable[tuple[str, str]], share: float = 0.5) -> None:
        self.share = share
        self._names: list[str] = []
        self._sizes: list[int] = []
        self._where: dict[tuple[str, ...], list[int]] = {}
        for name, text in problems:
            found = words(text)
            grams = ngrams(found, N, whole=True) if len(found) >= FEWEST else set()
            for gram in grams:
                self._where.setdefault(gram, []).append(len(self._names))
            self._names.append(name)
            self._sizes.append(len(grams))
        self._short = sorted({len(gram) for gram in self._where} - {N})

    def __len__(self) -> int:
        return len(self._names)

    def find(self, text: str) -> Overlap | None:
        """Returns the problem that a text holds the largest share of, if that is enough of it."""
        found = words(text)
        grams = set().union(*(ngrams(found, size) for size in (N, *self._short)))
        counts = Counter(number for gram in grams for number in self._where.get(gram, ()))
        if not counts:
            return None
        share, number = max((count / self._sizes[n], -n) for n, count in counts.items())
        return Overlap(self._names[-number], share) if share >= self.share else None


def words(text: str) -> list[str]:
    """Returns the folded words of a text."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def fingerprint(text: str) -> str:
    """Returns a digest of the folded words of a text; rows with the same one say the same."""
    return blake2b("\0".join(words(text)).encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def ngrams(found: Sequence[str], size: int, *, whole: bool = False) -> set[tuple[str, ...]]:
    """Returns the n-grams of a text; with `whole`, a text that is too short is one itself."""
    if whole and 0 < len(found) < size:
        return {tuple(found)}
    return set(zip(*(found[i:] for i in range(size)), strict=False))


def identities(names: Sequence[str]) -> dict[str, str]:
    """Returns what tells evaluation problems from others: the data set of a task, the digest of a file.

    Raises:
        ValueError: a name is neither a task nor a file.
    """
    return {name: TASKS[name] if name in TASKS else file_digest(_file(name)) for name in names}


def _file(name: str) -> Path:
    if not Path(name).is_file():
        raise ValueError(f"against={name!r} is neither a file nor a task; choose one of {', '.join(TASKS)}, or a file")
    return Path(name)


def load_problems(names: Sequence[str]) -> list[tuple[str, str]]:
    """Reads evaluation problems; returns pairs of a name and a problem.

    Args:
        names: tasks of `TASKS` (from the hub, or from the folder in ``HCOT_LMEVAL_DATA``), or files with a column of
            `QUESTION`.

    Raises:
        ValueError: a name is neither, or a file has no such column.
        ConnectionError: neither the hub nor a local copy is within reach.
    """
    return [problem for name in names for problem in (_of_task(name) if name in TASKS else _of_file(_file(name)))]


def _of_task(task: str) -> Iterator[tuple[str, str]]:
    from datasets.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

    from hcot_lmeval.scoring.data import load

    shown = is_progress_bar_enabled()
    disable_progress_bar()  # polymath would show 72 of them
    try:
        for subset in LANGUAGES if task == "polymath" else (None,):
            for split, rows in load(TASKS[task], subset).items():
                label = "/".join(filter(None, (task, subset, str(split))))
                for number, row in enumerate(rows):
                    yield f"{label} {row.get('id', row.get('ID', number))}", _question(row, label)
    finally:
        if shown:
            enable_progress_bar()


def _of_file(path: Path) -> Iterator[tuple[str, str]]:
    for each in find_inputs([path]):
        for number, record in enumerate(each.records()):
            if record.data is not None:
                yield f"{each.name} {record.data.get('id', number)}", _question(record.data, record.where)


def _question(row: Mapping[str, Any], where: str) -> str:
    folded = {name.casefold(): value for name, value in row.items() if isinstance(value, str)}
    found = next((folded[name] for name in QUESTION if name in folded), None)
    if found is None:
        raise ValueError(f"{where}: no column {', '.join(QUESTION)}; present: {json.dumps(list(row))}")
    return found
