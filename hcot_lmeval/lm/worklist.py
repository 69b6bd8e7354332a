"""The bookkeeping of one call of ``generate_until``: which requests are distinct, finished, or still to be done."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from hcot_lmeval.engine import Request
from hcot_lmeval.lm.journal import Journal
from hcot_lmeval.lm.requests import request_key
from hcot_lmeval.response import Response

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

logger = logging.getLogger(__name__)

OnDone = Callable[["Instance", Response], None]
"""Called once for every instance whose response is known."""


class Worklist:
    """Requests in, each distinct one once out, responses in the order of the requests.

    Args:
        journal: of finished requests, or None.
        on_done: told about every instance as soon as its response is known.
    """

    def __init__(self, journal: Journal | None, on_done: OnDone) -> None:
        self.journal = journal
        self._on_done = on_done
        self._keys: list[str] = []
        self._instances: dict[str, list[Instance]] = {}
        self._requests: dict[str, Request] = {}
        self._responses: dict[str, Response] = {}

    def add(self, instance: Instance, request: Request) -> None:
        """Appends an entry; one with a key that is there already is computed together with it."""
        key = request_key(request)
        self._keys.append(key)
        self._requests.setdefault(key, request)
        same = self._instances.setdefault(key, [])
        if not any(instance is other for other in same):
            same.append(instance)

    def __len__(self) -> int:
        """Distinct requests."""
        return len(self._requests)

    @property
    def finished(self) -> int:
        """Distinct requests whose response is known."""
        return len(self._responses)

    def resume(self) -> list[Response]:
        """Takes over what the journal holds and returns it."""
        if self.journal is None:
            return []
        self.journal.refresh()
        for key in self._requests:
            record = self.journal.get(key)
            if record is not None:
                self._finish(key, Response.from_dict(record["response"]))
        if self._responses:
            logger.warning(
                "%d of %d requests are already finished (%s; journal=off generates anew)",
                len(self._responses),
                len(self),
                self.journal.directory,
            )
        return list(self._responses.values())

    def open_requests(self) -> list[Request]:
        """Returns the distinct requests that are still to be generated, long prompts first.

        Long ones first, for the row that is admitted last would otherwise keep the batch waiting.
        """
        todo = [request for key, request in self._requests.items() if key not in self._responses]
        return sorted(todo, key=lambda request: -len(request.prompt_ids))

    def finish(self, request: Request, response: Response, facts: Mapping[str, Any]) -> None:
        """Records a generated response; the journal has it before anybody else."""
        key = request_key(request)
        if self.journal is not None:
            self.journal.add(key, {**facts, "response": response.as_dict()})
        self._finish(key, response)

    def responses(self) -> list[Response]:
        """Returns one response for each entry, in the order of `add`.

        Raises:
            KeyError: a request is not finished.
        """
        return [self._responses[key] for key in self._keys]

    def _finish(self, key: str, response: Response) -> None:
        self._responses[key] = response
        for instance in self._instances[key]:
            self._on_done(instance, response)
