"""From a benchmark's prompt text to what the model reads: chat template, token ids, and whether it is thinking yet."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from datetime import datetime
from functools import cached_property
from typing import Any, NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from hcot_lmeval.markup import Markup
from hcot_lmeval.tokens import encode_prompt
from hcot_lmeval.vocabulary import Pair, Vocabulary, leaves_open, token_id

logger = logging.getLogger(__name__)

_CONTENT = "\ufdd0content\ufdd0"
"""Stands for the user's message when a template is examined; a noncharacter of Unicode is in no template."""

_ADVICE = "mend it, or send prompts as they are (apply_chat_template=false)"


class Prompt(NamedTuple):
    """A prompt as the model reads it.

    Attributes:
        text: with the chat template.
        ids: token ids; no text becomes a marker, unless it was asked for.
        thinking: whether it ends inside a thinking section.
    """

    text: str
    ids: list[int]
    thinking: bool


def check_switch(enable: bool, template: str, vocabulary: Vocabulary) -> None:
    """Raises `ValueError` if ``enable_thinking`` would do nothing with this template and this vocabulary."""
    if enable and not vocabulary.has_thinking:
        raise ValueError(
            f"enable_thinking=True, but the tokenizer has no {' and '.join(vocabulary.think)}; "
            "name the end of thinking with think_end_token"
        )
    if "enable_thinking" not in template:
        raise ValueError(f"enable_thinking={enable} does nothing: the chat template does not read it; leave it out")


def at_time(template: str, now: datetime) -> str:
    """Returns a chat template in which every ``strftime_now("%d ...")`` tells the same time."""

    def told(call: re.Match[str]) -> str:
        return json.dumps(now.strftime(call[1][1:-1]))

    held = re.sub(r"""strftime_now\(\s*(?:format\s*=\s*)?("[^"]*"|'[^']*')\s*\)""", told, template)
    if call := re.search(r"strftime_now\s*\([^)]*\)?", held):
        logger.warning(
            "the chat template reads the clock by %s, whose format cannot be seen: prompts will differ from moment to "
            "moment, and no run can go on with what another one has finished",
            call[0],
        )
    return held


def applied(apply: Callable[..., Any], chat: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
    """Applies a chat template.

    Raises:
        ValueError: there is none, or it refuses the chat.
    """
    try:
        return str(apply(chat, add_generation_prompt))
    except (TemplateError, ValueError) as error:
        raise ValueError(f"the chat template cannot be applied ({error}); {_ADVICE}") from error


def check_template(apply: Callable[..., Any]) -> None:
    """Raises `ValueError` for a template that shows nothing of what the user says: all problems would look the same."""
    if _CONTENT not in applied(apply, [{"role": "user", "content": _CONTENT}]):
        raise ValueError(f"the chat template leaves out what the user says; {_ADVICE}")


class PromptEncoder:
    """Renders and encodes prompts.

    Args:
        tokenizer: the model's.
        markup: the notation whose markers are text in a prompt.
        think: the strings around a thinking section, or None.
        chat: whether a prompt becomes the user's message of a chat; None: if the tokenizer has a template.
        render: applies the chat template to a list of messages.
        add_bos_token: whether the tokenizer adds its special tokens; None: as the tokenizer does by default.
        inert: whether text that spells a marker stays text.

    Attributes:
        rendered: hashes of the texts that are known to have been through the template.

    Raises:
        ValueError: `chat` is True and the tokenizer has no chat template.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        markup: Markup,
        think: Pair | None,
        *,
        chat: bool | None,
        render: Callable[[list[dict[str, str]]], str],
        add_bos_token: bool | None = None,
        inert: bool = True,
    ) -> None:
        has_template = bool(tokenizer.chat_template)
        if chat and not has_template:
            raise ValueError("apply_chat_template=true, but the tokenizer has no chat template; use auto or false")
        self.tokenizer, self.markup, self.think = tokenizer, markup, think
        self.chat = has_template if chat is None else chat
        logger.info("prompts %s", "become user messages of the chat template" if self.chat else "go without a template")
        self._render, self._add_bos_token, self._inert = render, add_bos_token, inert
        self.rendered: set[int] = set()

    def note_rendered(self, text: str) -> None:
        """Remembers a text that the benchmark has rendered with the chat template itself."""
        self.rendered.add(hash(text))

    def __call__(self, text: str, rendered: bool | None = None) -> Prompt:
        """Renders (once) and encodes a prompt.

        Args:
            text: of the benchmark.
            rendered: whether the benchmark has put it through the template; None: not known.

        Raises:
            ValueError: `text` is none that a tokenizer could read.
        """
        if half := re.search("[\ud800-\udfff]", text):
            around = text[max(0, half.start() - 30) : half.end() + 30]
            raise ValueError(f"a prompt holds half of a surrogate pair, which is no text: {around!r}; mend the data")
        if self.chat and not (self._is_rendered(text) if rendered is None else rendered):
            text = self._render([{"role": "user", "content": text}])
        header = "" if self.think is None else self._generation_prompt.partition(self.think[0])[0]
        return Prompt(text, self._encode(text), leaves_open(text, self.think, header))

    @cached_property
    def _generation_prompt(self) -> str:
        """What the template writes behind the user's message, or an empty string without a template."""
        if not self.tokenizer.chat_template:
            return ""
        try:
            return self._render([{"role": "user", "content": _CONTENT}]).partition(_CONTENT)[2]
        except ValueError:  # a template that is not applied, for it cannot be
            return ""

    def _is_rendered(self, text: str) -> bool:
        """Whether a prompt of somebody who does not tell has been through the template."""
        if hash(text) in self.rendered:
            return True
        prompt = self._generation_prompt
        telling = any(token in prompt for token in self.tokenizer.all_special_tokens)
        return telling and prompt in text

    def _encode(self, text: str) -> list[int]:
        kwargs: dict[str, Any] = {"add_special_tokens": self._adds_special_tokens(text)}
        if self._inert and any(token_id(self.tokenizer, marker) is not None for marker in self.markup.markers):
            return encode_prompt(self.tokenizer, text, self.markup, **kwargs)
        return list(self.tokenizer.encode(text, **kwargs))

    def _adds_special_tokens(self, text: str) -> bool:
        """lm-eval's rule: never a second BOS, else what the user said, else the tokenizer's default."""
        bos = self.tokenizer.bos_token
        if bos and text.startswith(bos):
            return False
        return True if self._add_bos_token is None else self._add_bos_token
