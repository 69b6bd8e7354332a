"""From a YAML file, overrides or a command line to checked settings; all faults are said at once, with what is allowed.

What a kind of settings holds is a `Section` (`report.grid.GridConfig`, for example); this module reads any of them.
"""

from __future__ import annotations

import types
from argparse import SUPPRESS, BooleanOptionalAction
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from hcot_lmeval.errors import did_you_mean
from hcot_lmeval.markup import PRESETS, get_markup


class Section(BaseModel):
    """Base of all sections: unknown keys are refused, values cannot be changed once read."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    @model_validator(mode="before")
    @classmethod
    def _no_switch_is_a_number(cls, values: Any) -> Any:
        """YAML reads `on` and `no` as true and false, which Python counts as 1 and 0."""
        for name, field in cls.model_fields.items() if isinstance(values, Mapping) else ():
            given = values.get(name)
            each = given if isinstance(given, (list, tuple)) else [given]
            kinds = _kinds(field.annotation)
            if kinds & {int, float} and bool not in kinds and any(isinstance(value, bool) for value in each):
                raise ValueError(f"{name}={given!r} is not allowed; a number is needed")
        return values


S = TypeVar("S", bound=Section)
MarkupName = Annotated[
    str,
    Field(description=f"notation of the blocks: {', '.join(PRESETS)}"),
    AfterValidator(lambda name: get_markup(name).name),
]
"""The name of a preset."""
read_off = BeforeValidator(lambda value: "off" if value is False else value)
"""For a choice that has the word `off`, which YAML reads as false."""


def read_yaml(path: str | Path, example: str) -> dict[str, Any]:
    """Reads a YAML file of keys and values.

    Args:
        path: the file.
        example: a line of such a file, for the message.

    Raises:
        ValueError: the file is no YAML or no mapping.
        FileNotFoundError: there is no such file.
    """
    try:
        settings = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError):
        told = f"{path} is no file; give the path of a YAML file with keys and values such as `{example}`"
        raise FileNotFoundError(f"{told} (--keys lists the keys)") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{path} holds {type(settings).__name__}; expected keys and values such as `{example}`")
    return settings


def parse_settings(kind: type[S], settings: Mapping[str, Any], origin: str = "the settings") -> S:
    """Returns checked settings.

    Raises:
        ValueError: a key is unknown or a value is not allowed; every fault in one message.
    """
    try:
        return kind.model_validate(settings)
    except ValidationError as error:
        faults = dict.fromkeys(_describe(kind, fault) for fault in error.errors())
        listed = next(iter(faults)) if len(faults) == 1 else "".join(f"\n  {fault}" for fault in faults)
        raise ValueError(f"{origin} cannot be used: {listed}".replace(": \n", ":\n")) from None


def add_options(parser: Any, kind: type[Section]) -> None:
    """Adds an option for every described key of `kind`: ``max_depth`` is ``--max-depth``.

    What is not given is absent from the result; what is given stays a text, for `parse_settings` to read.
    """
    for name, field in kind.model_fields.items():
        if field.description is None:
            continue
        told = field.description.replace("%", "%%")
        options: dict[str, Any] = {"dest": name, "default": SUPPRESS}
        annotation = _not_none(field.annotation)
        if annotation is bool:
            options["action"] = BooleanOptionalAction if field.default else "store_true"
        elif get_origin(annotation) in (tuple, list, dict):
            options["nargs"], annotation = "+", get_args(annotation)[0]
        if get_origin(annotation) is Literal:
            options["choices"] = get_args(annotation)
        elif annotation is not bool:
            options["metavar"] = field.title or {int: "N", float: "X"}.get(annotation, "NAME")
        if field.default and field.default is not True and not field.is_required():
            many = isinstance(field.default, (tuple, list))
            told += f" ({' '.join(map(str, field.default)) if many else _short(field.default)})"
        parser.add_argument(f"--{name.replace('_', '-')}", help=told, **options)


def _kinds(annotation: Any) -> set[Any]:
    """The plain types within a type: of ``list[int] | None``, list, int and None's."""
    parts = get_args(annotation)
    return {annotation}.union(*(_kinds(part) for part in parts)) if parts else {annotation}


def _not_none(annotation: Any) -> Any:
    """The type of a value that is there: of ``int | None``, ``int``."""
    if get_origin(annotation) in (Union, types.UnionType):
        return next(part for part in get_args(annotation) if part is not type(None))
    return annotation


def _describe(kind: type[Section], fault: Any) -> str:
    place = ".".join(map(str, fault["loc"]))
    if fault["type"] == "extra_forbidden":
        return unknown(place, _section_at(kind, fault["loc"][:-1]).model_fields)
    given = "" if fault["type"] == "missing" else f" (given: {str(fault['input'])[:80]})"
    return f"{place or 'as a whole'}: {fault['msg'].removeprefix('Value error, ')}{given if place else ''}"


def unknown(place: str, known: Iterable[str]) -> str:
    """Says that the last name of a dotted `place` is none of those that are known, and which one may be meant."""
    known = list(known)
    near = did_you_mean(place.rpartition(".")[2], known)
    return f"{place} is unknown{near or '.'} Known here: {', '.join(known)}"


def _section_at(kind: type[Section], place: Sequence[Any]) -> type[Section]:
    """The section class that a path of keys and indices leads to."""
    section = kind
    for name in place:
        if isinstance(name, str) and name in section.model_fields:
            section = section_in(section.model_fields[name].annotation) or section
    return section


def section_in(annotation: Any) -> type[Section] | None:
    """Returns the section among a type and its parts: of `list[SourceConfig]`, `SourceConfig`."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    found = (section_in(part) for part in get_args(annotation))
    return next((section for section in found if section is not None), None)


def describe_settings(kind: type[Section], prefix: str = "") -> Iterator[str]:
    """Yields a line for every key, with its meaning and default."""
    for name, field in kind.model_fields.items():
        inner = section_in(field.annotation)
        many = ".0" if get_origin(field.annotation) is list else ""
        if inner is None:
            default = "required" if field.is_required() else f"default {_short(field.default)}"
            yield f"{prefix}{name:<{max(1, 34 - len(prefix))}} {field.description} ({default})"
        elif prefix.count(".") < 2:
            yield from describe_settings(inner, f"{prefix}{name}{many}.")


def _short(value: Any) -> str:
    return str(getattr(value, "value", value))


def differences(before: Any, after: Any) -> dict[str, tuple[Any, Any]]:
    """Returns what differs between two settings, sections and lists within them included: dotted key -> both values."""
    old, new = _flat(before), _flat(after)
    keys = dict.fromkeys((*old, *new))
    return {key: (old.get(key), new.get(key)) for key in keys if old.get(key) != new.get(key)}


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    pairs = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else None
    if pairs is None:
        return {prefix: value}
    return {key: each for name, part in pairs for key, each in _flat(part, f"{prefix}.{name}".lstrip(".")).items()}
