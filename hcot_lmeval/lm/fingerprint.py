"""What determines the results of a run, as JSON facts. Two runs with equal facts may share finished requests.

Left out on purpose: how requests are batched, spread over devices of one kind, logged and stored.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hcot_lmeval.lm.journal import digest

IRRELEVANT = frozenset(
    """batch_size cache_dir device force_download local_files_only logits_cache low_cpu_mem_usage max_batch_size
    max_cpu_memory max_memory max_memory_per_gpu offload_buffers offload_folder parallelize peft proxies softmax_dtype
    token tokenizer use_safetensors""".split()
)
"""Arguments of lm-eval's ``hf`` that do not change what is generated, are told apart by content, or are secret."""

CHECKPOINT_SUFFIXES = frozenset((".safetensors", ".bin", ".pt", ".pth", ".gguf", ".json", ".model", ".txt", ".py"))
"""Files of a checkpoint directory that determine what it computes."""

HASHED_BYTES = 2**22
"""Files up to this size are told apart by content, larger ones (weights) by size and modification time."""

SOURCES = ("*.py", "lm/*.py", "engine/*.py")
"""The files of this package that take part in generating; of the first, some do not, but none is forgotten."""


def source_digest() -> str:
    """Returns a digest of the code that generates, so that results of another version are never reused."""
    package = Path(__file__).parents[1]
    files = sorted(path for pattern in SOURCES for path in package.glob(pattern))
    return digest([[path.name, hashlib.sha256(path.read_bytes()).hexdigest()] for path in files])


def library_versions() -> dict[str, str]:
    """Returns the versions of what computes the logits."""
    return {"code": source_digest(), "torch": torch.__version__, "transformers": transformers.__version__}


def checkpoint_facts(checkpoint: str | PreTrainedModel, revision: str | None = None) -> dict[str, Any]:
    """Returns what tells a checkpoint from every other.

    Args:
        checkpoint: a directory, an id on the hub, or a model in memory (then its weights are hashed).
        revision: of the id on the hub.
    """
    if not isinstance(checkpoint, str):
        configs = [str(checkpoint.config.to_dict()), str(getattr(checkpoint, "generation_config", None))]
        return {"weights": weights_digest(checkpoint), "configs": digest(configs)}
    if Path(checkpoint).is_dir():
        return {"files": directory_facts(Path(checkpoint))}
    return {"id": checkpoint, "revision": revision, "commit": hub_commit(checkpoint, revision)}


def hub_commit(name: str, revision: str | None) -> str | None:
    """Returns the commit that `revision` of a hub repository has in the local cache, where the weights came from."""
    for file in ("config.json", "adapter_config.json"):
        found = huggingface_hub.try_to_load_from_cache(name, file, revision=revision)
        if isinstance(found, str):
            return Path(found).parent.name
    return None


def directory_facts(directory: Path) -> list[list[Any]]:
    """Returns name and identity of every file of a checkpoint directory, its subfolders' included."""
    files = sorted(path for path in directory.rglob("*") if path.suffix in CHECKPOINT_SUFFIXES and path.is_file())
    return [[path.relative_to(directory).as_posix(), *_file_facts(path)] for path in files]


def _file_facts(path: Path) -> list[Any]:
    status = path.stat()
    if status.st_size <= HASHED_BYTES:
        return [status.st_size, hashlib.sha256(path.read_bytes()).hexdigest()]
    return [status.st_size, status.st_mtime_ns]


def weights_digest(model: torch.nn.Module) -> str:
    """Returns a digest of names, types and values of all weights; it reads every byte once."""
    total = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns a digest of how a tokenizer encodes, decodes and renders chats."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = sorted(tokenizer.get_vocab().items()) if backend is None else backend.to_str()
    special = {name: str(value) for name, value in tokenizer.special_tokens_map.items()}
    return digest([rules, special, tokenizer.chat_template])


def plain_arguments(arguments: Mapping[str, Any]) -> dict[str, str]:
    """Returns the model arguments that change results, as text."""
    return {name: str(value) for name, value in sorted(arguments.items()) if name not in IRRELEVANT}
