"""The arguments of transformers' Trainer: what the settings say, what follows from them, and our defaults."""

from __future__ import annotations

import difflib
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import torch
from pydantic import TypeAdapter, ValidationError
from transformers import EarlyStoppingCallback, TrainingArguments

from hcot_lmeval.training.config import SftConfig

DEFAULTS: dict[str, Any] = {
    "per_device_train_batch_size": 1,
    "logging_steps": 10,
    "logging_nan_inf_filter": False,  # a diverged run should look like one
    "save_total_limit": 2,
    "report_to": "none",
    "adam_beta2": 0.95,
    "weight_decay": 0.01,
    "warmup_steps": 0.03,  # below 1 it is a share of all steps
    "lr_scheduler_type": "cosine",
}
"""Ours where they differ from transformers': a row is long and holds several documents, so one is a batch."""

OWNED = {
    "output_dir": "output",
    "max_steps": "phases",
    "num_train_epochs": "phases",
    "seed": "seed",
    "data_seed": "seed",
    "eval_strategy": "evaluation.every",
    "eval_steps": "evaluation.every",
    "save_strategy": "evaluation.every",
    "save_steps": "evaluation.every",
    "metric_for_best_model": "evaluation.metric",
    "greater_is_better": "evaluation.metric",
    "load_best_model_at_end": "evaluation.metric",
    "remove_unused_columns": "",
    "label_names": "",
    "train_sampling_strategy": "",
    "average_tokens_across_devices": "",
}
"""Arguments that follow from the settings named behind them, or that nothing else works with."""

POSITIVE = {
    "learning_rate",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
}
"""Arguments that transformers takes at any value and that mean nothing at 0."""

HIGHER_IS_BETTER = {"loss": False, "accuracy": True, "illegal_traces": False, "completion": True}
"""The metrics that can choose the best checkpoint."""


def training_arguments(config: SftConfig, steps: int, checkpoints: Path) -> TrainingArguments:
    """Returns transformers' arguments for a run.

    Raises:
        ValueError: an argument is unknown, has a value that is not allowed, or follows from another setting.
    """
    known = {field.name for field in fields(TrainingArguments) if field.init}
    for name in config.trainer:
        if name in OWNED:
            advice = f"set {OWNED[name]} instead" if OWNED[name] else "the packed rows leave no choice"
            raise ValueError(f"trainer.{name} cannot be set here; {advice}")
        if name not in known:
            near = difflib.get_close_matches(name, sorted(known), n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ValueError(f"trainer.{name} is unknown; {hint}Known are the fields of transformers.TrainingArguments")
    arguments = {name: _argument(name, value) for name, value in config.trainer.items()}
    evaluation = config.evaluation
    device = {"use_cpu": not torch.accelerator.is_available(), "dataloader_pin_memory": torch.cuda.is_available()}
    return TrainingArguments(
        **DEFAULTS | device | arguments,  # unless told, several processes on CPUs are not recognised as such
        output_dir=str(checkpoints),
        max_steps=steps,
        seed=config.seed,
        eval_strategy="steps",
        eval_steps=evaluation.every,
        save_strategy="steps",
        save_steps=evaluation.every,
        metric_for_best_model=f"eval_{evaluation.metric}",
        greater_is_better=HIGHER_IS_BETTER[evaluation.metric],
        load_best_model_at_end=True,
        remove_unused_columns=False,
        train_sampling_strategy="sequential",  # the schedule is the order
        average_tokens_across_devices=True,
        label_names=["shift_labels"],
    )


def _argument(name: str, value: Any) -> Any:
    """Returns the value in the type of the argument, which transformers leaves unchecked: YAML reads 1e-4 as text."""
    try:
        value = TypeAdapter(get_type_hints(TrainingArguments)[name]).validate_python(value)
    except ValidationError as error:
        what = error.errors()[0]["msg"]
        raise ValueError(f"trainer.{name}={value!r} is not allowed: {what[0].lower()}{what[1:]}") from None
    if name in POSITIVE and not value > 0:
        raise ValueError(f"trainer.{name}={value!r} is not allowed: it has to be above 0")
    return value


def early_stopping(config: SftConfig) -> list[EarlyStoppingCallback]:
    """Returns the callback that `evaluation.patience` asks for."""
    patience = config.evaluation.patience
    return [] if patience is None else [EarlyStoppingCallback(early_stopping_patience=patience)]
