"""The card of a finished model: what it is, how it was made, how well it did, and the command that makes it again."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from hcot_lmeval.provenance import hardware
from hcot_lmeval.record import TrainingRecord
from hcot_lmeval.training.config import SftConfig
from hcot_lmeval.training.curves import read_records
from hcot_lmeval.training.run import RunDirectory
from hcot_lmeval.training.verdict import verdict

CARD = """---
library_name: transformers
tags: [hcot, pruned-reasoning]
---

# {name}

A model that {writes}, trained with `hcot_lmeval` under the policy `{policy}` ({steps:,} optimiser steps).

```bash
lm_eval --model hcot --model_args pretrained={path} --tasks {task}
```

## Held-out results at that step

| metric | value |
|---|---|
{results}

{verdict}

![curves](curves.png)

## How it was made

```bash
{command}
```

```yaml
{config}
```

Data digest `{data_hash}`. {hardware}; {versions}.
"""

WRITES = {
    "off": "thinks without pruning",
    "recompute": "thinks in blocks and reads each solution again once its thought is thrown away",
    "evict": "thinks in blocks and drops the keys and values of each thought once it is solved",
}


def write_card(
    config: SftConfig,
    record: TrainingRecord,
    run: RunDirectory,
    *,
    folder: Path | None = None,
    name: str | None = None,
    machine: str | None = None,
) -> None:
    """Writes README.md and curves.png beside the weights.

    Args:
        config: the settings.
        record: how the model was trained.
        run: where the curves are.
        folder: where the weights are; by default where the run left them.
        name: what users pass as ``pretrained``; by default that folder.
        machine: the hardware, by default this one.
    """
    folder = folder or run.model
    records = read_records(run.curves)
    [*_, metrics] = [found for found in records if "eval_loss" in found and found["step"] <= record.steps]
    shutil.copyfile(run.plot, folder / run.plot.name)
    text = CARD.format(
        name=run.root.name,
        writes=WRITES[record.policy],
        policy=record.policy,
        steps=record.steps,
        path=name or folder,
        task=_task(config),
        results="\n".join(_results(metrics)),
        verdict=judge(records, record),
        command=record.command or "(from Python: hcot_lmeval.training.sft.train)",
        config=_settings(config),
        data_hash=record.data_hash,
        hardware=machine or hardware(),
        versions=", ".join(f"{name} {version}" for name, version in record.versions.items()),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def judge(records: Sequence[Mapping[str, Any]], record: TrainingRecord) -> str:
    """Returns the verdict on the last phase; others have other data, hence other losses."""
    before = sum(phase["steps"] for phase in record.curriculum[:-1])
    return verdict(found for found in records if found["step"] > before)


def _settings(config: SftConfig) -> str:
    settings = config.model_dump(mode="json", exclude_defaults=True)
    return yaml.safe_dump(settings, sort_keys=False, width=118, default_flow_style=None).strip()


def _results(metrics: Mapping[str, Any]) -> list[str]:
    known = {name.removeprefix("eval_"): value for name, value in metrics.items() if name.startswith("eval_")}
    return [f"| {name} | {value:.4g} |" for name, value in known.items() if isinstance(value, float)]


def _task(config: SftConfig) -> str:
    family = config.data.train[0].path.partition("synthetic:")[2]
    return f"hcot_{family}" if family else "aime24_boxed"
