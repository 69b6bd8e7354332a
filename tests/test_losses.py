"""The losses without full logits against the obvious ones with them, which write every sum out row by row.

The twin asks `Grammar.illegal` for the illegal tokens of a row and shares nothing else with the package.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import cross_entropy, linear

from hcot_lmeval.grammar import Grammar, State, TokenClass, label_tokens
from hcot_lmeval.trace import IGNORE
from hcot_lmeval.training.losses import LossSums, packed_losses
from tests.random_traces import VOCAB_SIZE, random_trace
from tests.reference import EOS, MARKERS

THINK = (7, 2)
GRAMMARS = {name: Grammar(markers, THINK, frozenset({EOS})) for name, markers in MARKERS.items()}
HCOT = GRAMMARS["hcot"]
WIDTH = 6
WEIGHTS = (0.0, 1.0, 5.0)


class SoftCapped(torch.nn.Module):
    """An output head with a bias and Gemma's soft cap, that counts the rows which it is given."""

    def __init__(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(seed)
        self.weight = torch.nn.Parameter(torch.randn(VOCAB_SIZE, WIDTH, dtype=dtype, generator=random))
        self.bias = torch.nn.Parameter(torch.randn(VOCAB_SIZE, dtype=dtype, generator=random))
        self.rows: list[int] = []

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        self.rows.append(len(hidden))
        return 5 * torch.tanh(linear(hidden, self.weight, self.bias) / 5)


def batch(grammar: Grammar, shape: str, length: int = 40) -> list[torch.Tensor]:
    """Targets, states and classes of a random trace, the prompt's rows and some more without a target: [N] each."""
    ids, prompt = random_trace(3, grammar.markers, length, shape)
    ids += [THINK[1], 9, 10, EOS]
    labels = label_tokens(ids, prompt, grammar)
    rows = [(IGNORE, 0, 0)] * prompt
    rows += [(t, label.state, label.token_class) for t, label in zip(ids[prompt:], labels, strict=True)]
    rows[prompt + 5 : prompt + 5] = [(IGNORE, 0, 0)] * 4
    return [torch.tensor(column) for column in zip(*rows, strict=True)]


def hidden_of(rows: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    hidden = torch.randn(rows, WIDTH, dtype=dtype, generator=torch.Generator().manual_seed(1))
    return hidden.requires_grad_()


def mass_term(log_p: torch.Tensor, illegal: list[int]) -> torch.Tensor:
    """The structure term of one row, from the log-probabilities [V] of all tokens."""
    legal = [i for i in range(len(log_p)) if i not in illegal]
    return -log_p[legal].exp().sum().log()


def obvious(hidden, targets, states, classes, head, grammar: Grammar, weight: float) -> LossSums:
    """The slow twin."""
    log_p = head(hidden).log_softmax(-1)
    objective, term, by_class, counts = log_p.new_zeros(()), log_p.new_zeros(()), [0.0] * 4, [0] * 4
    for row, (target, state, member) in enumerate(
        zip(targets.tolist(), states.tolist(), classes.tolist(), strict=True)
    ):
        if target == IGNORE:
            continue
        loss = -log_p[row, target]
        by_class[member] += loss.item()
        counts[member] += 1
        objective = objective + loss
        banned = grammar.illegal(State(state))
        if target in banned or (state == State.LEAD and target != grammar.markers.lead):
            continue
        term = term + mass_term(log_p[row], sorted(banned))
    return LossSums(objective + weight * term, log_p.new_tensor(by_class), term, torch.tensor(counts))


def gradients(loss: torch.Tensor, hidden: torch.Tensor, head: torch.nn.Module) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, [hidden, *head.parameters()]))


@pytest.mark.parametrize("chunk", [1, 7, 1024])
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize(("notation", "shape"), [("hcot", "nested"), ("hcot", "malformed"), ("memento", "malformed")])
def test_losses_and_gradients_equal_the_obvious_ones(notation, shape, weight, chunk) -> None:
    grammar, head = GRAMMARS[notation], SoftCapped()
    columns = batch(grammar, shape)
    hidden = hidden_of(len(columns[0]))
    expected = obvious(hidden, *columns, head, grammar, weight)
    found = packed_losses(hidden, *columns, head, grammar, weight, chunk)
    close = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(found.objective, expected.objective, **close)
    torch.testing.assert_close(found.structure, expected.structure.detach(), **close)
    torch.testing.assert_close(found.cross_entropy, expected.cross_entropy, **close)
    assert found.counts.tolist() == expected.counts.tolist()
    assert found.structure > 0
    ours, theirs = gradients(found.objective, hidden, head), gradients(expected.objective, hidden, head)
    for mine, other in zip(ours, theirs, strict=True):
        assert other.abs().max() > 0
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-11)


def test_compiled_losses_are_the_same() -> None:
    """Dynamo would decide a comparison with a member of an IntEnum by its type."""
    columns = batch(GRAMMARS["memento"], "malformed")
    hidden, head = hidden_of(len(columns[0])), torch.nn.Linear(WIDTH, VOCAB_SIZE, dtype=torch.float64)
    inputs = (hidden, *columns, head, GRAMMARS["memento"], 5.0, 1024)
    plain, compiled = packed_losses(*inputs), torch.compile(packed_losses, backend="eager")(*inputs)
    for name in ("objective", "cross_entropy", "structure", "counts"):
        torch.testing.assert_close(getattr(compiled, name), getattr(plain, name))


def test_every_state_and_class_and_illegal_targets_occur_above() -> None:
    seen = [
        set(zip(*(c.tolist() for c in batch(GRAMMARS["memento"], shape)), strict=True))
        for shape in ("nested", "malformed")
    ]
    rows = [row for found in seen for row in found if row[0] != IGNORE]
    assert {state for _, state, _ in rows} == set(State)
    assert {member for _, _, member in rows} == set(TokenClass)
    assert any(target in GRAMMARS["memento"].illegal(State(state)) for target, state, _ in rows)


def test_gradients_equal_finite_differences() -> None:
    columns, head = batch(HCOT, "malformed", 20), SoftCapped()

    def objective(hidden, weight, bias):
        return packed_losses(
            hidden, *columns, lambda h: 5 * torch.tanh(linear(h, weight, bias) / 5), HCOT, 2.0, 7
        ).objective

    assert torch.autograd.gradcheck(objective, (hidden_of(len(columns[0])), head.weight, head.bias), fast_mode=True)


@pytest.mark.parametrize("state", [State.OUTSIDE, State.THOUGHT, State.SOLUTION, State.ANSWER])
def test_cross_entropy_is_that_among_legal_tokens_and_the_mass_term(state) -> None:
    """-log p_y = -log p(y | legal) - log M, row by row."""
    head, target, terms = SoftCapped(), 9, []
    for hidden in hidden_of(12).split(1):
        row = [torch.tensor([x]) for x in (target, state, TokenClass.TEXT)]
        sums = packed_losses(hidden, *row, head, HCOT)
        legal = head(hidden).detach()[0]
        legal[sorted(HCOT.illegal(state))] = -math.inf
        among_legal = -legal.log_softmax(-1)[target]
        assert abs(sums.cross_entropy.sum() - (among_legal + sums.structure)) < 1e-12
        terms.append(sums.structure.item())
    assert max(terms) > 0.05


def test_the_mass_term_leaves_the_odds_of_legal_tokens_alone() -> None:
    """Its gradient in the logits of the legal tokens is proportional to their probabilities: all rise alike."""
    logits = hidden_of(1).new_zeros(1, VOCAB_SIZE).normal_(generator=torch.Generator().manual_seed(0)).requires_grad_()
    row = [torch.tensor([x]) for x in (9, State.THOUGHT, TokenClass.TEXT)]

    def objective(weight: float) -> torch.Tensor:
        return packed_losses(logits, *row, lambda z: z, HCOT, weight).objective

    change = torch.autograd.grad(objective(1.0) - objective(0.0), logits)[0][0]
    illegal = sorted(HCOT.illegal(State.THOUGHT))
    legal = [i for i in range(VOCAB_SIZE) if i not in illegal]
    ratio = change[legal] / logits.detach().softmax(-1)[0, legal]
    assert (change[illegal] > 0).all()
    assert ratio[0] < 0
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-10, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_illegal_mass_there_is_no_structure_loss(dtype) -> None:
    """A head that never allows a control token: the term is 0 and its gradient too, not NaN."""
    head, hidden = SoftCapped(dtype), hidden_of(20, dtype)
    control = torch.zeros(VOCAB_SIZE, dtype=torch.bool)
    control[sorted(HCOT.control_ids)] = True
    columns = [torch.arange(20) + 20, torch.arange(20) % 3, torch.zeros(20, dtype=torch.int64)]

    def sums(weight: float) -> LossSums:
        return packed_losses(hidden, *columns, lambda h: head(h).masked_fill(control, -math.inf), HCOT, weight, chunk=7)

    found, plain = sums(1.0), sums(0.0)
    assert found.structure == 0
    assert found.objective == plain.objective
    for mine, other in zip(*(gradients(s.objective, hidden, head) for s in (found, plain)), strict=True):
        assert other.isfinite().all()
        assert torch.equal(mine, other)


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_impossible_tokens_give_no_nan_in_any_state(weight, state) -> None:
    """The state with the most illegal ids has no filling in its list, so that all of it may be -inf."""
    grammar = GRAMMARS["memento"]
    target = grammar.markers.lead if state is State.LEAD else 9
    logits = torch.zeros(1, VOCAB_SIZE)
    logits[0, sorted(grammar.illegal(state))] = -math.inf
    logits.requires_grad_()
    row = [torch.tensor([x]) for x in (target, state, grammar.token_class(target, state))]
    sums = packed_losses(logits, *row, lambda z: z, grammar, weight)
    slope = torch.autograd.grad(sums.objective, logits)[0]
    assert sums.structure == 0
    torch.testing.assert_close(slope, torch.autograd.grad(-logits.log_softmax(-1)[0, target], logits)[0])


def test_illegal_targets_get_no_structure_loss() -> None:
    """Also text where the lead token had to come, which no list of illegal ids holds."""
    memento = GRAMMARS["memento"]
    marks = memento.markers
    rows = [(marks.close, State.OUTSIDE), (EOS, State.THOUGHT), (marks.split, State.SOLUTION), (9, State.LEAD)]
    rows += [(marks.close, State.LEAD), (marks.open, State.ANSWER), (marks.open, State.THOUGHT)]
    targets, states = (torch.tensor(column) for column in zip(*rows, strict=True))
    hidden, head = hidden_of(len(rows)), SoftCapped()
    found = packed_losses(hidden, targets, states, targets * 0, head, memento)
    assert found.structure == 0
    assert found.objective == found.cross_entropy.sum()
    lead = [torch.tensor([x]) for x in (marks.lead, State.LEAD, TokenClass.MARKER)]
    assert packed_losses(hidden[:1], *lead, head, memento).structure > 0.01


def favouring(excess: float, state: State, generator: torch.Generator) -> torch.Tensor:
    """Logits [1, V] in fp64, exact in fp32, in which the illegal tokens weigh e^excess times as much as the legal."""
    logits = 20 + 2 * torch.randn(1, VOCAB_SIZE, dtype=torch.float64, generator=generator)
    illegal = torch.zeros(VOCAB_SIZE, dtype=torch.bool)
    illegal[sorted(HCOT.illegal(state))] = True
    logits[:, illegal] += logits[:, ~illegal].logsumexp(-1) - logits[:, illegal].logsumexp(-1) + excess
    return logits.float().double()


@pytest.mark.parametrize("excess", [-200.0, -60.0, -20.0, -3.0, 0.0, 3.0, 12.0, 15.0, 18.0, 60.0, 1000.0])
def test_single_precision_is_accurate_at_any_illegal_mass(excess) -> None:
    """1 - exp(...) would not be: from 12 nats on it is rounding error, and so is what it teaches."""
    results = []
    for dtype in (torch.float64, torch.float32):
        logits = favouring(excess, State.THOUGHT, torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
        row = [torch.tensor([x]) for x in (9, State.THOUGHT, TokenClass.TEXT)]
        sums = packed_losses(logits, *row, lambda z: z, HCOT, 3.0)
        results.append((sums.objective, sums.structure, torch.autograd.grad(sums.objective, logits)[0]))
    for exact, rounded in zip(*results, strict=True):
        assert rounded.dtype == torch.float32
        assert exact.abs().max() > 0 or excess < -100
        torch.testing.assert_close(rounded.double(), exact, rtol=2e-4, atol=1e-5 if exact.dim() else 1e-40)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_mass_term_grows_with_what_is_illegal(dtype) -> None:
    """log(1 + e^excess): far up the excess itself, with all its pull; far down the mass. All other logits are -inf."""
    row = [torch.tensor([x]) for x in (9, State.ANSWER, TokenClass.TEXT)]
    for excess in (-math.inf, -300.0, -8.0, 0.0, 10.0, 40.0, 3008.0):  # all of them bf16 numbers
        expected = math.log1p(math.exp(excess)) if excess < 30 else excess
        logits = torch.full((1, VOCAB_SIZE), -math.inf, dtype=dtype)
        logits[0, [9, HCOT.markers.close]] = torch.tensor([0.0, excess], dtype=dtype)
        logits.requires_grad_()
        sums = packed_losses(logits, *row, lambda z: z, HCOT, 1.0)
        assert sums.structure.item() == pytest.approx(expected, rel=1e-5, abs=1e-30)
        assert sums.objective.item() == pytest.approx(2 * expected, rel=1e-5, abs=1e-30)
        slope = torch.autograd.grad(sums.objective, logits)[0][0].float()
        pull = 2 * -math.expm1(-expected)
        assert slope[[9, HCOT.markers.close]].tolist() == pytest.approx([-pull, pull], rel=1e-2, abs=1e-30)
        assert not slope[[i for i in range(VOCAB_SIZE) if i not in (9, HCOT.markers.close)]].any()


@pytest.mark.parametrize("chunk", [1, 7, 1024])
def test_logits_exist_for_a_chunk_at_a_time(chunk) -> None:
    head, columns = SoftCapped(), batch(HCOT, "nested", 80)
    hidden, wanted = hidden_of(len(columns[0])), int((columns[0] != IGNORE).sum())
    saved: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t.shape), t)[1], lambda t: t):
        sums = packed_losses(hidden, *columns, head, HCOT, 1.0, chunk)
    assert sum(head.rows) == wanted
    assert max(head.rows) == min(chunk, wanted)
    assert saved
    assert not [
        shape for shape in saved if shape[-1:] == (VOCAB_SIZE,)
    ]  # nothing as wide as the vocabulary waits for backward
    head.rows.clear()
    sums.objective.backward()
    assert sum(head.rows) == wanted
    assert max(head.rows) == min(chunk, wanted)


def test_without_targets_the_gradients_are_zeros() -> None:
    """DDP waits for a gradient of every parameter, also where a process has nothing to learn."""
    head, hidden = SoftCapped(), hidden_of(5)
    nothing = torch.zeros(5, dtype=torch.int64)
    sums = packed_losses(hidden, nothing + IGNORE, nothing, nothing, head, HCOT)
    sums.objective.backward()
    assert (sums.objective.item(), sums.structure.item()) == (0, 0)
    assert sums.cross_entropy.tolist() == sums.counts.tolist() == [0, 0, 0, 0]
    assert all(p.grad is not None and not p.grad.any() for p in [hidden, *head.parameters()])


def test_rows_without_a_target_do_not_matter() -> None:
    """Not even NaN, as the hidden states of padding may be."""
    head, columns = SoftCapped(), batch(HCOT, "nested")
    skipped = columns[0] == IGNORE
    clean = hidden_of(len(skipped))
    dirty = clean.detach().clone().masked_fill(skipped[:, None], math.nan).requires_grad_()
    results = [packed_losses(hidden, *columns, head, HCOT) for hidden in (clean, dirty)]
    assert results[0].objective == results[1].objective
    slope = gradients(results[1].objective, dirty, head)[0]
    assert torch.equal(slope, gradients(results[0].objective, clean, head)[0])
    assert not slope[skipped].any()


@pytest.mark.parametrize("autocast", [False, True])
def test_coarse_logits_are_summed_in_single_precision(autocast) -> None:
    columns = batch(HCOT, "nested", 200)
    head = SoftCapped(torch.float32 if autocast else torch.bfloat16)
    hidden = hidden_of(len(columns[0]), head.weight.dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        sums = packed_losses(hidden, *columns, head, HCOT, 0.0, chunk=7)
        logits = head(hidden).float()
    assert logits.eq(logits.bfloat16()).all()  # they are coarse; the losses are not
    assert {sums.objective.dtype, sums.cross_entropy.dtype, sums.structure.dtype} == {torch.float32}
    expected = cross_entropy(logits.double(), columns[0], reduction="sum", ignore_index=IGNORE)
    assert sums.objective.item() == pytest.approx(expected.item(), rel=1e-6)
    assert sums.cross_entropy.sum().item() == pytest.approx(expected.item(), rel=1e-6)
    assert [g.dtype for g in gradients(sums.objective, hidden, head)] == [hidden.dtype] * 3


def test_sums_add_up() -> None:
    head, columns = SoftCapped(), batch(HCOT, "malformed")
    hidden = hidden_of(len(columns[0]))
    halves = [
        packed_losses(hidden[part], *(c[part] for c in columns), head, HCOT) for part in (slice(0, 20), slice(20, None))
    ]
    whole, added = packed_losses(hidden, *columns, head, HCOT), halves[0] + halves[1]
    for name in ("objective", "cross_entropy", "structure", "counts"):
        torch.testing.assert_close(getattr(added, name), getattr(whole, name), rtol=1e-12, atol=0)
    assert added.objective.requires_grad
    assert not added.map(torch.Tensor.detach).objective.requires_grad
    assert not any(part.requires_grad for part in (added.cross_entropy, added.structure, added.counts))
    loss, _, by_class = added.means()
    assert loss == pytest.approx((added.cross_entropy.sum() / added.counts.sum()).item())
    assert [math.isnan(mean) for mean in by_class] == (added.counts == 0).tolist()


def test_a_chunk_has_a_row() -> None:
    columns = batch(HCOT, "nested")
    with pytest.raises(ValueError, match="chunk=0 is not allowed"):
        packed_losses(hidden_of(len(columns[0])), *columns, SoftCapped(), HCOT, chunk=0)
