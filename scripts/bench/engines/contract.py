"""What an engine has to do to be timed: get ready once, then do the same work any number of times."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

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


class Contender(Protocol):
    """An engine that is ready.

    Attributes:
        policy: what it does at the end of a block.
        forced: whether it generates the tokens of the script; if not, its own, and only their number is checked.
    """

    policy: str
    forced: bool

    def run(self) -> Timing:
        """Does the work once, and returns when the last token is there."""
        ...

    def close(self) -> None:
        """Gives memory and files back."""
        ...
