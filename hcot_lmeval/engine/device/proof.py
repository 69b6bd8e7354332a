"""The proof that comes before use: the device's loop decodes short traces beside the host's, and has to see the same.

Prompts of several lengths, forced traces with nested blocks, and tokens that are sampled behind them run in few slots,
so that slots are used again. The logits before every token are compared, then the tokens and the live contexts. A way
to run the loop that fails, with a fault or with wrong numbers, gives way to the next simpler one, as a warning says:

    as asked for, not compiled, without CUDA graphs, attention by `sdpa`, sampling by PyTorch, the host's loop

What passed on a GPU is remembered in a file, by model shape, dtype, card, driver, versions and code.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from hcot_lmeval.engine.decoder import CHECK_TOLERANCE, Decoder
from hcot_lmeval.engine.device.loop import OnLogits
from hcot_lmeval.engine.options import EngineOptions
from hcot_lmeval.engine.rows import Completion, Request
from hcot_lmeval.engine.sampling import SamplingParams, derive_seed, gumbel
from hcot_lmeval.markup import MarkerIds
from hcot_lmeval.provenance import code_digest, digest, driver, installed
from hcot_lmeval.store import JsonLines, StoreError, scan
from hcot_lmeval.trace import Policy

logger = logging.getLogger(__name__)


class Proof(NamedTuple):
    """What the trials found of a form.

    Attributes:
        fault: in words; empty if there is none.
        taken: bytes of the GPU that they took: kernels, workspaces, graphs, and little else.
    """

    fault: str
    taken: int = 0


TRIAL_ROWS = 3
"""Rows side by side, fewer than there are trials."""
FREE = 10
"""Tokens of a trial that the model chooses, behind those that are forced."""
SAMPLED_LOGITS = 4096
"""Logits of each token that are compared, spread over the vocabulary."""
SCHEMA = "hcot-proofs/1"
LIBRARIES = ("torch", "transformers", "triton", "flash-attn")
Try = Callable[[EngineOptions | None, OnLogits], list[Completion]]
"""Runs the trials in some way, None for the host's loop."""

_PROVED: dict[str, Proof] = {}
"""What this process has found: by the key of a form."""


def trials(markers: MarkerIds | None, text: Sequence[int]) -> list[Request]:
    """Returns the requests of the proof.

    Args:
        markers: of the notation, None for a model without.
        text: ids of ordinary tokens, some of them.
    """
    place = 0

    def words(count: int) -> list[int]:
        nonlocal place
        place += count
        return [text[(place - count + i) * 7 % len(text)] for i in range(count)]

    def block(*thought: list[int], solution: int) -> list[int]:
        if markers is None:
            return [token for part in thought for token in part] + words(solution)
        lead = [] if markers.lead is None else [markers.lead]
        inner = [token for part in thought for token in part]
        return [markers.open, *inner, markers.split, *lead, *words(solution), markers.close]

    nested = block(words(3), block(words(5), solution=2), words(2), block(words(1), solution=4), solution=3)
    traces = [
        (words(9), nested + words(2), 1.0),
        (words(3), block(words(6), solution=1), 0.0),
        (words(26), [], 0.8),
        (words(1), words(4) + block(words(2), solution=5) + block(words(8), solution=2), 1.3),
        (words(14), nested[: len(nested) // 2], 0.0),
    ]
    return [
        Request(
            f"trial {number}",
            tuple(prompt),
            SamplingParams(len(forced) + FREE, len(forced) + FREE, temperature, seed=number),
            forced_ids=tuple(forced),
        )
        for number, (prompt, forced, temperature) in enumerate(traces)
    ]


def facts_of(decoder: Decoder, policy: Policy, markers: MarkerIds | None) -> dict[str, Any]:
    """Returns what the proof depends on, beside how the loop is run, versions and code."""
    device = decoder.device
    return {
        "config": decoder.config.to_dict(),
        "dtype": str(decoder.model.dtype),
        "policy": policy.value,
        "markers": repr(markers),
        "device": str(torch.cuda.get_device_properties(device)) if device.type == "cuda" else "cpu",
        "cuda": torch.version.cuda,
        "driver": driver() if device.type == "cuda" else None,
    }


def forms(options: EngineOptions, kind: str) -> Iterator[tuple[str, EngineOptions]]:
    """Yields the ways to run the device's loop, the first as asked for, each simpler than the one before, by name."""
    form, name = options, "as asked for"
    yield name, form
    simpler: list[tuple[str, dict[str, Any]]] = [
        ("not compiled", {"compiled": False}),
        ("without CUDA graphs", {"graphs": False} if kind == "cuda" else {}),
        ("attention by sdpa", {"attention": "sdpa"} if options.attention == "auto" else {}),
        ("sampling by PyTorch", {"compute": "torch"}),
    ]
    for name, changes in simpler:
        changed = replace(form, **changes)
        if changed != form:
            form = changed
            yield name, form


def prove(
    options: EngineOptions, requests: Sequence[Request], run: Try, facts: Mapping[str, Any]
) -> tuple[EngineOptions | None, int]:
    """Returns the first way to run the device's loop that is right, None if the host's has to do, and what it takes.

    Args:
        options: as asked for.
        requests: of `trials`.
        run: runs them.
        facts: what the outcome depends on beside the options, versions and code.
    """
    kind = "cpu" if facts["device"] == "cpu" else "cuda"
    base = {**facts, "libraries": installed(LIBRARIES), "code": code_digest(graded=False)}
    expected: Seen | None = None
    for name, form in forms(options, kind):
        key = digest([repr(sorted(base.items())), repr(sorted(form.computing.items())), form.max_context])
        if key not in _PROVED and (taken := _remembered(kind).get(key)) is not None:
            _PROVED[key] = Proof("", taken)
        if key not in _PROVED:
            expected = expected or Seen.of(run, None)
            with watched_memory() as taken_now:
                fault, _ = fault_of(expected, requests, run, form)
            _PROVED[key] = Proof(fault, taken_now[0])
            if not fault:
                _remember(kind, key, taken_now[0])
        if not _PROVED[key].fault:
            return form, _PROVED[key].taken
        logger.warning(
            "the device's loop, %s, is not used: %s. The next simpler way is tried; `hcot doctor --out FILE` writes "
            "what a report needs",
            name,
            _PROVED[key].fault,
        )
    return None, 0


@contextmanager
def watched_memory() -> Iterator[list[int]]:
    """Notes what PyTorch takes of a GPU while it is open, at most; 0 without one."""
    taken = [0]
    if not torch.cuda.is_initialized():
        yield taken
        return
    torch.cuda.synchronize()
    before = torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    try:
        yield taken
    finally:
        taken[0] = max(0, torch.cuda.max_memory_reserved() - before)


class Seen:
    """What a run saw: its completions, and the logits before each token, some of them; all of those it chose by."""

    def __init__(self) -> None:
        self.done: dict[str, Completion] = {}
        self.logits: dict[tuple[str, int], torch.Tensor] = {}
        self.whole: dict[tuple[str, int], torch.Tensor] = {}

    @classmethod
    def of(cls, run: Try, form: EngineOptions | None) -> Seen:
        """Runs the trials and keeps what they saw."""
        seen = cls()
        for completion in run(form, seen.take):
            seen.done[completion.request.id] = completion
        return seen

    def take(self, request: Request, sample: int, count: int, logits: torch.Tensor) -> None:
        """Keeps the logits [vocabulary] before the token number `count`."""
        kept = logits.detach().to("cpu", copy=True)
        self.logits[request.id, count] = kept[:: max(1, len(kept) // SAMPLED_LOGITS)]
        if count >= len(request.forced_ids):
            self.whole[request.id, count] = kept


def fault_of(
    expected: Seen, requests: Sequence[Request], run: Try, form: EngineOptions | None, *, rounds: str | None = None
) -> tuple[str, Seen]:
    """Returns what is wrong with a way to decode, in words, empty if nothing is; and what it saw.

    Args:
        expected: of another way.
        requests: of `trials`.
        run: runs them.
        form: the way.
        rounds: a type that keys and values are rounded to, which allows for more.
    """
    dtype = None if rounds is None else getattr(torch, rounds)
    try:
        found = Seen.of(run, form)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of any library that takes part
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", Seen()
    return next(filter(None, (_difference(expected, found, each, dtype) for each in requests)), ""), found


def largest(expected: Seen, found: Seen) -> float | None:
    """Returns the largest difference of a logit, relative to the largest, as long as the tokens are the same."""
    differences = []
    for name, one in expected.done.items():
        other = found.done.get(name)
        for count in range(_same(one, other) if other else 0):
            a, b = expected.logits[name, count].double(), found.logits[name, count].double()
            differences.append(float((a - b).abs().max() / a.abs().max().clamp_min(1e-6)))
    return max(differences, default=None)


def _same(one: Completion, other: Completion) -> int:
    """How many tokens two completions begin with alike."""
    pairs = zip(one.token_ids, other.token_ids, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(one.token_ids), len(other.token_ids)))


def _difference(expected: Seen, found: Seen, request: Request, dtype: torch.dtype | None) -> str:
    """What is wrong in one trial."""
    if request.id not in found.done:
        return f"{request.id} did not end"
    one, other = expected.done[request.id], found.done[request.id]
    same, both = _same(one, other), min(len(one.token_ids), len(other.token_ids))
    for count in range(min(same + 1, both)):
        told = _off(expected.logits[request.id, count], found.logits.get((request.id, count)), dtype)
        if told:
            return f"after {count} tokens of {request.id} {told}"
    if same < both:
        right, chosen = one.token_ids[same], other.token_ids[same]
        if _is_tie(expected.whole.get((request.id, same)), request, same, (right, chosen), dtype):
            return ""  # what comes behind is another text
        return f"it chose token {chosen} in place of {right} as number {same} of {request.id}"
    if (one.token_ids, one.live_ids, one.finish_reason) != (other.token_ids, other.live_ids, other.finish_reason):
        return f"{request.id} left another live context ({len(other.live_ids)} tokens in place of {len(one.live_ids)})"
    return ""


ROUNDED = 0.2
"""Largest difference allowed of a logit where keys and values are rounded to 16 bits, relative to the largest one;
measured are 6e-2 on tiny-hcot in bfloat16, which has met no such traces."""


def tolerance_of(dtype: torch.dtype, *, rounded: bool = False) -> float:
    """Returns the largest difference of a logit that is allowed, relative to the largest one."""
    return CHECK_TOLERANCE.get(dtype, ROUNDED if rounded else 5e-2)


def _off(expected: torch.Tensor, found: torch.Tensor | None, dtype: torch.dtype | None) -> str:
    if found is None:
        return "it saw no logits"
    if not bool(found.isfinite().all()):
        return "its logits are NaN or infinite"
    difference = float((expected.double() - found.double()).abs().max() / expected.double().abs().max().clamp_min(1e-6))
    most = tolerance_of(dtype or expected.dtype, rounded=dtype is not None)
    return "" if difference <= most else f"its logits are off by {difference:.1e} of the largest (allowed: {most:.0e})"


def _is_tie(
    logits: torch.Tensor | None,
    request: Request,
    count: int,
    tokens: tuple[int, int],
    dtype: torch.dtype | None = None,
) -> bool:
    """Whether rounding can decide between two tokens; with a forced token nothing can."""
    if logits is None:
        return False
    params, scores = request.params, logits.double()
    room = 2 * tolerance_of(dtype or logits.dtype, rounded=dtype is not None) * float(scores.abs().max())
    if params.temperature > 0:
        noise = gumbel([derive_seed(params.seed, 0)], [count], len(scores), scores.device)[0]
        scores, room = scores / params.temperature + noise, room / params.temperature
    first, second = scores[list(tokens)].tolist()
    return abs(first - second) <= room


# --- what was found before --------------------------------------------------------------------------------------------


def _file() -> Path:
    cache = os.environ.get("HCOT_LMEVAL_CACHE")
    return (Path(cache) if cache else Path.home() / ".cache" / "hcot_lmeval") / "proofs.jsonl"


def _remembered(kind: str) -> dict[str, int]:
    """The keys that passed here before; on a CPU nothing is remembered, for the proof takes no time there."""
    if kind == "cpu":
        return {}
    try:
        return {record["key"]: record["taken"] for _, record in scan(_file()) if "key" in record}
    except (OSError, StoreError, RuntimeError, KeyError):
        return {}


def _remember(kind: str, key: str, taken: int) -> None:
    if kind == "cpu":
        return
    try:
        with JsonLines(_file(), header={"schema": SCHEMA}) as store:
            store.append({"key": key, "taken": taken})
    except (OSError, StoreError, RuntimeError) as error:  # no home that can be written: proved anew next time
        logger.info("the proof of the device's loop is not remembered: %s", error)
