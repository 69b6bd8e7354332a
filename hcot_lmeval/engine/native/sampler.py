"""Chooses tokens in compiled code on the CPU: no noise for tokens that cannot win, and nothing is sorted."""

from __future__ import annotations

import ctypes
import functools
import logging
from array import array
from collections.abc import Sequence

import torch

from hcot_lmeval.engine.native.build import KernelUnavailableError, load_sampler
from hcot_lmeval.engine.sampling import Chooser, Draw, SamplingParams, choose, noise_start

logger = logging.getLogger(__name__)


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
