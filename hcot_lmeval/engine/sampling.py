"""From logits to tokens, reproducibly.

The noise of a sample depends on the request's seed and on how many tokens the row has generated, and on nothing else:
not on its neighbours, the batch size, the position in a pruned context, or the order of requests. It is made by a hash
of (seed, tokens generated, token id), so that it exists for any row at any time without a generator's state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch

from hcot_lmeval.errors import Allowed, check_values

GOLDEN = 0x9E3779B97F4A7C15
_MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1))
"""Shifts and factors of SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014)."""
_MASK = 2**64 - 1

LEAST = 1e-20
"""The least temperature and top-p: with less, what is computed of them in float32 may leave its range."""


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen and when a row ends.

    Attributes:
        max_gen_toks: most tokens to generate, pruned ones and the end token included.
        min_gen_toks: end tokens, stop ids and stop strings are inactive before that many tokens.
        temperature: divides the logits; 0 takes the most likely token.
        top_k: sample among the k most likely tokens; 0 is off.
        top_p: sample among the most likely tokens whose probabilities add up to top_p; 1 is off.
        min_p: sample among tokens at least min_p times as likely as the most likely one; 0 is off.
        repetition_penalty: above 1 makes every token of the prompt and of the whole trace less likely, pruned or not
            (arXiv 1909.05858); 1 is off.
        seed: of the sampling noise.
        stop_strings: text that ends the row when it appears in the answer part; it is cut from the text.
        stop_ids: token ids that end the row like the end token.
        logprobs: record the log-probability of each token under softmax(logits / temperature), before top-k, top-p and
            min-p (at temperature 0: under softmax(logits)).
        n: samples of this prompt; the first has the noise of `seed`, the others of seeds derived from it.

    Raises:
        ValueError: a value is outside its range.
    """

    max_gen_toks: int = 256
    min_gen_toks: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop_strings: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    logprobs: bool = False
    n: int = 1

    def __post_init__(self) -> None:
        check_values(self, SAMPLING)
        if self.min_gen_toks > self.max_gen_toks:
            limit = f"max_gen_toks={self.max_gen_toks}"
            raise ValueError(f"min_gen_toks={self.min_gen_toks} is not allowed; it has to be within 0..{limit}")


def _number(kind: type, least: float, most: float, words: str, *, zero: bool = False) -> Allowed:
    def fits(value: Any) -> bool:
        is_number = isinstance(value, kind) and not isinstance(value, bool)
        return is_number and ((zero and value == 0) or least <= value <= most)

    return fits, f"it has to be {words}"


def _list(kind: type, words: str) -> Allowed:
    def fits(value: Any) -> bool:
        listed = isinstance(value, Collection) and not isinstance(value, str)
        return listed and all(isinstance(v, kind) and not isinstance(v, bool) and v != "" for v in value)

    return fits, f"it has to be {words}"


_RANGE = f"[{LEAST:g}, {1 / LEAST:g}]"
SAMPLING: dict[str, Allowed] = {
    "max_gen_toks": _number(Integral, 1, math.inf, "a whole number, at least 1"),
    "min_gen_toks": _number(Integral, 0, math.inf, "a whole number, at least 0"),
    "temperature": _number(Real, LEAST, 1 / LEAST, f"a number: 0 (greedy), or within {_RANGE}", zero=True),
    "top_k": _number(Integral, 0, 2**63 - 1, "a whole number within 0..2^63 - 1 (0 is off)"),
    "top_p": _number(Real, LEAST, 1, f"a number within [{LEAST:g}, 1] (1 is off)"),
    "min_p": _number(Real, 0, 1, "a number within [0, 1] (0 is off)"),
    "repetition_penalty": _number(Real, 1e-6, 1e6, "a number within [1e-06, 1e+06] (1 is off)"),
    "seed": _number(Integral, -math.inf, math.inf, "a whole number"),
    "n": _number(Integral, 1, math.inf, "a whole number, at least 1"),
    "stop_strings": _list(str, "a list of strings, none of them empty"),
    "stop_ids": _list(Integral, "a list of token ids"),
}
"""Fields of `SamplingParams`, and what is allowed of each."""


class Choice(NamedTuple):
    """A sampled token.

    Attributes:
        token: its id.
        logprob: its log-probability (see `SamplingParams.logprobs`; NaN when not asked for).
        legal_logprob: the same, given that no illegal token may come: 0 where only this one may.
        preferred: the token that would have come had all been legal and none forced.
    """

    token: int
    logprob: float = math.nan
    legal_logprob: float = math.nan
    preferred: int | None = None


class Draw(NamedTuple):
    """One row to sample for.

    Attributes:
        params: of its request.
        seed: of this sample.
        generated: tokens the row has generated so far.
        banned: ids that may not be chosen now; to the model's distribution they do not belong.
        seen: ids of the prompt and the trace so far; needed with a repetition penalty only.
        forced: the token to take whatever the scores, or None.
        illegal: ids that may not be chosen though the distribution holds them.
        only: the one id that is legal, or None.
    """

    params: SamplingParams
    seed: int
    generated: int
    banned: tuple[int, ...] = ()
    seen: Sequence[int] = ()
    forced: int | None = None
    illegal: Collection[int] = ()
    only: int | None = None


Chooser = Callable[[torch.Tensor, Sequence[Draw]], list[int]]
"""A faster `choose` for draws without illegal tokens: from logits [rows, vocabulary] and draws to tokens."""


def sample(logits: torch.Tensor, draws: Sequence[Draw], chooser: Chooser | None = None) -> list[Choice]:
    """Chooses one token a row.

    Illegal tokens are left out last, behind top-k, top-p, min-p and the noise: where the free choice is legal, it is
    the choice. If nothing legal is left among the most likely tokens, the choice is made among all legal ones.

    Args:
        logits: [rows, vocabulary], float32 or float64.
        draws: one for each row.
        chooser: takes the place of `choose` where the free choice is legal.
    """
    scores = penalised(logits, draws)
    tokens, preferred = choose(scores, draws) if chooser is None else _chosen_by(chooser, scores, draws)
    for row, draw in enumerate(draws):
        if draw.forced is not None or draw.only is not None:
            tokens[row] = draw.only if draw.forced is None else draw.forced  # type: ignore[assignment]
    if not any(draw.params.logprobs for draw in draws):
        return [Choice(token, preferred=free) for token, free in zip(tokens, preferred, strict=True)]
    scaled = _over_temperature(scores, draws)
    logprobs = zip(_logprobs(scaled, tokens), _legal_logprobs(scaled, tokens, draws), strict=True)
    return [Choice(token, *pair, free) for token, pair, free in zip(tokens, logprobs, preferred, strict=True)]


def _chosen_by(chooser: Chooser, logits: torch.Tensor, draws: Sequence[Draw]) -> tuple[list[int], list[int]]:
    """What `choose` returns; rows where the chooser takes an illegal token are left to it."""
    preferred = chooser(logits, draws)
    tokens = list(preferred)
    again = [row for row, draw in enumerate(draws) if tokens[row] in draw.illegal]
    if again:
        found, _ = choose(logits[again], [draws[row] for row in again])
        for row, token in zip(again, found, strict=True):
            tokens[row] = token
    return tokens, preferred


def _over_temperature(logits: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    """Divides by the temperatures, 0 counting as 1; no copy is made if all are 1."""
    temperatures = [draw.params.temperature or 1.0 for draw in draws]
    if all(temperature == 1 for temperature in temperatures):
        return logits
    return logits / torch.tensor(temperatures, device=logits.device, dtype=logits.dtype)[:, None]


def choose(logits: torch.Tensor, draws: Sequence[Draw]) -> tuple[list[int], list[int]]:
    """Returns the best legal token of each row, and the best one whether legal or not.

    Args:
        logits: [rows, vocabulary], with penalties and bans.
        draws: one for each row.
    """
    scaled, tokens, preferred = _over_temperature(logits, draws), [0] * len(draws), [0] * len(draws)
    for sampled in (False, True):
        rows = [row for row, draw in enumerate(draws) if (draw.params.temperature > 0) == sampled]
        if not rows:
            continue
        kept = scores = scaled[rows] if len(rows) < len(draws) else scaled
        chosen = [draws[row] for row in rows]
        if sampled:
            noise = gumbel([d.seed for d in chosen], [d.generated for d in chosen], scores.shape[-1], scores.device)
            kept, scores = truncated(scores, [d.params for d in chosen]) + noise, scores + noise
        for index, (row, free) in enumerate(zip(rows, kept.argmax(-1).tolist(), strict=True)):
            preferred[row] = tokens[row] = free
            if free in draws[row].illegal:
                tokens[row] = _best_legal(kept[index], scores[index], draws[row].illegal)
    return tokens, preferred


def _best_legal(kept: torch.Tensor, scores: torch.Tensor, illegal: Collection[int]) -> int:
    """The best of the tokens that truncation keeps; if none of them is legal, of all: both [vocabulary]."""
    ids = torch.tensor(list(illegal), device=kept.device)
    legal = kept.index_fill(0, ids, -math.inf)
    token = int(legal.argmax())
    return token if legal[token] > -math.inf else int(scores.index_fill(0, ids, -math.inf).argmax())


def _logprobs(scaled: torch.Tensor, tokens: Sequence[int]) -> list[float]:
    chosen = torch.tensor(tokens, device=scaled.device)[:, None]
    return scaled.log_softmax(-1).gather(1, chosen)[:, 0].tolist()


def _legal_logprobs(scaled: torch.Tensor, tokens: Sequence[int], draws: Sequence[Draw]) -> list[float]:
    """Log-probabilities under the distribution without the illegal tokens."""
    if any(draw.illegal for draw in draws):
        scaled = scaled.clone()
        for row, draw in enumerate(draws):
            scaled[row, list(draw.illegal)] = -math.inf
    found = _logprobs(scaled, tokens)
    for row, (token, draw) in enumerate(zip(tokens, draws, strict=True)):
        if draw.only is not None:
            found[row] = 0.0 if token == draw.only else -math.inf
    return found


def penalised(logits: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    """Applies repetition penalties and bans; a copy is made only if there are any."""
    if not any(draw.banned or draw.params.repetition_penalty != 1 for draw in draws):
        return logits
    logits = logits.clone()
    for row, draw in enumerate(draws):
        penalty = draw.params.repetition_penalty
        if penalty != 1:
            seen = torch.tensor(sorted(set(draw.seen)), device=logits.device)
            scores = logits[row, seen]
            logits[row, seen] = torch.where(scores < 0, scores * penalty, scores / penalty)
        if draw.banned:
            logits[row, list(draw.banned)] = float("-inf")
    return logits


def truncated(scores: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """Top-k, then top-p, then min-p, the order of transformers: [rows, vocabulary], removed entries are -inf."""
    if all(p.top_k == 0 and p.top_p == 1 and p.min_p == 0 for p in params):
        return scores
    top_k = torch.tensor([p.top_k or scores.shape[-1] for p in params], device=scores.device)
    top_p = torch.tensor([p.top_p for p in params], device=scores.device, dtype=scores.dtype)
    min_p = torch.tensor([p.min_p for p in params], device=scores.device, dtype=scores.dtype)
    return truncate(scores, top_k, top_p, min_p)


def truncate(scores: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor) -> torch.Tensor:
    """Top-k, then top-p, then min-p, with static shapes and without a read by the host.

    Args:
        scores: [rows, vocabulary].
        top_k: int64 [rows]; the vocabulary's size is off.
        top_p: [rows], in the type of the scores; 1 is off.
        min_p: [rows], in the type of the scores; 0 is off.

    Returns:
        [rows, vocabulary]; removed entries are -inf.
    """
    top_k, top_p, min_p = top_k[:, None], top_p[:, None], min_p[:, None]
    ordered, order = scores.sort(dim=-1, descending=True, stable=True)
    keep = torch.arange(scores.shape[-1], device=scores.device) < top_k
    probabilities = ordered.masked_fill(~keep, float("-inf")).softmax(-1)
    keep &= (probabilities.cumsum(-1) - probabilities < top_p) | (top_p >= 1)
    probabilities = ordered.masked_fill(~keep, float("-inf")).softmax(-1)
    keep &= probabilities >= min_p * probabilities[:, :1]
    return torch.full_like(scores, float("-inf")).scatter(1, order, ordered.masked_fill(~keep, float("-inf")))


def gumbel(seeds: Sequence[int], counts: Sequence[int], size: int, device: torch.device) -> torch.Tensor:
    """Standard Gumbel noise, a pure function of (seed, count, token id): float64 [rows, size].

    ``argmax(scores + noise)`` is a sample of softmax(scores) (Gumbel 1954; "Gumbel-max").
    """
    starts = [noise_start(seed, count) for seed, count in zip(seeds, counts, strict=True)]
    return hashed_noise(torch.tensor(starts, device=device), hash_places(size, device))


def noise_start(seed: int, generated: int) -> int:
    """Returns where the hash of a row's noise starts after so many tokens: an int64."""
    return signed(derive_seed(seed, generated + 1))


def hash_places(size: int, device: torch.device) -> torch.Tensor:
    """What each token id adds to the hash of a sample: int64 [size].

    To be made outside of compiled code: `torch.compile` takes the product of an index for another index, which does not
    overflow. Its C++ then never leaves the loop; its Triton code has 32 bits for it and is refused (torch 2.11, 2.13).
    """
    return torch.arange(1, size + 1, device=device) * signed(GOLDEN)


def hashed_noise(starts: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise of rows whose hashes start at `starts`, int64 [rows]: float64 [rows, len(places)]."""
    bits = starts[:, None] + places
    uniform = (_shifted(mixed(bits), 11).double() + 0.5) * 2.0**-53
    return -torch.log(-torch.log(uniform))


def mixed(bits: torch.Tensor) -> torch.Tensor:
    """The second half of SplitMix64, on int64."""
    for shift, factor in _MIX:
        bits = (bits ^ _shifted(bits, shift)) * signed(factor)
    return bits


def derive_seed(seed: int, index: int) -> int:
    """Returns the `index`-th seed of the stream of `seed`, 64 bits; index 0 is `seed` itself."""
    if index == 0:
        return seed
    bits = (seed + index * GOLDEN) & _MASK
    for _ in range(2):  # twice, since neighbouring seeds share their increments
        for shift, factor in _MIX:
            bits = ((bits ^ (bits >> shift)) * factor) & _MASK
    return bits


def _shifted(bits: torch.Tensor, by: int) -> torch.Tensor:
    """Logical right shift; torch's own is arithmetic."""
    return (bits >> by) & (2 ** (64 - by) - 1)


def signed(bits: int) -> int:
    """The int64 with the bits of an unsigned 64-bit number."""
    bits &= _MASK
    return bits - 2**64 if bits >= 2**63 else bits
