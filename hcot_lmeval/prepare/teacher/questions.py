"""What a teacher is asked and what comes back.

A reply that is of no use is data: it has a `Failure` with a code of `FAILURES`, and the row goes to the rejected ones.

This module imports the standard library alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

from hcot_lmeval.columns import surrogate_in

FAILURES = {
    "wrong_json": "the reply is no JSON",
    "schema": "the reply is JSON of another form than was asked for",
    "truncated": "the reply ends at the limit of output tokens",
    "refused": "the teacher or its content filter declined to answer",
    "empty_reply": "the reply has no text",
    "broken_text": "the reply holds half of a character (a lone surrogate)",
    "bad_request": "the server does not accept the question, perhaps for its length",
    "broken_response": "the server's response could not be read",
    "timeout": "no reply came in time",
    "rate_limited": "the server kept asking to come back later",
    "server_error": "the server kept failing",
    "connection": "the connection kept breaking",
    "budget": "it was not asked, for a limit of requests, tokens or money would have been crossed",
}
"""Code of a `Failure` -> what it means. Protocols add those of their own."""
TEMPORARY = frozenset({"timeout", "rate_limited", "server_error", "connection", "budget", "broken_response"})
"""Codes that may be gone next time: such a question is asked again by the next run."""


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
        code: a key of `FAILURES`, or of what the protocol adds.
        detail: more about it; never a key of the environment.
    """

    code: str
    detail: str


class Usage(NamedTuple):
    """Tokens, as the server counts them.

    Those of an attempt that timed out are an upper bound, and where a server does not count they are estimated.
    """

    input_tokens: int = 0
    output_tokens: int = 0

    @property
    def tokens(self) -> int:
        return self.input_tokens + self.output_tokens

    def plus(self, other: Usage) -> Usage:
        """Returns the sum."""
        return Usage(self.input_tokens + other.input_tokens, self.output_tokens + other.output_tokens)


class Unusable(ValueError):
    """A reply that a protocol cannot use; `code` says why."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(f"{code}: {detail}")
        self.code, self.detail = code, detail


@dataclass(frozen=True)
class Task:
    """One question.

    Attributes:
        key: a digest of everything that the reply depends on.
        messages: the conversation so far.
        schema: JSON schema of the reply; None for plain text.
        kind: the protocol.
        row_id: the row it is about, for messages; not part of the key.
        accept: raises `Unusable` for a reply that the protocol cannot use. Not part of the key: a stored reply is read
            anew each time.
        repair: what is said when a reply cannot be used, with ``{{fault}}`` where the fault is to stand; None: nothing.
        share: output tokens to be expected, over those of the input, thinking apart; for estimates.
    """

    key: str
    messages: tuple[Message, ...]
    schema: Mapping[str, Any] | None
    kind: str
    row_id: str
    accept: Callable[[Reply], object] | None = field(default=None, compare=False, repr=False)
    repair: str | None = field(default=None, compare=False, repr=False)
    share: float = field(default=0.2, compare=False, repr=False)

    @classmethod
    def make(
        cls,
        kind: str,
        row_id: str,
        messages: Sequence[Message],
        schema: Mapping[str, Any] | None,
        depends: Mapping[str, Any],
        accept: Callable[[Reply], object] | None = None,
        repair: str | None = None,
    ) -> Task:
        """Returns a question with its key.

        Args:
            kind: the protocol.
            row_id: the row.
            messages: the conversation.
            schema: of the reply.
            depends: what the reply depends on besides: the model, its settings, the version of the prompt.
            accept: see `Task`.
            repair: see `Task`.
        """
        key = _digest(kind, list(messages), schema, depends)
        return cls(key, tuple(messages), schema, kind, row_id, accept, repair)

    def again(self, reply: Reply) -> Task | None:
        """Returns the question that tells the fault of a reply and asks for a better one; None if there is none."""
        if self.repair is None or reply.failure is None or not reply.text.strip():
            return None
        told = self.repair.replace("{{fault}}", f"{reply.failure.code}: {reply.failure.detail}")
        messages = (*self.messages, Message("assistant", reply.text), Message("user", told))
        return replace(self, key=_digest(self.key, messages), messages=messages, repair=None)

    def read(self, reply: Reply) -> Reply:
        """Returns a stored reply with its data, or with the failure that makes it useless."""
        found = parse(reply, self.schema)
        if found.failure is None and (place := surrogate_in({"text": found.text, "data": found.data})):
            return found.failed("broken_text", f"in its {place}")
        if found.failure is None and self.accept is not None:
            try:
                self.accept(found)
            except Unusable as error:
                return found.failed(error.code, error.detail)
        return found

    @property
    def size(self) -> int:
        """Bytes of all messages and of the schema."""
        schema = len(json.dumps(self.schema)) if self.schema is not None else 0
        return schema + sum(len(message.text.encode("utf-8", "surrogatepass")) for message in self.messages)


NOTHING = Usage()


@dataclass(frozen=True)
class Reply:
    """What became of a question.

    Attributes:
        key: of the `Task`.
        text: what the teacher said; empty where it said nothing.
        data: its JSON, where a schema was given and it is one.
        failure: why it is of no use; None for a good reply.
        usage: tokens of all attempts.
        usd: what they cost; None where no price is known.
        seconds: from the first attempt to the end.
        attempts: requests that were sent.
        model: that has answered, as the server calls it.
    """

    key: str
    text: str = ""
    data: Any = None
    failure: Failure | None = None
    usage: Usage = NOTHING
    usd: float | None = None
    seconds: float = 0.0
    attempts: int = 0
    model: str = ""

    @property
    def is_final(self) -> bool:
        """Whether asking again would be a waste. To be turned away costs nothing, and a server's limits may change."""
        return self.failure is None or self.failure.code not in TEMPORARY | {"bad_request"}

    def record(self) -> dict[str, Any]:
        """Returns JSON values; `data` is read from the text again."""
        found = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "data"}
        return found | {"usage": self.usage._asdict(), "failure": self.failure and self.failure._asdict()}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Reply:
        """Reads what `record` returned.

        Raises:
            KeyError, TypeError: it is none.
        """
        failure = record["failure"]
        told = {"usage": Usage(**record["usage"]), "failure": None if failure is None else Failure(**failure)}
        return cls(**{**record, **told})

    def failed(self, code: str, detail: str) -> Reply:
        """Returns the reply as one of no use."""
        return replace(self, data=None, failure=Failure(code, detail))


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def parse(reply: Reply, schema: Mapping[str, Any] | None) -> Reply:
    """Reads the JSON of a reply; a single code fence around it is taken off, nothing else is guessed.

    Returns:
        The reply with its data, or with the failure ``empty_reply``, ``wrong_json`` or ``schema``.
    """
    if reply.failure is not None:
        return reply
    if not reply.text.strip():
        return reply.failed("empty_reply", "there is no text")
    if schema is None:
        return reply
    try:
        data = json.loads(unfenced(reply.text), parse_constant=_refuse_constant, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        return reply.failed("wrong_json", f"{error} in {reply.text[:120]!r}")
    faults = mismatches(data, schema)
    if faults:
        return reply.failed("schema", "; ".join(faults[:3]))
    return replace(reply, data=data)


def unfenced(text: str) -> str:
    """Takes off one Markdown code fence around the whole text."""
    text = text.strip()
    if text.startswith("```") and text.endswith("```") and "\n" in text:
        return text[text.index("\n") : -3].strip()
    return text


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"a key comes twice among {', '.join(key for key, _ in pairs)}")
    return found


_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
}


def mismatches(data: Any, schema: Mapping[str, Any], where: str = "the reply") -> list[str]:
    """Returns in words how JSON values differ from a schema: type, properties, required, items, enum, anyOf.

    Schemas here are closed: a property that is not named is a fault.
    """
    if "anyOf" in schema:
        ways = [mismatches(data, way, where) for way in schema["anyOf"]]
        return [] if [] in ways else [" or ".join(way[0] for way in ways)]
    name = schema["type"]
    if not isinstance(data, _TYPES[name]) or (name != "boolean" and type(data) is bool):
        return [f"{where} is {type(data).__name__} in place of {name}"]
    if "enum" in schema and data not in schema["enum"]:
        return [f"{where} is {data!r} in place of one of {', '.join(map(repr, schema['enum']))}"]
    if isinstance(data, dict):
        return _mismatches_of_object(data, schema, where)
    if isinstance(data, list):
        return [fault for n, item in enumerate(data) for fault in mismatches(item, schema["items"], f"{where}[{n}]")]
    return []


def _mismatches_of_object(data: dict[str, Any], schema: Mapping[str, Any], where: str) -> list[str]:
    known = schema["properties"]
    faults = [f"{where} lacks {key}" for key in schema.get("required", ()) if key not in data]
    faults += [f"{where} has unknown {key}" for key in data if key not in known]
    for key in data.keys() & known.keys():
        faults += mismatches(data[key], known[key], f"{where}.{key}")
    return faults
