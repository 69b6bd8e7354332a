"""Which teacher is asked, how, and how much it may cost.

Keys come from the environment and stay in the client: no option, log, file or message holds one.
"""

from __future__ import annotations

import os
import re
from typing import Annotated, Any, Literal, NamedTuple
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from hcot_lmeval.settings import Section, read_off


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


class TeacherOptions(Section, title="teacher", hide_input_in_errors=True):
    """What is asked and within which limits."""

    teacher: str | None = Field(None, title="PROVIDER:MODEL", description=f"ask a model: {', '.join(PROVIDERS)}")
    base_url: str | None = Field(None, title="URL", description="where the server is")
    output_tokens: int = Field(8192, gt=0, description="most tokens of a reply, thinking included")
    temperature: float | None = Field(None, description="of sampling (the server's)")
    thinking: Annotated[Literal["off", "minimal", "low", "medium", "high"] | None, read_off] = Field(
        None, description="how much the teacher thinks (the model's own)"
    )
    structured: Literal["auto", "schema", "text"] = Field(
        "auto", description="send the JSON schema, or only tell it; auto: sent where known to work"
    )
    concurrency: int = Field(8, gt=0, description="requests at the same time")
    timeout: float = Field(300.0, gt=0, description="seconds until a request is given up")
    attempts: int = Field(6, gt=0, description="requests for one reply, if the server fails")
    first_wait: float = Field(1.0, gt=0)  # seconds behind the first failed attempt; tests have no time for them
    max_requests: int | None = Field(None, ge=0, description="most requests, earlier ones of the run included")
    max_teacher_tokens: int | None = Field(None, ge=0, description="most tokens, input and output")
    max_usd: float | None = Field(None, ge=0, description="most US dollars")
    price_input: float | None = Field(None, ge=0, description="US dollars per million input tokens")
    price_output: float | None = Field(None, ge=0, description="US dollars per million output tokens")
    dry_run: bool = Field(False, description="estimate requests, tokens and money; ask nothing")
    give_up: bool = Field(False, description="reject rows that got no reply, and finish the step")

    @model_validator(mode="after")
    def _check(self) -> TeacherOptions:
        if (self.price_input is None) != (self.price_output is None):
            raise ValueError("price_input and price_output belong together; give both")
        if self.output_tokens < (room := ROOM.get(self.thinking or "", 0)):
            raise ValueError(
                f"output_tokens={self.output_tokens} leaves no room for thinking={self.thinking}; give at least {room}"
            )
        if self.teacher is not None:
            _require_url(self.url, self.provider)
        return self

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
        plain = f"{parts.scheme}://{parts.hostname}{parts.path}"
        raise ValueError(f"base_url: give {plain} alone; a key belongs into {provider.keys[0]}")
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
