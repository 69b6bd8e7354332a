"""Which options each command has.

This module imports the standard library alone.
"""

from __future__ import annotations

from hcot_lmeval.prepare.checks import CheckOptions
from hcot_lmeval.prepare.export import ExportOptions
from hcot_lmeval.prepare.inputs import InputOptions
from hcot_lmeval.prepare.lessons import RefineOptions, RewriteOptions
from hcot_lmeval.prepare.protocols.asking import AskingOptions
from hcot_lmeval.prepare.segmenter import SegmenterOptions
from hcot_lmeval.prepare.segmenting import FormOptions
from hcot_lmeval.prepare.stats import StatsOptions
from hcot_lmeval.prepare.steps import Work
from hcot_lmeval.prepare.teacher.options import TeacherOptions
from hcot_lmeval.prepare.teaching import GivingUp

_TEACHER = ((TeacherOptions, "teacher"), (AskingOptions, "questions"), (GivingUp, "rows without a reply"))
_JUDGE = ((TeacherOptions, "teacher as a judge of solutions"), *_TEACHER[1:])
_WORK = (Work, "work")

KINDS: dict[str, tuple[tuple[type, str], ...]] = {
    "segment": (
        (InputOptions, "input"),
        (FormOptions, "form"),
        (SegmenterOptions, "blocks"),
        *_TEACHER,
        (RewriteOptions, "rewriting"),
        _WORK,
    ),
    "refine": ((RefineOptions, "blocks"), *_TEACHER, _WORK),
    "check": ((CheckOptions, "what is allowed"), *_JUDGE, _WORK),
    "stats": ((StatsOptions, "statistics"), _WORK),
    "export": ((ExportOptions, "export"), _WORK),
}
"""Command -> the kinds of its options, each with a title."""
