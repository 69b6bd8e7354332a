"""Weights in fewer bits, without loss: a copy that the kernel reads instead where the memory is the limit.

Float32 weights of a checkpoint that was written in bfloat16 are copied as bfloat16. Of others, those that lie together
are of a few magnitudes: the exponents of a block seldom differ by 16 or more, so that 28 bits are enough;
kernel/packed.hpp has the layout. Both have the same values as the model's own weights, which stay where they are.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from hcot_lmeval.engine.native.structures import MATRICES, Matrix, Model, Packing
from hcot_lmeval.engine.native.weights import ModelWeights
from hcot_lmeval.engine.pages import allocate

logger = logging.getLogger(__name__)

MOST_MARKED = 1 / 16
"""Of all blocks may hold too many magnitudes to be packed; where there are more, a copy does not pay."""
ROWS = 256
"""Rows that are looked at together, so that no copy of a whole matrix is made in passing."""
Key = tuple[object, int, str]
"""State of the parameters, numbers in a block, digest of the weights."""


class NoCopyError(ValueError):
    """The weights cannot be copied into fewer bits; the message says why."""


@dataclass(frozen=True, eq=False)
class WeightCopy:
    """The matrices of a model in fewer bits.

    Attributes:
        key: changes with the weights and with the layout.
        narrow: whether it is in bfloat16; else it is in packed blocks.
        addresses: of each matrix's rows in bfloat16, or of its blocks and bases.
        memory: that they lie in.
    """

    key: Key
    narrow: bool
    addresses: tuple[tuple[int, ...], ...]
    memory: torch.Tensor

    @property
    def digest(self) -> str:
        """Of the weights; see `Source.digest`."""
        return self.key[2]

    def __str__(self) -> str:
        return f"{self.memory.nbytes / 2**30:.2f} GiB, {'bfloat16' if self.narrow else '28 bits each'}"

    def show_to(self, matrices: Sequence[Matrix], *, shown: bool) -> None:
        """Has the kernel find it, or no more."""
        names = ("narrow",) if self.narrow else ("blocks", "bases")
        for matrix, addresses in zip(matrices, self.addresses, strict=True):
            for name, address in zip(names, addresses, strict=True):
                setattr(matrix, name, address if shown else None)


@dataclass(frozen=True)
class Source:
    """What is copied.

    Attributes:
        owner: the model that the weights belong to.
        weights: as PyTorch has them.
        kernel: the compiled step.
        model: as the kernel has them.
    """

    owner: Any
    weights: ModelWeights
    kernel: ctypes.CDLL
    model: Model

    @property
    def matrices(self) -> list[Matrix]:
        """Of the kernel's model."""
        return self.model.matrices

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The same in PyTorch, [out, in] each."""
        linears = [getattr(layer, name) for layer in self.weights.layers for name in MATRICES]
        return [linear.weight.detach() for linear in (*linears, self.weights.head)]

    def digest(self) -> str:
        """Of the sums of the bits of every row, which takes little more than reading the weights once."""
        sums = [_words(tensor).sum(1).numpy().tobytes() for tensor in self.tensors]
        return hashlib.sha256(b"".join(sums)).hexdigest()


_COPIES: weakref.WeakKeyDictionary[Any, weakref.ref[WeightCopy]] = weakref.WeakKeyDictionary()


def copy_weights(source: Source, *, rows: int, share: float) -> WeightCopy:
    """Copies the matrices of a float32 model into fewer bits; all engines of the model have the same copy.

    Args:
        source: the weights.
        rows: that will run at the same time.
        share: of the free memory that may be taken.

    Raises:
        NoCopyError: the weights are not float32, or of too many magnitudes, the copy does not fit, or does not serve so
            many rows.
    """
    if source.weights.dtype != torch.float32:
        kind = str(source.weights.dtype).removeprefix("torch.")
        raise NoCopyError(f"its weights are {kind}: load it with dtype='float32', or use weights='auto'")
    packing = Packing()
    source.kernel.packing(ctypes.byref(packing))
    key = (source.weights.state, packing.numbers, source.digest())
    known = _COPIES.get(source.owner, lambda: None)()
    if known is None or known.key != key:
        narrow = all(map(_is_bfloat16, source.tensors))
        _check_rows(rows, packing.few if narrow else 1)
        start = time.perf_counter()
        known = _narrow(key, source.tensors, share) if narrow else _packed(key, source, packing, share)
        logger.info("weights copied into %s, in %.1f s", known, time.perf_counter() - start)
        _COPIES[source.owner] = weakref.ref(known)
    _check_rows(rows, packing.few if known.narrow else 1)
    return known


def _check_rows(rows: int, most: int) -> None:
    if rows > most:
        raise NoCopyError(f"{rows} rows run at the same time, and its weights in fewer bits serve {most} at most")


def _words(tensor: torch.Tensor) -> torch.Tensor:
    """The bits of rows as integers, of 8 bytes where rows have a whole number of them: those are summed faster."""
    even = tensor.shape[1] % 2 == 0 and tensor.storage_offset() % 2 == 0
    return tensor.view(torch.int64 if even else torch.int32)


def _is_bfloat16(tensor: torch.Tensor) -> bool:
    return all(torch.equal(rows.bfloat16().float(), rows) for rows in tensor.split(ROWS))


def _narrow(key: Key, tensors: Sequence[torch.Tensor], share: float) -> WeightCopy:
    memory = _allocate(sum(2 * tensor.numel() for tensor in tensors), share)
    numbers, addresses, at = memory.view(torch.bfloat16), [], 0
    for tensor in tensors:
        numbers[at : at + tensor.numel()].view(tensor.shape).copy_(tensor)
        addresses.append((memory.data_ptr() + 2 * at,))
        at += tensor.numel()
    return WeightCopy(key, True, tuple(addresses), memory)


def _packed(key: Key, source: Source, packing: Packing, share: float) -> WeightCopy:
    kernel, matrices = source.kernel, source.matrices
    blocks = [kernel.blocks(ctypes.byref(matrix)) for matrix in matrices]
    size, total, marked, addresses = 4 * packing.words, sum(blocks), 0, []
    memory = _allocate(total * (size + 1), share)
    at, base = memory.data_ptr(), memory.data_ptr() + size * total
    for matrix, count in zip(matrices, blocks, strict=True):
        target = Matrix.from_buffer_copy(matrix)
        target.blocks, target.bases = at, base
        marked += kernel.pack(ctypes.byref(target), torch.get_num_threads())
        addresses.append((at, base))
        at, base = at + size * count, base + count
    if marked > MOST_MARKED * total:
        raise NoCopyError(
            f"{marked / total:.0%} of the blocks of its weights hold numbers of too many magnitudes: use weights='auto'"
        )
    return WeightCopy(key, False, tuple(addresses), memory)


def _allocate(size: int, share: float) -> torch.Tensor:
    free = psutil.virtual_memory().available
    if size > share * free:
        raise NoCopyError(
            f"it takes {size / 2**30:.1f} GiB, and {share:.0%} of the {free / 2**30:.1f} GiB that are free may go to "
            "it: free memory, or use weights='auto'"
        )
    return allocate(size)
