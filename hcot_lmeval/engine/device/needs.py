"""What the device's loop leaves to the host's, by the names of the options that ask for it."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from hcot_lmeval.engine.decoder import Decoder
from hcot_lmeval.engine.options import EngineOptions
from hcot_lmeval.engine.rows import Request

logger = logging.getLogger(__name__)


def runs_on_device(decoder: Decoder, options: EngineOptions, requests: Sequence[Request], *, watched: bool) -> bool:
    """Whether the device's loop runs the steps; arguments as in `obstacles`.

    Raises:
        ValueError: it was asked for and cannot serve these requests.
    """
    if options.loop == "host" or (options.loop == "auto" and decoder.device.type != "cuda"):
        return False
    found = obstacles(decoder, options, requests, watched=watched)
    if found and options.loop == "device":
        raise ValueError(
            f"loop='device' cannot serve {', '.join(found)}; leave that out, or choose loop='auto', which takes the "
            "loop of the host where it has to"
        )
    if found:
        logger.info("the host runs the steps, since the device's loop cannot serve %s", ", ".join(found))
    return not found


def obstacles(decoder: Decoder, options: EngineOptions, requests: Sequence[Request], *, watched: bool) -> list[str]:
    """Returns why these requests need the host's loop, each in a few words; nothing if they do not.

    Args:
        decoder: the model.
        options: of the engine.
        requests: what is to be generated.
        watched: whether somebody wants the logits of every token.
    """
    found = [f"{name}={value}" for name, value in options.controls.items() if name != "loop_tokens"]
    if options.ablation is not None:
        found.append(f"ablation={options.ablation}")
    if options.prompt_acts:
        found.append("prompt_acts=True")
    if watched:
        found.append("on_logits")
    penalties = sorted({r.params.repetition_penalty for r in requests} - {1.0})
    found += [f"repetition_penalty={penalty:g}" for penalty in penalties]
    if any(r.params.logprobs for r in requests):
        found.append("logprobs=True")
    devices = sorted({str(shape.device) for shape in decoder.layers.values()})
    if len(devices) > 1:
        found.append(f"a model on {', '.join(devices)}")
    return found
