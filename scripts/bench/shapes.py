"""Models with random weights: what is timed has the shape of a model and none of its knowledge."""

from __future__ import annotations

from typing import Any

SHAPES: dict[str, dict[str, int]] = {
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "26M": {
        "vocab_size": 4096,
        "hidden_size": 384,
        "intermediate_size": 1536,
        "num_hidden_layers": 8,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
    },
    "0.5B": {
        "vocab_size": 151936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
    },
    "1.5B": {
        "vocab_size": 151936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
    },
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

    Raises:
        ValueError: the shape or the dtype is unknown.
    """
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from hcot_lmeval.engine.pages import move_to_huge_pages

    if shape not in SHAPES or dtype not in DTYPES:
        raise ValueError(f"shape={shape!r}, dtype={dtype!r}: known are {', '.join(SHAPES)} and {', '.join(DTYPES)}")
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
