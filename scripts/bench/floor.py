"""The floor: what a step costs at least, since it has to read all weights and the live keys and values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from bench.timing import as_graph, seconds

Product = Callable[[torch.Tensor], torch.Tensor]
"""A matrix product with a weight: [batch, in] -> [batch, out]."""

STEPS = 20
"""Steps that are timed at a time."""

KV_BYTES = 2**31
"""Most bytes of keys and values that are read in earnest; more take longer in proportion."""

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

    On CUDA each kind is one graph, and the time is that of the device: nothing in it waits for the host.

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
        self.bits = [m.view(torch.float32) for m in matrices]  # the sum of narrower types would be work
        self.inputs = [torch.randn(batch, m.shape[1]).to(m.device, m.dtype) for m in matrices]
        taken = max(4, min(kv_bytes, KV_BYTES))
        self.kv = torch.randn(taken // 4, device=self._device)  # as float32, whose sum is no work
        self.kv_scale = kv_bytes / taken
        self.kinds: dict[str, list[Product]] = {"linear": [_linear(m) for m in matrices]}
        if self._device.type == "cpu" and packs(model.dtype):
            self.kinds["packed"] = [_packed(m, batch) for m in matrices]
        self._work = {kind: self._graph(partial(self._stream, made)) for kind, made in self.kinds.items()}
        self._read_kv, self._read_weights = self._graph(self.kv.sum), self._graph(self._read)
        self._drop_slow_kinds()

    def _graph(self, work: Callable[[], Any]) -> Callable[[], Any]:
        return as_graph(work, self._device)

    def run(self) -> FloorTime:
        """Times some steps of every kind."""
        weights = {kind: self._median(work) for kind, work in self._work.items()}
        return FloorTime(weights, self._median(self._read_kv) * self.kv_scale, self._median(self._read_weights))

    def _drop_slow_kinds(self) -> None:
        """Frees the copies of weights that will not win."""
        self.run()
        weights = self.run().weights
        best = min(weights.values())
        kept = [kind for kind, taken in weights.items() if taken <= KEEP_WITHIN * best]
        self.kinds = {kind: self.kinds[kind] for kind in kept}
        self._work = {kind: self._work[kind] for kind in kept}

    @torch.inference_mode()
    def _stream(self, products: list[Product]) -> None:
        for product, rows in zip(products, self.inputs, strict=True):
            product(rows)

    @torch.inference_mode()
    def _read(self) -> None:
        for weight in self.bits:
            weight.sum()

    def _median(self, work: Callable[[], Any]) -> float:
        return seconds(work, self._device, runs=STEPS)


def _linear(weight: torch.Tensor) -> Product:
    return lambda rows: F.linear(rows, weight)


def packs(dtype: torch.dtype) -> bool:
    """Whether oneDNN can bring weights of this type into its own order here."""
    if not torch.backends.mkldnn.is_available():
        return False
    narrow = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return dtype == torch.float32 or (dtype in narrow and bool(narrow[dtype]()))


def _packed(weight: torch.Tensor, batch: int) -> Product:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, batch)
    return lambda rows: torch.ops.mkldnn._linear_pointwise(rows, packed, None, "none", [], "")
