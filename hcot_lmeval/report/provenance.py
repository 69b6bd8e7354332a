"""What determines a result beside the arguments: versions, code, checkpoint files, user tasks, environment.

Read before a run starts and without importing torch; what a run itself knows better (the commit of a checkpoint on the
hub, hashes of the documents) stands in its results and is compared there.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from hcot_lmeval.assets import resolve

LIBRARIES = ("lm_eval", "torch", "transformers", "math-verify", "sympy")
"""What computes logits and scores."""
ENVIRONMENT = ("HCOT_LMEVAL_DATA", "HCOT_LMEVAL_INSTRUCTIONS")
"""Variables that choose data and prompts."""
BYSTANDERS = ("report", "training")
"""Parts of this package that take no part in an evaluation."""
CHECKPOINT_SUFFIXES = frozenset(
    (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".json", ".model", ".txt", ".py", ".jinja")
)
TASK_SUFFIXES = frozenset((".yaml", ".yml", ".py", ".json", ".jsonl", ".txt", ""))
SMALL = 2**22
"""Bytes up to which a checkpoint's file is told apart by content; a larger one by size and time of change."""


def digest(value: Any) -> str:
    """Returns the SHA-256 of a JSON value in hex; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


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


@cache
def code_digest() -> str:
    """Returns a digest of the code and tasks of this package that take part in an evaluation; read once."""
    package = Path(__file__).parents[1]
    code = [path for path in package.rglob("*.py") if path.relative_to(package).parts[0] not in BYSTANDERS]
    tasks = next((folder for folder in (package / "tasks", package.parent / "tasks") if folder.is_dir()), None)
    return _contents_digest(package.parent, [*code, *(_files(tasks, TASK_SUFFIXES) if tasks else ())])[:16]


def checkpoint_facts(name: str) -> Any:
    """Returns what tells a checkpoint on disk from another one under the same path; None for one on a hub.

    Args:
        name: directory, bundled checkpoint or id on the hub.
    """
    directory = Path(resolve(name)).expanduser()
    if not directory.is_dir():
        return None
    return digest(
        [[path.relative_to(directory).as_posix(), *_identity(path)] for path in _files(directory, CHECKPOINT_SUFFIXES)]
    )


def _identity(path: Path) -> tuple[Any, ...]:
    status = path.stat()
    if status.st_size <= SMALL:
        return status.st_size, hashlib.sha256(path.read_bytes()).hexdigest()
    return status.st_size, status.st_mtime_ns


def tasks_digest(directory: Path) -> str:
    """Returns a digest of the files of a folder of tasks."""
    return _contents_digest(directory, _files(directory, TASK_SUFFIXES))


def environment() -> dict[str, str]:
    """Returns those of `ENVIRONMENT` that are set."""
    return {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}


def _files(directory: Path, suffixes: Iterable[str]) -> list[Path]:
    found = (path for path in directory.rglob("*") if path.suffix in suffixes and path.is_file())
    return sorted(path for path in found if "__pycache__" not in path.parts)


def _contents_digest(root: Path, paths: Iterable[Path]) -> str:
    names = {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
    return digest(names)
