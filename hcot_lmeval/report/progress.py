"""How far a grid is, and how long the rest may take."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from statistics import fmean

from tqdm import tqdm

from hcot_lmeval.report.folder import CellFolder

WORDS = 60
"""Characters of what a cell last printed."""


class Progress:
    """A line for each cell of the grid that ends, and on a terminal a bar over the cells.

    A cell is expected to take what the others of its task, model and policy took on average; else what all took.
    """

    def __init__(self, folders: Sequence[CellFolder]) -> None:
        self._seconds = {folder: folder.seconds() for folder in folders}
        self._open = [folder for folder in folders if not folder.is_done]
        self._current: CellFolder | None = None
        self._started = time.monotonic()
        form = "{n_fmt}/{total_fmt} |{bar:20}| {elapsed}{postfix}"
        self._bar = tqdm(total=len(folders), disable=None, bar_format=form, dynamic_ncols=True)  # None: not in a file
        self._bar.update(len(folders) - len(self._open))

    def begins(self) -> None:
        """Says how much was done before, if anything was."""
        if done := len(self._seconds) - len(self._open):
            self._say(f"{done} of {len(self._seconds)} cells are done{self._rest()}")

    def ticks(self, folder: CellFolder, words: str) -> None:
        """Says how long the cell has been in work and, if it last printed a bar of its own, what that shows."""
        if folder is not self._current:
            self._current, self._started = folder, time.monotonic()
        bar = f": {words[:WORDS]}" if "%|" in words else ""
        running = _duration(time.monotonic() - self._started)
        self._bar.set_postfix_str(f"{folder.cell.title}, {running}{bar}{self._rest()}")

    def waits(self, folder: CellFolder) -> None:
        """Says that another process has the cell in work."""
        self._say(f"{folder.cell.title}: another process has it in work; waiting for its end")

    def ends(self, folder: CellFolder, fault: str | None) -> None:
        """Counts a cell that is done, or that failed for the reason given."""
        took = self._seconds[folder] = folder.seconds()
        self._open.remove(folder)
        self._current = None
        self._bar.update()
        if fault is not None:
            self.warns(fault)
        outcome = "failed" if fault else f"done in {_duration(took)}" if took else "done"
        count = f"{len(self._seconds) - len(self._open)}/{len(self._seconds)}"
        self._say(f"[{count}] {folder.cell.title}: {outcome}{self._rest()}")

    def warns(self, text: str) -> None:
        """Prints to the standard error output, above the bar."""
        self._bar.write(text, file=sys.stderr)

    def close(self) -> None:
        self._bar.close()

    def seconds_left(self) -> float | None:
        """Returns the estimate; None while no cell is finished."""
        known = {folder: seconds for folder, seconds in self._seconds.items() if seconds}
        if not known:
            return None
        running = time.monotonic() - self._started
        expected = {folder: _expected(folder, known) for folder in self._open}
        return sum(max(0.0, s - running) if folder is self._current else s for folder, s in expected.items())

    def _say(self, text: str) -> None:
        self._bar.write(text, file=sys.stdout)
        sys.stdout.flush()

    def _rest(self) -> str:
        seconds = self.seconds_left()
        left = "time left not known yet" if seconds is None else f"about {_duration(seconds)} left"
        return f"; {left}" if self._open else ""


def _expected(folder: CellFolder, known: dict[CellFolder, float]) -> float:
    def kind(of: CellFolder) -> tuple[str | None, ...]:
        return of.cell.task, of.cell.model.name, of.cell.policy

    alike = [seconds for other, seconds in known.items() if kind(other) == kind(folder)]
    return fmean(alike or known.values())


def _duration(seconds: float) -> str:
    """Returns ``43 s``, ``12 min`` or ``3.4 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
