"""The slow twins: the pruning rule and exact decoding, written again in the most obvious way.

Nothing here shares code or structure with `hcot_lmeval.trace`: the rule is a textual rewriting with a regular
expression, and the logits of every generated token come from a forward of their own over the rewritten text
(`recompute`, `off`) or from one forward under a mask that is filled in block by block (`evict`). Slow, and hard to get
wrong.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hcot_lmeval.markup import PRESETS, MarkerIds, resolve_markers

POLICIES = ("off", "recompute", "evict")
EOS, OPEN, SPLIT, CLOSE, LEAD = 1, 3, 4, 5, 6
FIRST_TEXT = 8
"""Ids from here on are text; those below are reserved for markers and end of sequence."""
_SPELLING = {"open": OPEN, "split": SPLIT, "close": CLOSE, "lead": LEAD}
MARKERS: dict[str, MarkerIds] = {
    name: resolve_markers(
        markup, {getattr(markup, role): i for role, i in _SPELLING.items() if getattr(markup, role) is not None}.get
    )
    for name, markup in PRESETS.items()
}


class Block(NamedTuple):
    """A closed block with a split, as indices into the trace. `removed` are those that leave the context with it."""

    open: int
    split: int
    close: int
    removed: tuple[int, ...]


class Rewritten(NamedTuple):
    """What the rule makes of a trace: the indices that survive, the pruned blocks by closing time, and the faults."""

    kept: list[int]
    blocks: list[Block]
    faults: Counter[str]


def rewrite(ids: Sequence[int], inert: int, markers: MarkerIds) -> Rewritten:
    """Applies the rewriting rule to the trace as text until it no longer matches.

    Every token becomes a word: ``O`` open, ``S`` split, ``R`` close, ``t`` anything else, then its index and ``;``. A
    block is a word ``O``, words that are neither open nor close (in a flat notation: no close), and a word ``R``;
    whatever survives of it turns into ``t``.

    Args:
        ids: the trace.
        inert: how many of its first tokens cannot act (the prompt's length).
        markers: the notation.
    """
    letters = {markers.open: "O", markers.split: "S", markers.close: "R"}
    text = "".join(f"{letters.get(t, 't') if i >= inert else 't'}{i};" for i, t in enumerate(ids))
    block = re.compile(r"O(\d+);((?:[tS]\d+;)*)R(\d+);" if markers.nested else r"O(\d+);((?:[OtS]\d+;)*)R(\d+);")
    blocks: list[Block] = []
    faults: Counter[str] = Counter()
    while match := block.search(text):
        opened, inside, closed = match.groups()
        faults.update(_inside_faults(inside, markers, ids))
        _, mark, after = inside.rpartition("S")
        if not mark:
            left = f"t{opened};{_plain(inside)}t{closed};"
        else:
            split, _, solution = after.partition(";")
            left = f"t{opened};" * ("open" in markers.keep) + f"t{split};" * ("split" in markers.keep)
            left += _plain(solution) + f"t{closed};" * ("close" in markers.keep)
            gone = sorted(set(_indices(match[0])) - set(_indices(left)))
            blocks.append(Block(int(opened), int(split), int(closed), tuple(gone)))
        text = text[: match.start()] + left + text[match.end() :]
    faults.update(_leftover_faults(text, markers))
    return Rewritten(_indices(text), sorted(blocks, key=lambda b: b.close), +faults)


def _plain(text: str) -> str:
    return re.sub("[OSR]", "t", text)


def _indices(text: str) -> list[int]:
    return [int(i) for i in re.findall(r"\d+", text)]


def _inside_faults(inside: str, markers: MarkerIds, ids: Sequence[int]) -> dict[str, int]:
    splits = inside.count("S")
    first = _indices(inside.rpartition("S")[2])[1:2]
    led = markers.lead is None or [ids[i] for i in first] == [markers.lead]
    return {
        "unsplit_close": int(not splits),
        "repeated_split": max(splits - 1, 0),
        "missing_lead": int(bool(splits) and not led),
        "nested_open": inside.count("O"),
    }


def _leftover_faults(text: str, markers: MarkerIds) -> dict[str, int]:
    """The faults outside closed blocks; `text` has no closed block left, so each ``O`` in it was never closed."""
    outside, *opened = text.split("O")
    if not markers.nested and opened:  # the first one is a block, the later ones are text in it
        nested, opened = len(opened) - 1, ["".join(opened)]
    else:
        nested = 0
    return {
        "stray_split": outside.count("S"),
        "stray_close": text.count("R"),
        "repeated_split": sum(max(part.count("S") - 1, 0) for part in opened),
        "nested_open": nested,
        "unclosed": len(opened),
    }


def pruned(ids: Sequence[int], prompt_len: int, markers: MarkerIds, policy: str) -> list[int]:
    """Returns the live context at the end of a trace."""
    return [ids[i] for i in survivors(ids, prompt_len, markers, policy)]


def survivors(ids: Sequence[int], prompt_len: int, markers: MarkerIds, policy: str) -> list[int]:
    """Returns the trace indices of the live context at the end of a trace."""
    return list(range(len(ids))) if policy == "off" else rewrite(ids, prompt_len, markers).kept


class Stage(NamedTuple):
    """A plain causal training sequence; ``ids[first_target:]`` are its targets."""

    ids: list[int]
    first_target: int


def stages(ids: Sequence[int], prompt_len: int, markers: MarkerIds) -> list[Stage]:
    """Splits a trace at its prunes: the context as it stands, then the tokens up to and including the next close.

    Trained one by one they are what training on the packed `recompute` plan has to equal, in loss and gradients.
    """
    cuts = [b.close + 1 for b in rewrite(ids, prompt_len, markers).blocks]
    result = []
    for start, stop in zip([prompt_len, *cuts], [*cuts, len(ids)], strict=True):
        context = pruned(ids[:start], prompt_len, markers, "recompute")
        if stop > start:
            result.append(Stage([*context, *ids[start:stop]], len(context)))
    return result


def evict_mask(ids: Sequence[int], prompt_len: int, markers: MarkerIds) -> torch.Tensor:
    """Returns the bool mask [n, n] of a trace: causal, and what a block removes is invisible behind its close."""
    mask = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
    for block in rewrite(ids, prompt_len, markers).blocks:
        mask[block.close + 1 :, list(block.removed)] = False
    return mask


@torch.no_grad()
def reference_logits(
    model: PreTrainedModel,
    ids: Sequence[int],
    prompt_len: int,
    markers: MarkerIds,
    policy: str,
    *,
    prompt_acts: bool = False,
) -> torch.Tensor:
    """Returns the logits from which each generated token was sampled, [len(ids) - prompt_len + 1, V].

    Row g is the distribution of ``ids[prompt_len + g]``; the last row that of the token after the trace.
    """
    inert = 0 if prompt_acts else prompt_len
    if policy == "off":
        return plain_logits(model, ids)[prompt_len - 1 :]
    if policy == "evict":
        mask = evict_mask(ids, inert, markers)
        return masked_logits(model, ids, range(len(ids)), mask)[prompt_len - 1 :]
    rows = []
    for stop in range(prompt_len, len(ids) + 1):
        rows.append(plain_logits(model, pruned(ids[:stop], inert, markers, policy))[-1])
    return torch.stack(rows)


@torch.no_grad()
def plain_logits(model: PreTrainedModel, ids: Sequence[int]) -> torch.Tensor:
    """Returns the logits [n, V] of an ordinary forward: no cache, and the mask left to the library."""
    return model(torch.tensor([list(ids)]), use_cache=False).logits[0]


@torch.no_grad()
def masked_logits(
    model: PreTrainedModel, ids: Sequence[int], positions: Sequence[int], mask: torch.Tensor
) -> torch.Tensor:
    """Returns the logits [n, V] of one forward under an explicit mask.

    Args:
        ids: n token ids.
        positions: their position ids; sliding windows are measured in them.
        mask: bool [n, n], True where query (row) sees key (column), sliding windows not yet applied.
    """
    at = torch.tensor([list(positions)])
    masks = layer_masks(model, mask, at[0])
    return model(torch.tensor([list(ids)]), position_ids=at, attention_mask=masks, use_cache=False).logits[0]


def layer_masks(
    model: PreTrainedModel, mask: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor | dict[str, torch.Tensor]:
    """Returns the 4D mask(s) in the form in which the model's family takes them: one, or one for each layer type."""
    window = getattr(model.config, "sliding_window", None)
    near = mask if window is None else mask & (positions[:, None] - positions[None, :] < window)
    if getattr(model.config, "layer_types", None):
        return {"full_attention": mask[None, None], "sliding_attention": near[None, None]}
    return near[None, None]


def _textbook_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scores = query @ key.mT * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, -torch.inf)
    else:
        scores = scores + attention_mask
    return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), None


ALL_ATTENTION_FUNCTIONS.register("textbook", _textbook_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register("textbook", eager_mask)


def as_reference(model: PreTrainedModel) -> PreTrainedModel:
    """Sets the attention that the twins use, in place: stock sdpa, or the textbook formula where sdpa cannot do it.

    gemma2 caps its attention scores, which only the stock ``eager`` attention honours, and that one rounds to fp32.
    """
    model.set_attn_implementation("textbook" if model.config.model_type == "gemma2" else "sdpa")
    return model
