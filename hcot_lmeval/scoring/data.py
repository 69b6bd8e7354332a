"""The data sets of the tasks, from the Hugging Face hub or from a directory with the same layout."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

DATA_VARIABLE = "HCOT_LMEVAL_DATA"
"""Environment variable: a directory to take the data from instead of the hub."""

FORMATS = frozenset({"json", "csv", "parquet", "arrow", "text"})
"""Names under which `datasets` reads files; they are no data sets of a hub."""

SHORT_NAMES = {
    "Maxwell-Jia/AIME_2024": "aime24",
    "math-ai/aime25": "aime25",
    "HuggingFaceH4/MATH-500": "math500",
    "Qwen/PolyMath": "polymath",
}
"""Folder names that a local directory may use instead of ``owner/name``."""


def local_folder(name: str, root: str | Path) -> Path:
    """Returns the folder of a data set below a local directory.

    Args:
        name: the hub's name, ``owner/name``.
        root: holds ``owner/name`` or a short name of `SHORT_NAMES`.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    candidates = [name, *([SHORT_NAMES[name]] if name in SHORT_NAMES else [])]
    for candidate in candidates:
        if (folder := Path(root) / candidate).is_dir():
            return folder
    raise FileNotFoundError(
        f"{root} (from {DATA_VARIABLE} or hcot_data) has no folder {' or '.join(candidates)}; put a copy of the data"
        f" set there (its README.md and files as on the hub), or unset {DATA_VARIABLE} to use the hub"
    )


def load(name: str, config: str | None = None, *, root: str | Path | None = None, **options: Any) -> DatasetDict:
    """Loads a data set with all its splits.

    Args:
        name: the hub's name, ``owner/name``; or a format of files, such as ``json``, or a directory.
        config: its configuration, None for the default one.
        root: a local directory; None for the value of `DATA_VARIABLE`, and for the hub if that is unset or empty.
        options: further arguments of `datasets.load_dataset`: those of the hub (revision, token, …), or ``data_files``.

    Raises:
        FileNotFoundError: a local directory is given and lacks the data set.
        ConnectionError: neither the hub nor a cached copy is within reach.
    """
    import datasets

    root = root or os.environ.get(DATA_VARIABLE)
    if name in FORMATS or Path(name).is_dir():
        return datasets.load_dataset(name, config, **options)
    if root:
        return datasets.load_dataset(str(local_folder(name, root)), config)
    try:
        return datasets.load_dataset(name, config, **options)
    except (ConnectionError, FileNotFoundError) as error:
        raise ConnectionError(
            f"cannot load {name} from the Hugging Face hub ({error}); to use a local copy, set {DATA_VARIABLE} to a"
            f" directory that holds {name} or {SHORT_NAMES.get(name, name)} in the hub's layout"
        ) from error


def with_columns(data: Dataset, **columns: str) -> Dataset:
    """Returns the data with further columns, each with one value for all rows."""
    for column, value in columns.items():
        data = data.add_column(column, [value] * len(data))
    return data


def interleave(parts: Sequence[Dataset]) -> Dataset:
    """Returns the rows of all parts in turn (first of each, second of each, …); a part that ends is skipped."""
    import datasets

    order = sorted((row, part) for part, data in enumerate(parts) for row in range(len(data)))
    starts = [sum(len(data) for data in parts[:part]) for part in range(len(parts))]
    return datasets.concatenate_datasets(list(parts)).select([starts[part] + row for row, part in order])
