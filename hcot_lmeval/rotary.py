"""How long sequences may be: the positions that a model knows, and those whose angles are their own.

Of the rotary embeddings ``longrope`` and ``dynamic`` transformers takes one set of angles for all rows of a forward, by
the largest position among them, and what is cached keeps the angles of its time. So a row would depend on those beside
it, on how it was read and on what was pruned. Up to the length of the first training the angles are those of the
position alone.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

logger = logging.getLogger(__name__)

FALLBACK_CONTEXT = 2048
"""Positions of a model whose config names none (lm-eval's value)."""


class RotaryLimit(NamedTuple):
    """The kind of embedding, and how many positions have angles of their own."""

    kind: str
    positions: int


def rotary_limit(config: Any) -> RotaryLimit | None:
    """Returns the limit of a text model's configuration; None if its angles depend on the position alone."""
    limits = []
    for rope in _ropes(getattr(config, "rope_parameters", None) or {}):
        kind = str(rope.get("rope_type", "default"))
        if kind == "longrope":
            named = rope.get("original_max_position_embeddings")
            named = named or getattr(config, "original_max_position_embeddings", None)
            limits.append(RotaryLimit(kind, int(named or config.max_position_embeddings)))
        elif "dynamic" in kind:
            limits.append(RotaryLimit(kind, int(config.max_position_embeddings)))
    return min(limits, key=lambda limit: limit.positions, default=None)


def check_positions(config: Any, positions: int) -> None:
    """Raises `ValueError` if so many positions in packed rows are more than have angles of their own."""
    limit = rotary_limit(config)
    if limit is not None and positions > limit.positions:
        raise ValueError(
            f"the traces need {positions} positions, and the rotary embeddings of the model ({limit.kind}) turn by "
            f"other angles in sequences of more than {limit.positions} tokens, so that packed documents would change "
            f"one another; shorten the traces with data.row_length={limit.positions}"
        )


def position_limits(
    model: Any, name: str, max_context: int | None, max_position: int | None, *, evict: bool
) -> tuple[int, int]:
    """Returns the most live tokens of a row, and the most tokens of a trace, which count under policy evict.

    Args:
        model: a causal language model of transformers.
        name: of the model, for messages.
        max_context: most live tokens; None for what the config names.
        max_position: most tokens of a trace; None for what the model can do.
        evict: whether position ids count the trace.

    Raises:
        ValueError: the model has no positions, or no angles of their own, for so many.
    """
    config = model.config.get_text_config()
    known, rotary = _known_positions(config), rotary_limit(config)
    context = max_context or known
    position = max_position or max(known if rotary is None else rotary.positions, context)
    for option, value in {"max_context": context, **({"max_position": position} if evict else {})}.items():
        if rotary is not None and value > rotary.positions:
            raise ValueError(
                f"{option}={value} is too much for {name}: its rotary embeddings ({rotary.kind}) turn by other angles "
                f"in sequences of more than {rotary.positions} tokens, so that a row would depend on those beside it "
                f"and on what was pruned; set {option}={rotary.positions}"
            )
        if value > known and not any(buffer.endswith("inv_freq") for buffer, _ in model.named_buffers()):
            raise ValueError(
                f"{option}={value} is beyond the {known} positions that {name} has learned; set {option}={known}"
            )
    if context > known:
        logger.warning("max_context=%d is beyond the %d positions of the model's config", context, known)
    return context, position


def _known_positions(config: Any) -> int:
    names = ("max_position_embeddings", "n_positions", "n_ctx", "seq_length")
    return next((int(value) for name in names if (value := getattr(config, name, None))), FALLBACK_CONTEXT)


def _ropes(parameters: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """One set of parameters, or one for each type of layer."""
    nested = [value for value in parameters.values() if isinstance(value, Mapping)]
    yield from nested or [parameters]
