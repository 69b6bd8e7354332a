"""``--model hcot``: lm-eval's Hugging Face model with a decoder that prunes.

Loading, devices, quantisation, adapters, tokenizer and log-likelihoods are those of lm-eval's ``hf``, untouched.
Generation is ours wholly: every request goes to `hcot_lmeval.engine`, and comes back as a `Response`.

    lm = HcotLM(pretrained="path/to/checkpoint", batch_size="auto", pruning="recompute", max_context=4096)
    lm_eval.simple_evaluate(lm, tasks=["aime24"])

Differences to ``hf`` that a user should know:

* ``max_context`` bounds the live tokens of a request, ``max_gen_toks`` everything it generates; they do not add up.
* A prompt is never cut. One that leaves no room ends at once with finish reason ``context`` and an empty answer.
* ``until`` acts in the answer part alone, neither within the thinking section nor within a block.
* The answer is the text behind the thinking section, and empty if the thinking did not end.
* Blocks stay in the answer under every policy, for the grader to tell a thought from a solution.
* The chat template is applied to prompts if the tokenizer has one (``apply_chat_template=auto``).
* Sampling parameters that a request leaves open are those of the checkpoint's generation config, else neutral.
* lm-eval's ``--use_cache`` is refused: it tells neither models nor settings apart; the journal does.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import simple_parse_args_string
from transformers import BitsAndBytesConfig

from hcot_lmeval.embeddings import rows_of
from hcot_lmeval.engine import Completion, Engine, Request
from hcot_lmeval.engine.options import SPEED_ALONE
from hcot_lmeval.lm.checks import NO_CACHE, watch_building
from hcot_lmeval.lm.journal import Journal, Notes, Worklist, held_time
from hcot_lmeval.lm.loading import blamed, default_device, merge_arguments, prepare_cpu_ranks, settle_arguments, whole
from hcot_lmeval.lm.options import QUANTIZATION_KWARGS, plain_arguments, split_model_args
from hcot_lmeval.lm.prompts import Prompt, PromptEncoder, applied, at_time, check_switch, check_template
from hcot_lmeval.lm.reporting import ProgressBar, RunStatistics
from hcot_lmeval.lm.requests import (
    NEUTRAL,
    GenerationSettings,
    instance_name,
    repeat_indices,
    request_seed,
    warn_of_unsupported,
    warn_of_unused_limit,
)
from hcot_lmeval.markup import Markup
from hcot_lmeval.processes import leave_group_at_exit
from hcot_lmeval.provenance import code_digest, digest, installed, model_facts, tokenizer_digest, weights_digest
from hcot_lmeval.record import read_record, settle, write_record
from hcot_lmeval.response import Response
from hcot_lmeval.trace import Policy
from hcot_lmeval.vocabulary import check_rows, marker_ids, read_vocabulary, token_id

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

logger = logging.getLogger(__name__)
# within lm-eval our messages belong to its log, with its level and format; it configures its own logger alone
logging.getLogger("hcot_lmeval").parent = logging.getLogger("lm_eval")

DEFAULT_CHECKPOINT = "anujjamwal/OpenMath-Nemotron-1.5B-PruneAware"
"""The published checkpoint that was trained to write prunable traces."""

USUAL_BUDGET = 32768
"""Generated tokens that the field allows for a competition problem; lm-eval's own aime24 sets it."""


class HcotLM(HFLM):
    """A causal language model that prunes finished thoughts from its context while it generates.

    Args:
        pretrained: checkpoint directory, id on the hub, name of a bundled checkpoint (`hcot_lmeval.assets`), or a model
            in memory (then pass `tokenizer` too).
        model_args: every argument of lm-eval's ``hf`` and of `from_pretrained`, and the fields of
            `hcot_lmeval.lm.options.Options`.

    Attributes:
        options: ours among the arguments.
        policy: what a return does; as the user said, or else as the model was trained.
        markup: the notation, likewise.
        vocabulary: where thinking begins and ends, and what a text leaves out.
        think: the strings around the thinking section.

    Raises:
        ValueError: an argument is unknown or has a value that is not allowed, the tokenizer lacks the markers, or the
            model was trained for another policy.
        OSError: the checkpoint or its tokenizer cannot be loaded.
        UnsupportedModelError: at the first generation, if the model's state cannot be rewound.
    """

    chat_template_args: dict[str, Any]

    def __init__(self, pretrained: Any = DEFAULT_CHECKPOINT, **model_args: Any) -> None:
        self.options, rest = split_model_args(model_args)
        pretrained, rest = settle_arguments(pretrained, rest, self.options)
        watch_building()
        self._arguments = dict(rest)
        thinking = rest.pop("enable_thinking", None)
        if isinstance(pretrained, str):
            rest.setdefault("device", default_device())
            self.options.check_loop(str(rest["device"]).partition(":")[0])
            prepare_cpu_ranks(rest["device"])
        self._quantization = {name: rest.pop(name) for name in QUANTIZATION_KWARGS & rest.keys()}
        with blamed(pretrained, rest):
            super().__init__(pretrained=pretrained, **rest)
        self._join_ranks()
        self.policy, self.markup = self._settle()
        markers = {} if self.policy is Policy.OFF else {"markers": marker_ids(self.tokenizer, self.markup).ids}
        check_rows(rows_of(self.model), self.tokenizer, markers)
        self.vocabulary = read_vocabulary(
            self.tokenizer, self.markup, begin=self.options.think_start_token, end=self.think_end_token
        )
        self.think = self.vocabulary.think
        self._set_thinking(thinking)
        self._prompts = PromptEncoder(
            self.tokenizer,
            self.markup,
            self.think,
            chat=self.options.apply_chat_template,
            render=self._render,
            add_bos_token=self.add_bos_token,
            inert=self.options.prompt_markers == "text",
        )
        self._statistics = RunStatistics()
        self._other_ranks: list[RunStatistics] = []
        self._loaded = self._standing(quick=True) if isinstance(pretrained, str) else None
        if self._prompts.chat:
            check_template(super().apply_chat_template)

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None) -> HcotLM:
        """Makes the model from ``--model_args`` and from what lm-eval's command line says beside them.

        Raises:
            ValueError: both say the same thing, and not the same of it.
        """
        return cls(**merge_arguments(arg_dict, additional_config or {}))

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> HcotLM:
        """Does what `create_from_arg_obj` does, for arguments in one string."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    def _settle(self) -> tuple[Policy, Markup]:
        """Returns policy and notation; an adapter's record of its training takes the place of its base's."""
        of_adapter = read_record(self.peft, self.revision) if self.peft else None
        if of_adapter is not None:
            write_record(self.model, of_adapter)
        ours = self.options
        return settle(
            read_record(self.model), ours.pruning, ours.markup, allow=ours.any_policy, policy_argument="pruning"
        )

    def _get_config(self, pretrained: str, **kwargs: Any) -> None:
        """Loads the config; bitsandbytes fields become part of it, for `from_pretrained` no longer takes them."""
        super()._get_config(pretrained, **kwargs)
        if self._quantization:
            self._config.quantization_config = BitsAndBytesConfig(**self._quantization).to_dict()

    def _create_model(self, *args: Any, **kwargs: Any) -> None:
        """Loads the model and its adapter.

        Weights were tied when the base was loaded. lm-eval does it once more, behind the adapter, and transformers then
        looks in vain for an embedding that PEFT has wrapped, as it does where an adapter brings rows of new tokens.
        """
        auto = getattr(self, "AUTO_MODEL_CLASS")  # noqa: B009 - mypy finds no type for it
        self.AUTO_MODEL_CLASS = whole(auto)
        super()._create_model(*args, **kwargs)
        self.AUTO_MODEL_CLASS = auto
        if hasattr(self._model, "peft_config"):
            self._model.get_base_model().tie_weights = lambda *_, **__: None

    # --- limits -------------------------------------------------------------------------------------------------------

    @property
    def max_context(self) -> int:
        """Most live tokens of a request, prompt included."""
        return self.options.max_context or self.max_length

    @property
    def max_gen_toks(self) -> int:
        """Generated tokens of a request that names no limit.

        Without pruning ``max_context`` is the limit anyway. A pruned trace may be many times longer than its live
        context, so the default is then at least the budget that the field gives a hard problem.
        """
        if self.options.max_gen_toks is not None:
            return self.options.max_gen_toks
        pruned = self.policy is not Policy.OFF
        return max(self.max_context, USUAL_BUDGET) if pruned else self.max_context

    # --- text ---------------------------------------------------------------------------------------------------------

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Renders a chat for lm-eval and remembers that the result needs no template any more."""
        text = self._render(chat_history, add_generation_prompt)
        self._prompts.note_rendered(text)
        return text

    def _render(self, chat: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        if self._held is not None:
            self.chat_template_args = {**self.chat_template_args, "chat_template": self._held}
        return applied(super().apply_chat_template, chat, add_generation_prompt)

    @cached_property
    def _template(self) -> str:
        """The chat template, or an empty string."""
        given = self.chat_template_args.get("chat_template")
        return str(given or (self.tokenizer.get_chat_template() if self.tokenizer.chat_template else ""))

    @cached_property
    def _held(self) -> str | None:
        """A template that tells the time, at the time of this run."""
        return None if self._clock is None else at_time(self._template, self._clock)

    @cached_property
    def _clock(self) -> datetime | None:
        """What a template that tells the time reads: one moment for all prompts of a run, and for those that go on."""
        if "strftime_now" not in self._template:
            return None
        return held_time(self.options.journal, self._own_facts)

    def tok_decode(self, tokens: Any, skip_special_tokens: bool = True) -> str:
        """Decodes token ids; of the special tokens, markers and thinking tokens are never skipped."""
        if not skip_special_tokens:
            return str(self.tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False))
        ids = [tokens] if isinstance(tokens, int) else [int(i) for i in tokens]
        kept = [i for i in ids if i not in self.vocabulary.hidden_ids]
        return str(self.tokenizer.decode(kept, clean_up_tokenization_spaces=False))

    # --- generation ---------------------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generates all requests, in any order, each distinct one once.

        Returns:
            A `Response` for each request, in the order of `requests`.

        Raises:
            ValueError: a generation kwarg is unknown or has a value that is not allowed.
            KeyboardInterrupt: it was stopped; the message says what is kept.
        """
        self._check_thinking(requests)
        self._follow_weights()
        warn_of_unused_limit(self.options.max_gen_toks, requests)
        work = Worklist(self._journal)
        for instance, repeat in zip(requests, repeat_indices(requests), strict=True):
            work.add(self._request(instance, repeat))
        for response in work.resume(self._notes):
            self._statistics.add(response.stats, resumed=True)
        try:
            self._generate(work, disable=disable_tqdm or self.rank != 0)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(work.kept()) from None
        return list(work.responses())

    def _generate(self, work: Worklist, *, disable: bool) -> None:
        todo = work.open_requests()
        self._warn_of_long_prompts(todo)
        if not todo:
            return
        start = time.perf_counter()
        with ProgressBar(self.engine.live, len(work), work.finished, disable=disable) as bar:
            for completion in self.engine.stream(todo, self._notes):
                response = self._response(completion)
                work.finish(completion.request, response, completion.request.meta)
                self._statistics.add(response.stats, resumed=False)
                bar.advance()
        self._statistics.wall_seconds += time.perf_counter() - start

    def _request(self, instance: Instance, repeat: int) -> Request:
        context, kwargs = instance.args
        prompt = self._prompt(context, getattr(instance, "chat_rendered", None))
        if prompt.text != context:  # the samples file shows what the model has read
            instance.arguments, instance.chat_rendered = (prompt.text, kwargs), True
        seed = request_seed([self.seed, kwargs.get("seed")], instance, repeat)
        params = self._settings.params(kwargs, seed)
        return Request(
            id=f"{instance_name(instance)}/{repeat}",
            prompt_ids=tuple(prompt.ids),
            params=params,
            thinking=prompt.thinking,
            meta={"task": instance.task_name, "doc_id": instance.doc_id, "repeat": repeat, "seed": params.seed},
        )

    @property
    def seed(self) -> int:
        """Of all sampling: as the user said, else what lm-eval's ``--seed`` has given torch."""
        return torch.initial_seed() if self.options.seed is None else self.options.seed

    def _prompt(self, context: str, rendered: bool | None = None) -> Prompt:
        """A prompt as the model reads it; an empty one begins as in log-likelihoods."""
        prompt = self._prompts(context, rendered)
        return prompt if prompt.ids else prompt._replace(ids=[self.prefix_token_id])

    def _response(self, completion: Completion) -> Response:
        parts = self.vocabulary.split(completion.text, opened=completion.request.thinking)
        return Response(
            parts.answer,
            stats=completion.statistics.as_dict(),
            thinking=parts.thinking,
            raw=completion.text,
            finish_reason=completion.finish_reason,
        )

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Refuses lm-eval's cache of responses.

        Raises:
            ValueError: there is one.
        """
        if cache_hook.dbdict is not None:
            raise ValueError(NO_CACHE)

    def _warn_of_long_prompts(self, requests: Sequence[Request]) -> None:
        long = [len(request.prompt_ids) for request in requests if len(request.prompt_ids) >= self.max_context]
        if long:
            logger.warning(
                "%d of %d prompts leave no room in max_context=%d, so their answers will be empty; "
                "the longest has %d tokens: raise max_context well above that",
                len(long),
                len(requests),
                self.max_context,
                max(long),
            )

    # --- made on first use: a run of log-likelihoods needs none of it -------------------------------------------------

    def _follow_weights(self) -> None:
        """Other weights or defaults than before are another model: it gets another engine, journal and notes."""
        known = self.__dict__.pop("_weights", None)
        if known is not None and known[0] != self._weights[0]:
            for name in ("engine", "_own_facts", "run_facts", "_journal", "_notes", "_settings"):
                self.__dict__.pop(name, None)

    def _standing(self, *, quick: bool = False) -> str:
        """A digest of what of the model may change in memory: its weights, and how its generation config samples."""
        return digest([weights_digest(self.model, quick=quick), str(getattr(self.model, "generation_config", None))])

    @cached_property
    def _weights(self) -> tuple[str | None]:
        """A digest of what no file tells of: of a model in memory, or of one that was changed since it was loaded."""
        if self._loaded is not None and self._standing(quick=True) == self._loaded:
            return (None,)
        return (self._standing(),)

    @cached_property
    def engine(self) -> Engine:
        """The decoder, on the model that lm-eval loaded."""
        slots = self.batch_size if isinstance(self.batch_size, int) else "auto"
        return Engine(
            self.model,
            self.tokenizer,
            policy=self.policy,
            markup=self.markup,
            any_policy=self.options.any_policy,
            ablation=self.options.ablation,
            max_context=self.max_context,
            slots=slots,
            max_slots=self.max_batch_size,
            think=self.think,
            prompt_acts=self.options.prompt_markers == "acting",
            **self.options.controls,
            **self.options.computing,
        )

    @cached_property
    def run_facts(self) -> dict[str, Any]:
        """Everything that determines what a request's response is, apart from the request."""
        return {**self._own_facts, "computer": self.engine.decoder.compute_name}

    @cached_property
    def _own_facts(self) -> dict[str, Any]:
        """What of it is known without the engine."""
        ours = {"pruning": self.policy.value, "markup": self.markup.name, "max_context": self.max_context}
        if self.options.ablation:
            ours["ablation"] = str(self.options.ablation)
        return {
            **ours,
            **self.options.controls,
            "prompt_markers": self.options.prompt_markers,
            **{name: value for name, value in self.options.computing.items() if name not in SPEED_ALONE},
            "code": code_digest(graded=False),
            **installed(("torch", "transformers")),
            "model": model_facts(self.pretrained, self.revision),
            "weights": self._weights[0],
            "adapter": model_facts(self.peft, self.revision) if self.peft else None,
            "delta": model_facts(self.delta, self.revision) if self.delta else None,
            "tokenizer": tokenizer_digest(self.tokenizer),
            "dtype": str(self.model.dtype),
            "device": self.device.type,
            "think": self.think,
            "arguments": plain_arguments(self._arguments),
        }

    @cached_property
    def _journal(self) -> Journal | None:
        if self.options.journal is None:
            return None
        return Journal(self.options.journal, self.run_facts, self.rank)

    @cached_property
    def _notes(self) -> Notes | None:
        if self.options.notes is None:
            return None
        name = f"notes-{digest(self.run_facts)[:12]}-rank{self.rank}.jsonl"
        checkpoint = self.peft or self.pretrained  # its name tells a reader more than its digests
        called = {"name": Path(checkpoint).name} if isinstance(checkpoint, str) else {}
        try:
            return Notes(self.options.notes / name, self.engine.decode, called | self.run_facts)
        except OSError as error:
            raise OSError(f"notes={self.options.notes} cannot be written to: {error}") from error

    @cached_property
    def _settings(self) -> GenerationSettings:
        config = getattr(self.model, "generation_config", None)
        warn_of_unsupported(config)
        defaults = {name: getattr(config, name, None) for name in NEUTRAL}
        return GenerationSettings(self.max_gen_toks, defaults, self._stop_id)

    def _stop_id(self, text: str) -> int | None:
        """The id of a stop string that is a special token and so not part of the text."""
        found = token_id(self.tokenizer, text)
        return found if found in self.vocabulary.hidden_ids else None

    # --- thinking, ranks and reports ----------------------------------------------------------------------------------

    def _set_thinking(self, enable: bool | None) -> None:
        """``hf`` wants to be told the end of thinking; here the vocabulary may have said it."""
        self.enable_thinking = enable
        if enable is None:
            return
        check_switch(enable, self._template, self.vocabulary)
        given: dict[str, Any] = self._arguments.get("chat_template_args") or {}
        self.chat_template_args = given | {"enable_thinking": enable}

    def _check_thinking(self, requests: Sequence[Instance]) -> None:
        """A switch that the chat template reads does nothing where no template is applied."""
        templated = self._prompts.chat or any(getattr(instance, "chat_rendered", False) for instance in requests)
        if self.enable_thinking is not None and not templated and not self._prompts.rendered:
            raise ValueError(
                f"enable_thinking={self.enable_thinking} does nothing, for no chat template is applied; leave it "
                "out, or apply the template with apply_chat_template=true"
            )

    def _join_ranks(self) -> None:
        """Takes rank and world size from accelerate: ``hf`` sets them for GPUs only, and from the local rank."""
        accelerator = getattr(self, "accelerator", None)
        if accelerator is None:
            return
        self._rank = accelerator.process_index
        self._world_size = accelerator.num_processes
        self._device = accelerator.device
        leave_group_at_exit()

    def barrier(self) -> None:
        """Waits for all ranks. lm-eval does so after each kind of request, so the ranks exchange their totals here."""
        super().barrier()
        if self.world_size > 1:
            everyone = self.gather_object(self._statistics, dst=0)
            self._other_ranks = [] if everyone is None else everyone[1:]

    def get_model_info(self) -> dict[str, Any]:
        """Returns what lm-eval reports of an ``hf`` model and, under ``hcot``, the settings and totals of the run."""
        totals = self._statistics.merge(self._other_ranks).as_dict()
        settings = {
            "pruning": self.policy.value,
            "ablation": None if self.options.ablation is None else str(self.options.ablation),
            "markup": self.markup.name,
            "controls": self.options.controls,
            "prompt_markers": self.options.prompt_markers,
            "seed": self.seed,
            "chat_template": self._prompts.chat,
            "clock": None if self._clock is None else self._clock.isoformat(),
            "max_context": self.max_context,
            "max_gen_toks": self.max_gen_toks,
            "ranks": self.world_size,
            "kv_dtype": self.options.kv_dtype,
            "kv_bytes_per_token": self.engine.decoder.token_bytes if totals["requests"] else None,
            "compute": self.engine.decoder.compute_name if totals["requests"] else None,
            "weights": self.engine.decoder.weights_name if totals["requests"] else None,
        }
        return {**super().get_model_info(), "hcot": {**settings, **totals}}
