"""A Hugging Face decoder, run on slots: what it must be, and the proof at load time that it is."""

from __future__ import annotations

import inspect
import itertools
import logging
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hcot_lmeval.embeddings import rows_of
from hcot_lmeval.engine.attention import (
    IMPLEMENTATION,
    RUNNING,
    LayerCall,
    Packed,
    Running,
    Segments,
    attend_segments,
    attention,
)
from hcot_lmeval.engine.native.step import UNAVAILABLE, NativeStep, refusal
from hcot_lmeval.engine.native.weights import UnreadableModelError
from hcot_lmeval.engine.options import ComputeOptions
from hcot_lmeval.engine.slots import KV_DTYPES, Chunk, KVPool, LayerSpec, upload
from hcot_lmeval.markup import MarkerIds
from hcot_lmeval.rotary import rotary_limit

logger = logging.getLogger(__name__)

REWINDABLE_LAYERS = frozenset({"full_attention", "sliding_attention", "attention"})
"""Entries of `config.layer_types` whose state is keys and values alone, so that it can be cut anywhere."""

CHECK_CHUNKS = (11, 1, 6, 1, 1, 4)
"""Tokens a step of a row in the self-check: chunks and single tokens, 24 in all. The first grows past short windows."""
BESIDE = (3, 1, 2)
"""Tokens a step of a short row beside it."""
KEPT, AGAIN = 6, (5, 1)
"""Tokens of the first row that stay when it is pruned, and those that are read again behind them."""
LONGEST_CHECK = 280
"""Tokens of the self-check at most. Longer windows are those of the mask (`Probe`), and not run."""

CHECK_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float8_e4m3fn: 0.3}
"""Largest logit difference allowed in the self-check, relative to the largest logit; other coarse types get 5e-2."""


_LOCKS: weakref.WeakKeyDictionary[Any, threading.RLock] = weakref.WeakKeyDictionary()
_NEW_LOCK = threading.Lock()
_STEPPED: weakref.WeakSet[Any] = weakref.WeakSet()
"""The models that step now."""


def _lock_of(model: Any) -> threading.RLock:
    """One for each model, whatever engines run it: while one steps, the model's attention is ours."""
    with _NEW_LOCK:
        return _LOCKS.setdefault(model, threading.RLock())


class UnsupportedModelError(ValueError):
    """The model cannot be decoded with pruning; the message says which part of it stands in the way."""


class Decoder:
    """Forwards packed chunks of several rows through a causal language model.

    Args:
        model: a `transformers` causal language model, or a PEFT model around one.
        check: run the self-check.
        rows: that run at the same time at most.
        refuse: layers that keep a state, by name; `hcot_lmeval.engine.states.RowDecoder` does not.
        options: fields of `ComputeOptions`; those of the device's loop do not matter here.

    Attributes:
        layers: layer index to what the layer computes and stores.
        windows: layer index to the sliding window through which the layer sees, None for none.
        vocabulary: length of the logits.
        known_ids: token ids below it have a row in the embedding, and logits.
        native: the compiled step, or None where PyTorch computes.
        running: what the layers carry while the decoder is attached.

    Raises:
        UnsupportedModelError: the model keeps recurrent or convolutional state, does not use the attention registry,
            computes something else on slots than in a plain forward, or cannot have the compute that was asked for.
    """

    pool_kind: Callable[..., Any] = KVPool
    """What holds the rows."""
    state_bytes = 0
    """Bytes that a row takes whatever its length."""

    def __init__(self, model: Any, *, check: bool = True, rows: int = 1, refuse: bool = True, **options: Any) -> None:
        self.model: PreTrainedModel = _unwrap(model)
        self.config = self.model.config.get_text_config()
        self.name = f"{type(self.model).__name__} ({self.config.model_type})"
        if refuse:
            refuse_recurrent(self.config, self.name)
        self.options, self._rows = ComputeOptions(**options), rows
        self._selects = "logits_to_keep" in inspect.signature(self.model.forward).parameters
        self._lock, self.running = _lock_of(self.model), Running()
        self._prepare()
        if check:
            self._check()

    def refuses(self, policy: str) -> str:
        """Why a policy is not exact for the model; empty if it is."""
        return ""

    def mark(self, pool: Any, markers: MarkerIds | None) -> None:
        """Tells the pool what opens a block; keys and values can be cut anywhere, and need not know."""

    def _prepare(self) -> None:
        """Looks at the model in the type in which it is now, which its slots and the compiled step have to follow."""
        self._dtype, self.native = self.model.dtype, None
        stored = KV_DTYPES.get(self.options.kv_dtype)
        self.layers = {index: layer._replace(stored=stored) for index, layer in self._probe().items()}
        self.windows = {index: layer.window for index, layer in self.layers.items()}
        self.known_ids = min(self.vocabulary, rows_of(self.model))
        self.native = self._compiled()

    @property
    def device(self) -> torch.device:
        """The device of the input embedding, to which token ids go."""
        return self.model.get_input_embeddings().weight.device

    def _compiled(self) -> NativeStep | None:
        """The compiled step, or None where PyTorch computes, which the log explains."""
        options = self.options
        if options.compute == "torch":
            return None
        try:
            if options.compute == "auto" and self.model.dtype == torch.float64:
                raise UnreadableModelError("double precision is for comparisons with the model's own modules")
            how: dict[str, Any] = {"weights": options.weights, "huge_pages": options.huge_pages}
            step = NativeStep(self.model, self.layers[0].kv_dtype, rows=self._rows, **how)
        except UNAVAILABLE as error:
            self._leave_to_torch(error)
            return None
        logger.info("%s: compiled steps, %d threads", self.name, torch.get_num_threads())
        return step

    def _leave_to_torch(self, error: Exception) -> None:
        """Says why PyTorch computes the steps, or raises if somebody else was asked for."""
        if message := refusal(error, self.name, self.options):
            raise UnsupportedModelError(message) from None
        logger.info("%s: steps by PyTorch, %d threads: %s", self.name, torch.get_num_threads(), error)

    @contextmanager
    def attached(self, implementation: str = IMPLEMENTATION) -> Iterator[None]:
        """While it is open the model's attention is ours, and dropout rests; afterwards both are what they were.

        Only one thread at a time gets in, also among several engines of the same model.
        """
        with self._alone(), _as_it_was(self.model):
            self.model.set_attn_implementation(implementation)
            if self.model.training:
                self.model.eval()
            layers = [module for module in self.model.modules() if "layer_idx" in vars(module)]
            self.running.windows = {} if implementation == PROBE else self.windows
            for layer in layers:
                vars(layer)[RUNNING] = self.running  # in a tenth of the time of setattr
            try:
                yield
            finally:
                self.running.step = None  # which holds keys and values
                for layer in layers:
                    del vars(layer)[RUNNING]

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Waits for other threads; a call from within a step would take the model away from it.

        Raises:
            RuntimeError: it is such a call.
        """
        with self._lock:
            self._check_idle()
            _STEPPED.add(self.model)
            try:
                yield
            finally:
                _STEPPED.discard(self.model)

    def _check_idle(self) -> None:
        if self.model in _STEPPED:
            raise RuntimeError(
                f"{self.name} is called from within one of its own steps (on_token or on_logits); generate when the "
                "outer call has ended, or with another copy of the model"
            )

    def refresh(self) -> None:
        """Has to be called before a run: since the last, weights may have changed, or adapters come around layers."""
        with self._lock:
            self._check_idle()
            if self.model.dtype != self._dtype:
                self._prepare()
                self._check()
            elif self.native is not None:
                try:
                    self.native.refresh()
                except UNAVAILABLE as error:
                    self._leave_to_torch(error)
                    self.native = None

    @property
    def logits_dtype(self) -> torch.dtype:
        """The dtype of what `forward` returns."""
        return torch.promote_types(self.model.dtype, torch.float32)

    @property
    def compute_name(self) -> str:
        """Who computes the steps now."""
        return "torch" if self.native is None else "native"

    @property
    def weights_name(self) -> str:
        """How the weights are read now: plain, or packed."""
        copied = self.native is not None and self.native.reading.copied
        return "packed" if copied else "plain"

    @property
    def token_bytes(self) -> int:
        """Bytes that the keys and values of one live token take, in all layers."""
        return sum(shape.token_bytes for shape in self.layers.values())

    def forward(
        self, pool: KVPool, chunks: Sequence[Chunk], attend: Callable[..., torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Appends the chunks to their slots. To be called within `attached`.

        Args:
            pool: the slots.
            chunks: at most one for each slot.
            attend: takes the place of `attend_segments`, on the modules of the model.

        Returns:
            The logits after the last token of each chunk: [chunks, vocabulary], float32 (float64 for double models).
        """
        if self.native is not None and attend is None:
            return self.native.forward(pool, chunks)
        segments, device = Segments(chunks, pool.length), self.device
        ids = upload([token for chunk in chunks for token in chunk.ids], torch.int64, device)
        positions = upload([p for chunk in chunks for p in chunk.positions[chunk.start :]], torch.int64, device)
        self.running.step = Packed(pool, segments, attend or attend_segments)
        return self.call(ids[None], positions[None], segments.last(device))[0]

    @torch.no_grad()
    def call(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        last: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Calls the model; its layers attend by `running`.

        Args:
            ids: int64 [rows, tokens].
            positions: likewise.
            last: tokens whose logits are returned, int64; None for all.
            mask: nearly always None.

        Returns:
            Logits [rows, tokens, vocabulary], float32 (float64 for double models).
        """
        select = {"logits_to_keep": last} if self._selects and last is not None else {}
        output = self.model(input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False, **select)
        logits: torch.Tensor = output.logits
        if last is not None and not self._selects:
            logits = logits[:, last.to(logits.device)]
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    @torch.inference_mode()
    def _probe(self) -> dict[int, LayerSpec]:
        zero, probe = torch.zeros(1, 1, dtype=torch.int64, device=self.device), Probe()
        with self.attached(PROBE):  # with a mask, no model looks for documents in a row
            self.running.step = probe
            self.vocabulary = self.call(zero, zero, mask=zero + 1).shape[-1]
        found, expected = probe.layers, int(self.config.num_hidden_layers)
        if len(found) != expected:
            raise UnsupportedModelError(
                f"{self.name} cannot be decoded with pruning: {len(found)} of its {expected} layers attend through "
                "the attention registry of transformers. Layers that do not either keep a state that cannot be "
                "rewound, or belong to a model class that does not use the registry. Use lm-eval's hf model for it."
            )
        strange = [index for index, layer in found.items() if layer.window == NEITHER]
        if strange:
            raise UnsupportedModelError(
                f"{self.name} cannot be decoded with pruning: layer {strange[0]} sees neither all tokens before a "
                "token nor a sliding window of them, but chunks, for instance. Use lm-eval's hf model for it."
            )
        return found

    def _check(self) -> None:
        """Runs the self-check; a compiled step that fails it is not used."""
        try:
            self.self_check()
        except UnsupportedModelError as error:
            asked = self.options.compute == "native" or self.options.weights == "packed"
            if self.native is None or asked:
                raise
            logger.warning("the compiled step is not used: %s", error)
            self.native = None
            self.self_check()

    def self_check(self) -> float:
        """Compares slots with plain forwards on random tokens.

        A row is read in pieces, past windows that are short; a shorter one is read beside it; then most of the first
        is pruned away, and the end of it read again.

        Returns:
            The largest difference of a logit, relative to the largest logit.

        Raises:
            UnsupportedModelError: the difference is beyond the tolerance of the model's dtype, or not a number.
        """
        chunks = (self.check_length() - sum(CHECK_CHUNKS[1:]), *CHECK_CHUNKS[1:])
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(self.known_ids, (sum(chunks) + sum(BESIDE),), generator=generator).tolist()
        long, short = ids[: sum(chunks)], ids[sum(chunks) :]
        rest = (*long[:KEPT], *long[-sum(AGAIN) :])
        reads = [_chunks(1, 0, long, chunks), _chunks(0, 0, short, BESIDE), _chunks(1, KEPT, rest, AGAIN)]
        rows = zip((long, short, rest), reads, strict=True)
        expected = torch.cat([self._plain_logits(ids, [chunk.stop for chunk in read]) for ids, read in rows])
        actual = self._slot_logits(*reads)
        scale = expected.abs().max().clamp_min(1e-6)
        difference = float((expected - actual).abs().max() / scale)
        tolerance = CHECK_TOLERANCE.get(self._coarsest_dtype(), 5e-2)
        if not expected.isfinite().all():
            raise UnsupportedModelError(f"{self.name} cannot be run: {self._cause_of_nan()}")
        if not difference <= tolerance:
            raise UnsupportedModelError(
                f"{self.name} failed the self-check: on slots its logits differ from a plain forward by "
                f"{difference:.1e} of the largest logit (allowed: {tolerance:.0e}). {self._likely_cause()}"
            )
        logger.debug("self-check of %s: largest relative logit difference %.1e", self.name, difference)
        return difference

    def check_length(self) -> int:
        """Tokens that outgrow the windows, as far as they are short and the model knows positions."""
        needed = max((window + 10 for window in self.windows.values() if window), default=0)
        limit, named = rotary_limit(self.config), getattr(self.config, "max_position_embeddings", None)
        most = min(LONGEST_CHECK, limit.positions if limit else LONGEST_CHECK, named or LONGEST_CHECK)
        return max(sum(CHECK_CHUNKS), needed) if needed <= most else sum(CHECK_CHUNKS)

    def _cause_of_nan(self) -> str:
        bad = next((name for name, p in self.model.named_parameters() if not p.isfinite().all()), None)
        if bad is not None:
            return f"its weight {bad} holds numbers that are NaN or infinite; get the checkpoint anew."
        dtype = str(self.model.dtype).removeprefix("torch.")
        return f"in {dtype} a plain forward gives logits that are NaN or infinite; load it with dtype=float32."

    def _likely_cause(self) -> str:
        if self.options.kv_dtype != "auto":
            return f"Probably kv_dtype={self.options.kv_dtype!r} is too coarse for it; leave that out."
        return "Its layers probably keep a state other than keys and values. Use lm-eval's hf model for it."

    @torch.inference_mode()
    def _plain_logits(self, ids: Sequence[int], ends: Sequence[int]) -> torch.Tensor:
        """Logits of the token before each end by one ordinary forward of the whole sequence.

        With eager attention, which is the model's definition: some releases of transformers drop soft caps in others.
        """
        with self.attached("eager"):
            output = self.model(input_ids=torch.tensor([ids], device=self.device), use_cache=False)
        return output.logits[0, [end - 1 for end in ends]].double().cpu()

    def _slot_logits(self, long: _Read, short: _Read, rest: _Read) -> torch.Tensor:
        """The same on slots: the first two rows beside each other, then the rest, which begins in the first's slot."""
        pool = KVPool(self.layers, slots=2, length=long[-1].stop, poison=True)
        found: list[list[torch.Tensor]] = [[], [], []]
        with self.attached():
            for step in (*itertools.zip_longest(long, short), *((None, None, chunk) for chunk in rest)):
                present = [(row, chunk) for row, chunk in enumerate(step) if chunk is not None]
                logits = self.forward(pool, [chunk for _, chunk in present])
                for (row, _), last in zip(present, logits, strict=True):
                    found[row].append(last)
        return torch.stack([last for row in found for last in row]).double().cpu()

    def _coarsest_dtype(self) -> torch.dtype:
        """The dtype with the largest rounding error among what the layers store and the model computes in."""
        dtypes = {layer.kv_dtype for layer in self.layers.values()} | {self.model.dtype}
        return max((d for d in dtypes if d.is_floating_point), key=lambda d: torch.finfo(d).eps)


_Read = Sequence[Chunk]
"""What the steps of a row read."""


def _chunks(slot: int, start: int, ids: Sequence[int], counts: Sequence[int]) -> _Read:
    """So many tokens a step of a row whose slot holds `start` of them."""
    ends = list(itertools.accumulate(counts, initial=start))
    return [Chunk(slot, begin, ids[begin:end], range(end)) for begin, end in itertools.pairwise(ends)]


@contextmanager
def _as_it_was(model: PreTrainedModel) -> Iterator[None]:
    """Afterwards every module trains, and every configuration has the attention, as before.

    A model may consist of several with attentions of their own, such as an encoder of sound, and setting one for all of
    them would set what some of them lack.
    """
    modules = list(model.modules())
    configs = [module.config for module in modules if isinstance(module, PreTrainedModel)]
    for config in configs:  # also of parts that are no modules of their own
        configs += [part for name in config.sub_configs if (part := getattr(config, name)) is not None]
    attentions = [(config, config._attn_implementation) for config in configs]
    training = [module for module in modules if module.training]
    try:
        yield
    finally:
        for config, attention in attentions:  # setting one sets its parts, which come behind it
            config._attn_implementation = attention
        for module in training:
            module.training = True


def refuse_recurrent(config: Any, name: str) -> None:
    """Raises `UnsupportedModelError` if `config.layer_types` names a layer whose state cannot be cut anywhere."""
    others = sorted(set(getattr(config, "layer_types", None) or ()) - REWINDABLE_LAYERS)
    if others:
        raise UnsupportedModelError(
            f"{name} has layers of type {', '.join(others)}, whose state cannot be rewound, so thoughts cannot be "
            f"pruned; supported are {', '.join(sorted(REWINDABLE_LAYERS))}. Use lm-eval's hf model for it."
        )


def _unwrap(model: Any) -> PreTrainedModel:
    """The transformers model inside a PEFT model; adapters that act through layers stay active in it."""
    if not hasattr(model, "peft_config"):
        return model
    if getattr(model, "active_peft_config", None) is not None and model.active_peft_config.is_prompt_learning:
        raise UnsupportedModelError(
            f"the adapter is of type {model.active_peft_config.peft_type}, which works by virtual tokens in the cache; "
            "pruning would cut them. Use an adapter that changes weights, such as LoRA."
        )
    return model.get_base_model() if hasattr(model, "get_base_model") else model


# --- what each attention layer stores and sees, asked of the model ----------------------------------------------------

PROBE = "hcot_probe"
"""The name under which the registries know the attention and the mask that ask."""
REACH = 2**18
"""Distances that are looked at; a window beyond counts as none."""
NEITHER = -1
"""The window of a layer that sees something else, such as chunks."""


class Probe:
    """A step that computes nothing and takes note of each layer; `layers` has them by index."""

    def __init__(self) -> None:
        self.layers: dict[int, LayerSpec] = {}

    def __call__(self, call: LayerCall) -> torch.Tensor:
        """Where the model makes no mask, the window is what it hands to its attention."""
        query, key, value, scores = call.query, call.key, call.value, call.scores
        window = scores.window if call.mask is None else int(call.mask.flatten()[0])
        sizes = query.shape[1], key.shape[1], key.shape[3], value.shape[3]
        self.layers[call.layer] = LayerSpec(
            *sizes, key.dtype, key.device, window or None, scores.softcap, scores.sinks is not None
        )
        return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[3])


def _mask(*, mask_function: Callable[..., torch.Tensor] | None = None, **_: Any) -> torch.Tensor:
    """In place of a mask, the window that its function describes, as a number: [1, 1, 1, 1]; 0 for none."""
    return torch.full((1, 1, 1, 1), 0 if mask_function is None else _window_of(mask_function))


def _window_of(visible: Callable[..., torch.Tensor]) -> int:
    """How many places a query sees: 0 for all before it."""
    zero, distances = torch.tensor(0), torch.arange(-1, REACH)
    counts = set()
    for place in (REACH, REACH + 1, REACH + 7, REACH + REACH // 3):  # where chunks would begin and end
        mask = visible(zero, zero, torch.tensor(place), place - distances).expand_as(distances)
        count = int(mask.sum())
        counts.add(count if not mask[0] and bool(mask[1 : 1 + count].all()) else NEITHER)
    window = counts.pop()
    return NEITHER if counts else 0 if window == REACH else window


# Some models hand their window to the attention function, others have it in the mask alone, and not all do what their
# configuration says. The mask is what counts. Models make it from a function of two places, by a registry of
# transformers; that function is looked at, far beyond what a forward could reach.
ALL_ATTENTION_FUNCTIONS.register(PROBE, attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(PROBE, _mask)
