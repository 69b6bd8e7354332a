"""Evaluation while training: what is measured, that the model comes back unchanged, and that processes agree."""

from __future__ import annotations

import copy
import json
import math
import multiprocessing

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from hcot_lmeval.engine import Engine, Request, SamplingParams
from hcot_lmeval.record import TrainingRecord, write_record
from hcot_lmeval.training import evaluation
from hcot_lmeval.training.evaluation import MEASURES, Sample, evaluation_mode, free_run, held_out_losses
from hcot_lmeval.training.losses import LossSums
from tests.tiny import MARKERS, THINK, favour, tiny_model, tiny_tokenizer

LOSS_KEYS = ["loss", "loss_text", "loss_markers", "loss_solution", "loss_answer", "structure"]
OPTIONS = {"policy": "recompute", "markup": "hcot", "max_context": 64, "max_gen_toks": 40, "batch_size": 3}


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def marked_model(tokenizer, kind: str = "qwen2", **config):
    """A random model that writes markers often."""
    return favour(tiny_model(kind, **config), tokenizer.convert_tokens_to_ids([*MARKERS, *THINK]), 2.0)


@pytest.fixture(scope="module")
def problems(tokenizer):
    return [(tuple(tokenizer.encode(f"{n} + {n}?")), str(2 * n)) for n in range(7)]


def same_metrics(one: dict[str, float], other: dict[str, float]) -> bool:
    return one.keys() == other.keys() and all(one[key] == pytest.approx(other[key], nan_ok=True) for key in one)


# --- what is measured -------------------------------------------------------------------------------------------------

SCRIPTS = {  # what is written: its metrics (accuracy, completion, illegal, incomplete) and its prunes
    "<think>[THOUGHT]1+1[SOLUTION]2[RETURN]</think>\\boxed{7}<|im_end|>": ((1, 1, 0, 0), 1),
    "<think>2</think>\\boxed{\\frac{14}{2}}<|im_end|>": ((1, 1, 0, 0), 0),
    "\\boxed{7}<|im_end|>": ((1, 1, 0, 0), 0),
    "<think>2</think>\\boxed{8}<|im_end|>": ((0, 1, 0, 0), 0),
    "<think>\\boxed{7}</think>seven<|im_end|>": ((0, 1, 0, 0), 0),
    "<think>\\boxed{7}<|im_end|>": ((0, 1, 0, 0), 0),
    "<think>1[RETURN]</think>\\boxed{7}<|im_end|>": ((1, 1, 1, 0), 0),
    "<think>[THOUGHT]1[RETURN]</think>\\boxed{7}<|im_end|>": ((1, 1, 1, 0), 0),
    "<think>[THOUGHT]1[SOLUTION]2[SOLUTION]3[RETURN]</think>\\boxed{7}<|im_end|>": ((1, 1, 1, 0), 1),
    "<think>1</think>[THOUGHT]1[SOLUTION]2[RETURN]\\boxed{7}<|im_end|>": ((1, 1, 1, 0), 1),
    "<think>[THOUGHT]1</think>\\boxed{7}<|im_end|>": ((1, 1, 1, 0), 0),
    "<think>[THOUGHT]1[SOLUTION]2<|im_end|>": ((0, 1, 1, 0), 0),
    "<think>[THOUGHT]" + 40 * "1": ((0, 0, 0, 1), 0),
    "<think>[RETURN][THOUGHT]" + 40 * "1": ((0, 0, 1, 1), 0),
    "<think>" + 40 * "1": ((0, 0, 0, 0), 0),
    "<think></think>\\boxed{7}" + 40 * "1": ((1, 0, 0, 0), 0),
}


@pytest.fixture
def forced(monkeypatch, tokenizer):
    """Makes the engine write the scripts instead of what the model prefers; a problem's prompt is (its number,)."""
    scripts = [tuple(tokenizer.encode(text)) for text in SCRIPTS]

    def request(name, prompt_ids, params):
        return Request(name, prompt_ids, params, forced_ids=scripts[prompt_ids[0] - 10])

    monkeypatch.setattr(evaluation, "Request", request)
    return [((10 + number,), "7") for number in range(len(scripts))]


@pytest.mark.parametrize("number", range(len(SCRIPTS)), ids=list(SCRIPTS))
def test_what_is_written_is_measured(forced, tokenizer, number):
    text, (expected, prunes) = list(SCRIPTS.items())[number]
    run = free_run(tiny_model("qwen2"), tokenizer, [forced[number]], **OPTIONS)
    found = [run.metrics[key] for key in ("accuracy", "completion", "illegal_traces", "incomplete_traces", "prunes")]
    assert found == [*expected, prunes]
    ids = tokenizer.encode(text)[:40]
    assert run.metrics["generated_tokens"] == len(ids)
    sample = run.samples[0]
    assert sample.generated == tokenizer.decode(ids).removesuffix("<|im_end|>")
    assert sample.right == bool(expected[0])
    assert sample.legal != bool(expected[2])
    assert sample.expected == "7"


def test_metrics_are_means_over_all_problems(forced, tokenizer):
    run = free_run(tiny_model("qwen2"), tokenizer, forced, **OPTIONS, keep=99)
    alone = [free_run(tiny_model("qwen2"), tokenizer, [problem], **OPTIONS).metrics for problem in forced]
    assert same_metrics(run.metrics, {key: sum(one[key] for one in alone) / len(alone) for key in MEASURES})
    assert len(run.samples) == len(SCRIPTS)


@pytest.mark.parametrize("policy", ["recompute", "evict", "off"])
def test_metrics_are_those_of_the_engine(tokenizer, problems, policy):
    """Twin: the engine by itself, one problem after the other, counted by hand."""
    model = marked_model(tokenizer)
    run = free_run(model, tokenizer, problems, **{**OPTIONS, "policy": policy})
    engine = Engine(model, tokenizer, policy=policy, max_context=64)
    done = [engine.generate([Request("x", ids, SamplingParams(max_gen_toks=40))])[0].statistics for ids, _ in problems]
    assert sum(one.prune_events for one in done) > 0 or policy == "off"
    expected = {
        "generated_tokens": [one.generated_tokens for one in done],
        "peak_live_tokens": [one.peak_live_tokens for one in done],
        "live_tokens": [one.live_tokens for one in done],
        "pruned_share": [one.pruned_tokens / one.generated_tokens for one in done],
        "prunes": [one.prune_events for one in done],
        "completion": [one.finish_reason == "eos" for one in done],
    }
    for key, values in expected.items():
        assert run.metrics[key] == pytest.approx(sum(values) / len(values)), key


def test_a_prompt_that_opens_the_thinking_section(monkeypatch, tokenizer):
    script = tuple(tokenizer.encode("\\boxed{7}<|im_end|>"))
    monkeypatch.setattr(evaluation, "Request", lambda *args: Request(*args, forced_ids=script))
    prompts = ["7?", "7?<think>\n"]
    runs = [free_run(tiny_model("qwen2"), tokenizer, [(tokenizer.encode(p), "7")], **OPTIONS) for p in prompts]
    assert [run.metrics["accuracy"] for run in runs] == [1, 0]


def test_problems_without_an_answer_are_not_graded(tokenizer, problems, forced):
    both = [forced[0], (forced[1][0], None)]
    run = free_run(tiny_model("qwen2"), tokenizer, both, **OPTIONS)
    assert run.metrics["accuracy"] == 1
    assert run.metrics["completion"] == 1
    assert [sample.right for sample in run.samples] == [True, None]
    none = free_run(tiny_model("qwen2"), tokenizer, both[1:], **OPTIONS)
    assert math.isnan(none.metrics["accuracy"])
    assert list(none.metrics) == list(MEASURES)
    assert all(type(value) is float for value in none.metrics.values())


def test_samples_are_lines_for_a_log(tokenizer, problems):
    model = marked_model(tokenizer)
    run = free_run(model, tokenizer, problems, **OPTIONS, keep=2)
    records = run.records(step=30)
    assert json.loads(json.dumps(records)) == records
    assert [record["step"] for record in records] == [30, 30]
    assert [record["prompt"] for record in records] == ["0 + 0?", "1 + 1?"]
    assert records[0].keys() == {"step", *Sample.__dataclass_fields__}
    assert free_run(model, tokenizer, problems[:1], **OPTIONS, keep=0).samples == ()


def test_sampling_depends_on_the_seed(tokenizer, problems):
    def texts(seed):
        run = free_run(marked_model(tokenizer), tokenizer, problems[:2], **OPTIONS, temperature=1.0, seed=seed)
        return [sample.generated for sample in run.samples]

    assert texts(1) == texts(1) != texts(2)


def test_a_policy_other_than_that_of_the_earlier_training_is_evaluated(tokenizer, problems):
    model = marked_model(tokenizer)
    write_record(model, TrainingRecord(policy="recompute"))
    assert free_run(model, tokenizer, problems[:1], **{**OPTIONS, "policy": "evict"}).metrics["generated_tokens"] > 0


def test_a_diverged_model_is_measured_and_not_refused(tokenizer, problems):
    model = tiny_model("qwen2")
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(math.nan)
    run = free_run(model, tokenizer, problems[:2], **OPTIONS)
    assert run.metrics["accuracy"] == 0
    with pytest.raises(ValueError, match=r"embed_tokens\.weight holds numbers that are NaN"):
        free_run(model, tokenizer, problems[:2], **OPTIONS, self_check=True)


def test_no_problems_are_an_error(tokenizer):
    with pytest.raises(ValueError, match="at least one problem"):
        free_run(tiny_model("qwen2"), tokenizer, [], **OPTIONS)


# --- the model comes back unchanged -----------------------------------------------------------------------------------


def gradients(model) -> dict[str, torch.Tensor]:
    """Of a training step with dropout; the random numbers go on from where they are."""
    ids = torch.arange(3, 43)[None]
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def training_model(tokenizer, kind: str, attention: str):
    model = marked_model(tokenizer, kind, attention_dropout=0.3)
    model.set_attn_implementation(attention)
    model.train()
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)  # its older name
    enable({"use_reentrant": False})
    model.model.layers[0].mlp.eval()  # what a user has frozen stays frozen
    return model


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama"])
def test_a_training_step_after_a_free_run_is_the_same_to_the_bit(tokenizer, forced, kind, attention):
    model = training_model(tokenizer, kind, attention)
    twin = copy.deepcopy(model)
    torch.manual_seed(5)
    expected = gradients(twin)
    torch.manual_seed(5)
    modes = {name: module.training for name, module in model.named_modules()}
    assert free_run(model, tokenizer, forced, **OPTIONS, self_check=True).metrics["prunes"] > 0
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert model.config._attn_implementation == attention
    assert all(layer.gradient_checkpointing for layer in model.model.layers)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    found = gradients(model)
    assert found.keys() == expected.keys() != set()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not torch.equal(gradients(model)["lm_head.weight"], expected["lm_head.weight"]), "dropout is off"


def test_the_model_comes_back_from_an_error(tokenizer, problems):
    model = training_model(tokenizer, "qwen2", "sdpa")
    modes = [module.training for module in model.modules()]
    with pytest.raises(ValueError, match="at least 1"):
        free_run(model, tokenizer, problems, **{**OPTIONS, "max_gen_toks": 0})
    with pytest.raises(RuntimeError, match="on purpose"), evaluation_mode(model):
        assert not any(module.training for module in model.modules())
        raise RuntimeError("on purpose")
    assert [module.training for module in model.modules()] == modes


def test_wrapped_models_write_what_they_write_bare(tokenizer, problems):
    peft = pytest.importorskip("peft")
    model = marked_model(tokenizer)
    expected = free_run(model, tokenizer, problems, **OPTIONS)
    wrapped = torch.nn.Module()
    wrapped.module = model
    assert free_run(wrapped, tokenizer, problems, **OPTIONS) == expected
    lora = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", init_lora_weights=False))
    lora.train()
    adapted = free_run(lora, tokenizer, problems, **OPTIONS)
    assert adapted != expected, "the adapter was left out"
    assert lora.training and lora.base_model.model.model.layers[0].training
    with lora.disable_adapter():
        assert free_run(lora, tokenizer, problems, **OPTIONS) == expected


# --- held-out losses --------------------------------------------------------------------------------------------------


def sums(*rows: tuple[int, float], structure: float = 0.0) -> LossSums:
    """The sums of (class, loss) targets."""
    cross_entropy, counts = torch.zeros(4), torch.zeros(4, dtype=torch.int64)
    for token_class, loss in rows:
        cross_entropy[token_class] += loss
        counts[token_class] += 1
    return LossSums(cross_entropy.sum(), cross_entropy, torch.tensor(structure), counts)


BATCHES = [
    sums((0, 1.0), (0, 2.0), (1, 5.0), structure=1.0),
    sums((0, 6.0), structure=0.5),
    sums(),  # padding alone
    sums((2, 4.0), structure=0.5),
]


def test_held_out_losses_are_means_over_targets():
    found = held_out_losses(BATCHES, lambda batch: batch)
    assert list(found) == LOSS_KEYS
    assert found["loss"] == pytest.approx(18 / 5)
    assert found["loss_text"] == pytest.approx(9 / 3)
    assert found["loss_markers"] == 5
    assert found["loss_solution"] == 4
    assert math.isnan(found["loss_answer"])
    assert found["structure"] == pytest.approx(2 / 5)


def test_held_out_losses_build_no_gradients():
    weight = torch.ones((), requires_grad=True)
    seen = []

    def loss_sums(batch):
        seen.append((weight * 2).requires_grad)
        return batch

    held_out_losses(BATCHES, loss_sums)
    assert seen == [False] * len(BATCHES)
    with pytest.raises(ValueError, match="at least one batch"):
        held_out_losses([], loss_sums)


# --- several processes ------------------------------------------------------------------------------------------------


def worker(rank: int, store: str, results, task, arguments) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    results.put((rank, task(rank, *arguments)))
    dist.barrier()
    dist.destroy_process_group()


def on_two_processes(path, task, *arguments) -> list:
    """Forked, so that nothing has to be imported again."""
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    jobs = [context.Process(target=worker, args=(r, str(path / "store"), results, task, arguments)) for r in (0, 1)]
    for job in jobs:
        job.start()
    found = dict(results.get(timeout=900) for _ in jobs)
    for job in jobs:
        job.join(timeout=900)
    assert [job.exitcode for job in jobs] == [0, 0]
    return [found[0], found[1]]


def sharded_step(rank, tokenizer, problems) -> tuple:
    """Gradients of a training step on sharded weights, without and after a free run before it, and its metrics."""
    found, metrics = [], {}
    for generates in (False, True):
        model = fully_sharded(marked_model(tokenizer).train())
        if generates:
            metrics = free_run(model, tokenizer, problems, **OPTIONS, shard=False).metrics
        ids = torch.arange(3, 43)[None]
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        found.append({name: p.grad.full_tensor().tolist() for name, p in model.named_parameters()})
    return found[0], found[1], metrics


def fully_sharded(model):
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def test_sharded_weights_generate_and_train_on(tmp_path, tokenizer, problems):
    expected = free_run(marked_model(tokenizer), tokenizer, problems, **OPTIONS).metrics
    for without, after, metrics in on_two_processes(tmp_path, sharded_step, tokenizer, problems):
        assert same_metrics(metrics, expected)
        assert after == without


def run_there(rank, tokenizer, problems, shard):
    run = free_run(marked_model(tokenizer), tokenizer, problems, **OPTIONS, shard=shard)
    return run.metrics, [sample.prompt for sample in run.samples]


@pytest.mark.parametrize(("shard", "count"), [(True, 7), (True, 1), (False, 7)])
def test_two_processes_measure_what_one_does(tmp_path, tokenizer, problems, shard, count):
    problems = problems[:count]
    expected = free_run(marked_model(tokenizer), tokenizer, problems, **OPTIONS).metrics
    found = on_two_processes(tmp_path, run_there, tokenizer, problems, shard)
    assert all(same_metrics(metrics, expected) for metrics, _ in found)
    prompts = [f"{n} + {n}?" for n in range(count)]
    assert [seen for _, seen in found] == [prompts[r::2][:4] if shard else prompts[:4] for r in (0, 1)]


def test_two_processes_average_their_losses_over_all_targets(tmp_path):
    def task(rank):
        return held_out_losses(BATCHES[rank::2], lambda batch: batch)

    expected = held_out_losses(BATCHES, lambda batch: batch)
    assert all(same_metrics(found, expected) for found in on_two_processes(tmp_path, task))
