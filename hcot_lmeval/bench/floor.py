"""The floor: what a step costs at least, since it has to read all weights and the live keys and values."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

Product = Callable[[torch.Tensor], torch.Tensor]
"""A matrix product with a weight: [batch, in] -> [batch, out]."""

STEPS = 20
"""Steps that are timed at a time."""

KEEP_WITHIN = 1.5
"""Kinds of product that are slower than the fastest by more than this in the first try are not tried again."""


@dataclass(frozen=True)
class FloorTime:
    """Seconds of a step at least.

    Attributes:
        weights: the matrix products, by kind.
        kv: reading the live keys and values once.
        read: reading the weights once, by summing them.
    """

    weights: dict[str, float]
    kv: float
    read: float

    @property
    def kind(self) -> str:
        """The fastest kind of product."""
        return min(self.weights, key=lambda kind: self.weights[kind])

    @property
    def seconds(self) -> float:
        """The floor: the fastest products, and the keys and values."""
        return self.weights[self.kind] + self.kv

    @property
    def memory(self) -> float:
        """What no engine can beat that has its weights in this dtype: everything is read, and nothing is multiplied."""
        return self.read + self.kv


class Floor:
    """Streams all weights of a model through bare matrix products, and reads the live keys and values.

    No norm, no activation, no attention, no sampling, and no work between the products: what a decoder can reach, not
    what it will. The products are those of the model's matrices as they are, the output layer's once, in the model's
    dtype; each kind is timed and the fastest counts: ``linear`` is plain `F.linear`, ``packed`` oneDNN with weights
    that were brought into its order beforehand (CPU only).

    Libraries do not reach the memory's speed on every chip, with one row least of all. So the weights are summed too,
    which does.

    Args:
        model: a causal language model of transformers.
        batch: rows of the products.
        kv_bytes: size of the live keys and values of all rows.
    """

    def __init__(self, model: Any, batch: int, kv_bytes: int) -> None:
        self._device = model.device
        matrices = [m.weight.detach() for m in model.modules() if isinstance(m, torch.nn.Linear)]
        self._bits = [m.view(torch.float32) for m in matrices]  # the sum of narrower types would be work
        self._inputs = [torch.randn(batch, m.shape[1]).to(m.device, m.dtype) for m in matrices]
        self._kv = torch.randn(max(1, kv_bytes // 4), device=self._device)  # as float32, whose sum is no work
        self._kinds: dict[str, list[Product]] = {"linear": [_linear(m) for m in matrices]}
        if self._device.type == "cpu" and torch.backends.mkldnn.is_available():
            self._kinds["packed"] = [_packed(m, batch) for m in matrices]
        self._drop_slow_kinds()

    def run(self) -> FloorTime:
        """Times some steps of every kind."""
        weights = {kind: self._median(partial(self._stream, products)) for kind, products in self._kinds.items()}
        return FloorTime(weights, self._median(self._kv.sum), self._median(self._read))

    def _drop_slow_kinds(self) -> None:
        """Frees the copies of weights that will not win."""
        self.run()
        weights = self.run().weights
        best = min(weights.values())
        self._kinds = {kind: self._kinds[kind] for kind, seconds in weights.items() if seconds <= KEEP_WITHIN * best}

    @torch.inference_mode()
    def _stream(self, products: list[Product]) -> None:
        for product, rows in zip(products, self._inputs, strict=True):
            product(rows)

    @torch.inference_mode()
    def _read(self) -> None:
        for weight in self._bits:
            weight.sum()

    def _median(self, work: Callable[[], Any]) -> float:
        times = []
        for _ in range(STEPS):
            start = time.perf_counter()
            work()
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            times.append(time.perf_counter() - start)
        return statistics.median(times)


def _linear(weight: torch.Tensor) -> Product:
    return lambda rows: F.linear(rows, weight)


def _packed(weight: torch.Tensor, batch: int) -> Product:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, batch)
    return lambda rows: torch.ops.mkldnn._linear_pointwise(rows, packed, None, "none", [], "")
