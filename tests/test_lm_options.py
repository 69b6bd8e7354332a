"""Model arguments and generation kwargs: what they mean, and what is said about those that mean nothing."""

import logging
from pathlib import Path

import pytest
import torch
from lm_eval import simple_evaluate
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from hcot_lmeval.lm import HcotLM
from hcot_lmeval.lm.checks import check_run
from hcot_lmeval.lm.options import (
    LOADING_KWARGS,
    QUANTIZATION_KWARGS,
    Options,
    known_names,
    split_model_args,
    unknown_argument,
)
from hcot_lmeval.lm.requests import GEN_KWARGS, GenerationSettings, repeat_indices, request_seed
from hcot_lmeval.notes import NotesFile
from hcot_lmeval.trace import Policy
from tests.lm_tasks import instances
from tests.tiny import save_tiny, tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("checkpoint") / "model", tiny_model("qwen2"))


class TestModelArguments:
    @pytest.mark.parametrize(
        ("given", "parsed"),
        [
            ({}, {"pruning": None, "markup": None, "any_policy": False, "apply_chat_template": None, "seed": None}),
            ({"pruning": "off"}, {"pruning": Policy.OFF}),
            ({"pruning": False}, {"pruning": Policy.OFF}),  # a bare `off` in a YAML file
            ({"pruning": "evict"}, {"pruning": Policy.EVICT}),
            ({"any_policy": True}, {"any_policy": True}),
            ({"journal": "off"}, {"journal": None}),
            ({"journal": False}, {"journal": None}),
            ({"journal": "some/where"}, {"journal": Path("some/where")}),
            ({"notes": "some/where"}, {"notes": Path("some/where")}),
            ({"notes": "off"}, {"notes": None}),
            ({"apply_chat_template": "auto"}, {"apply_chat_template": None}),
            ({"apply_chat_template": True}, {"apply_chat_template": True}),
            ({"apply_chat_template": "False"}, {"apply_chat_template": False}),
            ({"max_context": 4096, "max_gen_toks": 9}, {"max_context": 4096, "max_gen_toks": 9}),
            ({"kv_dtype": "auto"}, {"kv_dtype": "auto", "loop": "auto"}),
            ({"kv_dtype": "float8_e4m3fn"}, {"kv_dtype": "float8_e4m3fn"}),
            ({"loop": "host", "graphs": False, "run_ahead": 4}, {"loop": "host", "graphs": False, "run_ahead": 4}),
            ({"seed": -1.0}, {"seed": -1}),  # as lm-eval reads -1
        ],
        ids=str,
    )
    def test_ours(self, given, parsed):
        options = Options.parse(given)
        assert {name: getattr(options, name) for name in parsed} == parsed

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"pruning": "on"}, "pruning='on' is not allowed; choose one of off, recompute, evict"),
            ({"pruning": True}, "pruning=True is not allowed; choose one of off, recompute, evict"),
            ({"markup": "hcott"}, "choose one of hcot"),
            ({"attention": "fast"}, "attention='fast' is not allowed; choose one of auto, flash-attn, flash, triton"),
            ({"weights": "int8"}, "weights='int8' is not allowed; choose one of auto, plain, packed"),
            (
                {"kv_dtype": "fp8"},
                "kv_dtype='fp8' is not allowed; choose one of auto, bfloat16, float16, float8_e4m3fn",
            ),
            ({"max_context": -4.0}, "max_context=-4 is not allowed; give a whole number from 1 up"),
            ({"max_context": "4k"}, "max_context='4k' is not allowed; give a whole number"),
            ({"max_gen_toks": True}, "max_gen_toks=True is not allowed; give a whole number"),
            ({"journal": True}, "neither a directory nor 'off'"),
            ({"think_start_token": 7}, "think_start_token=7 is not allowed; give a text"),
            ({"tp_plan": "auto"}, "use parallelize=True"),
            ({"mixed_precision_dtype": "bfloat16"}, "dtype="),
        ],
        ids=str,
    )
    def test_values_that_are_not_allowed(self, given, message):
        """More of them are in tests/mistakes.py."""
        with pytest.raises(ValueError, match=message.replace("(", r"\(")):
            split_model_args(given)

    @pytest.mark.parametrize(("name", "flag"), [("slots", "--batch_size"), ("max_slots", "--max_batch_size")])
    def test_options_of_the_engine_are_named_as_lm_eval_has_them(self, name, flag):
        assert f"{name!r} is unknown; here that is {flag}. Allowed" in str(unknown_argument(name, ["notes"]))

    @pytest.mark.parametrize(
        ("name", "near"), [("prunning", "pruning"), ("max_ctx", None), ("max_contxt", "max_context"), ("dtyp", "dtype")]
    )
    def test_unknown_ones_name_the_nearest_known_one(self, checkpoint, name, near):
        for pretrained in (checkpoint, tiny_model("qwen2"), "no/such-checkpoint"):
            with pytest.raises(ValueError, match=f"'{name}' is unknown") as error:
                HcotLM(pretrained=pretrained, tokenizer=tiny_tokenizer(), **{name: 1})
            assert near is None or f"did you mean {near}?" in str(error.value)
            assert "pruning" in str(error.value)  # the list of ours

    def test_every_documented_argument_of_hf_is_known(self):
        documented = """pretrained tokenizer revision subfolder dtype device batch_size max_batch_size max_length
            trust_remote_code use_fast_tokenizer add_bos_token prefix_token_id parallelize peft delta gguf_file
            think_end_token enable_thinking chat_template_args autogptq gptqmodel softmax_dtype logits_cache"""
        assert set(documented.split()) <= known_names()
        assert {"device_map", "attn_implementation", "low_cpu_mem_usage"} <= LOADING_KWARGS <= known_names()

    def test_fields_of_the_config_may_be_overridden(self, checkpoint):
        lm = HcotLM(pretrained=checkpoint, device="cpu", max_position_embeddings=99, attn_implementation="eager")
        assert lm.max_context == 99
        assert lm.model.config._attn_implementation == "eager"

    def test_without_a_device_it_takes_what_there_is(self, checkpoint):
        """`hf` would ask for CUDA, there or not."""
        assert HcotLM(pretrained=checkpoint).device.type == ("cuda" if torch.cuda.is_available() else "cpu")

    def test_bitsandbytes_fields_become_a_quantization_config(self, checkpoint, monkeypatch):
        seen = {}

        def load(path, **kwargs):
            seen.update(kwargs)
            return tiny_model("qwen2"), {"missing_keys": set()}

        monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
        HcotLM(pretrained=checkpoint, device="cpu", load_in_4bit=True, bnb_4bit_compute_dtype="bfloat16")
        config = seen["quantization_config"]
        assert isinstance(config, BitsAndBytesConfig)
        assert config.load_in_4bit
        assert config.bnb_4bit_compute_dtype == torch.bfloat16
        assert not QUANTIZATION_KWARGS & seen.keys()
        assert {name for name in BitsAndBytesConfig().__dict__ if name.startswith("bnb")} <= QUANTIZATION_KWARGS

    def test_thinking_needs_an_end_that_somebody_names(self, checkpoint):
        bare = tiny_tokenizer(think=False)
        with pytest.raises(ValueError, match="name the end of thinking with think_end_token"):
            HcotLM(pretrained=checkpoint, tokenizer=bare, device="cpu", enable_thinking=True)
        names = {"think_start_token": "<done>", "think_end_token": "</done>"}
        named = HcotLM(pretrained=checkpoint, tokenizer=bare, device="cpu", enable_thinking=True, **names)
        assert named.think == ("<done>", "</done>")
        by_id = HcotLM(pretrained=checkpoint, device="cpu", think_end_token=7)
        assert by_id.think == HcotLM(pretrained=checkpoint, device="cpu").think == ("<think>", "</think>")
        assert not HcotLM(pretrained=checkpoint, tokenizer=bare, device="cpu").vocabulary.has_thinking

    def test_a_switch_of_thinking_acts_or_is_an_error(self, checkpoint):
        deaf = tiny_tokenizer()
        deaf.chat_template = deaf.chat_template.replace("enable_thinking", "false")
        for enable in (True, False):
            with pytest.raises(ValueError, match=f"enable_thinking={enable} does nothing: the chat template"):
                HcotLM(pretrained=checkpoint, tokenizer=deaf, device="cpu", enable_thinking=enable)
        untold = HcotLM(pretrained=checkpoint, device="cpu", enable_thinking=True, apply_chat_template=False)
        with pytest.raises(ValueError, match="enable_thinking=True does nothing, for no chat template is applied"):
            untold.generate_until(instances(), disable_tqdm=True)

    def test_notes_say_the_name_of_the_checkpoint(self, checkpoint, tmp_path):
        lm = HcotLM(pretrained=checkpoint, device="cpu", journal="off", notes=str(tmp_path))
        lm.generate_until(instances(max_gen_toks=1), disable_tqdm=True)
        [path] = tmp_path.iterdir()
        assert NotesFile(path).run["name"] == "model"

    def test_a_vocabulary_beyond_the_model_is_refused_at_load(self, tmp_path):
        for rows, said in ((256, "tokenizer has ids up to 319"), (4, "markers go up to id 5")):
            small = save_tiny(tmp_path / str(rows), tiny_model("qwen2", vocab_size=rows), tiny_tokenizer())
            with pytest.raises(ValueError, match=f"{said}, but the embedding of the model has rows for {rows} tokens"):
                HcotLM(pretrained=small, device="cpu")

    def test_a_chat_template_that_is_asked_for_has_to_exist(self, checkpoint):
        with pytest.raises(ValueError, match="no chat template; use auto or false"):
            HcotLM(pretrained=checkpoint, tokenizer=tiny_tokenizer(chat=False), device="cpu", apply_chat_template=True)


class TestGenerationKwargs:
    settings = GenerationSettings(77, {"top_p": 0.9, "repetition_penalty": 1.2, "top_k": None}, {"<s>": 3}.get)

    @pytest.mark.parametrize(
        ("given", "params"),
        [
            ({}, {"temperature": 0.0, "max_gen_toks": 77, "min_gen_toks": 0, "repetition_penalty": 1.2, "top_p": 1.0}),
            ({"temperature": 0.7}, {"temperature": 0.7, "top_p": 0.9, "top_k": 0, "seed": 5}),
            ({"do_sample": True, "temperature": 1, "top_p": 0.5}, {"temperature": 1.0, "top_p": 0.5}),
            ({"do_sample": False, "temperature": 0.7}, {"temperature": 0.0, "seed": 0}),
            ({"temperature": 0.0, "top_p": 0.3, "top_k": 9, "min_p": 0.1}, {"top_p": 1.0, "top_k": 0, "min_p": 0.0}),
            ({"temperature": 1.0, "top_k": -1}, {"top_k": 0}),
            ({"max_new_tokens": 5}, {"max_gen_toks": 5}),
            ({"max_tokens": 5, "min_tokens": 2}, {"max_gen_toks": 5, "min_gen_toks": 2}),
            ({"max_gen_toks": None}, {"max_gen_toks": 77}),
            ({"until": "x"}, {"stop_strings": ("x",), "stop_ids": ()}),
            ({"until": ["x", "", "<s>", "x"]}, {"stop_strings": ("x",), "stop_ids": (3,)}),
            ({"until": None}, {"stop_strings": ()}),
            ({"repetition_penalty": 1.0, "num_beams": 1}, {"repetition_penalty": 1.0}),
        ],
        ids=str,
    )
    def test_known_ones(self, given, params):
        made = self.settings.params(given, seed=5)
        assert {name: getattr(made, name) for name in params} == params

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"do_sample": True}, "needs a temperature above 0"),
            ({"min_gen_toks": 99}, "min_gen_toks=99 is not allowed"),
        ],
        ids=str,
    )
    def test_what_is_not_allowed(self, given, message):
        with pytest.raises(ValueError, match=message):
            self.settings.params(given)

    def test_an_unknown_one_stops_the_run_before_it_begins(self, checkpoint):
        lm = HcotLM(pretrained=checkpoint, device="cpu", journal="off")
        with pytest.raises(ValueError, match="'typical_p' is unknown"):
            lm.generate_until([*instances(), *instances(typical_p=0.5)])
        assert "engine" not in vars(lm)

    def test_every_kwarg_of_lm_evals_own_tasks_is_known(self):
        """Collected from the generation_kwargs of all tasks of lm-eval 0.4.13."""
        used = "until do_sample temperature max_gen_toks num_beams max_new_tokens top_p"
        assert set(used.split()) <= GEN_KWARGS

    def test_upstream_warns_of_contradictions(self, caplog):
        with caplog.at_level(logging.WARNING):
            self.settings.params({"do_sample": False, "temperature": 0.123})
        assert "0.123" in caplog.text


class TestRepeats:
    def test_repeats_are_counted_per_instance_and_start_over(self):
        first, second = instances(("a", "b"), repeats=1)
        first.repeats = second.repeats = 2
        assert list(repeat_indices([first, first, second, second, second, second])) == [0, 1, 0, 1, 0, 1]
        first.repeats = None  # made by hand
        assert list(repeat_indices([first, first])) == [0, 0]

    def test_seeds_differ_in_everything_that_names_a_sample(self):
        first, second = instances(("a", "b"))
        (other,) = instances(("a",), task="u")
        seeds = [
            request_seed(0, first, 0),
            request_seed(1, first, 0),
            request_seed(0, first, 1),
            request_seed(0, second, 0),
            request_seed(0, other, 0),
        ]
        assert len(set(seeds)) == 5
        assert all(0 <= seed < 2**63 for seed in seeds)

    def test_seeds_never_change(self):
        """A number written down: another one would change everybody's samples."""
        assert request_seed([0, None], instances(("a",))[0], 0) == 4450141494254206931


@pytest.mark.parametrize(("value", "expected"), [(None, None), ("oracle", "oracle"), ("keep_last:4", "keep_last:4")])
def test_ablation(value: str | None, expected: str | None) -> None:
    ablation = Options.parse({"ablation": value}).ablation
    assert (ablation if ablation is None else str(ablation)) == expected
    with pytest.raises(ValueError, match="ablation='newest' is not one of keep_last:N"):
        Options.parse({"ablation": "newest"})


def test_the_limit_of_a_task_is_not_guessed_before_it_is_known():
    """The task's own limit is looked at with its documents; here only the command's arguments are."""
    check_run(simple_evaluate, (), {"model": "hcot", "tasks": [], "gen_kwargs": "min_gen_toks=30"})
    with pytest.raises(ValueError, match="min_gen_toks=30"):
        check_run(simple_evaluate, (), {"model": "hcot", "tasks": [], "gen_kwargs": "min_gen_toks=30,max_gen_toks=20"})
