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
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hcot_lmeval.training.config import SftConfig
from hcot_lmeval.training.data.report import Report

FREE = {
    *(
        "output",
        "workers",
        "batch_size",
        "report_to",
        "run_name",
        "project",
        "logging_dir",
        "disable_tqdm",
        "log_level",
    ),
    *("logging_steps", "logging_first_step", "save_steps", "save_total_limit", "dataloader_num_workers"),
    *("push_to_hub", "hub_model_id", "hub_private_repo", "hub_revision"),
}
"""Settings that change nothing about the result, so that a resumed run may have others."""


@dataclass(frozen=True)
class RunDirectory:
    """Paths and state of a run."""

    root: Path

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def curves(self) -> Path:
        return self.root / "curves.jsonl"

    @property
    def plot(self) -> Path:
        return self.root / "curves.png"

    @property
    def samples(self) -> Path:
        return self.root / "samples.jsonl"

    @property
    def rejected(self) -> Path:
        return self.root / "rejected.jsonl"

    @property
    def adapter(self) -> Path:
        return self.root / "adapter"

    @property
    def model(self) -> Path:
        return self.root / "model"

    @property
    def identity(self) -> Path:
        return self.root / "run.json"

    def check(self, config: SftConfig | None) -> None:
        """Raises `ValueError` if another run than `config`'s, if given, lives there, or nothing can; changes nothing.

        What never came to a checkpoint is no run. The last phase may be longer than it was.
        """
        there = next(path for path in (self.root.absolute(), *self.root.absolute().parents) if path.exists())
        if not there.is_dir() or not os.access(there, os.W_OK):
            raise ValueError(f"output={self.root} cannot be written: {there} is no folder that may be; choose another")
        if config is not None and self.identity.is_file() and (self.kept or self.model.exists()):
            before = json.loads(self.identity.read_text(encoding="utf-8"))
            _refuse_differences(before, _identity(config.model_dump(mode="json")), self.root)

    def claim(self, config: SftConfig, *, restart: bool = False) -> Path | None:
        """Makes the directory this run's own.

        Args:
            config: the settings.
            restart: throw away what an earlier run left there.

        Returns:
            The checkpoint to resume from, or None.

        Raises:
            ValueError: another run, with other settings, lives there.
        """
        if restart and self.root.exists():
            shutil.rmtree(self.root)
        self.check(config)
        if not self.kept:
            self.samples.unlink(missing_ok=True)
        self.root.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
        (self.root / "config.yaml").write_text(text, encoding="utf-8")
        identity = json.dumps(_identity(config.model_dump(mode="json")), indent=1)
        self.identity.write_text(identity, encoding="utf-8")
        return self.last_checkpoint()

    def write_findings(self, reports: Iterable[Report]) -> None:
        """Writes what is wrong with single rows, each once although phases may share it, and why it was left out."""
        found = dict.fromkeys(finding for report in reports for finding in report.findings)
        Report(findings=list(found)).write(self.rejected)

    def add_samples(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Appends generations to the samples, one line each."""
        with self.samples.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)

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


def _refuse_differences(before: Any, now: Any, root: Path) -> None:
    old, new = _flat(before), _flat(now)
    last = f"phases.{len(now['phases']) - 1}"
    longer = {key for key in (f"{last}.steps", f"{last}.epochs") if (new.get(key) or 0) > (old.get(key) or math.inf)}
    different = [key for key in sorted((old.keys() | new.keys()) - longer) if old.get(key) != new.get(key)]
    if different:
        lines = "\n".join(f"  {key}: {old.get(key)!r} there, {new.get(key)!r} now" for key in different)
        raise ValueError(
            f"output={root} holds a run with other settings:\n{lines}\n"
            "Choose another output, set these as they were to resume it, or pass --restart to throw it away. Its last "
            "phase may be made longer."
        )


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if pairs is None:
        return {prefix: value}
    return {k: v for name, part in pairs for k, v in _flat(part, f"{prefix}.{name}".lstrip(".")).items()}
