r"""Checking answers: ``extract_answer(response)``, ``grade(response, gold)``, ``is_equivalent(answer, gold)``.

Numbers are compared here, exactly. Everything else goes to a worker process with a time and a memory limit, where
math-verify's grammar and sympy compare it; importing this module imports neither. A check that could not be made
(`Grade.correct` is None) is not a wrong answer.

=================== ======= ============================================================
reason              correct meaning
=================== ======= ============================================================
equal               True    the answer says what the gold answer says
different           False   it does not
no_answer           False   the response has no complete boxed answer
unparsed_answer     False   the answer is not readable as mathematics, the gold answer is
unparsed_gold       None    the gold answer is not readable as mathematics
too_long            None    more than `MAX_CHARS` characters
too_large, too_deep None    a number too large to evaluate; brackets nested too deeply
timeout             None    not decided within the time limit
memory              None    not decided within the memory limit
worker_died         None    the worker process was killed from outside, twice
error               None    the comparison failed; `detail` says how
=================== ======= ============================================================
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from hcot_lmeval.answers.extract import answer_region, fallback_answer, has_box, last_box
from hcot_lmeval.answers.literals import literals_equal
from hcot_lmeval.answers.normalize import normalize
from hcot_lmeval.answers.pool import SECONDS, shared_pool

__all__ = ["MAX_CHARS", "Grade", "extract_answer", "grade", "is_equivalent"]

MAX_CHARS = 4000  # of one answer; the longest gold answer of MATH-500, AIME and PolyMath has 300
SHORT_CHARS = 200  # what is longer is read by the worker alone, so that all work on it has a time limit
MAX_DEPTH = 60  # brackets inside brackets; real answers nest 6


@dataclass(frozen=True)
class Grade:
    """A verdict.

    Attributes:
        correct: True, False, or None: could not be checked.
        answer: the extracted answer as the response wrote it; None if there is none.
        reason: why, one of the words in the module's table.
        detail: more about an "error" or an "unparsed" formula, for people.
    """

    correct: bool | None
    answer: str | None
    reason: str
    detail: str = ""


def extract_answer(response: str, *, fallback: bool = False) -> str | None:
    r"""Returns the last complete boxed answer of a response, or None.

    Args:
        response: a :class:`hcot_lmeval.response.Response`, or the generated text (never the prompt's).
        fallback: without any box, take what the text states ("the answer is 33"), or the last number or formula of its
            last sentences. A separate, laxer metric: do not mix the two.
    """
    region = answer_region(response)
    answer = last_box(region)
    if answer is None and fallback and not has_box(region):
        answer = fallback_answer(region)
    return answer


def grade(response: str, gold: str, *, fallback: bool = False, seconds: float = SECONDS) -> Grade:
    """Extracts the answer of `response` and compares it with `gold`; see `extract_answer` and `is_equivalent`."""
    answer = extract_answer(response, fallback=fallback)
    if answer is None:
        return Grade(False, None, "no_answer")
    return is_equivalent(answer, gold, seconds=seconds)


def is_equivalent(answer: str, gold: str | int | float, *, seconds: float = SECONDS) -> Grade:
    """Compares a bare answer with the gold answer.

    Args:
        answer: LaTeX or plain text, with or without delimiters.
        gold: the reference, written likewise; where it holds boxes, their content counts.
        seconds: the limit for this one check; waiting for a worker process to start is not part of it.

    Raises:
        ValueError: `gold` is empty, or `seconds` is no time.
        RuntimeError: math-verify could not be imported.
    """
    gold = str(gold)
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not seconds > 0:
        raise ValueError(f"seconds={seconds!r} is no time; give a number of seconds above 0")
    if not gold.strip():
        raise ValueError("gold='' is empty; a check needs a reference answer")
    if max(len(answer), len(gold)) > MAX_CHARS:
        return Grade(None, answer, "too_long")
    if max(_depth(answer), _depth(gold)) > MAX_DEPTH:
        return Grade(None, answer, "too_deep")
    reference, stated = _unboxed(gold), _unboxed(answer)
    if max(len(reference), len(stated)) <= SHORT_CHARS:
        verdict = _quick(reference, stated)
        if verdict is not None:
            return Grade(verdict, answer, "equal" if verdict else "different")
    return _verdict(shared_pool().check(reference, stated, seconds), answer)


def _quick(gold: str, answer: str) -> bool | None:
    try:
        return literals_equal(normalize(gold), normalize(answer))
    except Exception:  # a defect of ours: the worker meets it too, and reports it as an "error"
        return None


def _depth(text: str) -> int:
    depth = deepest = 0
    for char in text:
        depth += (char in "{([") - (char in "})]")
        deepest = max(deepest, depth)
    return deepest


def _verdict(reply: dict[str, object], answer: str) -> Grade:
    status, detail = str(reply["status"]), str(reply.get("detail", ""))
    if status == "ok":
        return Grade(bool(reply["equal"]), answer, "equal" if reply["equal"] else "different")
    if status == "unparsed_answer":
        return Grade(False, answer, status, detail)
    return Grade(None, answer, status, detail)


_PROSE = re.compile(r"(?i)\banswer is\b|\b(?:find that|we get|therefore|thus|hence)\b")


def _unboxed(text: str) -> str:
    """A box inside an answer is its content; an answer that is a whole sentence says it at its end."""
    if has_box(text):
        return last_box(text) or text
    return (fallback_answer(text) or text) if _PROSE.search(text) else text
