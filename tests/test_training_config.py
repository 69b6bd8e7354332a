"""Settings: read from YAML, changed from the command line, and every mistake named with its remedy."""

from __future__ import annotations

import pytest
import yaml

from hcot_lmeval.trace import Policy
from hcot_lmeval.training.config import SftConfig, describe_config, load_config, parse_config

MINIMAL = {
    "model": "tiny",
    "output": "out",
    "data": {"train": [{"path": "a.jsonl"}], "held_out_share": 0.1},
    "phases": [{"policy": "recompute", "steps": 10}],
}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    return path


def test_an_override_that_is_no_yaml_is_one_line(tmp_path):
    (tmp_path / "a.yaml").write_text("model: tiny\n")
    with pytest.raises(ValueError, match=r"^override 'data=\[1': the value is not YAML: [^\n]+$"):
        load_config(tmp_path / "a.yaml", ["data=[1"])


def test_overrides_reach_into_sections_and_lists(file) -> None:
    overrides = [
        "phases.0.steps=25",
        "trainer.learning_rate=1e-4",
        "data.train.0.columns={question: problem}",
        "lora.r=4",
    ]
    config = load_config(file, overrides)
    assert config.phases[0].steps == 25
    assert config.data.train[0].columns == {"question": "problem"}
    assert config.lora.r == 4
    assert float(config.trainer["learning_rate"]) == 1e-4


def test_a_bare_off_is_the_policy(file) -> None:
    file.write_text(file.read_text().replace("policy: recompute", "policy: off"))
    assert yaml.safe_load(file.read_text())["phases"][0]["policy"] is False  # what YAML makes of it
    assert load_config(file).policy is Policy.OFF
    assert load_config(file, ["phases.0.policy=off"]).policy is Policy.OFF


def test_the_last_phase_is_what_the_model_is_for(file) -> None:
    config = load_config(file, ["phases=[{policy: off, steps: 1}, {policy: evict, epochs: 0.5}]"])
    assert config.policy is Policy.EVICT


def changed(**changes) -> dict:
    return {**MINIMAL, **changes}


WRONG = {
    "an unknown key": (changed(modle="x"), ["modle is unknown; did you mean model?", "Known here: model"]),
    "an unknown key in a list": (
        changed(data={"train": [{"path": "a", "splitt": "x"}]}),
        ["data.train.0.splitt is unknown; did you mean split?"],
    ),
    "an unknown policy": (
        changed(phases=[{"policy": "evikt", "steps": 1}]),
        ["phases.0.policy", "'recompute'", "given: evikt"],
    ),
    "steps and epochs": (changed(phases=[{"steps": 1, "epochs": 1}]), ["phases.0", "steps or epochs, one of them"]),
    "neither": (changed(phases=[{}]), ["steps or epochs, one of them"]),
    "no phase": (changed(phases=[]), ["phases", "at least 1 item"]),
    "a missing key": ({k: v for k, v in MINIMAL.items() if k != "model"}, ["model: Field required"]),
}


@pytest.mark.parametrize("settings, told", WRONG.values(), ids=WRONG)
def test_mistakes_are_named_with_their_remedy(settings, told) -> None:
    with pytest.raises(ValueError) as error:
        parse_config(settings, "my.yaml")
    message = str(error.value)
    assert message.startswith("my.yaml cannot be used")
    assert all(part in message for part in told), message


def test_all_mistakes_are_told_at_once() -> None:
    with pytest.raises(ValueError, match=r"(?s)phases\.0\.policy.*modle"):
        parse_config(changed(modle=1, phases=[{"policy": "x", "steps": 1}]))


@pytest.mark.parametrize(
    "override, told",
    [
        ("steps", "not of the form key=value"),
        ("phases.7.steps=1", "no index of a list with 1 entries"),
        ("model.name.first=x", "neither a section nor a list"),
        ("model.name=x", "has no parts|no parts"),
    ],
)
def test_bad_overrides_are_told(file, override, told) -> None:
    with pytest.raises(ValueError, match=told):
        load_config(file, [override])


def test_a_file_that_is_no_mapping_is_told(file) -> None:
    file.write_text("- 1\n")
    with pytest.raises(ValueError, match="expected keys and values"):
        load_config(file)


def test_every_key_is_described() -> None:
    text = describe_config(SftConfig)
    assert len(text.splitlines()) > 50
    for name in SftConfig.model_fields:
        assert f"\n{name}" in f"\n{text}"
    assert "None)" not in text.replace("(default None)", "")
