"""Every attention backend against the textbook, on the shapes and dtypes that models have."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from hcot_lmeval.engine.device.choice import COARSE_TOLERANCE, MAKERS, TOLERANCE, errors
from hcot_lmeval.engine.device.state import on
from hcot_lmeval.engine.slots import LayerSpec

FLOAT8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Probe:
    """One backend on one kind of layer.

    Attributes:
        backend: its name.
        layer: what kind of layer.
        errors: largest errors of single queries and of chunks, relative to the largest entry; empty if it did not run.
        reason: why it did not run.
        passed: whether all errors are allowed; what did not run fails only if it raised an error.
    """

    backend: str
    layer: str
    errors: tuple[float, ...] = ()
    reason: str = ""
    passed: bool = True


def layers(device: torch.device) -> dict[str, LayerSpec]:
    """Returns kinds of layers: grouped heads, windows, soft caps, sinks, in several dtypes."""
    plain = LayerSpec(12, 2, 128, 128, torch.bfloat16, device)
    single = plain._replace(dtype=torch.float32)
    return {
        "12/2 heads of 128, bfloat16": plain,
        "12/2 heads of 128, float16": plain._replace(dtype=torch.float16),
        "12/2 heads of 128, float32": single,
        "32/8 heads of 64, bfloat16": LayerSpec(32, 8, 64, 64, torch.bfloat16, device),
        "window of 70, bfloat16": plain._replace(window=70),
        "window of 70, float32": single._replace(window=70),
        "soft cap, window, 256, bfloat16": LayerSpec(8, 4, 256, 256, torch.bfloat16, device, window=70, softcap=50.0),
        "sinks, bfloat16": LayerSpec(64, 8, 64, 64, torch.bfloat16, device, window=128, sinks=True),
        "slots in float8, bfloat16": plain._replace(stored=FLOAT8),
    }


def probe_all(device: torch.device) -> Iterator[Probe]:
    """Yields what every backend makes of every kind of layer."""
    with on(device):
        for name in MAKERS:
            for layer, need in layers(device).items():
                yield probe(name, layer, need)


def probe(name: str, layer: str, need: LayerSpec) -> Probe:
    """Returns what one backend makes of one kind of layer."""
    try:
        backend = MAKERS[name]()
    except Exception as error:  # a package that is missing, or one that is broken
        return Probe(name, layer, reason=_first_line(error))
    reason = backend.refuses(need)
    if reason:
        return Probe(name, layer, reason=reason)
    try:
        with torch.inference_mode():
            found = tuple(error for _, error in errors(backend, need))
    except Exception as error:  # whatever a kernel that does not compile or run here raises
        return Probe(name, layer, reason=f"{type(error).__name__}: {_first_line(error)}", passed=False)
    allowed = TOLERANCE.get(need.dtype, COARSE_TOLERANCE)
    return Probe(name, layer, found, passed=all(error <= allowed for error in found))


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
