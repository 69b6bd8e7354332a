"""transformers' Trainer on packed rows: the loss over the global target count, evaluation by free-running generation.

What the Trainer does well stays its own: DDP, FSDP2, gradient accumulation and checkpointing, mixed precision,
checkpoints, resuming, trackers, early stopping. Ours are the loss, the order of the rows, which is a function of the
seed alone so that a resumed run goes on as it would have, and what is measured.
"""

from __future__ import annotations

import logging
import math
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers import ProgressCallback, Trainer, TrainerCallback, TrainingArguments

from hcot_lmeval.grammar import TokenClass
from hcot_lmeval.record import TrainingRecord, write_record
from hcot_lmeval.trace import IGNORE, Policy
from hcot_lmeval.training.curves import PANELS, Curves, Panel, save_figure
from hcot_lmeval.training.forward import LossSettings, install, loss_sums
from hcot_lmeval.training.losses import LossSums
from hcot_lmeval.training.run import RunDirectory


@dataclass(frozen=True)
class Phase:
    """A part of the curriculum.

    Attributes:
        policy: what its rows were compiled for.
        rows: packed rows, read by index.
        steps: optimiser steps.
    """

    policy: Policy
    rows: Sequence[Mapping[str, list[int]]]
    steps: int


def steps_of(epochs: float, rows: int, rows_per_step: int) -> int:
    """Returns the optimiser steps that go `epochs` times through `rows`, rounded up, at least 1."""
    return max(1, math.ceil(epochs * rows / rows_per_step))


class Schedule(Dataset):
    """All rows of a run in the order of training: phases one behind the other, each in ever new shuffles of its rows.

    Args:
        phases: the curriculum.
        rows_per_step: rows of an optimiser step over all processes.
        seed: of the shuffles.

    Raises:
        ValueError: a phase has no rows.
    """

    def __init__(self, phases: Sequence[Phase], rows_per_step: int, seed: int = 0) -> None:
        for number, phase in enumerate(phases):
            if not len(phase.rows):
                raise ValueError(
                    f"phases.{number} ({phase.policy}) has no rows to train on; see the report of its data"
                )
        self.phases = list(phases)
        self.rows_per_step = rows_per_step
        self.seed = seed
        self._shuffled: tuple[tuple[int, int], np.ndarray] | None = None

    @cached_property
    def starts(self) -> list[int]:
        """The optimiser step at which each phase starts, and the number of all steps."""
        return [0, *np.cumsum([phase.steps for phase in self.phases]).tolist()]

    @property
    def names(self) -> list[tuple[int, str]]:
        """The step at which each phase starts, and its policy."""
        return [(start, phase.policy.value) for start, phase in zip(self.starts, self.phases, strict=False)]

    def __len__(self) -> int:
        return int(self.starts[-1]) * self.rows_per_step

    def __getitem__(self, index: int) -> Mapping[str, list[int]]:
        """Returns the row number `index` of the run."""
        number = int(np.searchsorted(self.starts, index // self.rows_per_step, side="right")) - 1
        phase = self.phases[number]
        epoch, place = divmod(index - self.starts[number] * self.rows_per_step, len(phase.rows))
        return phase.rows[int(self._order(number, epoch)[place])]

    def _order(self, number: int, epoch: int) -> np.ndarray:
        if self._shuffled is None or self._shuffled[0] != (number, epoch):
            generator = np.random.default_rng([self.seed, number, epoch])
            self._shuffled = (number, epoch), generator.permutation(len(self.phases[number].rows))
        return self._shuffled[1]


@dataclass
class Parts:
    """The sums of the losses since the last log, apart from one another."""

    sums: LossSums | None = None

    def add(self, sums: LossSums) -> None:
        sums = sums.map(torch.Tensor.detach)
        self.sums = sums if self.sums is None else self.sums + sums

    def take(self, reduce: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        """Returns the means in nats per token, over all processes, and starts anew.

        They are cross_entropy, structure and the cross-entropy of each token class; `reduce` adds a tensor up over the
        processes.
        """
        if self.sums is None:
            return {}
        (cross_entropy, structure, by_class), self.sums = self.sums.map(reduce).means(), None
        classes = {f"cross_entropy_{each.name.lower()}": by_class[each] for each in TokenClass}
        return {"cross_entropy": cross_entropy, "structure": structure, **classes}


Evaluate = Callable[[Trainer], dict[str, float]]
"""From the trainer, whose model it measures, to metrics by name; every process calls it, all get the same."""


class TiedWeights(logging.Filter):
    """Keeps the Trainer's log free of a false alarm: a tied weight is stored once, so its second name is "missing"."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        first: dict[int, str] = {}
        named = model.state_dict(keep_vars=True).items()
        self.names = {name for name, weight in named if first.setdefault(id(weight), name) != name}

    def filter(self, record: logging.LogRecord) -> bool:
        """Tells whether the record is worth showing."""
        message = record.getMessage()
        return not ("missing keys" in message and message.rstrip(".").endswith(str(sorted(self.names))))


class PackedTrainer(Trainer):
    """Trains on a `Schedule` of packed rows.

    Args:
        model: a causal language model, or a PEFT model around one.
        args: see `training_arguments`.
        schedule: the rows, in order.
        collate: a list of rows to a batch.
        settings: grammar and structure loss.
        evaluate: measures the model; its metrics are logged with the prefix ``eval_``.
        record: what the checkpoints say about themselves.
        options: of transformers' Trainer (processing_class, callbacks, ...).
    """

    control: Any
    loss_is_scaled_for_ga = True  # the loss is a share of the whole accumulated batch

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        *,
        schedule: Schedule,
        collate: Callable[[list[Mapping[str, list[int]]]], dict[str, torch.Tensor]],
        settings: LossSettings,
        evaluate: Evaluate,
        record: TrainingRecord,
        **options: Any,
    ) -> None:
        install(model)
        super().__init__(model, args, train_dataset=schedule, data_collator=collate, **options)
        logging.getLogger("transformers.trainer").addFilter(TiedWeights(model))
        self.model_accepts_loss_kwargs = True  # what transformers 5.17 has for `loss_is_scaled_for_ga`
        self.model.config.use_cache = True  # the Trainer turns it off, in the checkpoint too; our forward needs no help
        self.loss_settings = settings
        self.training_record = record
        self.measure = evaluate
        self._parts = Parts()

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor]:
        """Returns the batches of an optimiser step and the number of their targets over all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        targets = sum((batch["shift_labels"] != IGNORE).sum() for batch in batches)
        return batches, self._sum(torch.as_tensor(targets, device=device))

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Returns this process's part of the loss, per target of the global batch.

        DDP and FSDP average gradients over processes, hence the factor.
        """
        sums = loss_sums(model, inputs, self.loss_settings)
        self._parts.add(sums)
        targets = sums.counts.sum() if num_items_in_batch is None else num_items_in_batch
        loss = sums.objective / torch.as_tensor(targets, device=sums.objective.device).clamp_min(1)
        loss = loss * self.accelerator.num_processes
        return (loss, {}) if return_outputs else loss

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Measures the held-out losses and the free-running generation, and logs them."""
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in self.measure(self).items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the parts of the training loss to its log."""
        if "loss" in logs:
            logs |= self._parts.take(self._sum)
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves weights, tokenizer and the training record."""
        model = self.accelerator.unwrap_model(self.model)
        is_adapter = hasattr(model, "peft_config") and self.args.should_save
        best = None if self.is_in_train else self.state.best_global_step  # at the end the best weights are loaded
        self.training_record.steps = best or self.state.global_step
        write_record(model, self.training_record, (output_dir or self.args.output_dir) if is_adapter else None)
        super().save_model(output_dir, _internal_call)

    def _sum(self, values: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(values, "sum") if self.accelerator.num_processes > 1 else values


# --- what a run shows while it goes on, and when it stops -------------------------------------------------------------

TOLD = ("loss", "accuracy", "completion", "illegal_traces", "generated_tokens", "peak_live_tokens")
"""Held-out metrics that are shown on the terminal."""


class Console(ProgressCallback):
    """A progress bar with the training loss, and a line for each evaluation."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Starts the bar where the run goes on, so that its rate is that of the steps to come."""
        if state.is_world_process_zero:
            self.training_bar = tqdm(total=state.max_steps, initial=state.global_step, dynamic_ncols=True)
        self.current_step = state.global_step

    def close(self) -> None:
        """Leaves the bar as it stands."""
        if self.training_bar is not None:
            self.training_bar.close()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Shows what matters; `curves.jsonl` has all of it."""
        if self.training_bar is None or not logs:
            return
        if "loss" in logs:
            told = next(name for name in ("cross_entropy", "reward", "loss") if logs.get(name) is not None)
            self.training_bar.set_postfix({told.replace("cross_entropy", "loss"): f"{logs[told]:.4f}"})
        if any(key.startswith("eval_") for key in logs):
            found = {
                key.removeprefix("eval_"): value for key, value in logs.items() if key.removeprefix("eval_") in TOLD
            }
            numbers = ", ".join(f"{key.replace('_', ' ')} {value:.4g}" for key, value in found.items())
            self.training_bar.write(f"step {state.global_step}, held out: {numbers}")


class Steering(TrainerCallback):
    """Says when to log, evaluate and save, where the Trainer alone would not.

    Evaluated is after the last step too, logged with each evaluation, so that its training loss is that of the steps
    before it, and saved between evaluations as well.

    Args:
        save_steps: steps between checkpoints, those of evaluations apart.

    Attributes:
        stopped_by: the signal that came, SIGTERM or SIGINT (Ctrl-C), else 0; the step is then finished, a checkpoint
            saved and training stopped.
    """

    def __init__(self, save_steps: int | None = None) -> None:
        self.save_steps = save_steps
        self.stopped_by = 0

    @contextmanager
    def stopping_on_signals(self) -> Iterator[None]:
        """While it is open SIGTERM and Ctrl-C stop training at the end of a step; a second Ctrl-C does so at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        watched = (signal.SIGTERM, signal.SIGINT)
        before = {each: signal.getsignal(each) or signal.SIG_DFL for each in watched}

        def handler(number: int, frame: Any) -> None:
            if number == self.stopped_by == signal.SIGINT:
                raise KeyboardInterrupt
            self.stopped_by = self.stopped_by or number

        for each in watched:
            if before[each] is not signal.SIG_IGN:
                signal.signal(each, handler)
        try:
            yield
        finally:
            for each in watched:  # torchrun repeats SIGTERM, which may not cut off what the end has to say
                ends = each == self.stopped_by == signal.SIGTERM
                signal.signal(each, signal.SIG_IGN if ends else before[each])

    def on_train_begin(self, args: Any, state: Any, control: Any, lr_scheduler: Any = None, **_: Any) -> None:
        """Takes intervals and learning rate from the settings; a run that goes on has those of its checkpoint.

        The rates are the same unless the run is longer now: the end of the shorter schedule is then no step of it.
        """
        state.compute_steps(args, state.max_steps)
        schedule = getattr(lr_scheduler, "scheduler", lr_scheduler)  # accelerate wraps it
        if isinstance(schedule, LambdaLR):
            parts = zip(schedule.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True)
            for group, rate, factor in parts:
                group["lr"] = rate * factor(schedule.last_epoch)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Decides for the step behind; the Trainer itself asks for a checkpoint with each evaluation."""
        if state.global_step >= state.max_steps:
            control.should_evaluate = True
        if control.should_evaluate:
            control.should_log = True
        if self.save_steps and state.global_step % self.save_steps == 0:
            control.should_save = True
        if args.world_size > 1:  # it reaches the processes in different steps
            told = torch.tensor(float(self.stopped_by), device=args.device)
            torch.distributed.all_reduce(told, torch.distributed.ReduceOp.MAX)
            self.stopped_by = int(told)
        if self.stopped_by:
            control.should_save = control.should_training_stop = True


class CurveCallback(TrainerCallback):
    """Keeps every logged number and draws the curves after each evaluation.

    Args:
        run: where they are kept.
        phases: the step at which each part of the run starts, and its name.
        panels: what is drawn.
    """

    def __init__(self, run: RunDirectory, phases: Sequence[tuple[int, str]], panels: Sequence[Panel] = PANELS) -> None:
        self.run, self.phases, self.panels = run, phases, panels
        self.curves: Curves | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Opens the curves; those of a run that goes on are kept up to where it does."""
        if state.is_world_process_zero:
            self.curves = Curves(self.run.curves, state.global_step or None)

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **_: Any) -> None:
        """Writes the numbers down."""
        if self.curves is not None and logs:
            self.curves.append({"step": state.global_step, **logs})

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Draws the curves."""
        if self.curves is not None:
            save_figure(
                self.curves.records,
                self.run.plot,
                phases=self.phases,
                best_step=state.best_global_step,
                panels=self.panels,
            )
