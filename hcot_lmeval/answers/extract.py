r"""Where the answer is: the part of a response that counts, and the last complete ``\boxed{...}`` in it.

Rules, in this order:

* Thinking does not count. Of a plain string, only what follows the last ``</think>`` is read, or another end that
  `hcot_lmeval.vocabulary` knows; a ``<think>`` still open at the end leaves nothing. A
  :class:`hcot_lmeval.response.Response` is its answer part already.
* A block's thought does not count, finished or not. The text goes through the rule of `hcot_lmeval.trace`, in the
  notation whose opening marker comes first, and the thoughts of the blocks that are then open are dropped, one without
  end up to the end. ``[THOUGHT] S [RETURN]``, the form that a prune leaves behind (and that models imitate), is a
  solution. Markers themselves are removed.
* The last *complete* box wins. A box that was cut off is no answer and does not hide an earlier complete one.
* Boxes joined by nothing but a connective (``\boxed{1} \text{ and } \boxed{2}``) are one answer of several parts. Boxes
  apart from each other are not: a later box corrects an earlier one.
"""

from __future__ import annotations

import re

from hcot_lmeval.fences import blanked, fenced
from hcot_lmeval.markup import PRESETS, Markup, resolve_markers
from hcot_lmeval.trace import LiveContext, Policy
from hcot_lmeval.vocabulary import answer_of

# Chat markers at which a turn ends; a model that runs on past one talks to itself, not to the reader.
_TURN_ENDS = ("<|im_end|>", "<|im_start|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>", "</s>")

_MARKER = re.compile("|".join({re.escape(marker) for markup in PRESETS.values() for marker in markup.markers}))

_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")
_BARE = re.compile(r"[-+]?[\d.,/]*\d|[-+]?\\[A-Za-z]+|[A-Za-z]")
# What may stand between two boxes of one answer: punctuation, math delimiters, spacing, "and", "or", a label "y_2 =".
_JOIN = re.compile(
    r"(?:\s|[,;&]|\$|\\[()\[\],;:! ]|\\q?quad\b|\band\b|\bor\b|\\(?:text|mbox)\s*\{[^{}]*\b(?:and|or)\b[^{}]*\}"
    r"|\\(?:text|mbox)\s*\{[\s,;]*\}|[A-Za-z](?:_\{?\w\}?)?\s*=)+"
)
_JOINER = re.compile(r"[,;&]|\band\b|\bor\b")
_MAX_NESTING = 8  # boxes inside boxes that are opened; real outputs nest two
_MAX_JOIN = 80  # characters between two boxes of one answer; longer stretches are prose


def answer_region(response: str) -> str:
    """Returns the part of `response` in which an answer counts; see the module's docstring."""
    text = str(response)
    if not hasattr(response, "thinking"):  # a Response has had its thinking cut off by those who saw the tokens
        text = answer_of(text)
    ends = [at for at in (text.find(mark) for mark in _TURN_ENDS) if at >= 0]
    return strip_blocks(text[: min(ends)] if ends else text)


def strip_blocks(text: str) -> str:
    """Removes block markers, the thoughts of all blocks, and whatever an unfinished thought swallowed."""
    opened = {at: markup for markup in PRESETS.values() if (at := text.find(markup.open)) >= 0}
    return _MARKER.sub("", _pruned(text, opened[min(opened)]) if opened else text)


def _pruned(text: str, markup: Markup) -> str:
    ids = {marker: -number for number, marker in enumerate(markup.markers, 1)}
    pieces = re.split(f"({'|'.join(map(re.escape, ids))})", text)
    context = LiveContext(resolve_markers(markup, ids.get), Policy.EVICT)  # the same text, and the cheapest to follow
    for index, piece in enumerate(pieces):
        context.push(ids.get(piece, index))
    live = context.live
    for start, stop in reversed(context.thoughts):
        del live[start:stop]
    return "".join(pieces[index] for index in live if index >= 0)


def boxes(text: str) -> list[tuple[int, int, str]]:
    r"""Returns every complete outermost box as (start, end, content), in the order of the text. Linear in its length.

    ``\boxed 33`` takes the number, command or letter that follows.
    """
    closers = _closing_braces(text)
    found: list[tuple[int, int, str]] = []
    for match in _BOX.finditer(text):
        start, at = match.span()
        if found and start < found[-1][1]:
            continue
        if text[at : at + 1] == "{":
            if at in closers:
                found.append((start, closers[at] + 1, text[at + 1 : closers[at]].strip()))
        elif bare := _BARE.match(text, at):
            found.append((start, bare.end(), bare.group()))
    return found


def _closing_braces(text: str) -> dict[int, int]:
    r"""Maps the index of each balanced ``{`` to that of its ``}``; ``\{`` and ``\}`` are characters, not braces."""
    stack: list[int] = []
    pairs: dict[int, int] = {}
    for match in re.finditer(r"\\.|[{}]", text, re.DOTALL):
        if match.group() == "{":
            stack.append(match.start())
        elif match.group() == "}" and stack:
            pairs[stack.pop()] = match.start()
    return pairs


def last_box(text: str) -> str | None:
    """Returns the content of the last complete box, and of the boxes that it is joined to; None without a box."""
    answer = None
    for _ in range(_MAX_NESTING):
        found = [box for box in boxes(text) if box[2]]
        if not found:
            break
        text = answer = _join(text, found)
    return answer


def _join(text: str, found: list[tuple[int, int, str]]) -> str:
    parts = [found[-1]]
    for box in reversed(found[:-1]):
        between = text[box[1] : parts[-1][0]]
        if len(between) > _MAX_JOIN or not _JOIN.fullmatch(between) or not _JOINER.search(between):
            break
        parts.append(box)
    return r" \text{ and } ".join(dict.fromkeys(content for _, _, content in reversed(parts)))


def has_box(text: str) -> bool:
    """Whether a box command occurs, complete or not."""
    return _BOX.search(text) is not None


_MATH = {"$$": "$$", "$": "$", r"\(": r"\)", r"\[": r"\]"}
_CUE = re.compile(r"(?i)\banswer\b[\s*_]*+(?:(?:is|was|are|should be|would be|equals|=|:)[\s*_]*+:?)?")
_CLOSING = re.compile(r"(?i)I hope it is correct")
_UNIT = r"(?:\s?\\?%|\s?[a-zA-Zµ°]{1,3}[²³]?(?![a-zA-Z]))"
_NUMBER = re.compile(rf"(?<![\w.,])[-+−]?[$€£]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:/\d+)?(?:{_UNIT})?")
_SENTENCE = re.compile(r"(?<=[.!?。])\s+|\n+")


def fallback_answer(text: str) -> str | None:
    """Returns what a response without a box states: "the answer is X", else the last value in its last sentences."""
    text = text.strip()
    if closing := _CLOSING.search(text):
        text = text[: closing.start()].rstrip()
    at = len(text)
    for cue in reversed(list(_CUE.finditer(text))):  # each is asked for what stands before the next
        if stated := _stated(text[cue.end() : at]):
            return stated
        at = cue.start()
    for sentence in reversed(_SENTENCE.split(text)[-3:]):
        if stated := _last_value(sentence):
            return stated
    return None


def _stated(tail: str) -> str | None:
    """The formula at the beginning of `tail`, else the last value of its first sentence."""
    formula = next(fenced(tail.lstrip(" \n:*"), _MATH), None)
    if formula and formula.start == 0 and formula.content.strip():
        return formula.content.strip()
    return _last_value(_SENTENCE.split(tail.strip(), maxsplit=1)[0])


def _last_value(sentence: str) -> str | None:
    """The last formula of a sentence, or the last number, whichever comes later."""
    formulas = list(fenced(sentence, _MATH))
    found = [(formula.start, content) for formula in formulas if (content := formula.content.strip())]
    found += [(match.start(), match.group().strip()) for match in _NUMBER.finditer(blanked(sentence, formulas))]
    return max(found)[1] if found else None
