"""Rows that say the same, or nearly: exact by a digest, near ones by MinHash.

The fingerprint of a row is made of its words alone, folded as in `prepare.contamination`, so that it can be computed in
any process; which row is whose duplicate is decided in the order of the rows, and the first one stays.

A MinHash signature estimates the Jaccard similarity of two sets of 5-grams: each of its `HASHES` numbers is the least
hash of a set under one hash function, and two sets have the same least one with a probability that is their similarity
(Broder 1997). The estimate has a standard error of at most 0.5 / sqrt(HASHES), here 0.044. Only rows are compared that
agree on a whole band of numbers; how wide a band is follows from the threshold. The index lies in a temporary SQLite
file, so that memory does not grow with the rows, as that of datasketch's index would.
"""

from __future__ import annotations

import base64
import sqlite3
from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, NamedTuple

from hcot_lmeval.prepare.contamination import ngrams, words

if TYPE_CHECKING:
    import numpy as np

HASHES = 128
SHINGLE = 5
"""Words of an n-gram."""
MISSED = 0.02
"""At most so large is the probability that two rows exactly at the threshold are not compared."""


class Fingerprint(NamedTuple):
    """What is kept of a row.

    Attributes:
        digest: of all its words.
        signature: `HASHES` numbers of 32 bits, little-endian; empty where near duplicates are not looked for.
    """

    digest: bytes
    signature: bytes = b""

    def to_json(self) -> list[str]:
        return [base64.b64encode(part).decode("ascii") for part in self]

    @classmethod
    def from_json(cls, parts: Sequence[str]) -> Fingerprint:
        return cls(*(base64.b64decode(part) for part in parts))


class Duplicate(NamedTuple):
    """An earlier row with the same words, or nearly.

    Attributes:
        name: what it was called when it was added.
        similarity: 1 for the same words, else the estimate.
        exact: whether the words are the same.
    """

    name: str
    similarity: float
    exact: bool


def fingerprint(text: str, *, near: bool = True) -> Fingerprint:
    """Returns the fingerprint of a text; without a signature unless `near`."""
    found = words(text)
    digest = blake2b("\0".join(found).encode("utf-8", "surrogatepass"), digest_size=16).digest()
    return Fingerprint(digest, _signature(found) if near and found else b"")


def _signature(found: Sequence[str]) -> bytes:
    import numpy as np

    hashes = np.array([_hash(gram) for gram in ngrams(found, SHINGLE, whole=True)], dtype=np.uint64)
    factors, offsets = _functions()
    least = np.full(HASHES, np.iinfo(np.uint64).max, dtype=np.uint64)
    for start in range(0, len(hashes), 1024):  # 1 MiB at once
        products = hashes[start : start + 1024, None] * factors + offsets  # modulo 2^64
        least = np.minimum(least, products.min(axis=0))
    return (least >> np.uint64(32)).astype("<u4").tobytes()


def _hash(gram: tuple[str, ...]) -> int:
    data = "\0".join(gram).encode("utf-8", "surrogatepass")
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "little")


@lru_cache(maxsize=1)
def _functions() -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Factors and offsets of the hash functions, drawn once and for all: ``(factor · x + offset) mod 2^64``."""
    import numpy as np

    draw = np.random.default_rng(7)
    top = np.iinfo(np.uint64).max
    factors = draw.integers(0, top, HASHES, dtype=np.uint64, endpoint=True) | np.uint64(1)
    return factors, draw.integers(0, top, HASHES, dtype=np.uint64, endpoint=True)


def similarity(one: bytes, other: bytes) -> float:
    """Returns the estimated Jaccard similarity of two signatures."""
    return sum(one[i : i + 4] == other[i : i + 4] for i in range(0, 4 * HASHES, 4)) / HASHES


def band_width(threshold: float) -> int:
    """Returns how many numbers a band has, so that rows at the threshold are compared but with probability `MISSED`.

    With bands of r numbers, rows of similarity s agree on one of them with probability 1 - (1 - s^r)^(HASHES / r).
    """
    widths = [r for r in (32, 16, 8, 4, 2, 1) if (1 - threshold**r) ** (HASHES // r) <= MISSED]
    return widths[0] if widths else 1


class DuplicateIndex:
    """The rows seen so far; `find_or_add` tells of an earlier one.

    Args:
        threshold: from which similarity on rows are near duplicates; 1: only the same words count.
    """

    def __init__(self, threshold: float = 0.8) -> None:
        self.threshold = threshold
        self._band_bytes = 4 * band_width(threshold)
        self._rows = sqlite3.connect("")  # a temporary file, gone when it is closed
        self._rows.executescript(
            """
            PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;
            CREATE TABLE row (number INTEGER PRIMARY KEY, name TEXT, digest BLOB UNIQUE, signature BLOB);
            CREATE TABLE id (name TEXT PRIMARY KEY) WITHOUT ROWID;
            CREATE TABLE band (key BLOB, number INTEGER, PRIMARY KEY (key, number)) WITHOUT ROWID;
            """
        )

    def __enter__(self) -> DuplicateIndex:
        return self

    def __exit__(self, *_: object) -> None:
        self._rows.close()

    def repeats(self, name: str) -> bool:
        """Returns whether a row of this name came before, and keeps it."""
        return self._rows.execute("INSERT OR IGNORE INTO id VALUES (?)", (name,)).rowcount == 0

    def find_or_add(self, name: str, print_: Fingerprint) -> Duplicate | None:
        """Returns an earlier row that has the words of this one or, without any, keeps this one."""
        same = self._rows.execute("SELECT name FROM row WHERE digest = ?", (print_.digest,)).fetchone()
        if same:
            return Duplicate(same[0], 1.0, True)
        signature, size = print_.signature, self._band_bytes
        starts = range(0, len(signature), size) if self.threshold < 1 else ()
        bands = [bytes([start // size]) + signature[start : start + size] for start in starts]
        near = self._near(signature, bands)
        if near is None:
            added = self._rows.execute(
                "INSERT INTO row (name, digest, signature) VALUES (?, ?, ?)", (name, print_.digest, signature)
            )
            self._rows.executemany("INSERT INTO band VALUES (?, ?)", ((band, added.lastrowid) for band in bands))
        return near

    def _near(self, signature: bytes, bands: Sequence[bytes]) -> Duplicate | None:
        candidates = self._rows.execute(
            "SELECT name, signature FROM row WHERE number IN "
            f"(SELECT number FROM band WHERE key IN ({','.join('?' * len(bands))})) ORDER BY number",
            bands,
        )
        best = max(((similarity(signature, other), name) for name, other in candidates), default=(0.0, ""))
        return Duplicate(best[1], best[0], False) if best[0] >= self.threshold else None
