"""Chat templates whose inference prompt is a token prefix of their training text, and the check of that.

A model is trained on prompt + completion + end of turn and later continues the prompt alone. If a template writes
anything else there, be it one newline behind the role, or text that its tokenizer joins with the completion's, then
the model meets prompts that it was never trained on. `check_template` finds that before any training.

The templates write messages as they are. ``enable_thinking=True`` has the prompt open the thinking section; without it
the model opens it. Each ends a turn with one token, which has to be the one that generation stops at.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Collection, Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hcot_lmeval.errors import did_you_mean
from hcot_lmeval.markup import Markup, get_markup

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATES = ("chatml", "llama3", "plain")
"""The names of the shipped templates."""

QUESTIONS = (
    "What is 2+2?",
    "  leading and trailing blanks  ",
    "\n\nnewlines\n",
    "{markers} as text",
    "{think}thoughts{end} of a user",
    "Wie viel ist ½ · ¾ — 語言, ภาษา, 🙂?",
    "a\r\n\tb",
)
"""What the check asks; the names stand for the tokens of the notation."""

LOOSE = (
    "Some templates are meant to differ, such as those that open the thinking in the prompt alone or drop it from a "
    "finished turn (DeepSeek, GLM, Nemotron): with tokens.strict_template=false training writes the answer and "
    "tokens.eos behind the prompt by itself."
)
SHOWN = 6
"""Tokens of each end that an error shows."""


def load_template(name: str | Path) -> str:
    """Returns the text of a chat template, for `tokenizer.chat_template`.

    Args:
        name: one of `TEMPLATES`, or a file.

    Raises:
        ValueError: there is neither a template nor a file of that name.
    """
    if name in TEMPLATES:
        return (files(__name__) / f"{name}.jinja").read_text(encoding="utf-8")
    path = Path(name).expanduser()
    if path.is_file():
        return path.read_text(encoding="utf-8")
    near = did_you_mean(name, TEMPLATES)
    raise ValueError(f"chat template {str(name)!r} is neither one of {', '.join(TEMPLATES)} nor a file{near}")


def with_defaults(template: str | None, arguments: Mapping[str, Any]) -> str:
    """Returns a chat template in which arguments that are not given have these values.

    So a model that was trained with them has the same prompts wherever it is run.

    Raises:
        ValueError: there is no template, it does not read an argument, or a value is no JSON.
    """
    lines = []
    for name, value in arguments.items():
        if name not in (template or ""):
            raise ValueError(
                f"the chat template does not read {name!r}, so {name}={value!r} would do nothing; leave it out"
            )
        if value is None:
            raise ValueError(f"{name}=null says nothing to the chat template; leave it out")
        lines.append(f"{{%- if {name} is not defined %}}{{%- set {name} = {json.dumps(value)} %}}{{%- endif -%}}")
    return "".join([*lines, template or ""])


def check_template(
    tokenizer: PreTrainedTokenizerBase,
    markup: Markup | str = "hcot",
    *,
    eos_ids: Collection[int] = (),
    enable_thinking: bool | None = None,
    prompt_alone: bool = False,
) -> None:
    """Checks that the tokenizer's chat template is fit for training.

    For a set of nasty questions, in one turn and in two, with and without a system message: the tokens of the prompt
    have to be the first tokens of the whole conversation, and the assistant's turn has to hold a token that stops
    generation.

    Args:
        tokenizer: with a chat template, and with the tokens of the markup.
        markup: the notation that answers are written in.
        eos_ids: ids that stop generation beside the tokenizer's end of sequence.
        enable_thinking: handed to the template; None hands over nothing, as the trainer does.
        prompt_alone: check no more than that prompts can be rendered: a caller that writes the answer and the end of
            the turn behind the prompt by itself needs nothing else.

    Raises:
        ValueError: there is no template, or it is unfit; the message shows both ends and what to do.
    """
    if not tokenizer.chat_template:
        raise ValueError(f"the tokenizer has no chat template; set one, such as {', '.join(TEMPLATES)}")
    markup = get_markup(markup)
    stops = {tokenizer.eos_token_id, *eos_ids} - {None}
    options = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
    for messages, answer in _conversations(tokenizer, markup, options):
        prompt = _render(tokenizer, messages, add_generation_prompt=True, **options)
        if prompt_alone:
            continue
        text = _render(tokenizer, [*messages, {"role": "assistant", "content": answer}], **options)
        for head, whole in _encodings(tokenizer, markup, prompt, text):
            if whole[: len(head)] != head:
                raise _not_a_prefix(tokenizer, head, whole)
            if not stops & set(whole[len(head) :]):
                raise _never_stops(tokenizer, whole, stops)


def _conversations(
    tokenizer: PreTrainedTokenizerBase, markup: Markup, options: dict[str, Any]
) -> Iterator[tuple[list[dict[str, str]], str]]:
    """Yields messages up to a question, and the answer to it."""
    think, end = markup.think
    trace = f"\nSo {markup.open}\n\n2+2{markup.split}{markup.lead or ''} 4{markup.close}.\n{end}4"
    answers = [think + trace, think + trace.lstrip(), think + markup.open + trace]
    names = {"{markers}": "".join(markup.markers), "{think}": think, "{end}": end}
    system = {"role": "system", "content": "Answer.\n"}
    for question, answer, told in itertools.product(QUESTIONS, answers, (False, True)):
        for name, text in names.items():
            question = question.replace(name, text)
        first = [system] * (told and _takes_system(tokenizer, options)) + [{"role": "user", "content": question}]
        yield first, answer
        yield [*first, {"role": "assistant", "content": answer}, {"role": "user", "content": question}], answer


def _takes_system(tokenizer: PreTrainedTokenizerBase, options: dict[str, Any]) -> bool:
    """Whether the template takes a system message; some refuse it by raising, which is no defect of theirs."""
    try:
        messages = [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}]
        _render(tokenizer, messages, **options)
    except ValueError:
        return False
    return True


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], **options: Any) -> str:
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
    except TemplateError as error:
        raise ValueError(f"the chat template cannot be rendered: {error}") from error


def _encodings(
    tokenizer: PreTrainedTokenizerBase, markup: Markup, prompt: str, text: str
) -> Iterator[tuple[list[int], list[int]]]:
    """Yields prompt and conversation as token ids: markers as tokens, and as text.

    As at inference, the tokenizer adds its own special tokens, but never a second BOS.
    """
    from hcot_lmeval.tokens import encode_prompt

    options = {"add_special_tokens": not (tokenizer.bos_token and prompt.startswith(tokenizer.bos_token))}
    yield list(tokenizer.encode(prompt, **options)), list(tokenizer.encode(text, **options))
    yield encode_prompt(tokenizer, prompt, markup, **options), encode_prompt(tokenizer, text, markup, **options)


def _not_a_prefix(tokenizer: PreTrainedTokenizerBase, head: list[int], whole: list[int]) -> ValueError:
    same = next((i for i, (a, b) in enumerate(zip(head, whole, strict=False)) if a != b), min(len(head), len(whole)))
    start = max(0, same - SHOWN)
    return ValueError(
        "the chat template's prompt is no token prefix of its training text, so the model would meet prompts that it "
        f"was not trained on. From token {start} on the prompt reads {_show(tokenizer, head[start : same + SHOWN])}, "
        f"the training text {_show(tokenizer, whole[start : same + SHOWN])}. Write the same behind the role in both, "
        f"and end it with a token that joins no text, or use one of the templates {', '.join(TEMPLATES)}. {LOOSE}"
    )


def _never_stops(tokenizer: PreTrainedTokenizerBase, whole: list[int], stops: Collection[Any]) -> ValueError:
    names = ", ".join(map(repr, tokenizer.convert_ids_to_tokens(sorted(stops)))) or "nothing"
    return ValueError(
        f"the chat template ends the assistant's turn with {_show(tokenizer, whole[-SHOWN:])}, but generation stops at "
        f"{names}, so the model would never learn to stop. Set tokenizer.eos_token to the token that ends a turn, or "
        f"use another template ({', '.join(TEMPLATES)}). {LOOSE}"
    )


def _show(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return " ".join(repr(tokenizer.decode([i])) for i in ids) or "nothing"
