"""The step `segment` without a teacher: every row gets its blocks from `prepare.segmenter`.

This module imports the standard library alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from hcot_lmeval.markup import PRESETS, Markup, get_markup
from hcot_lmeval.prepare.checks import Fault
from hcot_lmeval.prepare.folder import StepFolder
from hcot_lmeval.prepare.inputs import Input
from hcot_lmeval.prepare.measure import make_counter
from hcot_lmeval.prepare.outline import OutlineError, assemble
from hcot_lmeval.prepare.reading import read_rows
from hcot_lmeval.prepare.rows import PreparedRow, Unreadable
from hcot_lmeval.prepare.segmenter import SegmenterOptions, count_tokens, segment
from hcot_lmeval.prepare.sentences import split_sentences
from hcot_lmeval.prepare.steps import Numbered, Plain, Work, refused, run_rows, unread


@dataclass(frozen=True)
class FormOptions:
    """In which notation traces are written, and by what their lengths are measured."""

    markup: str = field(default="hcot", metadata={"help": "notation of the blocks", "choices": tuple(PRESETS)})
    tokenizer: str | None = field(
        default=None, metadata={"help": "count the tokens of this tokenizer (words, digits, pairs of signs)"}
    )
    surprise: str | None = field(
        default=None, metadata={"help": "local language model: where it is surprised, a block tends to begin"}
    )


@dataclass(frozen=True)
class Segmenting:
    """Makes the function that segments a row without a teacher.

    Attributes:
        options: of the segmenter.
        form: notation, tokenizer, model.
    """

    options: SegmenterOptions
    form: FormOptions

    def __call__(self) -> Callable[[Numbered], dict[str, Any]]:
        """Returns the function; loads what it needs."""
        form, surprise = self.form, None
        if form.surprise is not None:
            from transformers import AutoModelForCausalLM, AutoTokenizer

            from hcot_lmeval.prepare.surprise import model_surprise

            model = AutoModelForCausalLM.from_pretrained(form.surprise)
            surprise = model_surprise(model.eval(), AutoTokenizer.from_pretrained(form.surprise))
        count = make_counter(form.tokenizer)
        measure = count_tokens if form.tokenizer is None else lambda text: count([text])[0]
        find = partial(segment, options=self.options, measure=measure, surprise=surprise)
        made_by = {"method": "segmenter", **asdict(form), "options": asdict(self.options)}
        return partial(_segmented, find=find, markup=get_markup(form.markup), made_by=made_by)


def _segmented(item: Numbered, find: Callable[..., Any], markup: Markup, made_by: Mapping[str, Any]) -> dict[str, Any]:
    row = item[1]
    if isinstance(row, Unreadable):
        return unread(row)
    try:
        pieces = tuple(split_sentences(row.reasoning))
        outline = find(pieces)
        trace = assemble(pieces, outline, markup)
    except OutlineError as error:
        return refused(row, [Fault(error.code, error.detail)])
    return {"row": PreparedRow(row, trace, outline, pieces, made_by).record()}


def run_segment(
    folder: StepFolder,
    inputs: Sequence[Input],
    columns: Mapping[str, str],
    limit: int | None,
    make: Segmenting,
    work: Work,
) -> StepFolder:
    """Segments all rows without a teacher; goes on where an earlier run stopped."""
    if folder.open(restart=work.restart):
        return folder
    return run_rows(folder, inputs, limit, lambda: read_rows(inputs, columns, limit), make, work, Plain())
