"""A Hugging Face model of the Llama kind as the kernel sees it, and how the kernel reads its weights.

Which tensors play which part is read from the structure of the model, and a model whose structure says more than is
read here is refused; that the reading is right is shown when the engine compares logits at load time.

Nothing is copied, with one exception: where few rows run, float32 weights of a checkpoint that was written in bfloat16
are read from a copy in bfloat16, which has the same values. How weights are read changes the time of a step and nothing
else; the fastest way is found by trying.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import psutil
import torch
from torch import nn

from hcot_lmeval.engine.slots import LEAST_BYTES, allocate

logger = logging.getLogger(__name__)

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
    """Rows of weights, a bias or null, and a copy of the rows in bfloat16 or null."""

    _fields_ = (
        *_fields(ctypes.c_void_p, "rows bias"),
        *_fields(ctypes.c_int, "out columns"),
        ("narrow", ctypes.c_void_p),
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

    def digest(self) -> str:
        """A digest of the sums of the bits of every row; it takes little longer than reading the weights once."""
        sums = [_words(tensor).sum(1).numpy().tobytes() for tensor in self.matrices]
        return hashlib.sha256(b"".join(sums)).hexdigest()


def _words(tensor: torch.Tensor) -> torch.Tensor:
    """The bits of rows as integers, of 8 bytes where rows have a whole number of them: those are summed faster."""
    even = tensor.shape[1] % 2 == 0 and tensor.storage_offset() % 2 == 0
    return tensor.view(torch.int64 if even else torch.int32)


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


# --- how weights are read ---------------------------------------------------------------------------------------------

ROWS = 256
"""Rows that are looked at together, so that no copy of a whole matrix is made in passing."""
DISTANCES = (512, 2560, 0)
"""Bytes by which the weights for one row of activations are fetched ahead, one row of weights after the other; or (0)
several rows side by side. Of the first two, the first was the faster on a Zen 3, by up to a tenth, the second on a
Zen 4, by up to a third; the last is faster in bfloat16 where rows are long and there is no instruction for it."""
TRIALS = 10
"""How often each way is tried."""
GAIN = 1.05
"""How many times as fast as the first way another has to be."""
SHARE = {"auto": 0.5, "packed": 0.9}
"""The part of the free memory that a copy of the weights may take."""


class Reading(NamedTuple):
    """A way to read weights.

    Attributes:
        copied: from the copy in bfloat16.
        distance: one of `DISTANCES`.
    """

    copied: bool
    distance: int

    def __str__(self) -> str:
        order = f"{self.distance} bytes ahead" if self.distance else "several rows side by side"
        return f"{'from the copy' if self.copied else 'as they are'}, {order}"


class NoCopyError(ValueError):
    """There can be no copy of the weights in bfloat16; the message says why."""


@dataclass(frozen=True, eq=False)
class WeightCopy:
    """The matrices of a model in bfloat16.

    Attributes:
        state: of the parameters when it was made.
        digest: of the weights.
        memory: the matrices, one behind the other.
    """

    state: object
    digest: str
    memory: torch.Tensor

    def show_to(self, matrices: Sequence[Matrix], *, shown: bool) -> None:
        """Has the kernel find it, or no more."""
        at = self.memory.data_ptr()
        for matrix in matrices:
            matrix.narrow = at if shown else None
            at += 2 * matrix.out * matrix.columns


_COPIES: weakref.WeakKeyDictionary[Any, weakref.ref[WeightCopy]] = weakref.WeakKeyDictionary()


def copy_weights(owner: Any, weights: ModelWeights, share: float) -> WeightCopy:
    """Copies the matrices of a float32 model into bfloat16; all engines of the model have the same copy.

    Args:
        owner: the model that the weights belong to.
        weights: as they are now.
        share: of the free memory that may be taken.

    Raises:
        NoCopyError: the weights are not float32, or not all of them are numbers of bfloat16, or the copy does not fit.
    """
    if weights.dtype != torch.float32:
        kind = str(weights.dtype).removeprefix("torch.")
        raise NoCopyError(f"its weights are {kind}: load it with dtype='float32', or use weights='auto'")
    state, digest = weights.state, weights.digest()
    known = _COPIES.get(owner, lambda: None)()
    if known is not None and (known.state, known.digest) == (state, digest):
        return known
    if not all(map(_is_bfloat16, weights.matrices)):
        raise NoCopyError("its weights are not all numbers of bfloat16: use weights='auto'")
    size, free = 2 * sum(tensor.numel() for tensor in weights.matrices), psutil.virtual_memory().available
    if size > share * free:
        raise NoCopyError(
            f"it takes {size / 2**30:.1f} GiB, and {share:.0%} of the {free / 2**30:.1f} GiB that are free may go to "
            "it: free memory, or use weights='auto'"
        )
    memory = allocate(size).view(torch.bfloat16)
    for part, tensor in zip(memory.split([t.numel() for t in weights.matrices]), weights.matrices, strict=True):
        part.view(tensor.shape).copy_(tensor)
    logger.info("weights copied into %.2f GiB of bfloat16", size / 2**30)
    known = WeightCopy(state, digest, memory)
    _COPIES[owner] = weakref.ref(known)
    return known


def _is_bfloat16(tensor: torch.Tensor) -> bool:
    return all(torch.equal(rows.bfloat16().float(), rows) for rows in tensor.split(ROWS))


class WeightReader:
    """Has the kernel read weights in the fastest way.

    Args:
        form: which weights: ``plain``, the model's own; ``packed``, those of a copy; ``auto``, whichever are read
            faster.
        few: whether so few rows run at a time that a copy would serve all of them.

    Attributes:
        reading: the way in which they are read now.
        copy: of the weights, in bfloat16; None where it would not be read.
    """

    def __init__(self, form: str, *, few: bool) -> None:
        self.form, self._few = form, few
        self.reading = Reading(False, DISTANCES[0])
        self.copy: WeightCopy | None = None
        self._opened = False

    def open(self, owner: Any, weights: ModelWeights, model: Model, seconds: Callable[[], float]) -> None:
        """Reads these weights from now on, in a way found by trying if the model is large.

        Weights that take the place of others are read as they are, unless a copy was asked for: while a model is
        trained, a copy would not live long enough to pay.

        Args:
            owner: the model that the weights belong to.
            weights: as PyTorch has them.
            model: as the kernel has them.
            seconds: returns the time that products of a single token take, in the way of the moment.

        Raises:
            NoCopyError: a copy was asked for, and cannot be had.
        """
        asked, large = self.form == "packed", weights.bytes >= LEAST_BYTES
        self.copy, self._weights, self._model = None, weights, model
        self._use(Reading(False, DISTANCES[0]) if self.reading.copied else self.reading)
        if self._opened and not asked:
            return
        if asked or (self.form == "auto" and large and self._few):
            self._try_to_copy(owner, asked=asked)
        forms = [True] if asked else [False] if self.copy is None else [False, True]
        ways = [Reading(copied, distance) for copied in forms for distance in DISTANCES]

        def timed(way: Reading) -> float:
            self._use(way)
            return seconds()

        self._use(choose_reading(ways, timed) if large else ways[0])
        logger.info("for a single row, weights are read %s", self.reading)
        if not self.reading.copied:
            self.copy = None
        self._opened = True

    def is_outdated(self) -> bool:
        """Whether the weights are others than those of the copy that is read."""
        return self.copy is not None and self.copy.digest != self._weights.digest()

    def _try_to_copy(self, owner: Any, *, asked: bool) -> None:
        try:
            self.copy = copy_weights(owner, self._weights, SHARE[self.form])
        except NoCopyError:
            if asked:
                raise

    def _use(self, reading: Reading) -> None:
        self.reading, self._model.far = reading, reading.distance
        if self.copy is not None:
            self.copy.show_to(self._model.matrices, shown=reading.copied)


def choose_reading(ways: Sequence[Reading], seconds: Callable[[Reading], float]) -> Reading:
    """Returns the fastest way, where `seconds` gives the time of one; the first if no other is much faster."""
    times = zip(*([seconds(way) for way in ways] for _ in range(TRIALS)), strict=True)  # by turns
    best = dict(zip(ways, map(min, times), strict=True))
    fastest = min(ways, key=lambda way: best[way])
    return fastest if GAIN * best[fastest] < best[ways[0]] else ways[0]
