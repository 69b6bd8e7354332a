"""What the tokens of a vocabulary mean here: markers, the strings around the thinking, what a text leaves out.

This is the one place that decides where thinking begins and ends. In a generated text it is decided by the strings, for
models write them in every form: as one special token, as several (``<|channel|>final<|message|>``), or spelled out by a
vocabulary that has no such token. What is not closed is no answer.

This module imports the standard library alone; a tokenizer is whatever has the methods of transformers' tokenizers.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from hcot_lmeval.errors import did_you_mean
from hcot_lmeval.markup import MarkerIds, Markup, get_markup, resolve_markers

Pair = tuple[str, str]
"""The strings around a thinking section."""

PAIRS: tuple[Pair, ...] = (
    ("<think>", "</think>"),
    ("<seed:think>", "</seed:think>"),  # Seed-OSS
    ("◁think▷", "◁/think▷"),  # Kimi
    ("[THINK]", "[/THINK]"),  # Magistral
    ("<thought>", "</thought>"),
    ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>"),  # gpt-oss
    ("<|channel>", "<channel|>"),  # Gemma 4
    ("<|START_THINKING|>", "<|END_THINKING|>"),  # Command A
    ("<|begin_of_thought|>", "<|end_of_thought|>"),  # Sky-T1
)
"""How models in use write it."""


# --- texts ------------------------------------------------------------------------------------------------------------


class Parts(NamedTuple):
    """A generated text cut into its thinking and its answer."""

    thinking: str
    answer: str


def split_thinking(text: str, think: Pair | None, *, opened: bool = False) -> Parts:
    """Cuts a generated text behind its thinking section.

    The answer begins after the last end of thinking. While the thinking is still open there is no answer: it is empty.
    A text that never opened a thinking section is all answer. An end of thinking without its beginning counts, for many
    chat templates write the beginning into the prompt.

    Args:
        text: the generated text.
        think: the strings around a thinking section, or None for a model without one.
        opened: the prompt ends inside a thinking section.
    """
    if think is None:
        return Parts("", text)
    thinking, at = opened, 0
    for thinking, at in changes(text, think, opened):  # noqa: B007 (the last one is what counts)
        pass
    if thinking:
        return Parts(_without(text, think), "")
    return Parts(_without(text[:at], think), text[at:].lstrip() if at else text)


def changes(text: str, think: Pair, opened: bool, start: int = 0) -> Iterator[tuple[bool, int]]:
    """Yields whether the thinking is open, and where the text goes on, after every string that opens or closes it.

    Args:
        text: as generated.
        think: the strings around a thinking section.
        opened: whether it is open at `start`.
        start: nothing before it is looked at.
    """
    marks = re.compile("|".join(map(re.escape, sorted(think, key=len, reverse=True))))
    for match in marks.finditer(text, start):
        closes = match[0] == think[1]
        if closes or not opened:
            opened = not closes
            yield opened, match.end()


def answer_of(text: str) -> str:
    """Returns the answer part of a text of whatever model: what stands behind all thinking sections in `PAIRS`."""
    for think in PAIRS:
        text = split_thinking(text, think).answer
    return text


def leaves_open(prompt: str, think: Pair | None, header: str = "") -> bool:
    """Whether a prompt ends within a thinking section.

    Args:
        prompt: as the model reads it.
        think: the strings around a thinking section, or None for a model without one.
        header: what the chat template writes between the user's message and the beginning of the thinking: what the
            user's text spells does not count. Empty if unknown; then the prompt has to end with the beginning.
    """
    if think is None:
        return False
    begin, end = think
    if header.strip() and header in prompt:
        turn = prompt.rpartition(header)[2]
        return turn.rfind(begin) > turn.rfind(end)
    return prompt.rstrip().endswith(begin.rstrip())


def _without(text: str, think: Pair) -> str:
    """The thinking without the strings around it."""
    for mark in think:
        text = text.replace(mark, "")
    return text


# --- vocabularies -----------------------------------------------------------------------------------------------------


def token_id(tokenizer: Any, text: str) -> int | None:
    """Returns the id of the single token that spells `text`, or None."""
    found = tokenizer.convert_tokens_to_ids(text)
    if found is None or (found == tokenizer.unk_token_id and text != tokenizer.unk_token):
        return None
    return int(found)


def ids_of(tokenizer: Any, texts: Iterable[str]) -> frozenset[int]:
    """Returns the ids of those among `texts` that are single tokens."""
    found = (token_id(tokenizer, text) for text in texts)
    return frozenset(i for i in found if i is not None)


def special_ids(tokenizer: Any) -> frozenset[int]:
    """Returns the ids that `decode(..., skip_special_tokens=True)` leaves out."""
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(added | set(tokenizer.all_special_ids))


def spelled_special(tokenizer: Any, text: str, markup: Markup) -> list[str]:
    """Returns the special tokens that a text spells, and that a tokenizer would make of it, such as ``<pad>``.

    Markers and the strings around the thinking, which a trace may hold, are none of them.
    """
    return [name for name in _special_names(tokenizer, markup, len(tokenizer)) if name in text]


@lru_cache(maxsize=8)
def _special_names(tokenizer: Any, markup: Markup, size: int) -> tuple[str, ...]:
    """`size` makes a grown vocabulary a new key."""
    return tuple(tokenizer.convert_ids_to_tokens(sorted(read_vocabulary(tokenizer, markup).hidden_ids)))


def largest_text_id(tokenizer: Any) -> int:
    """Returns the largest id of a token that ordinary text may have.

    Some tokenizers have added tokens that their models have no rows for, such as Gemma 3's for images.
    """
    added = tokenizer.get_added_vocab()
    return max((i for token, i in tokenizer.get_vocab().items() if token not in added), default=-1)


def check_rows(rows: int, tokenizer: Any, named: Mapping[str, Collection[int]]) -> None:
    """Refuses a vocabulary that goes beyond the model.

    Args:
        rows: tokens that the model knows.
        tokenizer: whose text the model is to read; None for no text.
        named: what it is to act on -> the ids.

    Raises:
        ValueError: an id has no row; the message says what to do.
    """
    advice = "load the tokenizer that belongs to the model"
    for name, ids in named.items():
        if not all(0 <= i < rows for i in ids):
            raise ValueError(
                f"the {name} go up to id {max(ids)}, but the embedding of the model has rows for {rows} tokens "
                f"alone; {advice}, or add rows for them (hcot_lmeval.tokens.add_special_tokens) and train them"
            )
    largest = -1 if tokenizer is None else largest_text_id(tokenizer)
    if largest >= rows:
        raise ValueError(
            f"the tokenizer has ids up to {largest}, but the embedding of the model has rows for {rows} tokens "
            f"alone, so they do not belong together; {advice}"
        )


def marker_ids(tokenizer: Any, markup: Markup | str = "hcot") -> MarkerIds:
    """Returns the marker ids of `markup` in the tokenizer's vocabulary.

    Raises:
        ValueError: a marker is missing (the message says how to add it), or the markup is unknown.
    """
    return resolve_markers(get_markup(markup), lambda text: token_id(tokenizer, text))


def end_ids(generation_config: Any, tokenizer: Any) -> frozenset[int]:
    """Returns the ids that end a response: those of a checkpoint's generation config, and the tokenizer's."""
    found = getattr(generation_config, "eos_token_id", None)
    every = [*(found if isinstance(found, (list, tuple)) else [found]), getattr(tokenizer, "eos_token_id", None)]
    return frozenset(int(i) for i in every if i is not None)


@dataclass(frozen=True)
class Vocabulary:
    """What a vocabulary has of what a notation needs.

    Attributes:
        think: the strings around a thinking section; those of the notation if the vocabulary tells of no others.
        think_ids: their ids; None for a string that is not one token.
        has_thinking: whether the vocabulary has tokens for them, or somebody named them.
        hidden_ids: special tokens that are not part of a text.
    """

    think: Pair
    think_ids: tuple[int | None, int | None]
    has_thinking: bool
    hidden_ids: frozenset[int]

    def split(self, text: str, *, opened: bool) -> Parts:
        """Cuts a generated text behind its thinking; a vocabulary without tokens for it may spell any of `PAIRS`."""
        spelled = () if self.has_thinking else (pair for pair in PAIRS if any(mark in text for mark in pair))
        return split_thinking(text, next(iter(spelled), self.think), opened=opened)


def read_vocabulary(
    tokenizer: Any, markup: Markup, *, begin: str | None = None, end: str | int | None = None, think: Pair | None = None
) -> Vocabulary:
    """Reads a tokenizer.

    Args:
        tokenizer: the model's.
        markup: the notation.
        begin: the beginning of thinking as the user named it, or None.
        end: the end of thinking as the user named it, text or token id, or None.
        think: both, by one who knows; nothing is looked for then.

    Raises:
        ValueError: the model cannot write the end that the user named, or its beginning is not known.
    """
    pair = think or _pair(tokenizer, markup, begin, end)
    special = special_ids(tokenizer)
    kept = {*ids_of(tokenizer, (*markup.markers, *markup.think)), *_special_pieces(tokenizer, pair, special)}
    return Vocabulary(
        think=pair,
        think_ids=(token_id(tokenizer, pair[0]), token_id(tokenizer, pair[1])),
        has_thinking=end is not None or _is_known(tokenizer, pair),
        hidden_ids=special - kept,
    )


def _pair(tokenizer: Any, markup: Markup, begin: str | None, end: str | int | None) -> Pair:
    known = (pair for pair in (markup.think, *PAIRS) if _is_known(tokenizer, pair))
    if end is None:
        if begin is not None:
            raise ValueError(f"think_start_token={begin!r} begins the thinking; name its end too, with think_end_token")
        return next(known, markup.think)
    text = _text_of(tokenizer, end)
    if begin is not None:
        return begin, text
    if not _may_occur(tokenizer, text):
        raise ValueError(
            f"think_end_token={end!r} is neither in the vocabulary nor in the chat template, so no thinking would ever "
            f"end{_near(tokenizer, text)}; for a model that spells it out, name the beginning too: think_start_token="
        )
    return _beginning(tokenizer, text), text


def _text_of(tokenizer: Any, end: str | int) -> str:
    if isinstance(end, str):
        return end
    if not 0 <= end < len(tokenizer):
        raise ValueError(f"think_end_token={end} is no token: the vocabulary has ids from 0 to {len(tokenizer) - 1}")
    return str(tokenizer.decode([end]))


def _beginning(tokenizer: Any, end: str) -> str:
    """What begins the thinking that `end` ends: as known, or its twin in name."""
    known = next((begin for begin, last in PAIRS if last == end), end.replace("/", "", 1))
    if known != end:
        return known
    for old, new in (("final", "analysis"), ("end", "begin"), ("end", "start"), ("END", "START")):
        if (twin := end.replace(old, new, 1)) != end and _may_occur(tokenizer, twin):
            return twin
    raise ValueError(f"think_end_token={end!r} ends the thinking; name its beginning too: think_start_token=")


def _is_known(tokenizer: Any, pair: Pair) -> bool:
    """Whether a vocabulary has tokens for both strings: one each, or special ones among several."""
    return all(token_id(tokenizer, text) is not None or _has_pieces(tokenizer, text) for text in pair)


def _has_pieces(tokenizer: Any, text: str) -> bool:
    """Whether a string is made of special tokens and words between them."""
    names = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special and token.content}
    rest = re.sub("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "(?!)", "", text)
    return rest != text and not re.search(r"[<>|]", rest)


def _may_occur(tokenizer: Any, text: str) -> bool:
    """Whether a model of this vocabulary can be expected to write a string; well-known ones may be spelled out."""
    told = str(getattr(tokenizer, "chat_template", None) or "")
    if token_id(tokenizer, text) is not None or _has_pieces(tokenizer, text):
        return True
    spelled = any(text in pair for pair in PAIRS) and not any(_is_known(tokenizer, pair) for pair in PAIRS)
    return bool(text) and (text in told or spelled)


def _near(tokenizer: Any, text: str) -> str:
    words = {token.content for token in tokenizer.added_tokens_decoder.values()} | {end for _, end in PAIRS}
    return did_you_mean(text, words, cutoff=0.7)


def _special_pieces(tokenizer: Any, pair: Pair, special: frozenset[int]) -> frozenset[int]:
    """The special tokens that the strings around the thinking are made of."""
    return special & {i for text in pair for i in tokenizer.encode(text, add_special_tokens=False)}
