"""Which teacher is asked, how, and how much it may cost.

Keys come from the environment and stay in the client: no option, log, file or message holds one.

A request is sent only if no limit of requests, tokens or money can be crossed by it. What it may cost at most is set
aside before it is sent: its size, and as many output tokens as it may use. Once its real cost is known, the rest is
free again. A request that does not fit waits for that, and is refused where even then it cannot fit.
"""

from __future__ import annotations

import asyncio
import os
import re
from typing import Annotated, Any, Literal, NamedTuple
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from hcot_lmeval.prepare.teacher.questions import Spent, Task
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
        found = PROVIDERS.get(name)
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


# --- prices and limits ------------------------------------------------------------------------------------------------

BYTES_PER_TOKEN = 3.0
"""Of English text with mathematics in JSON, at the low end. Corrected by what the server counts."""
FRAME = 64
"""Tokens around messages and schema that do not stand in them."""


def input_tokens(task: Task, bytes_per_token: float = BYTES_PER_TOKEN) -> int:
    """Returns about how many tokens a question has."""
    return FRAME + int(task.size / bytes_per_token) + 1


class Prices:
    """What tokens cost in US dollars: as given, else as `genai_prices` knows."""

    def __init__(self, options: TeacherOptions) -> None:
        self._given = None if options.price_input is None else (options.price_input, options.price_output or 0.0)
        self._provider, self._model = options.provider.prices, options.model

    def at(self, input_tokens: int = 1, output_tokens: int = 1) -> float | None:
        """Returns the price of so many tokens; None where none is known."""
        from genai_prices import Usage

        return self.of(Usage(input_tokens=input_tokens, output_tokens=output_tokens))

    def of(self, usage: Any) -> float | None:
        """Returns the price of a usage of `pydantic_ai` or `genai_prices`, which know cached tokens too."""
        from genai_prices import calc_price

        if self._given is not None:
            return ((usage.input_tokens or 0) * self._given[0] + (usage.output_tokens or 0) * self._given[1]) / 1e6
        if self._provider is None:
            return None
        try:
            return float(calc_price(usage, self._model, provider_id=self._provider).total_price)
        except (LookupError, ValueError):
            return None


class Budget:
    """What was spent, what is set aside, and the limits.

    Args:
        options: hold the limits and the prices.
        spent: by earlier runs.

    Raises:
        ValueError: there is a limit of money, and no price is known.
    """

    def __init__(self, options: TeacherOptions, spent: Spent) -> None:
        self.spent, self.prices = spent, Prices(options)
        self._options, self._reserved, self._bytes_per_token = options, Spent(), BYTES_PER_TOKEN
        self._changed = asyncio.Condition()
        if options.max_usd is not None and self.prices.at() is None:
            raise ValueError(
                f"max_usd={options.max_usd:g}: no price of {options.teacher} is known; give --price-input and "
                "--price-output (US dollars per million tokens), or limit --max-teacher-tokens"
            )

    def most(self, task: Task) -> Spent:
        """Returns what a request may cost at most."""
        size, room = input_tokens(task, self._bytes_per_token), self._options.output_tokens
        return Spent(1, size, room, self.prices.at(size, room) or 0.0)

    async def reserve(self, task: Task) -> Spent | str:
        """Sets aside what a request may cost; waits while others may leave enough.

        Returns:
            The amount, to be given to `settle`; or in words which limit would be crossed.
        """
        async with self._changed:
            while True:
                needed = self.most(task)
                if crossed := self._crossed(self.spent.plus(needed)):
                    return crossed
                if not self._crossed(self.spent.plus(self._reserved).plus(needed)):
                    self._reserved = self._reserved.plus(needed)
                    return needed
                await self._changed.wait()

    async def settle(self, reserved: Spent, spent: Spent, size: int = 0) -> None:
        """Puts in the place of what was set aside what it did cost.

        Args:
            reserved: what `reserve` returned.
            spent: the real amount.
            size: bytes of the question, where the server has counted its tokens.
        """
        async with self._changed:
            self._reserved = self._reserved.minus(reserved)
            self.spent = self.spent.plus(spent._replace(usd=spent.usd or 0.0))
            counted = spent.input_tokens - FRAME
            if size and counted > 0:
                self._bytes_per_token = min(self._bytes_per_token, size / counted)
            self._changed.notify_all()

    def _crossed(self, total: Spent) -> str:
        options, spent = self._options, self.spent
        for name, limit, found, so_far in (
            ("max_requests", options.max_requests, total.requests, f"{spent.requests} requests"),
            ("max_teacher_tokens", options.max_teacher_tokens, total.tokens, f"{spent.tokens} tokens"),
            ("max_usd", options.max_usd, total.usd or 0.0, f"${spent.usd:.4f}"),
        ):
            if limit is not None and found > limit * (1 + 1e-12):
                return f"{name}={limit:g} would be crossed: {so_far} spent, one more request may need more"
        return ""
