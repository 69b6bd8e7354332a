"""Does a row say what another one says, or hold a problem that models are evaluated on?

Words are folded: case, punctuation, spaces and the forms of characters do not count. Two rows with the same words are
duplicates. A problem is looked for by its n-grams of words: a row that holds a large share of them holds the problem,
whatever stands around it. A single common n-gram says nothing, for contests end their problems with the same sentences.
Of scripts without spaces each character is a word. A problem that is shorter than an n-gram has to stand there as a
whole; one of less than `FEWEST` words is not looked for.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from hcot_lmeval.columns import ROLES
from hcot_lmeval.files import file_digest, find_inputs

N = 8
"""Words of an n-gram."""
FEWEST = 4
"""Problems of fewer words are not looked for: they stand everywhere."""
TASKS = {
    "aime24": "Maxwell-Jia/AIME_2024",
    "aime25": "math-ai/aime25",
    "math500": "HuggingFaceH4/MATH-500",
    "polymath": "Qwen/PolyMath",
}
"""Evaluation task -> its data set."""
LANGUAGES = "ar bn de en es fr id it ja ko ms pt ru sw te th vi zh".split()
"""The configurations of PolyMath."""
QUESTION = ROLES["question"][:3]
"""Columns in which evaluation rows keep the problem; upper and lower case are the same."""

_SPACELESS = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"
_WORD = re.compile(rf"[{_SPACELESS}]|[^\W_{_SPACELESS}]+")


@dataclass(frozen=True)
class Overlap:
    """A problem that a text holds, and the share of its n-grams that are there."""

    name: str
    share: float


class EvaluationRows:
    """The n-grams of evaluation problems.

    Args:
        problems: pairs of a name and a problem; of problems with the same words the first name is kept.
        share: from which share of a problem's n-grams on a text holds it.
    """

    def __init__(self, problems: Iterable[tuple[str, str]], share: float = 0.5) -> None:
        self.share = share
        self._names: list[str] = []
        self._sizes: list[int] = []
        self._where: dict[tuple[str, ...], list[int]] = {}
        for name, text in problems:
            found = words(text)
            grams = ngrams(found, N, whole=True) if len(found) >= FEWEST else set()
            for gram in grams:
                self._where.setdefault(gram, []).append(len(self._names))
            self._names.append(name)
            self._sizes.append(len(grams))
        self._short = sorted({len(gram) for gram in self._where} - {N})

    def __len__(self) -> int:
        return len(self._names)

    def find(self, text: str) -> Overlap | None:
        """Returns the problem that a text holds the largest share of, if that is enough of it."""
        found = words(text)
        grams = set().union(*(ngrams(found, size) for size in (N, *self._short)))
        counts = Counter(number for gram in grams for number in self._where.get(gram, ()))
        if not counts:
            return None
        share, number = max((count / self._sizes[n], -n) for n, count in counts.items())
        return Overlap(self._names[-number], share) if share >= self.share else None


def words(text: str) -> list[str]:
    """Returns the folded words of a text."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def fingerprint(text: str) -> str:
    """Returns a digest of the folded words of a text; rows with the same one say the same."""
    return blake2b("\0".join(words(text)).encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def ngrams(found: Sequence[str], size: int, *, whole: bool = False) -> set[tuple[str, ...]]:
    """Returns the n-grams of a text; with `whole`, a text that is too short is one itself."""
    if whole and 0 < len(found) < size:
        return {tuple(found)}
    return set(zip(*(found[i:] for i in range(size)), strict=False))


def identities(names: Sequence[str]) -> dict[str, str]:
    """Returns what tells evaluation problems from others: the data set of a task, the digest of a file.

    Raises:
        ValueError: a name is neither a task nor a file.
    """
    return {name: TASKS[name] if name in TASKS else file_digest(_file(name)) for name in names}


def _file(name: str) -> Path:
    if not Path(name).is_file():
        raise ValueError(f"against={name!r} is neither a file nor a task; choose one of {', '.join(TASKS)}, or a file")
    return Path(name)


def load_problems(names: Sequence[str]) -> list[tuple[str, str]]:
    """Reads evaluation problems; returns pairs of a name and a problem.

    Args:
        names: tasks of `TASKS` (from the hub, or from the folder in ``HCOT_LMEVAL_DATA``), or files with a column of
            `QUESTION`.

    Raises:
        ValueError: a name is neither, or a file has no such column.
        ConnectionError: neither the hub nor a local copy is within reach.
    """
    return [problem for name in names for problem in (_of_task(name) if name in TASKS else _of_file(_file(name)))]


def _of_task(task: str) -> Iterator[tuple[str, str]]:
    from datasets.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

    from hcot_lmeval.scoring.data import load

    shown = is_progress_bar_enabled()
    disable_progress_bar()  # polymath would show 72 of them
    try:
        for subset in LANGUAGES if task == "polymath" else (None,):
            for split, rows in load(TASKS[task], subset).items():
                label = "/".join(filter(None, (task, subset, str(split))))
                for number, row in enumerate(rows):
                    yield f"{label} {row.get('id', row.get('ID', number))}", _question(row, label)
    finally:
        if shown:
            enable_progress_bar()


def _of_file(path: Path) -> Iterator[tuple[str, str]]:
    for each in find_inputs([path]):
        for number, record in enumerate(each.records()):
            if record.data is not None:
                yield f"{each.name} {record.data.get('id', number)}", _question(record.data, record.where)


def _question(row: Mapping[str, Any], where: str) -> str:
    folded = {name.casefold(): value for name, value in row.items() if isinstance(value, str)}
    found = next((folded[name] for name in QUESTION if name in folded), None)
    if found is None:
        raise ValueError(f"{where}: no column {', '.join(QUESTION)}; present: {json.dumps(list(row))}")
    return found
