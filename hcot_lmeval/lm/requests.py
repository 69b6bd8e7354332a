"""From lm-eval's instances to the engine's requests: generation kwargs, seeds, and a key for every request.

A request is wholly described by its `engine.Request`; two instances with the same `request_key` have the same result,
so it is computed once. Repeats of a sampled instance differ in their seed, repeats of a greedy one in nothing.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from types import NoneType
from typing import TYPE_CHECKING, Any

from lm_eval.models.utils import normalize_gen_kwargs

from hcot_lmeval.engine import Request, SamplingParams
from hcot_lmeval.errors import did_you_mean
from hcot_lmeval.provenance import digest

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

logger = logging.getLogger(__name__)

LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Names of the limit on generated tokens that lm-eval's models take."""

MINIMA = ("min_gen_toks", "min_new_tokens", "min_tokens")
"""The same for the lower limit."""

SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")

WHOLE = frozenset({"seed", "top_k", *LIMITS, *MINIMA})
"""Those that count something."""

GEN_KWARGS = frozenset({"until", "do_sample", "seed", "num_beams", *LIMITS, *MINIMA, *SAMPLING})
"""Every generation kwarg that a task or ``--gen_kwargs`` may name."""

ELSEWHERE = {
    **dict.fromkeys(("stop", "stop_strings", "stop_sequences"), "until"),
    **dict.fromkeys(("max_length", "max_output_tokens", "num_predict"), "max_gen_toks"),
    **dict.fromkeys(("min_length",), "min_gen_toks"),
    **dict.fromkeys(("repeat_penalty",), "repetition_penalty"),
}
"""Names that other programs, and lm-eval's own help, have for some of these."""

NEUTRAL: dict[str, Any] = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
"""Values under which these have no effect."""


UNSUPPORTED = (
    "no_repeat_ngram_size bad_words_ids suppress_tokens begin_suppress_tokens sequence_bias typical_p epsilon_cutoff "
    "eta_cutoff min_length min_new_tokens guidance_scale exponential_decay_length_penalty"
).split()
"""What a checkpoint's generation config may ask of ``model.generate``, and no request can ask of us."""


def warn_of_unsupported(config: Any) -> None:
    """Says what a generation config recommends that is not done."""
    found = {name: getattr(config, name, None) for name in UNSUPPORTED}
    asked = [f"{name}={value!r}" for name, value in found.items() if value not in (None, 0, 1, [])]
    if asked:
        logger.warning("the checkpoint's generation config recommends %s, which is not supported", ", ".join(asked))


class GenerationSettings:
    """Turns generation kwargs into sampling parameters.

    Args:
        max_gen_toks: limit on generated tokens where the kwargs name none.
        defaults: what the checkpoint recommends (its ``generation_config``) for some of `NEUTRAL`'s names.
        stop_id: maps a string to the id of the special token that spells it, or to None.
    """

    def __init__(
        self,
        max_gen_toks: int,
        defaults: Mapping[str, Any] | None = None,
        stop_id: Callable[[str], int | None] = lambda text: None,
    ) -> None:
        self.max_gen_toks = max_gen_toks
        self.defaults = {name: value for name, value in (defaults or {}).items() if value is not None}
        self.stop_id = stop_id

    def params(self, kwargs: Mapping[str, Any], seed: int = 0) -> SamplingParams:
        """Reads the generation kwargs of one request.

        ``do_sample`` false, or no temperature above 0, is greedy, as everywhere in lm-eval.

        Args:
            kwargs: of the request.
            seed: of its sampling noise; a greedy request has seed 0, for it has no noise.

        Raises:
            ValueError: a kwarg is unknown or has a value that is not allowed.
        """
        check_gen_kwargs(kwargs)
        given = {name: value for name, value in kwargs.items() if value is not None}
        normal: dict[str, Any] = dict(normalize_gen_kwargs(given, self.max_gen_toks))
        temperature = float(normal.get("temperature") or 0.0)
        if normal["do_sample"] and temperature == 0:
            raise ValueError("do_sample=True needs a temperature above 0, for example temperature=0.6")
        stop_strings, stop_ids = self._stops(normal["until"])
        return SamplingParams(
            max_gen_toks=normal["max_gen_toks"],
            min_gen_toks=int(next((normal[name] for name in MINIMA if normal.get(name) is not None), 0)),
            temperature=temperature,
            seed=seed if temperature else 0,
            stop_strings=stop_strings,
            stop_ids=stop_ids,
            **self._shaping(normal, sampled=temperature > 0),
        )

    def _shaping(self, kwargs: Mapping[str, Any], *, sampled: bool) -> dict[str, Any]:
        names = NEUTRAL if sampled else ("repetition_penalty",)
        chosen = {**NEUTRAL, **{name: self.defaults[name] for name in names if name in self.defaults}}
        chosen.update({name: kwargs[name] for name in names if kwargs.get(name) is not None})
        chosen["top_k"] = max(0, int(chosen["top_k"]))  # -1 is vLLM's way to switch it off
        return chosen

    def _stops(self, until: Iterable[str]) -> tuple[tuple[str, ...], tuple[int, ...]]:
        """Special tokens stop by their id, for they are not part of the text."""
        ids = {text: self.stop_id(text) for text in until if text}
        strings = tuple(text for text, i in ids.items() if i is None)
        return strings, tuple(sorted({i for i in ids.values() if i is not None}))


def check_gen_kwargs(kwargs: Mapping[str, Any]) -> None:
    """Raises `ValueError` for a generation kwarg that is not in `GEN_KWARGS` or has no value of its kind.

    That is, before lm-eval rounds or turns it into something else; ranges are `SamplingParams`' to check.
    """
    for name in kwargs:
        if name not in GEN_KWARGS:
            near = f"; did you mean {ELSEWHERE[name]}?" if name in ELSEWHERE else did_you_mean(name, GEN_KWARGS)
            raise ValueError(
                f"generation kwarg {name!r} is unknown{near or '.'} Allowed: {', '.join(sorted(GEN_KWARGS))}"
            )
    for name, value in kwargs.items():
        if name in WHOLE and not (value is None or (_is_number(value) and float(value).is_integer())):
            raise ValueError(f"generation kwarg {name}={value!r} is not a whole number")
        if name in SAMPLING and not (value is None or _is_number(value)):
            raise ValueError(f"generation kwarg {name}={value!r} is not a number")
    if not isinstance(kwargs.get("do_sample"), (bool, NoneType)):
        raise ValueError(f"generation kwarg do_sample={kwargs['do_sample']!r} is not one of true, false")
    until = kwargs.get("until") or ()
    if not all(isinstance(text, str) for text in (until if isinstance(until, list) else [until] if until else ())):
        raise ValueError(f"generation kwarg until={until!r} is neither a string nor a list of strings")
    if kwargs.get("num_beams", 1) not in (1, None):
        raise ValueError(
            f"num_beams={kwargs['num_beams']!r}: beam search is not supported; only num_beams=1 is allowed"
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def warn_of_unused_limit(max_gen_toks: int | None, instances: Iterable[Instance]) -> None:
    """Says so where a limit was given as a model argument, and every task names one of its own."""
    named = [{value for name in LIMITS if (value := i.args[1].get(name)) is not None} for i in instances]
    if max_gen_toks is not None and named and all(named) and any(limits != {max_gen_toks} for limits in named):
        logger.warning(
            "max_gen_toks=%d of the model arguments does nothing, for the tasks name limits of their own (%s); "
            "--gen_kwargs max_gen_toks=%d takes their place",
            max_gen_toks,
            ", ".join(map(str, sorted(set().union(*named)))),
            max_gen_toks,
        )


def repeat_indices(instances: Iterable[Instance]) -> Iterator[int]:
    """Yields for each entry which repeat of its instance it is.

    lm-eval lists an instance once per repeat, and under data parallelism appends its last instance again until all
    ranks have equally many; such padding counts as the repeats over again and so costs nothing.
    """
    seen: Counter[int] = Counter()
    for instance in instances:
        yield seen[id(instance)] % (instance.repeats or 1)
        seen[id(instance)] += 1


def instance_name(instance: Instance) -> str:
    """Returns the name of an instance's problem: task, document, and which request of the document."""
    return f"{instance.task_name}/{instance.doc_id}/{instance.idx}"


def request_seed(seed: Any, instance: Instance, repeat: int) -> int:
    """Returns the seed of one repeat: a function of (seed, task, document, repeat), so of nothing in the run's course.

    Returns:
        63 bits.
    """
    name = digest([seed, instance.task_name, instance.doc_id, instance.idx, repeat])
    return int(name[:16], 16) >> 1


def request_key(request: Request) -> str:
    """Returns a digest of what the model reads and of how it samples."""
    return digest([list(request.prompt_ids), asdict(request.params), request.thinking])
