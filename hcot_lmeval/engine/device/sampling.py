"""Who chooses the tokens of `engine.sampling` in less time: compiled code, a Triton kernel, static shapes."""

from __future__ import annotations

import ctypes
import functools
import logging
import math
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hcot_lmeval.engine.device.state import RowLimits, RowState, SamplingRows, State, on
from hcot_lmeval.engine.native.build import KernelUnavailableError, load_sampler
from hcot_lmeval.engine.rows import Request
from hcot_lmeval.engine.sampling import (
    GOLDEN,
    Chooser,
    Draw,
    SamplingParams,
    choose,
    hash_places,
    hashed_noise,
    mixed,
    noise_start,
    signed,
    truncate,
)
from hcot_lmeval.engine.slots import upload

logger = logging.getLogger(__name__)

Kernel = Callable[..., Tensor]
"""Chooses tokens as `hcot_lmeval.engine.device.triton_kernels.choose` does, whose arguments it takes."""


def chooser_for(dtype: torch.dtype, device: torch.device) -> Chooser | None:
    """Returns a kernel that chooses tokens from such logits, or None where there is none, which the log explains."""
    if device.type == "cpu":
        return sampler_for(dtype)
    kernel = kernel_for(device)
    return None if kernel is None else functools.partial(choose_by, kernel)


# --- in the device's loop ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sampler:
    """Chooses one token a row. What no request asks for is left out of every step.

    Attributes:
        places: what token ids add to the hash of a sample (`hash_places`); None if all rows take the most likely token.
        truncates: some row has top-k, top-p or min-p.
        bans: some row may not end before so many tokens.
        forces: some row has tokens to take whatever the scores.
        most: the largest top-k of all rows.
        kernel: chooses among scores in place of PyTorch.
    """

    places: Tensor | None
    truncates: bool = True
    bans: bool = True
    forces: bool = True
    most: int = 0
    kernel: Kernel | None = None

    @classmethod
    def of(
        cls, requests: Sequence[Request], vocabulary: int, device: torch.device, kernel: Kernel | None = None
    ) -> Sampler:
        """What these requests need of logits of so many tokens."""
        sampled = [r.params for r in requests if r.params.temperature > 0]
        return cls(
            places=hash_places(vocabulary, device) if sampled else None,
            truncates=any(p.top_k or p.top_p < 1 or p.min_p for p in sampled),
            bans=any(r.params.min_gen_toks for r in requests),
            forces=any(r.forced_ids for r in requests),
            most=max((p.top_k for p in sampled), default=0),
            kernel=kernel,
        )

    def choose(self, state: State, rows: Tensor, logits: Tensor) -> Tensor:
        """Returns the tokens, int64 [n].

        Args:
            state: holds the settings of `rows`.
            rows: int64 [n].
            logits: [n, vocabulary], float32 or float64.
        """
        row, limits = state.read(rows), state.constants(rows)
        settings = SamplingRows(*state.sampling[rows].to(logits.dtype).unbind(1))
        scores = self._banned(logits, state.ends[rows], row, limits) if self.bans else logits
        if self.places is None:
            tokens = scores.argmax(-1)
        else:
            starts = derived_seeds(limits.seed, row.generated + 1)
            tokens = self.sampled(_over_temperature(scores, settings), settings, limits.top_k, starts)
        return self._forced(tokens, state.forced[rows], row, limits) if self.forces else tokens

    def _banned(self, logits: Tensor, ends: Tensor, row: RowState, limits: RowLimits) -> Tensor:
        """Removes end tokens from rows that are too short; entries of `ends` below 0 are none."""
        early = (row.generated < limits.min_gen)[:, None] & (ends >= 0)
        ceiling = torch.where(early, -math.inf, math.inf).to(logits.dtype)
        return logits.scatter_reduce(1, ends.clamp_min(0), ceiling, "amin")

    def sampled(self, scores: Tensor, settings: SamplingRows, top_k: Tensor, starts: Tensor) -> Tensor:
        """Returns the tokens, int64 [n].

        Args:
            scores: logits over the temperature, [n, vocabulary].
            settings: in the type of the scores.
            top_k: int64 [n]; 0 is off.
            starts: where the hash of each row's noise starts, int64 [n].
        """
        if self.kernel is not None:
            return self.kernel(scores, *settings, top_k, starts, self.most, self.truncates)
        assert self.places is not None, "without noise nothing is sampled"
        kept = scores
        if self.truncates:
            kept = truncate(scores, torch.where(top_k == 0, scores.shape[-1], top_k), settings.top_p, settings.min_p)
        noisy = kept + hashed_noise(starts, self.places)
        return torch.where((settings.temperature > 0)[:, None], noisy, scores).argmax(-1)

    def _forced(self, tokens: Tensor, forced: Tensor, row: RowState, limits: RowLimits) -> Tensor:
        at = row.generated.clamp_max(forced.shape[1] - 1)
        return torch.where(row.generated < limits.forced, forced.gather(1, at[:, None])[:, 0], tokens)


def derived_seeds(seeds: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """`derive_seed` on a device, for indices from 1 up: the int64 with the bits of each derived seed, [rows]."""
    return mixed(mixed(seeds + indices * signed(GOLDEN)))


def _over_temperature(logits: Tensor, settings: SamplingRows) -> Tensor:
    return logits / torch.where(settings.temperature > 0, settings.temperature, 1.0)[:, None]


# --- in the host's loop, on a GPU -------------------------------------------------------------------------------------


def choose_by(kernel: Kernel, logits: Tensor, draws: Sequence[Draw]) -> list[int]:
    """What a kernel chooses for the host's loop; its part of `hcot_lmeval.engine.sampling.Chooser`.

    Args:
        kernel: see `kernel_for`.
        logits: [rows, vocabulary].
        draws: one for each row.
    """
    params = [draw.params for draw in draws]
    if not any(p.temperature > 0 for p in params):
        return logits.argmax(-1).tolist()
    numbers = ([getattr(p, name) for p in params] for name in SamplingRows._fields)
    settings = SamplingRows(*(upload(column, logits.dtype, logits.device) for column in numbers))
    top_k, starts = [p.top_k for p in params], [noise_start(draw.seed, draw.generated) for draw in draws]
    integers = (upload(column, torch.int64, logits.device) for column in (top_k, starts))
    with on(logits.device):
        return kernel(_over_temperature(logits, settings), *settings, *integers, max(top_k), True).tolist()


@functools.cache
def kernel_for(device: torch.device) -> Kernel | None:
    """Returns the Triton kernel if it runs on the device and chooses what PyTorch would; the log says why it does not.

    PyTorch sorts the vocabulary of every row and makes noise for all of it.
    """
    try:
        with on(device):
            reason = _refusal(device)
    except Exception as error:  # a kernel that does not compile or run here raises anything
        reason = str(error) or type(error).__name__
    logger.info("tokens are sampled on %s by %s", device, f"PyTorch; not by triton: {reason}" if reason else "triton")
    return None if reason else _triton()


def _refusal(device: torch.device) -> str:
    """Why the kernel cannot be used; empty if it can."""
    try:
        from triton import knobs
    except ImportError as error:
        return f"it cannot be imported ({error})"
    if device.type != "cuda" and not knobs.runtime.interpret:
        return f"it needs CUDA, not {device.type} (or TRITON_INTERPRET=1)"
    return "" if chooses_alike(_triton(), device) else "it chooses other tokens"


def _triton() -> Kernel:
    from hcot_lmeval.engine.device import triton_kernels

    return triton_kernels.choose


@torch.inference_mode()
def chooses_alike(kernel: Kernel, device: torch.device) -> bool:
    """Whether a kernel chooses the tokens that PyTorch chooses, for settings of every kind and scores of both types."""
    chooser = functools.partial(choose_by, kernel)
    return all(passes_trials(chooser, dtype, device) for dtype in (torch.float32, torch.float64))


# --- in the host's loop, on a CPU -------------------------------------------------------------------------------------

TRIALS = (
    SamplingParams(),
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.6, top_p=0.9),
    SamplingParams(temperature=1.5, top_p=0.7, top_k=40, min_p=0.01),
    SamplingParams(temperature=0.8, min_p=0.05),
    SamplingParams(temperature=3.0, top_p=0.3, top_k=20),
)
TRIAL_SIZE = 5003
"""Settings, and size of the vocabulary, on which a chooser is tried."""


class _Rows(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int) for name in ("rows", "vocabulary", "threads")),
        *((name, ctypes.c_void_p) for name in ("logits", "temperature", "top_p", "min_p", "top_k", "start", "tokens")),
    )


class NativeSampler:
    """Chooses the tokens that `hcot_lmeval.engine.sampling.choose` chooses, without the constraints of a draw.

    The sums behind top-p are rounded in another order: a token that lies on the edge up to rounding (1e-6 in float32)
    may fall on the other side of it. Results depend neither on the other rows nor on the number of threads.

    Args:
        dtype: of the logits.

    Raises:
        KernelUnavailableError: it cannot be compiled here, or not for this dtype.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._library = load_sampler(dtype)

    def __call__(self, logits: torch.Tensor, draws: Sequence[Draw]) -> list[int]:
        """Returns a token for each row.

        Args:
            logits: [rows, vocabulary], on the CPU, of the sampler's dtype.
            draws: one for each row; their settings, seeds and counts matter, nothing else.
        """
        assert logits.dtype == self.dtype and logits.device.type == "cpu", "logits are those of the model"
        logits = logits.contiguous()
        params = [draw.params for draw in draws]
        reals = array("d", [*(p.temperature for p in params), *(p.top_p for p in params), *(p.min_p for p in params)])
        starts = (_start(draw) for draw in draws)
        tokens = [0] * len(draws)
        integers = array("q", [*(p.top_k for p in params), *starts, *tokens])
        self._run(logits, reals, integers)
        return integers[-len(draws) :].tolist()

    def _run(self, logits: torch.Tensor, reals: array[float], integers: array[int]) -> None:
        """Calls the kernel: `reals` and `integers` hold three columns of a number for each row."""
        count, size = logits.shape
        columns = [block.buffer_info()[0] + i * count * block.itemsize for block in (reals, integers) for i in range(3)]
        rows = _Rows(count, size, torch.get_num_threads(), logits.data_ptr(), *columns)
        self._library.choose(ctypes.byref(rows))


@functools.cache
def sampler_for(dtype: torch.dtype) -> NativeSampler | None:
    """Returns the sampler for logits of this type; None where it cannot be used, which the log says once."""
    try:
        sampler = NativeSampler(dtype)
    except KernelUnavailableError as error:
        logger.info("tokens are chosen by PyTorch: %s", error)
        return None
    if not passes_trials(sampler, dtype, torch.device("cpu")):
        logger.warning("tokens are chosen by PyTorch: the compiled sampler chooses others on trial logits")
        return None
    return sampler


def passes_trials(chooser: Chooser, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a chooser takes the tokens that `choose` takes, on trial: compilers may be at fault."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(len(TRIALS), TRIAL_SIZE, generator=generator, dtype=dtype).to(device)
    draws = [Draw(params, seed, 1) for seed, params in enumerate(TRIALS)]
    return chooser(logits, draws) == choose(logits, draws)[0]


def _start(draw: Draw) -> int:
    """Where the hash of a row's noise starts; nobody asks for it at temperature 0."""
    return noise_start(draw.seed, draw.generated) if draw.params.temperature > 0 else 0
