"""One request to one server, for all kinds of servers; what goes wrong is a `RequestFailed` with a code.

`pydantic_ai` speaks the protocols; it is imported when a client is made. The libraries' own retries are off:
`teacher.runner` decides about them, for every attempt counts as a request and has to fit into the limits.
"""

from __future__ import annotations

import asyncio
import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hcot_lmeval.prepare.teacher.options import Prices, Secret, TeacherOptions, find_key
from hcot_lmeval.prepare.teacher.questions import Message, Spent, Task, schema_of

if TYPE_CHECKING:
    from pydantic_ai.messages import ModelMessage, ModelResponse
    from pydantic_ai.models import Model

DETAIL = 300
"""Characters of a server's message that are kept."""
FATAL = frozenset({"auth", "not_found", "quota", "library"})
"""Codes of failures that every further request would meet."""


class RequestFailed(Exception):
    """A request that brought no reply.

    Attributes:
        code: a key of `reasons.FAILURES`, or one of `FATAL`.
        detail: what the server said, without the key.
        retry: whether another attempt may help.
        after: seconds that the server asks to wait; None if it does not.
    """

    def __init__(self, code: str, detail: str, *, retry: bool = False, after: float | None = None) -> None:
        super().__init__(f"{code}: {detail}")
        self.code, self.detail, self.retry, self.after = code, detail, retry, after


@dataclass(frozen=True)
class Answer:
    """What a request brought.

    Attributes:
        text: said, thinking left out.
        code: ``truncated``, ``refused``, or empty.
        spent: tokens and price.
        model: as the server calls it, often with a date.
    """

    text: str
    code: str
    spent: Spent
    model: str


class Client:
    """A teacher.

    Raises:
        ValueError: the key is not set, or the model is not known to think and is told how much to.
    """

    def __init__(self, options: TeacherOptions) -> None:
        self.options = options
        self._price = Prices(options).of
        self._key = find_key(options.provider)
        self._model = _make_model(options, self._key)
        _silence()  # behind the imports, some of which turn logging on where the environment asks for it
        self._native = _takes_schema(self._model, options)
        if options.thinking not in (None, "off") and not self._model.profile.get("supports_thinking"):
            raise ValueError(f"thinking={options.thinking}: {options.teacher} is not known to be told; leave it out")

    def __repr__(self) -> str:
        return f"Client({self.options.teacher})"

    async def __aenter__(self) -> Client:
        await self._model.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._model.__aexit__(None, None, None)

    async def complete(self, task: Task) -> Answer:
        """Sends one request.

        Raises:
            RequestFailed: there is no reply. Nothing of the libraries' exceptions hangs on to it.
        """
        try:
            return self._answer(await self._request(task))
        except asyncio.CancelledError:
            raise
        except Exception as error:
            failed = self._failed(error)
        raise failed  # out here, since the exception that is being handled would be its context, with its words

    async def _request(self, task: Task) -> ModelResponse:
        from pydantic_ai.direct import model_request
        from pydantic_ai.models import ModelRequestParameters
        from pydantic_ai.output import OutputObjectDefinition

        parameters = ModelRequestParameters()
        if self._native:
            form = OutputObjectDefinition(json_schema=deepcopy(schema_of(task.form)), name=task.kind, strict=True)
            parameters = ModelRequestParameters(output_mode="native", output_object=form)
        return await model_request(
            self._model,
            _messages(task.messages),
            model_settings=self._settings(),  # type: ignore[arg-type]
            model_request_parameters=parameters,
            instrument=False,
        )

    def _settings(self) -> dict[str, Any]:
        options = self.options
        found: dict[str, Any] = {
            "max_tokens": options.output_tokens,
            "timeout": options.timeout,
            "request_timeout": options.timeout,
        }
        if options.temperature is not None:
            found["temperature"] = options.temperature
        if options.thinking is not None:
            found["thinking"] = False if options.thinking == "off" else options.thinking
        return found

    def _answer(self, response: ModelResponse) -> Answer:
        text = self._key.clean_reply("".join(part.content for part in response.parts if part.part_kind == "text"))
        code = {"length": "truncated", "content_filter": "refused"}.get(response.finish_reason or "", "")
        usage = response.usage
        spent = Spent(1, usage.input_tokens, usage.output_tokens, self._price(usage))
        return Answer(text, code, spent, response.model_name or "")

    def _failed(self, error: Exception) -> RequestFailed:
        from pydantic_ai import exceptions

        detail = self._key.clean(_told(error))[:DETAIL]
        after = getattr(error, "retry_after", None)
        if isinstance(error, exceptions.ModelQuotaExceededError):
            return RequestFailed("quota", detail)
        if isinstance(error, exceptions.ModelHTTPError):
            code, retry = _code_of_status(error.status_code)
            return RequestFailed(code, f"HTTP {error.status_code}: {detail}", retry=retry, after=after)
        if isinstance(error, (exceptions.ModelTimeoutError, exceptions.ModelRequestTimeout, TimeoutError)):
            return RequestFailed("timeout", f"no reply within {self.options.timeout:g} s", retry=True)
        if isinstance(error, exceptions.ModelConnectionError):
            return RequestFailed("connection", detail, retry=True)
        if isinstance(error, exceptions.ContentFilterError):
            return RequestFailed("refused", detail)
        if isinstance(error, exceptions.OutputTokenLimitExceeded):
            return RequestFailed("truncated", detail)
        fault_of_ours = isinstance(error, (exceptions.UserError, AssertionError, ImportError, Warning))
        return RequestFailed(
            "library" if fault_of_ours else "broken_response", f"{type(error).__name__}: {detail}", retry=True
        )


def _make_model(options: TeacherOptions, key: Secret) -> Model:
    """Every client gets its address and its key from here, none from the environment."""
    make = {"claude": _make_claude, "gemini": _make_gemini, "openai": _make_openai, "local": _make_local}
    return make[options.provider.name](options.model, options.url or "", key.reveal())


def _make_claude(model: str, url: str, key: str) -> Model:
    from pydantic_ai.models.anthropic import AnthropicModel
    from pydantic_ai.providers.anthropic import AnthropicProvider

    provider = AnthropicProvider(api_key=key, base_url=url)
    provider.client.max_retries = 0
    return AnthropicModel(model, provider=provider)


def _make_gemini(model: str, url: str, key: str) -> Model:
    from pydantic_ai.models.google import GoogleModel
    from pydantic_ai.providers.google import GoogleProvider

    return GoogleModel(model, provider=GoogleProvider(api_key=key, base_url=url), settings={"max_retries": 0})


def _make_openai(model: str, url: str, key: str) -> Model:
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    provider = OpenAIProvider(api_key=key, base_url=url)
    provider.client.max_retries = 0
    return OpenAIChatModel(model, provider=provider)


def _make_local(model: str, url: str, key: str) -> Model:
    from pydantic_ai import InlineDefsJsonSchemaTransformer
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai_compatible import OpenAICompatibleProvider

    # `max_tokens`, and a schema without references, are what every such server knows
    profile: Any = {
        "openai_chat_supports_max_completion_tokens": False,
        "json_schema_transformer": InlineDefsJsonSchemaTransformer,
    }
    with _hidden("OPENAI_"):  # headers, organization and project are meant for OpenAI alone
        provider = OpenAICompatibleProvider("local", api_key=key or None, base_url=url, profile=profile)
    provider.client.max_retries = 0  # as a setting it would make a client for each request, from the environment
    return OpenAIChatModel(model, provider=provider)


@contextmanager
def _hidden(prefix: str) -> Iterator[None]:
    """Takes variables out of the environment for a while."""
    found = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith(prefix)}
    try:
        yield
    finally:
        os.environ.update(found)


def _takes_schema(model: Model, options: TeacherOptions) -> bool:
    if options.structured != "auto":
        return options.structured == "schema"
    return bool(model.profile.get("supports_json_schema_output"))


def _messages(messages: Sequence[Message]) -> list[ModelMessage]:
    from pydantic_ai.messages import ModelRequest, ModelResponse, SystemPromptPart, TextPart, UserPromptPart

    made: list[ModelMessage] = []
    parts: list[Any] = []
    for role, text in messages:
        if role == "assistant":
            made += [ModelRequest(parts=parts), ModelResponse(parts=[TextPart(text)])]
            parts = []
        else:
            parts.append(SystemPromptPart(text) if role == "system" else UserPromptPart(text))
    return [*made, ModelRequest(parts=parts)]


RETRIED = frozenset({408, 409, 425, 429})


def _code_of_status(status: int) -> tuple[str, bool]:
    """The code of an HTTP status, and whether another attempt may help."""
    if status in (401, 403):
        return "auth", False
    if status == 402:
        return "quota", False
    if status == 404:
        return "not_found", False
    if status == 429:
        return "rate_limited", True
    return ("server_error", True) if status >= 500 or status in RETRIED else ("bad_request", False)


def _told(error: Exception) -> str:
    body = getattr(error, "body", None)
    if isinstance(body, Mapping):
        inner = body.get("error", body)
        body = inner.get("message", inner) if isinstance(inner, Mapping) else inner
    return " ".join(str(body if body is not None else error).split())


def _silence() -> None:
    """Libraries that log requests do so from warnings on; a setting that they would drop with a warning is an error."""
    dropped = r"(?s)(Sampling parameters|The `\w+` setting) .*not supported.*ignored"
    warnings.filterwarnings("error", message=dropped, category=UserWarning)
    for name in ("openai", "anthropic", "google_genai", "httpx", "httpx2", "httpcore", "httpcore2"):
        logger = logging.getLogger(name)
        if logger.getEffectiveLevel() < logging.WARNING:
            logger.setLevel(logging.WARNING)
