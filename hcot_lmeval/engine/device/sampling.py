"""From logits to tokens on the device: the same choices as `hcot_lmeval.engine.sampling`, with static shapes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hcot_lmeval.engine.device.fields import Fixed, Moving, Warmth
from hcot_lmeval.engine.device.state import State
from hcot_lmeval.engine.rows import Request
from hcot_lmeval.engine.sampling import derived_seeds, hash_places, hashed_noise, truncate


@dataclass(frozen=True)
class Sampler:
    """Chooses one token a row. What no request asks for is left out of every step.

    Attributes:
        places: what token ids add to the hash of a sample (`hash_places`); None if all rows take the most likely token.
        truncates: some row has top-k, top-p or min-p.
        bans: some row may not end before so many tokens.
        forces: some row has tokens to take whatever the scores.
    """

    places: torch.Tensor | None
    truncates: bool = True
    bans: bool = True
    forces: bool = True

    @classmethod
    def of(cls, requests: Sequence[Request], vocabulary: int, device: torch.device) -> Sampler:
        """What these requests need of logits of so many tokens."""
        sampled = [r.params for r in requests if r.params.temperature > 0]
        return cls(
            places=hash_places(vocabulary, device) if sampled else None,
            truncates=any(p.top_k or p.top_p < 1 or p.min_p for p in sampled),
            bans=any(r.params.min_gen_toks for r in requests),
            forces=any(r.forced_ids for r in requests),
        )

    def choose(self, state: State, rows: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Returns the tokens, int64 [n].

        Args:
            state: holds the settings of `rows`.
            rows: int64 [n].
            logits: [n, vocabulary], float32 or float64.
        """
        row, fixed = state.read(rows), state.constants(rows)
        warmth = Warmth(*state.warmth[rows].to(logits.dtype).unbind(1))
        scores = self._banned(logits, state.ends[rows], row, fixed) if self.bans else logits
        if self.places is not None:
            scores = self._noisy(scores, self.places, row, fixed, warmth)
        tokens = scores.argmax(-1)
        return self._forced(tokens, state.forced[rows], row, fixed) if self.forces else tokens

    def _banned(self, logits: torch.Tensor, ends: torch.Tensor, row: Moving, fixed: Fixed) -> torch.Tensor:
        """Removes end tokens from rows that are too short; entries of `ends` below 0 are none."""
        early = (row.generated < fixed.min_gen)[:, None] & (ends >= 0)
        ceiling = torch.where(early, -math.inf, math.inf).to(logits.dtype)
        return logits.scatter_reduce(1, ends.clamp_min(0), ceiling, "amin")

    def _noisy(
        self, logits: torch.Tensor, places: torch.Tensor, row: Moving, fixed: Fixed, warmth: Warmth
    ) -> torch.Tensor:
        """Scores whose largest entry is the sample; rows at temperature 0 keep theirs."""
        warm = warmth.temperature > 0
        scores = logits / torch.where(warm, warmth.temperature, 1.0)[:, None]
        if self.truncates:
            top_k = torch.where(fixed.top_k == 0, logits.shape[-1], fixed.top_k)
            scores = torch.where(warm[:, None], truncate(scores, top_k, warmth.top_p, warmth.min_p), scores)
        noise = hashed_noise(derived_seeds(fixed.seed, row.generated + 1), places)
        return torch.where(warm[:, None], scores + noise, scores)

    def _forced(self, tokens: torch.Tensor, forced: torch.Tensor, row: Moving, fixed: Fixed) -> torch.Tensor:
        at = row.generated.clamp_max(forced.shape[1] - 1)
        return torch.where(row.generated < fixed.forced, forced.gather(1, at[:, None])[:, 0], tokens)
