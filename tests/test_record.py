"""The record of a training: kept by every way of saving, and held against how the model is decoded."""

from __future__ import annotations

import itertools
import json
import logging
import subprocess
import sys

import peft
import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from hcot_lmeval.engine import Engine
from hcot_lmeval.lm import HcotLM
from hcot_lmeval.record import FILE_NAME, TrainingRecord, read_record, settle, write_record
from hcot_lmeval.tokens import add_special_tokens
from hcot_lmeval.trace import Policy
from tests.tiny import save_tiny, tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
PRUNING = (Policy.RECOMPUTE, Policy.EVICT)


def recorded(policy="recompute", markup="hcot", kind="qwen2"):
    model = tiny_model(kind)
    write_record(model, TrainingRecord(policy, markup))
    return model


def full_record() -> TrainingRecord:
    seeding = add_special_tokens(tiny_tokenizer(markers=False, think=False), tiny_model("qwen2")).seeding
    return TrainingRecord(
        policy="evict",
        markup="hcot",
        think=("<think>", "</think>"),
        seeding=seeding,
        structure_loss={"kind": "mass", "weight": 1.0, "marker_weight": 1.0},
        curriculum=[{"policy": "off", "steps": 10}, {"policy": "evict", "epochs": 1.5}],
        data_hash="ab" * 32,
        steps=120,
        form="packed",
        command="train.py sft config.yaml --override 'data.train.0.path=语言'",
    )


class TestKeeping:
    @pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama"])
    def test_in_the_config_of_a_model(self, tmp_path, kind):
        record, model = full_record(), tiny_model(kind)
        write_record(model, record)
        save_tiny(tmp_path, model)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        loaded.save_pretrained(tmp_path / "again")
        sources = (model, model.config, tmp_path, str(tmp_path), loaded, AutoConfig.from_pretrained(tmp_path / "again"))
        assert [read_record(source) for source in sources] == [record] * 6
        assert isinstance(json.loads((tmp_path / "config.json").read_text())["hcot"], dict)

    def test_beside_an_adapter(self, tmp_path):
        record, model = full_record(), tiny_model("qwen2")
        write_record(model, TrainingRecord("off"))
        adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
        write_record(adapted, record, tmp_path / "adapter")
        adapted.save_pretrained(tmp_path / "adapter")
        assert not (tmp_path / "adapter" / "config.json").exists()
        assert read_record(tmp_path / "adapter") == record
        assert read_record(adapted) == record
        adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
        assert read_record(tmp_path / "merged") == record

    def test_on_the_hub(self, tmp_path, monkeypatch):
        """Ids are looked up as transformers looks up every file of a checkpoint."""
        (tmp_path / FILE_NAME).write_text(json.dumps(full_record().as_dict()))
        asked = []

        def cached_file(name, file, revision=None, **kwargs):
            asked.append((name, file, revision))
            return str(tmp_path / file) if (tmp_path / file).exists() else None

        monkeypatch.setattr("transformers.utils.cached_file", cached_file)
        assert read_record("some/adapter", "v2") == full_record()
        (tmp_path / FILE_NAME).unlink()
        assert read_record("some/model") is None
        wanted = [
            ("some/adapter", FILE_NAME, "v2"),
            ("some/model", FILE_NAME, None),
            ("some/model", "config.json", None),
        ]
        assert asked == wanted

    def test_nothing_is_there_where_nothing_was_written(self, tmp_path):
        save_tiny(tmp_path, tiny_model("qwen2"))
        assert [read_record(source) for source in (tiny_model("qwen2"), tmp_path, "no/such-checkpoint")] == [None] * 3

    def test_versions_are_those_of_here_and_now(self):
        versions = TrainingRecord("off").versions
        assert versions["python"] == sys.version.split()[0]
        assert versions["peft"] == peft.__version__
        assert {"hcot_lmeval", "torch", "transformers"} <= versions.keys()

    def test_a_later_version_may_have_added_fields(self):
        data = {**full_record().as_dict(), "optimizer": "muon"}
        assert TrainingRecord.from_dict(data) == full_record()

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            ({}, "policy and markup is missing; it has nothing"),
            ({"markup": "hcot", "steps": 3}, "policy is missing; it has markup, steps"),
            ({"policy": "on", "markup": "hcot"}, "policy 'on' is unknown; it is one of off, recompute, evict"),
        ],
    )
    def test_what_cannot_be_understood_is_an_error(self, data, message):
        model = tiny_model("qwen2")
        model.config.hcot = data
        with pytest.raises(ValueError, match=message):
            read_record(model)

    def test_importing_it_is_light(self):
        code = "import hcot_lmeval.record, sys; print({'torch', 'transformers'} & sys.modules.keys())"
        assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


class TestRule:
    @pytest.mark.parametrize(("trained", "policy"), itertools.product(Policy, Policy))
    def test_a_model_is_decoded_as_it_was_trained_or_without_pruning(self, trained, policy):
        record = TrainingRecord(trained)
        if policy in (trained, Policy.OFF):
            settle(record, policy, None)
        else:
            with pytest.raises(
                ValueError, match=f"policy={policy.value}, but .*{trained.value}.* Pass policy={trained}"
            ):
                settle(record, policy, None)
        settle(record, policy, None, allow=True)
        settle(None, policy, None)

    def test_the_notation_too(self):
        record = TrainingRecord("evict", "pencil")
        settle(record, "evict", None)
        settle(record, "evict", "pencil")
        settle(record, "off", "hcot")
        settle(record, "evict", "hcot", allow=True)
        with pytest.raises(ValueError, match=r"markup=hcot, but .*pencil.* Pass markup=pencil, or any_policy=True"):
            settle(record, "evict", "hcot")

    def test_what_is_left_open_is_as_trained_and_said_once(self, caplog):
        caplog.set_level(logging.INFO, "hcot_lmeval")
        policy, markup = settle(TrainingRecord("evict", "pencil"), None, None, policy_argument="pruning")
        assert (policy, markup.name) == (Policy.EVICT, "pencil")
        assert [r.getMessage() for r in caplog.records] == [
            "pruning=evict, as the model was trained (its training record says so)"
        ]

    def test_without_a_record_the_default_is_recompute_and_nothing_is_said(self, caplog):
        caplog.set_level(logging.INFO, "hcot_lmeval")
        policy, markup = settle(None, None, None)
        assert (policy, markup.name) == (Policy.RECOMPUTE, "hcot")
        assert settle(TrainingRecord("evict"), "evict", "hcot")[0] is Policy.EVICT
        assert caplog.records == []


class TestEngine:
    def engine(self, model, **options):
        return Engine(model, TOKENIZER, self_check=False, **options)

    @pytest.mark.parametrize(("trained", "asked"), [PRUNING, PRUNING[::-1], ("off", "evict"), ("off", "recompute")])
    def test_another_policy_is_refused_unless_told(self, trained, asked):
        model = recorded(trained)
        with pytest.raises(
            ValueError, match=rf"policy={asked}, but .*{trained}.*Pass policy={trained}.*any_policy=True"
        ):
            self.engine(model, policy=asked)
        assert self.engine(model, policy=asked, any_policy=True).policy == asked
        assert self.engine(model, policy="off").policy is Policy.OFF

    @pytest.mark.parametrize("trained", Policy)
    def test_the_default_is_the_policy_of_the_training(self, trained):
        assert self.engine(recorded(trained)).policy is trained
        assert self.engine(recorded(trained), policy=trained).policy is trained

    def test_the_notation_is_that_of_the_training(self):
        tokenizer, model = tiny_tokenizer(), recorded(markup="pencil")
        add_special_tokens(tokenizer, model, markup="pencil")
        assert Engine(model, tokenizer, self_check=False).markup.name == "pencil"
        with pytest.raises(ValueError, match="markup=hcot, but the model was trained on the notation pencil"):
            Engine(model, tokenizer, markup="hcot")
        assert Engine(model, tokenizer, markup="hcot", any_policy=True, self_check=False).markup.name == "hcot"

    def test_a_model_without_a_record_runs_as_ever(self):
        for policy in Policy:
            assert self.engine(tiny_model("qwen2"), policy=policy).policy is policy
        assert self.engine(tiny_model("qwen2")).policy is Policy.RECOMPUTE

    def test_a_peft_model_counts_by_its_config(self):
        adapted = peft.get_peft_model(recorded("evict"), peft.LoraConfig(target_modules=["q_proj"]))
        assert self.engine(adapted).policy is Policy.EVICT
        with pytest.raises(ValueError, match="policy=recompute"):
            self.engine(adapted, policy="recompute")


class TestModel:
    @pytest.fixture(scope="class")
    def folder(self, tmp_path_factory):
        """A checkpoint trained under evict, the same without a record, and an adapter trained under evict."""
        folder = tmp_path_factory.mktemp("record")
        save_tiny(folder / "evict", recorded("evict"))
        save_tiny(folder / "base", tiny_model("qwen2"))
        save_tiny(folder / "recompute", recorded("recompute"))
        adapted = peft.get_peft_model(tiny_model("qwen2"), peft.LoraConfig(target_modules=["q_proj"]))
        write_record(adapted, TrainingRecord("evict"), folder / "adapter")
        adapted.save_pretrained(folder / "adapter")
        return folder

    def lm(self, folder, name, **model_args):
        names = {key: str(folder / value) if key == "peft" else value for key, value in model_args.items()}
        return HcotLM(pretrained=str(folder / name), device="cpu", journal="off", **names)

    def test_another_policy_is_refused_unless_told(self, folder):
        with pytest.raises(ValueError, match=r"pruning=recompute, but .*evict.*Pass pruning=evict, or any_policy=True"):
            self.lm(folder, "evict", pruning="recompute")
        forced = self.lm(folder, "evict", pruning="recompute", any_policy=True)
        assert forced.policy is forced.engine.policy is Policy.RECOMPUTE
        assert self.lm(folder, "evict", pruning="off").engine.policy is Policy.OFF

    def test_the_default_is_the_policy_of_the_training(self, folder, caplog):
        caplog.set_level(logging.INFO, "hcot_lmeval")
        lm = self.lm(folder, "evict")
        assert lm.policy is lm.engine.policy is Policy.EVICT
        assert caplog.text.count("pruning=evict, as the model was trained") == 1
        assert lm.run_facts["pruning"] == lm.get_model_info()["hcot"]["pruning"] == "evict"
        assert self.lm(folder, "base").policy is Policy.RECOMPUTE

    @pytest.mark.parametrize("base", ["base", "recompute"])
    def test_an_adapter_says_what_it_was_trained_for(self, folder, base):
        lm = self.lm(folder, base, peft="adapter")
        assert lm.policy is lm.engine.policy is Policy.EVICT
        with pytest.raises(ValueError, match="pruning=recompute, but the model was trained under policy evict"):
            self.lm(folder, base, peft="adapter", pruning="recompute")

    def test_a_model_in_memory_has_its_record_in_its_config(self):
        with pytest.raises(ValueError, match="pruning=evict, but the model was trained without pruning"):
            HcotLM(pretrained=recorded("off"), tokenizer=TOKENIZER, pruning="evict")
        assert HcotLM(pretrained=recorded("off"), tokenizer=TOKENIZER).policy is Policy.OFF
