"""The compiled step: hands tensors to the kernel by their addresses."""

from __future__ import annotations

import ctypes
import logging
from array import array
from collections.abc import Sequence
from typing import Any

import torch

from hcot_lmeval.engine.native.build import load_kernel
from hcot_lmeval.engine.native.packing import Source
from hcot_lmeval.engine.native.reading import Reading, WeightForm, WeightReader
from hcot_lmeval.engine.native.structures import MATRICES, Layer, Matrix, Model, Step
from hcot_lmeval.engine.native.weights import LayerWeights, Linear, ModelWeights, read_weights
from hcot_lmeval.engine.pages import move_to_huge_pages
from hcot_lmeval.engine.slots import Chunk, KVPool

logger = logging.getLogger(__name__)

ANGLES = 4096
"""Positions by which the table of rotary angles grows."""
FAULTS = ("", "a token id is", "a position is", "a place in the pool is", "the place of a wanted output is")
"""What the kernel refuses, by the numbers that it returns."""
TRIED_BYTES = 2**28
"""Weights that are read to time a way of reading them."""


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
        weights: WeightForm | str = WeightForm.PLAIN,
        rows: int = 1,
        huge_pages: bool = False,
    ) -> None:
        self._hf_model = model
        weight = next(model.parameters()).dtype
        self._kernel = load_kernel(weight, cache or weight)
        self._scratch = torch.empty(0, dtype=torch.uint8)
        self._scratch_sizes = (0, 0, 0)
        self._reader = WeightReader(weights, rows)
        found = read_weights(model)
        if huge_pages and (done := move_to_huge_pages(model)):
            logger.info("%s", done)
            found = read_weights(model)
        self._read(found)

    @property
    def reading(self) -> Reading:
        """How weights are read now."""
        return self._reader.reading

    def refresh(self) -> None:
        """Reads the model again if it has changed, be it through ``.data``, which PyTorch does not count as a change.

        Weights that the kernel reads where they are need no second look; what is a copy is compared with them.

        Raises:
            UnreadableModelError: it has become one that the kernel does not know.
            NoCopyError: a copy was asked for, and can no more be had.
        """
        weights = read_weights(self._hf_model)
        moved = any(not torch.equal(own.to(self.dtype), copy) for own, copy in self._copied)
        if moved or weights.state != self._state or self._reader.is_outdated():
            self._read(weights)

    def _read(self, weights: ModelWeights) -> None:
        self._weights = weights
        self.dtype = torch.promote_types(self._weights.dtype, torch.float32)
        self._vectors: list[torch.Tensor] = []  # what the kernel's structures point to and nobody else holds
        self._copied: list[tuple[torch.Tensor, torch.Tensor]] = []  # vectors of the model, and those of another type
        self._layers = (Layer * len(self._weights.layers))(*map(self._layer, self._weights.layers))
        self._model = self._describe(self._weights)
        self._pool: KVPool | None = None
        self._angles = torch.empty(2, 0)
        self._angle_addresses = (0, 0)
        self._reader.open(Source(self._hf_model, weights, self._kernel, self._model), self._product_seconds)
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
        wanted: list[int] = []
        seen = 0
        for chunk in chunks:
            count, start = len(chunk.ids), chunk.slot * pool.length
            end = chunk.start + count
            ids += chunk.ids
            positions += chunk.positions[chunk.start :]
            first += [start] * count
            rows += range(start + chunk.start, start + end)
            wanted.append(len(ids) - 1)
            seen = max(seen, end)
        cosine, sine = self._angles_up_to(max(positions))
        numbers = array("q", [*ids, *positions, *first, *rows, *wanted])  # making an array takes longer than filling it
        return self._run(numbers, len(ids), len(wanted), seen, cosine, sine)

    def _run(self, numbers: array[int], tokens: int, outputs: int, seen: int, cosine: int, sine: int) -> torch.Tensor:
        threads = torch.get_num_threads()
        logits = torch.empty(outputs, self._model.head.out, dtype=self.dtype)
        address, _ = numbers.buffer_info()
        lists = (address + i * tokens * numbers.itemsize for i in range(5))
        scratch = self._scratch_for(tokens, seen, threads)
        bounds = self._angles.shape[1], self._places
        step = Step(tokens, outputs, threads, *bounds, *lists, cosine, sine, logits.data_ptr(), scratch)
        fault = self._kernel.decode(ctypes.byref(self._model), ctypes.byref(step))
        if fault:
            raise IndexError(f"the step was not computed: {FAULTS[fault]} out of range")
        return logits

    def _product_seconds(self) -> float:
        """Seconds of products of a single token, weights being read as they are now."""
        threads = torch.get_num_threads()
        step = Step(tokens=1, threads=threads, scratch=self._scratch_for(1, 1, threads))
        self._scratch.zero_()
        model = ctypes.byref(self._model)
        return float(self._kernel.time_products(model, ctypes.byref(step), ctypes.c_size_t(TRIED_BYTES)))

    # --- memory -------------------------------------------------------------------------------------------------------

    def _scratch_for(self, tokens: int, seen: int, threads: int) -> int:
        """The address of enough scratch memory; it grows by doubling, so that contexts may."""
        held = self._scratch_sizes
        if tokens > held[0] or seen > held[1] or threads > held[2]:
            sizes = max(tokens, held[0]), max(2 * seen, held[1]), max(threads, held[2])
            size = self._kernel.scratch_bytes(ctypes.byref(self._model), *sizes)
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
        inner, hidden = weights.layers[0].gate.weight.shape
        return Model(
            self._layers,
            weights.embedding.data_ptr(),
            self._vector(weights.norm),
            self._matrix(weights.head),
            len(weights.layers),
            hidden,
            inner,
            weights.heads,
            weights.kv_heads,
            weights.dim,
            0,  # which the reader sets
            len(weights.embedding),
            weights.eps,
            weights.scaling,
        )

    def _layer(self, layer: LayerWeights) -> Layer:
        vectors = (layer.attention_norm, layer.mlp_norm, layer.query_norm, layer.key_norm)
        return Layer(
            *(self._matrix(getattr(layer, name)) for name in MATRICES), *map(self._vector, vectors), None, None
        )

    def _matrix(self, linear: Linear) -> Matrix:
        out, size = linear.weight.shape
        return Matrix(linear.weight.data_ptr(), self._vector(linear.bias), out, size)

    def _vector(self, vector: torch.Tensor | None) -> int | None:
        """The address of a vector in the type of sums, or None."""
        if vector is None:
            return None
        self._vectors.append(vector.detach().to(self.dtype).contiguous())
        if vector.dtype != self.dtype:
            self._copied.append((vector.detach(), self._vectors[-1]))
        return self._vectors[-1].data_ptr()
