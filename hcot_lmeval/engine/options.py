"""How the engine runs: its options, checked before any memory is taken."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from hcot_lmeval.ablation import Ablation
from hcot_lmeval.control import ControlOptions
from hcot_lmeval.engine.computing import ComputeOptions
from hcot_lmeval.markup import MarkerIds, Markup
from hcot_lmeval.trace import Policy


@dataclass(frozen=True)
class EngineOptions(ControlOptions, ComputeOptions):
    """How the engine runs; what it does beside the model's wish is in `ControlOptions`, how it computes in the other.

    Attributes:
        policy: what a closing marker does: off, recompute or evict; by default what the model was trained for, and
            recompute if it does not say.
        markup: the notation of the blocks; by default that of the training, and hcot if the model does not say.
        any_policy: run a model under another policy or notation than it was trained for.
        ablation: throw away something else than the rule does; see `hcot_lmeval.ablation`.
        markers: its token ids; looked up in the tokenizer by default.
        max_context: most live tokens of a row, prompt included; by default what the model's config allows.
        max_position: under policy evict, most tokens of a trace; by default what the model's config allows.
        slots: rows that run at the same time, or "auto": as many as memory holds, up to `max_slots`.
        max_slots: upper bound for "auto".
        eos_ids: token ids that end a row; by default those of the generation config and the tokenizer.
        think: the strings around the thinking section, "markup" for those of the markup, or None for a model without.
        think_ids: ids of these strings; looked up in the tokenizer by default, None for a string that is not one token.
        prompt_acts: whether markers in prompts open and close blocks too; by default they are inert.
        step_tokens: prompt tokens forwarded in one step.
        self_check: compare slots with a plain forward when the model is loaded.
        poison: fill new memory with NaN, for tests.
    """

    policy: Policy | str | None = None
    markup: Markup | str | None = None
    any_policy: bool = False
    ablation: Ablation | str | None = None
    markers: MarkerIds | None = None
    max_context: int | None = None
    max_position: int | None = None
    slots: int | Literal["auto"] = "auto"
    max_slots: int = 64
    eos_ids: Sequence[int] | None = None
    think: tuple[str, str] | Literal["markup"] | None = "markup"
    think_ids: tuple[int | None, int | None] | None = None
    prompt_acts: bool = False
    step_tokens: int | None = None
    self_check: bool = True
    poison: bool = False

    def __post_init__(self) -> None:
        ControlOptions.__post_init__(self)
        ComputeOptions.__post_init__(self)
        if self.policy is not None and self.policy not in list(Policy):
            raise ValueError(f"policy={self.policy!r} is unknown; choose one of {', '.join(Policy)}")
        if self.slots != "auto" and (type(self.slots) is not int or self.slots < 1):
            raise ValueError(f"slots={self.slots!r} is not allowed; give a number of rows from 1 up, or 'auto'")
        for name in ("max_context", "max_position", "max_slots", "step_tokens"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"{name}={value!r} is not allowed; it has to be a whole number, at least 1")
        for name in ("any_policy", "prompt_acts", "self_check", "poison"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r} is neither True nor False")


def read_options(options: dict[str, Any]) -> EngineOptions:
    """Returns the options with these names and values.

    Raises:
        ValueError: a name is unknown or a value is not allowed.
    """
    known = [f.name for f in dataclasses.fields(EngineOptions)]
    unknown = sorted(set(options) - set(known))
    if unknown:
        hint = " What lm-eval's model argument calls pruning is policy here." if "pruning" in unknown else ""
        raise ValueError(f"unknown engine option {', '.join(unknown)}; known are {', '.join(known)}.{hint}")
    return EngineOptions(**options)
