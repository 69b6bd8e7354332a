"""Rows that nearly say the same, by MinHash.

A signature estimates the Jaccard similarity of two sets of 5-grams of folded words: each of its `HASHES` numbers is the
least hash of a set under one hash function, and two sets have the same least one with a probability that is their
similarity (Broder 1997). The standard error is at most 0.5 / sqrt(HASHES), here 0.044.

Only rows are compared that agree on a whole band of numbers. The index lies in a temporary SQLite file, so that memory
does not grow with the rows; that of datasketch 2.0 took 5.8 kB of memory for each row, with bands as narrow as here.
"""

from __future__ import annotations

import base64
import sqlite3
from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from hcot_lmeval.prepare.checks import ngrams, words

if TYPE_CHECKING:
    import numpy as np

HASHES = 128
SHINGLE = 5
"""Words of an n-gram."""
MISSED = 0.02
"""At most so large is the probability that two rows exactly at the threshold are not compared."""


def signature(text: str) -> str:
    """Returns the signature of a text in base 64, `HASHES` numbers of 32 bits; nothing for a text without words."""
    import numpy as np

    grams = ["\0".join(gram).encode("utf-8", "surrogatepass") for gram in ngrams(words(text), SHINGLE, whole=True)]
    if not grams:
        return ""
    digests = b"".join(blake2b(gram, digest_size=8).digest() for gram in grams)
    hashes, (factors, offsets) = np.frombuffer(digests, "<u8"), _functions()
    least = np.full(HASHES, np.iinfo(np.uint64).max)
    for start in range(0, len(hashes), 1024):  # 1 MiB at once
        products = hashes[start : start + 1024, None] * factors + offsets  # modulo 2^64
        least = np.minimum(least, products.min(axis=0))
    return base64.b64encode((least >> np.uint64(32)).astype("<u4").tobytes()).decode("ascii")


@lru_cache(maxsize=1)
def _functions() -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Factors and offsets of the hash functions, drawn once and for all: ``(factor · x + offset) mod 2^64``."""
    import numpy as np

    factors, offsets = np.random.default_rng(7).integers(0, 2**64 - 1, (2, HASHES), dtype=np.uint64, endpoint=True)
    return factors | np.uint64(1), offsets


def similarity(one: bytes, other: bytes) -> float:
    """Returns the estimated Jaccard similarity of two signatures, decoded."""
    return sum(one[i : i + 4] == other[i : i + 4] for i in range(0, 4 * HASHES, 4)) / HASHES


def band_width(threshold: float) -> int:
    """Returns how many numbers a band has, so that rows at the threshold are compared but with probability `MISSED`.

    With bands of r numbers, rows of similarity s agree on one of them with probability 1 - (1 - s^r)^(HASHES / r).
    """
    return next((r for r in (32, 16, 8, 4, 2) if (1 - threshold**r) ** (HASHES // r) <= MISSED), 1)


class NearRows:
    """The rows seen so far, by their signatures.

    Args:
        threshold: from which similarity on rows are near duplicates.
    """

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self._band_bytes = 4 * band_width(threshold)
        self._rows = sqlite3.connect("")  # a temporary file, gone when it is closed
        self._rows.executescript(
            """
            PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;
            CREATE TABLE row (number INTEGER PRIMARY KEY, name TEXT, signature BLOB);
            CREATE TABLE band (key BLOB, number INTEGER, PRIMARY KEY (key, number)) WITHOUT ROWID;
            """
        )

    def __enter__(self) -> NearRows:
        return self

    def __exit__(self, *_: object) -> None:
        self._rows.close()

    def find_or_add(self, name: str, text: str) -> tuple[str, float] | None:
        """Returns the most similar earlier row, if one is near enough, and its similarity; else keeps this one.

        Args:
            name: of the row.
            text: its signature in base 64; without one it is near no other.
        """
        found = base64.b64decode(text)
        bands = self._bands(found)
        candidates = self._rows.execute(
            "SELECT name, signature FROM row WHERE number IN "
            f"(SELECT number FROM band WHERE key IN ({','.join('?' * len(bands))})) ORDER BY number",
            bands,
        )
        near = max(((name, similarity(found, other)) for name, other in candidates), key=itemgetter(1), default=None)
        if near is not None and near[1] >= self.threshold:
            return near
        number = self._rows.execute("INSERT INTO row (name, signature) VALUES (?, ?)", (name, found)).lastrowid
        self._rows.executemany("INSERT INTO band VALUES (?, ?)", ((band, number) for band in bands))
        return None

    def _bands(self, found: bytes) -> Sequence[bytes]:
        size = self._band_bytes
        return [bytes([start // size]) + found[start : start + size] for start in range(0, len(found), size)]
