"""The model arguments of ``--model hcot``: ours as one record, the rest checked before it is passed on.

lm-eval's ``hf`` hands what it does not know to the model's constructor. Here an unknown argument is an error that names
the nearest known one, before any weights are downloaded.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from hcot_lmeval.ablation import Ablation
from hcot_lmeval.control import CONTROLS, ControlOptions
from hcot_lmeval.engine.options import ComputeOptions
from hcot_lmeval.errors import FLAG, Allowed, check_values, did_you_mean, one_of, whole_number
from hcot_lmeval.lm.journal import default_root
from hcot_lmeval.markup import get_markup
from hcot_lmeval.trace import Policy

LOADING_KWARGS = frozenset(
    """adapter_kwargs allow_all_kernels attn_implementation code_revision device_map experts_implementation
    generation_config kernel_config key_mapping low_cpu_mem_usage max_memory offload_buffers proxies torch_dtype
    use_kernels variant""".split()
)
"""What `PreTrainedModel.from_pretrained` takes beyond the names in its signature (as read in transformers 5)."""

QUANTIZATION_KWARGS = frozenset(
    """load_in_4bit load_in_8bit llm_int8_threshold llm_int8_skip_modules llm_int8_enable_fp32_cpu_offload
    llm_int8_has_fp16_weight bnb_4bit_compute_dtype bnb_4bit_quant_type bnb_4bit_use_double_quant
    bnb_4bit_quant_storage""".split()
)
"""Fields of `transformers.BitsAndBytesConfig`, which users give one by one and `from_pretrained` no longer takes so."""

REFUSED = {
    "mixed_precision_dtype": "keys and values are kept in the type of the weights; load those in the type with dtype=",
    "tp_plan": "tensor parallelism splits the heads that the KV pool holds together; use parallelize=True",
    "truncation": "prompts are never cut; raise max_context, or shorten the prompt",
    **dict.fromkeys(
        ("bos_token_id", "eos_token_id", "pad_token_id"),
        "the checkpoint's tokenizer and generation config name these ids; change them there, or end responses at a "
        "text with --gen_kwargs until=TEXT",
    ),
}
"""Arguments of lm-eval's ``hf`` that have no meaning here, and what to do instead."""

FLAGS = frozenset(
    """add_bos_token force_download load_in_4bit load_in_8bit local_files_only logits_cache low_cpu_mem_usage
    parallelize trust_remote_code use_fast_tokenizer use_safetensors""".split()
)
"""Arguments of ``hf`` and of `from_pretrained` that are true or false."""

IRRELEVANT = frozenset(
    """batch_size cache_dir device force_download local_files_only logits_cache low_cpu_mem_usage max_batch_size
    max_cpu_memory max_memory max_memory_per_gpu offload_buffers offload_folder parallelize peft proxies softmax_dtype
    token tokenizer use_safetensors""".split()
)
"""Arguments of lm-eval's ``hf`` that do not change what is generated, are told apart by content, or are secret."""


@dataclass(frozen=True)
class Options(ControlOptions, ComputeOptions):
    """What ``hcot`` takes beyond lm-eval's ``hf``.

    What it does beside the model's wish is in `ControlOptions`, how it computes in `ComputeOptions`.

    Attributes:
        pruning: ``off``, ``recompute`` or ``evict``: what the closing marker of a block does; None: what the model was
            trained for, and ``recompute`` if it does not say.
        markup: the notation of the model, a key of `hcot_lmeval.markup.PRESETS`; None: that of its training, and
            ``hcot`` if it does not say.
        any_policy: run a model under another policy or notation than it was trained for.
        ablation: throw away something else than the rule does; see `hcot_lmeval.ablation`.
        max_context: most live tokens of a request, prompt included; None for the model's maximum length.
        max_gen_toks: generated tokens, pruned ones included, of a request that does not name its own limit.
        notes: directory for one JSONL file of notes per rank, or None.
        journal: directory of the journals of finished requests, or None for no journal.
        apply_chat_template: True, False, or None (``auto``): whether the prompt becomes a user message, which it does
            under ``auto`` if the tokenizer has a template and lm-eval did not apply it already.
        think_start_token: the string that begins the thinking, where ``think_end_token`` names an end that is not
            known.
        seed: of all sampling; a request's own seed is derived from it. None: what lm-eval's ``--seed`` gives torch.
        prompt_markers: what becomes of text in a prompt that spells a marker. ``text``: it stays text, so that no
            problem and no few-shot example can act. ``tokens``: it becomes the control token, as in the traces of
            few-shot examples that are given on purpose, and opens and closes nothing. ``acting``: it does that too, so
            that the blocks of few-shot traces are pruned as the model's own.
    """

    pruning: Policy | None = None
    markup: str | None = None
    any_policy: bool = False
    ablation: Ablation | None = None
    max_context: int | None = None
    max_gen_toks: int | None = None
    notes: Path | None = None
    journal: Path | None = None
    apply_chat_template: bool | None = None
    think_start_token: str | None = None
    seed: int | None = None
    prompt_markers: str = "text"

    def __post_init__(self) -> None:
        ControlOptions.__post_init__(self)
        ComputeOptions.__post_init__(self)
        check_values(self, OPTIONS)
        self.check_room(self.max_context)

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Options:
        """Reads the options from model arguments as lm-eval parses them (strings, numbers, booleans, None).

        Raises:
            ValueError: a value is not allowed; the message says which are.
        """
        off = {name for name, value in values.items() if name in CONTROLS and (value is False or value == "off")}
        read = {name: value for name, value in values.items() if value is not None and name not in off}
        if (pruning := read.get("pruning")) is not None:  # YAML reads a bare `off` as false
            read["pruning"] = Policy.OFF if pruning is False else pruning
        if "markup" in read:
            read["markup"] = get_markup(str(read["markup"])).name
        if "ablation" in read:
            read["ablation"] = Ablation.parse(str(read["ablation"]))
        for name in ("max_context", "max_gen_toks", "seed"):  # lm-eval reads a negative number as a float
            if isinstance(value := read.get(name), float) and value.is_integer():
                read[name] = int(value)
        for name, value in {"notes": values.get("notes"), "journal": values.get("journal", default_root())}.items():
            read[name] = _directory(name, value)
        read["apply_chat_template"] = _switch("apply_chat_template", read.get("apply_chat_template", "auto"))
        options = cls(**read)
        return options if options.pruning is None else replace(options, pruning=Policy(options.pruning))


OPTIONS: dict[str, Allowed] = {
    "pruning": one_of(*Policy, None),
    "any_policy": FLAG,
    **dict.fromkeys(("max_context", "max_gen_toks"), whole_number(1, optional=True)),
    "think_start_token": (lambda value: value is None or (isinstance(value, str) and value != ""), "give a text"),
    "seed": (lambda value: value is None or type(value) is int, "give a whole number"),
    "prompt_markers": one_of("text", "tokens", "acting"),
}
"""Fields of `Options`, and what is allowed of each."""
OPTION_NAMES = frozenset(field.name for field in fields(Options))


def split_model_args(args: Mapping[str, Any]) -> tuple[Options, dict[str, Any]]:
    """Splits model arguments into our options and those of lm-eval's ``hf``.

    Raises:
        ValueError: an option's value is not allowed, or an argument of ``hf`` has no meaning here.
    """
    options = Options.parse({name: value for name, value in args.items() if name in OPTION_NAMES})
    rest = {name: value for name, value in args.items() if name not in OPTION_NAMES}
    for name, advice in REFUSED.items():
        if rest.get(name) is not None and rest[name] is not False:
            raise ValueError(f"{name}={rest[name]!r} is not supported by hcot: {advice}")
    _check_pairs(args)
    for name in FLAGS & rest.keys():
        if isinstance(rest[name], str):  # any text would count as true
            _flag(name, rest[name])
    _check_batch_size(rest.get("batch_size", 1))
    if rest.get("enable_thinking") is not None:
        _flag("enable_thinking", rest["enable_thinking"])
    if rest.get("backend", "default") == "seq2seq":
        raise ValueError("backend='seq2seq' is not supported by hcot, which decodes causal models; leave it out")
    return options, rest


def _check_pairs(args: Mapping[str, Any]) -> None:
    """Raises `ValueError` for an argument that does nothing beside another one, or without it."""
    given = {name: value for name, value in args.items() if value is not None}
    for one, other in (("max_length", "max_context"), ("torch_dtype", "dtype")):
        if one in given and other in given and str(given[one]) != str(given[other]):
            raise ValueError(f"{one}={given[one]!r} does nothing beside {other}={given[other]!r}; leave out one")
    if "closing_tokens" in given and given.get("force_answer") in (None, False, "off"):
        told = f"closing_tokens={given['closing_tokens']} does nothing without force_answer=TOKENS"
        raise ValueError(f"{told}; add it, or leave it out")
    template = given.get("chat_template_args", {})
    if not isinstance(template, Mapping):
        raise ValueError(
            f"chat_template_args={template!r} names no arguments; give a mapping, such as {{'enable_thinking': False}}"
        )


def _check_batch_size(value: Any) -> None:
    """lm-eval takes a number or ``auto``, for its log-likelihoods also ``auto:N``."""
    rows = int(value) if str(value).isdecimal() else None
    if rows == 0 or (rows is None and str(value).partition(":")[0] != "auto"):
        raise ValueError(f"batch_size={value!r} is neither a number of rows, 1 or more, nor 'auto'")


def known_names() -> frozenset[str]:
    """Returns every argument that means something: ours, those of ``hf`` and those of `from_pretrained`."""
    from lm_eval.models.huggingface import HFLM
    from transformers import PreTrainedModel

    names = {*OPTION_NAMES, *LOADING_KWARGS, *QUANTIZATION_KWARGS}
    for function in (HFLM.__init__, PreTrainedModel.from_pretrained):
        names.update(_named_parameters(function))
    return frozenset(names - {"self", "pretrained_model_name_or_path"})


def unknown_argument(name: str, known: Iterable[str]) -> ValueError:
    """Returns the error for a model argument that nobody knows, naming the nearest known one."""
    near = did_you_mean(name, known)
    if name in ("slots", "max_slots"):
        near = f"; here that is --{name.replace('slots', 'batch_size')}."
    return ValueError(
        f"model_args: {name!r} is unknown{near or '.'} Allowed are {', '.join(sorted(OPTION_NAMES))}, the arguments of "
        "lm-eval's hf model, those of from_pretrained, and the fields of the model's configuration."
    )


def plain_arguments(arguments: Mapping[str, Any]) -> dict[str, str]:
    """Returns the arguments of ``hf`` that change results, as text."""
    return {name: str(value) for name, value in sorted(arguments.items()) if name not in IRRELEVANT}


def _named_parameters(function: Any) -> list[str]:
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [p.name for p in inspect.signature(function).parameters.values() if p.kind in kinds]


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r} is not one of true, false")
    return value


def _switch(name: str, value: Any) -> bool | None:
    allowed = {"auto": None, "true": True, "false": False}
    key = str(value).lower()
    if key not in allowed:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(allowed)}")
    return allowed[key]


def _directory(name: str, value: Any) -> Path | None:
    if value is None or value is False or value == "off":
        return None
    if isinstance(value, bool) or not isinstance(value, (str, int, os.PathLike)) or not str(value):
        raise ValueError(f"{name}={value!r} is neither a directory nor 'off'")
    path = Path(str(value)).expanduser()  # lm-eval reads a directory called 2024 as a number
    if path.exists() and not path.is_dir():
        raise ValueError(f"{name}={value} is a file; name a directory or 'off'")
    return path
