"""From a YAML file and overrides to a checked `SftConfig`; all faults are said at once, with what is allowed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from hcot_lmeval.settings import describe_settings, parse_settings, read_yaml
from hcot_lmeval.training.config import SftConfig


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> SftConfig:
    """Reads a YAML file and changes what ``overrides`` say.

    Args:
        path: the file.
        overrides: ``key=value`` each; a dotted key reaches into sections and lists (``phases.0.steps=100``), the value
            is YAML.

    Raises:
        ValueError: the file is no mapping, a key is unknown, a value is not allowed; every fault in one message.
        FileNotFoundError: there is no such file.
    """
    settings = read_yaml(path, "model: tiny")
    for override in overrides:
        _override(settings, override)
    return parse_config(settings, str(path))


def parse_config(settings: Mapping[str, Any], origin: str = "the settings") -> SftConfig:
    """Returns checked settings.

    Raises:
        ValueError: as for `load_config`.
    """
    return parse_settings(SftConfig, settings, origin)


def _override(settings: Any, override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals:
        raise ValueError(f"override {override!r} is not of the form key=value, such as trainer.learning_rate=1e-4")
    try:
        value = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ValueError(f"override {override!r}: the value is not YAML: {' '.join(str(error).split())}") from None
    *path, last = key.split(".")
    for name in path:
        if isinstance(settings, list):
            settings = settings[_index(settings, name, key)]
        elif isinstance(settings, dict):
            settings = settings.setdefault(name, {})
        else:
            raise ValueError(f"override {override!r}: {name} is neither a section nor a list")
    if isinstance(settings, list):
        settings[_index(settings, last, key)] = value
    elif isinstance(settings, dict):
        settings[last] = value
    else:
        raise ValueError(f"override {override!r}: {key.rpartition('.')[0]} has the value {settings!r} and no parts")


def _index(items: list[Any], name: str, key: str) -> int:
    if not name.isdigit() or int(name) >= len(items):
        raise ValueError(f"override {key}: {name!r} is no index of a list with {len(items)} entries, counted from 0")
    return int(name)


def describe_config() -> str:
    """Returns every key with its default and meaning, as the help of the script shows it."""
    return "\n".join(describe_settings(SftConfig))
