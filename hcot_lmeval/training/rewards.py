"""Rewards of completions: plain functions with TRL's signature, and their weighted sum.

    correctness(prompts, completions, completion_ids, answer=[...], response=[...]) -> [1.0, 0.0, None, ...]

Each takes a list with an entry for each completion, whatever columns it names, and returns a list of numbers within
0..1, or None where there is nothing to tell. The columns beside those of the data set come from the rollout
(`hcot_lmeval.training.rollout`), for TRL hands a reward the text without its markers:

    response   `Response`: the answer part, with .thinking, .raw, .finish_reason and .stats
    shape      `Shape`: blocks, illegal markers, peak and area of the live context
    limits     (live tokens, generated tokens) that a completion may have

A reward of one's own is a function of a module within reach, named ``module:function`` in the settings.
"""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hcot_lmeval import answers
from hcot_lmeval.errors import did_you_mean
from hcot_lmeval.events import COMPLETE
from hcot_lmeval.response import Response
from hcot_lmeval.training.rollout import Block, Shape

Reward = Callable[..., list[float | None]]
BAND = (0.02, 0.6)
"""Tokens of a solution per token of its thought that are a summary: less says nothing, more is a copy."""
SHORTEST = 4
"""Tokens below which a thought is no thought."""


def correctness(
    prompts: Sequence[Any], completions: Sequence[Any], *, answer: Sequence[str], response: Sequence[Response], **_: Any
) -> list[float | None]:
    """1 if the answer is right by the checker of the tasks, 0 if not, None where it cannot be checked."""
    grades = [answers.grade(said, gold).correct for said, gold in zip(response, answer, strict=True)]
    return [None if correct is None else float(correct) for correct in grades]


def structure(
    prompts: Sequence[Any], completions: Sequence[Any], *, shape: Sequence[Shape], **_: Any
) -> list[float | None]:
    """The share of markers that are legal, halved if a block is left open; 0 without a block."""
    return [
        (1 - each.illegal / each.markers) * (0.5 if each.unclosed else 1.0) if each.blocks or each.unclosed else 0.0
        for each in shape
    ]


def compression(
    prompts: Sequence[Any], completions: Sequence[Any], *, shape: Sequence[Shape], **_: Any
) -> list[float | None]:
    """How well solutions sum their thoughts up, a mean over the blocks; 0 without a block.

    A block counts 1 if its solution has between `BAND` of the tokens of its thought, falling to 0 at none and at a
    copy. One whose thought is shorter than `SHORTEST`, or that came before, counts 0.
    """
    return [sum(map(_summary, each.blocks)) / max(1, len(each.blocks)) for each in shape]


def _summary(block: Block) -> float:
    if block.copied or block.thought < SHORTEST or not block.solution:
        return 0.0
    low, high = BAND
    share = block.solution / block.thought
    return min(1.0, share / low) if share < high else max(0.0, (1 - share) / (1 - high))


def peak(
    prompts: Sequence[Any], completions: Sequence[Any], *, shape: Sequence[Shape], limits: Sequence[Any], **_: Any
) -> list[float | None]:
    """The share of the context window that was never used."""
    return [max(0.0, 1 - each.peak / most) for each, (most, _) in zip(shape, limits, strict=True)]


def area(
    prompts: Sequence[Any], completions: Sequence[Any], *, shape: Sequence[Shape], limits: Sequence[Any], **_: Any
) -> list[float | None]:
    """The share of the context window that was free, a mean over the generated tokens."""
    return [max(0.0, 1 - each.area / most) for each, (most, _) in zip(shape, limits, strict=True)]


def length(
    prompts: Sequence[Any], completions: Sequence[Any], *, shape: Sequence[Shape], limits: Sequence[Any], **_: Any
) -> list[float | None]:
    """The share of the budget of generated tokens that was left."""
    return [max(0.0, 1 - each.generated / most) for each, (_, most) in zip(shape, limits, strict=True)]


def depth(
    prompts: Sequence[Any], completions: Sequence[Any], *, shape: Sequence[Shape], **_: Any
) -> list[float | None]:
    """How deep blocks are nested: 1 - 1 / (1 + deepest), so 0, 1/2, 2/3, ..."""
    return [1 - 1 / (1 + max((block.depth for block in each.blocks), default=0)) for each in shape]


def form(
    prompts: Sequence[Any], completions: Sequence[Any], *, response: Sequence[Response], **_: Any
) -> list[float | None]:
    """1 if the completion ended by itself with a boxed answer behind its thinking, else 0."""
    return [float(said.finish_reason in COMPLETE and answers.extract_answer(said) is not None) for said in response]


REWARDS: Mapping[str, Reward] = {
    each.__name__: each for each in (correctness, structure, compression, peak, area, length, depth, form)
}
"""The rewards by name."""


class WeightedSum:
    """The sum of several rewards, as one with TRL's signature, which logs each of them.

    A completion whose correctness cannot be told has no reward, so that it is left out of its group and not wrong.
    Where correctness counts, the others count for right answers alone: in a group without any, GRPO would scale up the
    small difference between wrong answers, and teach to be wrong in few tokens (seen: 61 % solved became 28 %).

    Args:
        weights: name, or ``module:function``, to weight.
        folder: where modules of one's own are looked for first.

    Raises:
        ValueError: a name is unknown, a module or function is not there, or no weight is other than 0.
    """

    __name__ = "reward"

    def __init__(self, weights: Mapping[str, float], folder: Path | str = ".") -> None:
        if not any(weights.values()):
            raise ValueError(f"rewards={dict(weights)!r} rewards nothing; give one of {', '.join(REWARDS)} a weight")
        for name, weight in weights.items():
            if not math.isfinite(weight):
                raise ValueError(f"rewards.{name}={weight} is no weight; give a number")
        self.weights = dict(weights)
        self.functions = {name: find_reward(name, folder) for name in weights}

    def parts(
        self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any
    ) -> dict[str, list[float | None]]:
        """Returns each reward for each completion.

        Raises:
            ValueError: one returned something else than a number or None for each completion.
        """
        found: dict[str, list[float | None]] = {}
        for name, function in self.functions.items():
            try:
                values = function(prompts=prompts, completions=completions, **columns)
            except Exception as error:
                if name in REWARDS:
                    raise
                raise ValueError(
                    f"rewards.{name} raised {type(error).__name__}: {error}; it gets prompts, completions, "
                    f"{', '.join(columns)} as keywords, a list of an entry for each completion each"
                ) from error
            found[name] = _checked(name, values, len(completions))
        return found

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], log_metric: Any = None, **columns: Any
    ) -> list[float | None]:
        """Returns the weighted sum for each completion, and logs the mean of each part."""
        parts = self.parts(prompts, completions, **columns)
        for name, values in parts.items():
            known = [value for value in values if value is not None]
            if log_metric is not None and known:
                log_metric(f"rewards/{name}", sum(known) / len(known))
        return [self.total({name: values[i] for name, values in parts.items()}) for i in range(len(completions))]

    def total(self, parts: Mapping[str, float | None]) -> float | None:
        """Returns the weighted sum of the parts of one completion; None if its correctness cannot be told."""
        right = parts.get("correctness", 1.0)
        if right is None:
            return None
        known = [self.weights[name] * value for name, value in parts.items() if value is not None]
        return right * sum(known) if known else None


def find_reward(name: str, folder: Path | str = ".") -> Reward:
    """Returns the reward of a name, or the function ``module:function``.

    Raises:
        ValueError: there is none.
    """
    module, colon, attribute = name.partition(":")
    if not colon:
        if name not in REWARDS:
            near = did_you_mean(name, REWARDS)
            known = f"there are {', '.join(REWARDS)}, and module:function for your own"
            raise ValueError(f"rewards.{name} is unknown{near or ';'} {known}")
        return REWARDS[name]
    sys.path.insert(0, str(folder))
    try:
        found = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # of code that is not ours
        raise ValueError(
            f"rewards.{name} cannot be imported: {type(error).__name__}: {error}; name a function of a module beside "
            "the settings, or on PYTHONPATH"
        ) from error
    finally:
        sys.path.remove(str(folder))
    if not callable(found):
        raise ValueError(f"rewards.{name} is {found!r:.60}, which is no function")
    return found


def _checked(name: str, values: Any, count: int) -> list[float | None]:
    if not isinstance(values, (list, tuple)) or len(values) != count:
        raise ValueError(f"rewards.{name} returned {values!r:.80}; return a list of {count}, one for each completion")
    try:
        found = [None if value is None else float(value) for value in values]
    except (TypeError, ValueError):
        found = [math.nan]
    if any(value is not None and not math.isfinite(value) for value in found):
        raise ValueError(f"rewards.{name} returned {values!r:.80}; return a finite number or None for each completion")
    return found
