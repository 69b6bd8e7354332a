"""How the engine runs: its options, checked before any memory is taken."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from hcot_lmeval.ablation import Ablation
from hcot_lmeval.control import ControlOptions
from hcot_lmeval.engine.native import Compute
from hcot_lmeval.engine.slots import KV_DTYPES
from hcot_lmeval.markup import MarkerIds, Markup
from hcot_lmeval.trace import Policy


@dataclass(frozen=True)
class EngineOptions(ControlOptions):
    """How the engine runs; what it does beside the model's wish is in `ControlOptions`.

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
        compute: who computes a step: torch, the model's own modules; native, compiled code for models of the Llama
            kind on the CPU; or auto, the latter where it can (see `hcot_lmeval.engine.decoder.Decoder`).
        loop: who runs the steps: host; device, where tokens are chosen and thoughts pruned without the host (see
            `hcot_lmeval.engine.device`); or auto, the latter on CUDA for requests that it can serve.
        attention: who attends on the device: auto, or a name of `hcot_lmeval.engine.device.choice.NAMES`.
        reforward: how solutions are read again on the device: chunk, in one piece; replay, token by token beside the
            other rows; or auto, the former for few rows.
        graphs: on CUDA, capture each size of the batch as a graph; without, steps run one kernel at a time.
        compiled: compile the steps of the device with torch.compile, which takes minutes at first.
        run_ahead: steps that the device may be ahead of the host; by default as many as suit the number of rows.
        kv_dtype: dtype of keys and values in the slots: bfloat16, float16 or float8_e4m3fn (without scales); by default
            the one in which the model computes them. A smaller one lets more rows into memory and rounds.
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
    compute: Compute | str = Compute.AUTO
    loop: Literal["auto", "host", "device"] = "auto"
    attention: str = "auto"
    reforward: Literal["auto", "chunk", "replay"] = "auto"
    graphs: bool = True
    compiled: bool = False
    run_ahead: int | None = None
    kv_dtype: str | None = None
    self_check: bool = True
    poison: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.policy is not None and self.policy not in list(Policy):
            raise ValueError(f"policy={self.policy!r} is unknown; choose one of {', '.join(Policy)}")
        if self.compute not in list(Compute):
            raise ValueError(f"compute={self.compute!r} is unknown; choose one of {', '.join(Compute)}")
        if self.slots != "auto" and (not isinstance(self.slots, int) or self.slots < 1):
            raise ValueError(f"slots={self.slots!r} is not allowed; give a number of rows from 1 up, or 'auto'")
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                names = ", ".join(map(str, known))
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; choose one of {names}")
        for name in ("max_context", "max_position", "max_slots", "step_tokens", "run_ahead"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value!r} is not allowed; it has to be at least 1")


_CHOICES: dict[str, tuple[str | None, ...]] = {
    "loop": ("auto", "host", "device"),
    "reforward": ("auto", "chunk", "replay"),
    "kv_dtype": (None, *KV_DTYPES),
}


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
