"""Rows to questions for a teacher, and replies back to rows, as they come.

A row may need several questions (a long trace goes in windows) or none; replies come in any order. A row is finished
when its last reply is there. Only rows that wait for a reply are in memory: questions are made as the teacher takes
them.

This module imports the standard library alone.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

Finish = Callable[[Any, Sequence[Any]], dict[str, Any]]
"""A row and its replies -> the entry of the journal."""


@dataclass(eq=False)
class _Row:
    number: int
    row: Any
    keys: list[str]
    replies: dict[str, Any] = field(default_factory=dict)


class Conversation:
    """Asks for all rows and yields each with its entry of the journal when it is finished.

    Args:
        rows: with their numbers.
        questions: row -> its questions, each with a `key`, a digest of all that the reply depends on; or none.
        ask: questions -> replies in any order, one for each key; takes the questions as it needs them.
        finish: row and its replies, in the order of its questions -> the entry.
    """

    def __init__(
        self,
        rows: Iterable[tuple[int, Any]],
        questions: Callable[[Any], Sequence[Any]],
        ask: Callable[[Iterable[Any]], Iterable[Any]],
        finish: Finish,
    ) -> None:
        self._rows, self._questions, self._ask, self._finish = rows, questions, ask, finish
        self._waiting: dict[str, list[_Row]] = {}
        self._ready: deque[_Row] = deque()
        self._lock = threading.Lock()  # the teacher may take questions in another thread

    def __iter__(self) -> Iterator[tuple[int, dict[str, Any]]]:
        for reply in self._ask(self._asked()):
            self._arrived(reply)
            yield from self._finished()
        yield from self._finished()
        if self._waiting:
            raise RuntimeError(f"{len(self._waiting)} questions have no reply, among them {next(iter(self._waiting))}")

    def _asked(self) -> Iterator[Any]:
        for number, row in self._rows:
            questions = self._questions(row)
            state = _Row(number, row, [question.key for question in questions])
            if not questions:
                self._ready.append(state)
            for question in questions:
                with self._lock:
                    first = question.key not in self._waiting
                    self._waiting.setdefault(question.key, []).append(state)
                if first:
                    yield question

    def _arrived(self, reply: Any) -> None:
        with self._lock:
            states = self._waiting.pop(reply.key, [])
        for state in states:
            state.replies[reply.key] = reply
            if state.replies.keys() >= set(state.keys) and state not in self._ready:
                self._ready.append(state)

    def _finished(self) -> Iterator[tuple[int, dict[str, Any]]]:
        while self._ready:
            state = self._ready.popleft()
            yield state.number, self._finish(state.row, [state.replies[key] for key in state.keys])
