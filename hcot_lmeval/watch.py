"""``hcot watch``: follows the notes of a run that is going on, in the terminal.

    hcot watch NOTES            until Ctrl-C; NOTES is a file or folder of notes (model argument notes=DIR)
    hcot watch NOTES --once     one table of what is there now

A line for each task of each run counts what has finished: requests, tokens, prunes and how generations ended. Below it
is the end of the one that finished last. What runs at the moment leaves no notes until it has finished.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from hcot_lmeval.errors import run_command
from hcot_lmeval.events import Statistics
from hcot_lmeval.notes import SCHEMA
from hcot_lmeval.store import first_record, scan

MINUTE = 60.0
COLUMNS = (
    "run",
    "task",
    "done",
    "a minute",
    "generated",
    "thrown away",
    "prunes",
    "peak live",
    "malformed",
    "ended by",
)
FACTS = ("name", "pruning", "max_context")
"""Facts of a run by which it is called."""
ROWS = 8
"""Lines of the last text that are shown."""


class Follower:
    """A file of notes that grows.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._seen = path, 0
        header = first_record(path) or {}
        run = header.get("run") or {}
        self.is_notes = header.get("schema") == SCHEMA
        self.name = ", ".join(str(run[key]) for key in FACTS if run.get(key) is not None) or path.stem

    def read(self) -> Iterator[dict[str, Any]]:
        """Yields the lines that have come since the last call; a line that is half there comes with a later one.

        Raises:
            ValueError: the file is shorter than it was.
        """
        if self.path.stat().st_size < self._seen:
            raise ValueError(f"{self.path} is another file now, shorter than before; start hcot watch again")
        for place, record in scan(self.path, damaged=True, start=self._seen):
            if place > self._seen:  # where the last call ended stands a line that is known, at first the header
                self._seen = place
                if "schema" not in record:
                    yield record


@dataclass
class Tally:
    """What has finished of one task of a run.

    Attributes:
        count: of done, generated, pruned and prunes.
        peak: largest live context, in tokens, and
        peaks: the sum over requests.
        ends: finish reasons.
        malformed: markers that were malformed.
        times: when the requests of the last minute were seen, in seconds.
    """

    count: Counter[str] = field(default_factory=Counter)
    peak: int = 0
    peaks: int = 0
    ends: Counter[str] = field(default_factory=Counter)
    malformed: int = 0
    times: deque[float] = field(default_factory=deque)

    def add(self, found: Statistics) -> None:
        """Counts a request."""
        self.count.update(
            done=1, generated=found.generated_tokens, pruned=found.pruned_tokens, prunes=found.prune_events
        )
        self.peak, self.peaks = max(self.peak, found.peak_live_tokens), self.peaks + found.peak_live_tokens
        self.ends[found.finish_reason] += 1
        self.malformed += sum(found.malformed.values())

    def cells(self, now: float) -> list[str]:
        """Returns the cells behind run and task: means over requests, unless they say otherwise."""
        while self.times and self.times[0] <= now - MINUTE:
            self.times.popleft()
        count, done = self.count, self.count["done"]
        return [
            f"{done:,}",
            f"{len(self.times):,}",
            f"{count['generated'] / done:,.0f}",
            f"{count['pruned'] / max(count['generated'], 1):.0%}",
            f"{count['prunes'] / done:,.1f}",
            f"{self.peaks / done:,.0f}, largest {self.peak:,}",
            f"{self.malformed:,}",
            " ".join(f"{reason} {number:,}" for reason, number in self.ends.most_common()),
        ]


class Watch:
    """The tallies of all notes at a place.

    Args:
        place: a file of notes, or a folder that holds some, or will.

    Raises:
        ValueError: the file holds no notes.
    """

    def __init__(self, place: Path) -> None:
        self.place = place
        self.tallies: dict[tuple[str, str], Tally] = {}
        self.last: dict[str, Any] | None = None
        self._files: dict[Path, Follower] = {}
        self._seen: set[str] = set()
        self._damaged = self._again = 0
        self._find()
        if place.is_file() and place not in self._files:
            raise ValueError(f"{place} holds no notes ({SCHEMA}); give a file or folder of notes")

    def _find(self) -> None:
        if not self.place.exists():
            return
        for path in sorted(self.place.rglob("*.jsonl")) if self.place.is_dir() else [self.place]:
            if path not in self._files and (follower := Follower(path)).is_notes:
                self._files[path] = follower

    def read(self, now: float | None = None) -> None:
        """Counts what has come; at the time `now`, in seconds, or in no minute."""
        self._find()
        for follower in self._files.values():
            for record in follower.read():
                try:
                    task, counts = str(record["meta"].get("task") or ""), Statistics(**record["statistics"])
                    key = json.dumps(
                        [follower.name, record["request"], record["sample"], record["meta"]], sort_keys=True
                    )
                except (KeyError, TypeError, AttributeError):
                    self._damaged += 1
                    continue
                if key in self._seen:  # as two runs write it that share a folder, or one that was resumed
                    self._again += 1
                    continue
                self._seen.add(key)
                tally = self.tallies.setdefault((follower.name, task), Tally())
                tally.add(counts)
                if now is not None:
                    tally.times.append(now)
                self.last = record

    def shown(self, now: float) -> Group:
        """Returns what is on the screen."""
        if not self.tallies:
            there = "has notes, and nothing has finished yet" if self._files else "holds no notes yet"
            told = "it is the folder of the model argument notes=DIR, and what a journal had leaves none"
            return Group(Text(f"{self.place} {there}; {told}", style="dim"))
        table = Table(*COLUMNS, box=None, header_style="dim", pad_edge=False)
        for (run, task), tally in self.tallies.items():
            table.add_row(*map(Text, (run, task, *tally.cells(now))))
        parts: list[Any] = [table]
        if self._again:
            parts.append(Text(f"{self._again:,} requests stand here once more, and are counted once", style="yellow"))
        if self._damaged:
            parts.append(Text(f"{self._damaged:,} lines are no notes, and are not counted", style="red"))
        if self.last is not None:
            lines = str(self.last.get("text")).splitlines()[-ROWS:]
            parts.append(
                Panel(Text("\n".join(lines)[-2000:]), title=Text(f"finished last: {self.last.get('request')}"))
            )
        return Group(*parts)


def parser() -> argparse.ArgumentParser:
    """Returns the parser."""
    parse = argparse.ArgumentParser(
        prog="hcot watch", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parse.add_argument("notes", type=Path, help="file or folder of notes")
    parse.add_argument("--once", action="store_true", help="print what is there, and end")
    parse.add_argument("--every", type=float, default=1.0, metavar="SECONDS", help="between two looks (%(default)s)")
    return parse


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    args = parser().parse_args(argv)
    return run_command(lambda: run(args), extra="chat")


def run(args: argparse.Namespace, console: Console | None = None) -> None:
    """Shows the notes until Ctrl-C.

    Raises:
        ValueError: there is no such place, the file holds no notes, or the time between looks is none.
    """
    if not 0.1 <= args.every <= 3600:
        raise ValueError(f"--every {args.every} is not allowed; give seconds from 0.1 to 3600")
    console = console or Console()
    watch = Watch(args.notes)
    watch.read()
    if args.once and not args.notes.exists():
        raise ValueError(f"{args.notes} does not exist; give a file or folder of notes (model argument notes=DIR)")
    if args.once:
        console.print(watch.shown(time.monotonic()))
        return
    try:
        with Live(watch.shown(time.monotonic()), console=console, auto_refresh=False) as live:
            while True:
                time.sleep(args.every)
                watch.read(now := time.monotonic())
                live.update(watch.shown(now), refresh=True)
    except KeyboardInterrupt:
        return
