"""Memory on pages of 2 MiB, which is read somewhat faster than on those of 4 KiB; docs/native.md says how much."""

from __future__ import annotations

import ctypes
import mmap
import time
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import torch

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
