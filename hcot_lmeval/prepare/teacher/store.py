"""Every reply, as it comes: an append-only file, so that nothing is asked twice.

    with AnswerStore(path) as store:
        store.get(task.key) or store.add(reply)

A reply is on the disk before anybody sees it, and only one process may have the file open. Requests that were under way
when a process was killed are not in it: they are asked again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hcot_lmeval.prepare.teacher.questions import Reply, Spent
from hcot_lmeval.store import JsonLines, StoreError


class AnswerStore:
    """The replies of a run.

    Attributes:
        spent: for all of them, failed ones included; in US dollars as far as prices were known.

    Raises:
        StoreError: another process has it open, or a line is no reply.
    """

    def __init__(self, path: Path) -> None:
        self.spent = Spent()
        self._places: dict[str, int] = {}
        self._lines = JsonLines(path, alone=True)
        try:
            for place, record in self._lines:
                self._count(self._read(record), place)
        except BaseException:
            self._lines.close()
            raise

    def __enter__(self) -> AnswerStore:
        return self

    def __exit__(self, *_: object) -> None:
        self._lines.close()

    def __len__(self) -> int:
        """The number of replies that are not asked for again."""
        return len(self._places)

    def __contains__(self, key: object) -> bool:
        return key in self._places

    def get(self, key: str) -> Reply | None:
        """Returns the reply to a question; None if there is none yet, or only failures that may be gone."""
        place = self._places.get(key)
        return None if place is None else self._read(self._lines.read(place))

    def add(self, reply: Reply) -> Reply:
        """Keeps a reply; it is on the disk once this returns.

        Raises:
            ValueError: there is a final one with this key already.
        """
        if reply.key in self._places:
            raise ValueError(f"{self._lines.path} has a reply to {reply.key} already")
        self._count(reply, self._lines.append(reply.record()))
        return reply

    def _count(self, reply: Reply, place: int) -> None:
        self.spent = self.spent.plus(reply.spent._replace(usd=reply.spent.usd or 0.0))
        if reply.is_final:
            self._places[reply.key] = place

    def _read(self, record: dict[str, Any]) -> Reply:
        try:
            return Reply.from_record(record)
        except (KeyError, TypeError):
            raise StoreError(f"{self._lines.path} holds {str(record)[:60]}, which is no reply; move it away") from None
