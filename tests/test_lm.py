"""The lm-eval model through its host: equal to `hf` where it should be, and its own where it prunes."""

import json
import logging
import random
import re

import lm_eval
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tokenizers.processors import TemplateProcessing

from hcot_lmeval.engine import Request, SamplingParams
from hcot_lmeval.events import Statistics
from hcot_lmeval.lm.model import DEFAULT_CHECKPOINT, HcotLM
from hcot_lmeval.notes import read_notes
from hcot_lmeval.response import Response
from hcot_lmeval.tokens import add_special_tokens
from hcot_lmeval.vocabulary import marker_ids
from tests.lm_tasks import QUESTIONS, choice_task, generation_task, instances
from tests.tiny import KINDS, favour, save_tiny, tiny_model, tiny_tokenizer

SAMPLED = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 60}


@pytest.fixture(autouse=True)
def _no_inventory(monkeypatch):
    """lm-eval describes the machine in every result, which takes 20 seconds and is no matter of ours."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


def evaluate(lm, tasks, **kwargs):
    """lm-eval's whole evaluation; without its index of thousands of tasks, which takes half a minute to build."""
    return lm_eval.simple_evaluate(lm, tasks=tasks, task_manager=TaskManager(include_defaults=False), **kwargs)


@pytest.fixture(scope="module")
def pruner():
    """A model that opens and closes blocks all the time, and its tokenizer."""
    return favour(tiny_model("qwen2", torch.float64), [3, 4, 5], 5.0), tiny_tokenizer()


@pytest.fixture(scope="module")
def stock():
    """A model that knows nothing of markers, thinking or chats."""
    return tiny_model("llama", torch.float64), tiny_tokenizer(markers=False, think=False, chat=False)


def extended(tokenizer):
    """A model whose vocabulary, and the tokenizer's, were extended by the markers."""
    model = tiny_model("qwen2")
    add_special_tokens(tokenizer, model)
    return model


def hcot(pair, **model_args):
    model, tokenizer = pair
    return HcotLM(pretrained=model, tokenizer=tokenizer, **{"max_context": 256, "journal": "off", **model_args})


def hf(pair, batch_size=1):
    return HFLM(pretrained=pair[0], tokenizer=pair[1], batch_size=batch_size)


def scoring(kind, *texts):
    return [
        Instance(kind, {}, text if isinstance(text, tuple) else (text,), 0, ("t", i, 1)) for i, text in enumerate(texts)
    ]


PAIRS = [(q, c) for q in QUESTIONS[:4] for c in (" yes", " no [THOUGHT] and more", "7")] + [("", "empty context")]


class TestAgainstHf:
    """With pruning off nothing may differ from lm-eval's own model. Weights are float64, so there are no near-ties."""

    @pytest.mark.parametrize("kind", KINDS)
    def test_greedy_text_is_the_same_for_every_batch_size(self, kind):
        pair = tiny_model(kind, torch.float64), tiny_tokenizer(markers=False, think=False, chat=False)
        if kind == "gemma2":  # whose soft cap other attentions than eager ignore in some releases of transformers
            pair[0].set_attn_implementation("eager")
        requests = instances()
        expected = hf(pair).generate_until(requests, disable_tqdm=True)
        assert len(set(expected)) > 3  # the model does say different things
        for batch_size in (1, 2, 5):
            assert hcot(pair, pruning="off", batch_size=batch_size).generate_until(requests) == expected
        random.Random(0).shuffle(requests)
        assert hcot(pair, pruning="off", batch_size=5).generate_until(requests) == [
            expected[request.doc_id] for request in requests
        ]

    def test_hf_in_batches_says_the_same(self, stock):
        requests = instances()
        for batch_size in (2, 5):
            expected = hf(stock, batch_size).generate_until(requests, disable_tqdm=True)
            assert hcot(stock, pruning="off", batch_size=batch_size).generate_until(requests) == expected

    def test_stop_strings_cut_at_the_same_place(self, stock):
        whole = hf(stock).generate_until(instances(), disable_tqdm=True)
        until = [text[len(text) // 2 :][:3] for text in whole[:3]] + ["zzz"]
        requests = instances(until=until)
        expected = hf(stock).generate_until(requests, disable_tqdm=True)
        assert expected != whole
        answers = hcot(stock, pruning="off", batch_size=3).generate_until(requests)
        assert answers == expected
        assert [a.finish_reason for a in answers[:3]] == ["stop"] * 3

    @pytest.mark.parametrize("until", [["o"], ["ow", "o"], ["<|im_start|>", "zzz"]])
    def test_a_token_that_overruns_the_stop_string_is_cut_within(self, stock, until):
        lm = hcot(stock, pruning="off")
        ids = stock[1].encode(" books how 3 of", add_special_tokens=False)
        params = SamplingParams(max_gen_toks=len(ids), stop_strings=tuple(until))
        (done,) = lm.engine.generate([Request("r", (70,), params, forced_ids=tuple(ids))])
        text = stock[1].decode(done.token_ids)
        for term in until:  # lm-eval's rule
            text = text.split(term)[0]
        assert lm._response(done) == text

    def test_end_of_text_and_minimum_length(self, stock):
        model, tokenizer = favour(tiny_model("llama", torch.float64, seed=1), [2], 5.0), stock[1]
        for kwargs in ({}, {"min_new_tokens": 12}):
            requests = instances(**kwargs)
            expected = hf((model, tokenizer)).generate_until(requests, disable_tqdm=True)
            answers = hcot((model, tokenizer), pruning="off", batch_size=4).generate_until(requests)
            assert answers == expected
            assert "eos" in {a.finish_reason for a in answers}
            if kwargs:
                assert min(a.stats["generated_tokens"] for a in answers) >= 12

    def test_a_stop_string_that_is_a_special_token(self, stock):
        model = favour(tiny_model("llama", torch.float64, seed=2), [1], 5.0)
        requests = instances(until=["<|im_start|>"])
        expected = hf((model, stock[1])).generate_until(requests, disable_tqdm=True)
        answers = hcot((model, stock[1]), pruning="off").generate_until(requests)
        assert answers == expected
        assert "stop" in {a.finish_reason for a in answers}

    def test_repetition_penalty_of_the_request_and_of_the_checkpoint(self, stock):
        model = tiny_model("llama", torch.float64)
        plain = hf((model, stock[1])).generate_until(instances(), disable_tqdm=True)
        for own, kwargs in ((1.7, {}), (1.0, {"repetition_penalty": 1.7}), (1.7, {"repetition_penalty": 1.3})):
            model.generation_config.repetition_penalty = own
            expected = hf((model, stock[1])).generate_until(instances(**kwargs), disable_tqdm=True)
            assert expected != plain
            assert hcot((model, stock[1]), pruning="off").generate_until(instances(**kwargs)) == expected

    def test_text_beside_the_markers_is_the_same(self):
        """The markers themselves stay, for the grader to see which thoughts are unfinished; `hf` drops them."""
        pair = favour(tiny_model("qwen2", torch.float64), [3, 4, 5], 3.0), tiny_tokenizer(think=False, chat=False)
        expected = hf(pair).generate_until(instances(), disable_tqdm=True)
        answers = hcot(pair, pruning="off", batch_size=3).generate_until(instances())
        assert [re.sub(r"\[[A-Z]{6,}\]", "", a) for a in answers] == expected
        assert any("[THOUGHT]" in a for a in answers)

    @pytest.mark.parametrize("batch_size", [1, 2, 5])
    def test_log_likelihoods_are_the_same_before_and_after_generating(self, pruner, batch_size):
        ours, theirs = hcot(pruner, batch_size=batch_size), hf(pruner, batch_size)
        pairs = scoring("loglikelihood", *PAIRS)
        texts = scoring("loglikelihood_rolling", *QUESTIONS)
        for _ in range(2):
            assert ours.loglikelihood(pairs, disable_tqdm=True) == theirs.loglikelihood(pairs, disable_tqdm=True)
            assert ours.loglikelihood_rolling(texts, disable_tqdm=True) == theirs.loglikelihood_rolling(
                texts, disable_tqdm=True
            )
            ours.generate_until(instances(QUESTIONS[:2]))

    def test_whole_evaluations_agree(self, stock):
        tasks = [generation_task(), choice_task()]
        ours = evaluate(hcot(stock, pruning="off", batch_size=2), tasks)
        theirs = evaluate(hf(stock, 2), [choice_task()])
        assert ours["results"]["tiny_choice"] == theirs["results"]["tiny_choice"]
        assert ours["samples"]["tiny_choice"] == theirs["samples"]["tiny_choice"]
        assert ours["results"]["tiny_generation"]["generated,all"] == 24


class TestSampling:
    def test_samples_do_not_depend_on_batch_or_order(self, pruner):
        requests = instances(repeats=3, **SAMPLED)
        alone = hcot(pruner, batch_size=1).generate_until(requests)
        assert sum(a.stats["prune_events"] for a in alone) > 10
        assert len({a.raw for a in alone}) == len(alone)
        assert [a.raw for a in hcot(pruner, batch_size=7).generate_until(requests)] == [a.raw for a in alone]
        backwards = hcot(pruner, batch_size="auto").generate_until(requests[::-1])
        by_question: list[list[str]] = [[] for _ in QUESTIONS]
        for request, answer in zip(requests[::-1], backwards, strict=True):
            by_question[request.doc_id].append(answer.raw)
        assert [sorted(raws) for raws in by_question] == [
            sorted(a.raw for a in alone[3 * i : 3 * i + 3]) for i in range(len(QUESTIONS))
        ]

    def test_the_seed_the_task_and_the_document_choose_the_sample(self, pruner):
        lm = hcot(pruner)
        (first,) = lm.generate_until(instances(QUESTIONS[:1], **SAMPLED))
        others = [
            lm.generate_until(instances(QUESTIONS[:1], task="u", **SAMPLED)),
            lm.generate_until(instances(QUESTIONS[:1], seed=5, **SAMPLED)),
            lm.generate_until(instances((QUESTIONS[1], QUESTIONS[0]), **SAMPLED))[1:],
            hcot(pruner, seed=1).generate_until(instances(QUESTIONS[:1], **SAMPLED)),
        ]
        assert first.raw not in {other.raw for (other,) in others}
        (again,) = hcot(pruner).generate_until(instances(QUESTIONS[:1], **SAMPLED))
        assert again.raw == first.raw

    def test_identical_greedy_requests_are_computed_once(self, pruner):
        lm = hcot(pruner, batch_size=4)
        answers = lm.generate_until(instances(QUESTIONS[:2], repeats=5))
        assert lm.engine.live.requests_done == 2
        assert [a.raw for a in answers] == [answers[0].raw] * 5 + [answers[5].raw] * 5

    def test_padding_of_uneven_ranks_costs_nothing(self, pruner):
        """lm-eval appends the last instance again, all its repeats, until ranks have equally many."""
        lm = hcot(pruner, batch_size=4)
        requests = instances(QUESTIONS[:2], repeats=2, **SAMPLED)
        answers = lm.generate_until(requests + [requests[-1]] * 4)
        assert lm.engine.live.requests_done == 4
        assert [a.raw for a in answers[4:]] == [a.raw for a in answers[2:4]] * 2

    def test_requests_with_different_kwargs_run_side_by_side(self, pruner):
        mixed = [instances((q,), max_gen_toks=5 + i)[0] for i, q in enumerate(QUESTIONS)]
        answers = hcot(pruner, pruning="off", batch_size=8).generate_until(mixed)
        lengths = [a.stats["generated_tokens"] for a in answers if a.finish_reason == "length"]
        assert lengths == sorted(set(lengths))
        assert len(lengths) > 2


class TestResponses:
    def test_statistics_ride_on_the_answers(self, pruner):
        for answer in hcot(pruner, batch_size=3).generate_until(instances(**SAMPLED)):
            assert type(answer) is Response
            stats = answer.stats
            assert set(stats) == set(Statistics().as_dict())
            assert stats["prompt_tokens"] + stats["generated_tokens"] - stats["pruned_tokens"] == stats["live_tokens"]
            assert stats["finish_reason"] == answer.finish_reason

    def test_the_answer_follows_the_thinking(self):
        """`<think>` and `</think>` come often, so answers, cut thoughts and second thoughts all occur."""
        pair = favour(tiny_model("qwen2", torch.float64), [6, 7], 5.0), tiny_tokenizer()
        answers = hcot(pair).generate_until(instances(repeats=4, **SAMPLED))
        kinds = set()
        for answer in answers:
            is_open = answer.raw.rfind("<think>") > answer.raw.rfind("</think>")
            kinds.add(is_open)
            assert answer == ("" if is_open else answer.raw.rpartition("</think>")[2].lstrip())
            assert not {"<think>", "</think>"} & set(answer.thinking.split())
        assert kinds == {True, False}

    def test_thinking_that_the_template_opened_counts(self, pruner):
        lm = hcot(pruner, enable_thinking=True, apply_chat_template=True)
        answers = lm.generate_until(instances(**SAMPLED))
        assert all(answer == "" or "</think>" in answer.raw for answer in answers)
        assert any(answer == "" for answer in answers)
        closed = hcot(pruner, apply_chat_template=True, enable_thinking=False).generate_until(instances(**SAMPLED))
        assert any(answer != "" for answer in closed)

    def test_a_prompt_without_room_ends_at_once(self, pruner, caplog):
        lm = hcot(pruner, max_context=60, apply_chat_template=False)
        with caplog.at_level(logging.WARNING):
            long, short = lm.generate_until(instances(("word " * 80, "What?"), max_gen_toks=8))
        assert (long, long.finish_reason, long.stats["generated_tokens"]) == ("", "context", 0)
        assert short.stats["generated_tokens"] == 8
        assert "1 of 2 prompts" in caplog.text
        assert "max_context=60" in caplog.text

    @pytest.mark.parametrize("journal", ["journal", "off"])
    def test_an_interrupted_run_says_what_is_kept(self, pruner, tmp_path, journal, monkeypatch):
        lm = hcot(pruner, journal=journal if journal == "off" else tmp_path / journal)
        stream = lm.engine.stream

        def interrupted(*args):
            yield next(iter(stream(*args)))
            raise KeyboardInterrupt

        monkeypatch.setattr(lm.engine, "stream", interrupted)
        kept = "nothing of the 1 finished" if journal == "off" else rf"1 of 3 .* kept in {tmp_path}.*; the same command"
        with pytest.raises(KeyboardInterrupt, match=kept):
            lm.generate_until(instances(QUESTIONS[:3]), disable_tqdm=True)

    def test_an_empty_prompt_begins_with_the_prefix_token(self, stock):
        (answer,) = hcot(stock, pruning="off").generate_until(instances(("",)))
        assert answer.stats["prompt_tokens"] == 1

    def test_live_tokens_are_bounded_and_generated_ones_are_not(self, pruner):
        lm = hcot(pruner, max_context=70, apply_chat_template=False)
        answers = lm.generate_until(instances(do_sample=True, temperature=1.0, max_gen_toks=300, repeats=3))
        assert max(a.stats["peak_live_tokens"] for a in answers) <= 70
        assert max(a.stats["prompt_tokens"] + a.stats["generated_tokens"] for a in answers) > 70
        assert "context" in {a.finish_reason for a in answers}

    def test_defaults_of_the_budgets(self, pruner):
        model, tokenizer = pruner
        pruned = HcotLM(pretrained=model, tokenizer=tokenizer, journal="off")
        assert (pruned.max_context, pruned.max_gen_toks) == (1024, 32768)
        plain = HcotLM(pretrained=model, tokenizer=tokenizer, journal="off", pruning="off", max_length=512)
        assert (plain.max_context, plain.max_gen_toks) == (512, 512)
        assert (
            hcot(pruner, max_gen_toks=7)
            .generate_until(instances(QUESTIONS[:1], max_gen_toks=None))[0]
            .stats["generated_tokens"]
            <= 7
        )


class TestPrompts:
    def test_marker_text_in_a_prompt_stays_text(self, pruner):
        lm = hcot(pruner, apply_chat_template=False)
        ids, marker = lm._prompt("Say [THOUGHT] and [RETURN].").ids, pruner[1].convert_tokens_to_ids("[THOUGHT]")
        assert marker not in ids
        assert pruner[1].decode(ids) == "Say [THOUGHT] and [RETURN]."
        assert marker in lm.tok_encode("[THOUGHT]")  # log-likelihoods read texts as hf does

    def test_the_chat_template_is_applied_once(self, pruner):
        lm = hcot(pruner)
        rendered = lm.apply_chat_template([{"role": "user", "content": "What?"}])
        assert rendered.endswith("<|im_start|>assistant\n")
        assert lm._prompt("What?") == lm._prompt(rendered)
        fresh = hcot(pruner)  # rendered by nobody that this model has seen
        assert fresh._prompt(rendered) == lm._prompt(rendered)
        assert hcot(pruner, apply_chat_template=False)._prompt("What?") != lm._prompt("What?")

    @pytest.mark.parametrize("by_harness", [True, False])
    def test_both_ways_to_the_template_give_the_same_answers(self, pruner, by_harness):
        result = evaluate(hcot(pruner), [generation_task()], apply_chat_template=by_harness)
        expected = hcot(pruner, apply_chat_template=True).generate_until(
            instances(QUESTIONS[:5], task="tiny_generation")
        )
        assert [s["resps"][0][0] for s in result["samples"]["tiny_generation"]] == expected

    def test_the_samples_show_what_the_model_has_read(self, pruner):
        for options in ({}, {"apply_chat_template": True}):
            (sample,) = evaluate(hcot(pruner), [generation_task(docs=1)], **options)["samples"]["tiny_generation"]
            assert sample["arguments"][0][0] == f"<|im_start|>user\n{QUESTIONS[0]}<|im_end|>\n<|im_start|>assistant\n"

    def test_what_the_user_writes_does_not_open_the_thinking(self, pruner):
        lm = hcot(pruner)
        assert lm._prompt("Write <think> first.").thinking is False
        assert hcot(pruner, enable_thinking=True)._prompt("Close it with </think>.").thinking is True
        assert hcot(pruner, apply_chat_template=False)._prompt("Question\n<think>\n").thinking is True

    @pytest.mark.parametrize("add_bos_token", [None, True, False])
    @pytest.mark.parametrize("markers", [True, False])
    def test_a_beginning_of_text_is_added_as_in_hf_and_never_twice(self, add_bos_token, markers):
        tokenizer = tiny_tokenizer(markers=markers, think=False, chat=False)
        tokenizer.bos_token = "<|im_start|>"
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
        )
        arguments = {"tokenizer": tokenizer, "add_bos_token": add_bos_token, "pretrained": tiny_model("qwen2")}
        ours, theirs = HcotLM(**arguments, pruning="off", journal="off"), HFLM(**arguments)
        for text in ("What?", "<|im_start|>What?", " <|im_start|>"):
            expected = theirs.tok_batch_encode([text])[0][0].tolist()
            assert ours._prompt(text).ids == expected
        assert (ours._prompt("What?").ids[0] == 1) is (add_bos_token is not False)

    def test_decoding_keeps_markers_and_thinking_tokens(self, pruner):
        lm = hcot(pruner)
        ids = pruner[1].encode("<think>a [THOUGHT]b</think>c<|im_end|>")
        assert lm.tok_decode(ids) == "<think>a [THOUGHT]b</think>c"
        assert lm.tok_decode(ids, skip_special_tokens=False).endswith("<|im_end|>")
        assert lm.tok_decode(3) == "[THOUGHT]"


class TestRecords:
    def test_totals_reach_the_results_file(self, pruner):
        lm = hcot(pruner, batch_size=4)
        result = evaluate(lm, [generation_task(repeats=2, **SAMPLED)])
        answers = lm.generate_until(instances(QUESTIONS[:5], repeats=2, task="tiny_generation", **SAMPLED))
        totals = json.loads(json.dumps(result["config"]["hcot"]))
        assert totals["requests"] == 10
        for name in ("generated_tokens", "pruned_tokens", "prune_events", "reforwarded_tokens"):
            assert totals[name] == sum(a.stats[name] for a in answers) > 0
        assert totals["peak_live_tokens"] == max(a.stats["peak_live_tokens"] for a in answers)
        assert sum(totals["finish_reasons"].values()) == 10
        assert (totals["pruning"], totals["max_context"], totals["chat_template"]) == ("recompute", 256, True)
        assert result["config"]["model_num_parameters"] == pruner[0].num_parameters()  # and hf's own facts remain

    def test_notes_hold_every_request(self, pruner, tmp_path):
        answers = hcot(pruner, notes=tmp_path / "notes").generate_until(instances(repeats=2, **SAMPLED))
        (path,) = (tmp_path / "notes").iterdir()
        notes = read_notes(path)
        assert sorted(n.statistics.generated_tokens for n in notes) == sorted(
            a.stats["generated_tokens"] for a in answers
        )
        assert {(n.meta["task"], n.meta["doc_id"], n.meta["repeat"]) for n in notes} == {
            ("t", doc, repeat) for doc in range(len(QUESTIONS)) for repeat in range(2)
        }

    def test_lm_evals_cache_of_responses_is_refused(self, pruner, tmp_path):
        with pytest.raises(ValueError, match=r"use_cache is not supported .* journal"):
            evaluate(hcot(pruner), [generation_task(docs=1)], use_cache=str(tmp_path / "cache"))

    def test_policies_agree_until_the_first_prune(self, pruner):
        texts = {}
        for pruning in ("off", "recompute", "evict"):
            answers = hcot(pruner, pruning=pruning).generate_until(instances(**SAMPLED))
            texts[pruning] = [a.raw for a in answers]
            pruned = [a.stats["pruned_tokens"] > 0 for a in answers]
            assert any(pruned) is (pruning != "off")
        assert len({tuple(t) for t in texts.values()}) == 3
        assert all(len({t[i][:4] for t in texts.values()}) == 1 for i in range(len(QUESTIONS)))


class TestCheckpoints:
    def test_from_a_directory_with_arguments_as_the_command_line_gives_them(self, pruner, tmp_path):
        path = save_tiny(tmp_path / "model", *pruner)
        arguments = (
            f"pretrained={path},dtype=float64,pruning=evict,max_context=256,journal=off,apply_chat_template=auto"
        )
        lm = HcotLM.create_from_arg_string(arguments, {"batch_size": "auto", "max_batch_size": None, "device": "cpu"})
        assert lm.tokenizer_name == path.replace("/", "__")
        expected = hcot(pruner, pruning="evict").generate_until(instances(**SAMPLED))
        assert [a.raw for a in lm.generate_until(instances(**SAMPLED))] == [a.raw for a in expected]

    def test_with_an_adapter(self, pruner, tmp_path):
        peft = pytest.importorskip("peft")
        path = save_tiny(tmp_path / "model", tiny_model("qwen2"), pruner[1])
        torch.manual_seed(0)
        adapted = peft.get_peft_model(
            tiny_model("qwen2"), peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        )
        adapted.save_pretrained(tmp_path / "adapter")
        arguments = {"pretrained": path, "device": "cpu", "pruning": "off", "dtype": "float32"}
        with_adapter = HcotLM(**arguments, peft=str(tmp_path / "adapter"))
        without = HcotLM(**arguments)
        prompts = tuple(with_adapter._prompts(question).text for question in QUESTIONS)
        theirs = HFLM(pretrained=path, device="cpu", dtype="float32", peft=str(tmp_path / "adapter"))
        expected = theirs.generate_until(instances(prompts), disable_tqdm=True)
        raw = [a.raw for a in with_adapter.generate_until(instances())]
        decode, encode = pruner[1].decode, pruner[1].encode
        assert [decode(encode(text), skip_special_tokens=True) for text in raw] == expected
        assert raw != [a.raw for a in without.generate_until(instances())]
        assert with_adapter.run_facts != without.run_facts

    def test_an_adapter_brings_its_tokenizer(self, tmp_path):
        peft = pytest.importorskip("peft")
        tokenizer = tiny_tokenizer(markers=False)
        path = save_tiny(tmp_path / "model", tiny_model("qwen2"), tokenizer)
        model = extended(tokenizer)
        rows = {"embed_tokens": sorted(marker_ids(tokenizer).ids)}
        adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices=rows))
        adapted.save_pretrained(tmp_path / "adapter")
        with pytest.raises(
            OSError, match=r"peft=.* does not fit on pretrained=.* the tokenizer that it was trained on"
        ):
            HcotLM(path, device="cpu", peft=str(tmp_path / "adapter"), journal="off")
        tokenizer.save_pretrained(tmp_path / "adapter")
        lm = HcotLM(path, device="cpu", peft=str(tmp_path / "adapter"), max_context=64, journal="off")
        assert lm.policy == "recompute" and len(lm.tokenizer) == len(tokenizer) > len(tiny_tokenizer(markers=False))
        assert lm.generate_until(instances(QUESTIONS[:1]), disable_tqdm=True)

    def test_default_checkpoint_is_the_published_one(self):
        assert DEFAULT_CHECKPOINT == "anujjamwal/OpenMath-Nemotron-1.5B-PruneAware"
        with pytest.raises(OSError, match="offline mode"):  # that it is asked for is all that can be seen here
            HcotLM(device="cpu")

    def test_a_tokenizer_without_markers_is_refused_unless_nothing_is_pruned(self, stock):
        with pytest.raises(ValueError, match=r"lacks the hcot markers .*add_special_tokens.*pruning=off"):
            hcot(stock)
        assert hcot(stock, pruning="off").generate_until(instances(QUESTIONS[:1]))
