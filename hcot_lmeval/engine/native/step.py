"""The compiled step: hands tensors to the kernel by their addresses."""

from __future__ import annotations

import ctypes
import logging
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from hcot_lmeval.engine.native.build import KernelUnavailableError, load_kernel
from hcot_lmeval.engine.native.packing import NoCopyError, Reading, Source, WeightReader
from hcot_lmeval.engine.native.weights import (
    MATRICES,
    NORMS,
    Layer,
    Matrix,
    Model,
    ModelWeights,
    Step,
    UnreadableModelError,
    read_weights,
)
from hcot_lmeval.engine.options import ComputeOptions
from hcot_lmeval.engine.slots import Chunk, KVPool, move_to_huge_pages

logger = logging.getLogger(__name__)

ANGLES = 4096
"""Positions by which the table of rotary angles grows."""
FAULTS = ("", "a token id is", "a position is", "a place in the pool is", "the place of an output is")
"""What the kernel refuses, by the numbers that it returns."""
TRIED_BYTES = 2**28
"""Weights that are read to time a way of reading them."""
UNAVAILABLE = (KernelUnavailableError, UnreadableModelError, NoCopyError)
"""Why there may be no compiled step."""


def refusal(error: Exception, name: str, options: ComputeOptions) -> str:
    """What to say to somebody who asked for compiled steps, or packed weights, of a model; empty if nobody did."""
    if isinstance(error, NoCopyError):
        return f"weights='packed': {name} has no packed copy, since {error}."
    if options.compute == "native":
        return f"compute='native' cannot run {name}: {error}. Use compute='auto', which leaves it to PyTorch."
    if options.weights == "packed":
        return f"weights='packed': {name} is left to PyTorch, which has no packed weights: {error}. Use weights='auto'."
    return ""


class NativeStep:
    """Forwards packed chunks of a Llama-like model on the CPU, with one call of the kernel.

    Each logit is summed in an order that depends neither on the other tokens of the step nor on the number of threads,
    so results are the same bit for bit at every batch size.

    Args:
        model: a causal language model of transformers.
        cache: dtype of keys and values; by default that of the weights.
        weights: how they are read; a copy is made where it is faster and takes at most half of the free memory, or
            where it is asked for. Once the weights change, it is made anew only in the latter case.
        rows: that run at the same time at most; a copy serves few.
        huge_pages: move the model's weights to such pages, if there are any (`move_to_huge_pages`).

    Attributes:
        owner: the model of transformers.
        model: the same as the kernel has it.
        kernel: the library.
        reader: chooses how weights are read.
        dtype: of logits.

    Raises:
        KernelUnavailableError: the kernel cannot be compiled here.
        UnreadableModelError: the model is not of the kind the kernel knows.
        NoCopyError: a copy was asked for, and cannot be had.
    """

    def __init__(
        self,
        model: Any,
        cache: torch.dtype | None = None,
        *,
        weights: str = "plain",
        rows: int = 1,
        huge_pages: bool = False,
    ) -> None:
        self.owner = model
        weight = next(model.parameters()).dtype
        self.kernel = load_kernel(weight, cache or weight)
        self._scratch = torch.empty(0, dtype=torch.uint8)
        self._scratch_sizes = (0, 0, 0)
        self.reader = WeightReader(weights, rows)
        found = read_weights(model)
        if huge_pages and (done := move_to_huge_pages(model)):
            logger.info("%s", done)
            found = read_weights(model)
        self._read(found)

    @property
    def reading(self) -> Reading:
        """How weights are read now."""
        return self.reader.reading

    def refresh(self) -> None:
        """Reads the model again if it has changed, be it through ``.data``, which PyTorch does not count as a change.

        Weights that the kernel reads where they are need no second look; what is a copy is compared with them.

        Raises:
            UnreadableModelError: it has become one that the kernel does not know.
            NoCopyError: a copy was asked for, and can no more be had.
        """
        weights = read_weights(self.owner)
        moved = any(not torch.equal(own.to(self.dtype), copy) for own, copy in self._copied)
        if moved or weights.state != self._state or self.reader.is_outdated():
            self._read(weights)

    def _read(self, weights: ModelWeights) -> None:
        self._weights = weights
        self.dtype = torch.promote_types(self._weights.dtype, torch.float32)
        self._vectors: list[torch.Tensor] = []  # what the kernel's structures point to and nobody else holds
        self._copied: list[tuple[torch.Tensor, torch.Tensor]] = []  # vectors of the model, and those of another type
        self._layers = (Layer * len(self._weights.layers))(*map(self._layer, self._weights.layers))
        self.model = self._describe(self._weights)
        self._pool: KVPool | None = None
        self._angles = torch.empty(2, 0)
        self._angle_addresses = (0, 0)
        self.reader.open(Source(self.owner, weights, self.kernel, self.model), self.product_seconds)
        self._state = weights.state  # last, so that what failed is tried again

    def forward(self, pool: KVPool, chunks: Sequence[Chunk]) -> torch.Tensor:
        """Appends the chunks to their slots.

        Returns:
            The logits after the last token of each chunk: [chunks, vocabulary], float32 (float64 for double models).

        Raises:
            IndexError: a token id, position or slot is out of range.
        """
        self._point_to(pool)
        ids: list[int] = []
        positions: list[int] = []
        first: list[int] = []
        rows: list[int] = []
        last: list[int] = []
        seen = 0
        for chunk in chunks:
            count, start = len(chunk.ids), chunk.slot * pool.length
            end = chunk.start + count
            ids += chunk.ids
            positions += chunk.positions[chunk.start :]
            first += [start] * count
            rows += range(start + chunk.start, start + end)
            last.append(len(ids) - 1)
            seen = max(seen, end)
        cosine, sine = self._angles_up_to(max(positions))
        numbers = array("q", [*ids, *positions, *first, *rows, *last])  # making an array takes longer than filling it
        return self._run(numbers, len(ids), len(last), seen, cosine, sine)

    def _run(self, numbers: array[int], tokens: int, outputs: int, seen: int, cosine: int, sine: int) -> torch.Tensor:
        threads = torch.get_num_threads()
        logits = torch.empty(outputs, self.model.head.out, dtype=self.dtype)
        address, _ = numbers.buffer_info()
        lists = (address + i * tokens * numbers.itemsize for i in range(5))
        scratch = self._scratch_for(tokens, seen, threads)
        bounds = self._angles.shape[1], self._places
        step = Step(tokens, outputs, threads, *bounds, *lists, cosine, sine, logits.data_ptr(), scratch)
        fault = self.kernel.decode(ctypes.byref(self.model), ctypes.byref(step))
        if fault:
            raise IndexError(f"the step was not computed: {FAULTS[fault]} out of range")
        return logits

    def product_seconds(self) -> float:
        """Seconds of products of a single token, weights being read as they are now."""
        threads = torch.get_num_threads()
        step = Step(tokens=1, threads=threads, scratch=self._scratch_for(1, 1, threads))
        self._scratch.zero_()
        model = ctypes.byref(self.model)
        return float(self.kernel.time_products(model, ctypes.byref(step), ctypes.c_size_t(TRIED_BYTES)))

    # --- memory -------------------------------------------------------------------------------------------------------

    def _scratch_for(self, tokens: int, seen: int, threads: int) -> int:
        """The address of enough scratch memory; it grows by doubling, so that contexts may."""
        held = self._scratch_sizes
        if tokens > held[0] or seen > held[1] or threads > held[2]:
            sizes = max(tokens, held[0]), max(2 * seen, held[1]), max(threads, held[2])
            size = self.kernel.scratch_bytes(ctypes.byref(self.model), *sizes)
            self._scratch, self._scratch_sizes = torch.empty(size, dtype=torch.uint8), sizes
        return self._scratch.data_ptr()

    def _angles_up_to(self, position: int) -> tuple[int, int]:
        """The addresses of cosines and sines of at least the positions [0, position], two tensors [positions, dim]."""
        if position >= self._angles.shape[1]:
            size = (position // ANGLES + 1) * ANGLES
            like, positions = torch.empty(1, dtype=self.dtype), torch.arange(size)[None]
            with torch.inference_mode():
                self._angles = torch.cat(self._weights.rotary(like, positions)).contiguous()
            self._angle_addresses = self._angles[0].data_ptr(), self._angles[1].data_ptr()
        return self._angle_addresses

    def _point_to(self, pool: KVPool) -> None:
        if self._pool is pool:
            return
        for index, layer in enumerate(self._layers):
            layer.keys, layer.values = pool.keys[index].data_ptr(), pool.values[index].data_ptr()
        self._pool, self._places = pool, pool.slots * pool.length

    # --- the kernel's structures --------------------------------------------------------------------------------------

    def _describe(self, weights: ModelWeights) -> Model:
        inner, hidden = weights.layers[0]["gate"].weight.shape
        return Model(
            layers=self._layers,
            embedding=weights.embedding.data_ptr(),
            norm=self._vector(weights.norm.weight),
            head=self._matrix(weights.head),
            count=len(weights.layers),
            hidden=hidden,
            inner=inner,
            heads=weights.heads,
            kv_heads=weights.kv_heads,
            dim=weights.dim,
            known=len(weights.embedding),
            eps=weights.eps,
            scaling=weights.scaling,
        )

    def _layer(self, parts: Mapping[str, Any]) -> Layer:
        matrices = {name: self._matrix(parts[name]) for name in MATRICES}
        norms = {name: parts[name] and self._vector(parts[name].weight) for name in NORMS}
        return Layer(**matrices, **norms)

    def _matrix(self, linear: torch.nn.Linear) -> Matrix:
        out, size = linear.weight.shape
        bias = None if linear.bias is None else self._vector(linear.bias)
        return Matrix(rows=linear.weight.data_ptr(), bias=bias, out=out, columns=size)

    def _vector(self, vector: torch.Tensor) -> int:
        """The address of a vector in the type of sums."""
        self._vectors.append(vector.detach().to(self.dtype).contiguous())
        if vector.dtype != self.dtype:
            self._copied.append((vector.detach(), self._vectors[-1]))
        return self._vectors[-1].data_ptr()
