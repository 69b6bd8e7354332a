"""Asks a teacher about many rows, several questions at a time, each at most once.

    with AnswerStore(path) as store:
        for reply in ask(tasks, Teacher.reply, options=options, store=store):
            ...

Replies are kept in ``OUT/replies.jsonl`` as they come, for all steps of a run: a step that was killed or started anew
asks nothing twice. A row whose reply was of no use is rejected with its code. A row that got none, because a limit was
reached or the server failed, stays open: the same command asks again, or rejects it with ``--give-up``.

Results come in any order, and rows are taken as there is room for them. What the store has is not asked. A reply of no
use is a reply with a failure; only what every further request would meet too (a key that is not accepted, a model that
is not there, an account without credit) ends the run, as a `TeacherError`.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Container, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial, reduce
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakValueDictionary

from hcot_lmeval.prepare.folder import StepFolder
from hcot_lmeval.prepare.reasons import TEMPORARY, Refused
from hcot_lmeval.prepare.rows import Unreadable
from hcot_lmeval.prepare.steps import Numbered, Outcome, WorkOptions, numbered, progress, refused, unread
from hcot_lmeval.prepare.teacher.client import FATAL, Answer, Client, RequestFailed
from hcot_lmeval.prepare.teacher.options import BYTES_PER_TOKEN, Budget, Prices, TeacherOptions, input_tokens
from hcot_lmeval.prepare.teacher.protocols import AskingProtocol
from hcot_lmeval.prepare.teacher.questions import AnswerStore, Failure, Reply, Spent, Task

Row = TypeVar("Row")
Result = TypeVar("Result")
REFUSALS = 8
"""So many questions turned away, and none answered, are the fault of the settings and not of the questions."""
LONGEST = 60.0
"""Seconds of the longest wait that the server did not ask for."""
PATIENCE = 600.0
"""Seconds; a server that asks to wait longer is not waited for."""


class TeacherError(RuntimeError):
    """The teacher cannot be asked at all."""


def ask(
    rows: Iterable[Row],
    answer: Callable[[Teacher, Row], Awaitable[Result]],
    *,
    options: TeacherOptions,
    store: AnswerStore,
    progress: Callable[[Spent], None] = lambda spent: None,
) -> Iterator[Result]:
    """Yields what `answer` returns for every row, as it comes.

    Args:
        rows: so many are taken at once as requests may be open.
        answer: asks the teacher what it needs to know about a row.
        options: the teacher and the limits, which hold for all that is in the store together.
        store: where replies are kept, before anybody sees them.
        progress: is told what was spent so far.

    Raises:
        TeacherError: the key, the model or the account is not accepted.
        ValueError: the key is not in the environment, or no price is known where money is limited.
    """
    waiting, open_ = iter(rows), set[asyncio.Future[Result]]()
    with asyncio.Runner() as runner:
        teacher = runner.run(_opened(options, store))
        try:
            while True:
                while len(open_) < options.concurrency and (row := next(waiting, None)) is not None:
                    open_.add(asyncio.ensure_future(answer(teacher, row), loop=runner.get_loop()))
                if not open_:
                    return
                done, open_ = runner.run(_first(open_))
                for error in [each.exception() for each in done]:
                    if isinstance(error, RequestFailed):
                        key = " or ".join(options.provider.keys)
                        advice = _ADVICE[error.code].format(teacher=options.teacher, key=key)
                        raise TeacherError(f"{advice} ({error.detail})")
                    if error is not None:
                        raise error
                progress(teacher.budget.spent)
                yield from (each.result() for each in done)
        finally:
            runner.run(_closed(teacher, open_))


_ADVICE = {
    "auth": "{teacher} does not accept the key in {key}; nothing further was asked",
    "not_found": "{teacher} is not there; check the name of the model and --base-url",
    "quota": "the account of {teacher} is exhausted; add credit and run the same command again",
    "settings": f"{{teacher}} turned the first {REFUSALS} questions away, so it may not take such settings",
    "library": "the client library cannot ask {teacher} like this",
}


async def _opened(options: TeacherOptions, store: AnswerStore) -> Teacher:
    teacher = Teacher(options, store)
    await teacher.client.__aenter__()
    return teacher


async def _first(open_: set[asyncio.Future[Result]]) -> tuple[set[asyncio.Future[Result]], set[asyncio.Future[Result]]]:
    return await asyncio.wait(open_, return_when=asyncio.FIRST_COMPLETED)


async def _closed(teacher: Teacher, open_: set[asyncio.Future[Result]]) -> None:
    """Gives up what is under way, and closes the connections."""
    for each in open_:
        each.cancel()
    await asyncio.gather(*open_, return_exceptions=True)
    await teacher.client.__aexit__()


class Teacher:
    """Answers questions, within the limits and at most so many at once; made within an event loop.

    Attributes:
        client: sends the requests.
        budget: what was spent, and the limits.
    """

    def __init__(self, options: TeacherOptions, store: AnswerStore) -> None:
        self._options, self._store = options, store
        self.client = Client(options)
        self.budget = Budget(options, store.spent)
        self._room = asyncio.Semaphore(options.concurrency)
        self._keys: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()  # of the questions under way
        self._rng = random.Random()
        self._not_before = 0.0  # when the server wants to be asked again, by the loop's clock
        self._refusals = 0  # questions turned away before any was answered
        self._answers = False

    async def reply(self, task: Task) -> Reply:
        """Returns the reply to a question, mended if possible; from the store, if it is there."""
        raw = await self._once(task)
        reply = task.read(raw)
        again = task.again(reply) if raw.failure is None else None
        if again is None:
            return reply
        mended = again.read(await self._once(again))
        if mended.failure is not None and mended.failure.code not in TEMPORARY:
            mended = mended.failed(mended.failure.code, f"{mended.failure.detail} (asked twice)")
        return replace(mended, key=task.key, spent=reply.spent.plus(mended.spent))

    async def _once(self, task: Task) -> Reply:
        """The raw reply; two that ask the same wait for each other."""
        async with self._keys.setdefault(task.key, asyncio.Lock()):
            if (known := self._store.get(task.key)) is not None:
                return known
            async with self._room:
                reply = await self._asked(task)
            return self._store.add(reply) if reply.spent.requests else reply

    async def _asked(self, task: Task) -> Reply:
        began = time.monotonic()
        reply = Reply(task.key, spent=Spent(usd=None if self.budget.prices.at() is None else 0.0))
        for attempt in range(self._options.attempts):
            await self._wait_for_server()
            reserved = await self.budget.reserve(task)
            if isinstance(reserved, str):
                reply = replace(reply, failure=reply.failure or Failure("budget", reserved))
                break
            found, spent = await self._attempt(task, reserved)
            reply = replace(reply, spent=reply.spent.plus(spent))
            if isinstance(found, Answer):
                reply = _answered(reply, found)
                break
            again = await self._may_retry(found, attempt)
            reply = reply.failed(found.code, found.detail)
            if not again:
                break
        return replace(reply, spent=reply.spent._replace(seconds=round(time.monotonic() - began, 3)))

    async def _attempt(self, task: Task, reserved: Spent) -> tuple[Answer | RequestFailed, Spent]:
        """One request, with what it has cost."""
        try:
            answer = self._counted(await self.client.complete(task), task)
        except RequestFailed as error:
            spent = reserved if error.code == "timeout" else Spent(1)  # a late reply may be charged all the same
            await self.budget.settle(reserved, spent)
            self._refusals += error.code == "bad_request" and not self._answers
            if error.code in FATAL:
                raise
            if self._refusals == REFUSALS and not self._answers:
                raise RequestFailed("settings", error.detail) from None
            return error, spent
        await self.budget.settle(reserved, answer.spent, task.size)
        self._answers = True
        return answer, answer.spent

    def _counted(self, answer: Answer, task: Task) -> Answer:
        """The answer, with an estimate where the server does not count tokens."""
        if answer.spent.input_tokens:
            return answer
        size, said = input_tokens(task), int(len(answer.text.encode()) / BYTES_PER_TOKEN) + 1
        return replace(answer, spent=Spent(1, size, said, self.budget.prices.at(size, said)))

    async def _may_retry(self, failed: RequestFailed, attempt: int) -> bool:
        """Waits for the next attempt; False if there is to be none."""
        seconds = delay(attempt, failed.after, self._options.first_wait, self._rng)
        if seconds is None:
            failed.detail += f"; it asks to wait {failed.after:g} s, more than {PATIENCE:g} s"
            return False
        if failed.after is not None:  # it holds for everybody, though this question may be given up
            self._not_before = max(self._not_before, asyncio.get_running_loop().time() + failed.after)
        if not failed.retry or attempt + 1 == self._options.attempts:
            return False
        await asyncio.sleep(seconds)
        return True

    async def _wait_for_server(self) -> None:
        while (seconds := self._not_before - asyncio.get_running_loop().time()) > 0:
            await asyncio.sleep(seconds)


def delay(attempt: int, after: float | None, first: float, rng: random.Random) -> float | None:
    """Returns the seconds to wait before the next attempt, half of them by chance, so that not all come back at once.

    Args:
        attempt: number of the attempt that failed, from 0.
        after: what the server asks for; None if it does not.
        first: longest wait behind the first attempt; doubles each time, up to `LONGEST`.
        rng: for the jitter.

    Returns:
        The seconds; None if the server asks for more than `PATIENCE`.
    """
    wait = min(LONGEST, first * 2**attempt) * rng.uniform(0.5, 1.0)
    if after is None:
        return wait
    return None if after > PATIENCE else after + wait / 10


def _answered(reply: Reply, answer: Answer) -> Reply:
    reply = replace(reply, text=answer.text, model=answer.model, failure=None)
    if answer.code:
        return reply.failed(answer.code, f"{answer.spent.output_tokens} output tokens; ends {answer.text[-60:]!r}")
    return reply


# --- steps that ask ---------------------------------------------------------------------------------------------------

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
        progress(folder.step, count(), len(journal.done), work.quiet) as bar,
    ):
        waiting, answer = numbered(rows, journal.done), partial(_entry, protocol)
        show = lambda spent: bar.set_postfix_str(_in_words(spent), refresh=False)  # noqa: E731
        for number, entry in ask(waiting, answer, options=teacher, store=store, progress=show):
            if entry.pop("open", False) and not teacher.give_up:
                open_[entry["reject"]["reason"]] += 1
            else:
                journal.add(number, entry)
            bar.update()
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
    except Refused as error:
        entry = refused(row, error.code, error.detail) | {"open": error.code in TEMPORARY}
    if replies:
        entry["spent"] = reduce(Spent.plus, (reply.spent for reply in replies))._asdict()
    return number, entry


def _in_words(spent: Spent) -> str:
    money = f", ${spent.usd:.2f}" if spent.usd else ""
    return f"{spent.requests} requests, {spent.tokens:,} tokens{money}"


def estimated(out: Path, protocol: AskingProtocol, rows: Iterable[Any], teacher: TeacherOptions) -> str:
    """Returns in words what asking about all rows would take beyond the replies that are there; asks nothing.

    Thinking is in the most alone, and so is asking again. Needs no key and no network.
    """
    known: Container[str] = ()
    if (out / REPLIES).exists():
        with AnswerStore(out / REPLIES) as store:
            known = frozenset(store)
    asked, stored, seen = Spent(), 0, set[str]()
    for task in (task for row in rows if not isinstance(row, Unreadable) for task in _questions(protocol, row)):
        if task.key in seen or task.key in known:
            stored += 1
            continue
        seen.add(task.key)
        size = input_tokens(task)
        asked = asked.plus(Spent(1, size, min(teacher.output_tokens, int(size * task.share))))
    most, prices = asked.requests * teacher.output_tokens, Prices(teacher)
    expected, worst = (prices.at(asked.input_tokens, output) for output in (asked.output_tokens, most))
    priced = expected is not None and worst is not None
    return "\n".join(
        (
            f"requests        {asked.requests:,} ({stored:,} replies are there already)",
            f"input tokens    {asked.input_tokens:,}",
            f"output tokens   {asked.output_tokens:,}, at most {most:,}",
            f"US dollars      {expected:.2f}, at most {worst:.2f}"
            if priced
            else "US dollars      no price is known; give --price-input and --price-output",
        )
    )


def _questions(protocol: AskingProtocol, row: Any) -> Iterator[Task]:
    with suppress(Refused):
        yield from protocol.questions(row)
