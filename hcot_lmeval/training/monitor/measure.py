"""What a run measures on held-out data, from every process of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from transformers import PreTrainedTokenizerBase, Trainer

from hcot_lmeval.grammar import Grammar
from hcot_lmeval.training.config import SftConfig
from hcot_lmeval.training.data.dataset import Prepared
from hcot_lmeval.training.data.documents import COLUMNS
from hcot_lmeval.training.data.rows import PackedRow
from hcot_lmeval.training.forward import Batch, LossSettings, loss_sums
from hcot_lmeval.training.monitor.evaluation import evaluation_mode, free_run, held_out_losses
from hcot_lmeval.training.run import RunDirectory


@dataclass(frozen=True)
class Data:
    """What a run trains on, phase by phase, and what it holds out.

    Attributes:
        train: for each phase its rows.
        held_out: rows compiled for the policy of the last phase.
        problems: prompts and answers for free-running generation.
        grammar: of the markup.
    """

    train: Sequence[Prepared]
    held_out: Prepared
    problems: Sequence[tuple[Sequence[int], str]]
    grammar: Grammar


@dataclass
class Evaluator:
    """Measures a model on what is held out; every process calls it.

    Attributes:
        config: the settings.
        tokenizer: of the model.
        data: rows and problems.
        settings: of the losses.
        pad: a list of rows to a batch.
        run: where samples are written.
    """

    config: SftConfig
    tokenizer: PreTrainedTokenizerBase
    data: Data
    settings: LossSettings
    pad: Callable[[list[PackedRow]], dict[str, torch.Tensor]]
    run: RunDirectory

    def __call__(self, trainer: Trainer) -> dict[str, float]:
        """Returns the held-out losses and, where there are problems, the metrics of free-running generation."""
        model = trainer.model_wrapped
        with evaluation_mode(model):
            metrics = held_out_losses(self._batches(trainer), partial(loss_sums, model, settings=self.settings))
        return metrics | (self._free_run(trainer) if self.data.problems else {})

    def _batches(self, trainer: Trainer) -> Iterator[Batch]:
        """This process's share of the held-out rows; padding fills up, for all processes forward as often."""
        place, count = trainer.accelerator.process_index, trainer.accelerator.num_processes
        rows, size = self.data.held_out.rows, trainer.args.eval_batch_size
        nothing: PackedRow = {name: [] for name in COLUMNS}
        for start in range(0, len(rows), size * count):
            mine = range(start + place * size, min(start + (place + 1) * size, len(rows)))
            batch = self.pad([rows[i] for i in mine] or [nothing])
            yield {name: values.to(trainer.args.device) for name, values in batch.items()}

    def _free_run(self, trainer: Trainer) -> dict[str, float]:
        settings = self.config.evaluation
        done = free_run(
            trainer.model_wrapped,
            self.tokenizer,
            self.data.problems,
            policy=self.config.policy,
            markup=self.config.tokens.markup,
            max_context=settings.max_context,
            max_gen_toks=settings.max_gen_toks,
            batch_size=settings.batch_size,
            shard=not trainer.is_fsdp_enabled,
            progress=True,
        )
        if trainer.is_world_process_zero():
            self.run.add_samples(done.records(trainer.state.global_step))
        return done.metrics
