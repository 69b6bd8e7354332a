"""A run of reinforcement learning from its settings to the finished model: what ``hcot train grpo`` does.

Everything that can be wrong with the settings, the data, the rewards or the tokenizer is said before the first step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, set_seed
from trl import GRPOConfig

from hcot_lmeval.engine.decoder import Decoder
from hcot_lmeval.errors import Allowed, one_of, whole_number
from hcot_lmeval.markup import get_markup
from hcot_lmeval.processes import leave_group_at_exit
from hcot_lmeval.provenance import digest
from hcot_lmeval.record import TrainingRecord, read_record
from hcot_lmeval.response import Response
from hcot_lmeval.rotary import position_limits
from hcot_lmeval.trace import Policy
from hcot_lmeval.training import arguments
from hcot_lmeval.training.arguments import check_trackers, checked_arguments, installed, on_this_machine
from hcot_lmeval.training.config import GrpoConfig, SourceConfig
from hcot_lmeval.training.curves import RL_PANELS
from hcot_lmeval.training.data.sources import load_source
from hcot_lmeval.training.data.text import TextForm, Unusable
from hcot_lmeval.training.evaluation import Problem, free_run
from hcot_lmeval.training.forward import LossSettings
from hcot_lmeval.training.grpo_trainer import Guards, PrunedGRPOTrainer
from hcot_lmeval.training.loading import attention_of, check_model, load_model, load_tokenizer, with_adapter
from hcot_lmeval.training.proof import settle_attention
from hcot_lmeval.training.rewards import WeightedSum
from hcot_lmeval.training.rollout import Rollout, Shape
from hcot_lmeval.training.run import RunDirectory
from hcot_lmeval.training.sft import announce, check_room, grammar_of, save_finished, show_on_console, train_to_end
from hcot_lmeval.training.trainer import CurveCallback

DEFAULTS: dict[str, Any] = {
    "bf16": False,
    "gradient_checkpointing": False,
    "logging_steps": 1,
    "logging_nan_inf_filter": False,
    "save_total_limit": 2,
    "report_to": "none",
    "disable_dropout": True,  # a rollout drops nothing, and the loss is that of the policy that wrote
    "mask_truncated_completions": True,
}
"""Ours where they differ from TRL's."""
OWNED = arguments.OWNED | {
    "max_steps": "steps",
    "num_train_epochs": "steps",
    "temperature": "rollout.temperature",
    "max_completion_length": "rollout.max_gen_toks",
    "reward_weights": "rewards",
}
WINDOW = "rollout.max_context"
SAMPLED = "the loss is that of the whole distribution at rollout.temperature"
ENGINE = "completions are written by the pruning engine; see the section rollout"
REFUSED = arguments.REFUSED | {
    **dict.fromkeys(("top_p", "top_k", "min_p", "repetition_penalty"), SAMPLED),
    **dict.fromkeys(("generation_kwargs", "cache_implementation", "use_vllm", "chat_template_kwargs"), ENGINE),
    **dict.fromkeys(("use_transformers_continuous_batching", "use_transformers_paged"), ENGINE),
    "fsdp": "the engine needs whole weights in each process; several processes train by DDP",
    "deepspeed": "the engine needs whole weights in each process; several processes train by DDP",
    "pad_to_multiple_of": "traces are packed, not padded",
    "router_aux_loss_coef": "packed traces have no balance loss of experts",
    "model_init_kwargs": "see the settings model, dtype and attention",
    "trust_remote_code": "set trust_remote_code of the run instead",
    "num_generations_eval": "an evaluation solves each held-out problem once",
}
"""Arguments that would do nothing or harm, and why."""
LOSSES = "grpo bnpo dr_grpo dapo luspo cispo sapo vespo".split()
ALLOWED: dict[str, Allowed] = {
    "loss_type": one_of(*LOSSES),
    "importance_sampling_level": one_of("token", "sequence"),
    "scale_rewards": (lambda value: value in (True, False, "group", "batch", "none"), "give group, batch or none"),
    "num_iterations": whole_number(1),
    "beta": (lambda value: value >= 0, "give a number from 0 up"),
    "epsilon": (lambda value: value > 0, "give a number above 0"),
}
"""What TRL takes at any value and stumbles over at the first step, or never."""


@dataclass(frozen=True)
class Prompts:
    """What a run trains on and what it holds out.

    Attributes:
        train: the columns prompt (text, chat template applied) and answer.
        ids: prompt to token ids.
        problems: held-out prompts and answers.
        digest: of the training rows.
    """

    train: Dataset
    ids: dict[str, tuple[int, ...]]
    problems: Sequence[Problem]
    digest: str


def train(config: GrpoConfig, *, restart: bool = False, command: str = "", folder: Path | str = ".") -> RunDirectory:
    """Trains, or goes on with a run that was interrupted, and leaves everything in ``config.output``.

    Args:
        config: the settings.
        restart: throw away what an earlier run left there.
        command: the command line, for the record.
        folder: where modules with rewards of one's own are looked for first.

    Raises:
        ValueError: a setting, a reward or the data cannot be used, or the directory holds another run.
        FileNotFoundError: a data file does not exist.
        RuntimeError: engine and trainer disagree at the first step.
        KeyboardInterrupt: Ctrl-C or SIGTERM came, and a checkpoint was saved.
    """
    leave_group_at_exit()
    rewards, run = WeightedSum(config.rewards, folder), RunDirectory(config.output)
    check_trackers(grpo_arguments(config, run.checkpoints))
    attention_of(config)
    run.check(None if restart else config)
    if not restart:
        announce(run)
    tokenizer, new = load_tokenizer(config)
    if new:
        raise ValueError(
            f"model={config.model!r} does not know the markers {', '.join(new)}, which no reward can teach it; train "
            "it on traces first (hcot train sft), or set tokens.markup to its notation"
        )
    check_model(config, tokenizer)
    with PartialState().main_process_first():
        prompts = load_prompts(config, tokenizer)
    check_room(config.rollout.max_context, [(prompts.ids[each], None) for each in prompts.train["prompt"]], WINDOW)
    check_room(config.evaluation.max_context or config.rollout.max_context, prompts.problems)
    check_rewards(rewards, prompts)
    set_seed(config.seed)
    model, added = load_model(config, tokenizer, new)
    policy = settled_policy(config, model)
    Decoder(model)  # says now whether the model can be decoded with pruning
    model = with_adapter(config, model, added.tokens.values())
    with PartialState().main_process_first():
        checkpoint = run.claim(config, [prompts.digest], restart=restart and PartialState().is_main_process)
    trainer = make_trainer(config, model, tokenizer, prompts, policy, rewards, run, command)
    grammar = LossSettings(trainer.rollout.grammar)
    settle_attention(trainer.model, grammar, policy, row_length=config.longest_row)
    guards = Guards(config.guards, trainer)
    trainer.add_callback(guards)
    train_to_end(trainer, run, checkpoint, config.trainer.get("save_steps"))
    finish(trainer, tokenizer, run, guards.verdict)
    return run


def grpo_arguments(config: GrpoConfig, checkpoints: Path) -> GRPOConfig:
    """Returns TRL's arguments for a run.

    Raises:
        ValueError: an argument is unknown, has a value that is not allowed, or follows from another setting.
    """
    given = checked_arguments(config.trainer, GRPOConfig, OWNED, REFUSED)
    vllm = [name for name in given if name.startswith("vllm_")]
    if vllm:
        raise ValueError(f"trainer.{vllm[0]} cannot be set here: {ENGINE}")
    evaluation = config.evaluation
    with installed():
        made = GRPOConfig(
            **DEFAULTS | on_this_machine() | given,
            output_dir=str(checkpoints),
            max_steps=config.steps,
            seed=config.seed,
            temperature=config.rollout.temperature,
            max_completion_length=config.rollout.max_gen_toks,
            eval_strategy="steps",
            eval_steps=evaluation.every,
            save_strategy="steps",
            save_steps=evaluation.every,
            metric_for_best_model=f"eval_{evaluation.metric}",
            greater_is_better=arguments.HIGHER_IS_BETTER[evaluation.metric],
            load_best_model_at_end=True,
            remove_unused_columns=False,
            num_generations_eval=1,
        )
    for name, (fits, words) in ALLOWED.items():
        if not fits(getattr(made, name)):
            raise ValueError(f"trainer.{name}={getattr(made, name)!r} is not allowed; {words}")
    return made


def settled_policy(config: GrpoConfig, model: Any) -> Policy:
    """Returns the policy that is asked for, or that the model was trained under, and recompute if it does not say."""
    record = read_record(model)
    return config.policy or (Policy.RECOMPUTE if record is None else Policy(record.policy))


def load_prompts(config: GrpoConfig, tokenizer: PreTrainedTokenizerBase) -> Prompts:
    """Reads questions and answers, and prints what became of them.

    Raises:
        ValueError: a column is missing, no row is usable, or a held-out question is trained on.
    """
    form = TextForm(tokenizer, get_markup(config.tokens.markup), config.data.system_prompt)
    held = dict(_pairs(config.data.held_out, form, config.tokens.markup, "held out"))
    pairs = dict(_pairs(config.data.train, form, config.tokens.markup, "training"))
    train = {prompt: answer for prompt, answer in pairs.items() if prompt not in held}
    if len(train) < len(pairs) and PartialState().is_main_process:
        print(f"training: {len(pairs) - len(train)} problems left out, for they are held out", flush=True)
    if not train:
        raise ValueError("no training problem is left, for all are held out; name other sources in data.held_out")
    ids = {prompt: tuple(form.encode(prompt)) for prompt in (*train, *held)}
    problems = [(ids[prompt], answer) for prompt, answer in held.items()][: config.evaluation.problems]
    rows = Dataset.from_dict({"prompt": list(train), "answer": list(train.values())})
    return Prompts(rows, ids, problems, digest(sorted(train.items())))


def _pairs(sources: Sequence[SourceConfig], form: TextForm, markup: str, name: str) -> Iterator[tuple[str, str]]:
    """Yields prompt and answer of each usable row."""
    used = total = 0
    for source in sources:
        for row in load_source(source, markup, problems=True):
            total += 1
            try:
                prompt = form.prompt_text(row)
            except Unusable:
                continue
            if row["answer"] is not None:
                used += 1
                yield prompt, row["answer"]
    if not used:
        raise ValueError(f"{name}: none of {total} rows has a question and an answer; see columns in the section data")
    if PartialState().is_main_process:
        print(f"{name}: {used} of {total} rows have a question and an answer", flush=True)


def check_rewards(rewards: WeightedSum, prompts: Prompts) -> None:
    """Calls the rewards once on an empty completion, so that one that cannot be called is known before the first step.

    Raises:
        ValueError: one raises, or returns something else than a list of numbers.
    """
    row = prompts.train[0]
    columns: dict[str, Any] = {
        "completion_ids": [[]],
        "answer": [row["answer"]],
        "response": [Response("", stats={}, finish_reason="eos")],
        "shape": [Shape((), 0, 0, 0, 0, len(prompts.ids[row["prompt"]]), 0.0)],
        "limits": [(1, 1)],
        "trainer_state": None,
        "log_extra": lambda *_: None,
    }
    rewards([row["prompt"]], [""], **columns)


def make_trainer(
    config: GrpoConfig,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Prompts,
    policy: Policy,
    rewards: WeightedSum,
    run: RunDirectory,
    command: str,
) -> PrunedGRPOTrainer:
    """Returns the trainer, ready to start."""
    settings, markup = config.rollout, config.tokens.markup
    grammar = grammar_of(config, tokenizer)
    rollout = Rollout(
        tokenizer,
        grammar,
        policy=policy,
        markup=markup,
        max_context=settings.max_context,
        max_gen_toks=settings.max_gen_toks,
        temperature=settings.temperature,
        batch_size=settings.batch_size,
        **settings.controls,
    )
    window, _ = position_limits(model, config.model, settings.max_context, None, evict=policy is Policy.EVICT)
    trainer = PrunedGRPOTrainer(
        model,
        rollout=rollout,
        encode=prompts.ids.__getitem__,
        limits=(window, settings.max_gen_toks),
        measure=partial(measure, config=config, prompts=prompts, policy=policy, run=run) if prompts.problems else None,
        record=record_of(config, model, policy, prompts, command),
        args=grpo_arguments(config, run.checkpoints),
        reward_funcs=rewards,
        train_dataset=prompts.train,
        eval_dataset=prompts.train.select(range(1)),  # the Trainer wants one; what is measured is `measure`
        processing_class=tokenizer,
        callbacks=[CurveCallback(run, [(0, policy.value)], RL_PANELS)],
    )
    show_on_console(trainer)
    return trainer


def record_of(config: GrpoConfig, model: Any, policy: Policy, prompts: Prompts, command: str) -> TrainingRecord:
    """Returns what the checkpoints will say about themselves: what they said before, and this run."""
    before = read_record(model)
    phase = {"policy": policy.value, "steps": config.steps, "data_hash": prompts.digest, "rewards": config.rewards}
    known = {} if before is None else {name: getattr(before, name) for name in ("think", "seeding", "structure_loss")}
    return TrainingRecord(
        policy=policy.value,
        markup=config.tokens.markup,
        curriculum=[*(before.curriculum if before else []), phase],
        data_hash=prompts.digest,
        command=command or None,
        **known,
    )


def measure(
    trainer: PrunedGRPOTrainer, *, config: GrpoConfig, prompts: Prompts, policy: Policy, run: RunDirectory
) -> dict[str, float]:
    """Solves the held-out problems; keeps some of what was written."""
    settings = config.evaluation
    done = free_run(
        trainer.model_wrapped,
        trainer.processing_class,
        prompts.problems,
        policy=policy,
        markup=config.tokens.markup,
        max_context=settings.max_context or config.rollout.max_context,
        max_gen_toks=settings.max_gen_toks,
        batch_size=settings.batch_size,
        temperature=settings.temperature,
        seed=config.seed,
        progress=True,
    )
    if trainer.is_world_process_zero():
        run.add_samples(done.records(trainer.state.global_step))
    return done.metrics


def finish(trainer: PrunedGRPOTrainer, tokenizer: PreTrainedTokenizerBase, run: RunDirectory, verdict: str) -> None:
    """Saves the best model and says how the training went."""
    save_finished(trainer, tokenizer, run)
    if trainer.is_world_process_zero():
        best, name = trainer.state.best_global_step, trainer.args.metric_for_best_model
        told = verdict or f"the best checkpoint is that of step {best}: {name} {trainer.state.best_metric}"
        print(f"\n{told}\n\n{run.model} holds the model, {run.plot} the curves.")
