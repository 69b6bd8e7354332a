"""How the engine runs: its options, checked before any memory is taken.

`ComputeOptions` change speed, memory and rounding, and never the rule.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from hcot_lmeval.ablation import Ablation
from hcot_lmeval.control import ControlOptions
from hcot_lmeval.engine.slots import KV_DTYPES
from hcot_lmeval.markup import MarkerIds, Markup
from hcot_lmeval.trace import Policy

AUTO = "auto"
SPEED_ALONE = ("weights", "huge_pages")
"""Options that change no bit of a result."""
ATTENTION = (AUTO, "flash-attn", "flash", "triton", "sdpa")
"""Who may attend in the device's loop; see `hcot_lmeval.engine.device.choice`."""


CHOICES: dict[str, tuple[str, ...]] = {
    "compute": (AUTO, "native", "torch"),
    "kv_dtype": (AUTO, *KV_DTYPES),
    "weights": (AUTO, "plain", "packed"),
    "loop": (AUTO, "host", "device"),
    "attention": ATTENTION,
    "reforward": (AUTO, "chunk", "replay"),
}
"""Options that have names, and the names."""
FLAGS = ("huge_pages", "graphs", "compiled", "any_policy", "prompt_acts", "self_check", "poison")
COUNTS = ("run_ahead", "max_context", "max_position", "max_slots", "step_tokens")


@dataclass(frozen=True)
class ComputeOptions:
    """Who computes, where and in what.

    Attributes:
        compute: who computes a step: ``torch``, the model's own modules; ``native``, compiled code for models of the
            Llama kind on the CPU; or ``auto``, the latter where it can (see `hcot_lmeval.engine.decoder.Decoder`).
            Tokens are chosen by kernels of this package, of any model and also on CUDA, unless it is ``torch``.
        kv_dtype: dtype of stored keys and values: ``bfloat16``, ``float16`` or ``float8_e4m3fn`` (without scales); or
            ``auto``, the one in which the model computes them. A smaller one lets more rows into memory and rounds.
        weights: how compiled code on the CPU reads float32 weights: ``plain``, as the model has them; ``packed``, from
            a copy in fewer bits that has the same values (`hcot_lmeval.engine.native.packing`) and serves a single
            row, or some of a checkpoint in bfloat16; or ``auto``, the latter where no more run at a time, it is faster
            and takes at most half of the free memory.
        huge_pages: on the CPU, keys and values lie on pages of 2 MiB where Linux has them, and compiled code copies the
            weights there (`hcot_lmeval.engine.native.pages`); they stay the model's parameters.
        loop: who runs the steps: ``host``; ``device``, where tokens are chosen and thoughts pruned without the host
            (see `hcot_lmeval.engine.device`); or ``auto``, the latter on CUDA for requests that it can serve.
        attention: who attends in the device's loop, one of `ATTENTION`; ``auto``: the first that can and is right.
        reforward: how solutions are read again in the device's loop: ``chunk``, in one piece; ``replay``, token by
            token beside the other rows; or ``auto``, the former for few rows.
        graphs: capture the steps of the device's loop as CUDA graphs, where there is CUDA.
        compiled: compile the steps of the device's loop with torch.compile, which takes minutes at first.
        run_ahead: steps that the device may be ahead of the host; None: as many as suit the number of rows.

    Raises:
        ValueError: a value is not allowed.
    """

    compute: str = AUTO
    kv_dtype: str = AUTO
    weights: str = AUTO
    huge_pages: bool = True
    loop: str = AUTO
    attention: str = AUTO
    reforward: str = AUTO
    graphs: bool = True
    compiled: bool = False
    run_ahead: int | None = None

    def __post_init__(self) -> None:
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; choose one of {', '.join(known)}")
        for name in FLAGS:
            if not isinstance(value := getattr(self, name, False), bool):
                raise ValueError(f"{name}={value!r} is neither true nor false; give one of them")
        for name in COUNTS:
            value = getattr(self, name, None)
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"{name}={value!r} is not allowed; give a whole number from 1 up, or leave it out")
        if self.weights == "packed" and self.compute == "torch":
            raise ValueError(
                "weights='packed' is for compiled steps, and compute='torch' switches them off; leave out one"
            )

    @property
    def computing(self) -> dict[str, Any]:
        """All these options by name."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(ComputeOptions)}


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
