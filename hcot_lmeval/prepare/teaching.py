"""Steps that ask a teacher: rows to questions, replies to rows, what it cost.

Replies are kept in ``OUT/replies.jsonl`` as they come, for all steps of a run: a step that was killed or started anew
asks nothing twice. A row whose reply was of no use is rejected with its code. A row that got none, because a limit was
reached or the server failed, stays open: the same command asks again, or rejects it with ``--give-up``.

This module imports the standard library alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from hcot_lmeval.prepare.checks import Fault
from hcot_lmeval.prepare.conversation import Conversation
from hcot_lmeval.prepare.folder import StepFolder
from hcot_lmeval.prepare.inputs import Input, count_records
from hcot_lmeval.prepare.outline import OutlineError
from hcot_lmeval.prepare.steps import Plain, Progress, Work, numbered, refused
from hcot_lmeval.prepare.teacher.budget import Amount
from hcot_lmeval.prepare.teacher.options import TeacherOptions
from hcot_lmeval.prepare.teacher.questions import TEMPORARY, Reply, Task, Unusable
from hcot_lmeval.prepare.teacher.runner import Estimate, ask, estimate
from hcot_lmeval.prepare.teacher.store import AnswerStore

REPLIES = "replies.jsonl"
"""The store of a run."""


@dataclass(frozen=True)
class GivingUp:
    """What becomes of rows that got no reply."""

    dry_run: bool = field(default=False, metadata={"help": "estimate requests, tokens and money; ask nothing"})
    give_up: bool = field(default=False, metadata={"help": "reject rows that got no reply, and finish the step"})


class Lesson(Protocol):
    """What a teacher is asked about a row, and what is made of the replies."""

    @property
    def made_by(self) -> dict[str, Any]:
        """What the rows depend on."""
        ...

    def questions(self, row: Any) -> list[Task]:
        """Returns the questions about a row; none where it needs none."""
        ...

    def entry(self, row: Any, replies: Sequence[Reply]) -> dict[str, Any]:
        """Returns the entry of the journal.

        Raises:
            Unusable: a reply is of no use.
        """
        ...


def run_lesson(
    folder: StepFolder,
    inputs: Sequence[Input],
    limit: int | None,
    read: Callable[[], Iterable[Any]],
    lesson: Lesson,
    teacher: TeacherOptions,
    work: Work,
    giving: GivingUp,
    decide: Plain,
) -> StepFolder | Counter[str]:
    """Asks about all rows that are not done; goes on where an earlier run stopped.

    Args:
        folder: of the step.
        inputs: what is read, for the number of rows.
        limit: so many are read at most.
        read: yields all rows.
        lesson: what is asked, and what is made of it.
        teacher: who is asked.
        work: how.
        giving: what becomes of rows without a reply.
        decide: what becomes of an entry.

    Returns:
        The folder of the finished step; or why rows are still open, code -> rows.

    Raises:
        TeacherError: the teacher cannot be asked at all.
    """
    if folder.open(restart=work.restart):
        return folder
    open_: Counter[str] = Counter()
    with folder.journal() as journal, AnswerStore(folder.out / REPLIES) as store:
        total = count_records(inputs, limit)
        with Progress(folder.step, total, len(journal.done), work.quiet) as bar:

            def asked(tasks: Iterable[Task]) -> Iterator[Reply]:
                return ask(tasks, options=teacher, store=store, progress=lambda spent: bar.says(told(spent)))

            rows = numbered(read(), journal.done)
            for number, entry in Conversation(rows, lesson.questions, asked, _finish(lesson)):
                if entry.get("open") and not giving.give_up:
                    open_[entry["reject"]["reason"]] += 1
                else:
                    journal.add(number, entry)
                bar()
    if open_:
        return open_
    folder.finish(decide, decide.summary)
    return folder


def _finish(lesson: Lesson) -> Callable[[Any, Sequence[Reply]], dict[str, Any]]:
    def finish(row: Any, replies: Sequence[Reply]) -> dict[str, Any]:
        try:
            entry = lesson.entry(row, replies)
        except (Unusable, OutlineError) as error:
            entry = refused(row, [Fault(error.code, error.detail)])
            entry["open"] = error.code in TEMPORARY
        return {**entry, "spent": spent_on(replies)} if replies else entry

    return finish


def spent_on(replies: Sequence[Reply]) -> dict[str, float | None]:
    """Returns what some replies took, ``usd`` None where a price is unknown."""
    usd = [reply.usd for reply in replies]
    return {
        "requests": sum(reply.attempts for reply in replies),
        "input_tokens": sum(reply.usage.input_tokens for reply in replies),
        "output_tokens": sum(reply.usage.output_tokens for reply in replies),
        "usd": None if None in usd else sum(filter(None, usd)),
        "seconds": sum(reply.seconds for reply in replies),
    }


def told(spent: Amount) -> str:
    """Returns in words what was spent."""
    money = f", ${spent.usd:.2f}" if spent.usd else ""
    return f"{spent.requests} requests, {spent.usage.tokens:,} tokens{money}"


def estimated(out: Path, lesson: Lesson, rows: Iterable[Any], teacher: TeacherOptions) -> Estimate:
    """Counts what asking about all rows would take beyond the replies that are there; asks nothing."""
    tasks = (task for row in rows for task in lesson.questions(row))
    if not (out / REPLIES).exists():
        return estimate(tasks, teacher)
    with AnswerStore(out / REPLIES) as store:
        return estimate(tasks, teacher, store)  # type: ignore[arg-type]


def estimate_text(found: Estimate) -> str:
    """Returns an estimate in words."""
    lines = [
        f"requests        {found.requests:,} ({found.stored:,} replies are there already)",
        f"input tokens    {found.usage.input_tokens:,}",
        f"output tokens   {found.usage.output_tokens:,}, at most {found.most.output_tokens:,}",
    ]
    if found.usd is None or found.usd_most is None:
        lines.append("US dollars      no price is known; give --price-input and --price-output")
    else:
        lines.append(f"US dollars      {found.usd:.2f}, at most {found.usd_most:.2f}")
    return "\n".join(lines)
