"""A supervised training run from its settings to the finished model: what ``hcot train sft`` does.

Everything that can be wrong with the settings, the data or the tokenizer is said before the first step.
"""

from __future__ import annotations

import importlib.util
import logging
import signal
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerState,
    set_seed,
)

from hcot_lmeval.assets import resolve
from hcot_lmeval.engine.decoder import Decoder
from hcot_lmeval.grammar import Grammar
from hcot_lmeval.markup import get_markup
from hcot_lmeval.processes import leave_group_at_exit
from hcot_lmeval.record import TrainingRecord
from hcot_lmeval.rotary import check_positions
from hcot_lmeval.tokens import Added
from hcot_lmeval.trace import Policy
from hcot_lmeval.training.arguments import check_trackers, training_arguments
from hcot_lmeval.training.card import judge, write_card
from hcot_lmeval.training.config import RunConfig, SftConfig
from hcot_lmeval.training.curves import read_records
from hcot_lmeval.training.data.dataset import Prepared, TrainingData
from hcot_lmeval.training.data.documents import NO_STAGES
from hcot_lmeval.training.data.rows import collate
from hcot_lmeval.training.evaluation import Data, Evaluator, Problem
from hcot_lmeval.training.forward import LossSettings
from hcot_lmeval.training.loading import (
    attention_of,
    check_model,
    end_ids,
    load_model,
    load_tokenizer,
    with_adapter,
)
from hcot_lmeval.training.proof import settle_attention
from hcot_lmeval.training.run import RunDirectory
from hcot_lmeval.training.trainer import Console, CurveCallback, PackedTrainer, Phase, Schedule, Steering, steps_of
from hcot_lmeval.vocabulary import marker_ids, read_vocabulary

logger = logging.getLogger(__name__)


class Terminated(KeyboardInterrupt):
    """Training was ended by SIGTERM."""

    status = 143
    """Exit status of the command."""


def train(config: SftConfig, *, restart: bool = False, command: str = "") -> RunDirectory:
    """Trains, or goes on with a run that was interrupted, and leaves everything in ``config.output``.

    Args:
        config: the settings.
        restart: throw away what an earlier run left there.
        command: the command line, for the record.

    Raises:
        ValueError: a setting cannot be used, nothing is held out, the tokenizer lacks the markers, or the directory
            holds another run.
        FileNotFoundError: a data file does not exist.
        KeyboardInterrupt: Ctrl-C came, a checkpoint of the step was saved, and the message says where it will go on. A
            second Ctrl-C stops within the step, without one.
        Terminated: SIGTERM came; the same.
    """
    leave_group_at_exit()
    check_settings(config)
    run = RunDirectory(config.output)
    run.check(None if restart else config)
    if not restart:
        announce(run)
    tokenizer, new = load_tokenizer(config)
    check_model(config, tokenizer)
    with PartialState().main_process_first():  # the others find the data in the cache
        data = prepare(config, tokenizer, grammar_of(config, tokenizer))
    set_seed(config.seed)
    model, added = load_model(config, tokenizer, new)  # weights are read when nothing else can be wrong
    warn_of_positions(model, data)
    model = with_adapter(config, model, added.tokens.values())
    if config.evaluation.problems:
        Decoder(model)  # says now whether the model can be decoded with pruning
    with PartialState().main_process_first():
        digests = [prepared.digest for prepared in (*data.train, data.held_out)]
        checkpoint = run.claim(config, digests, restart=restart and PartialState().is_main_process)
    schedule = schedule_of(config, data)
    announce_length(checkpoint, schedule)
    record = record_of(config, tokenizer, added, data, schedule, command)
    trainer = make_trainer(config, model, tokenizer, data, schedule, record, run)
    if not trainer.is_fsdp_enabled:  # whose weights are not on the device yet
        rows, settings = trainer.args.train_batch_size, trainer.loss_settings
        settle_attention(trainer.model, settings, config.policy, row_length=config.data.row_length, rows=rows)
    if PartialState().is_main_process:
        run.write_findings(finding for prepared in data.train for finding in prepared.report.findings)
    train_to_end(trainer, run, checkpoint, config.trainer.get("save_steps"))
    finish(config, trainer, tokenizer, run)
    return run


def train_to_end(trainer: Trainer, run: RunDirectory, checkpoint: Path | None, save_steps: int | None) -> None:
    """Trains from a checkpoint, or from the start.

    Raises:
        KeyboardInterrupt, Terminated: it was stopped; the message says where it goes on.
    """
    steering = Steering(save_steps)
    trainer.add_callback(steering)
    try:
        with steering.stopping_on_signals():
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        if steering.stopped_by and trainer.state.global_step < trainer.state.max_steps:
            raise Terminated if steering.stopped_by == signal.SIGTERM else KeyboardInterrupt
    except KeyboardInterrupt as stop:
        console = trainer.pop_callback(Console)
        if console is not None:
            console.close()  # or the bar would be drawn once more, below the message
        raise type(stop)(run.stopped_at(trainer.state.global_step)) from None


def show_on_console(trainer: Trainer) -> None:
    """Puts our progress bar in place of the Trainer's."""
    for callback in (ProgressCallback, PrinterCallback):  # whichever is there by `disable_tqdm`
        if trainer.pop_callback(callback) is not None and callback is ProgressCallback:
            trainer.add_callback(Console)


def save_finished(trainer: Trainer, tokenizer: PreTrainedTokenizerBase, run: RunDirectory) -> None:
    """Saves the best model, merged with its adapter if it has one."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    if hasattr(model, "peft_config"):
        trainer.save_model(str(run.adapter))
        if trainer.is_world_process_zero():
            model.merge_and_unload().save_pretrained(run.model)
            tokenizer.save_pretrained(run.model)
    else:
        trainer.save_model(str(run.model))
    if trainer.is_world_process_zero():
        for folder in (run.model, run.adapter):  # a pickle of paths and settings, which the card says in words
            (folder / "training_args.bin").unlink(missing_ok=True)


def announce(run: RunDirectory) -> None:
    """Says if the run goes on from a checkpoint."""
    last = run.last_checkpoint()
    if last is not None and PartialState().is_main_process:
        print(f"going on from {last.name}", flush=True)


def announce_length(checkpoint: Path | None, schedule: Schedule) -> None:
    """Says if the run is longer than it was when the checkpoint was saved."""
    if checkpoint is not None and PartialState().is_main_process:
        before = TrainerState.load_from_json(str(checkpoint / "trainer_state.json")).max_steps
        if before != schedule.starts[-1]:
            print(f"it has {schedule.starts[-1]} steps now, in place of {before}; so has the learning rate's schedule")


def check_settings(config: SftConfig) -> None:
    """Raises `ValueError` for settings that do not go together."""
    if not config.data.held_out and not config.data.held_out_share:
        raise ValueError(
            "nothing is held out, so overfitting would go unseen; set data.held_out or data.held_out_share"
        )
    if config.evaluation.metric != "loss" and not config.evaluation.problems:
        raise ValueError(
            f"evaluation.metric={config.evaluation.metric} is measured by generation; set evaluation.problems, or "
            "metric=loss"
        )
    if config.data.form == "stages" and any(phase.policy is Policy.EVICT for phase in config.phases):
        raise ValueError(NO_STAGES)
    if config.revision is not None and Path(resolve(config.model)).is_dir():
        raise ValueError(f"revision={config.revision} is of models on a hub, and {config.model} is here; leave it out")
    attention_of(config)
    if config.lora is not None and importlib.util.find_spec("peft") is None:
        raise ValueError("lora needs peft, which is not installed: pip install 'hcot_lmeval[peft]'")
    check_trackers(training_arguments(config, steps=1, checkpoints=RunDirectory(config.output).checkpoints))


def grammar_of(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> Grammar:
    """Returns the grammar of the markup in the tokenizer's vocabulary."""
    markup = get_markup(config.tokens.markup)
    think_ids = read_vocabulary(tokenizer, markup).think_ids
    return Grammar(markers=marker_ids(tokenizer, markup), think=think_ids, eos_ids=end_ids(config, tokenizer))


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
        for name, _, part in _parts(config, train, held_out):
            print(f"{name}: {part.report}", flush=True)
    for name, policy, part in _parts(config, train, held_out):
        without = part.report.without_block.total()
        if policy is not Policy.OFF and 0 < part.report.used == without:
            raise ValueError(
                f"{name}: none of {without:,} traces has a block of the markup {config.tokens.markup!r}, so that "
                f"policy {policy} has nothing to prune; name the column of the traces (columns: {{trace: ...}}), set "
                "tokens.markup to their notation, or policy: off"
            )
    if not len(held_out.rows):
        raise ValueError("no held-out row is usable; see the report above, and set other sources or a larger share")
    if config.evaluation.problems and not problems:
        raise ValueError("no held-out row has an answer to compare with; set evaluation.problems=0, or name the column")
    check_room(config.evaluation.max_context, problems)
    return Data(train, held_out, problems, grammar)


def check_room(max_context: int | None, problems: Sequence[Problem], name: str = "evaluation.max_context") -> None:
    """Warns of prompts that leave no room for an answer, which then counts as wrong.

    Raises:
        ValueError: no prompt leaves any.
    """
    sizes = [len(prompt_ids) for prompt_ids, _ in problems]
    full = sum(size >= (max_context or size + 1) for size in sizes)
    if not full:
        return
    told = f"{name}={max_context} has no room behind {full} of {len(sizes)} prompts"
    advice = f"the longest has {max(sizes)} tokens; raise it"
    if full == len(sizes):
        raise ValueError(f"{told}; {advice}")
    logger.warning("%s, whose answers count as wrong; %s", told, advice)


def _parts(config: SftConfig, train: Sequence[Prepared], held_out: Prepared) -> Iterator[tuple[str, Policy, Prepared]]:
    """Yields name, policy and rows of each phase and of what is held out."""
    for number, (phase, prepared) in enumerate(zip(config.phases, train, strict=True)):
        yield f"phase {number} ({phase.policy})", phase.policy, prepared
    yield "held out", config.policy, held_out


def warn_of_positions(model: PreTrainedModel, data: Data) -> None:
    """Warns if the traces are longer than what the model's config allows; it may know more positions than it says.

    Raises:
        ValueError: its rotary embeddings would depend on what else is in a packed row.
    """
    limit = getattr(model.config, "max_position_embeddings", None)
    needed = max(prepared.report.positions for prepared in (*data.train, data.held_out))
    check_positions(model.config.get_text_config(), needed)
    if limit is not None and needed > limit:
        advice = "shorten the traces with data.row_length"
        logger.warning("the traces need %d positions, the model's config has %d: %s", needed, limit, advice)


def record_of(
    config: SftConfig,
    tokenizer: PreTrainedTokenizerBase,
    added: Added,
    data: Data,
    schedule: Schedule,
    command: str,
) -> TrainingRecord:
    """Returns what the checkpoints will say about themselves."""
    vocabulary = read_vocabulary(tokenizer, get_markup(config.tokens.markup))
    return TrainingRecord(
        policy=config.policy.value,
        markup=config.tokens.markup,
        think=vocabulary.think if vocabulary.has_thinking else None,
        seeding=added.seeding,
        structure_loss={"structure": "mass", "weight": config.loss.weight},
        curriculum=[
            {"policy": phase.policy.value, "steps": phase.steps, "data_hash": prepared.digest}
            for phase, prepared in zip(schedule.phases, data.train, strict=True)
        ],
        data_hash=data.train[-1].digest,
        command=command or None,
    )


def make_trainer(
    config: SftConfig,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    data: Data,
    schedule: Schedule,
    record: TrainingRecord,
    run: RunDirectory,
) -> PackedTrainer:
    """Returns the trainer, ready to start."""
    settings = LossSettings(data.grammar, config.loss.weight, config.loss.chunk)
    pad = partial(collate, length=config.data.row_length, pad_id=tokenizer.pad_token_id)
    evaluator = Evaluator(config, tokenizer, data, settings, pad, run)
    trainer = PackedTrainer(
        model,
        training_arguments(config, schedule.starts[-1], run.checkpoints),
        schedule=schedule,
        collate=pad,
        settings=settings,
        evaluate=evaluator,
        record=record,
        eval_dataset=data.held_out.rows,
        processing_class=tokenizer,
        callbacks=[CurveCallback(run, schedule.names)],
    )
    if config.evaluation.patience is not None:
        trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=config.evaluation.patience))
    show_on_console(trainer)
    return trainer


def schedule_of(config: SftConfig, data: Data) -> Schedule:
    """Returns the order of the rows; phases that are given in epochs get their steps."""
    args = training_arguments(config, 1, RunDirectory(config.output).checkpoints)
    rows_per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    phases = [
        Phase(phase.policy, part.rows, phase.steps or steps_of(phase.epochs or 0, len(part.rows), rows_per_step))
        for phase, part in zip(config.phases, data.train, strict=True)
    ]
    return Schedule(phases, rows_per_step, config.seed)


def finish(config: SftConfig, trainer: PackedTrainer, tokenizer: PreTrainedTokenizerBase, run: RunDirectory) -> None:
    """Saves the best model, draws the curves and says how the training went."""
    save_finished(trainer, tokenizer, run)
    if trainer.is_world_process_zero():
        write_card(config, trainer.training_record, run)
        told = judge(read_records(run.curves), trainer.training_record)
        print(f"\n{told}\n\n{run.model} holds the model, {run.plot} the curves.")
