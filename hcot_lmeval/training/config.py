"""What a training run is: every setting of ``hcot train sft`` and ``hcot train grpo``, its default and its meaning.

The YAML file has the structure of `SftConfig` or `GrpoConfig`; all its faults are said at once, with what is allowed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import Field, field_validator, model_validator

from hcot_lmeval.markup import PRESETS
from hcot_lmeval.settings import Section, describe_settings, parse_settings, read_yaml
from hcot_lmeval.trace import Policy

R = TypeVar("R", bound="RunConfig")


class TokensConfig(Section):
    """The markers: how they are written, and how rows of new tokens start."""

    markup: str = Field("hcot", description=f"notation of the blocks: {', '.join(PRESETS)}")
    add: bool = Field(True, description="add the markers that the vocabulary lacks; false: their lack is an error")
    seeding: Literal["mean", "noise", "none"] = Field(
        "mean", description="rows of new tokens: mean of a phrase's rows, that mean plus noise, or left as drawn"
    )
    noise: float = Field(0.01, ge=0, description="standard deviation of the noise, under seeding=noise")
    phrases: dict[str, str] = Field({}, description="token -> phrase, beside or instead of the default phrases")
    eos: str | None = Field(None, description="token that ends a turn; none: the tokenizer's own end of sequence")
    chat_template: str | None = Field(
        None, description="a shipped template's name or a file; none: the tokenizer's own"
    )
    template_arguments: dict[str, Any] = Field(
        {}, description="what the chat template reads, such as enable_thinking: its defaults, in the saved model too"
    )
    strict_template: bool = Field(
        True,
        description="whether the chat template has to write a finished conversation as prompt + answer + end of turn; "
        "false: training does so itself, behind the prompt as at inference",
    )


class SourceConfig(Section):
    """One data set: JSONL or parquet file(s), a data set on the hub, or problems made on the spot."""

    path: str = Field(description="file, directory, hub id, or synthetic:arith, synthetic:qbf, synthetic:sat")
    name: str | None = Field(None, description="configuration of a hub data set")
    split: str = Field("train", description="split of a hub data set, or of the synthetic problems")
    revision: str | None = Field(None, description="revision of a hub data set")
    columns: dict[str, str] = Field(
        {}, description="question, trace, answer or messages -> name of the column, where it has another name"
    )
    limit: int | None = Field(None, ge=1, description="rows taken from the beginning")
    options: dict[str, Any] = Field({}, description="of a synthetic generator: size, seed, depths, flat, ...")


class DataConfig(Section):
    """What is trained on and what is held out."""

    train: list[SourceConfig] = Field(min_length=1, description="sources, one behind the other")
    held_out: list[SourceConfig] = Field([], description="sources that are never trained on")
    held_out_share: float = Field(0.0, ge=0, lt=1, description="share of the training rows held out where no source is")
    malformed: Literal["drop", "keep"] = Field("drop", description="what becomes of malformed traces")
    too_long: Literal["cut", "drop"] = Field("cut", description="what becomes of traces that do not fit into a row")
    row_length: int = Field(4096, ge=8, description="tokens in a packed row; also the longest document")
    form: Literal["packed", "stages"] = Field("packed", description="one plan a trace, or a document for each stage")
    system_prompt: str | None = Field(None, description="system message before each question")
    workers: int = Field(1, ge=1, description="processes that tokenise and compile")


class PhaseConfig(Section):
    """A part of the curriculum, such as `off` (the plain trace) before `recompute`."""

    policy: Policy = Field(Policy.RECOMPUTE, description="what a return does: off, recompute, evict")
    steps: int | None = Field(None, ge=1, description="optimiser steps; or give epochs")
    epochs: float | None = Field(None, gt=0, description="passes over the data; or give steps")
    train: list[SourceConfig] = Field([], description="other sources than data.train, in this phase alone")

    @field_validator("policy", mode="before")
    @classmethod
    def _off_is_a_word(cls, value: Any) -> Any:
        return "off" if value is False else value  # YAML reads a bare `off` as false

    @model_validator(mode="after")
    def _one_length(self) -> PhaseConfig:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(f"give steps or epochs, one of them (steps={self.steps}, epochs={self.epochs})")
        return self


class LossConfig(Section):
    """Cross-entropy, and what is added so that traces stay legal."""

    weight: float = Field(
        1.0, ge=0, allow_inf_nan=False, description="of the term on illegal markers (lambda); 0: none"
    )
    chunk: int = Field(1024, ge=1, description="rows of logits that exist at a time")


class EvaluationConfig(Section):
    """What is measured on held-out data while training, and what follows from it."""

    every: int = Field(200, ge=1, description="steps between evaluations")
    problems: int = Field(32, ge=0, description="held-out problems solved by free-running pruned generation; 0: none")
    max_context: int | None = Field(None, ge=1, description="live tokens of the generation; none: the model's limit")
    max_gen_toks: int = Field(4096, ge=1, description="generated tokens of the generation")
    batch_size: int = Field(32, ge=1, description="rows that generate side by side")
    metric: Literal["loss", "accuracy", "illegal_traces", "completion"] = Field(
        "loss", description="chooses the best checkpoint; all but the loss are measured by generation"
    )
    patience: int | None = Field(None, ge=1, description="evaluations without a better metric before training stops")


class LoraConfig(Section):
    """Low-rank adapters instead of training all weights; rows of new tokens are trained in full."""

    r: int = Field(16, ge=1, description="rank")
    alpha: int = Field(32, ge=1, description="scale: updates are multiplied by alpha / r")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapters' inputs")
    target_modules: str | list[str] = Field(
        "all-linear", description="modules that get adapters: all-linear, a list of names, or a pattern of whole names"
    )


class TinyConfig(Section):
    """Shape of the new model under ``model: tiny``: a Qwen2 whose tokens are the characters of the synthetic tasks."""

    hidden_size: int = Field(128, ge=8, description="width")
    intermediate_size: int = Field(256, ge=8, description="width of the feed-forward layers")
    layers: int = Field(3, ge=1, description="number of layers")
    heads: int = Field(6, ge=1, description="attention heads of a layer")
    head_dim: int = Field(32, ge=2, multiple_of=2, description="width of a head")
    positions: int = Field(4096, ge=8, description="longest context")
    rope_theta: float = Field(1e6, gt=1, description="base of the rotary frequencies, as in Qwen2.5")
    start: Literal["random", "induction"] = Field(
        "random", description="induction: with heads that copy what followed before (see training/tiny.py)"
    )


class RunConfig(Section):
    """What every training run has."""

    model: str = Field(description="checkpoint directory, hub id, or tiny: a new, small model (see section tiny)")
    tokenizer: str | None = Field(None, description="where it is not the model's own")
    revision: str | None = Field(None, description="revision of the model")
    trust_remote_code: bool = Field(False, description="whether code of the checkpoint may run")
    dtype: Literal["float32", "bfloat16", "float64"] = Field(
        "float32", description="of the weights; for mixed precision leave it and set trainer.bf16"
    )
    attention: Literal["auto", "sdpa", "eager", "flex_attention"] = Field(
        "auto", description="auto: flex_attention for long rows on CUDA, else sdpa; flash attention takes no mask"
    )
    output: Path = Field(description="directory of checkpoints, curves and the final model")
    seed: int = Field(0, description="of new weights, the order of the data, dropout and generation")
    tiny: TinyConfig = TinyConfig()
    tokens: TokensConfig = TokensConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    lora: LoraConfig | None = Field(None, description="train adapters instead of all weights")
    trainer: dict[str, Any] = Field({}, description="any argument of transformers.TrainingArguments")

    @property
    def policies(self) -> set[Policy]:
        """What the model is trained under."""
        raise NotImplementedError

    @property
    def longest_row(self) -> int:
        """Tokens of a packed row."""
        raise NotImplementedError

    @property
    def lengths(self) -> tuple[str, ...]:
        """The keys of settings that may grow when a run goes on."""
        raise NotImplementedError


class SftConfig(RunConfig):
    """A supervised training run."""

    data: DataConfig
    phases: list[PhaseConfig] = Field(min_length=1, description="the curriculum, in order")
    loss: LossConfig = LossConfig()

    @property
    def policy(self) -> Policy:
        """The policy of the last phase: the one that the finished model is for."""
        return self.phases[-1].policy

    @property
    def policies(self) -> set[Policy]:
        """What the model is trained under."""
        return {phase.policy for phase in self.phases}

    @property
    def longest_row(self) -> int:
        """Tokens of a row."""
        return self.data.row_length

    @property
    def lengths(self) -> tuple[str, ...]:
        """The keys of settings that may grow when a run goes on."""
        last = len(self.phases) - 1
        return f"phases.{last}.steps", f"phases.{last}.epochs"


# --- reinforcement learning -------------------------------------------------------------------------------------------


class PromptsConfig(Section):
    """The problems: questions with answers; traces are not needed."""

    train: list[SourceConfig] = Field(min_length=1, description="sources, one behind the other")
    held_out: list[SourceConfig] = Field(min_length=1, description="sources that are never trained on")
    system_prompt: str | None = Field(None, description="system message before each question")


class RolloutConfig(Section):
    """How the policy writes while it is trained."""

    max_context: int | None = Field(None, ge=1, description="live tokens of a completion; none: the model's limit")
    max_gen_toks: int = Field(1024, ge=1, description="generated tokens of a completion, pruned ones included")
    temperature: float = Field(1.0, gt=0, description="of the sampling; the loss is that of the same distribution")
    batch_size: int = Field(32, ge=1, description="rows that generate side by side")
    constraints: Literal["grammar"] | None = Field(None, description="grammar: illegal markers cannot come")
    max_depth: int | None = Field(None, ge=1, description="most open blocks")
    max_block_tokens: int | None = Field(None, ge=1, description="most tokens of a thought")
    max_solution_tokens: int | None = Field(None, ge=1, description="most tokens of a solution")
    force_answer: int | None = Field(None, ge=1, description="tokens kept for the answer, which is forced in time")
    loop_tokens: int | None = Field(64, ge=1, description="end a completion that has repeated itself for so many")

    @model_validator(mode="after")
    def _has_room(self) -> RolloutConfig:
        for name in ("max_gen_toks", "max_context"):
            most = getattr(self, name)
            if self.force_answer is not None and most is not None and self.force_answer >= most:
                raise ValueError(
                    f"force_answer={self.force_answer} keeps all of {name}={most} for the answer; lower it"
                )
        return self

    @property
    def controls(self) -> dict[str, Any]:
        """What is done beside the model's wish."""
        return {name: value for name in CONTROL_NAMES if (value := getattr(self, name)) is not None}


CONTROL_NAMES = "constraints max_depth max_block_tokens max_solution_tokens force_answer loop_tokens".split()


class GuardsConfig(Section):
    """When a run that has collapsed is stopped: shares of the completions, over the last `window` generations."""

    window: int = Field(5, ge=1, description="generations in a row that have to agree")
    no_blocks: float = Field(0.98, gt=0, le=1, description="share without any block, where the model wrote blocks")
    one_block: float = Field(0.98, gt=0, le=1, description="share with a single block around all, where it wrote more")
    cut: float = Field(0.9, gt=0, le=1, description="share cut by a budget")
    loops: float = Field(0.5, gt=0, le=1, description="share that repeats itself")


class GrpoEvaluationConfig(EvaluationConfig):
    """What is measured on held-out problems while training."""

    every: int = Field(20, ge=1, description="steps between evaluations")
    problems: int = Field(32, ge=1, description="held-out problems solved by free-running pruned generation")
    temperature: float = Field(0.0, ge=0, description="of the sampling; 0 takes the most likely token")
    metric: Literal["accuracy", "illegal_traces", "completion"] = Field(
        "accuracy", description="chooses the best checkpoint"
    )


REWARD_WEIGHTS = {"correctness": 1.0, "structure": 0.1, "compression": 0.1, "peak": 0.1, "length": 0.1}
"""Being right outweighs all the rest together."""


class GrpoConfig(RunConfig):
    """A run of reinforcement learning."""

    policy: Policy | None = Field(None, description="what a return does; none: what the model was trained under")
    steps: int = Field(200, ge=1, description="optimiser steps")
    data: PromptsConfig
    rollout: RolloutConfig = RolloutConfig()
    rewards: dict[str, float] = Field(
        REWARD_WEIGHTS, description="reward -> weight; a reward of your own is written module:function"
    )
    evaluation: GrpoEvaluationConfig = GrpoEvaluationConfig()
    guards: GuardsConfig = GuardsConfig()
    trainer: dict[str, Any] = Field({}, description="any argument of trl.GRPOConfig")

    _off_is_a_word = field_validator("policy", mode="before")(lambda value: "off" if value is False else value)

    @property
    def policies(self) -> set[Policy]:
        """What the model is trained under."""
        return {self.policy or Policy.RECOMPUTE}

    @property
    def longest_row(self) -> int:
        """Tokens of a row, about: completions without what is read again."""
        return self.rollout.max_gen_toks

    @property
    def lengths(self) -> tuple[str, ...]:
        """The keys of settings that may grow when a run goes on."""
        return ("steps",)


# --- from a file and overrides ----------------------------------------------------------------------------------------


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> SftConfig:
    """Reads the settings of a supervised run; see `read_config`."""
    return read_config(path, overrides, SftConfig)


def read_config(path: str | Path, overrides: Sequence[str], kind: type[R]) -> R:
    """Reads a YAML file and changes what ``overrides`` say.

    Args:
        path: the file.
        overrides: ``key=value`` each; a dotted key reaches into sections and lists (``phases.0.steps=100``), the value
            is YAML.
        kind: of run.

    Raises:
        ValueError: the file is no mapping, a key is unknown, a value is not allowed; every fault in one message.
        FileNotFoundError: there is no such file.
    """
    settings = read_yaml(path, "model: tiny")
    for override in overrides:
        _override(settings, override)
    return parse_settings(kind, settings, str(path))


def parse_config(settings: Mapping[str, Any], origin: str = "the settings") -> SftConfig:
    """Returns checked settings.

    Raises:
        ValueError: as for `read_config`.
    """
    return parse_settings(SftConfig, settings, origin)


def _override(settings: Any, override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals:
        raise ValueError(f"override {override!r} is not of the form key=value, such as trainer.learning_rate=1e-4")
    try:
        value = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ValueError(f"override {override!r}: the value is not YAML: {' '.join(str(error).split())}") from None
    *path, last = key.split(".")
    for name in path:
        if isinstance(settings, list):
            settings = settings[_index(settings, name, key)]
        elif isinstance(settings, dict):
            settings = settings.setdefault(name, {})
        else:
            raise ValueError(f"override {override!r}: {name} is neither a section nor a list")
    if isinstance(settings, list):
        settings[_index(settings, last, key)] = value
    elif isinstance(settings, dict):
        settings[last] = value
    else:
        raise ValueError(f"override {override!r}: {key.rpartition('.')[0]} has the value {settings!r} and no parts")


def _index(items: list[Any], name: str, key: str) -> int:
    if not name.isdigit() or int(name) >= len(items):
        raise ValueError(f"override {key}: {name!r} is no index of a list with {len(items)} entries, counted from 0")
    return int(name)


def describe_config(kind: type[Section]) -> str:
    """Returns every key with its default and meaning, as the help of the command shows it."""
    return "\n".join(describe_settings(kind))
