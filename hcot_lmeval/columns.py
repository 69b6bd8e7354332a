"""How data sets write a question, the thinking about it and an answer: names of columns, messages, kinds of values.

    names = find_columns(tuple(record), {})          # {"question": "problem", "text": "generated_solution", ...}
    said = read_message({"role": "assistant", "thinking": "28, so 8.", "content": "8"})
    assert said == ("28, so 8.", "8")

This module imports the standard library alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from typing import Any, NamedTuple, TypeGuard

ROLES: dict[str, tuple[str, ...]] = {
    "id": ("id", "uuid", "row_id"),
    "question": ("question", "problem", "prompt", "instruction", "query", "input"),
    "text": (
        *("generated_solution", "response", "generation", "output", "completion", "model_output", "generations"),
        *("reannotated_assistant_content", "r1_solution_1"),
    ),
    "reasoning": (
        *("reasoning_content", "reasoning", "thinking", "thought", "deepseek_reasoning"),
        *("deepseek_thinking_trajectory", "gemini_thinking_trajectory", "thinking_trajectories", "thinking_trajectory"),
        *("reasoning_trace", "complex_cot", "analysis"),
    ),
    "response": ("response", "final_response", "content"),
    "answer": ("expected_answer", "answer", "final_answer", "ground_truth", "gold", "reference_answer"),
    "verdict": ("correctness_math_verify", "correctness_llama", "is_correct", "correct"),
    "messages": ("messages", "conversations", "conversation"),
}
"""Role -> the names of columns that play it, the preferred first; upper and lower case are the same."""
TRAINED = {
    "question": "question",
    "trace": "hierarchical_cot",
    "answer": "expected_answer",
    "messages": "messages",
}
"""What training reads -> the column in which preparing writes it, and where training looks unless told otherwise."""
BOXED = "\n\n\\boxed{{{}}}"
"""What follows the thinking section of a trace that has no answer part of its own, with the answer in its place."""
PARTNERS: dict[str, Mapping[str, str]] = {
    "deepseek_reasoning": {"response": "deepseek_solution"},
    "deepseek_thinking_trajectory": {"response": "deepseek_attempt", "verdict": "deepseek_grade"},
    "gemini_thinking_trajectory": {"response": "gemini_attempt", "verdict": "gemini_grade"},
    "thinking_trajectories": {"response": "attempt"},
    "thinking_trajectory": {"response": "attempt"},
    "analysis": {"response": "final"},
}
"""Column of a reasoning -> the columns that belong to it, where a row may hold those of several models."""
OPTIONAL = ("id", "answer", "verdict")
"""Roles that a row may do without."""

THINKING = ("reasoning_content", "reasoning", "thinking")
"""The keys of a message, and the types and keys of its parts, under which thinking stands."""
TEXTS = ("text", "input_text", "output_text")
"""Types of the parts that are text."""
SPEAKERS = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant"}

VERDICTS = {
    **dict.fromkeys(("true", "yes", "correct", "right", "1", "1.0"), True),
    **dict.fromkeys(("false", "no", "incorrect", "wrong", "0", "0.0"), False),
}
EXACT, SURE = 2**53, 15
"""From this number on a float does not hold every whole one, but any one of so many digits."""
SURROGATE = re.compile("[\ud800-\udfff]")


class Said(NamedTuple):
    """What a message says: the thinking that stands beside its text, and the text; None where there is none."""

    reasoning: str
    text: str | None


def find_columns(present: Sequence[str], given: Mapping[str, str]) -> dict[str, str]:
    """Returns role -> column, as far as there are columns.

    Args:
        present: the columns of a row.
        given: role -> column, which come before the usual names.
    """
    folded = {name.casefold(): name for name in reversed(present)}
    names = {role: name for role, name in given.items() if name in present}
    for role, usual in ROLES.items():
        partner = PARTNERS.get(names.get("reasoning", "").casefold(), {}).get(role)
        found = [folded[name] for name in (partner, *usual) if name in folded and folded[name] not in names.values()]
        if role not in given and found:
            names[role] = found[0]
    return names


def read_message(message: Mapping[str, Any]) -> Said:
    """Reads a message, as chat models and data sets write it: thinking beside the content, or among its parts.

    Raises:
        ValueError: a part of it is no text.
    """
    said = read_content(next((message[key] for key in ("content", "value", "parts") if key in message), None))
    beside = next((message[key] for key in THINKING if message.get(key)), None)
    return said if beside is None else Said(read_content(beside).text or "", said.text)


def read_content(content: Any) -> Said:
    """Reads the content of a message: a text, or a list of parts.

    Raises:
        ValueError: it is neither, or a part is no text, such as an image.
    """
    if content is None or isinstance(content, str):
        return Said("", content)
    if not isinstance(content, (list, tuple)):
        raise ValueError(f"{content!r:.100} is neither a text nor a list of parts")
    reasoning, texts = "", list[str]()
    for part in content:
        fields = {"text": part} if isinstance(part, str) else part
        if not isinstance(fields, Mapping):
            raise ValueError(f"the part {part!r:.100} is no text")
        kind = fields.get("type") or "text"
        text = next((fields[key] for key in ("text", *THINKING) if isinstance(fields.get(key), str)), None)
        if text is None or kind not in (*TEXTS, *THINKING):
            raise ValueError(f"the part {part!r:.100} is no text")
        if kind in THINKING or fields.get("thought") is True:
            reasoning += text
        else:
            texts.append(text)
    return Said(reasoning, "".join(texts))


def is_conversation(value: Any) -> TypeGuard[list[Any]]:
    """Whether a column holds messages, with who speaks."""
    return isinstance(value, list) and any(speaker(message) for message in value)


def speaker(message: Any) -> str:
    """Returns who speaks: ``user``, ``assistant`` or another role; empty for what is no message."""
    if not isinstance(message, Mapping):
        return ""
    role = str(message.get("role") or message.get("from") or "").casefold()
    return SPEAKERS.get(role, role)


def read_answer(value: Any) -> str | None:
    """Returns an expected answer as text; None where there is none.

    A list of one is that one, and a number that some other column made a float (28.0) is written as it was.

    Raises:
        ValueError: it is no answer: not a number, infinite, a float that may have lost digits, or a value of another
            kind.
    """
    if isinstance(value, (list, tuple)) and len(value) == 1:
        (value,) = value
    if isinstance(value, float) and math.isfinite(value):
        if abs(value) >= EXACT and len(Decimal(repr(value)).as_tuple().digits) > SURE:
            raise ValueError(f"{value!r} is a float, in which such a number loses its last digits; write it as text")
        value = f"{Decimal(repr(value)):f}".removesuffix(".0")
    if value is None or isinstance(value, (str, bool, int, Decimal)):
        text = "" if value is None else str(value).strip()
        if text.casefold() not in ("nan", "snan", "<na>"):
            return text or None
    raise ValueError(f"{value!r:.100} is no answer")


_MATHS = re.compile(r"\$[^$]*\$|\\(?:begin|end)\s*\{\w+\*?\}|\\[a-zA-Z]+")
_WORD = re.compile(r"[^\W\d_]{2,}")
PROSE = 60
"""From so many letters in words on an answer is a text."""


def is_prose(answer: str) -> bool:
    """Whether what is given as an expected answer is a text that holds or states one."""
    if "\\boxed" in answer or "\\fbox" in answer or re.search(r"(?i)\banswer\b", answer):
        return True
    return sum(map(len, _WORD.findall(_MATHS.sub(" ", answer)))) >= PROSE


def read_verdict(value: Any) -> bool | None:
    """Returns whether a data set calls a trace correct; None where it does not say."""
    if isinstance(value, (list, tuple)) and len(value) == 1:
        (value,) = value
    return value if isinstance(value, bool) else VERDICTS.get(str(value).strip().casefold())


def surrogate_in(value: Any, place: str = "") -> str | None:
    """Returns where a lone surrogate is, half of a character, which UTF-8 has no bytes for; None if nowhere."""
    if isinstance(value, str):
        return place if SURROGATE.search(value) else None
    return next((found for key, each in _items(value) if (found := surrogate_in(each, f"{place or key}"))), None)


def _items(value: Any) -> Iterator[tuple[Any, Any]]:
    """The values within a value, each with the key it has; keys are values too."""
    if isinstance(value, Mapping):
        yield from ((ascii(key), key) for key in value)
        yield from value.items()
    elif isinstance(value, (list, tuple)):
        yield from enumerate(value)
