"""Decoding that prunes: any Hugging Face decoder on preallocated keys and values.

Read in this order: `engine` (the loop), `rows` (one sample), `scheduler`, `decoder` (the model), `attention`, `slots`
(memory), `sampling`.
"""

from hcot_lmeval.engine.decoder import Decoder, UnsupportedModelError
from hcot_lmeval.engine.engine import Engine, Progress
from hcot_lmeval.engine.options import EngineOptions
from hcot_lmeval.engine.rows import Completion, Request
from hcot_lmeval.engine.sampling import SamplingParams

__all__ = [
    "Completion",
    "Decoder",
    "Engine",
    "EngineOptions",
    "Progress",
    "Request",
    "SamplingParams",
    "UnsupportedModelError",
]
