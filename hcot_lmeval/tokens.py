"""Between text and token ids: the markers of a vocabulary, and prompts that cannot be injected.

A prompt may quote ``[THOUGHT]`` as text. `encode_prompt` makes sure that it stays text: it encodes as a tokenizer does
whose vocabulary never had the markers. The control tokens of the chat template work as always.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Collection
from typing import Any, NamedTuple

from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hcot_lmeval.columns import SURROGATE
from hcot_lmeval.embeddings import DEFAULT_SEEDING, Seeding, grow, padded, rows_of, seed_rows
from hcot_lmeval.markup import Markup, get_markup
from hcot_lmeval.vocabulary import read_vocabulary, token_id


class Added(NamedTuple):
    """What `add_special_tokens` did.

    Attributes:
        tokens: token -> id, of those that were added to the tokenizer.
        seeding: how their rows in the model started, as plain data; empty without a model.
    """

    tokens: dict[str, int]
    seeding: dict[str, Any]


def add_special_tokens(
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel | None = None,
    markup: Markup | str = "hcot",
    seeding: Seeding = DEFAULT_SEEDING,
    *,
    new: Collection[str] = (),
) -> Added:
    """Adds the markers and the thinking tokens that the vocabulary lacks, and rows for them to the model.

    A vocabulary with thinking tokens of its own, such as ``[THINK]``, gets no others. Nothing is lost: tokens keep
    their ids and rows, other added tokens, special tokens and the chat template stay. The embedding never shrinks and
    is padded to a multiple of 64 rows. A new token may get a spare row of a padded embedding; that one is seeded too,
    if it is known to be new: add the tokens to both in one call, or name those that an earlier call gave to the
    tokenizer alone.

    Args:
        tokenizer: gets the tokens.
        model: gets the rows; its dtype, device and tied weights stay. Wrap it for PEFT afterwards.
        markup: the notation whose tokens are needed.
        seeding: how new rows start.
        new: tokens that the tokenizer has been given already, and the model has not.

    Raises:
        ValueError: a phrase belongs to no token of the markup or cannot be used, the markup is unknown, or the model
            is wrapped for PEFT already. Tokenizer and model are then unchanged.
    """
    markup = get_markup(markup)
    own = read_vocabulary(tokenizer, markup)
    texts = (*markup.markers, *(() if own.has_thinking and own.think != markup.think else markup.think))
    seeding.check(texts)
    missing = [text for text in texts if token_id(tokenizer, text) is None]
    rows = None if model is None else rows_of(model)
    unknown = [text for text in texts if rows is not None and (text in new or _is_new(token_id(tokenizer, text), rows))]
    sources = {} if rows is None else seeding.sources(tokenizer, unknown, rows)
    if hasattr(model, "peft_config") and (unknown or padded(rows_of(model)) != rows):
        raise ValueError(
            "the model is wrapped for PEFT, and an adapter does not save rows that are added to its base; add the "
            f"tokens ({', '.join(texts)}) to the base model before wrapping it"
        )
    tokenizer.add_tokens([AddedToken(text, special=True, normalized=False) for text in missing])
    added = {text: tokenizer.convert_tokens_to_ids(text) for text in missing}
    if model is None:
        return Added(added, {})
    grow(model, padded(max(rows_of(model), 1 + max(tokenizer.get_vocab().values()))), seeding.seed)
    seed_rows(model, {tokenizer.convert_tokens_to_ids(text): ids for text, ids in sources.items()}, seeding)
    return Added(added, seeding.describe(sources))


def check_markers(tokenizer: PreTrainedTokenizerBase, markup: Markup | str = "hcot") -> None:
    """Checks that markers and thinking tokens leave the text around them as it is.

    Raises:
        ValueError: one swallows the blanks beside it, or is not found within a word.
    """
    markup = get_markup(markup)
    for text in (*markup.markers, *read_vocabulary(tokenizer, markup).think):
        token = tokenizer.added_tokens_decoder.get(token_id(tokenizer, text))
        flags = [name for name in ("lstrip", "rstrip", "single_word") if getattr(token, name, False)]
        if flags:
            words = f"So we\n\n{text} compute"
            read = tokenizer.decode(tokenizer.encode(words, add_special_tokens=False))
            raise ValueError(
                f"the tokenizer has {text} as a token with {' and '.join(flags)}, so that {words!r} is read as "
                f"{read!r}; set these to false in tokenizer.json and tokenizer_config.json, or add the token anew with "
                "hcot_lmeval.add_special_tokens to a tokenizer that lacks it"
            )


def _is_new(token: int | None, rows: int) -> bool:
    """Whether a token is new to a model with so many rows."""
    return token is None or token >= rows


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    markup: Markup | str = "hcot",
    *,
    add_special_tokens: bool = False,
) -> list[int]:
    """Encodes a rendered prompt; text that spells a marker becomes plain text tokens, in every Unicode form.

    Args:
        tokenizer: the model's tokenizer.
        text: the prompt, chat template applied.
        markup: the notation whose markers are to be text.
        add_special_tokens: whether the tokenizer adds its own tokens (such as BOS) around the text.

    Raises:
        ValueError: the prompt is no text, or holds half of a character.
    """
    if not isinstance(text, str):
        raise ValueError(f"the prompt {text!r:.100} is no text; give a string")
    if half := SURROGATE.search(text):
        raise ValueError(f"the prompt holds {half[0]!r}, half of a character, at {half.start()}; give valid Unicode")
    markup = get_markup(markup)
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        return _encode_in_pieces(tokenizer, text, markup, add_special_tokens)
    twin = _without_markers(tokenizer, markup, len(tokenizer))
    return list(twin.encode(text, add_special_tokens=add_special_tokens).ids)


@functools.lru_cache(maxsize=8)
def _without_markers(tokenizer: PreTrainedTokenizerBase, markup: Markup, size: int) -> Tokenizer:
    """A twin of the tokenizer in which no text can become a marker; `size` makes a grown vocabulary a new key.

    The markers are renamed rather than removed, since the ids of later tokens depend on their number. The new names
    hold a noncharacter of Unicode, which no valid text contains.
    """
    names = {text: f"\ufdd0{number}\ufdd0" for number, text in enumerate(markup.markers)}
    state: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    for token in state["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    vocab = state["model"]["vocab"]
    if isinstance(vocab, dict):  # a list of (piece, score) pairs in Unigram models, which never hold added tokens
        state["model"]["vocab"] = {names.get(piece, piece): i for piece, i in vocab.items()}
    twin = Tokenizer.from_str(json.dumps(state))
    twin.no_truncation()
    twin.no_padding()
    return twin


def _encode_in_pieces(
    tokenizer: PreTrainedTokenizerBase, text: str, markup: Markup, add_special_tokens: bool
) -> list[int]:
    """For tokenizers without a `tokenizers` backend: the markers are encoded apart, with their specialness off."""
    pieces = re.split("(" + "|".join(map(re.escape, markup.markers)) + ")", text)
    if len(pieces) == 1:
        return list(tokenizer.encode(text, add_special_tokens=add_special_tokens))
    ids: list[int] = []
    for piece in filter(None, pieces):
        plain = piece in markup.markers
        ids += tokenizer.encode(piece, add_special_tokens=False, split_special_tokens=plain)
    return list(tokenizer.build_inputs_with_special_tokens(ids)) if add_special_tokens else ids
