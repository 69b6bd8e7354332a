"""Packed rows: several documents side by side in a row of fixed length, and rows as a batch.

Documents of a row cannot see each other because no death reaches beyond the end of its document; each keeps the
positions that it has alone. Nothing is cut here. Documents are put into rows by best fit within windows of a shuffled
order, so that rows are full and still mixed; how a document's length is distributed over its prompt, its trace and the
copies of its solutions does not matter, since it is the packed length that is fitted.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.compute as pc
import torch

from hcot_lmeval.trace import IGNORE
from hcot_lmeval.training.data.documents import COLUMNS

if TYPE_CHECKING:
    from datasets import Dataset

PackedRow = Mapping[str, Sequence[int]]
"""The columns ids, positions, death, targets, states and classes, lists of one length."""

WINDOW = 8192
"""Documents among which partners for a row are looked for. Larger windows hardly fill better, and mix worse."""


def assign(
    lengths: Sequence[int] | np.ndarray, row_length: int, seed: int = 0, window: int = WINDOW
) -> list[list[int]]:
    """Distributes documents over rows.

    Within a window, the longest document comes first, and each goes where the least room is left behind it.

    Args:
        lengths: of the documents, in tokens.
        row_length: tokens of a row.
        seed: of the order; the same arguments give the same rows.
        window: documents that are packed together.

    Returns:
        For each row the indices of its documents.

    Raises:
        ValueError: a document is longer than a row, or empty.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    if len(sizes) and not 1 <= sizes.min() <= sizes.max() <= row_length:
        raise ValueError(f"documents of {sizes.min()} to {sizes.max()} tokens do not fit into rows of {row_length}")
    order = np.random.default_rng(seed).permutation(len(sizes))
    rows: list[list[int]] = []
    for start in range(0, len(order), window):
        some = order[start : start + window]
        rows += _best_fit(some[np.argsort(-sizes[some], kind="stable")].tolist(), sizes, row_length)
    return rows


def _best_fit(order: list[int], sizes: np.ndarray, row_length: int) -> list[list[int]]:
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, row), ascending
    for document in order:
        size = int(sizes[document])
        place = bisect_left(room, (size, -1))
        left, row = room.pop(place) if place < len(room) else (row_length, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(document)
        insort(room, (left - size, row))
    return rows


@dataclass(frozen=True)
class PackedRows(Sequence[dict[str, list[int]]]):
    """Packed rows over an Arrow table of documents, put together when they are asked for.

    Attributes:
        documents: a data set with the columns of `Document`.
        groups: for each row the indices of its documents.
        row_length: tokens that a row holds at most.
    """

    documents: Dataset
    groups: Sequence[Sequence[int]]
    row_length: int

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: Any) -> Any:
        """Returns a packed row: the dict of its six columns as lists of int."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        table = self._tables[list(self.groups[index])]
        columns = {name: table[name].combine_chunks() for name in COLUMNS}
        sizes = columns["ids"].value_lengths().to_numpy()
        row = {name: column.flatten().to_numpy() for name, column in columns.items()}
        row["death"] = row["death"] + np.repeat(np.cumsum(sizes) - sizes, sizes)
        return {name: values.tolist() for name, values in row.items()}

    @cached_property
    def _tables(self) -> Dataset:
        """The documents as Arrow tables; made once, for it takes longer than reading a row."""
        return self.documents.select_columns(list(COLUMNS)).with_format("arrow")

    @property
    def tokens(self) -> int:
        """Forwarded tokens, padding apart."""
        lengths = list_lengths(self.documents, "ids")
        return int(sum(lengths[group].sum() for group in self.groups))

    @property
    def padding(self) -> float:
        """The share of padding, were every row padded to `row_length`."""
        return 1 - self.tokens / (len(self) * self.row_length) if len(self) else 0.0


def list_lengths(rows: Dataset, column: str) -> np.ndarray:
    """Returns the length of the list that each row has in `column`, int64 [rows]."""
    chunks = rows.select_columns([column]).with_format("arrow")[:][column].chunks
    return np.concatenate([chunk.value_lengths().to_numpy() for chunk in chunks]).astype(np.int64)


def largest(rows: Dataset, column: str) -> int:
    """Returns the largest number in the lists of `column`, -1 if there is none."""
    lists = rows.select_columns([column]).with_format("arrow")[:][column]
    found = pc.max(pc.list_flatten(lists)).as_py()
    return -1 if found is None else int(found)


def columns_of(rows: Dataset, *names: str) -> dict[str, np.ndarray]:
    """Returns columns of plain values as arrays [rows]; strings and missing values in arrays of objects."""
    table = rows.select_columns(list(names)).with_format("arrow")[:]
    return {name: table[name].to_numpy() for name in names}


def collate(rows: Iterable[PackedRow], length: int, pad_id: int) -> dict[str, torch.Tensor]:
    """Pads rows to `length` and returns them as a batch.

    Padding sees itself alone, so that no row of the attention is empty, and predicts nothing.

    Args:
        rows: packed rows.
        length: T, tokens of each row of the batch.
        pad_id: any token id.

    Returns:
        ``input_ids``, ``position_ids``, ``death``, ``shift_labels``, ``states`` and ``classes``, int64 [B, T];
        ``shift_labels[b, t]`` is the target of token t, or -100. There is no mask; `masks.attention_masks` makes it.

    Raises:
        ValueError: a row is longer than `length`.
    """
    rows = list(rows)
    longest = max((len(row["ids"]) for row in rows), default=0)
    if longest > length:
        raise ValueError(f"a row of {longest} tokens does not fit into length={length}; rows are never cut")
    padding: dict[str, Any] = dict.fromkeys(COLUMNS, 0) | {"ids": pad_id, "targets": IGNORE}
    padding["death"] = torch.arange(1, length + 1)
    names = {"ids": "input_ids", "positions": "position_ids", "targets": "shift_labels"}
    return {names.get(name, name): _padded([row[name] for row in rows], length, padding[name]) for name in COLUMNS}


def _padded(rows: Sequence[Sequence[int]], length: int, padding: int | torch.Tensor) -> torch.Tensor:
    batch = torch.empty(len(rows), length, dtype=torch.int64)
    batch[:] = padding
    for target, values in zip(batch, rows, strict=True):
        target[: len(values)] = torch.as_tensor(values, dtype=torch.int64)
    return batch
