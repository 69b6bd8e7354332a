"""Tiny random models and a real byte-level tokenizer, made on the spot: everything the tests decode with.

The models have two layers, grouped heads and logits far apart (standard deviation of about 1.4), so that near-ties are
rare in greedy decoding. The weights depend on the arguments alone.
"""

from __future__ import annotations

from pathlib import Path
from types import MethodType
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

KINDS = ("qwen2", "qwen3", "llama", "mistral", "gemma2", "phi3")
VOCAB_SIZE = 320
MARKERS = ("[THOUGHT]", "[SOLUTION]", "[RETURN]")
THINK = ("<think>", "</think>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking %}<think>\n{% endif %}{% endif %}"
)
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Qwen's word pattern: transformers puts it into every tokenizer that it loads beside a qwen2 model."""
_CORPUS = (
    "What is the sum of the first ten even numbers? The answer is \\boxed{110}.\n\n"
    "Let us find every integer n such that n^2 + 1 divides 50. Then we check that 7^2 + 1 = 50.\n"
    "Question: how many ways are there to choose three of the seven books? Answer: 35.\n"
)


def tiny_tokenizer(*, markers: bool = True, think: bool = True, chat: bool = True) -> PreTrainedTokenizerFast:
    """Returns a byte-level BPE tokenizer with exactly `VOCAB_SIZE` tokens: any text survives encoding and decoding.

    ``<|endoftext|>`` is the padding and ``<|im_end|>`` the end of a generation, as in Qwen's tokenizers.

    Args:
        markers: whether the hcot markers are special tokens.
        think: whether ``<think>`` and ``</think>`` are.
        chat: whether it has a chat template.
    """
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(MARKERS if markers else ()), *(THINK if think else ())]
    raw = Tokenizer(models.BPE())
    raw.normalizer = normalizers.NFC()
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator([_CORPUS], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=special[1:2] + special[3:],
        chat_template=CHAT_TEMPLATE if chat else None,
    )
    assert len(tokenizer) == VOCAB_SIZE
    return tokenizer


def tiny_model(kind: str, dtype: torch.dtype = torch.float32, seed: int = 0, **config: Any) -> PreTrainedModel:
    """Returns a random decoder of two layers in evaluation mode.

    Args:
        kind: one of `KINDS`.
        dtype: of the weights.
        seed: of the weights.
        config: overrides of the configuration below.
    """
    tokens = {"bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0}
    shape: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "initializer_range": 0.25,
        "tie_word_embeddings": False,
        **tokens,
    }
    if kind in ("qwen3", "mistral", "gemma2"):
        shape["head_dim"] = 8
    if kind in ("mistral", "gemma2"):
        shape["sliding_window"] = 16  # short enough to matter in a test
    settings = CONFIG_MAPPING[kind](**{**shape, **config})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(settings, dtype=torch.float32)
    return model.to(dtype).eval()


def in_full_precision(model: PreTrainedModel) -> PreTrainedModel:
    """Makes the norms of a double model compute in doubles, in place: those of transformers round to float32."""

    def forward(self: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x * (x.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()

    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = MethodType(forward, module)
    return model


def favour(model: PreTrainedModel, token_ids: list[int], scale: float = 3.0) -> PreTrainedModel:
    """Makes a random model write `token_ids` (the markers, say) often: their output rows grow by `scale`, in place."""
    with torch.no_grad():
        model.get_output_embeddings().weight[token_ids] *= scale
    return model


def save_tiny(path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast | None = None) -> str:
    """Saves a model and its tokenizer as a checkpoint and returns the path as `from_pretrained` takes it."""
    model.save_pretrained(path)
    (tokenizer or tiny_tokenizer()).save_pretrained(path)
    return str(path)
