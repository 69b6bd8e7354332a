"""Asks all questions, several at a time, each at most once.

    with AnswerStore(path) as store:
        for reply in ask(tasks, options=options, store=store):
            ...

Replies come in any order. Questions are taken as there is room for them. What the store has is not asked. A reply of no
use is a reply with a failure; only what every further request would meet too (a key that is not accepted, a model that
is not there, an account without credit) ends the run, as a `TeacherError`.

This module imports the standard library alone.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass, replace

from hcot_lmeval.prepare.teacher.budget import BYTES_PER_TOKEN, Amount, Budget, input_tokens
from hcot_lmeval.prepare.teacher.client import FATAL, Answer, Client, Trouble
from hcot_lmeval.prepare.teacher.options import TeacherOptions
from hcot_lmeval.prepare.teacher.prices import Prices
from hcot_lmeval.prepare.teacher.questions import TEMPORARY, Failure, Reply, Task, Usage
from hcot_lmeval.prepare.teacher.retry import PATIENCE, delay
from hcot_lmeval.prepare.teacher.store import AnswerStore

REFUSALS = 8
"""So many questions turned away, and none answered, are the fault of the settings and not of the questions."""


class TeacherError(RuntimeError):
    """The teacher cannot be asked at all."""


def ask(
    tasks: Iterable[Task],
    *,
    options: TeacherOptions,
    store: AnswerStore,
    progress: Callable[[Amount], None] | None = None,
) -> Iterator[Reply]:
    """Yields a reply to every question, as they come.

    Args:
        tasks: questions; no two with one key are to be open at the same time.
        options: the teacher and the limits, which hold for all that is in the store together.
        store: where replies are kept, before they are yielded.
        progress: is told what was spent so far.

    Raises:
        TeacherError: the key, the model or the account is not accepted.
        ValueError: the key is not in the environment, or no price is known where money is limited.
    """
    with asyncio.Runner() as runner:
        talk = runner.run(_begin(options, store))
        try:
            yield from _replies(iter(tasks), talk, runner, options, progress)
        finally:
            runner.run(talk.end())


def _replies(
    waiting: Iterator[Task],
    talk: _Talk,
    runner: asyncio.Runner,
    options: TeacherOptions,
    progress: Callable[[Amount], None] | None,
) -> Iterator[Reply]:
    while True:
        while len(talk.open) < options.concurrency and (task := next(waiting, None)) is not None:
            talk.open.add(runner.get_loop().create_task(talk.reply(task)))
        if not talk.open:
            return
        done, talk.open = runner.run(_first(talk.open))
        _raise_fatal(done, options)
        if progress is not None:
            progress(talk.budget.spent)
        yield from (each.result() for each in done)


async def _begin(options: TeacherOptions, store: AnswerStore) -> _Talk:
    talk = _Talk(options, store)
    await talk.client.__aenter__()
    return talk


async def _first(open_: set[asyncio.Task[Reply]]) -> tuple[set[asyncio.Task[Reply]], set[asyncio.Task[Reply]]]:
    return await asyncio.wait(open_, return_when=asyncio.FIRST_COMPLETED)


def _raise_fatal(done: set[asyncio.Task[Reply]], options: TeacherOptions) -> None:
    for error in [each.exception() for each in done]:
        if isinstance(error, Trouble):
            raise TeacherError(_ADVICE[error.code].format(**_names(options)) + f" ({error.detail})")
        if error is not None:
            raise error


_ADVICE = {
    "auth": "{teacher} does not accept the key in {key}; nothing further was asked",
    "not_found": "{teacher} is not there; check the name of the model and --base-url",
    "quota": "the account of {teacher} is exhausted; add credit and run the same command again",
    "settings": f"{{teacher}} turned the first {REFUSALS} questions away, so it may not take such settings",
    "library": "the client library cannot ask {teacher} like this",
}


def _names(options: TeacherOptions) -> dict[str, str]:
    return {"teacher": str(options.teacher), "key": " or ".join(options.provider.keys)}


class _Talk:
    """What requests share; made within the event loop."""

    def __init__(self, options: TeacherOptions, store: AnswerStore) -> None:
        self._options, self._store = options, store
        self.client = Client(options)
        spent = Amount(store.requests, store.usage, store.usd)
        self.budget = Budget(options, self.client.prices.at, spent)
        self._rng = random.Random()
        self._not_before = 0.0  # when the server wants to be asked again, by the loop's clock
        self._refusals = 0  # questions turned away before any was answered
        self._answers = False
        self.open: set[asyncio.Task[Reply]] = set()

    async def end(self) -> None:
        """Gives up what is under way, and closes the connections."""
        for each in self.open:
            each.cancel()
        await asyncio.gather(*self.open, return_exceptions=True)
        await self.client.__aexit__()

    async def reply(self, task: Task) -> Reply:
        """Returns the reply to a question, mended if possible; from the store, if it is there."""
        raw = await self._once(task)
        reply = task.read(raw)
        again = task.again(reply) if raw.failure is None else None
        if again is None:
            return reply
        mended = again.read(await self._once(again))
        if mended.failure is not None and mended.failure.code not in TEMPORARY:
            mended = replace(mended, failure=Failure(mended.failure.code, f"{mended.failure.detail} (asked twice)"))
        usd = None if None in (reply.usd, mended.usd) else (reply.usd or 0) + (mended.usd or 0)
        return replace(
            mended,
            key=task.key,
            usage=reply.usage.plus(mended.usage),
            usd=usd,
            seconds=reply.seconds + mended.seconds,
            attempts=reply.attempts + mended.attempts,
        )

    async def _once(self, task: Task) -> Reply:
        if (known := self._store.get(task.key)) is not None:
            return known
        reply = await self._asked(task)
        return self._store.add(reply) if reply.attempts else reply

    async def _asked(self, task: Task) -> Reply:
        began = time.monotonic()
        reply = Reply(task.key, usd=0.0 if self.client.prices.known else None)
        for attempt in range(self._options.attempts):
            await self._wait_for_server()
            reserved = await self.budget.reserve(task)
            if isinstance(reserved, str):
                reply = replace(reply, failure=reply.failure or Failure("budget", reserved))
                break
            found = await self._attempt(task, reserved)
            reply = _charged(reply, found[1])
            if isinstance(found[0], Answer):
                reply = _answered(reply, found[0])
                break
            again = await self._may_retry(found[0], attempt)
            reply = reply.failed(found[0].code, found[0].detail)
            if not again:
                break
        return replace(reply, seconds=round(time.monotonic() - began, 3))

    async def _attempt(self, task: Task, reserved: Amount) -> tuple[Answer | Trouble, Amount]:
        """One request, with what it has cost."""
        spent = Amount(1)
        try:
            answer = self._counted(await self.client.complete(task), task)
            spent = Amount(1, answer.usage, answer.usd or 0.0)
            await self.budget.settle(reserved, spent, task.size)
            self._answers = True
            return answer, spent
        except Trouble as trouble:
            if trouble.code == "timeout":
                spent = reserved  # it may be charged all the same
            await self.budget.settle(reserved, spent)
            self._refusals += trouble.code == "bad_request" and not self._answers
            if trouble.code in FATAL:
                raise
            if self._refusals == REFUSALS and not self._answers:
                raise Trouble("settings", trouble.detail) from None
            return trouble, spent

    def _counted(self, answer: Answer, task: Task) -> Answer:
        """The answer, with an estimate where the server does not count tokens."""
        if answer.usage.input_tokens:
            return answer
        usage = Usage(input_tokens(task), int(len(answer.text.encode()) / BYTES_PER_TOKEN) + 1)
        return replace(answer, usage=usage, usd=self.client.prices.at(usage))

    async def _may_retry(self, trouble: Trouble, attempt: int) -> bool:
        """Waits for the next attempt; False if there is to be none."""
        seconds = delay(attempt, trouble.after, self._options.first_wait, self._rng)
        if seconds is None:
            trouble.detail += f"; it asks to wait {trouble.after:g} s, more than {PATIENCE:g} s"
            return False
        if trouble.after is not None:  # it holds for everybody, though this question may be given up
            self._not_before = max(self._not_before, asyncio.get_running_loop().time() + trouble.after)
        if not trouble.retry or attempt + 1 == self._options.attempts:
            return False
        await asyncio.sleep(seconds)
        return True

    async def _wait_for_server(self) -> None:
        while (seconds := self._not_before - asyncio.get_running_loop().time()) > 0:
            await asyncio.sleep(seconds)


def _charged(reply: Reply, spent: Amount) -> Reply:
    usd = None if reply.usd is None else reply.usd + spent.usd
    return replace(reply, attempts=reply.attempts + 1, usage=reply.usage.plus(spent.usage), usd=usd)


def _answered(reply: Reply, answer: Answer) -> Reply:
    reply = replace(reply, text=answer.text, model=answer.model, failure=None)
    if answer.code:
        return reply.failed(answer.code, f"{answer.usage.output_tokens} output tokens; ends {answer.text[-60:]!r}")
    return reply


@dataclass(frozen=True)
class Estimate:
    """What asking would take.

    Attributes:
        requests: questions that the store does not answer.
        stored: questions that it does.
        usage: tokens that are to be expected, without thinking and without asking again.
        most: tokens if every reply is as long as is allowed.
        usd: cost of `usage`; None where no price is known.
        usd_most: cost of `most`.
    """

    requests: int
    stored: int
    usage: Usage
    most: Usage
    usd: float | None
    usd_most: float | None


def estimate(tasks: Iterable[Task], options: TeacherOptions, known: Container[str] = ()) -> Estimate:
    """Counts without asking; needs no key and no network.

    Args:
        tasks: questions.
        options: the teacher.
        known: keys that the store answers.
    """
    prices, usage, most, seen, stored = Prices(options), Usage(), Usage(), set[str](), 0
    for task in tasks:
        if task.key in seen or task.key in known:
            stored += 1
            continue
        seen.add(task.key)
        size = input_tokens(task)
        usage = usage.plus(Usage(size, min(options.output_tokens, int(size * task.share))))
        most = most.plus(Usage(size, options.output_tokens))
    return Estimate(len(seen), stored, usage, most, prices.at(usage), prices.at(most))
