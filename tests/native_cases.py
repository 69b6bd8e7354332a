"""What the tests of the compiled step share: shapes of models, steps, and processors that can do less."""

import platform

import pytest

from hcot_lmeval.engine.slots import Chunk

SHAPES = {
    "even": {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2},
    "odd": {"hidden_size": 42, "intermediate_size": 77, "num_attention_heads": 3, "num_key_value_heads": 1},
    "wide": {"hidden_size": 56, "num_attention_heads": 14, "num_key_value_heads": 2, "head_dim": 80},
    "all": {"hidden_size": 40, "num_attention_heads": 5, "num_key_value_heads": 5, "tie_word_embeddings": True},
    "long": {"hidden_size": 328, "intermediate_size": 600, "num_attention_heads": 4, "num_key_value_heads": 2},
}


def chunk(slot, start, ids, positions=None):
    return Chunk(slot, start, tuple(ids), positions or list(range(start + len(ids))))


STEPS = [
    [chunk(2, 0, range(9, 20)), chunk(0, 0, [5, 6])],
    [chunk(2, 11, [7]), chunk(0, 2, [8, 9], [0, 1, 6, 7]), chunk(1, 0, [9])],
    [chunk(2, 4, [21, 22, 23]), chunk(0, 3, [10], [0, 1, 6, 9])],
    [chunk(0, 4, range(30, 39)), chunk(1, 1, range(31, 39))],
]
"""Prompts, single tokens, a rewind, positions with gaps; ragged."""

X86 = platform.machine().lower() in ("x86_64", "amd64")
NARROWER = ("-mno-avx512f", "-mno-avx", "-mno-avx512bf16")
"""Flags that leave instructions out, as for another processor of the x86 kind."""
LESS = [
    *(pytest.param(flag, marks=pytest.mark.skipif(not X86, reason="the flags are those of x86")) for flag in NARROWER),
    "-DVECTOR_BYTES=64",
    "-DVECTOR_BYTES=32",
]
"""Other processors than the host, or at least the width of their vectors: 16 and 8 lanes of float on any host."""
