"""From a YAML file and overrides to a checked `SftConfig`; all faults are said at once, with what is allowed."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import ValidationError

from hcot_lmeval.training.config import Section, SftConfig


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
    settings = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    if not isinstance(settings, dict):
        raise ValueError(f"{path} holds {type(settings).__name__}; expected keys and values such as `model: tiny`")
    for override in overrides:
        _override(settings, override)
    return parse_config(settings, str(path))


def parse_config(settings: Mapping[str, Any], origin: str = "the settings") -> SftConfig:
    """Returns checked settings.

    Raises:
        ValueError: as for `load_config`.
    """
    try:
        return SftConfig.model_validate(settings)
    except ValidationError as error:
        faults = "\n".join(f"  {_describe(fault)}" for fault in error.errors())
        raise ValueError(f"{origin} cannot be used:\n{faults}") from None


def _override(settings: Any, override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals:
        raise ValueError(f"override {override!r} is not of the form key=value, such as trainer.learning_rate=1e-4")
    *path, last = key.split(".")
    for name in path:
        if isinstance(settings, list):
            settings = settings[_index(settings, name, key)]
        elif isinstance(settings, dict):
            settings = settings.setdefault(name, {})
        else:
            raise ValueError(f"override {override!r}: {name} is neither a section nor a list")
    if isinstance(settings, list):
        settings[_index(settings, last, key)] = yaml.safe_load(value)
    elif isinstance(settings, dict):
        settings[last] = yaml.safe_load(value)
    else:
        raise ValueError(f"override {override!r}: {key.rpartition('.')[0]} has the value {settings!r} and no parts")


def _index(items: list[Any], name: str, key: str) -> int:
    if not name.isdigit() or int(name) >= len(items):
        raise ValueError(f"override {key}: {name!r} is no index of a list with {len(items)} entries, counted from 0")
    return int(name)


def _describe(fault: Any) -> str:
    place = ".".join(map(str, fault["loc"]))
    if fault["type"] == "extra_forbidden":
        known = list(_section_at(fault["loc"][:-1]).model_fields)
        near = difflib.get_close_matches(str(fault["loc"][-1]), known, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        return f"{place} is unknown; {hint}Known here: {', '.join(known)}"
    given = "" if fault["type"] == "missing" else f" (given: {str(fault['input'])[:80]})"
    return f"{place or 'as a whole'}: {fault['msg'].removeprefix('Value error, ')}{given if place else ''}"


def _section_at(place: Sequence[Any]) -> type[Section]:
    """The section class that a path of keys and indices leads to."""
    section: type[Section] = SftConfig
    for name in place:
        if isinstance(name, str) and name in section.model_fields:
            section = _section_in(section.model_fields[name].annotation) or section
    return section


def _section_in(annotation: Any) -> type[Section] | None:
    """The section among a type and its parts: of `list[SourceConfig]`, `SourceConfig`."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    found = (_section_in(part) for part in get_args(annotation))
    return next((section for section in found if section is not None), None)


def describe_config() -> str:
    """Returns every key with its default and meaning, as the help of the script shows it."""
    return "\n".join(_lines(SftConfig, ""))


def _lines(section: type[Section], prefix: str) -> Iterator[str]:
    for name, field in section.model_fields.items():
        inner = _section_in(field.annotation)
        many = ".0" if get_origin(field.annotation) is list else ""
        if inner is None:
            default = "required" if field.is_required() else f"default {_short(field.default)}"
            yield f"{prefix}{name:<{max(1, 34 - len(prefix))}} {field.description} ({default})"
        elif prefix.count(".") < 2:
            yield from _lines(inner, f"{prefix}{name}{many}.")


def _short(value: Any) -> str:
    return str(getattr(value, "value", value))
