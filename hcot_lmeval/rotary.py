"""Rotary embeddings whose angles depend on the length of the sequence, and up to which length they do not.

Of ``longrope`` and ``dynamic`` transformers takes one set of angles for all rows of a forward, by the largest position
among them, and what is cached keeps the angles of its time. So a row would depend on its neighbours, on how it was read
and on what was pruned. Up to the length of the first training the angles are those of the position alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple


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


def _ropes(parameters: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """One set of parameters, or one for each type of layer."""
    nested = [value for value in parameters.values() if isinstance(value, Mapping)]
    yield from nested or [parameters]
