"""A short training loop over an endless stream of plans, each of which is seen once."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hcot_lmeval.synthetic import Split, gold_trace, problems
from hcot_lmeval.tokens import encode_prompt, marker_ids
from hcot_lmeval.trace import IGNORE, Plan, Policy, compile_trace
from hcot_lmeval.training.data import collate, pack

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class LoopConfig:
    """Length, batch and step size of a training run.

    Attributes:
        steps: optimiser steps.
        rows: packed rows in a batch.
        row_length: tokens in a row.
        learning_rate: of AdamW, after a linear warm-up over `warmup` steps and before a linear decay to zero, which
            begins when the share `decay` of the steps is left.
        warmup: steps.
        decay: share of the steps.
        evaluate_every: steps between measurements of the held-out loss.
    """

    steps: int
    rows: int = 2
    row_length: int = 512
    learning_rate: float = 3e-3
    warmup: int = 50
    decay: float = 0.5
    evaluate_every: int = 100

    def rate(self, step: int) -> float:
        """Returns the factor of the learning rate at a step, counted from 0."""
        return min(1.0, (step + 1) / self.warmup, (self.steps - step) / (self.decay * self.steps))


def arithmetic_plans(
    tokenizer: PreTrainedTokenizerBase,
    split: Split,
    depths: Sequence[int],
    *,
    policy: Policy | str = Policy.RECOMPUTE,
    markup: str = "hcot",
    seed: int = 0,
) -> Iterator[Plan]:
    """Yields the compiled gold traces of nested arithmetic problems, for ever; the loss is on the generated tokens."""
    markers = marker_ids(tokenizer, markup)
    for problem in problems(split, depths, seed):
        prompt = encode_prompt(tokenizer, problem.prompt, markup)
        trace = tokenizer.encode(gold_trace(problem, markup), add_special_tokens=False)
        yield compile_trace([*prompt, *trace, tokenizer.eos_token_id], len(prompt), markers, policy)


def batches(plans: Iterable[Plan], config: LoopConfig, pad_id: int) -> Iterator[Batch]:
    """Yields batches of packed rows until the plans are used up."""
    rows = pack(plans, config.row_length)
    while some := list(itertools.islice(rows, config.rows)):
        yield collate(some, config.row_length, pad_id)


def mean_loss(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Returns the mean cross-entropy, in nats, over the tokens of a batch that are targets."""
    inputs = {key: value for key, value in batch.items() if key != "shift_labels"}
    logits = model(**inputs, use_cache=False).logits
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), batch["shift_labels"].flatten(), ignore_index=IGNORE
    )


@torch.no_grad()
def held_out_loss(model: PreTrainedModel, held_out: Sequence[Batch]) -> float:
    """Returns the loss over batches that are never trained on, each counted alike."""
    return sum(mean_loss(model, batch).item() for batch in held_out) / len(held_out)


def train(
    model: PreTrainedModel,
    stream: Iterator[Batch],
    held_out: Sequence[Batch],
    config: LoopConfig,
    *,
    progress: bool = True,
) -> list[dict[str, float]]:
    """Trains `model` in place.

    Returns:
        The curve: dictionaries with step, loss (of that step's batch) and held_out_loss, the last one at the end.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, config.rate)
    curve: list[dict[str, float]] = []
    bar = tqdm(range(1, config.steps + 1), desc="training", unit="step", disable=not progress)
    model.train()
    for step in bar:
        loss = mean_loss(model, next(stream))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % config.evaluate_every == 0 or step == config.steps:
            point = {"step": step, "loss": loss.item(), "held_out_loss": held_out_loss(model, held_out)}
            curve.append(point)
            bar.set_postfix(loss=f"{point['loss']:.3f}", held_out=f"{point['held_out_loss']:.3f}")
    model.eval()
    return curve
