"""The training that all studies share: a tiny model on nested arithmetic, as in ``scripts/configs/first.yaml``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

DEPTHS = [1, 2, 3]


def arith(size: int, split: str = "train") -> dict[str, Any]:
    """A source of so many problems."""
    return {"path": "synthetic:arith", "split": split, "options": {"size": size, "depths": DEPTHS}}


def train(output: Path, steps: int, *, held_out: int = 200, **sections: Any) -> Path:
    """Trains a model for so many steps, unless an earlier call did, and returns where it is.

    Args:
        output: of the training.
        steps: optimiser steps.
        held_out: problems of the held-out data.
        sections: take the place of sections of the settings.
    """
    if not (output / "model" / "config.json").is_file():
        from hcot_lmeval.training.config_file import parse_config
        from hcot_lmeval.training.sft import train as run

        settings = {
            "model": "tiny",
            "tiny": {"start": "induction"},
            "output": str(output),
            "data": {"train": [arith(20000)], "held_out": [arith(held_out, "validation")], "row_length": 512},
            "phases": [{"policy": "recompute", "steps": steps}],
            "evaluation": {"every": steps, "problems": 0},
            "trainer": {"learning_rate": 3e-3, "warmup_steps": 50, "save_only_model": True},
        }
        run(parse_config(settings | sections))
    return output / "model"
