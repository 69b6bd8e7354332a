"""What determines a result beside the arguments: versions, code, checkpoint files, user tasks, environment.

The journal, the notes and the cells of a grid all tell results apart by these facts. They are read without importing
torch; what needs it (weights in memory, a tokenizer) is in `hcot_lmeval.lm.fingerprint`, and what a run itself knows
better (the commit of a checkpoint on the hub, hashes of the documents) stands in its results and is compared there.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from hcot_lmeval.assets import resolve

LIBRARIES = ("lm_eval", "torch", "transformers", "math-verify", "sympy")
"""What computes logits and scores."""
ENVIRONMENT = ("HCOT_LMEVAL_DATA", "HCOT_LMEVAL_INSTRUCTIONS")
"""Variables that choose data and prompts."""
BYSTANDERS = ("report", "training", "diagnosis", "prepare", "assets")
"""Parts of this package that take no part in an evaluation."""
GRADERS = ("answers", "scoring", "synthetic", "tasks")
"""Parts that take part in it and not in generating."""
CHECKPOINT_SUFFIXES = frozenset(
    (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".json", ".model", ".txt", ".py", ".jinja")
)
SMALL = 2**22
"""Bytes up to which a file is told apart by content; a larger one by size, time of change and a sample of it."""
SAMPLES = 64
"""Places at which a large file is read."""


def digest(value: Any) -> str:
    """Returns a stable SHA-256 of a JSON value, in hex: equal values have equal digests on every machine.

    Raises:
        TypeError: `value` holds something that JSON does not know.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def versions(model: str) -> dict[str, str]:
    """Returns the versions of what computes a result.

    Args:
        model: lm-eval's name of the model; a library of that name (``vllm``) counts too.
    """
    found = {"hcot_lmeval": code_digest()}
    for name in dict.fromkeys((*LIBRARIES, model)):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # vllm is optional, and hf is no library
            continue
    return found


def code_digest(*, graded: bool = True) -> str:
    """Returns a digest of the code and tasks of this package that take part in an evaluation.

    All files count, whatever their suffix: kernels in C++, templates, instructions.

    Args:
        graded: not only in generating, but also in grading.
    """
    package, left_out = Path(__file__).parent, BYSTANDERS if graded else (*BYSTANDERS, *GRADERS)
    code = [path for path in _files(package) if path.relative_to(package).parts[0] not in left_out]
    tasks = tasks_folder() if graded else None
    return _contents_digest(package.parent, [*code, *(_files(tasks) if tasks else ())])[:16]


def tasks_folder() -> Path | None:
    """Returns the folder of our tasks: within the package in a wheel, beside it in a checkout; None if it is lost."""
    package = Path(__file__).parent
    return next((folder for folder in (package / "tasks", package.parent / "tasks") if folder.is_dir()), None)


def checkpoint_facts(name: str) -> Any:
    """Returns what tells a checkpoint on disk from another one under the same path; None for one on a hub.

    Args:
        name: directory, bundled checkpoint or id on the hub.
    """
    directory = Path(resolve(name)).expanduser()
    if not directory.is_dir():
        return None
    files = _files(directory, CHECKPOINT_SUFFIXES)
    return digest([[path.relative_to(directory).as_posix(), *_identity(path)] for path in files])


def _identity(path: Path) -> tuple[Any, ...]:
    status = path.stat()
    if status.st_size <= SMALL:
        return status.st_size, hashlib.sha256(path.read_bytes()).hexdigest()
    seen = hashlib.sha256()
    with path.open("rb") as file:  # a copy may keep the time of change: other weights differ wherever one looks
        for place in range(SAMPLES):
            file.seek(status.st_size * place // SAMPLES)
            seen.update(file.read(SMALL // SAMPLES))
    return status.st_size, status.st_mtime_ns, seen.hexdigest()


def folder_digest(place: Path) -> str:
    """Returns a digest of a file, or of all files of a folder, such as tasks and data."""
    files = _files(place) if place.is_dir() else [place] if place.is_file() else []
    return digest([[path.relative_to(place.parent).as_posix(), *_identity(path)] for path in files])


def environment() -> dict[str, list[str]]:
    """Returns those of `ENVIRONMENT` that are set, each with a digest of what lies there."""
    found = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
    return {name: [place, folder_digest(Path(place).expanduser())] for name, place in found.items()}


def _files(directory: Path, suffixes: Collection[str] | None = None) -> list[Path]:
    found = (path for path in directory.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return sorted(path for path in found if suffixes is None or path.suffix in suffixes)


def _contents_digest(root: Path, paths: Iterable[Path]) -> str:
    names = {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
    return digest(names)
