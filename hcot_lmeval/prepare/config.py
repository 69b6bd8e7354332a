"""Options as they are declared, on the command line and in a file: a field of a dataclass is an option of that name.

    @dataclass(frozen=True)
    class CheckOptions:
        max_depth: int = field(default=4, metadata={"help": "blocks within each other"})

is ``--max-depth N``, and ``check: {max_depth: 4}`` in a file. The command line comes before the file, the file before
the defaults. Metadata may hold ``help``, ``choices`` and, for a flag that is on, ``negative``.

This module imports the standard library alone.
"""

from __future__ import annotations

import argparse
import difflib
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

Options = TypeVar("Options")
EXAMPLE_LINE = "check: {max_depth: 2}"
"""A line of a file of options."""


def add_options(parser: argparse.ArgumentParser, kind: type, title: str) -> None:
    """Adds an option for every field of `kind`; what is not given is absent from the result."""
    group = parser.add_argument_group(title)
    for one, annotation in _fields(kind):
        _add(group, one, annotation)


def _add(group: Any, one: Field[Any], annotation: Any) -> None:
    flag, told = "--" + one.name.replace("_", "-"), one.metadata.get("help", "")
    shared = {"dest": one.name, "default": argparse.SUPPRESS}
    if annotation is bool:
        if _default(one):
            told = f"do not {told}" if not told.startswith("show") else told
            group.add_argument(
                one.metadata.get("negative", f"--no-{flag[2:]}"), action="store_false", help=told, **shared
            )
        else:
            group.add_argument(flag, action="store_true", help=told, **shared)
        return
    if _is_many(annotation):
        shared |= {"nargs": "+"}
        annotation = get_args(annotation)[0]
    choices = one.metadata.get("choices")
    default = _default(one)
    if default not in (None, (), ""):
        shown = " ".join(default) if isinstance(default, tuple) else default
        told = f"{told} ({shown})"
    metavar = None if choices else {int: "N", float: "X"}.get(_plain(annotation), one.metadata.get("metavar", "NAME"))
    group.add_argument(
        flag, type=_plain(annotation), choices=choices, metavar=metavar, help=told.replace("%", "%%"), **shared
    )


def read_options(kind: type[Options], given: Mapping[str, Any], **more: Any) -> Options:
    """Returns the options among `given` that are fields of `kind`.

    Args:
        kind: the dataclass.
        given: name -> value, of this and other kinds.
        more: values that come before those of `given`.

    Raises:
        ValueError: a value is not allowed.
    """
    values = {}
    for one, annotation in _fields(kind):
        if one.name in given:
            values[one.name] = _checked(one.name, given[one.name], annotation)
    return kind(**{**values, **more})


def from_file(path: str, section: str, sections: Mapping[str, Sequence[type]]) -> dict[str, Any]:
    """Returns the options that a file holds for one command.

    Args:
        path: a YAML file, keys of which are commands.
        section: the command.
        sections: command -> the kinds of its options.

    Raises:
        ValueError: the file, a command or an option is not known.
        FileNotFoundError: there is no such file.
    """
    from hcot_lmeval.settings import read_yaml

    settings = read_yaml(path, EXAMPLE_LINE)
    for name, values in settings.items():
        if name not in sections:
            raise ValueError(f"{path}: {_unknown(str(name), sections)}")
        if not isinstance(values, dict):
            raise ValueError(f"{path}: {name} holds {type(values).__name__}; expected options such as `{EXAMPLE_LINE}`")
        known = {one.name for kind in sections[name] for one, _ in _fields(kind)}
        for key in values:
            if key not in known:
                raise ValueError(f"{path}: {name}: {_unknown(str(key), known)}")
    return dict(settings.get(section, {}))


def _unknown(name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"{name} is unknown; {hint}Known are {', '.join(sorted(known))}"


def _fields(kind: type) -> Iterator[tuple[Field[Any], Any]]:
    hints = get_type_hints(kind)
    for one in fields(kind):
        if one.init and not one.metadata.get("hidden"):
            yield one, hints[one.name]


def _default(one: Field[Any]) -> Any:
    if one.default is not MISSING:
        return one.default
    return one.default_factory() if one.default_factory is not MISSING else None


def _is_many(annotation: Any) -> bool:
    return get_origin(annotation) is tuple


def _plain(annotation: Any) -> Any:
    """The type of a value that is there: of ``int | None``, ``int``."""
    if get_origin(annotation) in (Union, types.UnionType):
        return next(part for part in get_args(annotation) if part is not type(None))
    return annotation


def _checked(name: str, value: Any, annotation: Any) -> Any:
    if _is_many(annotation):
        if isinstance(value, str) or not isinstance(value, (list, tuple)):
            raise ValueError(f"{name}={value!r}: give a list")
        return tuple(_checked(name, each, get_args(annotation)[0]) for each in value)
    wanted = _plain(annotation)
    if value is None and wanted is not annotation:
        return None
    if wanted is float and type(value) is int:
        return float(value)
    if type(value) is not wanted:
        raise ValueError(f"{name}={value!r} is {type(value).__name__}; expected {wanted.__name__}")
    return value
