"""The compiled step: hands tensors to the kernel by their addresses."""

from __future__ import annotations

import ctypes
import logging
from array import array
from collections.abc import Sequence
from typing import Any

import torch

from hcot_lmeval.engine.native.build import load_kernel
from hcot_lmeval.engine.native.pages import move_to_huge_pages
from hcot_lmeval.engine.native.weights import LayerWeights, Linear, ModelWeights, read_weights
from hcot_lmeval.engine.slots import Chunk, KVPool

logger = logging.getLogger(__name__)

ANGLES = 4096
"""Positions by which the table of rotary angles grows."""
DISTANCES = (512, 2560, 0)
"""Ways to read the weights for one row of activations: one row of weights after the other, so many bytes being fetched
ahead, or (0) several side by side. Of the first two, the first was the faster on a Zen 3, by up to a tenth, the second
on a Zen 4, by up to a third; the last is faster in bfloat16 where rows are long and there is no instruction for it."""
TRIED_BYTES, TRIALS, GAIN = 2**28, 10, 1.05
"""Weights that are read, and how often, to choose a way; how many times as fast as the first another has to be."""


class _Matrix(ctypes.Structure):
    _fields_ = (
        ("rows", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("out", ctypes.c_int),
        ("in", ctypes.c_int),
    )


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, _Matrix) for name in ("query", "key", "value", "output", "gate", "up", "down")),
        *((name, ctypes.c_void_p) for name in ("attention_norm", "mlp_norm", "query_norm", "key_norm")),
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
    )


class _Model(ctypes.Structure):
    _fields_ = (
        ("layers", ctypes.POINTER(_Layer)),
        ("embedding", ctypes.c_void_p),
        ("norm", ctypes.c_void_p),
        ("head", _Matrix),
        *((name, ctypes.c_int) for name in ("count", "hidden", "inner", "heads", "kv_heads", "dim", "far")),
        ("eps", ctypes.c_double),
        ("scaling", ctypes.c_double),
    )


class _Step(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int) for name in ("tokens", "outputs", "threads")),
        *((name, ctypes.c_void_p) for name in ("ids", "positions", "first", "row", "wanted")),
        *((name, ctypes.c_void_p) for name in ("cosine", "sine", "logits", "scratch")),
    )


class NativeStep:
    """Forwards packed chunks of a Llama-like model on the CPU, with one call of the kernel.

    Each logit is summed in an order that depends neither on the other tokens of the step nor on the number of threads,
    so results are the same bit for bit at every batch size.

    Args:
        model: a causal language model of transformers.
        cache: dtype of keys and values; by default that of the weights.
        huge_pages: move the model's weights to such pages, if there are any (`move_to_huge_pages`).

    Raises:
        KernelUnavailableError: the kernel cannot be compiled here.
        UnreadableModelError: the model is not of the kind the kernel knows.
    """

    def __init__(self, model: Any, cache: torch.dtype | None = None, *, huge_pages: bool = False) -> None:
        self._hf_model = model
        weight = next(model.parameters()).dtype
        self._kernel = load_kernel(weight, cache or weight)
        self._kernel.scratch_bytes.restype = ctypes.c_size_t
        self._kernel.time_products.restype = ctypes.c_double
        self._scratch = torch.empty(0, dtype=torch.uint8)
        self._scratch_sizes = (0, 0, 0)
        self.distance = DISTANCES[0]
        weights = read_weights(model)
        if huge_pages and (done := move_to_huge_pages(model)):
            logger.info("%s", done)
            weights = read_weights(model)
        self._read(weights)
        self._find_distance()

    def refresh(self) -> None:
        """Reads the model again if it has changed.

        Raises:
            UnreadableModelError: it has become one that the kernel does not know.
        """
        weights = read_weights(self._hf_model)
        if weights.state != self._state:
            self._read(weights)

    def _read(self, weights: ModelWeights) -> None:
        self._weights, self._state = weights, weights.state
        self.dtype = torch.promote_types(self._weights.dtype, torch.float32)
        self._vectors: list[torch.Tensor] = []  # what the kernel's structures point to and nobody else holds
        self._layers = (_Layer * len(self._weights.layers))(*map(self._layer, self._weights.layers))
        self._model = self._describe(self._weights)
        self._pool: KVPool | None = None
        self._angles = torch.empty(2, 0)
        self._angle_addresses = (0, 0)

    def forward(self, pool: KVPool, chunks: Sequence[Chunk]) -> torch.Tensor:
        """Appends the chunks to their slots.

        Returns:
            The logits after the last token of each chunk: [chunks, vocabulary], float32 (float64 for double models).
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
        step = _Step(tokens, outputs, threads, *lists, cosine, sine, logits.data_ptr(), scratch)
        self._kernel.decode(ctypes.byref(self._model), ctypes.byref(step))
        return logits

    def _find_distance(self) -> None:
        """Tries how weights are best read here. It changes the time of a step and nothing else."""
        if sum(p.nbytes for p in self._hf_model.parameters()) < TRIED_BYTES // 4:
            return  # they stay in the cache
        times = [[self._time_products(distance) for distance in DISTANCES] for _ in range(TRIALS)]  # by turns
        best = dict(zip(DISTANCES, map(min, zip(*times, strict=True)), strict=True))
        first, *others = DISTANCES
        fastest = min(others, key=lambda distance: best[distance])
        self.distance = self._model.far = fastest if GAIN * best[fastest] < best[first] else first
        told = ", ".join(f"{distance}: {1000 * best[distance]:.1f} ms" for distance in DISTANCES)
        logger.info("single rows fetch weights %d bytes ahead (%s)", self.distance, told)

    def _time_products(self, distance: int) -> float:
        self._model.far, threads = distance, torch.get_num_threads()
        step = _Step(tokens=1, threads=threads, scratch=self._scratch_for(1, 1, threads))
        self._scratch.zero_()
        model = ctypes.byref(self._model)
        return float(self._kernel.time_products(model, ctypes.byref(step), ctypes.c_size_t(TRIED_BYTES)))

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
        self._pool = pool

    # --- the kernel's structures --------------------------------------------------------------------------------------

    def _describe(self, weights: ModelWeights) -> _Model:
        inner, hidden = weights.layers[0].gate.weight.shape
        return _Model(
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
            self.distance,
            weights.eps,
            weights.scaling,
        )

    def _layer(self, layer: LayerWeights) -> _Layer:
        matrices = (layer.query, layer.key, layer.value, layer.output, layer.gate, layer.up, layer.down)
        vectors = (layer.attention_norm, layer.mlp_norm, layer.query_norm, layer.key_norm)
        return _Layer(*map(self._matrix, matrices), *map(self._vector, vectors), None, None)

    def _matrix(self, linear: Linear) -> _Matrix:
        out, size = linear.weight.shape
        return _Matrix(linear.weight.data_ptr(), self._vector(linear.bias), out, size)

    def _vector(self, vector: torch.Tensor | None) -> int | None:
        """The address of a vector in the type of sums, or None."""
        if vector is None:
            return None
        self._vectors.append(vector.detach().to(self.dtype).contiguous())
        return self._vectors[-1].data_ptr()
