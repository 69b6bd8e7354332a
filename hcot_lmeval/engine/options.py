"""How the engine runs: its options, checked before any memory is taken.

`ComputeOptions` change speed, memory and rounding, and never the rule.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal

import torch

from hcot_lmeval.ablation import Ablation
from hcot_lmeval.control import ControlOptions
from hcot_lmeval.engine.slots import KV_DTYPES
from hcot_lmeval.errors import FLAG, Allowed, check_values, one_of, whole_number
from hcot_lmeval.markup import MarkerIds, Markup
from hcot_lmeval.trace import Policy

AUTO = "auto"
SPEED_ALONE = ("weights", "huge_pages")
"""Options that change no bit of a result."""
ATTENTION = (AUTO, "flash-attn", "flash", "triton", "sdpa")
"""Who may attend in the device's loop; see `hcot_lmeval.engine.device.choice`."""


COMPUTING: dict[str, Allowed] = {
    "compute": one_of(AUTO, "native", "torch"),
    "kv_dtype": one_of(AUTO, *KV_DTYPES),
    "weights": one_of(AUTO, "plain", "packed"),
    "huge_pages": FLAG,
    "loop": one_of(AUTO, "host", "device"),
    "attention": one_of(*ATTENTION),
    "reforward": one_of(AUTO, "chunk", "replay"),
    "graphs": FLAG,
    "compiled": FLAG,
    "run_ahead": whole_number(1, optional=True),
}
"""Fields of `ComputeOptions`, and what is allowed of each."""


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
            weights there (`hcot_lmeval.engine.slots`); they stay the model's parameters.
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
        check_values(self, COMPUTING)
        if self.weights == "packed" and self.compute == "torch":
            raise ValueError(
                "weights='packed' is for compiled steps, and compute='torch' switches them off; leave out one"
            )

    def check_loop(self, device: str) -> None:
        """Raises `ValueError` for an option of the device's loop where only the host's loop can run."""
        if self.loop == "device" or (self.loop == AUTO and device != "cpu"):
            return
        usual = ComputeOptions()
        for name in ("attention", "reforward", "compiled", "run_ahead"):
            if (value := getattr(self, name)) != getattr(usual, name):
                where = "loop='host'" if self.loop == "host" else "the CPU"
                raise ValueError(f"{name}={value!r} is of the device's loop and does nothing on {where}; leave it out")

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
    eos_ids: Collection[int] | None = None
    think: tuple[str, str] | Literal["markup"] | None = "markup"
    think_ids: tuple[int | None, int | None] | None = None
    prompt_acts: bool = False
    step_tokens: int | None = None
    self_check: bool = True
    poison: bool = False

    def __post_init__(self) -> None:
        ControlOptions.__post_init__(self)
        ComputeOptions.__post_init__(self)
        check_values(self, RUNNING)


def _is_id(value: Any) -> bool:
    return type(value) is not bool and isinstance(value, Integral) and int(value) >= 0


def _is_think(value: Any) -> bool:
    pair = isinstance(value, (tuple, list)) and len(value) == 2
    return value is None or value == "markup" or (pair and all(isinstance(text, str) and text for text in value))


def _are_think_ids(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and len(value) == 2 and all(i is None or _is_id(i) for i in value)


def _are_ids(value: Any) -> bool:
    return isinstance(value, Collection) and not isinstance(value, (str, bytes)) and all(map(_is_id, value))


def _optional(fits: Callable[[Any], bool], words: str) -> Allowed:
    return lambda value: value is None or fits(value), f"{words}, or leave it out"


RUNNING: dict[str, Allowed] = {
    "policy": one_of(*Policy, None),
    "markup": _optional(lambda value: isinstance(value, (str, Markup)), "give the name of a notation"),
    "markers": _optional(lambda value: isinstance(value, MarkerIds), "give a MarkerIds"),
    "ablation": _optional(lambda value: isinstance(value, (str, Ablation)), "give the name of an ablation"),
    **dict.fromkeys(("any_policy", "prompt_acts", "self_check", "poison"), FLAG),
    **dict.fromkeys(("max_context", "max_position", "step_tokens"), whole_number(1, optional=True)),
    "max_slots": whole_number(1),
    "slots": (
        lambda value: value == "auto" or (type(value) is int and value >= 1),
        "give a number of rows from 1 up, or 'auto'",
    ),
    "eos_ids": _optional(_are_ids, "give a list of token ids, such as [2]"),
    "think": (_is_think, "give the two strings around the thinking, such as ('<think>', '</think>'), 'markup' or None"),
    "think_ids": _optional(_are_think_ids, "give two token ids, None for a string that is not one token"),
}
"""Fields of `EngineOptions`, and what is allowed of each."""


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
    if "closing_tokens" in options and options.get("force_answer") is None:
        raise ValueError(
            f"closing_tokens={options['closing_tokens']} does nothing without force_answer; add it, or leave it out"
        )
    return EngineOptions(**options)


def check_device(device: Any) -> None:
    """Raises `ValueError` for a device that this machine does not have."""
    found = torch.accelerator.current_accelerator(check_available=True)
    kind, count = ("cpu", 0) if found is None else (found.type, torch.accelerator.device_count())
    allowed = ("cpu", *([kind] if count else []), *(f"{kind}:{index}" for index in range(count)))
    if str(device) not in allowed:
        raise ValueError(f"device={str(device)!r} is not in this machine, which has {', '.join(allowed)}")
