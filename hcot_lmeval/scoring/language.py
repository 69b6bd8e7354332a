"""Is a text written in the language that was asked for?

PolyMath's language consistency: formulas are taken out, a short rest counts as consistent (there is nothing to judge),
the rest goes through langdetect. Seeded, so one text always gets one verdict. One thing is added: a language whose
script does not occur in the text is ruled out beforehand. Left alone, langdetect takes short Chinese texts for Korean
(5 of 500 PolyMath questions; with the rule none).
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any

from hcot_lmeval.fences import blanked, fenced
from hcot_lmeval.markup import PRESETS
from hcot_lmeval.vocabulary import PAIRS

SHORT = 15
"""Up to this many characters count as consistent (the benchmark's own rule)."""

SEED = 0

NAMES = {"zh": ("zh-cn", "zh-tw")}
"""langdetect's names of a language where they are not the language code itself."""

UNSUPPORTED = frozenset({"ms"})
"""Languages of PolyMath without a langdetect profile: Malay."""

SCRIPTS = {
    "ar fa ur": "\u0600-\u06ff",
    "bg mk ru uk": "\u0400-\u04ff",
    "bn": "\u0980-\u09ff",
    "el": "\u0370-\u03ff",
    "gu": "\u0a80-\u0aff",
    "he": "\u0590-\u05ff",
    "hi mr ne": "\u0900-\u097f",
    "ja": "\u3040-\u30ff",
    "kn": "\u0c80-\u0cff",
    "ko": "\u1100-\u11ff\u3130-\u318f\uac00-\ud7af",
    "ml": "\u0d00-\u0d7f",
    "pa": "\u0a00-\u0a7f",
    "ta": "\u0b80-\u0bff",
    "te": "\u0c00-\u0c7f",
    "th": "\u0e00-\u0e7f",
    "zh-cn zh-tw": "\u4e00-\u9fff",
}
"""langdetect's languages -> the Unicode block without which they are not written; all others are in Latin letters.
Japanese stands under its kana, which every sentence of it needs, as its other characters are shared with Chinese."""
_SCRIPT_OF = {name: re.compile(f"[{block}]") for names, block in SCRIPTS.items() for name in names.split()}
_LATIN = re.compile("[A-Za-z]")

_WORDS = {text for row in (*(markup.markers for markup in PRESETS.values()), *PAIRS) for text in row}
_MARKERS = re.compile("|".join(map(re.escape, sorted(_WORDS, key=len, reverse=True))))

# From the widest delimiters to the narrowest, so that a formula is not cut by what stands inside of it.
_FORMULAS = ({"```": "```"}, None, {"$$": "$$"}, {r"\[": r"\]"}, {r"\(": r"\)"}, {"$": "$"})  # None: environments
_BEGIN, _END = (re.compile(rf"\\{side}\{{(\w+\*?)\}}") for side in ("begin", "end"))
_INNERMOST = re.compile(r"\\[a-zA-Z]++\*?\s*(?:\[[^\[\]]*\])?(?:\{[^{}]*\})+")
_COMMAND = re.compile(r"\\[a-zA-Z]+|\\.|[{}]")
_MAX_NESTING = 20  # commands inside commands that are taken out with their arguments


def without_formulas(text: str) -> str:
    """Returns the prose of a text: no formulas, LaTeX commands (with their arguments), code blocks or block markers."""
    text = _MARKERS.sub(" ", text)
    for marks in _FORMULAS:
        text = blanked(text, list(fenced(text, _environments(text) if marks is None else marks)))
    for _ in range(_MAX_NESTING):  # from the innermost command outwards
        text, count = _INNERMOST.subn(" ", text)
        if not count:
            break
    return " ".join(_COMMAND.sub(" ", text).split())


def _environments(text: str) -> dict[str, str]:
    names = set(_BEGIN.findall(text)) & set(_END.findall(text))
    return {rf"\begin{{{name}}}": rf"\end{{{name}}}" for name in names}


def is_consistent(text: str, language: str) -> bool:
    """Tells whether the prose of a text is written in a language; the most probable one decides.

    Args:
        text: a thinking section or an answer.
        language: code as in PolyMath (``en``, ``zh``).

    Raises:
        ValueError: langdetect does not know the language.
    """
    accepted = NAMES.get(language, (language,))
    known = _factory().get_lang_list()
    if not set(accepted) <= set(known):
        raise ValueError(f"language={language!r} has no langdetect profile; choose from {', '.join(sorted(known))}")
    prose = without_formulas(text)
    if len(prose) <= SHORT:
        return True
    found = _detect(prose)
    return found is None or found in accepted


def _detect(prose: str) -> str | None:
    """The most probable language; None if there are no letters to go by, "unknown" if no language fits."""
    from langdetect.lang_detect_exception import ErrorCode, LangDetectException

    if not any(character.isalpha() for character in prose):
        return None
    possible = [name for name in _factory().get_lang_list() if _SCRIPT_OF.get(name, _LATIN).search(prose)]
    if not possible:
        return "unknown"
    detector = _factory().create()
    detector.set_prior_map(dict.fromkeys(possible, 1.0))
    detector.append(prose)
    try:
        probabilities = detector.get_probabilities()
    except LangDetectException as error:
        if error.get_code() != ErrorCode.CantDetectError:
            raise
        return "unknown"
    return probabilities[0].lang if probabilities else "unknown"


@cache
def _factory() -> Any:
    """A factory of our own: the module-wide one of langdetect shares its seed with everybody."""
    from langdetect.detector_factory import PROFILES_DIRECTORY, DetectorFactory

    factory = DetectorFactory()
    factory.load_profile(PROFILES_DIRECTORY)
    factory.set_seed(SEED)
    return factory


def consistency(response: str, language: str) -> dict[str, float]:
    """Returns lang_answer and lang_thinking of a response (1: consistent, or too short to tell).

    lang_thinking is absent for a plain string, which does not tell its thinking apart; both are absent for a language
    that cannot be detected.
    """
    if language in UNSUPPORTED:
        return {}
    record = {"lang_answer": float(is_consistent(str(response), language))}
    if hasattr(response, "thinking"):
        record["lang_thinking"] = float(is_consistent(response.thinking, language))
    return record
