"""A causal language model run on packed rows: its losses and its log-probabilities.

    install(model)                       # once, before DDP, FSDP2 or PEFT's trainer wrap it
    sums = loss_sums(wrapped, batch, LossSettings(grammar, weight=1.0))
    (sums.objective / targets_of_the_global_batch).backward()

A wrapper such as DDP synchronises gradients of what happens within its own `forward`, so the losses have to be computed
there, from hidden states: the logits of a whole batch never exist. `install` therefore gives the model's `forward` one
more argument, ``packed``. A call without it is what it was, so that the engine and `generate` work on the same object.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.utils.checkpoint import checkpoint

from hcot_lmeval.grammar import Grammar
from hcot_lmeval.masks import attention_masks
from hcot_lmeval.rotary import check_positions, rotary_limit
from hcot_lmeval.trace import IGNORE
from hcot_lmeval.training.losses import LossSums, packed_losses

Batch = Mapping[str, torch.Tensor]
"""input_ids, position_ids, death, shift_labels, states and classes, integers [B, T] (see `data.rows.collate`)."""

HEAD_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Largest difference allowed between our logits and the model's, relative to its largest; 5e-2 in coarser types."""


@dataclass(frozen=True)
class LossSettings:
    """What is computed on a batch.

    Attributes:
        grammar: which markers are illegal where.
        weight: of the term on them.
        chunk: rows of logits that exist at a time.
    """

    grammar: Grammar
    weight: float = 1.0
    chunk: int = 1024


def causal_lm(model: Any) -> Any:
    """Returns the transformers model inside DDP, `torch.compile` and PEFT wrappers; its adapters stay active."""
    for name in ("module", "_orig_mod"):
        while hasattr(model, name):
            model = getattr(model, name)
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model


def install(model: Any) -> None:
    """Lets `model` compute losses within its own forward; does nothing where that is so already.

    Raises:
        ValueError: the model's logits are not those of its output head on its last hidden states.
    """
    inner = causal_lm(model)
    if hasattr(inner.forward, "packed"):
        return
    check_head(inner)
    plain = inner.forward

    @functools.wraps(plain)
    def forward(*args: Any, packed: _Packed | None = None, **kwargs: Any) -> Any:
        return plain(*args, **kwargs) if packed is None else packed(inner, kwargs)

    forward.packed = True  # type: ignore[attr-defined]
    inner.forward = forward


def loss_sums(model: Any, batch: Batch, settings: LossSettings) -> LossSums:
    """Returns the sums of the losses over the targets of `batch`; `objective` has gradients.

    Args:
        model: the model that `install` was called on, or any wrapper around it.
        batch: packed rows.
        settings: grammar, structure loss and chunk.
    """
    return LossSums(**_run(model, batch, functools.partial(_sums, settings=settings)))


class Barred(NamedTuple):
    """What may not be generated at each place of a batch, and where only one token may.

    Attributes:
        ids: ids that may not come, int64 [B, T, width]; -1 where there are fewer.
        only: whether the target is the only token that may come, bool [B, T].
    """

    ids: torch.Tensor
    only: torch.Tensor


class Scores(NamedTuple):
    """What the model thinks of each target of a batch, in nats; 0 where there is no target.

    Attributes:
        logprobs: the log-probability of the target, [B, T].
        entropy: of the distribution that it was drawn from, [B, T].
    """

    logprobs: torch.Tensor
    entropy: torch.Tensor


def token_logprobs(
    model: Any, batch: Batch, chunk: int = 1024, *, temperature: float = 1.0, barred: Barred | None = None
) -> torch.Tensor:
    """Returns the log-probability of each target of `batch` in nats, [B, T], 0 where there is none.

    For a trace that the engine sampled these are the engine's log-probabilities, since the contexts are the same. They
    have gradients unless computed under `torch.no_grad`.

    Args:
        model: the model that `install` was called on, or any wrapper around it.
        batch: packed rows.
        chunk: rows of logits that exist at a time.
        temperature: divides the logits; 0 counts as 1, as in the engine.
        barred: what constraints forbade, to whose distribution the result then belongs.
    """
    return token_scores(model, batch, chunk, temperature=temperature, barred=barred).logprobs


def token_scores(
    model: Any, batch: Batch, chunk: int = 1024, *, temperature: float = 1.0, barred: Barred | None = None
) -> Scores:
    """Returns the log-probabilities as `token_logprobs`, and the entropies."""
    finish = functools.partial(_scores, chunk=chunk, temperature=temperature or 1.0, barred=barred)
    return Scores(**_run(model, batch, finish))


def column_logprobs(model: Any, batch: Batch, ids: Sequence[int], chunk: int = 1024) -> torch.Tensor:
    """Returns the log-probabilities of some tokens at each target of `batch`, in nats, 0 where there is no target.

    Args:
        model: the model that `install` was called on, or any wrapper around it.
        batch: packed rows [B, T].
        ids: token ids.
        chunk: rows of logits that exist at a time.

    Returns:
        [B, T, len(ids)].
    """
    result: torch.Tensor = _run(model, batch, functools.partial(_columns, ids=list(ids), chunk=chunk))["logprobs"]
    return result


def check_head(inner: Any) -> None:
    """Compares our way to the logits with the model's own on a few tokens.

    Raises:
        ValueError: they differ; the loss would be that of another model.
    """
    if any(parameter.is_meta for parameter in inner.parameters()):
        return  # weights that are not there yet cannot be compared
    ids = torch.arange(1, 5, device=inner.get_input_embeddings().weight.device)[None]
    was_training = inner.training
    inner.eval()
    with torch.no_grad():
        expected = inner(input_ids=ids, use_cache=False).logits.double()
        hidden = inner.base_model(input_ids=ids, use_cache=False).last_hidden_state
        actual = _head(inner)(hidden).double()
    inner.train(was_training)
    difference = float((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-6))
    if not difference <= HEAD_TOLERANCE.get(inner.dtype, 5e-2):
        raise ValueError(
            f"{type(inner).__name__} ({inner.config.model_type}) does more to its logits than its output head, scaling "
            f"and soft cap: ours differ by {difference:.1e} of the largest. It cannot be trained with this loss."
        )


# --- within the model's forward ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Packed:
    """What `forward` does instead of returning logits. Wrappers want tensors in and tensors out, hence the dict."""

    finish: Callable[[torch.Tensor, Batch, Callable[[torch.Tensor], torch.Tensor]], dict[str, torch.Tensor]]

    def __call__(self, inner: Any, batch: Batch) -> dict[str, torch.Tensor]:
        text = inner.config.get_text_config()
        if rotary_limit(text) is not None:
            check_positions(text, 1 + int(batch["position_ids"].max()))
        place = batch["death"], batch["position_ids"]
        # in the dtype of the scores all layers keep the same mask for the backward pass, instead of a copy each
        mask = attention_masks(text, *place, text._attn_implementation, _compute_dtype(inner))
        hidden = inner.base_model(
            input_ids=batch["input_ids"], position_ids=batch["position_ids"], attention_mask=mask, use_cache=False
        ).last_hidden_state
        return self.finish(hidden, batch, _head(inner))


def _compute_dtype(inner: Any) -> torch.dtype:
    """What attention computes in: the dtype of the weights, or that of autocast."""
    device: str = inner.device.type
    found: torch.dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else inner.dtype
    return found


def _run(model: Any, batch: Batch, finish: Any) -> dict[str, torch.Tensor]:
    wanted = ("input_ids", "position_ids", "death", "shift_labels", "states", "classes")
    result: dict[str, torch.Tensor] = model(**{name: batch[name] for name in wanted}, packed=_Packed(finish))
    return result


def _sums(hidden: torch.Tensor, batch: Batch, head: Any, settings: LossSettings) -> dict[str, torch.Tensor]:
    targets, states, classes = (batch[name].flatten() for name in ("shift_labels", "states", "classes"))
    sums = packed_losses(
        hidden.flatten(0, 1), targets, states, classes, head, settings.grammar, settings.weight, settings.chunk
    )
    return {name: getattr(sums, name) for name in ("objective", "cross_entropy", "structure", "counts")}


def _scores(
    hidden: torch.Tensor, batch: Batch, head: Any, chunk: int, temperature: float, barred: Barred | None
) -> dict[str, torch.Tensor]:
    """Scores of the rows that have a target; logits exist for `chunk` rows and are computed again for the gradient."""
    targets = batch["shift_labels"].flatten()
    rows = (targets != IGNORE).nonzero()[:, 0]
    score = functools.partial(_score, head=head, temperature=temperature)
    found = []
    for some in rows.split(chunk):
        ids = None if barred is None else barred.ids.flatten(0, 1)[some]
        found.append(checkpoint(score, hidden.flatten(0, 1)[some], targets[some], ids, use_reentrant=False))
    values = hidden.new_zeros(2, len(targets), dtype=torch.promote_types(hidden.dtype, torch.float32))
    if found:
        values = values.index_put((torch.arange(2, device=rows.device)[:, None], rows), torch.cat(found, -1))
    else:
        values = values + 0 * hidden.sum()  # zeros that depend on every parameter, as DDP wants
    if barred is not None:
        values = values.masked_fill(barred.only.flatten(), 0.0)
    return {name: each.view_as(batch["shift_labels"]) for name, each in zip(Scores._fields, values, strict=True)}


def _score(
    hidden: torch.Tensor, targets: torch.Tensor, barred: torch.Tensor | None, *, head: Any, temperature: float
) -> torch.Tensor:
    """Log-probability of the target, and entropy, of each row: [2, rows]."""
    logits = head(hidden)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    if barred is not None:
        place = (barred >= 0).nonzero(as_tuple=True)
        logits = logits.index_put((place[0], barred[place]), logits.new_tensor(-torch.inf))
    logprobs = logits.log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs.clamp_min(torch.finfo(logprobs.dtype).min)).sum(-1)
    return torch.stack([logprobs.gather(-1, targets[:, None])[:, 0], entropy])


def _columns(hidden: torch.Tensor, batch: Batch, head: Any, ids: list[int], chunk: int) -> dict[str, torch.Tensor]:
    targets = batch["shift_labels"].flatten()
    wanted = torch.tensor(ids, device=targets.device).expand(len(targets), -1)
    values = _at_targets(hidden, wanted, targets, head, chunk)
    return {"logprobs": values.view(*batch["shift_labels"].shape, len(ids))}


def _at_targets(
    hidden: torch.Tensor, wanted: torch.Tensor, targets: torch.Tensor, head: Any, chunk: int
) -> torch.Tensor:
    """Log-probabilities of the ids `wanted` [rows, k] in the rows that have a target; 0 in the others."""
    rows = (targets != IGNORE).nonzero()[:, 0]
    found = [_chosen(head(hidden.flatten(0, 1)[some]), wanted[some]) for some in rows.split(chunk)]
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    values = torch.zeros(wanted.shape, dtype=dtype, device=hidden.device)
    return values.index_put((rows,), torch.cat(found)) if found else values


def _chosen(logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.log_softmax(-1).gather(-1, wanted)


def _head(inner: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """The output head with what some families do to its result: Gemma's soft cap, Granite's and Cohere's scales."""
    config, linear = inner.config.get_text_config(), inner.get_output_embeddings()
    scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
    cap = getattr(config, "final_logit_softcapping", None) or math.inf

    def head(hidden: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = linear(hidden.to(linear.weight.dtype))
        logits = logits if scale == 1 else logits * scale
        return logits if cap == math.inf else torch.tanh(logits / cap) * cap

    return head
