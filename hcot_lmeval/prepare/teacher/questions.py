"""What a teacher is asked, what comes back, and where that is kept.

A reply that is of no use is data: it has a `Failure`, and the row goes to the rejected ones.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError

from hcot_lmeval.columns import surrogate_in
from hcot_lmeval.prepare.reasons import TEMPORARY, Refused
from hcot_lmeval.store import JsonLines, StoreError


class Form(BaseModel):
    """A JSON object that a teacher is to write: exactly these keys, no value turned into another type."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


@cache
def schema_of(form: type[Form]) -> dict[str, Any]:
    """Returns the JSON schema of a form."""
    return form.model_json_schema()


class Message(NamedTuple):
    """A turn of the conversation with the teacher.

    Attributes:
        role: ``system``, ``user`` or ``assistant``.
        text: what is said.
    """

    role: str
    text: str


class Failure(NamedTuple):
    """Why a reply is of no use.

    Attributes:
        code: a key of `reasons.REASONS`.
        detail: more about it; never a key of the environment.
    """

    code: str
    detail: str


class Spent(NamedTuple):
    """What asking took.

    Attributes:
        requests: how many were sent.
        input_tokens: as the server counts them. Those of an attempt that timed out are an upper bound, and where a
            server does not count they are estimated.
        output_tokens: the same.
        usd: their price; None where one is unknown.
        seconds: from the first attempt to the end.
    """

    requests: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    usd: float | None = 0.0
    seconds: float = 0.0

    @property
    def tokens(self) -> int:
        return self.input_tokens + self.output_tokens

    def plus(self, other: Spent) -> Spent:
        """Returns the sum; with an unknown price its price is unknown."""
        return Spent(*(None if None in pair else sum(pair) for pair in zip(self, other, strict=True)))  # type: ignore

    def minus(self, other: Spent) -> Spent:
        """Returns the difference."""
        return self.plus(Spent(*(None if value is None else -value for value in other)))  # type: ignore[arg-type]


NOTHING = Spent()


@dataclass(frozen=True)
class Reply:
    """What became of a question.

    Attributes:
        key: of the `Task`.
        text: what the teacher said; empty where it said nothing.
        failure: why it is of no use; None for a good reply.
        spent: by all attempts.
        model: that has answered, as the server calls it.
        value: what `Task.accept` made of it; it is not stored.
    """

    key: str
    text: str = ""
    failure: Failure | None = None
    spent: Spent = NOTHING
    model: str = ""
    value: Any = None

    @property
    def is_final(self) -> bool:
        """Whether asking again would be a waste. To be turned away costs nothing, and a server's limits may change."""
        return self.failure is None or self.failure.code not in TEMPORARY | {"bad_request"}

    def failed(self, code: str, detail: str) -> Reply:
        """Returns the reply as one of no use."""
        return replace(self, value=None, failure=Failure(code, detail))

    def record(self) -> dict[str, Any]:
        """Returns JSON values, all but `value`."""
        requests, given, made, usd, seconds = self.spent
        return {
            "key": self.key,
            "text": self.text,
            "failure": self.failure and self.failure._asdict(),
            "usage": {"input_tokens": given, "output_tokens": made},
            "usd": usd,
            "seconds": seconds,
            "attempts": requests,
            "model": self.model,
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Reply:
        """Reads what `record` returned.

        Raises:
            KeyError, TypeError: it is none.
        """
        failure = record["failure"] and Failure(**record["failure"])
        spent = Spent(record["attempts"], **record["usage"], usd=record["usd"], seconds=record["seconds"])
        return cls(record["key"], record["text"], failure, spent, record["model"])


@dataclass(frozen=True)
class Task:
    """One question.

    Attributes:
        kind: the protocol.
        messages: the conversation so far.
        form: of the reply.
        depends: what the reply depends on besides: the model, its settings, the version of the prompt.
        accept: makes something of a reply, given as its form; raises `Refused` for one of no use. Not part of
            the key: a stored reply is read anew each time.
        repair: what is said when a reply cannot be used, with ``{{fault}}`` where the fault is to stand; None: nothing.
        share: output tokens to be expected, over those of the input, thinking apart; for estimates.
    """

    kind: str
    messages: Sequence[Message]
    form: type[Form]
    depends: Mapping[str, Any]
    accept: Callable[[Any], Any] = lambda value: value
    repair: str | None = None
    share: float = 0.2

    @cached_property
    def key(self) -> str:
        """A digest of everything that the reply depends on."""
        parts = (self.kind, list(self.messages), schema_of(self.form), dict(self.depends))
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]

    def again(self, reply: Reply) -> Task | None:
        """Returns the question that tells the fault of a reply and asks for a better one; None if there is none."""
        if self.repair is None or reply.failure is None or not reply.text.strip():
            return None
        request = self.repair.replace("{{fault}}", f"{reply.failure.code}: {reply.failure.detail}")
        messages = (*self.messages, Message("assistant", reply.text), Message("user", request))
        return replace(self, messages=messages, repair=None)

    def read(self, reply: Reply) -> Reply:
        """Returns a reply with its value, or with the failure that makes it useless."""
        if reply.failure is not None:
            return reply
        try:
            return replace(reply, value=self.accept(_parsed(reply.text, self.form)))
        except Refused as error:
            return reply.failed(error.code, error.detail)

    @property
    def size(self) -> int:
        """Bytes of all messages and of the schema."""
        schema = len(json.dumps(schema_of(self.form)))
        return schema + sum(len(message.text.encode("utf-8", "surrogatepass")) for message in self.messages)


def _parsed(text: str, form: type[Form]) -> Any:
    """The form that a text spells in JSON; a single code fence around it is taken off, nothing else is guessed."""
    if not text.strip():
        raise Refused("empty_reply", "there is no text")
    if surrogate_in(text, "text"):
        raise Refused("broken_text", "in its text")
    try:
        return form.model_validate_json(_unfenced(text))
    except ValidationError as error:
        faults = error.errors(include_url=False)
    if faults[0]["type"] == "json_invalid":
        raise Refused("wrong_json", f"{faults[0]['msg']} in {text[:120]!r}")
    listed = (f"{'.'.join(map(str, fault['loc'])) or 'the reply'}: {fault['msg']}" for fault in faults[:3])
    raise Refused("schema", "; ".join(listed))


def _unfenced(text: str) -> str:
    text = text.strip()
    if text.startswith("```") and text.endswith("```") and "\n" in text:
        return text[text.index("\n") : -3].strip()
    return text


class AnswerStore:
    """Every reply of a run, as it comes: an append-only file, so that nothing is asked twice.

        with AnswerStore(path) as store:
            store.get(task.key) or store.add(reply)

    A reply is on the disk before anybody sees it, and only one process may have the file open. Requests that were under
    way when a process was killed are not in it: they are asked again.

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

    def __iter__(self) -> Iterator[str]:
        """The keys of the replies that are not asked for again."""
        return iter(self._places)

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
