"""llama.cpp through llama-cpp-python's low-level interface, rewound at the end of each block; the model as its file."""

from __future__ import annotations

import ctypes
import functools
import tempfile
import time
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.engines import Contender, Setting, Timing, UnavailableError
from hcot_lmeval.trace import Policy, Step

KV_TYPES = {"float32": 0, "float16": 1, "bfloat16": 30}
"""Type of keys and values for each dtype (`enum ggml_type`): the same precision as ours, not the default of float16."""

FLASH = {False: 0, True: 1}
"""`enum llama_flash_attn_type`. In float32 logits are 1e-5 standard deviations off without it, with it some 1e-3."""

CELLS = 256
"""llama.cpp rounds the context of a sequence up to a multiple of this."""


class Llama(Contender):
    """The model as a temporary file, one sequence for each row.

    At a return the sequence is cut behind ``[open]`` (`llama_memory_seq_rm`), and the solution is decoded again with
    the other rows' next tokens. Logits are computed for the last token of each row, and a token is chosen from them, as
    a decoder must: their maximum, or a sample by its own chain of samplers.
    """

    policy = "recompute"

    def __init__(self, setting: Setting, *, flash: bool) -> None:
        super().__init__(setting)
        for module, package in (("llama_cpp", "llama-cpp-python"), ("gguf", "gguf")):
            if find_spec(module) is None:
                raise UnavailableError(f"not installed; pip install {package}")
        self._flash, self._lib = flash, import_module("llama_cpp")
        if setting.model.device.type != "cpu" and not self._lib.llama_supports_gpu_offload():
            raise UnavailableError("installed without support for the GPU; build it with CMAKE_ARGS=-DGGML_CUDA=ON")
        self._lib.llama_log_set(_silence(), None)
        self._lib.llama_backend_init()
        self._model = self._load()
        self._context = self._make_context()
        self._memory = self._lib.llama_get_memory(self._context)
        self._vocabulary = setting.model.config.vocab_size
        self._batch = self._lib.llama_batch_init(self._room, 0, 1)
        self.sampler = self._make_sampler() if setting.params.temperature else None

    @property
    def _room(self) -> int:
        """Most tokens of one call: all prompts, or all solutions that are read again."""
        work = self.setting.work
        return max(512, work.batch * work.prompt, work.batch * work.peak_live(self.policy))

    def run(self) -> Timing:
        work, lib = self.setting.work, self._lib
        contexts = [work.context(row, Policy.RECOMPUTE) for row in range(work.batch)]
        lib.llama_memory_clear(self._memory, False)
        peak, choices = work.prompt, []
        start = time.perf_counter()
        steps = [whole(context.live) for context in contexts]
        for generated in range(work.tokens):
            logits = self.decode(steps)
            choices.append(self.choose(logits))  # a decoder would take these
            steps = [c.push(trace[generated]) for c, trace in zip(contexts, work.traces, strict=True)]
            peak = max(peak, *(step.rewind + len(step.forward) for step in steps))
        seconds = time.perf_counter() - start
        return Timing(seconds, work.traces, peak)

    def choose(self, logits: np.ndarray) -> list[int]:
        if self.sampler is None:
            return logits.argmax(1).tolist()
        sample = self._lib.llama_sampler_sample
        return [sample(self.sampler, self._context, row - len(logits)) for row in range(len(logits))]

    def decode(self, steps: Sequence[Step]) -> np.ndarray:
        """Carries the steps of all rows out; returns the logits behind each: [rows, vocabulary], valid until next."""
        batch, count = self._batch, 0
        for row, step in enumerate(steps):
            if not self._lib.llama_memory_seq_rm(self._memory, row, step.rewind, -1):
                raise RuntimeError(f"llama.cpp could not cut sequence {row} behind token {step.rewind}")
            for token, position in zip(step.forward, step.positions, strict=True):
                batch.token[count], batch.pos[count] = token, position
                batch.n_seq_id[count], batch.seq_id[count][0] = 1, row
                batch.logits[count] = 0
                count += 1
            batch.logits[count - 1] = 1
        batch.n_tokens = count
        status = self._lib.llama_decode(self._context, batch)
        if status:
            raise RuntimeError(f"llama_decode of {count} tokens returned {status}")
        values = self._lib.llama_get_logits(self._context)
        return np.ctypeslib.as_array(values, shape=(len(steps), self._vocabulary))

    def _load(self) -> Any:
        lib, params = self._lib, self._lib.llama_model_default_params()
        with tempfile.TemporaryDirectory() as folder:  # the file stays mapped after it is gone
            path = Path(folder) / "model.gguf"
            write_gguf(self.setting.model, path)
            if self.setting.model.device.type == "cpu":
                params.n_gpu_layers = 0
            model = lib.llama_model_load_from_file(str(path).encode(), params)
        if not model:
            raise RuntimeError("llama.cpp did not load the model")
        return model

    def _make_context(self) -> Any:
        setting, params = self.setting, self._lib.llama_context_default_params()
        cells = -(-setting.work.peak_live(self.policy) // CELLS) * CELLS
        params.n_ctx, params.n_seq_max = cells * setting.work.batch, setting.work.batch
        params.n_batch = self._room
        params.n_threads = params.n_threads_batch = setting.threads
        params.type_k = params.type_v = KV_TYPES[str(setting.model.dtype).removeprefix("torch.")]
        params.flash_attn_type = FLASH[self._flash]
        params.no_perf = True
        context = self._lib.llama_init_from_model(self._model, params)
        if not context:
            raise RuntimeError(f"llama.cpp made no context of {params.n_seq_max} sequences of {cells} tokens")
        return context

    def _make_sampler(self) -> Any:
        """Temperature, top-k, top-p, in the order of `generate`."""
        lib, params = self._lib, self.setting.params
        chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
        made = [lib.llama_sampler_init_temp(params.temperature)]
        made += [lib.llama_sampler_init_top_k(params.top_k)] if params.top_k else []
        made += [lib.llama_sampler_init_top_p(params.top_p, 1)] if params.top_p < 1 else []
        for sampler in (*made, lib.llama_sampler_init_dist(0)):
            lib.llama_sampler_chain_add(chain, sampler)
        return chain

    def close(self) -> None:
        if self.sampler is not None:
            self._lib.llama_sampler_free(self.sampler)
        self._lib.llama_batch_free(self._batch)
        self._lib.llama_free(self._context)
        self._lib.llama_model_free(self._model)


def whole(ids: Sequence[int]) -> Step:
    """The step that reads a prompt."""
    numbers = tuple(range(len(ids)))
    return Step(None, None, 0, 0, tuple(ids), numbers, numbers)  # type: ignore[arg-type]


@functools.cache
def _silence() -> Any:
    """A log that says nothing; kept for good, since all engines of the process write to the one that was set last."""
    return import_module("llama_cpp").llama_log_callback(_ignore)


def _ignore(level: int, text: bytes, data: ctypes.c_void_p) -> None:
    """A log that nobody reads."""


# --- the file ---------------------------------------------------------------------------------------------------------

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
