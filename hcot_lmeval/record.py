"""What a checkpoint says about its training, so that nobody decodes it in another context than it was trained on.

`recompute` and `evict` are two different models of the context, and so is no pruning at all. A checkpoint that knows
which one it was trained for is decoded so by default, and another one is refused unless the user insists.

The record lives in ``config.json`` under the key ``hcot``, where `save_pretrained`, `from_pretrained` and hubs carry it
along. An adapter has no ``config.json``; its record is the file `FILE_NAME` beside its weights.

No import of this module is heavy; transformers is needed on the hub alone.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from hcot_lmeval.markup import Markup, get_markup
from hcot_lmeval.provenance import versions
from hcot_lmeval.trace import Policy

logger = logging.getLogger(__name__)

KEY = "hcot"
"""Where the record stands in a model's config."""
FILE_NAME = "hcot_training.json"
"""The record of an adapter."""
CONFIG_NAME = "config.json"


@dataclass
class TrainingRecord:
    """How a checkpoint was trained. All values are plain data, as JSON has it.

    Attributes:
        policy: what a closing marker did in the contexts that the model was trained on, last: off, recompute or evict.
        markup: name of the notation.
        think: the strings around the thinking section, or None for a model without.
        seeding: how the rows of new tokens started (`hcot_lmeval.tokens.Added.seeding`).
        structure_loss: kind and weights of what was added to the cross-entropy.
        curriculum: the phases in order, each with its policy and its length.
        data_hash: digest of the training data.
        steps: optimiser steps taken.
        form: packed or stages: the form in which traces were fed.
        versions: of the libraries.
        command: the command line.

    Raises:
        ValueError: the policy is unknown.
    """

    policy: str
    markup: str = "hcot"
    think: tuple[str, str] | None = ("<think>", "</think>")
    seeding: dict[str, Any] = field(default_factory=dict)
    structure_loss: dict[str, Any] = field(default_factory=dict)
    curriculum: list[dict[str, Any]] = field(default_factory=list)
    data_hash: str | None = None
    steps: int = 0
    form: str = "packed"
    versions: dict[str, str] = field(default_factory=versions)
    command: str | None = None

    def __post_init__(self) -> None:
        if self.policy not in list(Policy):
            raise ValueError(f"training record: policy {self.policy!r} is unknown; it is one of {', '.join(Policy)}")
        self.policy = Policy(self.policy).value
        self.think = None if self.think is None else (self.think[0], self.think[1])

    def as_dict(self) -> dict[str, Any]:
        """Returns the record as JSON types."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TrainingRecord:
        """Reads what `as_dict` wrote.

        Only policy and markup bind a decoder. Fields that another version of this package has added inform people, and
        are passed over.

        Raises:
            ValueError: policy or markup is missing, or the policy is unknown.
        """
        missing = [name for name in ("policy", "markup") if name not in data]
        if missing:
            raise ValueError(
                f"training record: {' and '.join(missing)} is missing; it has {', '.join(data) or 'nothing'}"
            )
        known = {f.name for f in fields(cls)}
        return cls(**{"versions": {}, **{name: value for name, value in data.items() if name in known}})


def write_record(model: Any, record: TrainingRecord, directory: str | Path | None = None) -> None:
    """Writes a record where saving the model takes it along.

    Args:
        model: a model of transformers, or a PEFT model around one; the record becomes part of its config.
        record: the record.
        directory: where the weights of an adapter are saved, which no config goes along with; made if need be.
    """
    setattr(model.config, KEY, record.as_dict())
    if directory is not None:
        Path(directory).mkdir(parents=True, exist_ok=True)
        text = json.dumps(record.as_dict(), indent=1, ensure_ascii=False)
        (Path(directory) / FILE_NAME).write_text(text + "\n", encoding="utf-8")


def read_record(source: Any, revision: str | None = None) -> TrainingRecord | None:
    """Returns the training record of a checkpoint, or None if it has none.

    Args:
        source: a model, its config, or a directory or id on the hub of a model or an adapter.
        revision: of the id on the hub.

    Raises:
        ValueError: there is a record, and it cannot be understood.
    """
    if isinstance(source, (str, Path)):
        data = _beside(str(source), FILE_NAME, revision)
        if data is None:
            data = (read_config(source, revision) or {}).get(KEY)
    else:
        data = getattr(getattr(source, "config", source), KEY, None)
    return None if data is None else TrainingRecord.from_dict(data)


def read_config(source: str | Path, revision: str | None = None) -> dict[str, Any] | None:
    """Returns the config of a model, a directory or an id on the hub; None if there is none within reach."""
    return _beside(str(source), CONFIG_NAME, revision)


def _beside(source: str, name: str, revision: str | None) -> Any:
    """Returns the contents of the JSON file `name` of a checkpoint, or None."""
    path = Path(source) / name if Path(source).is_dir() else _from_hub(source, name, revision)
    if path is None or not path.is_file():
        return None
    return json.loads(path.read_text(encoding="utf-8"))


def _from_hub(source: str, name: str, revision: str | None) -> Path | None:
    from transformers.utils import cached_file

    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    try:
        found = cached_file(source, name, revision=revision, **quiet)
    except OSError:  # no such repository within reach, or not even the form of an id; loading will say so
        return None
    return None if found is None else Path(found)


def settle(
    record: TrainingRecord | None,
    policy: Policy | str | None,
    markup: Markup | str | None,
    *,
    allow: bool = False,
    policy_argument: str = "policy",
) -> tuple[Policy, Markup]:
    """Returns the policy and the notation to decode with.

    What the user leaves open is as the model was trained, which is said in the log; without a record, recompute and
    hcot. A model is not decoded in contexts that it was not trained on; policy off is the baseline and never refused.

    Args:
        record: of the model, or None.
        policy: as the user gave it, or None.
        markup: as the user gave it, or None.
        allow: do not refuse other values than the record's.
        policy_argument: what the user calls the policy.

    Raises:
        ValueError: what the user gave is not what the record says, or is unknown.
    """
    trained = {"policy": Policy.RECOMPUTE, "markup": "hcot"} if record is None else asdict(record)
    if record is not None and policy is None:
        logger.info("%s=%s, as the model was trained (its training record says so)", policy_argument, record.policy)
    chosen = Policy(trained["policy"] if policy is None else policy)
    notation = get_markup(trained["markup"] if markup is None else markup)
    if record is None or allow or chosen is Policy.OFF:
        return chosen, notation
    if record.policy != chosen:
        unpruned = "without pruning, " if record.policy == Policy.OFF else ""
        raise ValueError(
            f"{policy_argument}={chosen.value}, but the model was trained {unpruned}under policy {record.policy} (its "
            "training record says so), and it would meet contexts that it does not know. Pass "
            f"{policy_argument}={record.policy}, or any_policy=True to run it all the same."
        )
    if record.markup != notation.name:
        raise ValueError(
            f"markup={notation.name}, but the model was trained on the notation {record.markup} (its training record "
            f"says so). Pass markup={record.markup}, or any_policy=True to run it all the same."
        )
    return chosen, notation
