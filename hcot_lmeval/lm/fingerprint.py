"""What determines the results of a run, as JSON facts. Two runs with equal facts may share finished requests.

Left out on purpose: how requests are batched, spread over devices of one kind, logged and stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers
import xxhash  # comes with datasets
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hcot_lmeval import fingerprint
from hcot_lmeval.fingerprint import code_digest, digest

IRRELEVANT = frozenset(
    """batch_size cache_dir device force_download local_files_only logits_cache low_cpu_mem_usage max_batch_size
    max_cpu_memory max_memory max_memory_per_gpu offload_buffers offload_folder parallelize peft proxies softmax_dtype
    token tokenizer use_safetensors""".split()
)
"""Arguments of lm-eval's ``hf`` that do not change what is generated, are told apart by content, or are secret."""

SAMPLE = 4096
"""Values of a tensor that a quick digest looks at."""


def library_versions() -> dict[str, str]:
    """Returns the versions of what computes the logits, and of the code that generates."""
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {"code": code_digest(graded=False), **versions}


def checkpoint_facts(checkpoint: str | PreTrainedModel, revision: str | None = None) -> dict[str, Any]:
    """Returns what tells a checkpoint from every other.

    Args:
        checkpoint: a directory, an id on the hub, or a model in memory, of whose weights `weights_digest` tells.
        revision: of the id on the hub.
    """
    if not isinstance(checkpoint, str):
        configs = [str(checkpoint.config.to_dict()), str(getattr(checkpoint, "generation_config", None))]
        return {"configs": digest(configs)}
    if Path(checkpoint).is_dir():
        return {"files": fingerprint.checkpoint_facts(checkpoint)}
    return {"id": checkpoint, "revision": revision, "commit": hub_commit(checkpoint, revision)}


def hub_commit(name: str, revision: str | None) -> str | None:
    """Returns the commit that `revision` of a hub repository has in the local cache, where the weights came from."""
    for file in ("config.json", "adapter_config.json"):
        found = huggingface_hub.try_to_load_from_cache(name, file, revision=revision)
        if isinstance(found, str):
            return Path(found).parent.name
    return None


def weights_digest(model: torch.nn.Module, *, quick: bool = False) -> str:
    """Returns a digest of names, types and values of all weights.

    Args:
        model: whose.
        quick: look at `SAMPLE` values of each tensor, spread over it, instead of reading every byte; training steps,
            loads and resets show there.
    """
    total = xxhash.xxh3_128()  # reads gigabytes a second, where SHA-256 takes seconds for each on some processors
    for name, tensor in sorted(model.state_dict().items()):
        if not isinstance(tensor, torch.Tensor) or tensor.is_meta:  # a layer's own notes; kept elsewhere by accelerate
            total.update(f"{name} {tensor!r}".encode())
            continue
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        values = tensor.detach().reshape(-1)
        values = values[:: max(1, len(values) // SAMPLE)] if quick else values
        total.update(values.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns a digest of how a tokenizer encodes, decodes and renders chats."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = sorted(tokenizer.get_vocab().items()) if backend is None else backend.to_str()
    special = {name: str(value) for name, value in tokenizer.special_tokens_map.items()}
    return digest([rules, special, tokenizer.chat_template, getattr(tokenizer, "clean_up_tokenization_spaces", None)])


def plain_arguments(arguments: Mapping[str, Any]) -> dict[str, str]:
    """Returns the model arguments that change results, as text."""
    return {name: str(value) for name, value in sorted(arguments.items()) if name not in IRRELEVANT}
