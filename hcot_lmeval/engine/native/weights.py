"""Reads a Hugging Face model of the Llama kind: which of its tensors play which part.

Nothing is copied. The reading is by structure, and a model whose structure says more than is read here is refused; that
the reading is right is shown when the engine compares logits at load time.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

MODEL_TYPES = frozenset({"llama", "mistral", "qwen2", "qwen3"})
"""Architectures made of RMS norms, rotary embeddings, grouped-query attention and a gated SiLU, and of nothing else."""
ROPE_TYPES = frozenset({"default", "linear", "llama3", "yarn"})
"""Rotary embeddings whose angles depend on the position alone; others change with the length of the context."""


class UnreadableModelError(ValueError):
    """The kernel cannot run the model; the message says which part of it stands in the way."""


@dataclass(frozen=True)
class Linear:
    """A product with `weight` [out, in] and a `bias` [out] or None."""

    weight: torch.Tensor
    bias: torch.Tensor | None


@dataclass(frozen=True)
class LayerWeights:
    """The tensors of one layer; `query_norm` and `key_norm` [dim] are None where heads are not normed."""

    attention_norm: torch.Tensor
    query: Linear
    key: Linear
    value: Linear
    query_norm: torch.Tensor | None
    key_norm: torch.Tensor | None
    output: Linear
    mlp_norm: torch.Tensor
    gate: Linear
    up: Linear
    down: Linear


@dataclass(frozen=True)
class ModelWeights:
    """A whole model.

    Attributes:
        embedding: [vocabulary, hidden].
        head: of the logits.
        rotary: the module that makes cosines and sines.
        eps: of all norms.
        scaling: of the scores.
    """

    embedding: torch.Tensor
    layers: tuple[LayerWeights, ...]
    norm: torch.Tensor
    head: Linear
    rotary: nn.Module
    heads: int
    kv_heads: int
    dim: int
    eps: float
    scaling: float
    parameters: tuple[torch.Tensor, ...] = field(repr=False)

    @property
    def dtype(self) -> torch.dtype:
        """Of weights, keys and values."""
        return self.embedding.dtype

    @property
    def state(self) -> tuple[tuple[int, int], ...]:
        """Changes when a parameter is replaced, or changed in place."""
        return tuple((p.data_ptr(), 0 if p.is_inference() else p._version) for p in self.parameters)


def read_weights(model: Any) -> ModelWeights:
    """Returns the parts of a causal language model of transformers.

    Raises:
        UnreadableModelError: the architecture is another one, or it was changed: adapters, quantised or offloaded
            layers, hooks, sliding windows, tensors of several types or off the CPU.
    """
    config = model.config.get_text_config()
    if not type(model).__module__.startswith("transformers."):
        raise UnreadableModelError(f"{type(model).__name__} is not a class of transformers")
    _check_config(config)
    _check_modules(model)
    base = model.get_decoder()
    attention = base.layers[0].self_attn
    parameters = tuple(model.parameters())
    _check_tensors(parameters)
    return ModelWeights(
        embedding=_embedding(base.embed_tokens),
        layers=tuple(_read_layer(layer) for layer in base.layers),
        norm=_norm(base.norm),
        head=_linear(model.get_output_embeddings()),
        rotary=base.rotary_emb,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        dim=attention.head_dim,
        eps=config.rms_norm_eps,
        scaling=attention.scaling,
        parameters=parameters,
    )


def _check_config(config: Any) -> None:
    if config.model_type not in MODEL_TYPES:
        raise UnreadableModelError(f"it is of type {config.model_type}; known are {', '.join(sorted(MODEL_TYPES))}")
    if config.hidden_act != "silu":
        raise UnreadableModelError(f"hidden_act={config.hidden_act!r} is not silu")
    if getattr(config, "sliding_window", None) is not None:
        raise UnreadableModelError(f"it has a sliding window of {config.sliding_window}")
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope not in ROPE_TYPES:
        raise UnreadableModelError(f"rope_type={rope!r} depends on the length of the context")


def _check_modules(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks or hasattr(module, "_hf_hook"):
            raise UnreadableModelError(f"{name or 'the model'} has a hook, which the kernel would pass by")
        if isinstance(module, nn.Linear) and type(module) is not nn.Linear:
            raise UnreadableModelError(f"{name} is a {type(module).__name__}, not a plain linear layer")


def _check_tensors(parameters: tuple[torch.Tensor, ...]) -> None:
    dtypes = {parameter.dtype for parameter in parameters}
    if len(dtypes) > 1:
        raise UnreadableModelError(f"its parameters have several types: {', '.join(sorted(map(str, dtypes)))}")
    if any(parameter.device.type != "cpu" for parameter in parameters):
        raise UnreadableModelError("its parameters are not all on the CPU")
    if not all(parameter.is_contiguous() for parameter in parameters):
        raise UnreadableModelError("some of its parameters are not contiguous")


def _read_layer(layer: Any) -> LayerWeights:
    attention, mlp = layer.self_attn, layer.mlp
    return LayerWeights(
        attention_norm=_norm(layer.input_layernorm),
        query=_linear(attention.q_proj),
        key=_linear(attention.k_proj),
        value=_linear(attention.v_proj),
        query_norm=_norm(attention.q_norm) if hasattr(attention, "q_norm") else None,
        key_norm=_norm(attention.k_norm) if hasattr(attention, "k_norm") else None,
        output=_linear(attention.o_proj),
        mlp_norm=_norm(layer.post_attention_layernorm),
        gate=_linear(mlp.gate_proj),
        up=_linear(mlp.up_proj),
        down=_linear(mlp.down_proj),
    )


def _norm(module: Any) -> torch.Tensor:
    if not type(module).__name__.endswith("RMSNorm"):
        raise UnreadableModelError(f"one of its norms is a {type(module).__name__}")
    return module.weight


def _embedding(module: Any) -> torch.Tensor:
    if type(module) is not nn.Embedding:
        raise UnreadableModelError(f"its embedding is a {type(module).__name__}")
    return module.weight


def _linear(module: Any) -> Linear:
    if type(module) is not nn.Linear:
        raise UnreadableModelError(f"one of its products is a {type(module).__name__}, not a plain linear layer")
    return Linear(module.weight, module.bias)
