"""Fine-tuning of checkpoints: what LoRA changes, what an adapter carries, what is refused before weights are read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from hcot_lmeval.embeddings import rows_of
from hcot_lmeval.engine import Engine
from hcot_lmeval.markup import get_markup
from hcot_lmeval.record import read_record
from hcot_lmeval.tokens import add_special_tokens
from hcot_lmeval.training import loading, sft
from hcot_lmeval.training.config import parse_config
from hcot_lmeval.training.curves import read_records
from hcot_lmeval.training.data.text import TextForm
from hcot_lmeval.training.loading import attention_of, end_ids, load_model, load_tokenizer
from hcot_lmeval.training.run import RunDirectory
from tests.chat_templates import TEMPLATES
from tests.tiny import CHAT_TEMPLATE, MARKERS, THINK, VOCAB_SIZE, save_tiny, tiny_model, tiny_tokenizer

NEW = [*MARKERS, *THINK]
TRACE = "[THOUGHT]{a} and {b}[THOUGHT]so[SOLUTION]{a}{b}[RETURN][SOLUTION]{b}[RETURN]"
PROBE = torch.tensor([[5, VOCAB_SIZE, 40, VOCAB_SIZE + 1, 60, VOCAB_SIZE + 2, 9]])
"""Old tokens and new ones."""


def bare_tokenizer(**options: Any):
    return tiny_tokenizer(markers=False, think=False, **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bases without rows for the markers, and data."""
    path = tmp_path_factory.mktemp("checkpoints")
    save_tiny(path / "base", tiny_model("llama", tie_word_embeddings=True), bare_tokenizer())
    save_tiny(path / "untied", tiny_model("qwen2"), bare_tokenizer())
    rows = [
        {"question": f"Problem {i}?", "hierarchical_cot": TRACE.format(a=i, b=i + 1), "expected_answer": str(i + 1)}
        for i in range(12)
    ]
    (path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "others.jsonl").write_text('{"problem": "x", "solution": "y"}\n')
    return path


def settings(folder: Path, output: Path, **changes: Any) -> dict[str, Any]:
    return {
        "model": str(folder / "base"),
        "output": str(output),
        "data": {"train": [{"path": str(folder / "rows.jsonl")}], "held_out_share": 0.3, "row_length": 96},
        "phases": [{"policy": "recompute", "steps": 1}, {"policy": "evict", "steps": 2}],
        "evaluation": {"every": 10, "problems": 0},
        "trainer": {"learning_rate": "1e-2", "disable_tqdm": True, "logging_steps": 1, "warmup_steps": 0},
        **changes,
    }


def train(given: dict[str, Any]) -> RunDirectory:
    return sft.train(parse_config(given))


def losses(run: RunDirectory) -> list[float]:
    return [record["loss"] for record in read_records(run.curves) if "loss" in record]


@pytest.fixture(scope="module")
def adapted(folder: Path) -> RunDirectory:
    return train(settings(folder, folder / "lora", lora={"r": 4}))


def grown_base(path: Path, rows: int | None = None):
    """The base as an evaluation prepares it for an adapter: with as many rows as the adapter's tokenizer has tokens."""
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    model.resize_token_embeddings(rows or VOCAB_SIZE + len(NEW))
    return model


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(PROBE).logits[..., : VOCAB_SIZE + len(NEW)]


# --- LoRA -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["base", "untied"])
def test_lora_trains_adapters_and_new_rows_alone(folder, tmp_path, base) -> None:
    run = train(
        settings(folder, tmp_path / "run", model=str(folder / base), lora={"r": 4, "target_modules": ["q_proj"]})
    )
    config = parse_config(settings(folder, tmp_path / "run", model=str(folder / base)))
    start, added = load_model(config, *load_tokenizer(config))
    assert list(added.tokens) == NEW
    before, after = start.state_dict(), AutoModelForCausalLM.from_pretrained(run.model).state_dict()
    new = list(added.tokens.values())
    old = [i for i in range(len(before["model.embed_tokens.weight"])) if i not in new]
    for name, weight in before.items():
        if "embed_tokens" in name or "lm_head" in name:
            assert torch.equal(after[name][old], weight[old]), name
            assert all(not torch.equal(after[name][i], weight[i]) for i in new), name
        else:
            assert torch.equal(after[name], weight) != ("q_proj.weight" in name), name


@pytest.mark.parametrize("rows", [VOCAB_SIZE + len(NEW), 384])
def test_merged_model_is_adapter_on_base(folder, adapted, rows) -> None:
    """Whatever number of rows the base was given, as lm-eval gives it one per token, and training a multiple of 64."""
    merged = AutoModelForCausalLM.from_pretrained(adapted.model)
    base = grown_base(folder / "base", rows)
    without = logits(base)
    on_base = logits(PeftModel.from_pretrained(base, adapted.adapter))
    torch.testing.assert_close(on_base, logits(merged), atol=1e-5, rtol=0)
    assert (on_base - without).abs().max() > 0.05
    assert rows_of(merged) == 384


def test_adapter_holds_no_more_than_it_trained_and_says_how(adapted) -> None:
    from safetensors.torch import load_file

    weights = load_file(adapted.adapter / "adapter_model.safetensors")
    assert {name: len(w) for name, w in weights.items() if "lora_" not in name} == {
        "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": len(NEW)
    }
    assert read_record(adapted.adapter).policy == read_record(adapted.model).policy == "evict"
    assert AutoTokenizer.from_pretrained(adapted.adapter).convert_tokens_to_ids(MARKERS[0]) == VOCAB_SIZE


def test_lm_eval_loads_the_adapter_with_its_rows(folder, adapted) -> None:
    from hcot_lmeval.lm.model import HcotLM

    adapter = str(adapted.adapter)
    lm = HcotLM(pretrained=str(folder / "base"), peft=adapter, tokenizer=adapter, device="cpu", dtype="float32")
    assert lm.policy == "evict"
    merged = AutoModelForCausalLM.from_pretrained(adapted.model)
    torch.testing.assert_close(logits(lm.model), logits(merged), atol=1e-5, rtol=0)


@pytest.mark.parametrize("markers", [True, False], ids=["known markers", "new markers"])
def test_checkpointing_activations_changes_no_loss(folder, tmp_path, markers) -> None:
    """Without new rows nothing below the first adapter has gradients, which checkpointing must not mind."""
    save_tiny(tmp_path / "base", tiny_model("llama"), tiny_tokenizer() if markers else bare_tokenizer())
    given = settings(folder, tmp_path / "plain", model=str(tmp_path / "base"), lora={"r": 4})
    plain = train(given)
    again = {
        **given,
        "output": str(tmp_path / "again"),
        "trainer": {**given["trainer"], "gradient_checkpointing": True},
    }
    assert losses(train(again)) == pytest.approx(losses(plain), rel=1e-5)
    assert losses(plain)[0] != losses(plain)[-1]


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", fail)
    monkeypatch.setattr(loading, "tiny_model", fail)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "missing columns": (
        {"data": {"train": [{"path": "{folder}/others.jsonl"}], "held_out_share": 0.3}},
        "no column 'question'.*It has: problem, solution",
    ),
    "a wrong column of traces": (
        {"data": {"train": [{"path": "{folder}/rows.jsonl", "columns": {"trace": "question"}}], "held_out_share": 0.3}},
        r"phase 0 \(recompute\): none of \d traces has a block of the markup 'hcot'.*columns: \{trace: ...\}",
    ),
    "missing data": (
        {"data": {"train": [{"path": "{folder}/none.jsonl"}], "held_out_share": 0.3}},
        "no file matches",
    ),
    "stages of evict": (
        {
            "data": {"train": [{"path": "{folder}/rows.jsonl"}], "held_out_share": 0.3, "form": "stages"},
            "phases": [{"policy": "evict", "steps": 1}],
        },
        "data.form=stages exists for policy recompute alone; use form=packed",
    ),
    "nothing to hold out": ({"data": {"train": [{"path": "{folder}/rows.jsonl"}]}}, "nothing is held out"),
    "an empty share": (
        {"data": {"train": [{"path": "{folder}/rows.jsonl"}], "held_out_share": 1e-9}},
        "no held-out row is usable",
    ),
    "rows too short": (
        {"data": {"train": [{"path": "{folder}/rows.jsonl"}], "held_out_share": 0.3, "row_length": 8}},
        "no held-out row is usable|no rows to train on",
    ),
    "no markers": ({"tokens": {"add": False}}, r"lacks the hcot markers \[THOUGHT\].*set tokens.add=true"),
    "no rows for the markers": (
        {"tokens": {"add": False}, "tokenizer": "{folder}/lora/adapter"},
        "markers go up to id 322 .* has rows for 320 tokens alone",
    ),
    "an unknown template": ({"tokens": {"chat_template": "chatlm"}}, "did you mean chatml"),
    "an unfit template": ({"tokens": {"chat_template": "{folder}/unfit.jinja"}}, "no token prefix"),
    "a template that never stops": ({"tokens": {"chat_template": "llama3"}}, "never learn to stop"),
    "no such end of turn": ({"tokens": {"eos": "<|end|>"}}, r"tokens.eos='<\|end\|>' is no token"),
    "a phrase for nothing": ({"tokens": {"phrases": {"[THOUGT]": "x"}}}, r"\[THOUGT\] is no token of the markup"),
    "no model": ({"model": "{folder}/nowhere"}, "cannot be loaded; give the directory of a checkpoint"),
    "flash attention": ({"attention": "flash_attention_2"}, "attention: Input should be 'auto', 'sdpa', 'eager' or"),
    "a number that is none": ({"trainer": {"learning_rate": "fast"}}, "trainer.learning_rate='fast'.*valid number"),
    "an empty batch": ({"trainer": {"per_device_train_batch_size": 0}}, "has to be above 0"),
    "no steps": ({"phases": [{"policy": "off", "steps": 0}]}, "phases.0.steps.*greater than or equal to 1"),
    "an unknown metric": ({"evaluation": {"metric": "acc"}}, "evaluation.metric.*'accuracy'"),
    "a metric that is not measured": (
        {"evaluation": {"metric": "accuracy", "problems": 0}},
        "is measured by generation; set evaluation.problems",
    ),
}


def filled(value: Any, folder: Path) -> Any:
    if isinstance(value, dict):
        return {key: filled(part, folder) for key, part in value.items()}
    if isinstance(value, list):
        return [filled(part, folder) for part in value]
    return value.replace("{folder}", str(folder)) if isinstance(value, str) else value


@pytest.mark.parametrize("changes, told", WRONG.values(), ids=WRONG)
def test_mistakes_are_told_before_weights_are_read(folder, adapted, tmp_path, no_weights, changes, told) -> None:
    (folder / "unfit.jinja").write_text(CHAT_TEMPLATE.replace("assistant\n{% if enable", "assistant:\n{% if enable"))
    given = settings(folder, tmp_path / "run") | filled(changes, folder)
    with pytest.raises((ValueError, FileNotFoundError), match=f"(?s){told}"):
        train(given)
    assert not (tmp_path / "run").exists()


def test_another_run_is_refused_before_weights_are_read(folder, adapted, no_weights) -> None:
    with pytest.raises(ValueError, match=r"holds a run with other settings:\n  lora\.r: 4 there, 8 now"):
        train(settings(folder, folder / "lora", lora={"r": 8}))


def test_recurrent_models_are_refused_before_weights_are_read(folder, tmp_path, no_weights) -> None:
    shutil.copytree(folder / "untied", tmp_path / "hybrid")
    file = tmp_path / "hybrid" / "config.json"
    config = json.loads(file.read_text()) | {"model_type": "qwen3_next", "layer_types": ["linear_attention"] * 2}
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="layers of type linear_attention"):
        train(settings(folder, tmp_path / "run", model=str(tmp_path / "hybrid")))


def test_modules_that_are_not_there_are_told(folder, tmp_path) -> None:
    with pytest.raises(ValueError, match="q_prog"):
        train(settings(folder, tmp_path / "run", lora={"target_modules": ["q_prog"]}))
    assert not (tmp_path / "run").exists()


# --- tokenizer and attention ------------------------------------------------------------------------------------------


def test_rows_are_seeded_though_the_tokenizer_had_the_tokens_first(folder, tmp_path) -> None:
    """Also spare rows of a padded embedding, which nothing but that knowledge tells from trained ones."""
    save_tiny(tmp_path / "padded", tiny_model("qwen2", vocab_size=384), bare_tokenizer())
    config = parse_config(settings(folder, tmp_path / "run", model=str(tmp_path / "padded")))
    tokenizer, new = load_tokenizer(config)
    model, added = load_model(config, tokenizer, new)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "padded")
    together = add_special_tokens(bare_tokenizer(), expected)
    assert added == together and list(added.seeding["rows"]) == NEW
    assert all(torch.equal(model.state_dict()[name], weight) for name, weight in expected.state_dict().items())


def test_a_turn_may_end_with_another_token_than_the_tokenizer_says(folder, tmp_path) -> None:
    """As a base model's: its own end of sequence is the end of a document."""
    tokenizer = bare_tokenizer()
    tokenizer.eos_token = "<|endoftext|>"
    save_tiny(tmp_path / "base", tiny_model("qwen2"), tokenizer)
    given = settings(folder, tmp_path / "run", model=str(tmp_path / "base"))
    with pytest.raises(ValueError, match="never learn to stop"):
        load_tokenizer(parse_config(given))
    run = train({**given, "tokens": {"eos": "<|im_end|>"}})
    assert AutoTokenizer.from_pretrained(run.model).eos_token == "<|im_end|>"
    assert 2 in end_ids(parse_config({**given, "model": str(run.model)}), AutoTokenizer.from_pretrained(run.model))


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_whose_conversations_differ_can_be_trained_on(folder, tmp_path, name) -> None:
    (tmp_path / "own.jinja").write_text(TEMPLATES[name])
    strict = {"chat_template": str(tmp_path / "own.jinja")}
    with pytest.raises(ValueError, match=r"tokens.strict_template=false"):
        load_tokenizer(parse_config(settings(folder, tmp_path / "run", tokens=strict)))
    config = parse_config(settings(folder, tmp_path / "run", tokens={**strict, "strict_template": False}))
    tokenizer, _ = load_tokenizer(config)
    asked = [{"role": "user", "content": "1+1?"}]
    example = TextForm(tokenizer, get_markup("hcot")).example(
        {"question": "1+1?", "messages": None, "trace": TRACE.format(a=1, b=2), "answer": "2"}
    )
    prompt = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    text = tokenizer.decode(example.ids)
    assert text.startswith(prompt) and text.endswith("</think>\n\n\\boxed{2}<|im_end|>")
    assert text.count("<think>[") + text.count("<think>\n[") == 1 and text.count("[THOUGHT]1 and 2") == 1


def test_template_arguments_are_those_of_the_saved_model_too(folder, tmp_path) -> None:
    (tmp_path / "own.jinja").write_text(TEMPLATES["GLM-4.5"])
    tokens = {"chat_template": str(tmp_path / "own.jinja"), "strict_template": False}
    asked = [{"role": "user", "content": "1+1?"}]

    def prompt(arguments: dict[str, Any], **given: Any) -> str:
        config = parse_config(settings(folder, tmp_path / "run", tokens={**tokens, "template_arguments": arguments}))
        load_tokenizer(config)[0].save_pretrained(tmp_path / "saved")
        saved = AutoTokenizer.from_pretrained(tmp_path / "saved")
        return saved.apply_chat_template(asked, tokenize=False, add_generation_prompt=True, **given)

    assert prompt({"enable_thinking": False}).endswith("1+1?/nothink<|im_start|>assistant\n<think></think>")
    assert prompt({"enable_thinking": False}, enable_thinking=True) == prompt({}) == prompt({"enable_thinking": True})
    with pytest.raises(ValueError, match="does not read 'enable_thinkng'"):
        prompt({"enable_thinkng": False})


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word"])
def test_markers_that_swallow_blanks_are_told(folder, tmp_path, flag) -> None:
    tokenizer = bare_tokenizer()
    tokenizer.add_tokens([AddedToken(MARKERS[0], special=True, normalized=False, **{flag: True})])
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"has \[THOUGHT\] as a token with {flag}, so that 'So we.*is read as"):
        load_tokenizer(parse_config(settings(folder, tmp_path / "run", tokenizer=str(tmp_path))))


def test_text_is_read_as_it_was_written(folder, tmp_path) -> None:
    """What transformers cleans up, for vocabularies other than BPE, stop strings would not see."""
    words = ["<unk>", "<eos>", *MARKERS, *THINK, *(f"\u2581{word}" for word in ("x", "!=", "y", ",", "z"))]
    raw = Tokenizer(models.Unigram([(word, 0.0) for word in words], unk_id=0))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    raw.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in (*MARKERS, *THINK)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<eos>", unk_token="<unk>", clean_up_tokenization_spaces=True
    )
    ids = tokenizer.encode("x != y , z")
    assert tokenizer.decode(ids) == "x!= y, z"
    assert Engine(tiny_model("llama"), tokenizer, self_check=False).decode(ids) == "x != y , z"
    tokenizer.save_pretrained(tmp_path)
    trained, _ = load_tokenizer(parse_config(settings(folder, tmp_path / "run", tokenizer=str(tmp_path))))
    assert trained.decode(ids) == "x != y , z"


@pytest.mark.parametrize(
    "wanted, gpu, length, expected",
    [
        ("auto", False, 65536, "sdpa"),
        ("auto", True, 2048, "sdpa"),
        ("auto", True, 2049, "flex_attention"),
        ("eager", True, 65536, "eager"),
        ("flex_attention", True, 96, "flex_attention"),
    ],
)
def test_attention_suits_rows_and_device(folder, tmp_path, monkeypatch, wanted, gpu, length, expected) -> None:
    for part in (torch.cuda, torch.accelerator):
        monkeypatch.setattr(part, "is_available", lambda: gpu)
    given = settings(folder, tmp_path, attention=wanted)
    assert attention_of(parse_config({**given, "data": {**given["data"], "row_length": length}})) == expected


def test_flex_attention_has_no_gradients_on_cpu(folder, tmp_path) -> None:
    given = settings(folder, tmp_path, attention="flex_attention", trainer={"use_cpu": True})
    with pytest.raises(ValueError, match="cannot train on a CPU"):
        attention_of(parse_config(given))
