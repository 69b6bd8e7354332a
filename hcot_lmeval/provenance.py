"""Where a result comes from: versions, code, checkpoint, tokenizer, data, environment, machine.

The journal, the notes, the cells of a grid and the caches of training tell results apart by these facts; records of
training, manifests and benchmarks keep them for readers. Nothing heavy is imported before a function needs it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Collection, Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hcot_lmeval.assets import resolve

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PACKAGES = (
    *("hcot_lmeval", "lm_eval", "torch", "transformers", "accelerate", "peft", "datasets", "pyarrow", "numpy"),
    *("math-verify", "sympy", "vllm", "flash-attn", "llama-cpp-python"),
)
"""What readers of a record want to know the versions of."""
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
SAMPLED_VALUES = 4096
"""Values of a tensor that a quick digest looks at."""


def digest(value: Any) -> str:
    """Returns a stable SHA-256 of a JSON value, in hex: equal values have equal digests on every machine.

    Raises:
        TypeError: `value` holds something that JSON does not know.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


# --- versions and code ------------------------------------------------------------------------------------------------


def versions() -> dict[str, str]:
    """Returns the versions of Python and of all packages that matter, for readers."""
    return {"python": platform.python_version(), **installed(PACKAGES)}


def installed(names: Iterable[str]) -> dict[str, str]:
    """Returns the versions of those packages that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def evaluation_versions(model: str) -> dict[str, str]:
    """Returns the versions of what computes a result.

    Args:
        model: lm-eval's name of the model; a library of that name (``vllm``) counts too.
    """
    return {"hcot_lmeval": code_digest(), **installed(dict.fromkeys((*LIBRARIES, model)))}


def code_digest(*, graded: bool = True) -> str:
    """Returns a digest of what is in `code_files`."""
    return files_digest(code_files(graded=graded), Path(__file__).parents[1])[:16]


def code_files(*, graded: bool = True) -> list[Path]:
    """Returns the files of this package, and its tasks, that take part in an evaluation.

    They count whatever their suffix: kernels in C++, templates, instructions.

    Args:
        graded: not only in generating, but also in grading.
    """
    package, left_out = Path(__file__).parent, BYSTANDERS if graded else (*BYSTANDERS, *GRADERS)
    code = [path for path in _files(package) if path.relative_to(package).parts[0] not in left_out]
    tasks = tasks_folder() if graded else None
    return [*code, *(_files(tasks) if tasks else ())]


def tasks_folder() -> Path | None:
    """Returns the folder of our tasks: within the package in a wheel, beside it in a checkout; None if it is lost."""
    package = Path(__file__).parent
    return next((folder for folder in (package / "tasks", package.parent / "tasks") if folder.is_dir()), None)


def files_digest(files: Iterable[str | Path], root: Path | None = None) -> str:
    """Returns a digest of what files hold, and of their names, below `root` if there is one.

    For example of the source of what made an entry of a cache.
    """
    paths = list(map(Path, files))
    names = [path.relative_to(root).as_posix() if root else path.name for path in paths]
    return digest([names, [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]])


# --- checkpoints ------------------------------------------------------------------------------------------------------


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


def model_facts(checkpoint: str | PreTrainedModel, revision: str | None = None) -> dict[str, Any]:
    """Returns what tells a checkpoint from every other.

    Args:
        checkpoint: a directory, an id on the hub, or a model in memory, of whose weights `weights_digest` tells.
        revision: of the id on the hub.
    """
    if not isinstance(checkpoint, str):
        configs = [str(checkpoint.config.to_dict()), str(getattr(checkpoint, "generation_config", None))]
        return {"configs": digest(configs)}
    if Path(checkpoint).is_dir():
        return {"files": checkpoint_facts(checkpoint)}
    return {"id": checkpoint, "revision": revision, "commit": hub_commit(checkpoint, revision)}


def hub_commit(name: str, revision: str | None) -> str | None:
    """Returns the commit that `revision` of a hub repository has in the local cache, where the weights came from."""
    import huggingface_hub

    for file in ("config.json", "adapter_config.json"):
        found = huggingface_hub.try_to_load_from_cache(name, file, revision=revision)
        if isinstance(found, str):
            return Path(found).parent.name
    return None


def weights_digest(model: torch.nn.Module, *, quick: bool = False) -> str:
    """Returns a digest of names, types and values of all weights.

    Args:
        model: whose.
        quick: look at `SAMPLED_VALUES` values of each tensor, spread over it, instead of reading every byte; training
            steps, loads and resets show there.
    """
    import torch
    import xxhash  # comes with datasets; reads gigabytes a second, where SHA-256 takes seconds for each on some

    total = xxhash.xxh3_128()
    for name, tensor in sorted(model.state_dict().items()):
        if not isinstance(tensor, torch.Tensor) or tensor.is_meta:  # a layer's own notes; kept elsewhere by accelerate
            total.update(f"{name} {tensor!r}".encode())
            continue
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        values = tensor.detach().reshape(-1)
        values = values[:: max(1, len(values) // SAMPLED_VALUES)] if quick else values
        total.update(values.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns a digest of how a tokenizer encodes, decodes and renders chats."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = sorted(tokenizer.get_vocab().items()) if backend is None else backend.to_str()
    added = sorted((i, str(token), token.special) for i, token in tokenizer.added_tokens_decoder.items())
    special = {name: str(value) for name, value in tokenizer.special_tokens_map.items()}
    clean_up = getattr(tokenizer, "clean_up_tokenization_spaces", None)
    return digest([type(tokenizer).__name__, rules, added, special, tokenizer.chat_template, clean_up])


# --- files ------------------------------------------------------------------------------------------------------------


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


# --- the machine ------------------------------------------------------------------------------------------------------


def hardware() -> str:
    """Returns the device in words: the GPU's name, or the processor's and the number of its threads in use."""
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    threads = torch.get_num_threads()
    return f"{threads} CPU thread{'s' * (threads > 1)} ({_processor()})"


def machine(device: str, threads: int) -> dict[str, str]:
    """Returns what computes, in more detail.

    Args:
        device: as torch names it.
        threads: CPU threads in use.
    """
    import psutil
    import torch

    memory = f"{psutil.virtual_memory().total / 2**30:.0f} GiB"
    name = f"{_processor()} ({torch.backends.cpu.get_cpu_capability()})"
    cpu = {"cpu": name, "cores": str(os.cpu_count()), "memory": memory, "threads": str(threads)}
    if not device.startswith("cuda"):
        return cpu
    return {"gpu": torch.cuda.get_device_name(device), "cuda": str(torch.version.cuda), **cpu}


@functools.cache
def driver() -> str | None:
    """Returns the version of NVIDIA's driver; None without one."""
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return next(iter(done.stdout.split()), None)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()
