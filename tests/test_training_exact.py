"""What is trained on is what is decoded: packed rows against stage splitting, the 4D mask, and the engine's samples.

The twins share nothing with the package but the model: stages and masks come from `tests.reference`, and the losses are
`torch.nn.functional.cross_entropy` on ordinary logits.
"""

from __future__ import annotations

import pytest
import torch
from bench_training import pack

from hcot_lmeval.engine import Engine, Request, SamplingParams
from hcot_lmeval.grammar import Grammar
from hcot_lmeval.trace import Policy
from hcot_lmeval.training.data.documents import Example, compile_document, split_stages
from hcot_lmeval.training.data.rows import collate
from hcot_lmeval.training.forward import LossSettings, install, loss_sums, token_logprobs
from tests.random_traces import SHAPES, random_trace
from tests.reference import EOS, MARKERS, as_reference, evict_mask, layer_masks, rewrite, stages
from tests.tiny import favour, tiny_model

MARKS = MARKERS["hcot"]
GRAMMAR = Grammar(markers=MARKS, think=(None, None), eos_ids=frozenset({EOS}))
PLAIN = LossSettings(GRAMMAR, weight=0, chunk=16)
KINDS = ("qwen2", "qwen3", "llama")
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-9, 1e-6


def traces(shape: str, count: int = 3, length: int = 60) -> list[Example]:
    found = []
    for seed in range(count):
        ids, prompt = random_trace(seed, MARKS, length + 7 * seed, shape)
        found.append(Example(tuple(ids[:prompt]), tuple(ids[prompt:]), None))
    return found


def batch_of(examples, policy, row_length):
    documents = [compile_document(example, GRAMMAR, policy, max_length=row_length) for example in examples]
    return collate(list(pack(documents, row_length)), row_length, 0)


def gradients(model) -> torch.Tensor:
    found = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    model.zero_grad()
    return found


def assert_same(model, loss: torch.Tensor, expected: torch.Tensor) -> None:
    """Compares two losses of one model, and their gradients."""
    assert expected.item() > 1
    assert abs(loss.item() - expected.item()) <= LOSS_TOLERANCE * abs(expected.item())
    loss.backward()
    ours = gradients(model)
    expected.backward()
    theirs = gradients(model)
    assert theirs.abs().max() > 0
    assert (ours - theirs).abs().max() <= GRADIENT_TOLERANCE * theirs.abs().max()


def stage_loss(model, example: Example) -> torch.Tensor:
    """The summed cross-entropy of the stages, each an ordinary forward from nothing."""
    ids, total = [*example.prompt_ids, *example.completion_ids], 0
    for stage in stages(ids, len(example.prompt_ids), MARKS):
        logits = model(torch.tensor([stage.ids]), use_cache=False).logits[0]
        targets = torch.tensor(stage.ids[stage.first_target :])
        total = total + torch.nn.functional.cross_entropy(logits[stage.first_target - 1 : -1], targets, reduction="sum")
    return total


def masked_loss(model, example: Example) -> torch.Tensor:
    """The summed cross-entropy of one forward under the mask that hides what was evicted."""
    ids, prompt = [*example.prompt_ids, *example.completion_ids], len(example.prompt_ids)
    positions = torch.arange(len(ids))
    masks = layer_masks(model, evict_mask(ids, prompt, MARKS), positions)
    logits = model(torch.tensor([ids]), position_ids=positions[None], attention_mask=masks, use_cache=False).logits[0]
    return torch.nn.functional.cross_entropy(logits[prompt - 1 : -1], torch.tensor(ids[prompt:]), reduction="sum")


def plain_loss(model, example: Example) -> torch.Tensor:
    ids, prompt = [*example.prompt_ids, *example.completion_ids], len(example.prompt_ids)
    logits = model(torch.tensor([ids]), use_cache=False).logits[0]
    return torch.nn.functional.cross_entropy(logits[prompt - 1 : -1], torch.tensor(ids[prompt:]), reduction="sum")


TWINS = {Policy.RECOMPUTE: stage_loss, Policy.EVICT: masked_loss, Policy.OFF: plain_loss}


@pytest.mark.parametrize("policy", TWINS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("row_length", [120, 600], ids=["one document a row", "all documents in one row"])
def test_packed_rows_equal_the_slow_twin(policy, kind, shape, row_length) -> None:
    examples = traces(shape)
    model = tiny_model(kind, torch.float64)
    expected = sum(TWINS[policy](model, example) for example in examples)
    install(model)
    batch = batch_of(examples, policy, row_length)
    assert len(batch["input_ids"]) == (1 if row_length == 600 else 3)
    assert_same(model, loss_sums(model, batch, PLAIN).objective, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_stages_equal_packed_rows(kind, shape) -> None:
    examples = traces(shape)
    model = tiny_model(kind, torch.float64)
    install(model)
    parts = [stage for example in examples for stage in split_stages(example, GRAMMAR, "recompute", max_length=120)]
    assert len(parts) > 2 * len(examples)
    split = loss_sums(model, collate(pack(parts, 120), 120, 0), PLAIN)
    packed = loss_sums(model, batch_of(examples, Policy.RECOMPUTE, 120), PLAIN)
    assert split.counts.tolist() == packed.counts.tolist()
    assert_same(model, packed.objective, split.objective)


@pytest.mark.parametrize("kind", ["mistral", "gemma2"])
@pytest.mark.parametrize("policy", [Policy.RECOMPUTE, Policy.EVICT])
def test_sliding_windows_and_soft_caps_are_kept(kind, policy) -> None:
    examples = traces("nested")
    model = as_reference(tiny_model(kind, torch.float64))
    expected = sum(TWINS[policy](model, example) for example in examples)
    model.set_attn_implementation("eager")
    install(model)
    loss = loss_sums(model, batch_of(examples, policy, 400), PLAIN).objective
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)  # eager attention rounds to single precision


def test_a_wrong_policy_gives_another_loss() -> None:
    """Were nothing ever pruned, or everything, the tests above would not notice a mask that is never used."""
    examples = traces("nested")
    assert any(rewrite([*e.prompt_ids, *e.completion_ids], len(e.prompt_ids), MARKS).blocks for e in examples)
    model = tiny_model("qwen2", torch.float64)
    install(model)
    losses = [loss_sums(model, batch_of(examples, policy, 600), PLAIN).objective.item() for policy in Policy]
    assert min(abs(a - b) for i, a in enumerate(losses) for b in losses[:i]) > 0.01


def test_gradient_checkpointing_changes_nothing() -> None:
    batch = batch_of(traces("nested"), Policy.RECOMPUTE, 600)
    model = tiny_model("qwen3", torch.float64)
    install(model)
    plain = loss_sums(model, batch, PLAIN).objective
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    assert_same(model, loss_sums(model, batch, PLAIN).objective, plain)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("policy", Policy)
def test_log_probabilities_are_those_that_the_engine_sampled_with(kind, policy) -> None:
    model = favour(tiny_model(kind), [MARKS.open, MARKS.split, MARKS.close])
    requests = [  # a nested beginning, so that thoughts are pruned, and then what the model likes
        Request(
            str(i),
            example.prompt_ids,
            SamplingParams(max_gen_toks=90, temperature=1.0, seed=i, logprobs=True),
            forced_ids=example.completion_ids[:50],
        )
        for i, example in enumerate(traces("nested", 8))
    ]
    engine = Engine(model, policy=policy, markers=MARKS, eos_ids=(EOS,), any_policy=True)
    done = engine.generate(requests)
    assert policy is Policy.OFF or sum(c.statistics.prune_events for c in done) > 8
    install(model)
    for completion in done:
        example = Example(completion.request.prompt_ids, completion.token_ids, None)
        batch = batch_of([example], policy, 600)
        with torch.no_grad():
            found = token_logprobs(model, batch)[batch["shift_labels"] != -100]
        torch.testing.assert_close(found, torch.tensor(completion.logprobs), rtol=0, atol=1e-4)


def test_head_that_does_more_is_refused() -> None:
    model = tiny_model("qwen2")
    plain = model.forward
    model.forward = lambda **kwargs: (out := plain(**kwargs), setattr(out, "logits", out.logits * 2))[0]
    with pytest.raises(ValueError, match="does more to its logits"):
        install(model)
