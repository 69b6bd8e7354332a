"""A Hugging Face decoder, run on slots: what it must be, and the proof at load time that it is."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from hcot_lmeval.engine.attention import IMPLEMENTATION, Segment, StepContext, running
from hcot_lmeval.engine.native import (
    Compute,
    KernelUnavailableError,
    NativeStep,
    NoCopyError,
    UnreadableModelError,
    WeightForm,
)
from hcot_lmeval.engine.slots import KV_DTYPES, Chunk, KVPool, LayerShape

logger = logging.getLogger(__name__)

REWINDABLE_LAYERS = frozenset({"full_attention", "sliding_attention", "attention"})
"""Entries of `config.layer_types` whose state is keys and values alone, so that it can be cut anywhere."""

CHECK_CHUNKS = (11, 1, 6, 1, 1, 4)
"""Tokens a step in the self-check: chunks and single tokens, 24 in all."""

CHECK_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float8_e4m3fn: 0.3}
"""Largest logit difference allowed in the self-check, relative to the largest logit; other coarse types get 5e-2."""


class UnsupportedModelError(ValueError):
    """The model cannot be decoded with pruning; the message says which part of it stands in the way."""


class Decoder:
    """Forwards packed chunks of several rows through a causal language model.

    Args:
        model: a `transformers` causal language model, or a PEFT model around one.
        check: run the self-check.
        compute: who computes a step: ``torch``, the modules of the model with the attention of this package; or
            ``native``, compiled code for models of the Llama kind on the CPU. ``auto`` takes the latter where it can,
            in float32 and bfloat16.
        kv_dtype: dtype of keys and values in the slots, a name of `KV_DTYPES`, or ``auto`` for the model's own.
        weights: how compiled code reads them: ``plain``, as the model has them; ``packed``, from a copy in fewer bits
            that has the same values; or ``auto``, whichever is faster for so many rows, if memory is free.
        rows: that run at the same time at most.
        huge_pages: let compiled code move the weights to pages of 2 MiB.

    Attributes:
        layers: layer index to what the layer stores per token.
        vocabulary: length of the logits.
        kv_dtype: what the argument said.
        native: the compiled step, or None where PyTorch computes.

    Raises:
        UnsupportedModelError: the model keeps recurrent or convolutional state, does not use the attention registry,
            computes something else on slots than in a plain forward, or cannot have the compute that was asked for.
    """

    def __init__(
        self,
        model: Any,
        *,
        check: bool = True,
        compute: Compute | str = Compute.AUTO,
        kv_dtype: str = "auto",
        weights: WeightForm | str = WeightForm.PLAIN,
        rows: int = 1,
        huge_pages: bool = True,
    ) -> None:
        self.model: PreTrainedModel = _unwrap(model)
        self.config = self.model.config.get_text_config()
        self.name = f"{type(self.model).__name__} ({self.config.model_type})"
        refuse_recurrent(self.config, self.name)
        self._selects = "logits_to_keep" in inspect.signature(self.model.forward).parameters
        self.compute, self.weights = Compute(compute), WeightForm(weights)
        self.native: NativeStep | None = None
        self.layers, self.kv_dtype = self._layer_shapes(), kv_dtype
        if kv_dtype != "auto":
            self.layers = {i: replace(shape, dtype=KV_DTYPES[kv_dtype]) for i, shape in self.layers.items()}
        self.native = self._compiled(weights=self.weights, rows=rows, huge_pages=huge_pages)
        if check:
            self._check()

    @property
    def device(self) -> torch.device:
        """Where token ids go in."""
        return self.model.get_input_embeddings().weight.device

    def _compiled(self, **reading: Any) -> NativeStep | None:
        """The compiled step, if the compute allows it and there is one for this model."""
        if self.compute is Compute.TORCH:
            return None
        if self.compute is Compute.AUTO and self.model.dtype == torch.float64:
            self._leave_to_torch("double precision is for comparisons with the model's own modules")
            return None
        try:
            step = NativeStep(self.model, self.layers[0].dtype, **reading)
        except NoCopyError as error:
            raise self._no_copy(error) from None
        except (KernelUnavailableError, UnreadableModelError) as error:
            self._leave_to_torch(str(error))
            return None
        logger.info("%s: compiled steps, %d threads", self.name, torch.get_num_threads())
        return step

    def _no_copy(self, error: NoCopyError) -> UnsupportedModelError:
        return UnsupportedModelError(f"weights='packed': {self.name} has no packed copy, since {error}.")

    def _leave_to_torch(self, reason: str) -> None:
        """Says why PyTorch computes the steps, or raises if that was not wanted."""
        if self.compute is Compute.NATIVE:
            raise UnsupportedModelError(
                f"compute='native' cannot run {self.name}: {reason}. Use compute='auto', which leaves it to PyTorch."
            )
        if self.weights is WeightForm.PACKED:
            raise UnsupportedModelError(
                f"weights='packed': {self.name} is left to PyTorch, which has no packed weights: {reason}. "
                "Use weights='auto'."
            )
        logger.info("%s: steps by PyTorch, %d threads: %s", self.name, torch.get_num_threads(), reason)

    @contextmanager
    def attached(self, implementation: str = IMPLEMENTATION) -> Iterator[None]:
        """While it is open the model's attention is ours; afterwards it is what it was (the config is shared state)."""
        before = self.model.config._attn_implementation
        self.model.set_attn_implementation(implementation)
        try:
            yield
        finally:
            self.model.set_attn_implementation(before)

    def refresh(self) -> None:
        """To be called before a run: since the last, weights may have changed, or adapters been put around layers."""
        if self.native is not None:
            try:
                self.native.refresh()
            except NoCopyError as error:
                raise self._no_copy(error) from None
            except UnreadableModelError as error:
                self._leave_to_torch(str(error))
                self.native = None

    @property
    def compute_name(self) -> str:
        """Who computes the steps now."""
        return (Compute.TORCH if self.native is None else Compute.NATIVE).value

    @property
    def weights_name(self) -> str:
        """How the weights are read now: plain, or packed."""
        copied = self.native is not None and self.native.reading.copied
        return (WeightForm.PACKED if copied else WeightForm.PLAIN).value

    @property
    def token_bytes(self) -> int:
        """Bytes that the keys and values of one live token take, in all layers."""
        return sum(shape.token_bytes for shape in self.layers.values())

    @torch.inference_mode()
    def forward(self, pool: KVPool, chunks: Sequence[Chunk]) -> torch.Tensor:
        """Appends the chunks to their slots. To be called within `attached`.

        Returns:
            The logits after the last token of each chunk: [chunks, vocabulary], float32 (float64 for double models).
        """
        if self.native is not None:
            return self.native.forward(pool, chunks)
        segments, first = [], 0
        for chunk in chunks:
            segments.append(Segment(chunk.slot, chunk.start, first, len(chunk.ids), chunk.positions))
            first += len(chunk.ids)
        ids = [token for chunk in chunks for token in chunk.ids]
        positions = [p for chunk in chunks for p in chunk.positions[chunk.start :]]
        last = torch.tensor([s.first + s.count - 1 for s in segments], device=self.device)
        with running(StepContext(pool, segments)):
            logits = self._call(ids, positions, last)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def _call(self, ids: list[int], positions: list[int], rows: torch.Tensor) -> torch.Tensor:
        """Returns the logits of the packed tokens `rows`: [len(rows), vocabulary]."""
        select = {"logits_to_keep": rows} if self._selects else {}
        output = self.model(
            input_ids=torch.tensor([ids], device=self.device),
            position_ids=torch.tensor([positions], device=self.device),
            attention_mask=None,
            use_cache=False,
            **select,
        )
        logits: torch.Tensor = output.logits[0]
        return logits if self._selects else logits[rows.to(logits.device)]

    @torch.inference_mode()
    def _layer_shapes(self) -> dict[int, LayerShape]:
        shapes: dict[int, LayerShape] = {}
        with self.attached(), running(shapes):
            self.vocabulary = self._call([0], [0], torch.tensor([0], device=self.device)).shape[-1]
        expected = int(self.config.num_hidden_layers)
        if len(shapes) != expected:
            raise UnsupportedModelError(
                f"{self.name} cannot be decoded with pruning: {len(shapes)} of its {expected} layers attend through "
                "the attention registry of transformers. Layers that do not either keep a state that cannot be "
                "rewound, or belong to a model class that does not use the registry. Use lm-eval's hf model for it."
            )
        return shapes

    def _check(self) -> None:
        """Runs the self-check; a compiled step that fails it is not used."""
        try:
            self.self_check()
        except UnsupportedModelError as error:
            if self.native is None or self.compute is Compute.NATIVE or self.weights is WeightForm.PACKED:
                raise
            logger.warning("the compiled step is not used: %s", error)
            self.native = None
            self.self_check()

    def self_check(self) -> float:
        """Compares slots with a plain forward on 24 random tokens.

        Returns:
            The largest difference of a logit, relative to the largest logit.

        Raises:
            UnsupportedModelError: the difference is beyond the tolerance of the model's dtype.
        """
        total = sum(CHECK_CHUNKS)
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(int(self.config.vocab_size), (total,), generator=generator).tolist()
        expected = self._plain_logits(ids)
        actual = self._slot_logits(ids)
        scale = expected.abs().max().clamp_min(1e-6)
        difference = float((expected - actual).abs().max() / scale)
        tolerance = CHECK_TOLERANCE.get(self._coarsest_dtype(), 5e-2)
        if not difference <= tolerance:
            raise UnsupportedModelError(
                f"{self.name} failed the self-check: on slots its logits differ from a plain forward by "
                f"{difference:.1e} of the largest logit (allowed: {tolerance:.0e}). {self._likely_cause()}"
            )
        logger.debug("self-check of %s: largest relative logit difference %.1e", self.name, difference)
        return difference

    def _likely_cause(self) -> str:
        if self.kv_dtype != "auto":
            return f"Probably kv_dtype={self.kv_dtype!r} is too coarse for it; leave that out."
        return "Its layers probably keep a state other than keys and values. Use lm-eval's hf model for it."

    @torch.inference_mode()
    def _plain_logits(self, ids: list[int]) -> torch.Tensor:
        """Logits at the end of each chunk by one ordinary forward of the whole sequence.

        With eager attention, which is the model's definition: some releases of transformers drop soft caps in others.
        """
        ends = torch.tensor(CHECK_CHUNKS).cumsum(0) - 1
        with self.attached("eager"):
            output = self.model(input_ids=torch.tensor([ids], device=self.device), use_cache=False)
        return output.logits[0][ends.to(output.logits.device)].double().cpu()

    def _slot_logits(self, ids: list[int]) -> torch.Tensor:
        pool = KVPool(self.layers, slots=2, length=len(ids), poison=True)
        rows, start = [], 0
        with self.attached():
            for count in CHECK_CHUNKS:
                chunk = Chunk(1, start, ids[start : start + count], range(start + count))
                rows.append(self.forward(pool, [chunk])[0])
                start += count
        return torch.stack(rows).double().cpu()

    def _coarsest_dtype(self) -> torch.dtype:
        """The dtype with the largest rounding error among what the layers store and the model computes in."""
        dtypes = {shape.dtype for shape in self.layers.values()} | {self.model.dtype}
        return max((d for d in dtypes if d.is_floating_point), key=lambda d: torch.finfo(d).eps)


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
