"""Weights in fewer bits, without loss, and the fastest way to read weights, which is found by trying.

Float32 weights of a checkpoint that was written in bfloat16 are copied as bfloat16. Of others, those that lie together
are of a few magnitudes: the exponents of a block seldom differ by 16 or more, so that 28 bits are enough;
kernel/packed.hpp has the layout. Both have the same values as the model's own weights, which stay where they are. How
the kernel reads weights changes the time of a step and nothing else.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import psutil
import torch

from hcot_lmeval.engine.native.weights import Matrix, Model, ModelWeights, Packing
from hcot_lmeval.engine.slots import LEAST_BYTES, allocate

logger = logging.getLogger(__name__)

MOST_MARKED = 1 / 16
"""The part of all blocks that may hold too many magnitudes to be packed; with more, a copy does not pay."""
ROWS = 256
"""Rows that are looked at together, so that no copy of a whole matrix is made in passing."""
Key = tuple[object, int, str]
"""State of the parameters, numbers in a block, digest of the weights."""
DISTANCES = (512, 2560, 0)
"""Bytes by which the weights for one row of activations are fetched ahead, one row of weights after the other; or (0)
several rows side by side. Of the first two, the first was the faster on a Zen 3, by up to a tenth, the second on a
Zen 4, by up to a third; the last is faster in bfloat16 where rows are long and there is no instruction for it."""
PACKED_DISTANCES = (1536, 1024, 2560)
"""The same for packed rows, of which every eight are read together."""
TRIALS = 10
"""How often each way is tried."""
GAIN, COPY_GAIN = 1.05, 1.02
"""How many times as fast as the first distance another has to be; and a copy, which takes memory, as the weights."""


SHARE = {"auto": 0.5, "packed": 0.9}
"""The part of the free memory that a copy of the weights may take."""


class Reading(NamedTuple):
    """A way to read weights.

    Attributes:
        copied: from the copy in fewer bits.
        distance: one of `DISTANCES`, or of `PACKED_DISTANCES`.
    """

    copied: bool
    distance: int

    def __str__(self) -> str:
        order = f"{self.distance} bytes ahead" if self.distance else "several rows side by side"
        return f"{'from the copy' if self.copied else 'as they are'}, {order}"


OWN = tuple(Reading(False, distance) for distance in DISTANCES)
"""The ways to read the model's own weights."""


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
        """The digest of the weights; see `Source.digest`."""
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

    def digest(self) -> str:
        """A digest of the sums of the bits of every row; it takes little longer than reading the weights once."""
        sums = [_words(tensor).sum(1).numpy().tobytes() for tensor in self.weights.matrices]
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
        narrow = all(map(_is_bfloat16, source.weights.matrices))
        _check_rows(rows, packing.few if narrow else 1)
        start = time.perf_counter()
        known = _narrow(key, source.weights.matrices, share) if narrow else _packed(key, source, packing, share)
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
    kernel, matrices = source.kernel, source.model.matrices
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


class WeightReader:
    """Has the kernel read weights in the fastest way.

    Args:
        form: which weights: the model's own, those of a copy, or whichever are read faster.
        rows: that run at the same time at most; a copy serves few.

    Attributes:
        reading: the way in which they are read now.
        copy: of the weights, in fewer bits; None where it would not be read.
    """

    def __init__(self, form: str, rows: int) -> None:
        self.form, self._rows = form, rows
        self.reading = OWN[0]
        self.copy: WeightCopy | None = None
        self._opened = False

    def open(self, source: Source, seconds: Callable[[], float]) -> None:
        """Reads these weights from now on, in a way found by trying if the model is large.

        Weights that take the place of others are read as they are, unless a copy was asked for: while a model is
        trained, a copy would not live long enough to pay.

        Args:
            source: the weights.
            seconds: returns the time that products of a single token take, in the way of the moment.

        Raises:
            NoCopyError: a copy was asked for, and cannot be had.
        """
        asked, large = self.form == "packed", source.weights.bytes >= LEAST_BYTES
        self.copy, self._source = None, source
        self._use(OWN[0] if self.reading.copied else self.reading)
        if self._opened and not asked:
            return

        def timed(way: Reading) -> float:
            self._use(way)
            return seconds()

        own, copied = () if asked else OWN, self._copied() if large or asked else ()
        self._use(choose_reading(own, copied, timed) if large else [*own, *copied][0])
        logger.info("for a single row, weights are read %s", self.reading)
        if not self.reading.copied:
            self.copy = None
        self._opened = True

    def is_outdated(self) -> bool:
        """Whether the weights are others than those of the copy that is read."""
        return self.copy is not None and self.copy.digest != self._source.digest()

    def _copied(self) -> Sequence[Reading]:
        """Copies the weights into fewer bits; returns the ways to read them, none if there is no copy."""
        if self.form == "plain":
            return ()
        asked = self.form == "packed"
        try:
            self.copy = copy_weights(self._source, rows=1 if asked else self._rows, share=SHARE[self.form])
        except NoCopyError:
            if asked:
                raise
            return ()
        return [Reading(True, distance) for distance in (DISTANCES if self.copy.narrow else PACKED_DISTANCES)]

    def _use(self, reading: Reading) -> None:
        self.reading, self._source.model.far = reading, reading.distance
        if self.copy is not None:
            self.copy.show_to(self._source.model.matrices, shown=reading.copied)


def choose_reading(own: Sequence[Reading], copied: Sequence[Reading], time: Callable[[Reading], float]) -> Reading:
    """Returns the fastest way, where `time` gives the seconds of one; either list may be empty."""
    tried = [*own, *copied]
    times = zip(*([time(way) for way in tried] for _ in range(TRIALS)), strict=True)  # by turns
    best = dict(zip(tried, map(min, times), strict=True))
    found = [_choose(ways, best) for ways in (own, copied) if ways]
    return found[-1] if COPY_GAIN * best[found[-1]] < best[found[0]] else found[0]


def _choose(ways: Sequence[Reading], seconds: dict[Reading, float]) -> Reading:
    fastest = min(ways, key=lambda way: seconds[way])
    return fastest if GAIN * seconds[fastest] < seconds[ways[0]] else ways[0]
