"""The bookkeeping of one call of ``generate_until``: which requests are distinct, finished, or still to be done."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from hcot_lmeval.engine import Request
from hcot_lmeval.lm.journal import Journal
from hcot_lmeval.lm.requests import request_key
from hcot_lmeval.lm.statistics import RunStatistics
from hcot_lmeval.notes import Note, NoteTaker
from hcot_lmeval.response import Response

logger = logging.getLogger(__name__)


class Notes(NoteTaker):
    """Notes that end no run: where they can no longer be written, it goes on without."""

    _works = True

    def add(self, note: Note) -> None:
        """Appends one finished request and flushes."""
        if not self._works:
            return
        try:
            super().add(note)
        except OSError as error:
            logger.error("notes=%s can no longer be written (%s): the run goes on without", self.path, error.strerror)
            self._works = False


def _response(record: Mapping[str, Any]) -> Response | None:
    """The response in a record of the journal; None if somebody has taken parts of it away."""
    try:
        response = Response.from_dict(record["response"])
        RunStatistics().add(response.stats, resumed=True)
    except (KeyError, TypeError) as error:
        logger.warning("a record of the journal lacks %s: its request is generated anew", error)
        return None
    return response


class Worklist:
    """Requests in, each distinct one once out, responses in the order of the requests.

    Args:
        journal: of finished requests, or None.
    """

    def __init__(self, journal: Journal | None) -> None:
        self.journal = journal
        self._keys: list[str] = []
        self._requests: dict[str, Request] = {}
        self._responses: dict[str, Response] = {}

    def add(self, request: Request) -> None:
        """Appends an entry; one with a key that is there already is computed together with it."""
        key = request_key(request)
        self._keys.append(key)
        self._requests.setdefault(key, request)

    def __len__(self) -> int:
        """Distinct requests."""
        return len(self._requests)

    @property
    def finished(self) -> int:
        """Distinct requests whose response is known."""
        return len(self._responses)

    def resume(self, notes: Notes | None = None) -> list[Response]:
        """Takes over what the journal holds and returns it; `notes` get nothing of it."""
        if self.journal is None:
            return []
        self.journal.refresh()
        for key in self._requests:
            if (record := self.journal.get(key)) is not None and (response := _response(record)) is not None:
                self._responses[key] = response
        if self._responses:
            logger.warning(
                "%d of %d requests are already finished (%s; journal=off generates anew)",
                len(self._responses),
                len(self),
                self.journal.directory,
            )
            if notes is not None and notes.is_new:
                logger.warning(
                    "notes=%s will hold nothing of these %d: what was finished without notes has to be generated anew "
                    "for them, with journal=off",
                    notes.path.parent,
                    len(self._responses),
                )
        return list(self._responses.values())

    def open_requests(self) -> list[Request]:
        """Returns the distinct requests that are still to be generated, long prompts first.

        Long ones first, for the row that is admitted last would otherwise keep the batch waiting.
        """
        todo = [request for key, request in self._requests.items() if key not in self._responses]
        return sorted(todo, key=lambda request: -len(request.prompt_ids))

    def finish(self, request: Request, response: Response, facts: Mapping[str, Any]) -> None:
        """Records a generated response; the journal has it before anybody else, unless it can no longer be written."""
        key = request_key(request)
        self._responses[key] = response
        if self.journal is None:
            return
        try:
            self.journal.add(key, {**facts, "response": response.as_dict()})
        except OSError as error:
            logger.error(
                "journal=%s can no longer be written (%s): the run goes on, and no other run can take over what it "
                "finishes from here on",
                self.journal.directory.parent,
                error.strerror,
            )
            self.journal = None

    def kept(self) -> str:
        """What of a run that is stopped now is not lost."""
        if self.journal is None:
            return f"nothing of the {self.finished} finished requests is kept, for there is no journal (journal=DIR)"
        return (
            f"{self.finished} of {len(self)} requests are finished and kept in {self.journal.directory}; the same "
            "command goes on from there"
        )

    def responses(self) -> list[Response]:
        """Returns one response for each entry, in the order of `add`.

        Raises:
            KeyError: a request is not finished.
        """
        return [self._responses[key] for key in self._keys]
