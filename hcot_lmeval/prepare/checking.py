"""The step `check`: rows are checked one at a time, and against each other when they are written out.

This module imports the standard library alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from hcot_lmeval.prepare.checks import Checker, CheckOptions, Fault
from hcot_lmeval.prepare.contamination import load_problems
from hcot_lmeval.prepare.duplicates import Fingerprint, Twins, fingerprint
from hcot_lmeval.prepare.folder import StepFolder
from hcot_lmeval.prepare.inputs import Input
from hcot_lmeval.prepare.reading import read_prepared
from hcot_lmeval.prepare.repair import check_and_repair
from hcot_lmeval.prepare.rows import PreparedRow, Unreadable
from hcot_lmeval.prepare.steps import Numbered, Plain, Work, rejection, run_rows, unread


@dataclass(frozen=True)
class Checking:
    """Makes the rows of `check`: checked, repaired, with a fingerprint by which duplicates are found later.

    Attributes:
        options: what is allowed.
        problems: of the evaluation tasks.
    """

    options: CheckOptions
    problems: tuple[tuple[str, str], ...] = ()

    def __call__(self) -> Callable[[Numbered], dict[str, Any]]:
        return partial(_checked, check=Checker(self.options, self.problems))


def _checked(item: Numbered, check: Checker) -> dict[str, Any]:
    row = item[1]
    if isinstance(row, Unreadable):
        return unread(row)
    return checked_entry(check, *check_and_repair(row, check))


def checked_entry(check: Checker, row: PreparedRow, faults: Sequence[Fault], repairs: Sequence[str]) -> dict[str, Any]:
    """Returns the entry of a row that was checked, with the fingerprint by which `Sifting` finds duplicates."""
    options = check.options
    entry: dict[str, Any] = {"row": row.record(), "faults": [fault[:2] for fault in faults], "repairs": list(repairs)}
    if options.duplicates != "off":
        text = row.source.question
        if options.duplicates == "trace":
            text = f"{text}\n{row.source.text if row.source.reasoning else row.text}"
        entry["print"] = fingerprint(text, near=options.near < 1).to_json()
    return entry


def run_check(
    folder: StepFolder, inputs: Sequence[Input], limit: int | None, options: CheckOptions, work: Work
) -> StepFolder:
    """Checks all rows; goes on where an earlier run stopped."""
    if folder.open(restart=work.restart):
        return folder
    make = Checking(options, tuple(load_problems(options.against)))
    with Twins(options.near) as twins:
        return run_rows(
            folder, inputs, limit, lambda: read_prepared(inputs, limit), make, work, Sifting(options, twins)
        )


class Sifting(Plain):
    """Decides by the faults of a row and whether an earlier one had the same words.

    Only rows that pass are remembered: a copy of a rejected row is no duplicate of anything that is left.
    """

    def __init__(self, options: CheckOptions, twins: Twins) -> None:
        super().__init__()
        self._options, self._twins = options, twins
        self.repaired: Counter[str] = Counter()

    def _decide(self, entry: dict[str, Any]) -> tuple[bool, dict[str, Any]]:
        if "reject" in entry:
            return super()._decide(entry)
        record, faults = entry["row"], [Fault(*fault) for fault in entry["faults"]]
        grave = [fault for fault in faults if fault.code not in self._options.tolerated]
        if not grave and "print" in entry:
            faults += self._twin(str(record["id"]), Fingerprint.from_json(entry["print"]))
            grave = [fault for fault in faults if fault.code not in self._options.tolerated]
        remarks = [fault for fault in faults if fault not in grave]
        self.remarks.update(fault.code for fault in remarks)
        self.repaired.update({"rows": 1, "repairs": len(entry["repairs"])} if entry["repairs"] else {})
        self._counted(not grave, grave[0].code if grave else "")
        if grave:
            return False, rejection(record, [*grave, *remarks])
        told = [{"code": fault.code, "detail": fault.detail} for fault in remarks]
        return True, {**record, "remarks": told} if told else record

    def _twin(self, name: str, print_: Fingerprint) -> list[Fault]:
        twin = self._twins.find_or_add(name, print_)
        if twin is None:
            return []
        code, share = ("duplicate", "all") if twin.exact else ("near_duplicate", f"{100 * twin.similarity:.0f} %")
        return [Fault(code, f"{share} of {twin.name}")]

    def summary(self) -> dict[str, Any]:
        options = self._options
        return super().summary() | {
            "repaired": {"rows": self.repaired["rows"], "repairs": self.repaired["repairs"]},
            "contamination": f"looked for {', '.join(options.against)}" if options.against else "not looked for",
        }
