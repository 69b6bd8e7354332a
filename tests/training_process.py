"""The loss and gradients of one global batch, computed by this process or by several that share the batch.

    torchrun --nproc_per_node 2 tests/training_process.py OUT

Rank 0 writes the `Result` of every family and wrapper to OUT. They have to equal that of `compute` without a wrapper.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from hcot_lmeval.grammar import Grammar
from hcot_lmeval.trace import Policy
from hcot_lmeval.training.data.documents import COLUMNS, Example, compile_document
from hcot_lmeval.training.data.rows import collate
from hcot_lmeval.training.forward import LossSettings, install, loss_sums
from tests.random_traces import VOCAB_SIZE, random_trace
from tests.reference import EOS, MARKERS
from tests.tiny import tiny_model

FAMILIES: dict[str, dict[str, Any]] = {"qwen2": {"tie_word_embeddings": True}, "llama": {}}
"""One with an output head of its own, and one whose head is the embedding, which FSDP2 has to gather for both."""
LENGTHS = (100, 90, 6, 4)
"""Generated tokens of the rows; the first half of them is rank 0's."""
ROW_LENGTH = 140
SETTINGS = LossSettings(Grammar(MARKERS["hcot"], (None, None), frozenset({EOS})), chunk=16)


class Result(NamedTuple):
    """Of a global batch: its loss per target, the gradients by parameter, and the number of targets on each rank."""

    loss: float
    gradients: dict[str, torch.Tensor]
    targets: list[int]


def ddp(model: Any) -> Any:
    return DistributedDataParallel(model)


def fsdp(model: Any) -> Any:
    """Shards each decoder layer, then the embedding, the norm and the head with the root."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def fsdp_checkpointed(model: Any) -> Any:
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return fsdp(model.train())


WRAPPERS: dict[str, Callable[[Any], Any]] = {"ddp": ddp, "fsdp": fsdp, "fsdp_checkpointed": fsdp_checkpointed}


def global_rows() -> list[dict[str, list[int]]]:
    traces = [random_trace(seed, MARKERS["hcot"], length, "nested") for seed, length in enumerate(LENGTHS)]
    examples = [Example(tuple(ids[:prompt]), tuple(ids[prompt:])) for ids, prompt in traces]
    documents = [compile_document(e, SETTINGS.grammar, Policy.RECOMPUTE, max_length=ROW_LENGTH) for e in examples]
    return [{name: list(getattr(document, name)) for name in COLUMNS} for document in documents]


def compute(family: str, wrapper: Callable[[Any], Any] | None) -> Result:
    """Trains on this rank's share: its sum, over the targets of the global batch, times the ranks that are averaged."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if wrapper else (0, 1)
    share = len(LENGTHS) // world
    batch = collate(global_rows()[rank * share : (rank + 1) * share], ROW_LENGTH, pad_id=0)
    model = tiny_model(family, torch.float64, vocab_size=VOCAB_SIZE, **FAMILIES[family])
    install(model)
    wrapped = wrapper(model) if wrapper else model  # DDP has to live until the backward is over
    sums = loss_sums(wrapped, batch, SETTINGS)
    counts = torch.zeros(world, dtype=torch.int64)
    counts[rank] = sums.counts.sum()
    total = sums.objective.detach().clone()
    if wrapper:
        dist.all_reduce(counts)
        dist.all_reduce(total)
    (sums.objective / counts.sum() * world).backward()
    gradients = {name: whole(parameter.grad) for name, parameter in model.named_parameters()}
    return Result(float(total / counts.sum()), gradients, counts.tolist())


def whole(gradient: Any) -> torch.Tensor:
    """The gradient on one rank, gathered if it is sharded."""
    return gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient


def main(out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results = {(family, name): compute(family, wrap) for family in FAMILIES for name, wrap in WRAPPERS.items()}
    if dist.get_rank() == 0:
        torch.save({key: tuple(result) for key, result in results.items()}, out)
    dist.destroy_process_group()
    os._exit(0)  # FSDP2 keeps the group and so Gloo's threads, which can abort a Python that shuts down


if __name__ == "__main__":
    main(*sys.argv[1:])
