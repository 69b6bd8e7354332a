"""Generated traces as a trainer needs them: in packed rows, on the contexts that the policy saw, and the way back.

    packed = pack_traces(traces, grammar, "recompute")              # Example(prompt_ids, completion_ids) each
    install(model)
    scores = trace_scores(model, packed, temperature=1.0)           # logprobs and entropy, [traces, tokens]

A row of logits for a policy gradient is a matter of which context a token was drawn in. A trainer that feeds a pruned
trace as one causal text scores most tokens in contexts that never were; here each is scored in its own, and the
log-probabilities are those that the engine reports. Any trainer can use it: `hcot_lmeval.training.grpo` puts it into
TRL's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from hcot_lmeval.control import FREE, Directive
from hcot_lmeval.grammar import Grammar
from hcot_lmeval.masks import attention_masks
from hcot_lmeval.trace import IGNORE, Policy
from hcot_lmeval.training.data.documents import COLUMNS, Document, Example, compile_document
from hcot_lmeval.training.data.rows import assign, collate
from hcot_lmeval.training.forward import Barred, Scores, causal_lm, token_scores

UNLIMITED = 2**62


@dataclass(frozen=True)
class PackedTraces:
    """Traces in packed rows.

    Attributes:
        batch: ``input_ids``, ``position_ids``, ``death``, ``shift_labels``, ``states`` and ``classes``, int64 [R, T];
            see `data.rows.collate`.
        index: where each completion token is predicted: a place in the flattened batch, int64 [B, C]; -1 behind the
            end of a completion.
        barred: what constraints forbade at each place, or None.
    """

    batch: Mapping[str, torch.Tensor]
    index: torch.Tensor
    barred: Barred | None = None

    def unpack(self, values: torch.Tensor) -> torch.Tensor:
        """Returns what a batch [R, T] has for each completion token, [B, C]; 0 behind the end of a completion."""
        found = values.flatten()[self.index.clamp_min(0)]
        return found.masked_fill(self.index < 0, 0)

    def inputs(self, model: Any) -> dict[str, Any]:
        """Returns what a model of transformers takes, for trainers that call ``model(**inputs)`` themselves.

        Args:
            model: its configuration says which kind of mask it takes; attention ``sdpa``, ``eager`` or
                ``flex_attention``.

        Returns:
            ``input_ids``, ``position_ids`` and ``labels``, int64 [R, T + 1], and ``attention_mask``. Labels are as
            transformers has them: the model shifts them.
        """
        ids, positions, death, targets = (self.batch[n] for n in ("input_ids", "position_ids", "death", "shift_labels"))
        rows, length = ids.shape
        more = torch.full((rows, 1), length, device=ids.device)  # room for the last target, behind all documents
        config = causal_lm(model).config.get_text_config()
        death = torch.cat([death, more + 1], 1)
        positions = torch.cat([positions, torch.zeros_like(more)], 1)
        mask = attention_masks(config, death, positions, config._attn_implementation, causal_lm(model).dtype)
        return {
            "input_ids": torch.cat([ids, ids[:, -1:]], 1),
            "position_ids": positions,
            "attention_mask": mask,
            "labels": torch.cat([torch.full_like(more, IGNORE), targets], 1),
        }

    def to(self, device: torch.device | str) -> PackedTraces:
        """Returns the same on another device."""
        batch = {name: values.to(device) for name, values in self.batch.items()}
        barred = self.barred and Barred(*(each.to(device) for each in self.barred))
        return PackedTraces(batch, self.index.to(device), barred)


def pack_traces(
    traces: Sequence[Example],
    grammar: Grammar,
    policy: Policy | str,
    *,
    directives: Sequence[Sequence[Directive] | None] | None = None,
    row_length: int | None = None,
    pad_id: int = 0,
) -> PackedTraces:
    """Compiles traces and packs them.

    Args:
        traces: prompt and completion each, at least one.
        grammar: markers, thinking tokens and end tokens.
        policy: what a closing marker did when they were generated.
        directives: of each trace what held for its tokens (`Completion.directives`), None without constraints.
        row_length: tokens of a row; by default those of the longest trace, so that short ones share a row.
        pad_id: any token id.

    Raises:
        ValueError: there are no traces, a prompt is empty, or a trace does not fit into a row.
    """
    if not traces:
        raise ValueError("there are no traces to pack; give at least one")
    documents = [compile_document(trace, grammar, policy, max_length=UNLIMITED) for trace in traces]
    sizes = [len(document) for document in documents]
    length = row_length or max(sizes)
    rows = assign(sizes, length)
    starts = [0] * len(documents)
    for row, members in enumerate(rows):
        for member, start in zip(members, accumulate((sizes[m] for m in members), initial=row * length), strict=False):
            starts[member] = start
    index = _index(documents, starts)
    batch = collate([_joined([documents[member] for member in members]) for members in rows], length, pad_id)
    return PackedTraces(batch, index, _barred(index, len(rows) * length, length, directives))


def trace_scores(model: Any, packed: PackedTraces, *, temperature: float = 1.0, chunk: int = 1024) -> Scores:
    """Returns log-probability and entropy of each completion token in nats, [B, C], 0 behind the end of a completion.

    Args:
        model: the model that `forward.install` was called on, or any wrapper around it.
        packed: of `pack_traces`, on the model's device.
        temperature: of the sampling; 0 counts as 1, as in the engine.
        chunk: rows of logits that exist at a time.
    """
    scores = token_scores(model, packed.batch, chunk, temperature=temperature, barred=packed.barred)
    return Scores(*map(packed.unpack, scores))


def _joined(documents: Sequence[Document]) -> dict[str, list[int]]:
    """A packed row: no death reaches beyond the end of its document."""
    row: dict[str, list[int]] = {name: [] for name in COLUMNS}
    for document in documents:
        start = len(row["ids"])
        for name in COLUMNS:
            values = getattr(document, name)
            row[name] += [start + value for value in values] if name == "death" else values
    return row


def _index(documents: Sequence[Document], starts: Sequence[int]) -> torch.Tensor:
    """Each generated token is a target once, in order."""
    places = [
        [start + place for place, target in enumerate(document.targets) if target != IGNORE]
        for document, start in zip(documents, starts, strict=True)
    ]
    width = max(map(len, places))
    return torch.tensor([found + [-1] * (width - len(found)) for found in places], dtype=torch.int64)


def _barred(
    index: torch.Tensor, places: int, length: int, directives: Sequence[Sequence[Directive] | None] | None
) -> Barred | None:
    if directives is None or not any(directives):
        return None
    held = [
        (int(place), directive)
        for row, each in zip(index, directives, strict=True)
        for place, directive in zip(row[row >= 0], each or (), strict=each is not None)
        if directive is not FREE
    ]
    width = max((len(directive.illegal) for _, directive in held), default=0)
    ids = torch.full((places, width), -1, dtype=torch.int64)
    only = torch.zeros(places, dtype=torch.bool)
    for place, directive in held:
        ids[place, : len(directive.illegal)] = torch.tensor(sorted(directive.illegal), dtype=torch.int64)
        only[place] = directive.forced is not None
    return Barred(ids.view(-1, length, width), only.view(-1, length))
