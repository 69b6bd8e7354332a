"""A local server that speaks the three protocols of teachers and replies as a script says.

    with ScriptedTeacher([Say("{}"), Status(429, (("Retry-After", "0"),)), Reset()]) as server:
        ...                     # server.url(provider), server.requests

A script is a list of replies, given one after the other, the last one again and again; or a function from the `Asked`
to a reply. The server runs in threads of this process, on a port of the loopback interface.
"""

from __future__ import annotations

import json
import secrets
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple


class Asked(NamedTuple):
    """A request as it came over HTTP."""

    protocol: str
    path: str
    headers: dict[str, str]
    body: dict[str, Any]

    @property
    def key(self) -> str | None:
        """The key that was sent, whichever header has it."""
        return (
            self.headers.get("x-api-key")
            or self.headers.get("x-goog-api-key")
            or (self.headers.get("authorization", "").removeprefix("Bearer ") or None)
        )

    @property
    def system(self) -> str:
        if self.protocol == "openai":
            return "".join(m["content"] for m in self.body["messages"] if m["role"] == "system")
        if self.protocol == "anthropic":
            found = self.body.get("system", "")
            return found if isinstance(found, str) else "".join(part["text"] for part in found)
        return "".join(part["text"] for part in self.body.get("systemInstruction", {}).get("parts", ()))

    @property
    def turns(self) -> list[tuple[str, str]]:
        """Role and text of what is no system prompt."""
        if self.protocol == "gemini":
            return [(c["role"], "".join(part["text"] for part in c["parts"])) for c in self.body["contents"]]
        messages = [m for m in self.body["messages"] if m["role"] != "system"]
        return [(m["role"], _text(m["content"])) for m in messages]

    @property
    def schema(self) -> dict[str, Any] | None:
        """The JSON schema that was sent, wherever the protocol has it."""
        if self.protocol == "openai":
            return self.body.get("response_format", {}).get("json_schema", {}).get("schema")
        if self.protocol == "anthropic":
            return self.body.get("output_config", {}).get("format", {}).get("schema")
        config = self.body.get("generationConfig", {})
        return config.get("responseJsonSchema") or config.get("responseSchema")

    @property
    def output_tokens(self) -> int | None:
        if self.protocol == "gemini":
            return self.body["generationConfig"].get("maxOutputTokens")
        return self.body.get("max_completion_tokens", self.body.get("max_tokens"))


def _text(content: Any) -> str:
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


class Say(NamedTuple):
    """A reply; ``end`` is ``stop``, ``length`` or ``refusal``."""

    text: str
    end: str = "stop"
    seconds: float = 0.0
    usage: tuple[int, int] = (100, 10)


class Status(NamedTuple):
    """An HTTP error."""

    code: int
    headers: tuple[tuple[str, str], ...] = ()
    message: str = "no"
    kind: str = "some_error"


class Raw(NamedTuple):
    """Bytes in place of the protocol's JSON, as 200."""

    body: bytes
    type: str = "application/json"


class Reset(NamedTuple):
    """The connection is reset before anything is said."""


Script = Sequence[Any] | Callable[[Asked], Any]

FINISH = {
    "openai": {"stop": "stop", "length": "length", "refusal": "content_filter"},
    "anthropic": {"stop": "end_turn", "length": "max_tokens", "refusal": "refusal"},
    "gemini": {"stop": "STOP", "length": "MAX_TOKENS", "refusal": "SAFETY"},
}


@dataclass
class ScriptedTeacher:
    """The server.

    Attributes:
        script: what it replies.
        requests: what it was asked, in the order of arrival.
        most: the largest number of requests that were open at the same time.
    """

    script: Script
    requests: list[Asked] = field(default_factory=list)
    most: int = 0

    def __enter__(self) -> ScriptedTeacher:
        self._lock, self._open = threading.Lock(), 0
        self.token = secrets.token_hex(8)  # a late client of an earlier server on this port does not know it
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def port(self) -> int:
        return self._server.server_address[1]

    def url(self, provider: str) -> str:
        """The base URL for a client of a provider."""
        return f"http://127.0.0.1:{self.port}/{self.token}" + ("/v1" if provider in ("openai", "local") else "")

    def reply_to(self, asked: Asked) -> Any:
        with self._lock:
            self._open += 1
            self.most = max(self.most, self._open)
            self.requests.append(asked)
            place = len(self.requests) - 1
        try:
            reply = self.script(asked) if callable(self.script) else self.script[min(place, len(self.script) - 1)]
            time.sleep(getattr(reply, "seconds", 0.0))
            return reply
        finally:
            with self._lock:
                self._open -= 1


def _handler(teacher: ScriptedTeacher) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            headers = {name.lower(): value for name, value in self.headers.items()}
            token, path = self.path[1:].partition("/")[::2]
            if token != teacher.token:
                return self.send_error(404, "this is the client of another server")
            asked = Asked(_protocol(f"/{path}"), f"/{path}", headers, body)
            reply = teacher.reply_to(asked)
            try:
                self._send(asked, reply)
            except (BrokenPipeError, ConnectionResetError):  # the client has given up
                self.close_connection = True

        def _send(self, asked: Asked, reply: Any) -> None:
            if isinstance(reply, Reset):
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.close_connection = True
                self.connection.close()
            elif isinstance(reply, Status):
                body = json.dumps(_error(asked.protocol, reply)).encode()
                self._write(reply.code, body, "application/json", dict(reply.headers))
            elif isinstance(reply, Raw):
                self._write(200, reply.body, reply.type, {})
            else:
                self._write(200, json.dumps(_said(asked, reply)).encode(), "application/json", {})

        def _write(self, status: int, body: bytes, kind: str, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    return Handler


def _protocol(path: str) -> str:
    if path.startswith("/v1/chat/completions"):
        return "openai"
    if path.startswith("/v1/messages"):
        return "anthropic"
    if ":generateContent" in path:
        return "gemini"
    raise AssertionError(f"no protocol has the path {path}")


def _error(protocol: str, reply: Status) -> dict[str, Any]:
    if protocol == "anthropic":
        return {"type": "error", "error": {"type": reply.kind, "message": reply.message}}
    if protocol == "gemini":
        return {"error": {"code": reply.code, "message": reply.message, "status": reply.kind.upper()}}
    return {"error": {"message": reply.message, "type": reply.kind, "code": reply.kind, "param": None}}


def _said(asked: Asked, reply: Say) -> dict[str, Any]:
    end, (given, made) = FINISH[asked.protocol][reply.end], reply.usage
    if asked.protocol == "anthropic":
        return {
            "id": "msg_1", "type": "message", "role": "assistant", "model": asked.body["model"],
            "content": [{"type": "text", "text": reply.text}] if reply.text else [],
            "stop_reason": end, "stop_sequence": None,
            "usage": {"input_tokens": given, "output_tokens": made},
        }  # fmt: skip
    if asked.protocol == "gemini":
        return {
            "candidates": [
                {"content": {"role": "model", "parts": [{"text": reply.text}]}, "finishReason": end, "index": 0}
            ],
            "usageMetadata": {
                "promptTokenCount": given, "candidatesTokenCount": made, "totalTokenCount": given + made,
            },
            "modelVersion": "gemini", "responseId": "r",
        }  # fmt: skip
    return {
        "id": "c1", "object": "chat.completion", "created": 1, "model": asked.body["model"],
        "choices": [
            {"index": 0, "message": {"role": "assistant", "content": reply.text}, "finish_reason": end}
        ],
        "usage": {"prompt_tokens": given, "completion_tokens": made, "total_tokens": given + made},
    }  # fmt: skip
