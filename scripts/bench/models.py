"""Models with random weights: what is timed has the shape of a model and none of its knowledge."""

from __future__ import annotations

from typing import Any

SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
SHAPES: dict[str, dict[str, int]] = {
    name: {**dict(zip(SIZES, sizes, strict=True)), "num_key_value_heads": 2}
    for name, sizes in {
        "tiny": (512, 128, 384, 4, 4),
        "26M": (4096, 384, 1536, 8, 6),
        "0.5B": (151936, 896, 4864, 24, 14),
        "1.5B": (151936, 1536, 8960, 28, 12),
    }.items()
}
"""Sizes of Qwen2 models; 0.5B and 1.5B are those of Qwen2.5, tiny is for tests."""

DTYPES = ("float32", "bfloat16", "float16")

POSITIONS = 65536
"""`max_position_embeddings`: beyond every trace that is timed. It costs no memory."""


def make_model(
    shape: str, dtype: str = "float32", device: str = "cpu", threads: int | None = None, *, rounded: bool = False
) -> Any:
    """Returns a `Qwen2ForCausalLM` with random weights, in evaluation mode; the same ones at each call.

    On the CPU they lie on huge pages, where there are any: for the floor and for every engine that shares the model.

    Args:
        shape: a key of `SHAPES`.
        dtype: one of `DTYPES`.
        device: as torch names it.
        threads: CPU threads from now on; as many as before by default.
        rounded: give the weights values of bfloat16, as those of most checkpoints have in any dtype.
    """
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from hcot_lmeval.engine.native.pages import move_to_huge_pages

    if threads is not None:
        torch.set_num_threads(threads)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = Qwen2Config(**SHAPES[shape], max_position_embeddings=POSITIONS, tie_word_embeddings=True)
        model = Qwen2ForCausalLM(config)
    model = (model.bfloat16() if rounded else model).to(device, getattr(torch, dtype)).eval()
    move_to_huge_pages(model)
    return model


def token_bytes(model: Any) -> int:
    """Returns the bytes that the keys and values of one token take."""
    config = model.config
    head = config.hidden_size // config.num_attention_heads
    return int(config.num_hidden_layers * config.num_key_value_heads * 2 * head * model.dtype.itemsize)
