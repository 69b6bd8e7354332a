"""The engines that are timed, one file each; names on the command line, modules here."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from bench.engines.contract import Contender, Setting

ENGINES: dict[str, tuple[str, dict[str, Any]]] = {
    "generate": ("generate", {}),
    "off": ("ours", {"policy": "off"}),
    "recompute": ("ours", {"policy": "recompute"}),
    "recompute+grammar": ("ours", {"policy": "recompute", "constraints": "grammar"}),
    "recompute+plain": ("ours", {"policy": "recompute", "weights": "plain"}),
    "evict": ("ours", {"policy": "evict"}),
    "resubmit": ("resubmit", {}),
    "continuous": ("continuous", {}),
    "llama.cpp": ("llama", {"flash": False}),
    "llama.cpp+flash": ("llama", {"flash": True}),
    "vllm": ("vllm", {}),
}
"""Name -> the module below this one whose `prepare` makes it, and what it is told."""


def prepare(name: str, setting: Setting) -> Contender:
    """Makes an engine ready for its work.

    Raises:
        ValueError: there is no engine of this name.
        UnavailableError: it cannot do this work here; the message says why.
    """
    if name not in ENGINES:
        raise ValueError(f"there is no engine {name!r}; known are {', '.join(ENGINES)}")
    module, options = ENGINES[name]
    contender: Contender = import_module(f"bench.engines.{module}").prepare(setting, **options)
    return contender
