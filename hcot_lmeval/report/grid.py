"""A grid of evaluations: models x policies x context windows x tasks x seeds, and the cells it has.

    models:
      - tiny-hcot                          # --model hcot, as it was trained and with pruning off
      - {pretrained: tiny-flat, policies: [off]}
      - {name: plain, model: hf, pretrained: tiny-flat, model_args: {dtype: float32}}
    windows: [128, 256, 768]
    tasks: [hcot_arith]
    limit: 100

Policies and windows are notions of ``--model hcot``: another model is one cell for each task and seed, unless
`window_argument` says by which of its arguments it takes a window.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field, PositiveInt, model_validator

from hcot_lmeval.assets import resolve
from hcot_lmeval.record import TrainingRecord, read_config, read_record
from hcot_lmeval.settings import Section, read_off
from hcot_lmeval.trace import Policy

OURS = "hcot"
USUAL_WINDOWS = (1024, 2048, 4096, 8192)
USUAL_BUDGET = 32768
"""Generated tokens that ``--model hcot`` allows by default when it prunes, whatever its window up to that size."""

SET_BY_GRID = ("pruning", "max_context", "seed", "notes", "journal")
"""Model arguments of hcot that the grid gives."""

SET_BY_RUNNER = """--model --model_args --tasks --output_path --log_samples --limit --batch_size --device --gen_kwargs
    --include_path --apply_chat_template --seed --config --use_cache""".split()
"""Arguments of lm_eval that the grid gives."""

MODEL_SPEC = re.compile(r"^(?:(?P<name>[^=]+)=)?(?:(?P<model>[a-z][\w-]*):)?(?P<pretrained>[^=]+)$")
"""A model in one word: ``[NAME=][TYPE:]CHECKPOINT``."""


PolicyName = Annotated[Literal["off", "trained", "recompute", "evict"], read_off]


def _read_pairs(value: Any) -> Any:
    """Reads the words ``KEY=VALUE`` of a command line; values are YAML."""
    if not isinstance(value, list):
        return value
    for word in (word for word in value if "=" not in str(word)):
        raise ValueError(f"expected KEY=VALUE, not {word}")
    return {name: yaml.safe_load(text) for name, _, text in (word.partition("=") for word in value)}


KeyValues = Annotated[dict[str, Any], BeforeValidator(_read_pairs)]


class ModelConfig(Section):
    """A model of the grid. In one word: ``[NAME=][TYPE:]CHECKPOINT``, as in ``plain=hf:org/model``."""

    name: str = Field("", description="what tables call it; none: the checkpoint without its folders")
    model: str = Field(OURS, description="lm-eval's --model: hcot, hf, vllm, ...")
    pretrained: str | None = Field(None, description="checkpoint: directory, id on the hub, bundled name")
    model_args: dict[str, Any] = Field({}, description="further model arguments, before those of the grid")
    policies: list[PolicyName] | None = Field(None, min_length=1, description="instead of the grid's (hcot alone)")
    windows: list[PositiveInt] | None = Field(None, min_length=1, description="instead of the grid's")
    window_argument: str | None = Field(
        None,
        description="argument by which another model than hcot takes a window: max_length (hf), max_model_len (vllm)",
    )
    seed_argument: str | None = Field(None, description="argument by which another model takes a seed: seed (vllm)")

    @model_validator(mode="before")
    @classmethod
    def _completed(cls, value: Any) -> Any:
        """Reads a model in one word, and names one without a name."""
        if isinstance(value, str):
            value = _from_word(value)
        if not isinstance(value, dict) or value.get("name"):
            return value
        checkpoint = value.get("pretrained") or (value.get("model_args") or {}).get("model")
        return {**value, "name": str(checkpoint).rstrip("/").rpartition("/")[2]} if checkpoint else value

    @model_validator(mode="after")
    def _sensible(self) -> ModelConfig:
        if not self.name:
            raise ValueError("give pretrained, the checkpoint, or a name and model_args")
        taken = [key for key in (*SET_BY_GRID, "pretrained") if key in self.model_args and self.ours]
        if taken:
            raise ValueError(f"model_args of {self.name} holds {', '.join(taken)}, which the grid's own keys set")
        foreign = [key for key in ("window_argument", "seed_argument") if getattr(self, key)]
        if self.ours and foreign:
            raise ValueError(f"{foreign[0]} of {self.name} is for other models; hcot takes windows and seeds by itself")
        if not self.ours and self.policies:
            raise ValueError(f"policies of {self.name} are for model hcot; {self.model} has none")
        if not self.ours and self.windows and not self.window_argument:
            raise ValueError(f"windows of {self.name}: say by window_argument how {self.model} takes one")
        return self

    @property
    def ours(self) -> bool:
        return self.model == OURS


def _from_word(word: str) -> dict[str, str]:
    found = MODEL_SPEC.match(word)
    if found is None:
        raise ValueError(f"{word!r} is not of the form [NAME=][TYPE:]CHECKPOINT, such as hf:org/model")
    return {key: part for key, part in found.groupdict().items() if part is not None}


class GridConfig(Section):
    """What to evaluate."""

    models: list[ModelConfig] = Field(
        min_length=1, title="MODEL", description="[NAME=][TYPE:]CHECKPOINT; TYPE: hcot (default), hf, vllm, ..."
    )
    policies: list[PolicyName] = Field(
        ["off", "trained"],
        min_length=1,
        title="POLICY",
        description="off, recompute, evict, or trained: as the checkpoint says it was",
    )
    windows: list[PositiveInt] | None = Field(
        None,
        min_length=1,
        title="N",
        description="max_context: most live tokens of a request; none: 1024, 2048, 4096 and 8192, as far as the model "
        "has positions",
    )
    tasks: list[str] = Field(min_length=1, title="TASK", description="lm-eval tasks or groups")
    seeds: list[int] = Field([0], min_length=1, title="N", description="of sampling")
    limit: Annotated[float, Field(gt=0)] | None = Field(
        None, title="N", description="documents of a task, below 1 a share of them; none: all"
    )
    batch_size: PositiveInt | Literal["auto"] = Field(
        "auto", title="N", description="rows side by side; auto: as many as fit"
    )
    device: str | None = Field(None, description="cpu, cuda:0, ...; none: lm-eval chooses")
    model_args: KeyValues = Field({}, title="KEY=VALUE", description="arguments of every model, as in dtype=bfloat16")
    gen_kwargs: KeyValues = Field({}, title="KEY=VALUE", description="generation arguments, over those of the tasks")
    include_path: Path | None = Field(None, title="DIR", description="folder of further tasks")
    apply_chat_template: bool | str = Field(
        False, description="lm-eval's option; hcot by itself applies the template of a tokenizer that has one"
    )
    notes: bool = Field(True, description="keep what was generated and pruned, for the viewer (hcot alone)")
    lm_eval_args: list[str] = Field(
        [], title="ARGS", description="further arguments of lm_eval, on a command line in one string"
    )

    @model_validator(mode="after")
    def _sensible(self) -> GridConfig:
        names = [model.name for model in self.models]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise ValueError(f"two models are called {', '.join(sorted(twice))}; give each a name of its own")
        taken = [key for key in (*SET_BY_GRID, "pretrained") if key in self.model_args]
        if taken:
            raise ValueError(f"model_args holds {', '.join(taken)}, which the grid's own keys set")
        ours = [arg for arg in self.lm_eval_args if arg.partition("=")[0] in SET_BY_RUNNER]
        if ours:
            raise ValueError(f"lm_eval_args holds {', '.join(ours)}, which the grid's own keys set")
        if self.limit is not None and self.limit >= 1 and not self.limit.is_integer():
            raise ValueError(f"limit={self.limit} is neither a number of documents nor, below 1, a share of them")
        if self.include_path and not self.include_path.is_dir():
            raise ValueError(f"include_path={self.include_path} is no folder")
        return self

    @property
    def cells(self) -> list[Cell]:
        """Every evaluation of the grid, those of a task together, in the order of models, policies and windows."""
        tasks = dict.fromkeys(self.tasks)
        return [cell for task in tasks for model in self.models for cell in _cells_of(self, model, task)]


@dataclass(frozen=True)
class Cell:
    """One evaluation. Another model than hcot has no policy, and no window unless it says how it takes one."""

    grid: GridConfig
    model: ModelConfig
    task: str
    policy: str | None
    window: int | None
    seed: int

    @property
    def name(self) -> str:
        """What tables call its runs, of whatever task: model, policy, window, and the seed if there are several."""
        seed = f"seed {self.seed}" if len(self.grid.seeds) > 1 else None
        return ", ".join(str(part) for part in (self.model.name, self.policy, self.window, seed) if part is not None)

    @property
    def title(self) -> str:
        return f"{self.name} ({self.task})"

    @property
    def model_args(self) -> dict[str, Any]:
        """The model arguments that determine the result; where notes and journal lie does not."""
        named = self.model.pretrained
        if not self.model.ours and named:
            named = resolve(named)  # only hcot knows the bundled
        checkpoint = {"pretrained": named} if named else {}
        given = {**checkpoint, **self.grid.model_args, **self.model.model_args}
        if self.model.ours:
            return given | {"pruning": self.policy, "max_context": self.window, "seed": self.seed} | self._budget(given)
        own = {self.model.window_argument: self.window, self.model.seed_argument: self.seed}
        return given | {name: value for name, value in own.items() if name}

    def _budget(self, given: dict[str, Any]) -> dict[str, Any]:
        """One default limit for all windows: by itself hcot takes a window beyond `USUAL_BUDGET` for its limit."""
        largest = max(window for model in self.grid.models if model.ours for window in windows_of(self.grid, model))
        return {} if "max_gen_toks" in given or largest <= USUAL_BUDGET else {"max_gen_toks": largest}

    @property
    def seeds(self) -> str:
        """lm-eval's ``--seed``: for Python, numpy, torch and the choice of examples; one of them is ours to vary.

        hcot has an argument of its own. Examples are the same under every seed, or prompts would differ.
        """
        return f"0,1234,{1234 if self.model.ours else self.seed},1234"


def _cells_of(grid: GridConfig, model: ModelConfig, task: str) -> Iterator[Cell]:
    takes_window = model.ours or model.window_argument
    for policy in _policies(grid, model) if model.ours else (None,):
        for window in windows_of(grid, model) if takes_window else (None,):
            for seed in dict.fromkeys(grid.seeds):
                yield Cell(grid, model, task, policy, window, seed)


def windows_of(grid: GridConfig, model: ModelConfig) -> list[int]:
    """Returns the windows of a model, each one once: those that are named, else the usual ones that it has room for."""
    named = model.windows or grid.windows
    if named:
        return list(dict.fromkeys(named))
    given = {**grid.model_args, **model.model_args}
    config = (read_config(resolve(model.pretrained), given.get("revision")) if model.pretrained else None) or {}
    most = (config.get("text_config") or config).get("max_position_embeddings") or max(USUAL_WINDOWS)
    return [window for window in USUAL_WINDOWS if window <= most] or [most]


def _policies(grid: GridConfig, model: ModelConfig) -> list[str]:
    """The policies of a model, ``trained`` replaced by what its training record says, each one once."""
    names = model.policies or grid.policies
    record = record_of(model, {**grid.model_args, **model.model_args}) if "trained" in names else None
    trained = Policy.RECOMPUTE.value if record is None else record.policy
    return list(dict.fromkeys(trained if policy == "trained" else policy for policy in names))


def record_of(model: ModelConfig, given: Mapping[str, Any]) -> TrainingRecord | None:
    """Returns the training record of a model, as the engine settles it: an adapter's before its base's.

    None if neither has one, or is not there at all (see `preflight`). `given` are the model's and the grid's arguments.
    """
    for checkpoint in (given.get("peft"), model.pretrained):
        record = read_record(resolve(checkpoint), given.get("revision")) if checkpoint else None
        if record is not None:
            return record
    return None
