"""Before the first step with FlexAttention: loss and gradients of packed traces against those under a dense mask.

FlexAttention has its backward pass on CUDA alone, and has met few cards and releases. If it is wrong here, training
goes on with the dense mask, which is the same computation in memory that grows with the square of the row; where that
does not fit, the run ends with the reason.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

from hcot_lmeval.engine.device.proof import tolerance_of, trials
from hcot_lmeval.engine.slots import free_bytes
from hcot_lmeval.trace import Policy
from hcot_lmeval.training.data.documents import Example
from hcot_lmeval.training.forward import Batch, LossSettings, causal_lm, install, loss_sums
from hcot_lmeval.training.traces import pack_traces

logger = logging.getLogger(__name__)

FLEX, DENSE = "flex_attention", "sdpa"
SHARE = 0.25
"""Of the free memory, that the masks of a step may take."""


def settle_attention(model: Any, settings: LossSettings, policy: Policy, *, row_length: int, rows: int = 1) -> str:
    """Returns the attention that the model trains with, set on it; nothing is compared unless it is FlexAttention.

    Args:
        model: causal language model, bare or a PEFT model, on its device.
        settings: grammar and chunk of the losses.
        policy: of the traces.
        row_length: tokens of a row.
        rows: of a batch.

    Raises:
        ValueError: FlexAttention is wrong, and a dense mask for rows of this length does not fit.
    """
    inner = causal_lm(model)
    implementation = str(inner.config.get_text_config()._attn_implementation)
    if implementation != FLEX:
        return implementation
    if any(parameter.is_meta for parameter in inner.parameters()):
        return implementation  # weights that are not there yet cannot be compared
    fault = fault_of_flex(model, settings, policy)
    if not fault:
        return implementation
    size = rows * row_length**2 * inner.dtype.itemsize
    if size > SHARE * free_bytes(inner.device):
        raise ValueError(
            f"attention={FLEX} is wrong on this machine ({fault}), and the dense mask of {rows} rows of {row_length} "
            f"tokens would take {size / 2**30:.1f} GiB; lower data.row_length, or update PyTorch"
        )
    logger.warning(
        "attention=%s is not used: %s. Training goes on with a dense mask (attention=%s)", FLEX, fault, DENSE
    )
    inner.set_attn_implementation(DENSE)
    return DENSE


def fault_of_flex(model: Any, settings: LossSettings, policy: Policy) -> str:
    """Returns what is wrong with FlexAttention on packed traces, in words; empty if nothing is."""
    inner = causal_lm(model)
    markers, known = settings.grammar.markers, int(inner.get_input_embeddings().weight.shape[0])
    text = [i for i in range(min(2000, known)) if i not in settings.grammar.control_ids]
    traces = [Example(one.prompt_ids, one.forced_ids or one.prompt_ids) for one in trials(markers, text)]
    batch = pack_traces(traces, settings.grammar, policy).to(inner.device).batch
    install(model)
    training = model.training
    model.eval()  # dropout would make two runs differ
    try:
        inner.set_attn_implementation(DENSE)
        expected = _measure(model, batch, settings)
        inner.set_attn_implementation(FLEX)
        found = _measure(model, batch, settings)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of a compiler, say
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    finally:
        model.train(training)
        inner.set_attn_implementation(FLEX)
    most = tolerance_of(inner.dtype)
    for name, value in expected.items():
        other = found[name]
        if not bool(other.isfinite().all()):
            return f"its {name} is NaN or infinite"
        difference = float((value - other).norm() / value.norm().clamp_min(1e-12))
        if difference > most:
            return f"its {name} is off by {difference:.1e} of its norm (allowed: {most:.0e})"
    return ""


def _measure(model: Any, batch: Batch, settings: LossSettings) -> dict[str, torch.Tensor]:
    """The loss, and the gradients of all weights that are trained, as one vector each for some of them."""
    parameters = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    before = [p.grad for _, p in parameters]
    for _, parameter in parameters:
        parameter.grad = None
    try:
        loss = loss_sums(model, batch, settings).objective
        loss.backward()
        found = {"loss": loss.detach().double().reshape(1)}
        for name, parameter in parameters[:: max(1, len(parameters) // 16)]:
            if parameter.grad is not None:
                found[f"gradient of {name}"] = parameter.grad.detach().double().flatten().clone()
        return found
    finally:
        for (_, parameter), gradient in zip(parameters, before, strict=True):
            parameter.grad = gradient
