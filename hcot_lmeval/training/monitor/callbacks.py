"""What a run shows while it goes on: a progress bar, a line for each evaluation, and curves on the disk."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tqdm.auto import tqdm
from transformers import ProgressCallback, TrainerCallback

from hcot_lmeval.training.monitor.curves import Curves, save_figure
from hcot_lmeval.training.run import RunDirectory
from hcot_lmeval.training.schedule import Schedule

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


class EvaluateAtEnd(TrainerCallback):
    """Evaluates after the last step too, whether or not its number is a multiple of `evaluation.every`."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Asks for an evaluation; the Trainer itself asks for a checkpoint there."""
        if state.global_step >= state.max_steps:
            control.should_evaluate = True


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
