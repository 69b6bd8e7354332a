"""Models whose layers keep more than keys and values that can be cut: read row by row, through their own cache.

A recurrent or convolutional state cannot be cut, but it can be kept. Where a block opens, `RowPool.save` copies what
cannot be cut; at the return `RowPool.rewind` puts it back, and the solution is read again. A place at which nothing was
saved is reached from the last one before it, by reading the tokens between, so that every rewind is exact.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from hcot_lmeval.embeddings import rows_of
from hcot_lmeval.engine.attention import IMPLEMENTATION
from hcot_lmeval.engine.decoder import CHECK_TOLERANCE, Decoder, UnsupportedModelError
from hcot_lmeval.engine.options import ComputeOptions
from hcot_lmeval.engine.slots import Chunk, LayerSpec, Span
from hcot_lmeval.markup import MarkerIds

logger = logging.getLogger(__name__)

CACHE_NAMES = ("past_key_values", "cache", "cache_params")
"""What models and releases of transformers call the argument that takes a cache."""

SAVED_STATES = 8
"""States that a row keeps at most. Of more, all but the first and the last ones go, and cost reading if needed."""

HF_MODEL = " Use lm-eval's hf model for it."
OWN_ERRORS = (ValueError, TypeError, AttributeError, LookupError, NotImplementedError)
"""What models raise that take no cache of transformers' kind."""

CHECK_TRACE = ((0, 13), (13, 1), (14, 1), (15, 4), (14, 3), (17, 1), (9, 5), (14, 1), (4, 6), (10, 1))
"""The self-check's row: how many live tokens stay, and how many are read behind. Returns are nested."""
CHECK_PROMPT = 96
"""Tokens before all of it, as far as the model knows positions: some models go wrong behind some dozens alone."""
CHECK_BESIDE = ((0, 3), (3, 1), (4, 6), (4, 2), (6, 1))
"""A row beside it."""


@dataclass
class CachedRow:
    """What one slot holds.

    Attributes:
        ids: live tokens.
        held: how many of them the cache has read.
        cache: the model's own object, None before the first token.
        saved: number of tokens to a copy of the cache behind them, without what can be cut.
    """

    ids: list[int] = field(default_factory=list)
    held: int = 0
    cache: Any = None
    saved: dict[int, Any] = field(default_factory=dict)


class RowPool:
    """A cache for each of `slots` rows; the same face as `KVPool`, whose arguments it takes.

    Attributes:
        opens: token ids at which a state is saved.
        keeps_open: whether a return leaves them in the context, so that the state behind them is what it needs.
        bytes: memory that the rows are planned to take, without their states.
    """

    opens: frozenset[int] = frozenset()
    keeps_open = True

    def __init__(self, layers: dict[int, LayerSpec], slots: int, length: int, **_: Any) -> None:
        self.slots, self.length = slots, length
        self.rows = [CachedRow() for _ in range(slots)]
        self.bytes = slots * length * sum(layer.token_bytes for layer in layers.values())

    def save(self, slot: int) -> None:
        """Keeps what cannot be cut, as it is now."""
        row = self.rows[slot]
        if _can_be_cut(row.cache):
            return
        if len(row.saved) >= SAVED_STATES:
            del row.saved[sorted(row.saved)[1]]
        row.saved[row.held] = _without_keys(row.cache)

    def rewind(self, slot: int, length: int) -> list[int]:
        """Makes the row as it was behind its first `length` tokens.

        Returns:
            The last of them, which have to be read again because no state was saved behind them.
        """
        row = self.rows[slot]
        del row.ids[length:]
        if length < row.held:
            row.saved = {place: state for place, state in row.saved.items() if place <= length}
            if _can_be_cut(row.cache):
                row.held = length
                row.cache = _with_keys(_without_keys(row.cache), row.cache, length) if length else None
            else:
                row.held = max(row.saved, default=0)
                state = row.saved.get(row.held)
                row.cache = None if state is None else _with_keys(copy.deepcopy(state), row.cache, row.held)
                if row.held == length and len(row.saved) > 1:  # the first is the prompt's, for other samples
                    del row.saved[length]  # its block is closed
        return row.ids[row.held :]

    def copy(self, source: int, target: int, length: int) -> None:
        """Copies the first `length` tokens of one slot to another; states saved among them are shared."""
        row = self.rows[source]
        self.rows[target] = new = CachedRow(list(row.ids), row.held, row.cache, dict(row.saved))
        self.rewind(target, length)
        if new.cache is row.cache:
            new.cache = copy.deepcopy(row.cache)

    def drop(self, slot: int, spans: Sequence[Span], length: int) -> None:
        """A state has read what would be dropped."""
        raise NotImplementedError("evict is refused by RowDecoder.refuses")


class RowDecoder(Decoder):
    """Reads rows one after the other, each with the model's own cache; see `Decoder` for what is not told here.

    Attributes:
        single: tokens are read one by one, as the model's reading of several ignores its state.
        state_bytes: memory of a row that does not depend on its length: the states, and the saved ones.
    """

    pool_kind = RowPool

    def __init__(self, model: Any, why: str, *, rows: int = 1, **options: Any) -> None:
        self.single = False
        try:  # without the check nobody would know whether to read token by token
            super().__init__(model, check=True, rows=rows, refuse=False, **options)
        except OWN_ERRORS as error:
            if isinstance(error, UnsupportedModelError):
                raise
            raise UnsupportedModelError(f"it cannot be run with a cache of transformers: {error}") from error
        logger.warning(
            "%s: read row by row with its own cache%s, which is slower and exact; on slots: %s",
            self.name,
            ", token by token" if self.single else "",
            why,
        )

    def refuses(self, policy: str) -> str:
        if policy == "evict":
            return (
                f"policy 'evict' cannot decode {self.name}: what it keeps has read the thought, which cannot be taken "
                "out of it; choose policy='recompute'"
            )
        return ""

    def mark(self, pool: Any, markers: MarkerIds | None) -> None:
        if markers is not None:
            pool.opens, pool.keeps_open = frozenset({markers.open}), "open" in markers.keep

    def _prepare(self) -> None:
        given = inspect.signature(self.model.forward).parameters
        self._cache = next((name for name in CACHE_NAMES if name in given), "")
        self._positions = "position_ids" in given
        if not self._cache:
            raise UnsupportedModelError("its forward takes no cache")
        self._dtype, self.native, self.windows = self.model.dtype, None, {}
        self.vocabulary = self.known_ids = rows_of(self.model)
        with torch.inference_mode(), self.attached():
            logits, cache = self._read(None, 0, [0] * 16)
        self.vocabulary = len(logits)
        self.known_ids = min(self.known_ids, self.vocabulary)
        grows = sum(layer.keys.nbytes + layer.values.nbytes for layer in _layers(cache) if _is_plain(layer))
        self.state_bytes = (_bytes_of(cache) - grows) * (1 + SAVED_STATES)
        self.layers = {0: LayerSpec(1, 1, grows // 16, 0, torch.uint8, self.device)}

    @contextmanager
    def attached(self, implementation: str = IMPLEMENTATION) -> Iterator[None]:
        """While it is open no other thread steps the model, and dropout rests."""
        training = [module for module in self.model.modules() if module.training]
        with self._alone():
            if training:
                self.model.eval()
            try:
                yield
            finally:
                for module in training:
                    module.training = True

    @torch.inference_mode()
    def forward(self, pool: Any, chunks: Sequence[Chunk], attend: Any = None) -> torch.Tensor:
        return torch.stack([self._append(pool, chunk) for chunk in chunks])

    def _append(self, pool: RowPool, chunk: Chunk) -> torch.Tensor:
        ids = [*pool.rewind(chunk.slot, chunk.start), *chunk.ids]
        row = pool.rows[chunk.slot]
        del row.ids[row.held :]
        saves = {place + pool.keeps_open for place, token in enumerate(ids) if token in pool.opens}
        if chunk.start == 0:
            saves.add(len(ids) - 1)  # which the samples of a prompt share
        pieces = range(len(ids)) if self.single else sorted({0, *saves} - {len(ids)})
        for begin, end in itertools.pairwise((*pieces, len(ids))):
            if begin in saves and row.held:
                pool.save(chunk.slot)
            logits, row.cache = self._read(row.cache, row.held, ids[begin:end])
            row.ids += ids[begin:end]
            row.held += end - begin
        if len(ids) in saves:
            pool.save(chunk.slot)
        return logits

    def _read(self, cache: Any, start: int, ids: Sequence[int]) -> tuple[torch.Tensor, Any]:
        """Returns the logits of the last id, [vocabulary], and the cache, behind `start` tokens and them."""
        cache = DynamicCache(config=self.config) if cache is None else cache
        given = {self._cache: cache, **({"logits_to_keep": 1} if self._selects else {})}
        if self._positions:
            given["position_ids"] = torch.arange(start, start + len(ids), device=self.device)[None]
        output = self.model(input_ids=torch.tensor([list(ids)], device=self.device), use_cache=True, **given)
        logits: torch.Tensor = output.logits[0, -1]
        return logits.to(self.logits_dtype), cache

    def _check(self) -> None:
        """Runs the self-check, and again token by token if the model's reading of several tokens fails it."""
        try:
            self.self_check()
        except UnsupportedModelError:
            self.single = True
            self.self_check()

    def self_check(self) -> float:
        generator, pool = torch.Generator().manual_seed(0), RowPool(self.layers, 2, 32)
        pool.opens = frozenset(range(0, self.known_ids, 2))  # states at some places, and none at others
        named = getattr(self.config, "max_position_embeddings", None) or CHECK_PROMPT + 32
        before = max(0, min(CHECK_PROMPT, named - 32))
        trace = [(start + before if start else 0, count if start else count + before) for start, count in CHECK_TRACE]
        live: list[list[int]] = [[], []]
        difference = scale = 0.0
        for step in range(len(trace)):
            for slot, reads in enumerate((trace, CHECK_BESIDE)):
                for start, count in reads[step : step + 1]:
                    new = torch.randint(self.known_ids, (count,), generator=generator).tolist()
                    live[slot] = [*live[slot][:start], *new]
                    with self.attached():
                        found = self.forward(pool, [Chunk(slot, start, new, range(start + count))])[0]
                        plain = self._plain(live[slot])
                    scale = max(scale, float(plain.abs().max()))
                    difference = max(difference, float((plain - found).abs().nan_to_num(torch.inf).max()))
        difference /= max(scale, 1e-6)
        tolerance = CHECK_TOLERANCE.get(self.model.dtype, 5e-2)
        if not difference <= tolerance:
            raise UnsupportedModelError(
                f"its logits differ from a plain forward by "
                f"{difference:.1e} of the largest logit (allowed: {tolerance:.0e}), also token by token"
            )
        return difference

    @torch.inference_mode()
    def _plain(self, ids: Sequence[int]) -> torch.Tensor:
        output = self.model(input_ids=torch.tensor([list(ids)], device=self.device), use_cache=False)
        return output.logits[0, -1].to(self.logits_dtype)


def make_decoder(model: Any, **options: Any) -> Decoder:
    """A decoder on slots, or one that reads row by row if the model's layers do not keep keys and values alone.

    Raises:
        UnsupportedModelError: neither is exact.
    """
    try:
        return Decoder(model, **options)
    except UnsupportedModelError as error:
        asked = ComputeOptions(**{k: v for k, v in options.items() if k not in ("check", "rows")})
        if asked.compute == "native" or asked.kv_dtype != "auto" or asked.weights == "packed":
            raise
        options.pop("check", None)
        try:
            return RowDecoder(model, str(error).removesuffix(HF_MODEL), **options)
        except UnsupportedModelError as other:
            raise UnsupportedModelError(f"{error} (Nor can it be read row by row: {other}.)") from None


def _layers(cache: Any) -> list[Any]:
    return list(getattr(cache, "layers", ()))


def _is_plain(layer: Any) -> bool:
    """Whether it holds keys and values alone, of all tokens."""
    return type(layer) is DynamicLayer and layer.is_initialized


def _can_be_cut(cache: Any) -> bool:
    layers = _layers(cache)
    return bool(layers) and type(cache) is DynamicCache and all(map(_is_plain, layers))


def _without_keys(cache: Any) -> Any:
    """A copy of what cannot be cut."""
    gone = torch.empty(0)
    keys = [tensor for layer in _layers(cache) if _is_plain(layer) for tensor in (layer.keys, layer.values)]
    return copy.deepcopy(cache, {id(tensor): gone for tensor in keys})


def _with_keys(state: Any, cache: Any, length: int) -> Any:
    """Puts the first keys and values of a cache that went on since into a copy of `_without_keys`."""
    for layer, grown in zip(_layers(state), _layers(cache), strict=True):
        if _is_plain(grown):
            layer.keys, layer.values = grown.keys[..., :length, :], grown.values[..., :length, :]
    return state


def _bytes_of(found: Any) -> int:
    if isinstance(found, torch.Tensor):
        return found.nbytes
    if isinstance(found, dict):
        return sum(map(_bytes_of, found.values()))
    if isinstance(found, list | tuple):
        return sum(map(_bytes_of, found))
    return sum(map(_bytes_of, _layers(found))) or (_bytes_of(vars(found)) if hasattr(found, "__dict__") else 0)
