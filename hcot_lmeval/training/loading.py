"""Tokenizer, model and adapter of a training run, checked before anything is trained."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from hcot_lmeval.assets import resolve
from hcot_lmeval.embeddings import Seeding
from hcot_lmeval.templates import check_template, load_template
from hcot_lmeval.tokens import Added, extend_vocabulary, marker_ids
from hcot_lmeval.training.config import LoraConfig, SftConfig
from hcot_lmeval.training.tiny import tiny_model, tiny_tokenizer

logger = logging.getLogger(__name__)

NEW_MODEL = "tiny"
"""The name under which a new, small model is made instead of loading one."""
FLEX_FROM = 2048
"""Tokens in a row from which FlexAttention beats a dense mask on CUDA (which grows with its square)."""


def load_tokenizer(config: SftConfig) -> PreTrainedTokenizerBase:
    """Returns the tokenizer with its chat template, the markers not yet added.

    Raises:
        ValueError: the markers are missing and `tokens.add` is false, or the chat template is unknown.
    """
    if config.model == NEW_MODEL and config.tokenizer is None:
        tokenizer = tiny_tokenizer(config.tokens.markup)
    else:
        source = resolve(config.tokenizer or config.model)
        options = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    if config.tokens.chat_template is not None:
        tokenizer.chat_template = load_template(config.tokens.chat_template)
    if not config.tokens.add:
        marker_ids(tokenizer, config.tokens.markup)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(config: SftConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[Any, Added]:
    """Returns the model, rows for the markers included, and what was added to tokenizer and model.

    Raises:
        ValueError: see `load_tokenizer`; or the chat template's prompt is no prefix of its training text.
    """
    if config.model == NEW_MODEL:
        model = tiny_model(tokenizer, config.tiny, config.seed)
    else:
        model = AutoModelForCausalLM.from_pretrained(
            resolve(config.model),
            dtype=getattr(torch, config.dtype),
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
        )
    model.set_attn_implementation(attention_of(config))
    tokens = config.tokens
    seeding = Seeding(tokens.seeding, noise=tokens.noise, phrases=tokens.phrases, seed=config.seed)
    added = extend_vocabulary(tokenizer, model, tokens.markup, seeding)
    if tokenizer.chat_template is not None:
        check_template(tokenizer, tokens.markup)
    return model, added


def attention_of(config: SftConfig) -> str:
    """Returns the attention implementation that `attention: auto` stands for here."""
    if config.attention != "auto":
        return config.attention
    return "flex_attention" if torch.cuda.is_available() and config.data.row_length > FLEX_FROM else "sdpa"


def check_adapter(adapter: str, model: str) -> None:
    """Raises `ValueError` unless `adapter` is an adapter for the base `model`."""
    file = Path(adapter) / "adapter_config.json"
    if not file.is_file():
        raise ValueError(f"adapter={adapter!r} is no adapter directory: it has no {file.name}")
    base = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base or not _same(base, model):
        raise ValueError(
            f"adapter={adapter!r} was trained on the base {base!r}, not on model={model!r}; its updates would mean "
            "nothing there. Set model to that base, or leave adapter out and set lora for a new one."
        )


def _same(one: str, other: str) -> bool:
    return one == other or Path(one).resolve() == Path(other).resolve()


def with_adapter(config: SftConfig, model: Any, new_ids: Collection[int]) -> Any:
    """Returns the model wrapped for LoRA if `config` asks for that, else the model itself."""
    if config.adapter is None and config.lora is None:
        return model
    import peft

    if config.adapter is not None:
        return peft.PeftModel.from_pretrained(model, config.adapter, is_trainable=True)
    return peft.get_peft_model(model, _lora(config.lora or LoraConfig(), model, new_ids))


def _lora(config: LoraConfig, model: Any, new_ids: Collection[int]) -> Any:
    """PEFT's configuration; rows of new tokens are trained in full, in the input and, if untied, the output."""
    import peft

    names = {id(module): name for name, module in model.named_modules()}
    embeddings = [model.get_input_embeddings()]
    if not getattr(model.config.get_text_config(), "tie_word_embeddings", True):
        embeddings.append(model.get_output_embeddings())
    rows = {names[id(module)].rpartition(".")[2]: sorted(new_ids) for module in embeddings}
    return peft.LoraConfig(
        r=config.r,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=config.target_modules,
        trainable_token_indices=rows if new_ids else None,
        task_type="CAUSAL_LM",
    )
