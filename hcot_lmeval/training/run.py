"""The directory of a training run: what it is, how far it came, and what it leaves behind.

config.yaml        the settings, defaults written out
run.json           what a resumed run has to have in common with it
rejected.jsonl     training rows that were left out, with their reasons
checkpoints/       of transformers' Trainer
curves.jsonl       every logged number, one line a log
curves.png         the same, drawn
samples.jsonl      what the model wrote at each evaluation
adapter/           the adapter, where one was trained
model/             the finished model: weights (merged with the adapter), tokenizer, card
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from hcot_lmeval.settings import differences
from hcot_lmeval.store import JsonLines, line_of, read_json, replacing
from hcot_lmeval.training.config import RunConfig
from hcot_lmeval.training.data.dataset import Finding

FREE = {
    *("output", "workers", "batch_size", "report_to", "run_name", "project", "logging_dir", "disable_tqdm"),
    *("log_level", "logging_steps", "logging_first_step", "save_steps", "save_total_limit", "dataloader_num_workers"),
}
"""Settings that change nothing about the result, so that a resumed run may have others."""


DIGESTS = "data_digests"
"""Where the identity of a run names its data."""


class RunDirectory:
    """Paths and state of a run."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.checkpoints, self.model, self.adapter = root / "checkpoints", root / "model", root / "adapter"
        self.curves, self.plot = root / "curves.jsonl", root / "curves.png"
        self.samples, self.rejected = root / "samples.jsonl", root / "rejected.jsonl"
        self.identity = root / "run.json"

    def check(self, config: RunConfig | None) -> None:
        """Raises `ValueError` if another run than `config`'s, if given, lives there, or nothing can; changes nothing.

        What never came to a checkpoint is no run. The last phase may be longer than it was.
        """
        there = next(path for path in (self.root.absolute(), *self.root.absolute().parents) if path.exists())
        if not there.is_dir() or not os.access(there, os.W_OK):
            raise ValueError(f"output={self.root} cannot be written: {there} is no folder that may be; choose another")
        if config is not None and self.identity.is_file() and (self.kept or self.model.exists()):
            before = json.loads(self.identity.read_text(encoding="utf-8"))
            before.pop(DIGESTS, None)
            _refuse_differences(before, _identity(config.model_dump(mode="json")), self.root, config.lengths)

    def claim(self, config: RunConfig, digests: Sequence[str] = (), *, restart: bool = False) -> Path | None:
        """Makes the directory this run's own.

        Args:
            config: the settings.
            digests: of the data of each phase and of what is held out.
            restart: throw away what an earlier run left there.

        Returns:
            The checkpoint to resume from, or None.

        Raises:
            ValueError: another run, with other settings or on other data, lives there.
        """
        if restart and self.root.exists():
            shutil.rmtree(self.root)
        self.check(config)
        self._check_data(digests)
        if not self.kept:
            self.samples.unlink(missing_ok=True)
        self.root.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
        (self.root / "config.yaml").write_text(text, encoding="utf-8")
        identity = json.dumps({**_identity(config.model_dump(mode="json")), DIGESTS: list(digests)}, indent=1)
        self.identity.write_text(identity, encoding="utf-8")
        return self.last_checkpoint()

    def _check_data(self, digests: Sequence[str]) -> None:
        there = read_json(self.identity) if self.kept or self.model.exists() else None
        before = (there or {}).get(DIGESTS)
        if before is not None and before != list(digests):
            raise ValueError(
                f"output={self.root} holds a run on other data: the files, or what becomes of their rows, have changed "
                "since. Put the data back to resume it, choose another output, or pass --restart to throw it away"
            )

    def write_findings(self, findings: Iterable[Finding]) -> None:
        """Writes what is wrong with single rows, each once although phases may share it, and why it was left out."""
        with replacing(self.rejected) as draft:
            draft.write_bytes(b"".join(line_of(asdict(finding)) for finding in dict.fromkeys(findings)))

    def add_samples(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Appends generations to the samples, one line each."""
        with JsonLines(self.samples, durable=False) as samples:
            for record in records:
                samples.append(record)

    @property
    def kept(self) -> set[int]:
        """The steps whose checkpoints are there, written to their end.

        The Trainer's state is the last of its files; without it, the run was killed while saving.
        """
        found = self.checkpoints.glob("checkpoint-*/trainer_state.json")
        return {int(path.parent.name.rpartition("-")[2]) for path in found}

    def last_checkpoint(self) -> Path | None:
        """Returns the newest whole checkpoint."""
        return self.checkpoints / f"checkpoint-{max(self.kept)}" if self.kept else None

    def stopped_at(self, step: int) -> str:
        """Returns what somebody who has stopped the run should know."""
        last = self.last_checkpoint()
        if last is None:
            return f"stopped at step {step}, before the first checkpoint; the same command starts anew"
        number = last.name.rpartition("-")[2]
        return f"stopped at step {step}; the same command goes on from step {number} ({last.name})"


def _identity(settings: Any) -> Any:
    if isinstance(settings, Mapping):
        return {name: _identity(value) for name, value in settings.items() if name not in FREE}
    return [_identity(value) for value in settings] if isinstance(settings, list) else settings


def _refuse_differences(before: Any, now: Any, root: Path, lengths: Sequence[str]) -> None:
    found = differences(before, now)
    for key in lengths:
        if key in found and (found[key][1] or 0) > (found[key][0] or math.inf):
            del found[key]
    if found:
        lines = "\n".join(f"  {key}: {old!r} there, {new!r} now" for key, (old, new) in sorted(found.items()))
        raise ValueError(
            f"output={root} holds a run with other settings:\n{lines}\n"
            "Choose another output, set these as they were to resume it, or pass --restart to throw it away. It may be "
            f"made longer: {' or '.join(lengths)}."
        )
