"""Questions as text files, ``prompts/NAME.md``: a line ``version: N``, then a section for each part of the talk.

    prompt = load_prompt("segment")
    prompt.render("user", question="2 + 3?", sentences="[0] Two and three make 5.")

A section begins with ``# name``. ``{{name}}`` is replaced by a value, once: what values hold is left alone. Whoever
changes a question raises its version, which is part of the key of every task and of `made_by` of every row.

This module imports the standard library alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files

_SECTION = re.compile(r"^# (\w+)$", re.MULTILINE)
_PLACE = re.compile(r"\{\{(\w+)\}\}")


@dataclass(frozen=True)
class Prompt:
    """A question.

    Attributes:
        name: of its file.
        version: raised whenever its words change.
        sections: name -> text.
    """

    name: str
    version: int
    sections: Mapping[str, str]

    @property
    def label(self) -> str:
        """Name and version, for records."""
        return f"{self.name}/{self.version}"

    def render(self, section: str, **values: object) -> str:
        """Returns a section with its places filled.

        Raises:
            KeyError: a value is missing or is used nowhere, or there is no such section.
        """
        text = self.sections[section]
        if unused := values.keys() - set(_PLACE.findall(text)):
            raise KeyError(f"{self.name}: {section} has no place for {', '.join(sorted(unused))}")
        return _PLACE.sub(lambda place: str(values[place[1]]), text)


@lru_cache(maxsize=16)
def load_prompt(name: str) -> Prompt:
    """Reads a question.

    Raises:
        ValueError: the file has no version.
    """
    return parse_prompt(name, files("hcot_lmeval.prepare.protocols").joinpath(f"prompts/{name}.md").read_text("utf-8"))


def parse_prompt(name: str, text: str) -> Prompt:
    """Takes the text of a file apart.

    Raises:
        ValueError: it has no version.
    """
    head, *parts = _SECTION.split(text)
    found = re.fullmatch(r"version: (\d+)", head.strip())
    if found is None:
        raise ValueError(f"{name}.md has to begin with `version: N`")
    sections = {title: body.strip() for title, body in zip(parts[::2], parts[1::2], strict=True)}
    return Prompt(name, int(found[1]), sections)
