"""A Qwen2 model as the file that llama.cpp reads: weights and sizes, no vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""Part of a layer in transformers -> in a GGUF file (`gguf.TensorNameMap`)."""

OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def write_gguf(model: Any, path: Path) -> None:
    """Writes a `Qwen2ForCausalLM` to `path`.

    Matrices are stored in the model's dtype, vectors in float32, as llama.cpp's own conversion does. An output layer
    that is tied to the embedding is left out; llama.cpp then uses the embedding.

    Raises:
        ValueError: the model is of another kind.
    """
    import gguf

    config = model.config
    if config.model_type != "qwen2":
        raise ValueError(f"model_type={config.model_type!r} cannot be written; only 'qwen2' can")
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    for name, tensor in model.state_dict().items():
        if name != "lm_head.weight" or not config.tie_word_embeddings:
            _add(writer, gguf_name(name), tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_name(name: str) -> str:
    """Returns what a parameter of transformers is called in the file.

    Raises:
        ValueError: the file has no name for it.
    """
    part, _, kind = name.rpartition(".")
    if part in OUTER:
        return f"{OUTER[part]}.{kind}"
    layer, _, inner = part.removeprefix("model.layers.").partition(".")
    if inner not in NAMES:
        raise ValueError(f"parameter {name!r} has no place in the file")
    return f"blk.{layer}.{NAMES[inner]}.{kind}"


def _add(writer: Any, name: str, tensor: torch.Tensor) -> None:
    import gguf

    tensor = tensor.detach().cpu()
    if tensor.dim() == 1 or tensor.dtype == torch.float32:
        writer.add_tensor(name, tensor.float().contiguous().numpy())
    elif tensor.dtype == torch.float16:
        writer.add_tensor(name, tensor.contiguous().numpy())
    else:  # NumPy has no bfloat16: its bytes, said to be such
        bits = tensor.to(torch.bfloat16).contiguous().view(torch.uint8).numpy()
        writer.add_tensor(name, bits, raw_dtype=gguf.GGMLQuantizationType.BF16)
