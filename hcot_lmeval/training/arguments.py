"""The arguments of transformers' Trainer: what the settings say, what follows from them, and our defaults."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import torch
from pydantic import TypeAdapter, ValidationError
from transformers import Trainer, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks

from hcot_lmeval.errors import did_you_mean
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
    "metric_for_best_model": "evaluation.metric",
    "greater_is_better": "evaluation.metric",
    "load_best_model_at_end": "evaluation.metric",
    "remove_unused_columns": "",
    "label_names": "",
    "train_sampling_strategy": "",
    "average_tokens_across_devices": "",
}
"""Arguments that follow from the settings named behind them, or that nothing else works with."""

OURS = "the loss and the evaluation are ours; see the sections loss and evaluation"
PUSH = "upload the finished model: hcot push OUTPUT/model --to OWNER/NAME"
REFUSED: dict[str, str] = {
    "use_liger_kernel": "it replaces the forward that computes the losses of packed rows",
    "liger_kernel_config": "liger replaces the forward that computes the losses of packed rows",
    "enable_jit_checkpoint": "SIGTERM saves a checkpoint in any case",
    "auto_find_batch_size": "the schedule counts on the batch size; lower per_device_train_batch_size",
    "ignore_data_skip": "a run that goes on would see rows twice",
    "save_only_model": "a run could not go on from its checkpoints",
    "resume_from_checkpoint": "a run goes on from its newest checkpoint by itself",
    "push_to_hub": f"checkpoints hold a pickle of all arguments; {PUSH}",
    **dict.fromkeys(
        ("hub_strategy", "hub_always_push", "hub_token", "hub_model_id", "hub_private_repo", "hub_revision"),
        f"nothing is uploaded; {PUSH}",
    ),
    **dict.fromkeys(("do_train", "do_eval", "do_predict"), "it does nothing here"),
    **dict.fromkeys(
        ("label_smoothing_factor", "prediction_loss_only", "include_for_metrics", "batch_eval_metrics"), OURS
    ),
    **dict.fromkeys(("eval_accumulation_steps", "eval_do_concat_batches", "bf16_full_eval", "fp16_full_eval"), OURS),
}
"""Arguments that would do nothing or harm, and why."""

POSITIVE = {
    "save_steps",
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
    arguments = checked_arguments(config.trainer, TrainingArguments, OWNED, REFUSED)
    with installed():
        made = _made(config, arguments, steps, checkpoints)
        with suppress(ValueError):  # of optimisers that ask for the model, which is not there yet
            Trainer.get_optimizer_cls_and_kwargs(made)
    if made.fsdp and (made.device.type == "cpu" or made.world_size == 1):
        raise ValueError(
            f"trainer.fsdp shards a model over several processes with a GPU each; here are {made.world_size} on "
            f"{made.device.type}. Leave it out (several processes then train by DDP), or start with torchrun on GPUs"
        )
    if made.accelerator_config.split_batches:
        raise ValueError(
            "trainer.accelerator_config.split_batches cannot be set here: the schedule deals out whole batches"
        )
    return made


def checked_arguments(
    given: Mapping[str, Any], kind: type[TrainingArguments], owned: Mapping[str, str], refused: Mapping[str, str]
) -> dict[str, Any]:
    """Returns the section trainer in the types of the arguments.

    Args:
        given: the section.
        kind: whose fields it holds.
        owned: arguments that follow from another setting, to its name.
        refused: arguments that would do nothing or harm, to the reason.

    Raises:
        ValueError: one of these is set, unknown, or has a value that is not allowed.
    """
    known = {field.name: field.default for field in fields(kind) if field.init}
    for name, value in given.items():
        if name in refused and name in known and value != known[name]:
            raise ValueError(f"trainer.{name} cannot be set here: {refused[name]}")
        if name in owned:
            advice = f"set {owned[name]} instead" if owned[name] else "the packed rows leave no choice"
            raise ValueError(f"trainer.{name} cannot be set here; {advice}")
        if name not in known:
            near, library = did_you_mean(name, known) or ".", kind.__module__.partition(".")[0]
            raise ValueError(f"trainer.{name} is unknown{near} Known are the fields of {library}.{kind.__name__}")
    arguments = {name: _argument(name, value, kind) for name, value in given.items()}
    arguments.pop("save_steps", None)  # its effect is ours, see `Steering`
    return arguments


@contextmanager
def installed() -> Iterator[None]:
    """Says in one line what an argument needs that is not installed."""
    try:
        yield
    except ImportError as error:
        raise ValueError(f"section trainer needs what is not installed: {' '.join(str(error).split())}") from None


def on_this_machine() -> dict[str, Any]:
    """Returns the arguments without which several processes on CPUs are not recognised as such."""
    return {"use_cpu": not torch.accelerator.is_available(), "dataloader_pin_memory": torch.cuda.is_available()}


def _made(config: SftConfig, arguments: dict[str, Any], steps: int, checkpoints: Path) -> TrainingArguments:
    evaluation = config.evaluation
    return TrainingArguments(
        **DEFAULTS | on_this_machine() | arguments,
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


def check_trackers(arguments: TrainingArguments) -> None:
    """Raises `ValueError` if a tracker in `report_to` cannot be used: it is unknown, or not installed."""
    for name in arguments.report_to:
        try:
            for tracker in get_reporting_integration_callbacks([name]):
                tracker()
        except (ValueError, RuntimeError, ImportError) as error:
            why = " ".join(str(error).split())
            raise ValueError(f"trainer.report_to={name} cannot be used: {why} (pip install {name})") from None


def _argument(name: str, value: Any, kind: type[TrainingArguments]) -> Any:
    """Returns the value in the type of the argument, which transformers leaves unchecked: YAML reads 1e-4 as text."""
    try:
        hint = int if name == "save_steps" else get_type_hints(kind)[name]
        value = TypeAdapter(hint).validate_python(value)
    except ValidationError as error:
        what = error.errors()[0]["msg"]
        raise ValueError(f"trainer.{name}={value!r} is not allowed: {what[0].lower()}{what[1:]}") from None
    if name in POSITIVE and not value > 0:
        raise ValueError(f"trainer.{name}={value!r} is not allowed: it has to be above 0")
    return value
