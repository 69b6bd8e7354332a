"""How little a language model expected each sentence: a hint at where something new begins.

    segment(pieces, surprise=load_surprise(NAME))

Importing this module imports the standard library alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hcot_lmeval.prepare.segmenter import Surprise


def load_surprise(name: str) -> Surprise:
    """Loads a model and its tokenizer by name or path; see `model_surprise`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return model_surprise(AutoModelForCausalLM.from_pretrained(name).eval(), AutoTokenizer.from_pretrained(name))


def model_surprise(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, context: int = 2048) -> Surprise:
    """Returns a function that gives each sentence its mean negative log-likelihood per token, in nats.

    A text longer than `context` is read in windows that overlap by half, so that every token but those of the first
    window has seen at least `context` / 2 tokens.

    Args:
        model: a causal language model, on its device.
        tokenizer: its tokenizer. Every sentence is encoded on its own, so that tokens belong to one sentence.
        context: tokens that are read at once, at least 2.

    Raises:
        ValueError: `context` is below 2.
    """
    if context < 2:
        raise ValueError(f"context={context} leaves nothing to predict from; give at least 2")

    def surprise(pieces: Sequence[str]) -> list[float]:
        encoded = [tokenizer.encode(piece, add_special_tokens=False, verbose=False) for piece in pieces]
        losses = [0.0, *_losses(model, list(chain.from_iterable(encoded)), context)]  # nothing predicts the first token
        means, at = [], 0
        for ids in encoded:
            means.append(sum(losses[at : at + len(ids)]) / max(1, len(ids)))
            at += len(ids)
        return means

    return surprise


def _losses(model: PreTrainedModel, ids: list[int], context: int) -> Iterator[float]:
    """Yields the negative log-likelihood of every token but the first."""
    import torch

    step, known = max(1, context // 2), 1
    for start in range(0, len(ids) - 1, step):
        window = torch.tensor([ids[start : start + context]], device=model.device)
        with torch.inference_mode():
            logits: torch.Tensor = model(input_ids=window).logits[0, :-1].float()
        losses = torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="none").tolist()
        yield from losses[known - start - 1 :]
        known = min(len(ids), start + context)
        if known == len(ids):
            return
