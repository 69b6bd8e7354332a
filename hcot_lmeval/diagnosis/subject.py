"""What is examined: a checkpoint, its grammar, and held-out rows rendered as at inference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

from hcot_lmeval.assets import BUNDLED, resolve
from hcot_lmeval.grammar import Grammar
from hcot_lmeval.markup import Markup
from hcot_lmeval.record import CONFIG_NAME, TrainingRecord, read_record, settle
from hcot_lmeval.settings import parse_settings, read_yaml
from hcot_lmeval.trace import Policy
from hcot_lmeval.training.config import SourceConfig
from hcot_lmeval.training.data.documents import Example
from hcot_lmeval.training.data.sources import load_source
from hcot_lmeval.training.data.text import TextForm, Unusable
from hcot_lmeval.training.run import RunDirectory
from hcot_lmeval.vocabulary import end_ids, marker_ids, read_vocabulary

BUNDLED_DATA = {"path": "synthetic:arith", "split": "validation", "options": {"size": 400, "depths": [3, 4]}}
"""What the bundled checkpoints solve; their validation split was never trained on."""


@dataclass(frozen=True)
class Problem:
    """A held-out row.

    Attributes:
        prompt: as text, rendered as at inference.
        example: prompt and gold trace as token ids, and the expected answer.
    """

    prompt: str
    example: Example


@dataclass(frozen=True)
class Subject:
    """A checkpoint to examine.

    Attributes:
        model: in evaluation mode.
        tokenizer: its tokenizer.
        record: of its training, or None.
        policy: that it would be run with.
        markup: the notation.
        grammar: in the ids of its vocabulary.
        form: how rows become prompts and traces.
    """

    model: Any
    tokenizer: Any
    record: TrainingRecord | None
    policy: Policy
    markup: Markup
    grammar: Grammar
    form: TextForm

    @property
    def names(self) -> dict[int, str]:
        """Control id -> its text."""
        return {i: str(self.tokenizer.convert_ids_to_tokens(i)) for i in self.grammar.control_ids}


def load(name: str, *, policy: str | None, markup: str | None, device: str, dtype: str, trust: bool = False) -> Subject:
    """Loads a checkpoint.

    Raises:
        OSError: there is none.
        ValueError: the vocabulary lacks the markers, or an option is not allowed.
    """
    place = resolve(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=trust)
        model = AutoModelForCausalLM.from_pretrained(place, dtype=dtype, trust_remote_code=trust).to(device).eval()
    except OSError as error:
        raise OSError(
            f"{name!r} could not be loaded; give a directory, a bundled checkpoint ({', '.join(BUNDLED)}), or an id "
            f"on a hub within reach: {' '.join(str(error).split())}"
        ) from error
    record = read_record(model)
    settled, notation = settle(record, policy, markup, allow=True)
    think, ends = read_vocabulary(tokenizer, notation).think_ids, end_ids(model.generation_config, tokenizer)
    grammar = Grammar(marker_ids(tokenizer, notation), think, ends)
    return Subject(model, tokenizer, record, settled, notation, grammar, TextForm(tokenizer, notation))


def check_place(place: Path) -> None:
    """Raises `ValueError` for the folder of a training run, or the model that one is still to write."""
    run = next((run for run in map(RunDirectory, (place, place.parent)) if run.identity.is_file()), None)
    if run is None or (place / CONFIG_NAME).is_file():
        return
    if (run.model / CONFIG_NAME).is_file():
        raise ValueError(f"{place} is the folder of a training run; give its model, {run.model}")
    last = run.last_checkpoint()
    advice = f"give its last checkpoint, {last}, or" if last else "it has no checkpoint yet;"
    raise ValueError(f"the training run in {run.root} is not finished; {advice} go on with it by the same command")


def source_of(name: str, data: str | None) -> SourceConfig:
    """Returns where the gold traces come from: as the user says, or else as the checkpoint's own run says.

    Args:
        name: of the checkpoint.
        data: a path, hub id or ``synthetic:…``, or a YAML mapping with the keys of a training source.

    Raises:
        ValueError: nothing is known, or the mapping has a key that is unknown.
    """
    if data is not None:
        import yaml

        given = yaml.safe_load(data) if data.lstrip().startswith("{") else {"path": data}
        return parse_settings(SourceConfig, given, "--data")
    if name in BUNDLED:
        return parse_settings(SourceConfig, BUNDLED_DATA)
    beside = [folder / "config.yaml" for folder in Path(name).absolute().parents[:2]]  # of a model, or a checkpoint
    for settings in (path for path in beside if path.is_file()):
        found = read_yaml(settings, "data:").get("data", {})
        sources = found.get("held_out") or []
        if sources:
            return parse_settings(SourceConfig, sources[0], str(settings))
    raise ValueError(
        f"no gold traces are known for {name}; name some with --data: a JSONL or parquet file with the columns "
        "question, hierarchical_cot and expected_answer, a hub data set, or synthetic:arith"
    )


def problems_of(subject: Subject, source: SourceConfig, count: int) -> list[Problem]:
    """Returns the first rows with distinct questions whose traces keep to the notation.

    Raises:
        ValueError: there is none.
    """
    found: dict[str, Problem] = {}
    for row in load_source(source, subject.markup.name):
        problem = _problem(subject, row)
        if problem is not None:
            found.setdefault(problem.prompt, problem)
        if len(found) == count:
            break
    if not found:
        raise ValueError(f"{source.path} has no row with a question and a trace; see docs/training.md for its columns")
    return list(found.values())


def _problem(subject: Subject, row: Mapping[str, Any]) -> Problem | None:
    try:
        return Problem(subject.form.prompt_text(row), subject.form.example(row))
    except Unusable:
        return None
