"""The keys and values of all rows, one preallocated slot a row, pruned by changing a length; and memory on large pages.

A slot holds the live context of one row, oldest token first. Nothing is ever zeroed: what lies behind a row's length is
garbage (NaN when `poison` is set, so that a test notices if it is read).
"""

from __future__ import annotations

import ctypes
import gc
import math
import mmap
import time
import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch

MEMORY_SHARE = 0.9
"""Part of the free memory that the pool may take; the rest is left to activations and logits."""
KV_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float8_e4m3fn": torch.float8_e4m3fn}
"""What keys and values may be stored in instead of the dtype in which the model computes them."""
NARROW = (torch.float16, torch.float8_e4m3fn)
"""Dtypes whose range (65504 and 448) outliers among the keys may leave."""


Span = tuple[int, int]
"""The first token that leaves, and the first behind it that stays."""


class LayerSpec(NamedTuple):
    """What one attention layer computes and stores.

    Attributes:
        query_heads: heads of its queries, a multiple of `heads`.
        heads: of its keys and values.
        key_dim: numbers of a key.
        value_dim: numbers of a value.
        dtype: of queries, and of keys and values as they are computed.
        device: where it computes.
        window: see `hcot_lmeval.engine.attention.Scores`.
        softcap: see there.
        sinks: whether it has sinks, see there.
        stored: dtype of the keys and values in the slots; None for `dtype`.
    """

    query_heads: int
    heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    device: torch.device
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    stored: torch.dtype | None = None

    @property
    def kv_dtype(self) -> torch.dtype:
        """What the slots hold."""
        return self.stored or self.dtype

    @property
    def token_bytes(self) -> int:
        """Bytes of the slots per token."""
        return self.heads * (self.key_dim + self.value_dim) * self.kv_dtype.itemsize


@dataclass(frozen=True)
class Chunk:
    """Tokens to forward for one row in one step.

    Attributes:
        slot: the row's slot.
        start: live tokens that the slot holds.
        ids: token ids to append.
        positions: position ids of all live tokens after the step, ascending; the last `len(ids)` are those of `ids`.
    """

    slot: int
    start: int
    ids: Sequence[int]
    positions: Sequence[int]

    @property
    def stop(self) -> int:
        """Live tokens of the slot after the step."""
        return self.start + len(self.ids)


class KVPool:
    """Keys and values of `slots` rows of at most `length` live tokens.

    Args:
        layers: layer index to what it stores.
        slots: rows held at the same time.
        length: live tokens a slot can hold.
        poison: fill with NaN, for tests.
        huge_pages: on the CPU, lie on pages of 2 MiB where there are any.

    Attributes:
        keys: layer index to a tensor [slots, length, heads, key_dim].
        values: layer index to a tensor [slots, length, heads, value_dim].
        bytes: memory taken.
    """

    def __init__(
        self,
        layers: Mapping[int, LayerSpec],
        slots: int,
        length: int,
        *,
        poison: bool = False,
        huge_pages: bool = False,
    ) -> None:
        self.slots, self.length, self._huge_pages = slots, length, huge_pages
        self.keys = {i: self._empty(layer, layer.key_dim) for i, layer in layers.items()}
        self.values = {i: self._empty(layer, layer.value_dim) for i, layer in layers.items()}
        self._tensors = [*self.keys.values(), *self.values.values()]
        self.bytes = sum(tensor.nbytes for tensor in self._tensors)
        for tensor in self._tensors if poison else ():
            tensor.fill_(float("nan"))

    def _empty(self, layer: LayerSpec, dim: int) -> torch.Tensor:
        size = (self.slots, self.length, layer.heads, dim)
        if self._huge_pages and layer.device.type == "cpu":
            return allocate(math.prod(size) * layer.kv_dtype.itemsize).view(layer.kv_dtype).view(size)
        return torch.empty(size, dtype=layer.kv_dtype, device=layer.device)

    def write(self, layer: int, rows: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """Stores the keys and values of some tokens, rounded to the dtype of the pool.

        Args:
            layer: index of the layer.
            rows: place of each token, flattened over slots: slot * length + place; int64 [tokens].
            key: [tokens, heads, key_dim].
            value: [tokens, heads, value_dim].
        """
        write_rows(self.keys[layer], rows, key)
        write_rows(self.values[layer], rows, value)

    def drop(self, slot: int, spans: Sequence[Span], length: int) -> None:
        """Removes spans of tokens of a slot that holds `length`; what lies behind them moves down."""
        for tensor in self._tensors:
            drop_spans(tensor[slot], spans, length)

    def copy(self, source: int, target: int, length: int) -> None:
        """Copies the first `length` tokens of one slot to another."""
        for tensor in self._tensors:
            tensor[target, :length] = tensor[source, :length]


def drop_spans(tensor: torch.Tensor, spans: Sequence[Span], length: int) -> None:
    """Removes spans, ascending, from the first `length` entries of a tensor; what lies behind them moves down."""
    for start, stop in reversed(spans):
        tensor[start : start + length - stop] = tensor[stop:length].clone()
        length -= stop - start


def write_rows(slots: torch.Tensor, rows: torch.Tensor, new: torch.Tensor) -> None:
    """Stores `new`, [tokens, heads, dim], in slots [slots, length, heads, dim]; `rows` as in `KVPool.write`."""
    flat, new = slots.flatten(0, 1), round_to(new, slots.dtype)
    if slots.dtype.itemsize == 1:  # what few operations know as numbers is moved as bytes
        flat, new = flat.view(torch.uint8), new.view(torch.uint8)
    flat.index_copy_(0, rows, new)


def round_to(numbers: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rounds to the nearest number of a dtype; what is beyond the range of a narrow one becomes its largest."""
    if dtype in NARROW and numbers.dtype != dtype:
        numbers = numbers.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max)
    return numbers.to(dtype)


def upload(values: Sequence[int] | Sequence[float], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor on `device` without a wait: from pinned memory, which its allocator keeps until the copy is done."""
    tensor = torch.tensor(values, dtype=dtype)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def free_bytes(device: torch.device) -> int:
    """Returns the memory that can be allocated on `device` now."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + cached
    return int(psutil.virtual_memory().available)


def release_memory(device: torch.device) -> None:
    """Gives back what PyTorch keeps for later."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def plan_slots(
    layers: Mapping[int, LayerSpec], length: int, most: int, beside: Mapping[torch.device, tuple[int, int]] = {}
) -> int:
    """Returns how many slots of `length` tokens the free memory of every device involved can hold, at most `most`.

    Args:
        layers: of the model.
        length: live tokens of a slot.
        most: slots.
        beside: bytes that are needed beside keys and values, by device: at once, and of each row.

    Raises:
        MemoryError: not even one slot fits; the message says which option to lower.
    """
    need: Counter[torch.device] = Counter({device: each for device, (_, each) in beside.items() if each})
    for layer in layers.values():
        need[layer.device] += layer.token_bytes * length
    free = {device: free_bytes(device) - beside.get(device, (0, 0))[0] for device in need}
    fit = min(int(MEMORY_SHARE * free[device]) // size for device, size in need.items())
    if fit < 1:
        raise MemoryError(
            f"one row of {length} live tokens needs {need.total() / 2**20:,.0f} MiB of keys and values, which is more "
            "than the free memory; lower max_context (or max_gen_toks, if no prompt is that long), or choose a smaller "
            "dtype"
        )
    return min(most, fit)


# --- memory on pages of 2 MiB, which is read somewhat faster than on those of 4 KiB; docs/native.md says how much -----

PAGE = 2**21
LEAST_BYTES = 2**26
"""Weights of a smaller model stay in the processor's cache, more or less."""
SWITCH = Path("/sys/kernel/mm/transparent_hugepage/enabled")
ALIGNMENT = 64
"""Bytes; a line of the cache."""


class _Memory(mmap.mmap):
    """Anonymous memory that lives as long as a tensor in it; `first` is the address of its first huge page."""

    first: int


_LIVE: weakref.WeakSet[_Memory] = weakref.WeakSet()


def move_to_huge_pages(model: Any) -> str:
    """Copies a model's parameters into memory for which Linux is asked for pages of 2 MiB; the old memory is freed.

    They stay the same objects with the same values and are only stored elsewhere, one after the other, so that at no
    time there are two copies of more than one of them. Transformers maps a checkpoint's file, of which no such pages
    can be had. Tensors outside the model that shared a parameter's memory, such as an earlier `state_dict`, keep the
    old memory and its numbers.

    Returns:
        What was done, in words; an empty text if there is nothing to do or nothing to be had: a model of less than 64
        MiB, no Linux, huge pages switched off, not enough free memory, memory that is shared with other processes or
        between parameters, or was moved before.
    """
    found = [p for p in _movable(model) if not _moved(p)]
    total = sum(_room(p) for p in found)
    if total < LEAST_BYTES or not offered() or psutil.virtual_memory().available < 1.2 * total:
        return ""
    start, memory, at = time.perf_counter(), _allocate(total), 0
    for parameter in found:
        parameter.data = _copied(parameter.data, memory, at)
        at += _room(parameter)
    return f"{total / 2**30:.1f} GiB of weights on pages of 2 MiB, in {time.perf_counter() - start:.1f} s"


def allocate(size: int) -> torch.Tensor:
    """Returns so many bytes of memory, uint8, on such pages where Linux offers them and one of them is filled."""
    if size < PAGE or not offered():
        return torch.empty(size, dtype=torch.uint8)
    memory = _allocate(size)
    return torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=memory.first - _address(memory))


def offered() -> bool:
    """Whether the system gives huge pages to those who ask."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return False
    try:
        return "[never]" not in SWITCH.read_text(encoding="utf-8")
    except OSError:
        return False


def _movable(model: Any) -> list[torch.nn.Parameter]:
    """Parameters on the CPU that have their memory to themselves and fill it."""
    parameters = [p for p in model.parameters() if p.device.type == "cpu" and p.is_contiguous()]
    owners = Counter(p.untyped_storage().data_ptr() for p in parameters)
    return [
        p
        for p in parameters
        if owners[p.untyped_storage().data_ptr()] == 1
        and p.untyped_storage().nbytes() == p.nbytes > 0
        and not p.is_shared()
    ]


def _moved(parameter: torch.nn.Parameter) -> bool:
    return any(memory.first <= parameter.data_ptr() < memory.first + len(memory) for memory in _LIVE)


def _room(parameter: torch.nn.Parameter) -> int:
    return -(-parameter.nbytes // ALIGNMENT) * ALIGNMENT


def _allocate(size: int) -> _Memory:
    memory = _Memory(-1, size + PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    memory.first = -(-_address(memory) // PAGE) * PAGE
    _LIVE.add(memory)
    return memory


def _address(memory: _Memory) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def _copied(data: torch.Tensor, memory: _Memory, at: int) -> torch.Tensor:
    """Returns the same numbers, stored `at` bytes behind the first page."""
    offset = memory.first - _address(memory) + at
    stored = torch.frombuffer(memory, dtype=data.dtype, count=data.numel(), offset=offset).view(data.shape)
    return stored.copy_(data)
