"""Steps that ask a teacher: rows to questions, replies to rows, what it cost.

Replies are kept in ``OUT/replies.jsonl`` as they come, for all steps of a run: a step that was killed or started anew
asks nothing twice. A row whose reply was of no use is rejected with its code. A row that got none, because a limit was
reached or the server failed, stays open: the same command asks again, or rejects it with ``--give-up``.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial, reduce
from pathlib import Path
from typing import Any

from hcot_lmeval.prepare.folder import StepFolder
from hcot_lmeval.prepare.outline import OutlineError
from hcot_lmeval.prepare.protocols.asking import AskingProtocol
from hcot_lmeval.prepare.rows import Unreadable
from hcot_lmeval.prepare.steps import Numbered, Outcome, Progress, WorkOptions, numbered, refused, unread
from hcot_lmeval.prepare.teacher.options import TeacherOptions
from hcot_lmeval.prepare.teacher.questions import TEMPORARY, Spent, Task, Unusable
from hcot_lmeval.prepare.teacher.runner import Estimate, Teacher, ask, estimate
from hcot_lmeval.prepare.teacher.store import AnswerStore

REPLIES = "replies.jsonl"
"""The store of a run."""


def run_asking(
    folder: StepFolder,
    rows: Iterable[Any],
    count: Callable[[], int | None],
    protocol: AskingProtocol,
    teacher: TeacherOptions,
    work: WorkOptions,
    outcome: Outcome,
) -> Counter[str]:
    """Asks a teacher about all rows that are not done, as `run_rows` works on them.

    Returns:
        Why rows are still open, code -> rows; nothing where the step is finished.

    Raises:
        TeacherError: the teacher cannot be asked at all.
    """
    open_: Counter[str] = Counter()
    with (
        folder.journal() as journal,
        AnswerStore(folder.out / REPLIES) as store,
        Progress(folder.step, count(), len(journal.done), work.quiet) as bar,
    ):
        waiting, answer = numbered(rows, journal.done), partial(_entry, protocol)
        show = lambda spent: bar.show(_in_words(spent))  # noqa: E731
        for number, entry in ask(waiting, answer, options=teacher, store=store, progress=show):
            if entry.pop("open", False) and not teacher.give_up:
                open_[entry["reject"]["reason"]] += 1
            else:
                journal.add(number, entry)
            bar()
    if not open_:
        folder.finish(outcome, outcome.summary)
    return open_


async def _entry(protocol: AskingProtocol, teacher: Teacher, item: Numbered) -> tuple[int, dict[str, Any]]:
    """The number of a row and its entry of the journal; ``open`` where another run may get a reply."""
    number, row = item
    if isinstance(row, Unreadable):
        return number, unread(row)
    replies = []
    try:
        replies = await asyncio.gather(*map(teacher.reply, protocol.questions(row)))
        entry = protocol.entry(row, replies)
    except (Unusable, OutlineError) as error:
        entry = refused(row, error.code, error.detail) | {"open": error.code in TEMPORARY}
    if replies:
        entry["spent"] = reduce(Spent.plus, (reply.spent for reply in replies))._asdict()
    return number, entry


def _in_words(spent: Spent) -> str:
    money = f", ${spent.usd:.2f}" if spent.usd else ""
    return f"{spent.requests} requests, {spent.tokens:,} tokens{money}"


def estimated(out: Path, protocol: AskingProtocol, rows: Iterable[Any], teacher: TeacherOptions) -> str:
    """Returns in words what asking about all rows would take beyond the replies that are there; asks nothing."""
    tasks = (task for row in rows if not isinstance(row, Unreadable) for task in _questions(protocol, row))
    if (out / REPLIES).exists():
        with AnswerStore(out / REPLIES) as store:
            return _estimate_text(estimate(tasks, teacher, store))
    return _estimate_text(estimate(tasks, teacher))


def _questions(protocol: AskingProtocol, row: Any) -> Iterator[Task]:
    try:
        yield from protocol.questions(row)
    except Unusable:
        return


def _estimate_text(found: Estimate) -> str:
    expected, most = found.expected, found.most
    lines = [
        f"requests        {expected.requests:,} ({found.stored:,} replies are there already)",
        f"input tokens    {expected.input_tokens:,}",
        f"output tokens   {expected.output_tokens:,}, at most {most.output_tokens:,}",
    ]
    if expected.usd is None or most.usd is None:
        lines.append("US dollars      no price is known; give --price-input and --price-output")
    else:
        lines.append(f"US dollars      {expected.usd:.2f}, at most {most.usd:.2f}")
    return "\n".join(lines)
