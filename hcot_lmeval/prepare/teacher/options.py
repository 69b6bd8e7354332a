"""Which teacher is asked, how, and how much it may cost.

Keys come from the environment and stay in the client: no option, log, file or message holds one.

This module imports the standard library alone.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from urllib.parse import urlsplit


class Provider(NamedTuple):
    """A kind of server.

    Attributes:
        name: as in ``--teacher NAME:MODEL``.
        keys: environment variables that hold its key, the first that is set counts.
        base_url: where it is; None: to be given.
        prices: its name in `genai_prices`; None: unknown.
    """

    name: str
    keys: tuple[str, ...]
    base_url: str | None
    prices: str | None


PROVIDERS = {
    "gemini": Provider(
        "gemini", ("GEMINI_API_KEY", "GOOGLE_API_KEY"), "https://generativelanguage.googleapis.com", "google"
    ),
    "claude": Provider("claude", ("ANTHROPIC_API_KEY",), "https://api.anthropic.com", "anthropic"),
    "openai": Provider("openai", ("OPENAI_API_KEY",), "https://api.openai.com/v1", "openai"),
    "local": Provider("local", ("TEACHER_API_KEY",), None, None),
}
"""``local`` is any server with OpenAI's chat completions: vLLM, SGLang, llama.cpp, Ollama, a gateway."""
ALIASES = {"google": "gemini", "anthropic": "claude", "compatible": "local"}
ROOM = {"low": 4096, "medium": 12288, "high": 32768}
"""Output tokens that there have to be for so much thinking: what servers set aside for it, and the reply."""
SHORTEST = 16
"""Characters of a key from which on it can only be a key."""
STRUCTURED = ("auto", "schema", "text")
THINKING = ("off", "minimal", "low", "medium", "high")


@dataclass(frozen=True)
class TeacherOptions:
    """What is asked and within which limits.

    Raises:
        ValueError: an option has no such value.
    """

    teacher: str | None = field(
        default=None, metadata={"help": f"ask a model: {', '.join(PROVIDERS)}", "metavar": "PROVIDER:MODEL"}
    )
    base_url: str | None = field(default=None, metadata={"help": "where the server is", "metavar": "URL"})
    output_tokens: int = field(default=8192, metadata={"help": "most tokens of a reply, thinking included"})
    temperature: float | None = field(default=None, metadata={"help": "of sampling (the server's)"})
    thinking: str | None = field(
        default=None, metadata={"help": "how much the teacher thinks (the model's own)", "choices": THINKING}
    )
    structured: str = field(
        default="auto",
        metadata={
            "help": "send the JSON schema, or only tell it; auto: sent where known to work",
            "choices": STRUCTURED,
        },
    )
    concurrency: int = field(default=8, metadata={"help": "requests at the same time"})
    timeout: float = field(default=300.0, metadata={"help": "seconds until a request is given up"})
    attempts: int = field(default=6, metadata={"help": "requests for one reply, if the server fails"})
    first_wait: float = field(default=1.0, metadata={"hidden": True})
    max_requests: int | None = field(default=None, metadata={"help": "most requests, earlier ones of the run included"})
    max_teacher_tokens: int | None = field(default=None, metadata={"help": "most tokens, input and output"})
    max_usd: float | None = field(default=None, metadata={"help": "most US dollars"})
    price_input: float | None = field(default=None, metadata={"help": "US dollars per million input tokens"})
    price_output: float | None = field(default=None, metadata={"help": "US dollars per million output tokens"})

    def __post_init__(self) -> None:
        for name in ("concurrency", "attempts", "output_tokens", "timeout"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)}: give more than 0")
        for name in ("max_requests", "max_teacher_tokens", "max_usd", "price_input", "price_output"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: give at least 0")
        if (self.price_input is None) != (self.price_output is None):
            raise ValueError("price_input and price_output belong together; give both")
        for name, allowed in (("structured", STRUCTURED), ("thinking", (None, *THINKING))):
            if getattr(self, name) not in allowed:
                told = ", ".join(map(str, filter(None, allowed)))
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; choose one of {told}")
        if self.output_tokens < ROOM.get(self.thinking or "", 0):
            room = ROOM[self.thinking or ""]
            raise ValueError(
                f"output_tokens={self.output_tokens} leaves no room for thinking={self.thinking}; give at least {room}"
            )
        if self.teacher is not None:
            _require_url(self.url, self.provider)

    @property
    def provider(self) -> Provider:
        name = (self.teacher or "").partition(":")[0]
        found = PROVIDERS.get(ALIASES.get(name, name))
        if found is None or not self.model:
            raise ValueError(f"teacher={self.teacher!r}: give PROVIDER:MODEL, PROVIDER one of {', '.join(PROVIDERS)}")
        return found

    @property
    def model(self) -> str:
        return (self.teacher or "").partition(":")[2]

    @property
    def url(self) -> str | None:
        """Where the server is; the environment has no say in it."""
        return self.base_url or self.provider.base_url

    @property
    def identity(self) -> dict[str, Any]:
        """What replies depend on."""
        return {
            "teacher": f"{self.provider.name}:{self.model}",
            "base_url": self.base_url,
            **{name: getattr(self, name) for name in ("output_tokens", "temperature", "thinking", "structured")},
        }


def _require_url(url: str | None, provider: Provider) -> None:
    if url is None:
        raise ValueError(f"{provider.name} needs --base-url, as in http://localhost:8000/v1")
    parts = urlsplit(url)
    if parts.username or parts.password or parts.query or parts.fragment:  # it is written into manifests
        told = f"{parts.scheme}://{parts.hostname}{parts.path}"
        raise ValueError(f"base_url: give {told} alone; a key belongs into {provider.keys[0]}")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"base_url={url!r}: give http(s)://HOST[:PORT]/PATH")


class Secret:
    """A key that does not show itself."""

    def __init__(self, value: str, name: str) -> None:
        self.reveal = lambda: value  # in a closure: neither `vars` nor a debugger's repr of the object shows it
        self.name = name

    def __repr__(self) -> str:
        return f"Secret({self.name})"

    def __reduce__(self) -> Any:
        raise TypeError("a key is not pickled")

    def clean_reply(self, text: str) -> str:
        """Returns what a teacher said without the key; a placeholder such as EMPTY stays, for it may be a word."""
        value = self.reveal()
        return text.replace(value, "[key]") if len(value) >= SHORTEST else text

    def clean(self, text: str) -> str:
        """Returns a server's message without the key, and without what looks like a part of one that is masked."""
        if value := self.reveal():
            alone = re.escape(value) if len(value) >= SHORTEST else rf"(?<![\w-]){re.escape(value)}(?![\w-])"
            text = re.sub(alone, "[key]", text)
        return re.sub(r"[\w-]*\*{3,}[\w-]*", "[key]", text)


def find_key(provider: Provider) -> Secret:
    """Returns the key of a provider from the environment; an empty one for a server without.

    Raises:
        ValueError: it is not set.
    """
    for name in provider.keys:
        if value := os.environ.get(name, "").strip():
            return Secret(value, name)
    if provider.base_url is not None:
        raise ValueError(f"{provider.name} needs a key: set {' or '.join(provider.keys)} in the environment")
    return Secret("", provider.keys[0])
