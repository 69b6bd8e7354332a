"""What a run shows while it goes on: a progress bar, a line for each evaluation, and curves on the disk."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from tqdm.auto import tqdm
from transformers import ProgressCallback, TrainerCallback

from hcot_lmeval.training.monitor.curves import Curves, save_figure
from hcot_lmeval.training.run import RunDirectory
from hcot_lmeval.training.trainer import Schedule

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
            self.training_bar.set_postfix(loss=f"{logs['cross_entropy']:.4f}")
        if "eval_loss" in logs:
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
            for each in watched:
                signal.signal(each, before[each])

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
    """Keeps every logged number and draws the curves after each evaluation."""

    def __init__(self, run: RunDirectory, schedule: Schedule) -> None:
        self.run = run
        self.phases = [
            (start, phase.policy.value) for start, phase in zip(schedule.starts, schedule.phases, strict=False)
        ]
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
            save_figure(self.curves.records, self.run.plot, phases=self.phases, best_step=state.best_global_step)
