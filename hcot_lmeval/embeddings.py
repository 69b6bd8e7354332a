"""Rows for new tokens: an embedding grows, and a marker starts as the mean of a phrase that says what it does.

A new token has to start somewhere. The mean of all rows makes the markers equal to one another; the mean of the rows of
a phrase, such as "subproblem start" for ``[THOUGHT]``, makes them differ from the first step on, and lies where the
model already knows its way. The published checkpoint was started so (`PHRASES`); Memento adds noise to it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

ROW_MULTIPLE = 64
"""Embeddings are padded to this many rows, which tensor cores like."""

PHRASES: Mapping[str, str] = {
    "[THOUGHT]": "subproblem start",
    "[SOLUTION]": "summary of solution",
    "[RETURN]": "subproblem return",
    "<think>": "thinking start",
    "</think>": "thinking complete",
    "[CALL]": "subproblem call",
    "[SEP]": "answer of subproblem",
    "<|block_start|>": "reasoning block start",
    "<|block_end|>": "reasoning block end",
    "<|summary_start|>": "summary start",
    "<|summary_end|>": "summary end",
}
"""Token -> phrase. The first five are those of the published checkpoint; the others are made in their manner."""

Method = Literal["mean", "noise", "none"]


@dataclass(frozen=True)
class Seeding:
    """How the rows of new tokens start.

    Attributes:
        method: "mean": the mean of the phrase's rows; "noise": that mean plus N(0, noise^2) on every weight;
            "none": as transformers draws them, close to the mean of all rows.
        noise: standard deviation under "noise".
        phrases: token -> phrase, beside or instead of `PHRASES`.
        seed: of the noise, and of what transformers draws.

    Raises:
        ValueError: the method is unknown, or the noise is negative or not finite.
    """

    method: Method = "mean"
    noise: float = 0.01
    phrases: Mapping[str, str] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise ValueError(f"seeding={self.method!r} is unknown; choose one of {', '.join(get_args(Method))}")
        if not (math.isfinite(self.noise) and self.noise >= 0):
            raise ValueError(f"noise={self.noise!r} is not allowed; it is a standard deviation, such as 0.01")

    def check(self, tokens: Iterable[str]) -> None:
        """Raises `ValueError` for a phrase whose token is not among `tokens`."""
        tokens = list(tokens)
        unknown = [token for token in self.phrases if token not in tokens]
        if unknown:
            raise ValueError(f"phrases: {', '.join(unknown)} is no token of the markup; its tokens are {_list(tokens)}")

    def sources(self, tokenizer: PreTrainedTokenizerBase, tokens: Iterable[str], rows: int) -> dict[str, list[int]]:
        """Returns for each of `tokens` the ids whose rows its own row is the mean of; nothing under "none".

        Args:
            tokenizer: encodes the phrases.
            tokens: new tokens.
            rows: that the model has.

        Raises:
            ValueError: a token has no phrase, or its phrase is empty, or has parts that the tokenizer or the model
                does not know.
        """
        if self.method == "none":
            return {}
        phrases = {**PHRASES, **self.phrases}
        return {token: _encode_phrase(tokenizer, token, phrases.get(token), rows) for token in tokens}

    def describe(self, sources: Mapping[str, Sequence[int]]) -> dict[str, Any]:
        """Returns what was done as plain data, for the training record."""
        phrases = {**PHRASES, **self.phrases}
        rows = {token: {"phrase": phrases[token], "ids": list(ids)} for token, ids in sources.items()}
        noise = {"noise": self.noise} if self.method == "noise" else {}
        return {"method": self.method, **noise, "seed": self.seed, "rows": rows}


DEFAULT_SEEDING = Seeding()


def padded(rows: int) -> int:
    """Returns the least multiple of `ROW_MULTIPLE` that is not below `rows`."""
    return ROW_MULTIPLE * -(-rows // ROW_MULTIPLE)


def rows_of(model: PreTrainedModel) -> int:
    """Returns how many tokens the model's embedding has rows for."""
    return int(model.get_input_embeddings().weight.shape[0])


def grow(model: PreTrainedModel, rows: int, seed: int = 0) -> None:
    """Gives the embedding, and the output head, `rows` rows; those that are there stay as they are, bit by bit.

    New rows are drawn by transformers very close to the mean of the old ones, so that a token nobody trains is an
    unlikely one. The global random state is left alone.
    """
    if rows == rows_of(model):
        return
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        model.resize_token_embeddings(rows)


@torch.no_grad()
def seed_rows(model: PreTrainedModel, sources: Mapping[int, Sequence[int]], seeding: Seeding) -> None:
    """Sets row i to the mean of the rows `sources[i]`, in the input embedding and in an untied output head.

    Each table takes the mean of its own rows. Noise is drawn on the CPU, so that every device gets the same, and for
    weights alone: a bias is the mean of the phrase's biases.

    Args:
        model: with enough rows.
        sources: id of a new token -> ids of the tokens that it starts from; none of these may be new.
        seeding: method, noise and seed.
    """
    generator = torch.Generator().manual_seed(seeding.seed)
    for table in _tables(model):
        for row, ids in sources.items():
            mean = table[list(ids)].double().mean(0)  # in bfloat16 a sum would lose what the markers differ in
            if seeding.method == "noise" and table.dim() == 2:
                noise = torch.randn(mean.shape, generator=generator, dtype=torch.float64)
                mean = mean + seeding.noise * noise.to(mean.device)
            table[row] = mean.to(table.dtype)


def _tables(model: PreTrainedModel) -> Iterator[torch.Tensor]:
    """Yields everything that has a row per token: weights [vocabulary, width], and the head's bias [vocabulary]."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    yield embedding.weight
    if head is not None and head.weight is not embedding.weight:
        yield head.weight
    if getattr(head, "bias", None) is not None:
        yield head.bias


def _encode_phrase(tokenizer: PreTrainedTokenizerBase, token: str, phrase: str | None, rows: int) -> list[int]:
    if phrase is None:
        raise ValueError(f"there is no phrase for the new token {token}; name one in phrases, or use seeding none")
    ids = list(tokenizer.encode(phrase, add_special_tokens=False))
    strange = [i for i in ids if i == tokenizer.unk_token_id or i >= rows]
    if strange or not ids:
        raise ValueError(
            f"the phrase {phrase!r} of {token} is encoded as {tokenizer.convert_ids_to_tokens(ids)}, which does not "
            "name rows of the model; choose a phrase of known words in phrases, or use seeding none"
        )
    return ids


def _list(tokens: Iterable[str]) -> str:
    return ", ".join(tokens)
