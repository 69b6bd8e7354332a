"""A supervised training run from its settings to the finished model: what ``scripts/train.py sft`` does.

Everything that can be wrong with the settings, the data, the tokenizer or the adapter is said before the first step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate import PartialState
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback, set_seed

from hcot_lmeval.engine.decoder import Decoder
from hcot_lmeval.grammar import Grammar
from hcot_lmeval.markup import get_markup
from hcot_lmeval.record import TrainingRecord
from hcot_lmeval.tokens import Added, marker_ids, token_id
from hcot_lmeval.training.card import write_card
from hcot_lmeval.training.config import SftConfig
from hcot_lmeval.training.curves import Curves, read_records, save_figure
from hcot_lmeval.training.dataset import Prepared, TrainingData
from hcot_lmeval.training.documents import COLUMNS
from hcot_lmeval.training.evaluation import evaluation_mode, free_run, held_out_losses
from hcot_lmeval.training.forward import Batch, LossSettings, loss_sums
from hcot_lmeval.training.loading import check_adapter, load_model, load_tokenizer, with_adapter
from hcot_lmeval.training.losses import StructureLoss
from hcot_lmeval.training.rows import PackedRow, collate
from hcot_lmeval.training.run import RunDirectory
from hcot_lmeval.training.schedule import Phase, Schedule, steps_of
from hcot_lmeval.training.trainer import PackedTrainer, early_stopping, training_arguments
from hcot_lmeval.training.verdict import points_of, verdict


def train(config: SftConfig, *, restart: bool = False, command: str = "") -> RunDirectory:
    """Trains, or goes on with a run that was interrupted, and leaves everything in ``config.output``.

    Args:
        config: the settings.
        restart: throw away what an earlier run left there.
        command: the command line, for the record.

    Raises:
        ValueError: a setting cannot be used, nothing is held out, the tokenizer lacks the markers, the adapter is for
            another base, or the directory holds another run.
        FileNotFoundError: a data file does not exist.
    """
    check_settings(config)
    set_seed(config.seed)
    tokenizer = load_tokenizer(config)
    model, added = load_model(config, tokenizer)
    model = with_adapter(config, model, added.tokens.values())
    grammar = grammar_of(tokenizer, config, model)
    if config.evaluation.problems:
        Decoder(model)  # says now whether the model can be decoded with pruning
    with PartialState().main_process_first():  # the others find the data in the cache
        data = prepare(config, tokenizer, grammar)
    run = RunDirectory(config.output)
    with PartialState().main_process_first():
        checkpoint = run.claim(config, restart=restart and PartialState().is_main_process)
    trainer = make_trainer(config, model, tokenizer, data, record_of(config, added, data, command), run)
    if PartialState().is_main_process:
        run.write_findings(prepared.report for prepared in data.train)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    finish(config, trainer, tokenizer, run)
    return run


def check_settings(config: SftConfig) -> None:
    """Raises `ValueError` for settings that do not go together, or an adapter for another base."""
    if not config.data.held_out and not config.data.held_out_share:
        raise ValueError(
            "nothing is held out, so overfitting would go unseen; set data.held_out or data.held_out_share"
        )
    if config.evaluation.metric != "loss" and not config.evaluation.problems:
        raise ValueError(
            f"evaluation.metric={config.evaluation.metric} is measured by generation; set evaluation.problems, or "
            "metric=loss"
        )
    training_arguments(config, steps=1, checkpoints=RunDirectory(config.output).checkpoints)
    if config.adapter is not None:
        check_adapter(config.adapter, config.model)


def grammar_of(tokenizer: PreTrainedTokenizerBase, config: SftConfig, model: Any) -> Grammar:
    """Returns the grammar of the markup in the tokenizer's vocabulary."""
    markup = get_markup(config.tokens.markup)
    begin, end = (token_id(tokenizer, text) for text in markup.think)
    stops = getattr(model.generation_config, "eos_token_id", None)
    also = stops if isinstance(stops, list) else [] if stops is None else [stops]
    return Grammar(
        markers=marker_ids(tokenizer, markup),
        think=(begin, end),
        eos_ids=frozenset([tokenizer.eos_token_id, *also]),
    )


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


def prepare(config: SftConfig, tokenizer: PreTrainedTokenizerBase, grammar: Grammar) -> Data:
    """Reads and compiles all data, and prints what became of it.

    Raises:
        ValueError: a phase is left without rows, or nothing is held out; or see `dataset.TrainingData`.
    """
    data = TrainingData(config.data, tokenizer, grammar, get_markup(config.tokens.markup), seed=config.seed)
    train = [data.train(phase.policy, phase.train) for phase in config.phases]
    held_out = data.held_out(config.policy)
    problems = data.problems(config.evaluation.problems)
    if PartialState().is_main_process:
        for number, (phase, prepared) in enumerate(zip(config.phases, train, strict=True)):
            print(f"phase {number} ({phase.policy}): {prepared.report}")
        print(f"held out: {held_out.report}", flush=True)
    if not len(held_out.rows):
        raise ValueError("no held-out row is usable; see the report above, and set other sources or a larger share")
    if config.evaluation.problems and not problems:
        raise ValueError("no held-out row has an answer to compare with; set evaluation.problems=0, or name the column")
    return Data(train, held_out, problems, grammar)


def record_of(config: SftConfig, added: Added, data: Data, command: str) -> TrainingRecord:
    """Returns what the checkpoints will say about themselves."""
    return TrainingRecord(
        policy=config.policy.value,
        markup=config.tokens.markup,
        seeding=added.seeding,
        structure_loss=config.loss.model_dump(exclude={"chunk"}),
        curriculum=[
            {"policy": phase.policy.value, "steps": phase.steps, "epochs": phase.epochs, "data_hash": prepared.digest}
            for phase, prepared in zip(config.phases, data.train, strict=True)
        ],
        data_hash=data.train[-1].digest,
        form=config.data.form,
        command=command or None,
    )


def make_trainer(
    config: SftConfig,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    data: Data,
    record: TrainingRecord,
    run: RunDirectory,
) -> PackedTrainer:
    """Returns the trainer, ready to start."""
    loss = config.loss
    settings = LossSettings(data.grammar, StructureLoss(loss.structure, loss.weight, loss.marker_weight), loss.chunk)
    pad = partial(collate, length=config.data.row_length, pad_id=tokenizer.pad_token_id)
    schedule = schedule_of(config, data)
    evaluator = Evaluator(config, tokenizer, data, settings, pad, run)
    return PackedTrainer(
        model,
        training_arguments(config, schedule.starts[-1], run.checkpoints),
        schedule=schedule,
        collate=pad,
        settings=settings,
        evaluate=evaluator,
        record=record,
        eval_dataset=data.held_out.rows,
        processing_class=tokenizer,
        callbacks=[CurveCallback(run, schedule), *early_stopping(config)],
    )


def schedule_of(config: SftConfig, data: Data) -> Schedule:
    """Returns the order of the rows; phases that are given in epochs get their steps."""
    args = training_arguments(config, 1, RunDirectory(config.output).checkpoints)
    rows_per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    phases = [
        Phase(phase.policy, part.rows, phase.steps or steps_of(phase.epochs or 0, len(part.rows), rows_per_step))
        for phase, part in zip(config.phases, data.train, strict=True)
    ]
    return Schedule(phases, rows_per_step, config.seed)


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


def finish(config: SftConfig, trainer: PackedTrainer, tokenizer: PreTrainedTokenizerBase, run: RunDirectory) -> None:
    """Saves the best model, merged with its adapter if it has one, draws the curves and says how the training went."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    if hasattr(model, "peft_config"):
        trainer.save_model(str(run.adapter))
        if trainer.is_world_process_zero():
            model.merge_and_unload().save_pretrained(run.model)
            tokenizer.save_pretrained(run.model)
    else:
        trainer.save_model(str(run.model))
    if trainer.is_world_process_zero():
        start = trainer.schedule.starts[-2]  # of the last phase: other data has other losses
        judgement = verdict(points_of(r for r in read_records(run.curves) if r["step"] > start))
        write_card(config, trainer.training_record, run, judgement)
        print(f"\n{judgement}\n\n{run.model} holds the model, {run.plot} the curves.")
