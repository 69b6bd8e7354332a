"""The engines that are timed: what each has to do, and their names on the command line."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from bench.timing import Timing
from bench.work import GREEDY, Sampling, Work

OnLogits = Callable[[int, int, Any], None]
"""Called with (row, tokens generated so far, logits [vocabulary]) before each token; the logits are lent, not given."""


class UnavailableError(RuntimeError):
    """The engine cannot do this work on this machine; the message says why."""


@dataclass(frozen=True)
class Setting:
    """What an engine gets ready for.

    Attributes:
        model: a `Qwen2ForCausalLM`, which several engines share.
        work: the prompts, and the tokens to generate.
        threads: CPU threads.
        options: fields of `EngineOptions` for our own engines.
        sampling: how tokens are chosen.
        on_logits: sees all logits; for checks, not while time is taken.
    """

    model: Any
    work: Work
    threads: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)
    sampling: Sampling = GREEDY
    on_logits: OnLogits | None = None

    def show(self, row: int, generated: int, logits: Any) -> None:
        """Hands the logits of a row to `on_logits`, if there is one."""
        if self.on_logits is not None:
            self.on_logits(row, generated, logits)


class Contender:
    """An engine that gets ready once and then does the same work any number of times.

    Attributes:
        policy: what it does at the end of a block.
        forced: whether it generates the tokens of the script; if not, its own, and only their number is checked.

    Raises:
        UnavailableError: it cannot do this work here.
    """

    policy = "off"
    forced = True

    def __init__(self, setting: Setting) -> None:
        self.setting = setting

    def run(self) -> Timing:
        """Does the work once, and returns when the last token is there."""
        raise NotImplementedError

    def close(self) -> None:
        """Gives memory and files back."""


ENGINES: dict[str, tuple[str, dict[str, Any]]] = {
    "generate": ("hf.Generate", {}),
    "off": ("ours.Ours", {"policy": "off"}),
    "recompute": ("ours.Ours", {"policy": "recompute"}),
    "recompute+grammar": ("ours.Ours", {"policy": "recompute", "constraints": "grammar"}),
    "recompute+plain": ("ours.Ours", {"policy": "recompute", "weights": "plain"}),
    "evict": ("ours.Ours", {"policy": "evict"}),
    "resubmit": ("hf.Resubmit", {}),
    "continuous": ("hf.Continuous", {}),
    "llama.cpp": ("llama.Llama", {"flash": False}),
    "llama.cpp+flash": ("llama.Llama", {"flash": True}),
    "vllm": ("vllm.Vllm", {}),
}
"""Name -> module and class, and further arguments."""


def prepare(name: str, setting: Setting) -> Contender:
    """Makes an engine ready for its work.

    Raises:
        ValueError: there is no engine of this name.
        UnavailableError: it cannot do this work here; the message says why.
    """
    if name not in ENGINES:
        raise ValueError(f"there is no engine {name!r}; known are {', '.join(ENGINES)}")
    where, options = ENGINES[name]
    module, kind = where.split(".")
    contender: Contender = getattr(import_module(f"bench.engines.{module}"), kind)(setting, **options)
    return contender
