"""Reinforcement learning: the contexts of the loss are those of the rollouts, and rewards that cannot be hacked."""

import functools
import re

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hcot_lmeval import Engine, synthetic
from hcot_lmeval.assets import resolve
from hcot_lmeval.grammar import Grammar
from hcot_lmeval.response import Response
from hcot_lmeval.training.config import REWARD_WEIGHTS, GuardsConfig
from hcot_lmeval.training.data.documents import Example
from hcot_lmeval.training.forward import LossSettings, install, loss_sums
from hcot_lmeval.training.rewards import REWARDS, WeightedSum
from hcot_lmeval.training.rollout import Rollout, Shape, shape_of
from hcot_lmeval.training.traces import pack_traces, trace_scores
from tests.full import FULL

pytest.importorskip("trl")
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
CONSTRAINED = {"constraints": "grammar", "max_depth": 2, "force_answer": 8, "max_block_tokens": 12}
POLICIES = {"recompute": "tiny-hcot", "evict": "tiny-evict", "off": "tiny-hcot"}
COUNT = 200 if FULL else 24


@functools.cache
def tokenizer(name: str):
    return AutoTokenizer.from_pretrained(resolve(name))


def model_of(policy: str, dtype=torch.float32, *, lora: bool = False):
    model = AutoModelForCausalLM.from_pretrained(resolve(POLICIES[policy]), dtype=dtype)
    if lora:
        import peft

        torch.manual_seed(0)
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    return model


def questions(count: int, depths=(2, 3, 4)) -> list[str]:
    return [row["question"] for row in synthetic.training_rows("arith", "train", size=count, depths=depths, seed=77)]


def rollout_of(policy: str, engine: Engine, **options) -> Rollout:
    grammar = Grammar(engine.markers, engine._think_ids, engine.limits.eos_ids)
    return Rollout(tokenizer(POLICIES[policy]), grammar, policy=policy, temperature=1.3, batch_size=8, **options)


def differences(model, written, rollout) -> torch.Tensor:
    """Of each generated token: trainer's log-probability minus the engine's."""
    install(model)
    traces = [Example(one.request.prompt_ids, one.token_ids) for one in written]
    directives = [one.directives for one in written]
    packed = pack_traces(traces, rollout.grammar, rollout.policy, directives=directives)
    scores = trace_scores(model, packed, temperature=rollout.temperature)
    engine = torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(one.legal_logprobs, dtype=torch.float64) for one in written], batch_first=True
    )
    return scores.logprobs.double() - engine


@pytest.mark.parametrize("constraints", [{}, CONSTRAINED], ids=["free", "constrained"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("policy", POLICIES)
def test_the_loss_sees_what_the_policy_saw(policy, dtype, lora, constraints):
    if lora and dtype is torch.float32:
        pytest.skip("LoRA in float64 says as much")
    model = model_of(policy, dtype, lora=lora)
    name = tokenizer(POLICIES[policy])
    probe = Engine(model, name, policy=policy, any_policy=True)
    rollout = rollout_of(policy, probe, max_context=200, max_gen_toks=150, **constraints)
    prompts = [probe.encode(question) for question in questions(COUNT)]
    written = rollout(model, prompts, range(COUNT))
    found = differences(model, written, rollout)
    largest = max(1.0, *(-min(one.legal_logprobs) for one in written))  # logits of unlikely tokens are large
    assert float(found.abs().max()) <= TOLERANCE[dtype] * (largest if dtype is torch.float32 else 1)
    prunes = sum(one.statistics.prune_events for one in written)
    assert (prunes > COUNT) == (policy != "off")
    assert any(one.directives for one in written) == bool(constraints)

    (found**2).sum().backward()  # finite gradients, also through what was barred
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert all(torch.isfinite(p.grad).all() for p in parameters if p.grad is not None)
    with torch.no_grad():  # an optimiser's step: the engine that was kept has to notice
        for parameter in parameters:
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.manual_seed(1)).to(parameter.dtype))
    after = rollout(model, prompts[:8], range(8))
    assert all(one.logprobs != before.logprobs for one, before in zip(after, written, strict=False))
    largest = max(1.0, *(-min(one.legal_logprobs) for one in after))
    assert float(differences(model, after, rollout).abs().max()) <= TOLERANCE[dtype] * largest


def test_one_causal_text_is_another_policy():
    """What a trainer does that knows nothing of pruning is off by nats."""
    model = model_of("recompute")
    probe = Engine(model, tokenizer("tiny-hcot"))
    rollout = rollout_of("recompute", probe, max_context=200, max_gen_toks=300)
    written = rollout(model, [probe.encode(question) for question in questions(8, (4, 5))], range(8))
    worst = []
    for one in written:
        ids = torch.tensor([one.request.prompt_ids + one.token_ids])
        scores = (model(ids).logits[0, :-1] / 1.3).log_softmax(-1)
        plain = scores.gather(-1, ids[0, 1:, None])[-len(one.token_ids) :, 0]
        worst.append(float((plain - torch.tensor(one.logprobs)).abs().max()))
    assert max(worst) > 2


def test_rows_are_shared_and_say_the_same():
    model = model_of("recompute", torch.float64)
    probe = Engine(model, tokenizer("tiny-hcot"))
    rollout = rollout_of("recompute", probe, max_context=200, max_gen_toks=200)
    written = rollout(model, [probe.encode(question) for question in questions(12, (1, 2, 4))], range(12))
    traces = [Example(one.request.prompt_ids, one.token_ids) for one in written]
    install(model)
    packed = pack_traces(traces, rollout.grammar, "recompute")
    alone = [pack_traces([trace], rollout.grammar, "recompute") for trace in traces]
    assert packed.batch["input_ids"].shape[0] < len(traces)
    for scores, each, trace in zip(trace_scores(model, packed).logprobs, alone, traces, strict=True):
        count = len(trace.completion_ids)
        assert torch.allclose(scores[:count], trace_scores(model, each).logprobs[0], atol=1e-12)
        assert not scores[count:].any()
    with pytest.raises(ValueError, match="there are no traces to pack"):
        pack_traces([], rollout.grammar, "recompute")
    with pytest.raises(ValueError, match="do not fit into rows of 8"):
        pack_traces(traces, rollout.grammar, "recompute", row_length=8)


def test_stock_sft_trainer_gets_our_loss(tmp_path):
    """TRL's SFTTrainer, fed by a collator and otherwise untouched."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    model, name = model_of("recompute", torch.float64), tokenizer("tiny-hcot")
    probe = Engine(model, name)
    rollout = rollout_of("recompute", probe, max_context=200, max_gen_toks=200)
    written = rollout(model, [probe.encode(question) for question in questions(6)], range(6))
    with torch.no_grad():  # or it would be sure of everything that it wrote
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn(parameter.shape, generator=torch.manual_seed(1)))
    traces = [Example(one.request.prompt_ids, one.token_ids) for one in written]
    packed = pack_traces(traces, rollout.grammar, "recompute")
    install(model)
    sums = loss_sums(model, packed.batch, LossSettings(rollout.grammar, weight=0))
    ours = float(sums.objective / sums.counts.sum())
    logged = []

    class Trainer(SFTTrainer):
        def log(self, logs, *more):
            logged.append(logs)
            super().log(logs, *more)

    args = SFTConfig(
        str(tmp_path), max_steps=1, per_device_train_batch_size=6, bf16=False, gradient_checkpointing=False,
        remove_unused_columns=False, dataset_kwargs={"skip_prepare_dataset": True}, report_to="none", logging_steps=1,
        use_cpu=True, dataloader_pin_memory=False, disable_tqdm=True, save_strategy="no", packing=False,
    )  # fmt: skip
    rows = Dataset.from_list([{"prompt_ids": one.prompt_ids, "completion_ids": one.completion_ids} for one in traces])

    def collate(rows):
        found = [Example(tuple(row["prompt_ids"]), tuple(row["completion_ids"])) for row in rows]
        return pack_traces(found, rollout.grammar, "recompute").inputs(model)

    Trainer(model, args, train_dataset=rows, processing_class=name, data_collator=collate).train()
    assert float(logged[0]["loss"]) == pytest.approx(ours, rel=1e-6)  # TRL sums in float32


# --- rewards ----------------------------------------------------------------------------------------------------------

OPEN, SPLIT, CLOSE, END = 1000, 1001, 1002, 1003
THINK = (1004, 1005)


def a_grammar() -> Grammar:
    from hcot_lmeval.markup import MarkerIds

    return Grammar(MarkerIds(open=OPEN, split=SPLIT, close=CLOSE), THINK, frozenset({END}))


def block(thought, solution):
    return [OPEN, *thought, SPLIT, *solution, CLOSE]


def completion(body, answer="8"):
    return [*body, THINK[1], *range(900, 904), END], answer


def words(count, start=0):
    return [start + number % 800 for number in range(count)]


GOOD = completion(block([*words(30), *block(words(25, 100), words(4, 300)), *words(20, 200)], words(5, 400)) * 1
                  + block(words(40, 500), words(6, 600)))  # fmt: skip
HACKED = {
    "empty thoughts": completion(block([], words(3)) + block([], words(4, 9)) + words(95, 30)),
    "copied thoughts": completion(block(words(30), words(30)) + block(words(40, 100), words(40, 100))),
    "thousands of tiny blocks": completion([token for n in range(700) for token in block(words(4, n), [n % 7])]),
    "the same block again": completion(block(words(20), words(3)) * 20),
    "one giant block": completion(block(words(1500), words(8))),
    "answer only": completion([]),
    "nested junk": completion([OPEN] * 40 + [5] + [SPLIT, 6, CLOSE] * 40),
    "answer inside a pruned thought": completion(block(words(60), words(5)), answer=None),
    "wrong": completion(block(words(30), words(3)), answer="9"),
    "left open": completion([OPEN, *words(60)]),
}


def columns(ids, answer):
    shape = shape_of(Example((1, 2, 3), tuple(ids)), a_grammar(), "recompute")
    said = Response("" if answer is None else f"\\boxed{{{answer}}}", finish_reason="eos")
    return {"answer": ["8"], "response": [said], "shape": [shape], "limits": [(2048, 4096)]}


def total(ids, answer, weights=REWARD_WEIGHTS):
    return WeightedSum(weights)(["q"], ["c"], **columns(ids, answer))[0]


@pytest.mark.parametrize("hack", HACKED)
def test_no_hack_beats_a_good_trace(hack):
    assert total(*HACKED[hack]) < total(*GOOD) - 0.02


@pytest.mark.parametrize("hack", ["empty thoughts", "copied thoughts", "the same block again", "answer only"])
def test_compression_alone_cannot_be_hacked(hack):
    assert total(*HACKED[hack], {"compression": 1.0}) < 0.2 < total(*GOOD, {"compression": 1.0})


def test_the_parts_of_a_good_trace():
    ids, answer = GOOD
    shape = columns(ids, answer)["shape"][0]
    inner, outer, second = shape.blocks
    assert (inner.thought, inner.solution, inner.depth) == (25, 4, 2)
    assert (outer.thought, outer.solution, outer.depth) == (30 + 1 + 4 + 20, 5, 1)
    assert (second.thought, second.solution, second.copied) == (40, 6, False)
    assert (shape.unclosed, shape.illegal, shape.generated) == (0, 0, len(ids))
    assert shape.markers == 3 * 3 + 2 and 0 < shape.area < shape.peak < 140
    parts = WeightedSum(dict.fromkeys(REWARDS, 1.0)).parts(["q"], ["c"], **columns(ids, answer))
    assert parts["correctness"] == parts["structure"] == parts["compression"] == parts["form"] == [1.0]
    assert parts["depth"] == [pytest.approx(2 / 3)] and all(0 <= value <= 1 for [value] in parts.values())


def test_what_cannot_be_checked_is_left_out_and_wrong_answers_earn_nothing():
    assert total(GOOD[0], "9") == 0
    assert total(GOOD[0], r"\int" * 50) is None or total(GOOD[0], r"\int" * 50) == 0
    assert WeightedSum(REWARD_WEIGHTS).total({"correctness": None, "structure": 1.0}) is None
    logged = {}
    WeightedSum(REWARD_WEIGHTS)(["q"], ["c"], log_metric=logged.__setitem__, **columns(*GOOD))
    assert set(logged) == {f"rewards/{name}" for name in REWARD_WEIGHTS}


@pytest.mark.parametrize(
    ("weights", "told"),
    [
        ({"corectness": 1.0}, "rewards.corectness is unknown; did you mean correctness?"),
        ({"correctness": 0.0}, "rewards nothing"),
        ({"correctness": float("nan")}, "rewards.correctness=nan is no weight"),
        ({"nowhere:f": 1.0}, "rewards.nowhere:f cannot be imported: ModuleNotFoundError"),
        ({"math:nothing": 1.0}, "rewards.math:nothing cannot be imported: AttributeError"),
        ({"math:pi": 1.0}, "rewards.math:pi is 3.14"),
        ({"mine:raises": 1.0}, "rewards.mine:raises raised KeyError: 'x'"),
        ({"mine:short": 1.0}, "rewards.mine:short returned []; return a list of 1"),
        ({"mine:words": 1.0}, "rewards.mine:words returned ['good']"),
        ({"mine:nan": 1.0}, "rewards.mine:nan returned [nan]"),
    ],
    ids=str,
)
def test_rewards_that_cannot_be_used(weights, told, tmp_path):
    (tmp_path / "mine.py").write_text(
        "def raises(**columns): return {}['x']\ndef short(**columns): return []\n"
        "def words(**columns): return ['good']\ndef nan(**columns): return [float('nan')]\n"
    )
    with pytest.raises(ValueError, match=re.escape(told)):
        WeightedSum(weights, tmp_path)(["q"], ["c"], **columns(*GOOD))


# --- guards -----------------------------------------------------------------------------------------------------------


def guarded(*generations):
    from types import SimpleNamespace

    from hcot_lmeval.training.grpo_trainer import Guards

    trainer = SimpleNamespace(shapes=[])
    guards = Guards(GuardsConfig(window=2), trainer)
    control = SimpleNamespace(should_training_stop=False, should_save=False)
    for step, written in enumerate(generations, 1):
        trainer.shapes.append(written)
        guards.on_step_end(None, SimpleNamespace(global_step=step), control)
    return guards.verdict, control.should_training_stop


def test_a_collapse_is_told_in_words():
    good, empty = shape_of(Example((1,), tuple(GOOD[0])), a_grammar(), "recompute"), Shape((), 0, 2, 0, 9, 12, 6.0)
    giant = shape_of(Example((1,), tuple(HACKED["one giant block"][0])), a_grammar(), "recompute")
    fine = [(good, "eos")] * 4
    assert guarded(fine, fine, fine, fine) == ("", False)
    assert guarded([(empty, "eos")] * 4, [(empty, "eos")] * 4) == ("", False)  # it never wrote blocks
    for collapsed, told in {
        (
            empty,
            "eos",
        ): "stopped at step 3: 100% of the completions have no block in each of the last 2 generations, 0%",
        (giant, "eos"): "are one block around all",
        (good, "length"): "are cut by a budget",
        (good, "loop"): "repeat themselves",
    }.items():
        verdict, stopped = guarded(fine, [collapsed] * 4, [collapsed] * 4)
        assert told in verdict and stopped
