"""Runs the cells of a grid that are missing, each as a process of its own: a crash loses one cell.

Start the same command again after a kill, and it goes on; start it several times side by side, and the processes share
the cells out among them. A cell in work is locked, and its lm_eval holds the lock too: should this process be killed
and lm_eval live on, no second one is started beside it.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import dropwhile
from pathlib import Path
from typing import IO

from tqdm import tqdm

from hcot_lmeval.report.folder import LM_EVAL, CellFolder
from hcot_lmeval.store import lock

LOG_LINES = 15
"""Of a failed cell that are shown."""
WORDS = 60
"""Characters that are shown of the bar which a cell last printed."""
POLL_SECONDS = 0.5
"""Between two looks at what a running cell has printed."""
GRACE_SECONDS = 10.0
"""What lm_eval is given to end by itself when it is told to."""


@dataclass(frozen=True)
class Failure:
    """A cell that did not end well, and what lm_eval said of it: a traceback's message, or the last lines printed."""

    folder: CellFolder
    reason: str
    log: str

    def message(self, earlier: Sequence[Failure]) -> str:
        """Returns the reason and the log; of a failure that is like an earlier one, that."""
        title = self.folder.cell.title
        for other in earlier:
            if (other.reason, other.log) == (self.reason, self.log):
                return f"{title} failed like {other.folder.cell.title}; {self.folder.log}"
        lines = (f"    {line}" for line in self.log.splitlines())
        return "\n".join([f"{title} failed: {self.reason}; {self.folder.log}", *lines])


def run_cells(
    folders: Sequence[CellFolder],
    after: Callable[[CellFolder], None] = lambda folder: None,
    lm_eval: Sequence[str] = LM_EVAL,
) -> list[Failure]:
    """Evaluates every cell that is not done; those that another process has in work come last.

    A line tells of each one that ends, and on a terminal there is a bar over the cells. Returns those that failed;
    `after` is called with each one that is done now.

    Raises:
        KeyboardInterrupt: after the cell in work was ended; what it has finished is in its journal.
    """
    failures: list[Failure] = []
    todo = [folder for folder in folders if not folder.is_done]
    done = len(folders) - len(todo)
    if done:
        print(f"{done} of {len(folders)} cells are done", flush=True)
    with tqdm(total=len(folders), initial=done, disable=None, dynamic_ncols=True) as bar:  # None: not in a file
        for wait in (False, True):
            busy = []
            for folder in todo:
                if wait:
                    _say(f"{folder.cell.title}: another process has it in work; waiting for its end")
                folder.path.mkdir(parents=True, exist_ok=True)
                with (folder.path / "lock").open("ab") as file:
                    if not lock(file, wait=wait):
                        busy.append(folder)
                        continue
                    failure = None if folder.finish() else _evaluate(folder, bar, lm_eval, file)
                done += 1
                bar.update()
                if failure is not None:
                    tqdm.write(failure.message(failures), file=sys.stderr)
                    failures.append(failure)
                _say(f"[{done}/{len(folders)}] {folder.cell.title}: {'failed' if failure else 'done'}")
                if failure is None:
                    after(folder)
            todo = busy
    return failures


def _say(text: str) -> None:
    """A line above the bar."""
    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()


def _evaluate(folder: CellFolder, bar: tqdm, lm_eval: Sequence[str], locked: IO[bytes]) -> Failure | None:
    def tick() -> None:
        printed = next(reversed(_lines(folder.log, start)), "")
        bar.set_postfix_str(f"{folder.cell.title}{': ' + printed[:WORDS] if '%|' in printed else ''}")

    folder.prepare()
    command = folder.command(lm_eval)
    with folder.log.open("ab") as log:
        log.write(f"\n$ {shlex.join(command)}\n".encode())
        log.flush()
        start = log.tell()
        code = _watched(command, log, locked, tick)
    if folder.finish():
        return None
    return Failure(folder, _reason(code), "\n".join(_message(_lines(folder.log, start))))


def _watched(command: Sequence[str], log: IO[bytes], locked: IO[bytes], tick: Callable[[], None]) -> int:
    """Runs a command to its end and returns its exit status; ends it when this process is interrupted."""
    # Threads that spin while they wait for each other take many times as long on a machine that has other work.
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ, "HCOT_LMEVAL_AUTOLOAD": "1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, pass_fds=(locked.fileno(),)
    )
    try:
        while True:
            try:
                return process.wait(POLL_SECONDS)
            except subprocess.TimeoutExpired:
                tick()
    except BaseException:
        process.terminate()
        try:
            process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        raise


def _reason(code: int) -> str:
    if code < 0:
        return f"lm_eval was killed by signal {-code}" + (" (out of memory?)" if code == -9 else "")
    return f"lm_eval ended with status {code}" + (" and without complete results" if code == 0 else "")


def _message(lines: Sequence[str]) -> Sequence[str]:
    """What is behind the calls of the last traceback, if there is one, else the last lines."""
    starts = [number for number, line in enumerate(lines) if line.startswith("Traceback (most recent call last)")]
    if not starts:
        return lines[-LOG_LINES:]
    return [*dropwhile(lambda line: line.startswith(" "), lines[starts[-1] + 1 :])][:LOG_LINES]


def _lines(log: Path, start: int) -> list[str]:
    """The last lines that were printed from `start` on; of a progress bar, its last state."""
    with log.open("rb") as file:
        file.seek(max(start, log.stat().st_size - 2**16))
        text = file.read().decode("utf-8", "replace")
    lines = (line.rstrip("\r").rpartition("\r")[2].rstrip() for line in text.split("\n"))
    return [line for line in lines if line.strip()]
