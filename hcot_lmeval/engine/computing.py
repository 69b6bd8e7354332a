"""Who computes, where and in what: options that change speed, memory and rounding, and never the rule."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from hcot_lmeval.engine.native import Compute, WeightForm
from hcot_lmeval.engine.slots import KV_DTYPES

AUTO = "auto"
SPEED_ALONE = ("weights", "huge_pages")
"""Options that change no bit of a result."""
ATTENTION = (AUTO, "flash-attn", "varlen", "aten", "triton", "sdpa")
"""Who may attend in the device's loop; see `hcot_lmeval.engine.device.choice`."""


@dataclass(frozen=True)
class ComputeOptions:
    """Who computes, where and in what.

    Attributes:
        compute: who computes a step: ``torch``, the model's own modules; ``native``, compiled code for models of the
            Llama kind on the CPU; or ``auto``, the latter where it can (see `hcot_lmeval.engine.decoder.Decoder`).
            Tokens are chosen by kernels of this package, of any model and also on CUDA, unless it is ``torch``.
        kv_dtype: dtype of stored keys and values: ``bfloat16``, ``float16`` or ``float8_e4m3fn`` (without scales); or
            ``auto``, the one in which the model computes them. A smaller one lets more rows into memory and rounds.
        weights: how compiled code on the CPU reads float32 weights: ``plain``, as the model has them; ``packed``, from
            a copy in fewer bits that has the same values (`hcot_lmeval.engine.native.packing`) and serves a single
            row, or some of a checkpoint in bfloat16; or ``auto``, the latter where no more run at a time, it is faster
            and takes at most half of the free memory.
        huge_pages: on the CPU, keys and values lie on pages of 2 MiB where Linux has them (`hcot_lmeval.engine.pages`),
            and compiled code copies the weights there; they stay the model's parameters.
        loop: who runs the steps: ``host``; ``device``, where tokens are chosen and thoughts pruned without the host
            (see `hcot_lmeval.engine.device`); or ``auto``, the latter on CUDA for requests that it can serve.
        attention: who attends in the device's loop, one of `ATTENTION`; ``auto``: the first that can and is right.
        reforward: how solutions are read again in the device's loop: ``chunk``, in one piece; ``replay``, token by
            token beside the other rows; or ``auto``, the former for few rows.
        graphs: capture the steps of the device's loop as CUDA graphs, where there is CUDA.
        compiled: compile the steps of the device's loop with torch.compile, which takes minutes at first.
        run_ahead: steps that the device may be ahead of the host; None: as many as suit the number of rows.

    Raises:
        ValueError: a value is not allowed.
    """

    compute: Compute | str = Compute.AUTO
    kv_dtype: str = AUTO
    weights: str = AUTO
    huge_pages: bool = True
    loop: str = AUTO
    attention: str = AUTO
    reforward: str = AUTO
    graphs: bool = True
    compiled: bool = False
    run_ahead: int | None = None

    def __post_init__(self) -> None:
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; choose one of {', '.join(known)}")
        for name in ("huge_pages", "graphs", "compiled"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r} is neither true nor false; give one of them")
        if self.weights == WeightForm.PACKED and self.compute == Compute.TORCH:
            raise ValueError(
                "weights='packed' is for compiled steps, and compute='torch' switches them off; leave out one"
            )
        ahead = self.run_ahead
        if ahead is not None and (isinstance(ahead, bool) or not isinstance(ahead, int) or ahead < 1):
            raise ValueError(f"run_ahead={ahead!r} is not allowed; give a number of steps from 1 up, or leave it out")

    @property
    def computing(self) -> dict[str, Any]:
        """All these options by name, as plain values."""
        found = {field.name: getattr(self, field.name) for field in dataclasses.fields(ComputeOptions)}
        return found | {"compute": str(self.compute)}


CHOICES: dict[str, tuple[str, ...]] = {
    "compute": tuple(Compute),
    "kv_dtype": (AUTO, *KV_DTYPES),
    "weights": tuple(WeightForm),
    "loop": (AUTO, "host", "device"),
    "attention": ATTENTION,
    "reforward": (AUTO, "chunk", "replay"),
}
"""Options that have names, and the names."""
