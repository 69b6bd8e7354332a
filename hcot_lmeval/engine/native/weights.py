"""A Hugging Face model of the Llama kind as the kernel sees it: which of its tensors play which part.

Nothing is copied. The reading is by structure, and a model whose structure says more than is read here is refused; that
the reading is right is shown when the engine compares logits at load time.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

MODEL_TYPES = frozenset({"llama", "mistral", "qwen2", "qwen3"})
"""Architectures made of RMS norms, rotary embeddings, grouped-query attention and a gated SiLU, and of nothing else."""
ROPE_TYPES = frozenset({"default", "linear", "llama3", "yarn"})
"""Rotary embeddings whose angles depend on the position alone; others change with the length of the context."""
MATRICES = {
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "output": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
NORMS = {
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "query_norm": "self_attn.q_norm",
    "key_norm": "self_attn.k_norm",
}
"""Fields of the kernel's `Layer`, in its order -> modules of a layer in transformers; not all norm queries and keys."""


class UnreadableModelError(ValueError):
    """The kernel cannot run the model; the message says which part of it stands in the way."""


# --- the kernel's structures, field by field as in kernel/step.cpp and kernel/products.hpp ----------------------------


def _fields(kind: type, names: str) -> tuple[tuple[str, type], ...]:
    return tuple((name, kind) for name in names.split())


class Matrix(ctypes.Structure):
    """Rows of weights, a bias or null, and copies of the rows or null."""

    _fields_ = (
        *_fields(ctypes.c_void_p, "rows bias"),
        *_fields(ctypes.c_int, "out columns"),
        *_fields(ctypes.c_void_p, "narrow blocks bases"),
    )


class Layer(ctypes.Structure):
    """One layer, and its keys and values in the pool."""

    _fields_ = (
        *((name, Matrix) for name in MATRICES),
        *((name, ctypes.c_void_p) for name in (*NORMS, "keys", "values")),
    )


class Model(ctypes.Structure):
    """A whole model, and how its weights are read."""

    _fields_ = (
        ("layers", ctypes.POINTER(Layer)),
        *_fields(ctypes.c_void_p, "embedding norm"),
        ("head", Matrix),
        *_fields(ctypes.c_int, "count hidden inner heads kv_heads dim far known"),
        *_fields(ctypes.c_double, "eps scaling"),
    )

    @property
    def matrices(self) -> list[Matrix]:
        """Layer by layer, and the head."""
        layers = [self.layers[index] for index in range(self.count)]
        return [*(getattr(layer, name) for layer in layers for name in MATRICES), self.head]


class Step(ctypes.Structure):
    """Tokens of a step, and where its results and its scratch go."""

    _fields_ = (
        *_fields(ctypes.c_int, "tokens outputs threads angles places"),
        *_fields(ctypes.c_void_p, "ids positions first row last cosine sine logits scratch"),
    )


class Packing(ctypes.Structure):
    """Numbers in a block of packed rows, the words it takes, and the tokens that rows in bfloat16 serve."""

    _fields_ = _fields(ctypes.c_int, "numbers words few")


# --- models of transformers -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelWeights:
    """The parts of a model.

    Attributes:
        layers: of each layer its modules, by the keys of `MATRICES` and `NORMS`; None where it has no such norm.
        embedding: [vocabulary, hidden].
        norm: before the head.
        head: of the logits.
        rotary: the module that makes cosines and sines.
        eps: of all norms.
        scaling: of the scores.
    """

    layers: tuple[Mapping[str, Any], ...]
    embedding: torch.Tensor
    norm: Any
    head: nn.Linear
    rotary: nn.Module
    heads: int
    kv_heads: int
    dim: int
    eps: float
    scaling: float
    parameters: tuple[torch.Tensor, ...] = field(repr=False)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of weights, keys and values."""
        return self.embedding.dtype

    @property
    def bytes(self) -> int:
        """Memory taken."""
        return sum(parameter.nbytes for parameter in self.parameters)

    @property
    def matrices(self) -> list[torch.Tensor]:
        """What `Model.matrices` has, [out, in] each."""
        linears = [layer[name] for layer in self.layers for name in MATRICES]
        return [linear.weight.detach() for linear in (*linears, self.head)]

    @property
    def state(self) -> tuple[tuple[int, int], ...]:
        """Changes when a parameter or a rotary frequency is replaced, or changed in place."""
        read = (*self.parameters, *self.rotary.buffers())
        return tuple((p.data_ptr(), 0 if p.is_inference() else p._version) for p in read)


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
    base, parameters = model.get_decoder(), tuple(model.parameters())
    _check_tensors(parameters)
    if type(base.embed_tokens) is not nn.Embedding:
        raise UnreadableModelError(f"its embedding is a {type(base.embed_tokens).__name__}")
    attention = base.layers[0].self_attn
    return ModelWeights(
        layers=tuple(_read_layer(layer) for layer in base.layers),
        embedding=base.embed_tokens.weight,
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


def _read_layer(layer: nn.Module) -> dict[str, Any]:
    parts = {name: _linear(layer.get_submodule(path)) for name, path in MATRICES.items()}
    modules = dict(layer.named_modules())
    return parts | {name: _norm(modules[path]) if path in modules else None for name, path in NORMS.items()}


def _norm(module: nn.Module) -> nn.Module:
    if not type(module).__name__.endswith("RMSNorm"):
        raise UnreadableModelError(f"one of its norms is a {type(module).__name__}")
    return module


def _linear(module: Any) -> nn.Linear:
    if type(module) is not nn.Linear:
        raise UnreadableModelError(f"one of its products is a {type(module).__name__}, not a plain linear layer")
    return module
