"""Tokenizer and model of a training run.

What can be wrong with a checkpoint is found in its tokenizer and its configuration, before its weights are read. An
adapter holds its low-rank updates and the rows of the tokens that were added for it, nothing else of its base: the
embedding as a whole may then have any number of rows wherever the adapter is loaded.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from typing import Any, TypeVar

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from hcot_lmeval import vocabulary
from hcot_lmeval.assets import BUNDLED, resolve
from hcot_lmeval.embeddings import Seeding
from hcot_lmeval.engine.decoder import refuse_recurrent
from hcot_lmeval.markup import get_markup
from hcot_lmeval.templates import check_template, load_template, with_defaults
from hcot_lmeval.tokens import Added, add_special_tokens, check_markers
from hcot_lmeval.trace import Policy
from hcot_lmeval.training.config import LoraConfig, RunConfig
from hcot_lmeval.training.tiny import tiny_model, tiny_tokenizer
from hcot_lmeval.vocabulary import marker_ids, token_id

NEW_MODEL = "tiny"
"""The name under which a new, small model is made instead of loading one."""
FLEX_FROM = 2048
"""Tokens in a row from which FlexAttention beats a dense mask on CUDA (which grows with its square)."""

T = TypeVar("T")


def load_tokenizer(config: RunConfig) -> tuple[PreTrainedTokenizerBase, list[str]]:
    """Returns the tokenizer, markers and chat template included, and the tokens that it had to be given.

    It is the one that `config` names, else the model's.

    Raises:
        ValueError: there is no tokenizer, it lacks the markers and `tokens.add` is false, it lacks `tokens.eos`, a
            marker swallows blanks, or the chat template is unknown, unfit for training or does not read a template
            argument.
    """
    tokens = config.tokens
    tokenizer = _tokenizer(config)
    if tokens.eos is not None:
        if token_id(tokenizer, tokens.eos) is None:
            raise ValueError(f"tokens.eos={tokens.eos!r} is no token of the tokenizer; name the one that ends a turn")
        tokenizer.eos_token = tokens.eos
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokens.chat_template is not None:
        tokenizer.chat_template = load_template(tokens.chat_template)
    if tokens.template_arguments:
        own = tokenizer.get_chat_template() if tokenizer.chat_template else None
        tokenizer.chat_template = with_defaults(own, tokens.template_arguments)
    new = _add_tokens(config, tokenizer)
    check_markers(tokenizer, tokens.markup)
    tokenizer.clean_up_tokenization_spaces = False  # or what is read would not be what was written
    if tokenizer.chat_template:
        check_template(tokenizer, tokens.markup, prompt_alone=not tokens.strict_template)
    return tokenizer, new


def _tokenizer(config: RunConfig) -> PreTrainedTokenizerBase:
    if config.model == NEW_MODEL and config.tokenizer is None:
        return tiny_tokenizer(config.tokens.markup)
    source = config.tokenizer or config.model
    name = "tokenizer" if config.tokenizer else "model"
    return _from_checkpoint(f"the tokenizer of {name}={source!r}", config, AutoTokenizer.from_pretrained, source)


def _add_tokens(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    if not config.tokens.add:
        lacking = [text for text in get_markup(config.tokens.markup).markers if token_id(tokenizer, text) is None]
        if lacking:
            raise ValueError(
                f"tokens.add=false, and the tokenizer lacks the {config.tokens.markup} markers {', '.join(lacking)}; "
                "set tokens.add=true, another tokens.markup, or a tokenizer that has them"
            )
        return []
    return list(add_special_tokens(tokenizer, None, config.tokens.markup, _seeding(config)).tokens)


def check_model(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Looks at the configuration of the model; no weights are read.

    Raises:
        ValueError: there is no such model, its state cannot be pruned, or the tokenizer has markers that it has no rows
            for and `tokens.add` is false.
    """
    if config.model == NEW_MODEL:
        return
    found = _model_config(config).get_text_config()
    if config.evaluation.problems or config.policies != {Policy.OFF}:
        refuse_recurrent(found, f"model={config.model!r} ({found.model_type})")
    rows = getattr(found, "vocab_size", None)
    last = max(marker_ids(tokenizer, config.tokens.markup).ids)
    if not config.tokens.add and rows is not None and last >= rows:
        raise ValueError(
            f"tokens.add is false, but the tokenizer's markers go up to id {last} and model={config.model!r} has rows "
            f"for {rows} tokens alone; set tokens.add=true, or the tokenizer that belongs to the model"
        )


def end_ids(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Returns the ids that end a generation: the tokenizer's, and those of the model's generation settings."""
    also: Any = None
    if config.model != NEW_MODEL:
        try:
            also = GenerationConfig.from_pretrained(resolve(config.model), revision=config.revision)
        except OSError:  # most checkpoints have a file of them, but none is required
            also = _model_config(config).get_text_config()
    return vocabulary.end_ids(also, tokenizer)


def _model_config(config: RunConfig) -> Any:
    return _from_checkpoint(f"model={config.model!r}", config, AutoConfig.from_pretrained, config.model)


def load_model(config: RunConfig, tokenizer: PreTrainedTokenizerBase, new: Collection[str]) -> tuple[Any, Added]:
    """Returns the model, with rows for the markers, and what was added to tokenizer and model.

    Args:
        config: the settings.
        tokenizer: of `load_tokenizer`.
        new: the tokens that it was given there.

    Raises:
        ValueError: the model cannot be loaded, or the phrase of a new token cannot be used.
    """
    if config.model == NEW_MODEL:
        model: Any = tiny_model(tokenizer, config.tiny, config.seed)
    else:
        load = AutoModelForCausalLM.from_pretrained
        dtype = getattr(torch, config.dtype)
        model = _from_checkpoint(f"model={config.model!r}", config, load, config.model, dtype=dtype)
    model.set_attn_implementation(attention_of(config))
    if not config.tokens.add:
        return model, Added({}, {})
    added = add_special_tokens(tokenizer, model, config.tokens.markup, _seeding(config), new=new)
    return model, Added({text: tokenizer.convert_tokens_to_ids(text) for text in new}, added.seeding)


def _seeding(config: RunConfig) -> Seeding:
    tokens = config.tokens
    return Seeding(tokens.seeding, noise=tokens.noise, phrases=tokens.phrases, seed=config.seed)


def _from_checkpoint(what: str, config: RunConfig, load: Callable[..., T], source: str, **options: Any) -> T:
    """Calls a `from_pretrained` with the settings that all of them share, and says in one line what went wrong."""
    shared = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    try:
        return load(resolve(source), **shared, **options)
    except (OSError, ValueError) as error:
        why = " ".join(str(error).split())
        raise ValueError(
            f"{what} cannot be loaded; give the directory of a checkpoint, an id on a hub within reach, {NEW_MODEL!r} "
            f"for a new model, or a bundled one ({', '.join(BUNDLED)}). {why}"
        ) from error


def attention_of(config: RunConfig) -> str:
    """Returns the attention implementation to train with; `attention: auto` is what suits rows and device.

    Raises:
        ValueError: the implementation cannot be trained with here.
    """
    gpu = torch.accelerator.is_available() and not config.trainer.get("use_cpu")
    if config.attention == "flex_attention" and not gpu:
        raise ValueError(
            "attention=flex_attention cannot train on a CPU, where it has no gradients; use attention=auto"
        )
    if config.attention != "auto":
        return config.attention
    return "flex_attention" if gpu and torch.cuda.is_available() and config.longest_row > FLEX_FROM else "sdpa"


# --- adapters ---------------------------------------------------------------------------------------------------------


def with_adapter(config: RunConfig, model: Any, new_ids: Collection[int]) -> Any:
    """Returns the model wrapped for LoRA if `config` asks for that, else the model itself.

    Args:
        config: the settings.
        model: with its attention set and with rows for all tokens.
        new_ids: of tokens that were added; the adapter trains their rows in full.

    Raises:
        ValueError: the model has no modules of the names in `lora.target_modules`.
    """
    if config.lora is None:
        return model
    import peft

    wrapped = peft.get_peft_model(model, _lora(config.lora, model, new_ids))
    # By itself PEFT saves all rows of an embedding that has grown, beside those that it has trained.
    wrapped.save_pretrained = functools.partial(wrapped.save_pretrained, save_embedding_layers=False)
    return wrapped


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
