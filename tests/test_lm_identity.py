"""What identifies a result: weights, code, seeds, prompts and the clock. Nothing is taken for what it is not."""

import datetime
import json
import logging
import os

import lm_eval
import pytest
import torch
from lm_eval.tasks import TaskManager
from safetensors.torch import load_file, save_file

from hcot_lmeval import provenance
from hcot_lmeval.lm import HcotLM
from hcot_lmeval.lm import journal as journals
from hcot_lmeval.lm.journal import Journal, first_time
from hcot_lmeval.lm.prompts import at_time
from hcot_lmeval.notes import NoteTaker, read_notes
from tests.lm_tasks import QUESTIONS, generation_task, instances
from tests.tiny import favour, save_tiny, tiny_model, tiny_tokenizer

SAMPLED = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 20}


@pytest.fixture(autouse=True)
def _no_inventory(monkeypatch):
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


@pytest.fixture(autouse=True)
def _own_requests_cache(monkeypatch, tmp_path):
    monkeypatch.setattr("lm_eval.caching.cache.PATH", str(tmp_path / "requests"))


def evaluate(lm, *tasks, **options):
    return lm_eval.simple_evaluate(lm, tasks=list(tasks), task_manager=TaskManager(include_defaults=False), **options)


def texts(result):
    (samples,) = result["samples"].values()
    return [answer.raw for sample in samples for answer in sample["resps"][0]]


def hcot(tmp_path, model=None, tokenizer=None, **options):
    model = tiny_model("qwen2") if model is None else model
    return HcotLM(
        pretrained=model,
        tokenizer=tokenizer or tiny_tokenizer(),
        **{"journal": tmp_path / "journal", "max_context": 256, "pruning": "off", "compute": "torch", **options},
    )


def raw(lm, **kwargs):
    return [a.raw for a in lm.generate_until(instances(QUESTIONS[:3], **kwargs), disable_tqdm=True)]


# --- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_results_follow_weights_that_change_in_memory(tmp_path, dtype):
    model, other = tiny_model("qwen2", dtype), tiny_model("qwen2", dtype, seed=1)
    lm = hcot(tmp_path, model)
    before = raw(lm)
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        ours.data.copy_(theirs.data)
    after = raw(lm)
    assert after == raw(hcot(tmp_path, other, journal="off")) != before
    assert lm._statistics.resumed == 0


def test_results_follow_weights_that_change_behind_their_files(tmp_path):
    path = save_tiny(tmp_path / "model", tiny_model("qwen2"))
    lm = hcot(tmp_path, path, device="cpu", dtype="float32")
    before = raw(lm)
    lm.model.load_state_dict(tiny_model("qwen2", seed=1).state_dict())
    assert raw(lm) == raw(hcot(tmp_path, tiny_model("qwen2", seed=1), journal="off")) != before
    again = hcot(tmp_path, path, device="cpu", dtype="float32")
    assert raw(again) == before
    assert again._statistics.resumed == 3


def test_results_follow_a_generation_config_that_changes_in_memory(tmp_path):
    lm = hcot(tmp_path, tiny_model("qwen2"))
    before = raw(lm)
    lm.model.generation_config.repetition_penalty = 5.0
    penalized = raw(lm)
    lm.model.generation_config.eos_token_id = list(range(3, 320))
    assert len({*map(tuple, (before, penalized, raw(lm)))}) == 3
    assert lm._statistics.resumed == 0
    lm.model.generation_config = tiny_model("qwen2").generation_config
    assert raw(lm) == before
    assert lm._statistics.resumed == 3


def test_large_files_are_told_apart_by_more_than_size_and_time(tmp_path):
    file = tmp_path / "model.safetensors"
    seen = set()
    for byte in (b"a", b"b"):
        file.write_bytes(byte * (provenance.SMALL + 1))
        os.utime(file, ns=(10**18, 10**18))
        seen.add(provenance.checkpoint_facts(str(tmp_path)))
    assert len(seen) == 2


# --- code and computer ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("graded", [True, False])
def test_every_file_of_the_engine_counts_whatever_its_suffix(graded):
    names = {str(path).partition("/hcot_lmeval/")[2] for path in provenance.code_files(graded=graded)}
    assert {"engine/native/kernel/step.cpp", "engine/native/kernel/team.hpp", "engine/device/loop.py"} <= names
    assert {"lm/model.py", "vocabulary.py", "templates/chatml.jinja", "ablation.py"} <= names
    assert ("answers/extract.py" in names) is graded


def test_a_resume_does_not_mix_computers(tmp_path, monkeypatch):
    first = hcot(tmp_path)
    raw(first)
    monkeypatch.setattr(type(first.engine.decoder), "compute_name", property(lambda self: "another"))
    second = hcot(tmp_path)
    raw(second)
    assert second._statistics.resumed == 0


# --- seeds and generation kwargs --------------------------------------------------------------------------------------


def test_lm_evals_seed_acts(tmp_path):
    task = generation_task(docs=3, **SAMPLED)
    one, two, again = (texts(evaluate(hcot(tmp_path), task, torch_random_seed=seed)) for seed in (1, 2, 1))
    assert one == again != two
    result = evaluate(hcot(tmp_path), task, torch_random_seed=2)
    assert result["config"]["hcot"]["seed"] == 2
    given = [texts(evaluate(hcot(tmp_path, seed=5), task, torch_random_seed=seed)) for seed in (1, 2)]
    assert given[0] == given[1]  # what the model's own arguments say comes first


def test_repeats_are_samples_of_their_own_without_do_sample(tmp_path):
    result = evaluate(hcot(tmp_path), generation_task(docs=2, repeats=3, temperature=1.0))
    assert result["results"]["tiny_generation"]["distinct,all"] == 3


@pytest.mark.parametrize("repeats", [1, 4])
def test_repeats_of_the_metadata_act_or_are_an_error(tmp_path, repeats):
    task = generation_task(docs=2) | {"metadata": {"repeats": repeats}}
    if repeats == 1:
        evaluate(hcot(tmp_path), task)
        return
    with pytest.raises(ValueError, match=r"repeats=4 .* does nothing in tiny_generation, which asks a question 1x"):
        evaluate(hcot(tmp_path), task)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"seed": "abc"},
        {"seed": 1.5},
        {"max_gen_toks": 20.5},
        {"max_new_tokens": "20"},
        {"min_tokens": True},
        {"top_k": 2.5, "temperature": 1.0},
        {"temperature": "warm"},
        {"temperature": True},
        {"top_p": "0.9", "temperature": 1.0},
        {"do_sample": "maybe"},
        {"do_sample": 1, "temperature": 1.0},
        {"until": 7},
        {"until": ["a", None]},
    ],
    ids=str,
)
def test_generation_kwargs_of_another_kind_are_errors(tmp_path, kwargs):
    name = next(iter(kwargs))
    with pytest.raises(ValueError, match=f"generation kwarg {name}="):
        raw(hcot(tmp_path, journal="off"), **kwargs)


# --- lm-eval's caches -------------------------------------------------------------------------------------------------


def test_the_cache_of_responses_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"use_cache is not supported .* journal"):
        evaluate(hcot(tmp_path), generation_task(docs=1), use_cache=str(tmp_path / "cache"))


def test_requests_from_a_cache_ask_for_what_is_asked_for_now(tmp_path, caplog):
    for limit in (6, 12):
        task = generation_task(docs=2, max_gen_toks=limit)
        with caplog.at_level(logging.WARNING):
            result = evaluate(hcot(tmp_path), task, cache_requests=True)
        assert [s["generated"] for s in result["samples"]["tiny_generation"]] == [limit] * 2
    assert "cache_requests: the requests of tiny_generation are built anew" in caplog.text


@pytest.mark.parametrize("by_harness", [True, False])
def test_a_template_that_ends_in_plain_text_is_applied_once(tmp_path, by_harness):
    """As those of gemma3, phi3 and gpt-oss in TRL: behind the user's turn comes no special token."""
    plain = tiny_tokenizer()
    plain.chat_template = "{% for m in messages %}U: {{ m['content'] }}\n{% endfor %}A:"
    for _ in range(2):
        lm = hcot(tmp_path, tokenizer=plain, notes=tmp_path / "notes", journal="off")
        evaluate(lm, generation_task(docs=1), apply_chat_template=by_harness, cache_requests=True)
    prompts = {plain.decode(note.prompt_ids) for path in (tmp_path / "notes").iterdir() for note in read_notes(path)}
    assert prompts == {f"U: {QUESTIONS[0]}\nA:"}


# --- the clock --------------------------------------------------------------------------------------------------------


class Clock(datetime.datetime):
    """A day later each time it is asked."""

    days = 0

    @classmethod
    def now(cls, tz=None):
        cls.days += 1
        return cls(2031, 1, 1) + datetime.timedelta(days=cls.days)


@pytest.mark.parametrize("by_harness", [True, False])
def test_a_template_that_tells_the_time_does_not_stop_a_resume(tmp_path, monkeypatch, caplog, by_harness):
    monkeypatch.setattr(journals, "datetime", Clock)
    monkeypatch.setattr(Clock, "days", 0)
    timed = tiny_tokenizer()
    timed.chat_template = "{{ strftime_now('%d %B %Y') }}" + timed.chat_template
    task = generation_task(docs=3)
    runs = []
    for options in ({}, {}, {"journal": tmp_path / "other"}):
        lm = hcot(tmp_path, tokenizer=timed, notes=tmp_path / "notes", **options)
        with caplog.at_level(logging.WARNING):
            result = evaluate(lm, task, apply_chat_template=by_harness)
        runs.append((result["config"]["hcot"]["clock"], lm._statistics.resumed))
    assert [resumed for _, resumed in runs] == [0, 3, 0]
    assert runs[0][0] == runs[1][0] != runs[2][0]
    assert "the chat template reads the clock, which stands at 2031-01-" in caplog.text
    [path] = (tmp_path / "notes").iterdir()
    assert timed.decode(read_notes(path)[0].prompt_ids).startswith("02 January 2031")


@pytest.mark.parametrize(
    ("call", "told"),
    [
        ("strftime_now('%Y')", "2031"),
        ('strftime_now( format = "%d %b" )', "02 Jan"),
        ("strftime_now('%d')|int + 1", "3"),
        ("strftime_now is defined", "True"),
        ("strftime_now(form)", None),
    ],
)
def test_every_call_of_the_clock_is_held(call, told, caplog):
    template, time = f"{{{{ {call} }}}}", datetime.datetime(2031, 1, 2)
    if told is None:
        assert at_time(template, time) == template
        assert "reads the clock by strftime_now(form), whose format cannot be seen" in caplog.text
        return
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = at_time(template, time)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == told


def test_the_first_who_asks_sets_the_time_for_all(tmp_path):
    times = {first_time(tmp_path / "clocks" / "x.txt") for _ in range(3)}
    assert len(times) == 1
    assert [path.name for path in (tmp_path / "clocks").iterdir()] == ["x.txt"]


# --- what cannot be written -------------------------------------------------------------------------------------------


def test_a_journal_that_fills_the_disk_ends_no_run(tmp_path, monkeypatch, caplog):
    add = Journal.add

    def full(self, key, record):
        if len(self) >= 1:
            raise OSError(28, "No space left on device")
        return add(self, key, record)

    monkeypatch.setattr(Journal, "add", full)
    lm = hcot(tmp_path)
    assert len(raw(lm)) == 3
    assert caplog.text.count(f"journal={tmp_path / 'journal'} can no longer be written (No space left on device)") == 1


def test_notes_that_fill_the_disk_end_no_run(tmp_path, monkeypatch, caplog):
    def full(self, note):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(NoteTaker, "add", full)
    assert len(raw(hcot(tmp_path, notes=tmp_path / "notes"))) == 3
    assert caplog.text.count("can no longer be written (No space left on device)") == 1


def test_notes_that_come_too_late_are_told(tmp_path, caplog):
    raw(hcot(tmp_path))
    raw(hcot(tmp_path, notes=tmp_path / "notes"))
    assert f"notes={tmp_path / 'notes'} will hold nothing of these 3" in caplog.text
    caplog.clear()
    for _ in range(2):  # and of those that have been noted nothing is said
        raw(hcot(tmp_path, notes=tmp_path / "others", seed=1), **SAMPLED)
    assert "will hold nothing" not in caplog.text


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a directory that nobody may write to")
def test_a_home_that_cannot_be_written_to_is_said_before_the_weights_are_loaded(monkeypatch):
    monkeypatch.delenv("HCOT_LMEVAL_CACHE")
    monkeypatch.setenv("HOME", "/proc/self")
    with pytest.raises(OSError, match=r"^journal=/proc/self/\.cache/hcot_lmeval/journal cannot .*journal=off"):
        HcotLM(pretrained="/no/such/weights", device="cpu")


def test_two_models_of_other_seeds_are_favoured_apart(tmp_path):
    """Were all these models to say the same, nothing above would mean anything."""
    assert raw(hcot(tmp_path)) != raw(hcot(tmp_path, favour(tiny_model("qwen2", seed=1), [3], 5.0)))


@pytest.mark.parametrize("damage", [{"response": None}, {"response": {"answer": "5"}}, {"response": {"text": "5"}}])
def test_a_record_of_the_journal_without_its_parts_is_generated_anew(tmp_path, damage, caplog):
    before = raw(hcot(tmp_path))
    for path in (tmp_path / "journal").rglob("*.jsonl"):
        header, *lines = path.read_text().splitlines()
        lines = [json.dumps(json.loads(line) | damage) for line in lines]
        path.write_text("\n".join([header, '{"key": ["a"]}', *lines]) + "\n")
    again = hcot(tmp_path)
    assert raw(again) == before
    assert again._statistics.resumed == 0
    assert "generated anew" in caplog.text


@pytest.mark.parametrize(("part", "value"), [("answer", 5), ("answer", None), ("stats", {"generated_tokens": "many"})])
def test_a_record_of_the_journal_with_other_types_is_generated_anew(tmp_path, part, value, caplog):
    before = raw(hcot(tmp_path))
    for path in (tmp_path / "journal").rglob("*.jsonl"):
        header, *lines = path.read_text().splitlines()
        records = [json.loads(line) for line in lines]
        changed = [{**record, "response": {**record["response"], part: value}} for record in records]
        path.write_text("\n".join([header, *map(json.dumps, changed)]) + "\n")
    again = hcot(tmp_path)
    assert raw(again) == before and again._statistics.resumed == 0
    assert "generated anew" in caplog.text


# --- prompts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{{ raise_exception('No system!') }}", "cannot be applied .No system!.; .*apply_chat_template=false"),
        ("{% for m in messages %}", "cannot be applied .*apply_chat_template=false"),
        ("<|im_start|>user Hello<|im_end|>", "leaves out what the user says.*apply_chat_template=false"),
        ("{% for m in messages %}{% for part in m['content'] %}{{ part.text }}{% endfor %}{% endfor %}", "leaves out"),
    ],
)
def test_a_chat_template_that_shows_no_problem_is_refused_when_the_model_is_loaded(tmp_path, template, told):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=told):
        hcot(tmp_path, tokenizer=tokenizer)
    assert raw(hcot(tmp_path, tokenizer=tokenizer, apply_chat_template=False))


def test_half_of_a_surrogate_pair_in_a_prompt_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"surrogate pair.*What is .ud83d\?"):
        hcot(tmp_path).generate_until(instances(("2+2?", "What is \ud83d?")), disable_tqdm=True)


def test_a_limit_that_does_nothing_is_told(tmp_path, caplog):
    lm = hcot(tmp_path, max_gen_toks=8)
    raw(lm)
    assert "max_gen_toks=8 of the model arguments does nothing" in caplog.text and "(24)" in caplog.text
    caplog.clear()
    raw(lm, max_gen_toks=8)
    raw(lm, max_gen_toks=None)
    assert "does nothing" not in caplog.text


def test_what_a_generation_config_recommends_in_vain_is_told(tmp_path, caplog):
    model = tiny_model("qwen2")
    raw(hcot(tmp_path, model))
    assert "not supported" not in caplog.text
    model.generation_config.no_repeat_ngram_size = 2
    raw(hcot(tmp_path, model))
    assert "recommends no_repeat_ngram_size=2, which is not supported" in caplog.text


def test_paths_may_be_objects(tmp_path):
    path = tmp_path / "model"
    save_tiny(path, tiny_model("qwen2"))
    assert raw(HcotLM(path, tokenizer=path, device="cpu", journal=None)) == raw(HcotLM(str(path), journal=None))


# --- checkpoints ------------------------------------------------------------------------------------------------------


def test_a_checkpoint_that_leaves_weights_to_chance_is_refused(tmp_path):
    path = tmp_path / "model"
    save_tiny(path, tiny_model("qwen2"))
    weights = load_file(path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 of .* such as model.layers.1.mlp.up_proj.weight"):
        HcotLM(str(path), journal=None)


def test_a_model_in_memory_without_a_tokenizer_is_told(tmp_path):
    with pytest.raises(ValueError, match="give its tokenizer="):
        HcotLM(tiny_model("qwen2"), journal=None)
