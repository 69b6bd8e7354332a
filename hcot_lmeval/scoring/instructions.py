"""The sentence behind a question that asks for a boxed answer, in each language of PolyMath.

The wordings are data, `instructions.json`. Other wordings come from a JSON file of the same form (language code →
sentence), which may hold fewer languages.
"""

from __future__ import annotations

import json
import os
from functools import cache
from importlib import resources
from pathlib import Path

INSTRUCTIONS_VARIABLE = "HCOT_LMEVAL_INSTRUCTIONS"
"""Environment variable: a JSON file with other wordings."""


@cache
def default_instructions() -> dict[str, str]:
    """Returns our own wordings; the keys are the languages of PolyMath."""
    text = resources.files(__package__).joinpath("instructions.json").read_text(encoding="utf-8")
    return json.loads(text)


def instruction(language: str, path: str | Path | None = None) -> str:
    """Returns the sentence for a language.

    Args:
        language: a key of `default_instructions`.
        path: a JSON file with other wordings; None for the value of `INSTRUCTIONS_VARIABLE`, and for ours if that is
            unset or empty.

    Raises:
        ValueError: the file is not an object of known languages with non-empty sentences, or lacks this language.
    """
    path = path or os.environ.get(INSTRUCTIONS_VARIABLE)
    wordings = _read(Path(path)) if path else default_instructions()
    if language not in wordings:
        raise ValueError(f"{path or 'the package'} has no instruction for language {language!r}; add one to the file")
    return wordings[language]


def _read(path: Path) -> dict[str, str]:
    wordings = json.loads(path.read_text(encoding="utf-8"))
    known = default_instructions()
    if not isinstance(wordings, dict):
        raise ValueError(f"{path} holds a {type(wordings).__name__}; an object {{language: sentence}} is needed")
    for language, sentence in wordings.items():
        if language not in known:
            raise ValueError(f"{path}: language {language!r} is unknown; choose from {', '.join(known)}")
        if not isinstance(sentence, str) or not sentence.strip():
            raise ValueError(f"{path}: the instruction for {language!r} is {sentence!r}; give a non-empty sentence")
    return wordings
