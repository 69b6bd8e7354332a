"""Compiled code for the CPU: a decoding step for models of the Llama kind, the choice of tokens for all."""

from enum import StrEnum

from hcot_lmeval.engine.native.build import KernelUnavailableError
from hcot_lmeval.engine.native.packing import NoCopyError
from hcot_lmeval.engine.native.reading import WeightForm
from hcot_lmeval.engine.native.sampler import sampler_for
from hcot_lmeval.engine.native.step import NativeStep
from hcot_lmeval.engine.native.weights import UnreadableModelError

__all__ = [
    "Compute",
    "KernelUnavailableError",
    "NativeStep",
    "NoCopyError",
    "UnreadableModelError",
    "WeightForm",
    "sampler_for",
]


class Compute(StrEnum):
    """Who computes a step on the CPU, and chooses its tokens."""

    AUTO = "auto"
    NATIVE = "native"
    TORCH = "torch"
