"""TRL's GRPOTrainer on the contexts that the policy really saw.

The trainer asks for log-probabilities in one place, for the policy, for the old policy and for the reference. Here that
place compiles each trace with the rule and scores it in packed rows. Completions come from the engine, on the trainer's
own weights. All else is TRL's: groups, advantages, losses, clipping, KL, logging, checkpoints.

What the engine said of a token and what the trainer says of it before the first update must be equal; it is asserted at
the first step, and the difference is logged at every step (``sampling/logp_difference/...``).
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers import TrainerCallback
from trl import GRPOTrainer

from hcot_lmeval.control import Directive
from hcot_lmeval.engine import Completion
from hcot_lmeval.events import COMPLETE
from hcot_lmeval.grammar import TokenClass
from hcot_lmeval.record import TrainingRecord, write_record
from hcot_lmeval.training.config import GuardsConfig
from hcot_lmeval.training.data.documents import Example
from hcot_lmeval.training.forward import install
from hcot_lmeval.training.rollout import Rollout, Shape
from hcot_lmeval.training.traces import pack_traces, trace_scores
from hcot_lmeval.training.trainer import TiedWeights

TOLERANCE = {torch.float64: 1e-7, torch.float32: 2e-3}
"""Largest difference in nats between a log-probability of the engine and of the trainer on the same weights. Measured
are 1e-14 and 1e-4; the rest is room for unlikely tokens, whose logits are large."""
COARSE = 0.05
"""Largest mean difference in coarser types, where single tokens differ by more."""
Ids = tuple[int, ...]


class PrunedGRPOTrainer(GRPOTrainer):
    """GRPO with pruned rollouts.

    Args:
        model: with the markers, bare or a PEFT model.
        rollout: writes completions; its policy, grammar and temperature are those of the loss.
        encode: from the text of a prompt, as it stands in the data set, to its token ids.
        limits: (live tokens, generated tokens) that a completion may have, for rewards.
        measure: measures the model; its metrics are logged with the prefix ``eval_``.
        record: what the checkpoints say about themselves.
        options: of TRL's trainer (args, reward_funcs, train_dataset, eval_dataset, processing_class, callbacks).
    """

    control: Any

    def __init__(
        self,
        model: Any,
        *,
        rollout: Rollout,
        encode: Callable[[str], Sequence[int]],
        limits: tuple[int, int],
        measure: Callable[[Any], dict[str, float]] | None = None,
        record: TrainingRecord | None = None,
        **options: Any,
    ) -> None:
        self.rollout, self.encode, self.limits = rollout, encode, limits
        self.measure, self.training_record = measure, record
        super().__init__(model, rollout_func=_write, **options)
        for each in filter(None, (self.model, self.ref_model)):
            install(each)
            logging.getLogger("transformers.trainer").addFilter(TiedWeights(each))
        self._held: dict[str, dict[tuple[Ids, Ids], Sequence[Directive] | None]] = {"train": {}, "eval": {}}
        self._written_at = -1
        self._last: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
        self.shapes: deque[list[tuple[Shape, str]]] = deque(maxlen=100)

    # --- rollouts -----------------------------------------------------------------------------------------------------

    def write(self, prompts: Sequence[str]) -> dict[str, list[Any]]:
        """Returns a completion for each prompt, as TRL wants it, and the columns that rewards read.

        The seed of a completion follows from the run's seed, the step, the prompt, and how often it stood there before
        over all processes: not from which process writes it.
        """
        done = self.rollout(self.model, [self.encode(prompt) for prompt in prompts], self._seeds(prompts))
        mode = "train" if self.model.training else "eval"
        self._held[mode] = {(one.request.prompt_ids, one.token_ids): one.directives for one in done}
        self._written_at = self.state.global_step
        shapes = [self.rollout.shape(one) for one in done]
        if mode == "train":
            self.shapes.append([(shape, one.finish_reason) for shape, one in zip(shapes, done, strict=True)])
            self._count(shapes, done)
        return {
            "prompt_ids": [list(one.request.prompt_ids) for one in done],
            "completion_ids": [list(one.token_ids) or [self._end_id] for one in done],
            "logprobs": [list(one.legal_logprobs or ()) or [0.0] for one in done],
            "env_mask": [[int(bool(one.token_ids))] * max(1, len(one.token_ids)) for one in done],
            "response": [self.rollout.response(one) for one in done],
            "shape": shapes,
            "limits": [self.limits] * len(done),
        }

    @property
    def _end_id(self) -> int:
        """Stands in for the completion of a prompt that left no room; TRL knows no empty one, and none is scored."""
        return int(self.eos_token_ids[0])

    def _seeds(self, prompts: Sequence[str]) -> list[int]:
        everyone, first = gather_object(list(prompts)), self.accelerator.process_index * len(prompts)
        counts, seeds = defaultdict[str, int](int), list[int]()
        for prompt in everyone:
            counts[prompt] += 1
            named = json.dumps([self.args.seed, self.state.global_step, prompt, counts[prompt]])
            seeds.append(int.from_bytes(hashlib.blake2b(named.encode(), digest_size=7).digest()))
        return seeds[first : first + len(prompts)]

    def _count(self, shapes: Sequence[Shape], done: Sequence[Completion]) -> None:
        """Logs what the completions are like."""
        values: dict[str, list[float]] = {
            "blocks": [len(shape.blocks) for shape in shapes],
            "peak_live_tokens": [shape.peak for shape in shapes],
            "mean_live_tokens": [shape.area for shape in shapes],
            "depth": [max((block.depth for block in shape.blocks), default=0) for shape in shapes],
            "illegal_tokens": [shape.illegal for shape in shapes],
            "cut": [one.finish_reason not in COMPLETE for one in done],
            "loops": [one.finish_reason == "loop" for one in done],
        }
        for name, each in values.items():
            self._log_mean("train", f"rollout/{name}", torch.tensor(each, dtype=torch.float64))

    def _log_mean(self, mode: str, name: str, values: torch.Tensor) -> None:
        """Logs the mean over all processes; NaN, which TRL leaves out, where there is nothing."""
        sums = torch.stack([values.double().sum(), values.new_tensor(values.numel(), dtype=torch.float64)])
        total, count = self.accelerator.reduce(sums.to(self.accelerator.device), "sum").tolist()
        self._metrics[mode][name].append(total / count if count else float("nan"))

    # --- the loss -----------------------------------------------------------------------------------------------------

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **_: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        """Returns log-probabilities, and entropies, of the completion tokens, [B, C], 0 where the mask is."""
        start = input_ids.shape[1] - logits_to_keep
        traces = [
            Example(tuple(ids[:start][seen[:start]].tolist()), tuple(ids[start:][seen[start:]].tolist()))
            for ids, seen in zip(input_ids, attention_mask.bool(), strict=True)
        ]
        size = batch_size or len(traces)
        parts: tuple[list[torch.Tensor], ...] = ([], [], [])
        for first in range(0, len(traces), size):
            packed = pack_traces(
                traces[first : first + size],
                self.rollout.grammar,
                self.rollout.policy,
                directives=[self._directives(trace) for trace in traces[first : first + size]],
                pad_id=self._end_id,
            ).to(input_ids.device)
            with self.accelerator.autocast():
                scores = trace_scores(model, packed, temperature=self.rollout.temperature)
            found = (*scores, packed.unpack(packed.batch["classes"]))
            for part, values in zip(parts, found, strict=True):
                part.append(torch.nn.functional.pad(values, (0, logits_to_keep - values.shape[1])))
        logp, entropy, classes = map(torch.cat, parts)
        self._last = logp.detach(), entropy.detach(), classes
        return logp, entropy if compute_entropy else None, None

    def _directives(self, trace: Example) -> Sequence[Directive] | None:
        key = trace.prompt_ids, trace.completion_ids
        return next((held[key] for held in self._held.values() if key in held), None)

    def _compute_loss(self, model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        loss: torch.Tensor = super()._compute_loss(model, inputs)
        mask = inputs["completion_mask"].bool()
        if "tool_mask" in inputs:  # a completion that is none, see `write`
            mask &= inputs["tool_mask"].bool()
        self._compare(inputs["sampling_per_token_logps"], mask)
        self._log_by_class(inputs, mask)
        return loss

    def _compare(self, sampled: torch.Tensor, mask: torch.Tensor) -> None:
        """Holds the trainer's log-probabilities against the engine's.

        Raises:
            RuntimeError: they differ on the weights that wrote the completions.
        """
        assert self._last is not None
        difference = (self._last[0] - sampled.to(self._last[0].dtype)).abs()[mask]
        largest, mean = (float(difference.max()), float(difference.mean())) if difference.numel() else (0.0, 0.0)
        mode = "train" if self.model.training else "eval"
        most = self.accelerator.gather(torch.tensor([largest], device=mask.device)).max()
        self._metrics[mode]["sampling/logp_difference/max"].append(float(most))
        self._log_mean(mode, "sampling/logp_difference/mean", difference)
        dtype = next(self.model.parameters()).dtype
        exact = dtype in TOLERANCE and not (self.args.bf16 or self.args.fp16)
        wrong = largest > TOLERANCE[dtype] if exact else mean > COARSE
        if wrong and self.state.global_step == self._written_at:
            raise RuntimeError(
                f"the engine and the trainer disagree on the same weights by up to {largest:.3g} nats a token, "
                f"{mean:.3g} on average, so the loss would be of another policy than the one that wrote; set "
                "trainer.disable_dropout=true if layers drop out, or report the model type"
            )

    def _log_by_class(self, inputs: Mapping[str, torch.Tensor], mask: torch.Tensor) -> None:
        """Logs entropy, KL and the share of clipped ratios for text, markers, solutions and the answer apart."""
        assert self._last is not None
        logp, entropy, classes = self._last
        values = {"entropy": entropy}
        if (reference := inputs.get("ref_per_token_logps")) is not None:
            values["kl"] = torch.exp(reference - logp) - (reference - logp) - 1
        if (old := inputs.get("old_per_token_logps")) is not None:
            ratio, gain = torch.exp(logp - old), inputs["advantages"][:, None]
            low, high = (ratio < 1 - self.epsilon_low) & (gain < 0), (ratio > 1 + self.epsilon_high) & (gain > 0)
            values["clip_ratio"] = (low | high).float()
        mode = "train" if self.model.training else "eval"
        for each in TokenClass:
            for name, numbers in values.items():
                self._log_mean(mode, f"{name}/{each.name.lower()}", numbers[mask & (classes == int(each))])

    # --- evaluation and checkpoints -----------------------------------------------------------------------------------

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Lets the model solve held-out problems by itself, and logs how it went."""
        measured = self.measure(self) if self.measure is not None else {}
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in measured.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves weights, tokenizer and the training record."""
        if self.training_record is not None:
            model = self.accelerator.unwrap_model(self.model)
            is_adapter = hasattr(model, "peft_config") and self.args.should_save
            best = None if self.is_in_train else self.state.best_global_step
            self.training_record.steps = best or self.state.global_step
            write_record(model, self.training_record, (output_dir or self.args.output_dir) if is_adapter else None)
        super().save_model(output_dir, _internal_call)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Checkpoints have no card; the finished model has one of ours."""


def _write(prompts: Sequence[str], trainer: PrunedGRPOTrainer) -> dict[str, list[Any]]:
    return trainer.write(prompts)


# --- guards -----------------------------------------------------------------------------------------------------------


class Guards(TrainerCallback):
    """Stops a run whose policy has collapsed, and says in words how.

    Args:
        config: the shares of completions at which it is stopped.
        trainer: whose completions are looked at.

    Attributes:
        verdict: what was found; empty as long as nothing was.
    """

    def __init__(self, config: GuardsConfig, trainer: PrunedGRPOTrainer) -> None:
        self.config, self.trainer, self.verdict = config, trainer, ""
        self._first: dict[str, float] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Looks at the last generations."""
        shares = [shares_of(written) for written in self.trainer.shapes]
        if shares and not self._first:
            self._first = shares[0]
        recent = shares[-self.config.window :]
        if len(recent) < self.config.window or self.verdict:
            return
        for name, told in COLLAPSES.items():
            limit = getattr(self.config, name)
            lowest = min(each[name] for each in recent)
            if lowest >= limit > self._first[name]:
                self.verdict = (
                    f"stopped at step {state.global_step}: {told.format(share=lowest)} in each of the last "
                    f"{len(recent)} generations, {self._first[name]:.0%} in the first. {ADVICE[name]}"
                )
                control.should_training_stop = control.should_save = True


COLLAPSES = {
    "no_blocks": "{share:.0%} of the completions have no block",
    "one_block": "{share:.0%} of the completions are one block around all",
    "cut": "{share:.0%} of the completions are cut by a budget",
    "loops": "{share:.0%} of the completions repeat themselves",
}
ADVICE = {
    "no_blocks": "Give structure or compression more weight, or hold the policy to its start with trainer.beta.",
    "one_block": "Give peak or area more weight, or hold the policy to its start with trainer.beta.",
    "cut": "Give length more weight, lower the learning rate, or raise rollout.max_gen_toks.",
    "loops": "Lower the learning rate or the temperature, or hold the policy to its start with trainer.beta.",
}


def shares_of(written: Sequence[tuple[Shape, str]]) -> dict[str, float]:
    """Returns the share of completions that show each kind of collapse."""
    around = [
        len([block for block in shape.blocks if block.depth == 1]) == len(shape.blocks) == 1 for shape, _ in written
    ]
    return {
        "no_blocks": fmean(not shape.blocks and not shape.unclosed for shape, _ in written),
        "one_block": fmean(around),
        "cut": fmean(reason not in {*COMPLETE, "loop"} for _, reason in written),
        "loops": fmean(reason == "loop" for _, reason in written),
    }
