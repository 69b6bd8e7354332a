"""The engine: requests in, completions out, thoughts pruned on the way.

    engine = Engine.from_pretrained("tiny-hcot", max_context=4096)
    prompt_ids = engine.encode("c=4*7;a=b-c;b=c+c;a?")
    for completion in engine.stream([Request("1", prompt_ids, SamplingParams(max_gen_toks=32768))]):
        print(completion.text, completion.statistics)

One step forwards the waiting tokens of all rows, samples for every row that is up to date, tells the rule, and tells
the recorder. A prune is a change of length: the rule (`hcot_lmeval.trace`) says which tokens to keep, forward and drop.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hcot_lmeval.ablation import Ablation
from hcot_lmeval.assets import check_name, resolve
from hcot_lmeval.control import Controller, LoopDetector
from hcot_lmeval.engine.decoder import UnsupportedModelError
from hcot_lmeval.engine.device.loop import DeviceLoop, ScratchPool, make_loop, runs_on_device
from hcot_lmeval.engine.device.proof import TRIAL_ROWS, facts_of, prove, trials
from hcot_lmeval.engine.device.sampling import chooser_for
from hcot_lmeval.engine.device.state import Rule, on
from hcot_lmeval.engine.options import EngineOptions, check_device, read_options
from hcot_lmeval.engine.rows import Completion, Limits, OnToken, Request, Row, StopStrings
from hcot_lmeval.engine.sampling import Choice, Chooser, derive_seed, sample
from hcot_lmeval.engine.scheduler import Remaining, Scheduler
from hcot_lmeval.engine.slots import KVPool, plan_slots, release_memory
from hcot_lmeval.engine.states import make_decoder
from hcot_lmeval.grammar import Grammar
from hcot_lmeval.markup import MarkerIds
from hcot_lmeval.notes import NoteTaker
from hcot_lmeval.record import read_record, settle
from hcot_lmeval.rotary import position_limits
from hcot_lmeval.tokens import encode_prompt
from hcot_lmeval.trace import LiveContext, Policy, Step
from hcot_lmeval.vocabulary import check_rows, end_ids, marker_ids, read_vocabulary

logger = logging.getLogger(__name__)

STEP_TOKENS = {"cpu": 512, "cuda": 4096}
"""Prompt tokens forwarded in one step; more would only delay the rows that decode, and cost activation memory."""

LOGIT_BYTES = 16
"""Bytes on a GPU of each logit of a row: in float32, divided by the temperature, and the noise in float64."""

OnLogits = Callable[[Request, int, int, torch.Tensor], None]
"""Called with (request, sample, tokens generated so far, logits [vocabulary]) before each token is sampled."""


@dataclass
class Progress:
    """Running totals since the engine was made."""

    requests_done: int = 0
    generated_tokens: int = 0
    prune_events: int = 0
    live_tokens: int = 0
    """Live tokens of the rows that run now."""
    seconds: float = 0.0
    """Time spent generating."""
    kv_bytes: int = 0
    """Memory of the keys and values in the current call, or the last one."""


class Engine:
    """Generates with a Hugging Face decoder and prunes finished thoughts from its keys and values.

    Args:
        model: a causal language model of transformers, or a PEFT model around one; on any device, in any dtype.
        tokenizer: needed for markers by name, for stop strings and for text.
        options: fields of `EngineOptions`.

    Attributes:
        live: running totals.

    Raises:
        UnsupportedModelError: the model's state cannot be rewound.
        ValueError: an option is unknown or outside its range, the tokenizer lacks the markers, or the model was trained
            for another policy.
    """

    def __init__(self, model: Any, tokenizer: Any = None, **options: Any) -> None:
        self.options = read_options(options)
        self.tokenizer = tokenizer
        given, record = self.options, read_record(model)
        self.policy, self.markup = settle(record, given.policy, given.markup, allow=given.any_policy)
        self.markers = self._find_markers()
        self.think = self.markup.think if given.think == "markup" else given.think
        self._think_ids: tuple[int | None, int | None] = given.think_ids or (None, None)
        self._hidden_ids: frozenset[int] = frozenset()
        self._read_vocabulary()
        self._grammars: dict[frozenset[int], Grammar] = {}
        self.ablation = self._find_ablation()
        self._check_controls()
        self.decoder = make_decoder(model, check=given.self_check, rows=self._most_rows, **given.computing)
        if reason := self.decoder.refuses(self.policy.value):
            raise UnsupportedModelError(reason)
        given.check_loop(self.decoder.device.type)
        self._check_vocabulary()
        self.limits = self._find_limits()
        self.live = Progress()
        self._taken = 0  # bytes of a GPU that running takes beside keys, values and logits
        self._form: tuple[EngineOptions | None] | None = None
        self._chooser(self.decoder.logits_dtype, self.decoder.device)  # compiled now, not within the first generation

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        *,
        device: str = "cpu",
        dtype: str | torch.dtype = "auto",
        revision: str | None = None,
        trust_remote_code: bool = False,
        **options: Any,
    ) -> Engine:
        """Loads a model and its tokenizer.

        Args:
            name: directory, id on the hub, or name of a bundled checkpoint.
            device: where the model computes, such as ``cuda`` or ``cuda:1``.
            dtype: of the weights; ``auto`` is the checkpoint's.
            revision: of the checkpoint on the hub.
            trust_remote_code: run code that comes with the checkpoint.
            options: see `EngineOptions`.

        Raises:
            OSError: there is no such checkpoint.
            ValueError: the dtype is unknown, the device is not there, or a revision is asked of a directory.
        """
        check_name(name)
        check_device(device)
        if isinstance(dtype, str) and dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise ValueError(f"dtype={dtype!r} is not one of auto, float32, float16, bfloat16, float64")
        place = resolve(name)
        if revision is not None and Path(place).is_dir():
            raise ValueError(f"revision={revision!r} is of checkpoints on a hub, and {place} is here; leave it out")
        loading = {"revision": revision, "trust_remote_code": trust_remote_code}
        model = AutoModelForCausalLM.from_pretrained(place, dtype=dtype, **loading).to(device)
        return cls(model, AutoTokenizer.from_pretrained(place, **loading), **options)

    # --- what users call ----------------------------------------------------------------------------------------------

    def generate(self, requests: Iterable[Request], notes: NoteTaker | None = None) -> list[Completion]:
        """Generates all requests; the completions come in the order of requests, the samples of a request together."""
        requests = [requests] if isinstance(requests, Request) else list(requests)
        done: dict[tuple[int, int], list[Completion]] = {}
        for completion in self.stream(requests, notes):
            done.setdefault((id(completion.request), completion.sample), []).append(completion)
        return [done[id(request), k].pop() for request in requests for k in range(request.params.n)]

    def stream(
        self,
        requests: Iterable[Request],
        notes: NoteTaker | None = None,
        on_logits: OnLogits | None = None,
        on_token: OnToken | None = None,
    ) -> Iterator[Completion]:
        """Generates the requests and yields each sample as it finishes.

        Args:
            requests: in any order; results do not depend on it.
            notes: gets the events of each finished sample.
            on_logits: sees the logits before each token.
            on_token: sees each token as it comes, and the context that it leaves.

        Raises:
            MemoryError: not even one row fits into memory.
            ValueError: a request has token ids that the model does not know, or no budget beyond `force_answer`.
        """
        if isinstance(requests, Request):
            raise TypeError(f"requests is the request {requests.id!r}; give a list of requests, such as [request]")
        requests = list(requests)
        if not requests:
            return
        self._check_requests(requests)
        self.decoder.refresh()
        form: EngineOptions | None = None
        if runs_on_device(self.decoder, self.options, requests, watched=on_logits is not None):
            form = self.device_form()
        for completion in self._run(requests, form, self._most_rows, on_logits, on_token):
            if notes is not None:
                notes.add(completion.note)
            yield completion

    def device_form(self) -> EngineOptions | None:
        """Returns how the device's loop is run: as was asked for, or the next simpler way that is right.

        None stands for the host's loop. What was found is remembered (`hcot_lmeval.engine.device.proof`).

        Raises:
            UnsupportedModelError: the device's loop was asked for and no way to run it is right.
        """
        if not self.options.self_check:
            return self.options
        if self._form is None:
            facts = facts_of(self.decoder, self.policy, self.markers)
            with on(self.decoder.device):  # whose memory is measured
                found, self._taken = prove(self.options, self.trials(), self.try_form, facts)
            if found is None and self.options.loop == "device":
                raise UnsupportedModelError(
                    f"loop='device' is wrong for {self.decoder.name} on this machine in every way to run it; leave it "
                    "out, and send what `hcot doctor --out FILE` writes to the issues of hcot_lmeval"
                )
            self._form = (found,)
        return self._form[0]

    def trials(self) -> list[Request]:
        """Returns the requests by which a way to decode is tried (`hcot_lmeval.engine.device.proof`)."""
        taken = set().union(self.limits.eos_ids, self.markers.ids if self.markers else (), self._hidden_ids)
        return trials(self.markers, [i for i in range(min(2000, self.decoder.known_ids)) if i not in taken])

    def try_form(self, form: EngineOptions | None, on_logits: OnLogits) -> list[Completion]:
        """Runs the trials by the device's loop, or by the host's."""
        before, self.live = self.live, Progress()
        try:
            return list(self._run(self.trials(), form, TRIAL_ROWS, on_logits))
        finally:
            self.live = before

    def _run(
        self,
        requests: Sequence[Request],
        form: EngineOptions | None,
        rows: int,
        on_logits: OnLogits | None = None,
        on_token: OnToken | None = None,
    ) -> Iterator[Completion]:
        """Yields the completions, by the device's loop or by the host's.

        Where memory runs out, half as many rows go on, and those that were cut start again. Their noise depends on
        seed and number of tokens alone, so they write the same.
        """
        samples = Remaining(requests, on_token)
        while samples.left:
            scheduler = None
            try:
                kind = ScratchPool if form else self.decoder.pool_kind
                scheduler = self._schedule(samples.left, kind, rows, samples.tell if on_token else None)
                rows = scheduler.pool.slots
                loop = self._device_loop(requests, scheduler, form, on_logits) if form else None
                while scheduler.has_work:
                    for row in self._run_until_finished(scheduler, on_logits, loop):
                        samples.finish(row)
                        yield row.completion(self.decode)
            except torch.OutOfMemoryError as error:
                if rows == 1:
                    raise MemoryError(
                        f"memory ran out with a single row ({' '.join(str(error).split())[:200]}); lower max_context "
                        "or step_tokens, or choose a smaller dtype or kv_dtype"
                    ) from error
                for row in scheduler.rows if scheduler else ():
                    self.live.generated_tokens -= len(row.generated)
                    self.live.prune_events -= row.prunes
                rows //= 2
                logger.warning("memory ran out; %d rows go on side by side, those that were cut start again", rows)
            if samples.restart():
                scheduler = loop = None
                release_memory(self.decoder.device)

    def encode(self, prompt: str) -> tuple[int, ...]:
        """Returns the token ids of a prompt, chat template applied; text in it that spells a marker stays text."""
        return tuple(encode_prompt(self.tokenizer, prompt, self.markup))

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of token ids; markers and thinking tokens stay, other special tokens are left out."""
        if self.tokenizer is None:
            return ""
        kept = [i for i in ids if i not in self._hidden_ids]
        # as the stop strings see it: cleaned up, `x != y` would be `x!= y` here alone
        return str(self.tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    # --- one step -----------------------------------------------------------------------------------------------------

    def _run_until_finished(
        self, scheduler: Scheduler, on_logits: OnLogits | None, loop: DeviceLoop | None
    ) -> list[Row]:
        """Steps until at least one row has finished. The model's own attention is back when this returns."""
        start = time.perf_counter()
        finished: list[Row] = []
        with self.decoder.attached() if loop is None else loop.program.attached():
            while scheduler.has_work and not finished:
                scheduler.admit()
                finished = scheduler.retire()  # rows that had no room for their prompt
                if not finished:
                    if loop is None:
                        self._step(scheduler, on_logits)
                    else:
                        loop.step()
                    finished = scheduler.retire()
                    self.live.live_tokens = sum(len(row.context.live) for row in scheduler.rows)
            self.live.seconds += time.perf_counter() - start
            self.live.requests_done += len(finished)
        return finished

    @torch.inference_mode()
    def _step(self, scheduler: Scheduler, on_logits: OnLogits | None) -> None:
        planned = scheduler.plan()
        logits = self.decoder.forward(scheduler.pool, [chunk for _, chunk in planned])
        for row, chunk in planned:
            if spans := row.forwarded(len(chunk.ids)):
                scheduler.pool.drop(row.slot, spans, chunk.stop)
        ready = [(i, row) for i, (row, _) in enumerate(planned) if row.needs_token]
        if ready:
            everyone = len(ready) == len(planned)  # as nearly always; a copy of the logits would take its time
            chosen = logits if everyone else logits[[i for i, _ in ready]]
            self._sample([row for _, row in ready], chosen, on_logits)

    def _sample(self, rows: Sequence[Row], logits: torch.Tensor, on_logits: OnLogits | None) -> None:
        if on_logits is not None:
            for row, scores in zip(rows, logits, strict=True):
                on_logits(row.request, row.sample, len(row.generated), scores)
        # no token of NaN would mean anything; whoever switched the check off wants to measure such a model
        begun = [i for i, row in enumerate(rows) if not row.generated and self.options.self_check]
        if begun and bool(logits[begun].isnan().any()):
            raise UnsupportedModelError(
                f"{self.decoder.name} gives logits that are NaN; its weights have changed for it"
            )
        draws = [row.draw() for row in rows]
        for row, choice in zip(rows, sample(logits, draws, self._chooser(logits.dtype, logits.device)), strict=True):
            self._accept(row, choice)

    def _chooser(self, dtype: torch.dtype, device: torch.device) -> Chooser | None:
        return None if self.options.compute == "torch" else chooser_for(dtype, device)

    def _accept(self, row: Row, choice: Choice) -> Step | None:
        step = row.accept(choice)
        self.live.generated_tokens += step is not None
        self.live.prune_events += step is not None and step.is_prune
        return step

    # --- setting up ---------------------------------------------------------------------------------------------------

    def _schedule(
        self, pairs: Sequence[tuple[Request, int]], kind: Callable[..., KVPool], rows: int, on_token: OnToken | None
    ) -> Scheduler:
        pool, share = self._make_pool(pairs, kind, rows), not self.options.prompt_acts
        most = self.options.step_tokens or STEP_TOKENS.get(self.decoder.device.type, STEP_TOKENS["cuda"])
        make_row = partial(self._make_row, on_token=on_token)
        return Scheduler(pairs, pool, make_row, step_tokens=most, share=share)

    def _device_loop(
        self, requests: Sequence[Request], scheduler: Scheduler, form: EngineOptions, on_logits: OnLogits | None
    ) -> DeviceLoop:
        rule = Rule(self.policy, self.markers, self.limits.context, self.limits.position)
        eos = len(self.limits.eos_ids)
        return make_loop(self.decoder, form, rule, scheduler, requests, self._accept, eos=eos, on_logits=on_logits)

    def _make_pool(self, pairs: Sequence[tuple[Request, int]], kind: Callable[..., KVPool], rows: int) -> KVPool:
        longest = max(len(r.prompt_ids) + r.params.max_gen_toks for r, _ in pairs)
        length = min(self.limits.context, longest)
        useful = min(rows, len(pairs))
        logits = self.decoder.vocabulary * LOGIT_BYTES if self.decoder.device.type == "cuda" else 0
        beside = {self.decoder.device: (self._taken, logits + self.decoder.state_bytes)}
        slots = plan_slots(self.decoder.layers, length, useful, beside)
        if slots < useful and self.options.slots != "auto":
            logger.warning("memory holds %d rows of %d live tokens at a time, not %d", slots, length, useful)
        options = {"poison": self.options.poison, "huge_pages": self.options.huge_pages}
        pool = kind(self.decoder.layers, slots, length, **options)
        self.decoder.mark(pool, self.markers)
        self.live.kv_bytes = pool.bytes + slots * self.decoder.state_bytes
        logger.info("%d slots of %d live tokens take %.0f MiB", slots, length, self.live.kv_bytes / 2**20)
        return pool

    @property
    def _most_rows(self) -> int:
        return self.options.max_slots if self.options.slots == "auto" else self.options.slots

    def _make_row(self, request: Request, number: int, slot: int, *, on_token: OnToken | None) -> Row:
        stops = None
        if request.params.stop_strings:
            if self.tokenizer is None:
                raise ValueError("stop_strings need a tokenizer; pass one to Engine, or use stop_ids")
            stops = StopStrings(request.params.stop_strings, self.decode, self.think, request.thinking)
        row = Row(
            request,
            number,
            slot,
            self._context(request, number),
            self.limits,
            stops=stops,
            controller=self._controller(request),
            loops=None if self.options.loop_tokens is None else LoopDetector(self.options.loop_tokens),
            on_token=on_token,
        )
        row.load_prompt(acts=self.options.prompt_acts)
        return row

    def _context(self, request: Request, number: int) -> LiveContext:
        if self.ablation is None:
            return LiveContext(self.markers, self.policy)
        seed, end = derive_seed(request.params.seed, number), self._think_ids[1]
        prompt_len = len(request.prompt_ids)
        return self.ablation.context(self.markers, self.policy, prompt_len=prompt_len, think_end=end, seed=seed)

    def _controller(self, request: Request) -> Controller | None:
        """What follows the trace by the grammar, whether it changes anything or only counts."""
        if self.markers is None:
            return None
        ends = self.limits.eos_ids.union(request.params.stop_ids)
        grammar = self._grammars.setdefault(ends, Grammar(self.markers, self._think_ids, ends))
        prunes = self.policy is not Policy.OFF
        return Controller(self.options, grammar, thinking=request.thinking, prunes=prunes)

    def _check_controls(self) -> None:
        """What cannot be done is refused here, not at the first request."""
        if self.options.steers and self.markers is None:
            asked = ", ".join(f"{name}={value}" for name, value in self.options.controls.items())
            raise ValueError(f"{asked} needs the markers, which the tokenizer lacks; leave it out, or add the markers")
        if self.options.force_answer and self.think not in (None, self.markup.think) and self._think_ids[1] is None:
            raise ValueError(
                f"force_answer={self.options.force_answer} has to write {self.think[1]!r}, which is not a single token "
                "of the vocabulary; leave it out, or name another end of thinking"
            )

    def _check_vocabulary(self) -> None:
        """The embedding has a row for every token that a prompt may have; the markers come out of the head, too."""
        named: dict[str, Collection[int]] = {} if self.markers is None else {"markers": self.markers.ids}
        named["thinking tokens"] = {i for i in self._think_ids if i is not None}
        named["eos_ids"] = set(self.options.eos_ids or ())
        check_rows(self.decoder.known_ids, self.tokenizer, named)

    def _check_requests(self, requests: Sequence[Request]) -> None:
        known, reserve = self.decoder.known_ids, self.options.force_answer or 0
        self.options.check_room(self.limits.context)
        for request in requests:
            params = request.params
            given = {"prompt_ids": request.prompt_ids, "forced_ids": request.forced_ids, "stop_ids": params.stop_ids}
            for name, ids in given.items():
                if ids and not (min(ids) >= 0 and max(ids) < known):
                    wrong = min(ids) if min(ids) < 0 else max(ids)
                    raise ValueError(
                        f"request {request.id!r}: {name} has the id {wrong}; the model knows the ids 0..{known - 1}. "
                        "Take those of the model's own tokenizer"
                    )
            if reserve >= params.max_gen_toks:
                raise ValueError(
                    f"request {request.id!r}: force_answer={reserve} keeps all of max_gen_toks={params.max_gen_toks} "
                    "for the answer; lower it, or raise max_gen_toks"
                )

    def _find_markers(self) -> MarkerIds | None:
        if self.options.markers is not None:
            return self.options.markers
        if self.tokenizer is not None:
            try:
                return marker_ids(self.tokenizer, self.markup)
            except ValueError:
                if self.policy is not Policy.OFF:
                    raise
        elif self.policy is not Policy.OFF:
            raise ValueError(f"policy {self.policy.value!r} needs a tokenizer or marker ids; pass tokenizer or markers")
        return None

    def _find_ablation(self) -> Ablation | None:
        given = self.options.ablation
        ablation = Ablation.parse(given) if isinstance(given, str) else given
        if ablation is not None:  # so that what cannot be done is refused here, not at the first request
            ablation.context(self.markers, self.policy, prompt_len=0, think_end=self._think_ids[1], seed=0)
        return ablation

    def _read_vocabulary(self) -> None:
        """What thinking is in it, and what `decode` leaves out."""
        if self.tokenizer is None:
            return
        given = self.options
        found = read_vocabulary(self.tokenizer, self.markup, think=None if given.think == "markup" else given.think)
        self._hidden_ids = found.hidden_ids
        if self.think is not None:
            self.think, self._think_ids = found.think, given.think_ids or found.think_ids

    def _find_limits(self) -> Limits:
        given, model = self.options, self.decoder.model
        limits = position_limits(
            model, self.decoder.name, given.max_context, given.max_position, evict=self.policy is Policy.EVICT
        )
        config = getattr(model, "generation_config", None)
        found = end_ids(config, self.tokenizer) if given.eos_ids is None else given.eos_ids
        return Limits(*limits, frozenset(i for i in found if 0 <= i < self.decoder.known_ids))
