"""A cell of a grid on disk, and what of it is finished.

    OUT/cells/<task>--<model>--<policy>--<window>--<digest>/
        cell.json       everything that determines the result, and the command
        log.txt         what lm_eval printed, of all attempts
        journal/        finished requests of an attempt that was killed; the next one goes on with them
        notes/          what was generated and pruned
        unfinished/     the output of lm_eval while it runs
        results/        the same, renamed when it is complete: a cell is done when this folder is there

The digest is of the settings: arguments, versions, code, files of the checkpoint. Other settings have another folder,
so results of two settings never lie in one, and nothing is ever overwritten. A rename either happened or did not: a
process may be killed at any point.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from hcot_lmeval import provenance
from hcot_lmeval.report.grid import Cell
from hcot_lmeval.report.results import ResultsError, runs_of_file
from hcot_lmeval.store import read_json, write_json

SCHEMA = "hcot-cell/1"
LM_EVAL = (sys.executable, "-m", "lm_eval")
PLAIN = re.compile(r"[A-Za-z_./~][\w./:@~+-]*")
"""Text that lm-eval's ``key=value`` takes for text; what looks like anything else goes as JSON."""


@dataclass(frozen=True, eq=False)
class CellFolder:
    """The folder of one cell below that of the grid; `place`, if it does not follow from the settings.

    See `with_other_versions`.
    """

    out: Path
    cell: Cell
    place: Path | None = None

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Everything that determines the result, speed included, as far as it is known before; JSON values."""
        cell, grid = self.cell, self.cell.grid
        tasks = provenance.folder_digest(grid.include_path) if grid.include_path else None
        checkpoints = [cell.model_args.get(key) for key in ("pretrained", "peft", "delta", "tokenizer")]
        keys = ("limit", "batch_size", "device", "gen_kwargs", "apply_chat_template", "lm_eval_args")
        facts = {
            "task": cell.task,
            "model": cell.model.model,
            "model_args": cell.model_args,
            "checkpoints": [provenance.checkpoint_facts(name) if name else None for name in checkpoints],
            "seed": cell.seeds,
            **{key: getattr(grid, key) for key in keys},
            "include_path": [str(grid.include_path.resolve()), tasks] if grid.include_path else None,
            "environment": provenance.environment(),
            "versions": provenance.evaluation_versions(cell.model.model),
        }
        return json.loads(json.dumps(facts))

    @cached_property
    def path(self) -> Path:
        """Of the folder: readable, and different for different settings."""
        if self.place is not None:
            return self.place
        parts = [self.cell.task, *self.cell.name.split(", ")]
        readable = "--".join(re.sub(r"[^\w.+-]+", "-", part) for part in parts)
        return self.out / "cells" / f"{readable}--{provenance.digest(self.settings)[:12]}"

    @property
    def log(self) -> Path:
        return self.path / "log.txt"

    @property
    def unfinished(self) -> Path:
        return self.path / "unfinished"

    @property
    def results(self) -> Path:
        return self.path / "results"

    @property
    def is_done(self) -> bool:
        return self.results.is_dir()

    # --- the command --------------------------------------------------------------------------------------------------

    def command(self, lm_eval: Sequence[str] = LM_EVAL) -> list[str]:
        """Returns the command that evaluates the cell."""
        cell, grid = self.cell, self.cell.grid
        places = {"journal": str(self.path / "journal")} if cell.model.ours else {}  # what changes no result
        if cell.model.ours and grid.notes:
            places["notes"] = str(self.path / "notes")
        options = {
            "--model": cell.model.model,
            "--model_args": arguments(cell.model_args | places),
            "--tasks": cell.task,
            "--batch_size": str(grid.batch_size),
            "--device": grid.device,
            "--limit": None if grid.limit is None else f"{grid.limit:.12g}",
            "--gen_kwargs": arguments(grid.gen_kwargs) if grid.gen_kwargs else None,
            "--include_path": str(grid.include_path) if grid.include_path else None,
            "--apply_chat_template": grid.apply_chat_template if isinstance(grid.apply_chat_template, str) else None,
            "--seed": cell.seeds,
            "--output_path": str(self.unfinished),
        }
        given = [part for key, value in options.items() if value is not None for part in (key, value)]
        template = ["--apply_chat_template"] if grid.apply_chat_template is True else []
        return [*lm_eval, *given, *template, "--log_samples", *grid.lm_eval_args]

    # --- its life -----------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Makes the folder and throws away the output of an attempt that did not end.

        Raises:
            ResultsError: the checkpoint, tasks, data or code are not what they were when the folder was named.
        """
        self._check_unchanged()
        self.path.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(self.unfinished, ignore_errors=True)
        head = {"schema": SCHEMA, "name": self.cell.name, "model_args": self.cell.model_args}
        command = shlex.join(self.command())
        write_json(self.path / "cell.json", {**head, "settings": self.settings, "command": command})

    def finish(self) -> bool:
        """Declares the cell done if lm_eval's output is complete; returns whether it is done.

        Raises:
            ResultsError: something that determines the result was changed while lm_eval ran.
        """
        if not self.is_done and is_complete(self.unfinished):
            self._check_unchanged()
            self.unfinished.rename(self.results)
        return self.is_done

    def _check_unchanged(self) -> None:
        now = replace(self).settings
        if now != self.settings:
            changed = ", ".join(key for key, value in now.items() if value != self.settings[key])
            raise ResultsError(f"{self.cell.title}: {changed} changed since the grid was planned; start it again")


def is_complete(directory: Path) -> bool:
    """Whether a folder holds one evaluation with all samples of all its tasks.

    lm_eval first writes the results, then the samples of one task after the other.
    """
    found = list(directory.rglob("results_*.json"))
    if len(found) != 1:
        return False
    try:
        runs = list(runs_of_file(found[0]))
    except ResultsError:
        return False
    counts = [(run.results["n-samples"][run.task]["effective"], run.samples) for run in runs]
    return bool(runs) and all(len({sample["doc_id"] for sample in samples}) == count for count, samples in counts)


def arguments(values: Mapping[str, Any]) -> str:
    """Returns ``key=value,...`` as lm-eval reads it, or JSON where a value would be read as something else."""
    numbers = (bool, int, float)
    if all(isinstance(v, numbers) or (isinstance(v, str) and PLAIN.fullmatch(v)) for v in values.values()):
        return ",".join(f"{key}={value}" for key, value in values.items())
    return json.dumps(values)


def described(path: Path) -> dict[str, Any] | None:
    """Returns what ``cell.json`` in the folder of a cell says; None if there is none of this schema."""
    return read_json(path / "cell.json", SCHEMA)


def with_other_versions(folder: CellFolder) -> CellFolder:
    """Returns the newest finished cell that differs from `folder` in versions alone; `folder` itself if none does."""
    others = []
    for path in (folder.out / "cells").glob("*/"):
        found = described(path)
        same = found and {**found["settings"], "versions": None} == {**folder.settings, "versions": None}
        if same and (path / "results").is_dir():
            others.append(path)
    newest = max(others, key=lambda path: (path / "results").stat().st_mtime, default=None)
    return folder if folder.is_done or newest is None else replace(folder, place=newest)
