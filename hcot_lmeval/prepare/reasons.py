"""Every code that a rejected row may have, with its sentence.

This module imports the standard library alone.
"""

from __future__ import annotations

from hcot_lmeval.prepare.checks import CHECKING
from hcot_lmeval.prepare.outline import CODES
from hcot_lmeval.prepare.protocols.asking import TEACHING
from hcot_lmeval.prepare.rows import READING

REASONS: dict[str, str] = {**READING, **CODES, **TEACHING, **CHECKING}
"""Code -> what it means: of rows that cannot be read, of outlines, of a teacher's replies, of the checks."""


def meaning(code: str) -> str:
    """Returns what a code means."""
    return REASONS[code]
