"""Pruned generation behind ``model.generate``, with the signature and the results of transformers.

    pruned = PrunedGeneration(tokenizer, policy="recompute", max_context=4096)
    ids = model.generate(**inputs, custom_generate=pruned, max_new_tokens=32768, do_sample=True)

What transformers has prepared by then (lengths, sampling, end tokens, padding) is followed. What the engine cannot do,
or would do otherwise, is an error that names it: nothing is passed over. transformers hands neither streamer nor
tokenizer to a method of others, so `PrunedGeneration` takes them. `generate` is all of it in one call, and what a
checkpoint with ``custom_generate/`` runs (see `hcot_lmeval.push`):

    ids = hcot_lmeval.generate(model, **inputs, tokenizer=tokenizer, max_context=4096, max_new_tokens=32768)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from transformers import (
    AutoTokenizer,
    EosTokenCriteria,
    GenerationConfig,
    MaxLengthCriteria,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    PreTrainedTokenizerBase,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation import GenerateDecoderOnlyOutput, GenerationMode
from transformers.generation.streamers import BaseStreamer

from hcot_lmeval.engine import Completion, Engine, Request, SamplingParams
from hcot_lmeval.engine.options import EngineOptions
from hcot_lmeval.notes import NoteTaker
from hcot_lmeval.trace import Step
from hcot_lmeval.vocabulary import leaves_open

TAKEN = {
    RepetitionPenaltyLogitsProcessor: ("penalty", "repetition_penalty"),
    MinLengthLogitsProcessor: ("min_length", "min_length"),
    MinNewTokensLengthLogitsProcessor: ("min_new_tokens", "min_new_tokens"),
    TemperatureLogitsWarper: ("temperature", "temperature"),
    TopKLogitsWarper: ("top_k", "top_k"),
    TopPLogitsWarper: ("top_p", "top_p"),
    MinPLogitsWarper: ("min_p", "min_p"),
    MaxLengthCriteria: ("max_length", "max_length"),
}
"""What the engine does itself, as the generation config says: class -> its attribute, and the field of the config. One
that a caller made with another value is none of them."""
BESIDE = frozenset("attention_mask position_ids token_type_ids logits_to_keep use_cache cache past_key_values".split())
"""What transformers prepares for a forward, and the engine has its own of."""
OUTPUTS = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")


@dataclass
class PrunedOutput(GenerateDecoderOnlyOutput):
    """What ``return_dict_in_generate=True`` gives.

    Attributes:
        sequences: prompts and generated tokens, those pruned later included, int64 [rows, longest], padded behind.
        completions: of each row: its live context, statistics, text and finish reason.
    """

    completions: Sequence[Completion] | None = None


class PrunedGeneration:
    """A decoding method for ``model.generate(custom_generate=...)``.

    Args:
        tokenizer: of the model.
        note_taker: gets the events of each row.
        stop_strings: end a row where they appear in its answer part.
        streamer: is told of each token as it comes, those pruned later included; for a single row.
        options: of `Engine`: policy, markup, max_context, constraints, ...

    Raises:
        TypeError: an argument is not what it should be.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        note_taker: NoteTaker | None = None,
        stop_strings: str | Iterable[str] = (),
        streamer: BaseStreamer | None = None,
        **options: Any,
    ) -> None:
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise TypeError(f"tokenizer={tokenizer!r} is no tokenizer; give what AutoTokenizer.from_pretrained returns")
        for name, value, method in (("note_taker", note_taker, "add"), ("streamer", streamer, "put")):
            if value is not None and not callable(getattr(value, method, None)):
                raise TypeError(f"{name}={value!r} has no method {method}; give a {name.replace('_', ' ')}, or none")
        self.tokenizer, self.note_taker, self.streamer = tokenizer, note_taker, streamer
        strings = (stop_strings,) if isinstance(stop_strings, str) else stop_strings or ()
        self.stop_strings = tuple(strings) if isinstance(strings, Iterable) else ()
        if not isinstance(strings, Iterable) or not all(isinstance(string, str) for string in self.stop_strings):
            raise TypeError(f"stop_strings={stop_strings!r} is neither a text nor texts")
        self._options = options
        self._engine: tuple[Any, frozenset[int], Engine] | None = None

    def __call__(
        self,
        model: Any,
        input_ids: torch.Tensor,
        logits_processor: Sequence[Any],
        stopping_criteria: Sequence[Any],
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> torch.Tensor | PrunedOutput:
        """Generates; transformers calls it.

        Raises:
            ValueError: something is asked for that the engine does not do.
        """
        if not input_ids.numel():
            raise ValueError("input_ids holds no token; give at least one prompt, of at least one token")
        check_wishes(logits_processor, stopping_criteria, generation_config, model_kwargs)
        check_caches(generation_config, getattr(model, "generation_config", None))
        mask = model_kwargs.get("attention_mask")
        mask = torch.ones_like(input_ids) if mask is None else mask
        engine = self.engine(model, end_ids(generation_config))
        least, most, known = int(input_ids.min()), int(input_ids.max()), engine.decoder.known_ids
        if least < 0 or most >= known:
            raise ValueError(f"input_ids has ids from {least} to {most}; the model knows the ids 0..{known - 1}")
        requests = [
            self._request(str(row), tuple(ids[seen.bool()].tolist()), input_ids.shape[1], generation_config, engine)
            for row, (ids, seen) in enumerate(zip(input_ids, mask, strict=True))
        ]
        done = self._generate(engine, requests)
        pad = generation_config.pad_token_id
        pad = next(iter(sorted(engine.limits.eos_ids)), 0) if pad is None else pad
        new = [torch.tensor(completion.token_ids, dtype=torch.int64) for completion in done]
        behind = torch.nn.utils.rnn.pad_sequence(new, batch_first=True, padding_value=pad).to(input_ids.device)
        sequences = torch.cat([input_ids, behind], dim=1)
        return PrunedOutput(sequences, completions=done) if generation_config.return_dict_in_generate else sequences

    def _generate(self, engine: Engine, requests: Sequence[Request]) -> list[Completion]:
        if self.streamer is None:
            return engine.generate(requests, self.note_taker)
        if len(requests) != 1:
            raise ValueError(f"a streamer is for a single row, and there are {len(requests)}; leave it out")
        streamer = self.streamer
        streamer.put(torch.tensor([requests[0].prompt_ids]))  # as transformers does

        def put(request: Request, sample: int, token: int, step: Step, live: Sequence[int]) -> None:
            streamer.put(torch.tensor([token]))

        try:
            return list(engine.stream(requests, self.note_taker, on_token=put))
        finally:
            streamer.end()

    def engine(self, model: Any, eos_ids: frozenset[int]) -> Engine:
        """Returns the engine of the last call if it serves this one, too; making one takes a self-check."""
        if self._engine is None or self._engine[0] is not model or self._engine[1] != eos_ids:
            given = {"eos_ids": sorted(eos_ids), **self._options}
            self._engine = model, eos_ids, Engine(model, self.tokenizer, **given)
        return self._engine[2]

    def _request(
        self, name: str, prompt_ids: tuple[int, ...], width: int, config: GenerationConfig, engine: Engine
    ) -> Request:
        least = max(config.min_new_tokens or 0, (config.min_length or 0) - width)
        params = SamplingParams(
            max_gen_toks=config.max_length - width,
            min_gen_toks=least,
            repetition_penalty=config.repetition_penalty or 1.0,
            stop_strings=self.stop_strings,
            **(shaping(config) if config.do_sample else {}),
        )
        thinking = leaves_open(self.tokenizer.decode(prompt_ids), engine.think)
        return Request(name, prompt_ids, params, thinking=thinking)


ENGINE_OPTIONS = frozenset(field.name for field in fields(EngineOptions))


def generate(
    model: Any,
    *inputs: Any,
    tokenizer: PreTrainedTokenizerBase | None = None,
    note_taker: NoteTaker | None = None,
    streamer: BaseStreamer | None = None,
    stop_strings: str | Iterable[str] = (),
    **arguments: Any,
) -> torch.Tensor | PrunedOutput:
    """``model.generate`` with pruning. It makes an engine at each call; `PrunedGeneration` keeps one for more calls.

    Args:
        model: of transformers.
        inputs: prompts, int64 [rows, tokens], unless they are in `arguments` as ``input_ids``.
        tokenizer: of the model; by default that of the checkpoint from which the model was loaded.
        note_taker: gets the events of each row.
        streamer: is told of each token as it comes; for a single row.
        stop_strings: end a row where they appear in its answer part.
        arguments: of ``model.generate``, and options of `Engine`.

    Raises:
        TypeError: an argument is not what it should be.
        ValueError: something is asked for that the engine does not do.
        OSError: no tokenizer is given, and none lies beside the checkpoint.
    """
    for name in ("assistant_model", "assistant_tokenizer", "prefix_allowed_tokens_fn", "negative_prompt_ids"):
        if arguments.get(name) is not None:
            raise ValueError(f"pruned generation has no {name}; leave it out")
    check_ids(inputs[0] if inputs else arguments.get("input_ids", arguments.get("inputs")))
    if tokenizer is None:
        if not getattr(model, "name_or_path", ""):
            raise ValueError("the model does not say from which checkpoint it is; pass its tokenizer=")
        tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
    options = {name: arguments.pop(name) for name in ENGINE_OPTIONS & arguments.keys()}
    pruned = PrunedGeneration(tokenizer, note_taker=note_taker, streamer=streamer, stop_strings=stop_strings, **options)
    return model.generate(*inputs, custom_generate=pruned, **arguments)


def shaping(config: GenerationConfig) -> dict[str, Any]:
    """Returns the parameters of sampling; the seed is drawn from torch's generator, so that ``manual_seed`` acts."""
    temperature = 1.0 if config.temperature is None else config.temperature
    return {
        "temperature": temperature,
        "top_k": config.top_k or 0,
        "top_p": 1.0 if config.top_p is None else config.top_p,
        "min_p": config.min_p or 0.0,
        "seed": int(torch.randint(2**62, ())),
    }


def end_ids(config: GenerationConfig) -> frozenset[int]:
    """Returns the ids that end a row."""
    found = config.eos_token_id
    return frozenset() if found is None else frozenset(torch.as_tensor(found).flatten().tolist())


def check_wishes(
    processors: Sequence[Any], criteria: Sequence[Any], config: GenerationConfig, model_kwargs: dict[str, Any]
) -> None:
    """Raises `ValueError` for what the engine does not do; the message names it."""
    strange = [type(item).__name__ for item in (*processors, *criteria) if not _is_taken(item, config)]
    strange += [name for name in OUTPUTS if getattr(config, name, None)]
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        strange.append(mode.value.replace("_", " "))
    strange += [name for name, value in model_kwargs.items() if name not in BESIDE and value is not None]
    mask, positions = model_kwargs.get("attention_mask"), model_kwargs.get("position_ids")
    if mask is not None and not bool(((mask == 0) | (mask == 1)).all()):
        strange.append("attention_mask with other values than 0 and 1")
    elif positions is not None and not _counts(positions, mask):
        strange.append("position_ids that do not count the tokens of the mask")
    cache = model_kwargs.get("cache", model_kwargs.get("past_key_values"))
    if cache is not None and cache.get_seq_length():
        strange.append("past_key_values with content")
    if strange:
        raise ValueError(
            f"pruned generation has no {', '.join(strange)}; leave it out. There are greedy search, sampling with "
            "temperature, top_k, top_p, min_p and repetition_penalty, lengths, end tokens and stop strings"
        )


def check_caches(config: GenerationConfig, own: GenerationConfig | None) -> None:
    """Raises `ValueError` for a cache that a caller asks for; what the checkpoint says of it is for other methods."""
    for name in ("cache_implementation", "prefill_chunk_size"):
        value = getattr(config, name, None)
        if value not in (None, getattr(own, name, None)):
            raise ValueError(f"pruned generation has its own cache, and no {name}={value!r}; leave it out")


def check_ids(ids: Any) -> None:
    """Raises `ValueError` for prompts that are no tensor of token ids [rows, tokens]."""
    if not isinstance(ids, torch.Tensor):
        raise ValueError(f"input_ids is {type(ids).__name__} {ids!r:.40}; give a tensor of token ids [rows, tokens]")
    if ids.ndim != 2 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(
            f"input_ids is a tensor of {ids.dtype} {list(ids.shape)}; give one of token ids, int64 [rows, tokens]"
        )


def _is_taken(item: Any, config: GenerationConfig) -> bool:
    """Whether a processor or criterion is what transformers makes of the config, which the engine follows."""
    if type(item) is EosTokenCriteria:
        return frozenset(item.eos_token_id.flatten().tolist()) == end_ids(config)
    attribute, field = TAKEN.get(type(item), ("", ""))
    return bool(field) and getattr(item, attribute) == getattr(config, field)


def _counts(positions: torch.Tensor, mask: torch.Tensor | None) -> bool:
    """Whether the positions [rows or 1, tokens] are those that each token has among the tokens that are seen."""
    if mask is None:
        return bool((positions == torch.arange(positions.shape[-1], device=positions.device)).all())
    counted = mask.long().cumsum(-1) - 1
    return bool(((positions == counted) | (mask == 0)).all())
