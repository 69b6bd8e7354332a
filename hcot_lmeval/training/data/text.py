r"""The form of a training text: what of a row is the prompt, and what the model learns to write behind it.

    prompt       the question as the user's message of the chat template, up to where the assistant starts to write;
                 the bare question where the tokenizer has no template
    completion   ``<think>`` trace ``</think>\n\n\boxed{answer}``, then the end-of-turn token

The prompt is encoded as at inference, token for token: text in it that spells a marker stays text. In the completion
the markers are control tokens.

``<think>`` and ``</think>`` stand for what the vocabulary has in their place, such as ``[THINK]``. A trace that holds
``</think>`` is written out as it stands: it has an answer part of its own. Any other trace is put between the thinking
tokens, with the boxed answer behind it, if the row has an answer. A prompt that ends by opening the thinking section is
not opened again. Where the vocabulary has no thinking tokens, the trace is the whole text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from hcot_lmeval.columns import BOXED
from hcot_lmeval.markup import Markup
from hcot_lmeval.provenance import tokenizer_digest
from hcot_lmeval.tokens import encode_prompt
from hcot_lmeval.training.data.documents import Example
from hcot_lmeval.vocabulary import read_vocabulary, spelled_special


class Unusable(ValueError):
    """A row that no training text can be made of; `args[0]` is the reason in one word."""


@dataclass(frozen=True)
class TextForm:
    """Turns rows into prompts and completions.

    Args:
        tokenizer: with the markers in its vocabulary.
        markup: the notation of the traces.
        system_prompt: the system message of rows that bring none of their own.

    Raises:
        ValueError: the tokenizer names no end-of-turn token, or has no chat template to put a system prompt into.
    """

    tokenizer: PreTrainedTokenizerBase
    markup: Markup
    system_prompt: str | None = None

    def __post_init__(self) -> None:
        if self.tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no eos_token, which every training text ends with; set one")
        if self.system_prompt is not None and not self.tokenizer.chat_template:
            raise ValueError(
                "data.system_prompt is set, but the tokenizer has no chat template to put it into; "
                "set tokens.chat_template, or leave the system prompt out"
            )

    @cached_property
    def think(self) -> tuple[str, str] | None:
        """The strings around the thinking section, or None where the vocabulary has none."""
        vocabulary = read_vocabulary(self.tokenizer, self.markup)
        return vocabulary.think if vocabulary.has_thinking else None

    @cached_property
    def digest(self) -> str:
        """Digest of everything that the result depends on, apart from the code."""
        return "|".join((tokenizer_digest(self.tokenizer), digest_of(self.markup), repr(self.system_prompt)))

    def example(self, row: Mapping[str, Any]) -> Example:
        """Returns prompt and completion of a row as token ids.

        Args:
            row: question or messages, trace, answer (see `training.data.sources`).

        Raises:
            Unusable: ``no_question``, ``no_trace``, ``not_text`` (an image, say), or ``no_chat_template`` for a
                conversation that needs one.
        """
        prompt = self.prompt_text(row)
        if not (row["trace"] or "").strip():
            raise Unusable("no_trace")
        completion = self.completion_text(row["trace"], row["answer"], prompt)
        # not verbose: a trace may be longer than the model's context, of which its live context is a part
        ids = self.tokenizer.encode(completion, add_special_tokens=False, verbose=False)
        if ids[-1] != self.tokenizer.eos_token_id:
            ids.append(self.tokenizer.eos_token_id)
        return Example(tuple(self.encode(prompt)), tuple(ids), row["answer"])

    def faults(self, row: Mapping[str, Any]) -> list[str]:
        """Returns ``special_token`` for a trace that spells one, apart from an end of turn at its end."""
        trace = (row["trace"] or "").strip().removesuffix(self.tokenizer.eos_token)
        return ["special_token"] * bool(spelled_special(self.tokenizer, trace, self.markup))

    def prompt_text(self, row: Mapping[str, Any]) -> str:
        """Returns the prompt of a row, chat template applied."""
        messages = row["messages"] or [{"role": "user", "content": row["question"] or ""}]
        if any(message["content"] is None for message in messages):
            raise Unusable("not_text")
        if not any(message["content"] for message in messages if message["role"] == "user"):
            raise Unusable("no_question")
        if not self.tokenizer.chat_template:
            if len(messages) > 1:
                raise Unusable("no_chat_template")
            return str(messages[0]["content"])
        if self.system_prompt is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system_prompt}, *messages]
        return str(self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))

    def encode(self, prompt: str) -> list[int]:
        """Encodes a prompt as the evaluation does: with the tokenizer's own tokens, but never with a second BOS."""
        bos = self.tokenizer.bos_token
        return encode_prompt(
            self.tokenizer, prompt, self.markup, add_special_tokens=not (bos and prompt.startswith(bos))
        )

    def completion_text(self, trace: str, answer: str | None, prompt: str) -> str:
        """Returns what the model is to write behind `prompt`, without the end-of-turn token."""
        if self.think is None:
            return trace
        begin, end = self.think
        if end not in trace:
            for theirs, ours in zip(self.markup.think, self.think, strict=True):
                trace = trace.replace(theirs, ours)
        if end not in trace:
            body = trace.removeprefix(begin)
            trace = f"{begin}{body}{end}" + (BOXED.format(answer) if answer else "")
        start = prompt.rstrip()
        if start.endswith(begin):
            trace = trace.removeprefix(begin).removeprefix(prompt[len(start) :])
        return trace


def digest_of(value: Any) -> str:
    """Returns a hex digest of a dataclass of plain values and sets; its ``repr`` orders sets anew in each process."""
    return hashlib.sha256(json.dumps(asdict(value), default=sorted, sort_keys=True).encode()).hexdigest()
