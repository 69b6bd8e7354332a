"""Why the numbers can be trusted: one masked forward of a compiled trace equals exact decoding, token by token.

The compiled plan of a trace is forwarded once, under the mask that its deaths define. The logits from which each
generated token is predicted have to be those of the slow twin: plain forwards of the pruned text (`off`, `recompute`)
or one forward under the block-by-block mask (`evict`). In fp64 both sides compute the same up to the order of sums;
where the library computes in fp32 (rotary angles, norms) it does so on equal inputs.
"""

import pytest
import torch

from hcot_lmeval.trace import IGNORE, Plan, compile_trace
from tests.random_traces import VOCAB_SIZE, random_trace
from tests.reference import (
    MARKERS,
    POLICIES,
    as_reference,
    masked_logits,
    plain_logits,
    reference_logits,
    rewrite,
    stages,
)
from tests.tiny import KINDS, tiny_model

PAIRS = (("hcot", "nested"), ("hcot", "soup"), ("pencil", "malformed"), ("pencil", "nested"), ("memento", "soup"))
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}


def twin(kind: str, dtype: torch.dtype = torch.float64, **config):
    # windows so short that most traces outgrow them
    window = {"sliding_window": 16} if kind in ("mistral", "gemma2", "phi3") else {}
    return as_reference(tiny_model(kind, dtype, **{"vocab_size": VOCAB_SIZE, **window, **config}))


def plan_logits(model, plan: Plan) -> torch.Tensor:
    """Returns the logits that predict the generated tokens, and those after the last one, [generated + 1, V]."""
    n = len(plan)
    mask = torch.tensor([[plan.visible(query, key) for key in range(n)] for query in range(n)])
    predicting = [row for row, target in enumerate(plan.targets) if target != IGNORE]
    return masked_logits(model, plan.ids, plan.positions, mask)[[*predicting, n - 1]]


@pytest.fixture(scope="module", params=KINDS)
def model(request):
    return twin(request.param)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("notation", "shape"), PAIRS)
def test_one_masked_forward_equals_exact_decoding(model, notation, shape, policy):
    markers = MARKERS[notation]
    for seed in range(2):
        ids, prompt_len = random_trace(seed, markers, length=30, shape=shape)
        plan = compile_trace(ids, prompt_len, markers, policy)
        expected = reference_logits(model, ids, prompt_len, markers, policy)
        difference = (plan_logits(model, plan) - expected).abs().max().item()
        assert difference <= TOLERANCE[torch.float64], f"seed {seed}: logits differ by {difference:.2e}"


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", KINDS)
def test_in_single_precision(kind, policy):
    model, markers = twin(kind, torch.float32), MARKERS["hcot"]
    ids, prompt_len = random_trace(5, markers, length=60, shape="nested")
    plan = compile_trace(ids, prompt_len, markers, policy)
    expected = reference_logits(model, ids, prompt_len, markers, policy)
    assert (plan_logits(model, plan) - expected).abs().max() <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("notation", MARKERS)
def test_stages_equal_the_packed_plan(notation):
    """Training on stages one by one and on the packed plan is the same: every target has the same distribution."""
    model, markers = twin("qwen2"), MARKERS[notation]
    for seed in range(4):
        ids, prompt_len = random_trace(seed, markers, length=50)
        parts = stages(ids, prompt_len, markers)
        assert [t for part in parts for t in part.ids[part.first_target :]] == ids[prompt_len:]
        rows = [plain_logits(model, part.ids)[part.first_target - 1 : -1] for part in parts]
        packed = plan_logits(model, compile_trace(ids, prompt_len, markers, "recompute"))[:-1]
        assert (torch.cat(rows) - packed).abs().max() <= TOLERANCE[torch.float64]


def test_stages_and_packed_plan_have_the_same_loss_and_gradients():
    model, markers = twin("qwen2"), MARKERS["hcot"]
    ids, prompt_len = random_trace(2, markers, length=70, shape="nested")

    def gradients(loss: torch.Tensor) -> tuple[float, list[torch.Tensor]]:
        model.zero_grad()
        loss.backward()
        return loss.item(), [p.grad.clone() for p in model.parameters() if p.grad is not None]

    staged = torch.zeros((), dtype=torch.float64)
    for part in stages(ids, prompt_len, markers):
        logits = model(torch.tensor([part.ids]), use_cache=False).logits[0, part.first_target - 1 : -1]
        targets = torch.tensor(part.ids[part.first_target :])
        staged = staged + torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    plan = compile_trace(ids, prompt_len, markers, "recompute")
    n = len(plan)
    mask = torch.tensor([[plan.visible(query, key) for key in range(n)] for query in range(n)])
    at = torch.tensor([plan.positions])
    logits = model(torch.tensor([plan.ids]), position_ids=at, attention_mask=mask[None, None], use_cache=False).logits
    packed = torch.nn.functional.cross_entropy(
        logits[0], torch.tensor(plan.targets), reduction="sum", ignore_index=IGNORE
    )
    (loss_a, grads_a), (loss_b, grads_b) = gradients(staged), gradients(packed)
    assert loss_a == pytest.approx(loss_b, rel=1e-12)
    for a, b in zip(grads_a, grads_b, strict=True):
        # the library's norms and rotary angles are fp32, and so is the rounding of their gradients
        assert (a - b).norm() <= 1e-5 * a.norm()


def test_the_policies_differ():
    """The controls: were nothing pruned, or the positions wrong, the comparisons above would notice."""
    model, markers = twin("llama"), MARKERS["hcot"]
    ids, prompt_len = random_trace(2, markers, length=60, shape="nested")
    assert len(rewrite(ids, prompt_len, markers).blocks) >= 3
    logits = {policy: reference_logits(model, ids, prompt_len, markers, policy) for policy in POLICIES}
    for a, b in (("off", "recompute"), ("off", "evict"), ("recompute", "evict")):
        assert (logits[a] - logits[b]).abs().max() > 0.1
    plan = compile_trace(ids, prompt_len, markers, "recompute")
    for spoilt in ({"death": [len(plan)] * len(plan)}, {"positions": plan.source}):
        wrong = Plan(**{**vars(plan), **spoilt})
        assert (plan_logits(model, wrong) - logits["recompute"]).abs().max() > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_the_twin_is_the_plain_model(kind):
    """Policy `off` is the library's own forward, and gemma2's textbook attention is its eager one."""
    ids, prompt_len = random_trace(3, MARKERS["hcot"], length=40)
    stock = tiny_model(kind, vocab_size=VOCAB_SIZE)
    stock.set_attn_implementation("eager")
    model = as_reference(tiny_model(kind, vocab_size=VOCAB_SIZE))
    expected = plain_logits(stock, ids)[prompt_len - 1 :]
    got = reference_logits(model, ids, prompt_len, MARKERS["hcot"], "off")
    assert (got - expected).abs().max() <= 2e-5
    causal = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
    masked = masked_logits(model, ids, range(len(ids)), causal)[prompt_len - 1 :]
    assert (masked - expected).abs().max() <= 2e-5
