"""Random traces: well nested, one block after another, broken in every way, and soup. The same seed, the same trace."""

from __future__ import annotations

import random
from collections.abc import Callable

from hcot_lmeval.markup import MarkerIds
from tests.reference import FIRST_TEXT

VOCAB_SIZE = 64


def _text(rng: random.Random, low: int, high: int) -> list[int]:
    return [rng.randrange(FIRST_TEXT, VOCAB_SIZE) for _ in range(rng.randint(low, high))]


def _block(rng: random.Random, markers: MarkerIds, depth: int) -> list[int]:
    """One well-formed block; blocks within it, in thought and solution alike, up to `depth` deep."""
    lead = [] if markers.lead is None else [markers.lead]
    thought, solution = _body(rng, markers, depth - 1), _body(rng, markers, depth - 1)
    return [markers.open, *thought, markers.split, *lead, *solution, markers.close]


def _body(rng: random.Random, markers: MarkerIds, depth: int) -> list[int]:
    out = _text(rng, 0, 4)
    while depth > 0 and rng.random() < 0.45:
        out += _block(rng, markers, depth) + _text(rng, 0, 3)
    return out


def sequential(rng: random.Random, markers: MarkerIds, length: int) -> list[int]:
    """Flat well-formed blocks with text between them."""
    out = _text(rng, 0, 3)
    while len(out) < length:
        out += _block(rng, markers, 1) + _text(rng, 0, 3)
    return out[:length]


def nested(rng: random.Random, markers: MarkerIds, length: int) -> list[int]:
    """Blocks within blocks, three deep; a flat notation gets flat blocks."""
    out = _text(rng, 0, 3)
    while len(out) < length:
        out += _block(rng, markers, 3 if markers.nested else 1) + _text(rng, 0, 3)
    return out[:length]


def malformed(rng: random.Random, markers: MarkerIds, length: int) -> list[int]:
    """A well-formed trace in which about every fifth token was dropped, doubled, or replaced by a random marker."""
    out: list[int] = []
    for token in nested(rng, markers, 2 * length):
        luck = rng.random()
        if luck < 0.07:
            continue
        out += [token, token] if luck < 0.12 else [rng.choice(sorted(markers.ids))] if luck < 0.2 else [token]
    return out[:length]


def soup(rng: random.Random, markers: MarkerIds, length: int) -> list[int]:
    """Markers and text in any order; sometimes hardly any text."""
    share = rng.choice((0.3, 0.6, 0.95))
    acting = sorted(markers.ids)
    return [
        rng.choice(acting) if rng.random() < share else rng.randrange(FIRST_TEXT, VOCAB_SIZE) for _ in range(length)
    ]


SHAPES: dict[str, Callable[[random.Random, MarkerIds, int], list[int]]] = {
    "sequential": sequential,
    "nested": nested,
    "malformed": malformed,
    "soup": soup,
}


def random_trace(seed: int, markers: MarkerIds, length: int = 60, shape: str | None = None) -> tuple[list[int], int]:
    """Returns a trace and the length of its prompt (1 to 12 tokens, in one of four prompts with inert markers in it).

    Args:
        seed: of everything.
        markers: the notation.
        length: generated tokens, exactly.
        shape: a key of `SHAPES`; by default they take turns with the seed.
    """
    rng = random.Random(seed)
    make = SHAPES[shape or sorted(SHAPES)[seed % len(SHAPES)]]
    prompt = _text(rng, 1, 12)
    if rng.random() < 0.25:
        prompt = [rng.choice([token, *sorted(markers.ids)]) for token in prompt]
    generated = make(rng, markers, length)
    assert len(generated) == length
    return prompt + generated, len(prompt)
