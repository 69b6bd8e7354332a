"""The kernel's structures, field by field as in kernel/step.cpp and kernel/products.hpp."""

from __future__ import annotations

import ctypes

MATRICES = ("query", "key", "value", "output", "gate", "up", "down")
"""Of a layer, in the kernel's order; `hcot_lmeval.engine.native.weights` has them under the same names."""


class Matrix(ctypes.Structure):
    """Rows of weights, a bias or null, and copies of the rows or null."""

    _fields_ = (
        ("rows", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("out", ctypes.c_int),
        ("columns", ctypes.c_int),
        ("narrow", ctypes.c_void_p),
        ("blocks", ctypes.c_void_p),
        ("bases", ctypes.c_void_p),
    )


class Layer(ctypes.Structure):
    """One layer, and its keys and values in the pool."""

    _fields_ = (
        *((name, Matrix) for name in MATRICES),
        *((name, ctypes.c_void_p) for name in ("attention_norm", "mlp_norm", "query_norm", "key_norm")),
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
    )


class Model(ctypes.Structure):
    """A whole model, and how its weights are read."""

    _fields_ = (
        ("layers", ctypes.POINTER(Layer)),
        ("embedding", ctypes.c_void_p),
        ("norm", ctypes.c_void_p),
        ("head", Matrix),
        *((name, ctypes.c_int) for name in ("count", "hidden", "inner", "heads", "kv_heads", "dim", "far", "known")),
        ("eps", ctypes.c_double),
        ("scaling", ctypes.c_double),
    )

    @property
    def matrices(self) -> list[Matrix]:
        """Layer by layer, and the head."""
        layers = [self.layers[index] for index in range(self.count)]
        return [*(getattr(layer, name) for layer in layers for name in MATRICES), self.head]


class Step(ctypes.Structure):
    """Tokens of a step, and where its results and its scratch go."""

    _fields_ = (
        *((name, ctypes.c_int) for name in ("tokens", "outputs", "threads", "angles", "places")),
        *((name, ctypes.c_void_p) for name in ("ids", "positions", "first", "row", "wanted")),
        *((name, ctypes.c_void_p) for name in ("cosine", "sine", "logits", "scratch")),
    )


class Packing(ctypes.Structure):
    """Numbers in a block of packed rows, the words it takes, and the tokens that rows in bfloat16 serve."""

    _fields_ = (("numbers", ctypes.c_int), ("words", ctypes.c_int), ("few", ctypes.c_int))
