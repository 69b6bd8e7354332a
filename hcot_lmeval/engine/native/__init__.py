"""A decoding step in compiled code, for models of the Llama kind on the CPU."""

from enum import StrEnum

from hcot_lmeval.engine.native.build import KernelUnavailableError
from hcot_lmeval.engine.native.step import NativeStep
from hcot_lmeval.engine.native.weights import UnreadableModelError

__all__ = ["Compute", "KernelUnavailableError", "NativeStep", "UnreadableModelError"]


class Compute(StrEnum):
    """Who computes a step on the CPU."""

    AUTO = "auto"
    NATIVE = "native"
    TORCH = "torch"
