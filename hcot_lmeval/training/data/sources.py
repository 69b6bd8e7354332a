"""Rows to train on, from wherever they are: JSONL and parquet files, data sets on the hub, problems made on the spot.

Whatever the source, `load_source` returns the same columns:

    question   str, or None where `messages` holds it
    messages   the conversation before the assistant's last message, a list of {role, content}; or None
    trace      str or None: what the assistant wrote, thoughts and all; reasoning that stands beside the content
               (reasoning_content, reasoning, thinking; or parts of these types) comes first, between thinking tokens
    answer     str or None: the expected answer
    source     the path that the configuration names
    row        number of the row in the source, from 0

A source has either the columns question, hierarchical_cot and expected_answer, or a column messages whose last message
holds the trace; the expected answer may be missing. Other names are given by ``columns``. A content is a string or a
list of parts; a message with a part that is no text, such as an image, has the content None.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import math
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import NoneType
from typing import Any

from datasets import Dataset, Features, List, Value, load_dataset
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

from hcot_lmeval import columns as column_names
from hcot_lmeval import synthetic
from hcot_lmeval.columns import TRAINED, read_answer, read_content, read_message
from hcot_lmeval.files import Input
from hcot_lmeval.markup import get_markup
from hcot_lmeval.provenance import files_digest
from hcot_lmeval.training.config import SourceConfig

FEATURES = Features(
    {
        "question": Value("string"),
        "messages": List({"role": Value("string"), "content": Value("string")}),
        "trace": Value("string"),
        "answer": Value("string"),
        "source": Value("string"),
        "row": Value("int64"),
    }
)

NO_PLACE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.ENOSPC, errno.EDQUOT}
"""What a directory that cannot be made or written to ends in."""
SYNTHETIC = "synthetic:"
BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
"""Suffix of a file -> the builder of `datasets` that reads it."""


def load_source(source: SourceConfig, markup: str = "hcot", *, problems: bool = False) -> Dataset:
    """Reads a source.

    Args:
        source: what the configuration says of it.
        markup: the notation in which problems made on the spot are solved, unless their options name one.
        problems: questions and answers are wanted, and no traces.

    Raises:
        FileNotFoundError: there is no such file, or no such data set on the hub.
        ValueError: a column is missing, an option means nothing for this source, or the files are empty or broken.
    """
    rows = _open(source, markup)
    if not len(rows):
        raise ValueError(f"{source.path} has no rows (split {source.split!r})")
    columns = resolve_columns(rows.column_names, source, problems=problems)
    if source.limit is not None:
        rows = rows.select(range(min(source.limit, len(rows))))
    return cached_map(
        rows,
        partial(_plain_row, columns=columns, source=source.path, think=get_markup(markup).think),
        (problems, columns, source.path, get_markup(markup).think, files_digest((__file__, column_names.__file__))),
        FEATURES,
        with_indices=True,
        desc=f"Reading {source.path}",
    )


def resolve_columns(present: list[str], source: SourceConfig, *, problems: bool = False) -> dict[str, str]:
    """Returns which column is the question, trace and answer, or the messages and answer; of problems no trace.

    Raises:
        ValueError: one is missing; the message names those present, those wanted, and ``columns``.
    """
    unknown = sorted(set(source.columns) - set(TRAINED))
    if unknown:
        raise ValueError(f"columns of {source.path}: {', '.join(unknown)} unknown; known are {', '.join(TRAINED)}")
    names = TRAINED | source.columns
    needed = ["question"] if problems else ["question", "trace"]
    chat = "messages" in source.columns or (names[needed[-1]] not in present and names["messages"] in present)
    roles = ["messages"] if chat else needed
    if problems or "answer" in source.columns or names["answer"] in present:
        roles.append("answer")
    missing = [names[role] for role in roles if names[role] not in present]
    if missing:
        raise ValueError(
            f"{source.path} has no column {' and no column '.join(map(repr, missing))}. It has: {', '.join(present)}. "
            f"Wanted: {_wanted(names, problems)}. If they have other names, say so with columns, as in columns: "
            "{question: problem, trace: solution}."
        )
    return {role: names[role] for role in roles}


def _wanted(names: Mapping[str, str], problems: bool) -> str:
    if problems:
        return f"{names['question']} or {names['messages']}, and {names['answer']}"
    return (
        f"{names['question']}, {names['trace']} and, if there is one, {names['answer']}; or {names['messages']}, whose "
        "last message is the assistant's"
    )


def cached_map(
    rows: Dataset, function: Any, identity: tuple[Any, ...], features: Features, *, workers: int = 1, **options: Any
) -> Dataset:
    """As `Dataset.map`, cached by what the caller says it depends on.

    Left to itself, `datasets` hashes a pickle of the function and all that it holds, which for a tokenizer depends on
    what it has encoded before.

    Args:
        rows: what is mapped; its columns are dropped.
        function: see `Dataset.map`.
        identity: everything beside `rows` that the result depends on, as values with a telling ``repr``.
        features: the columns of the result.
        workers: processes; with one, this one.
        options: of `Dataset.map`.
    """
    name = hashlib.sha256(repr((rows._fingerprint, *identity)).encode()).hexdigest()[:32]
    workers = min(workers, len(rows))
    options |= {"remove_columns": rows.column_names, "num_proc": workers if workers > 1 else None}
    with interrupted_as_one():
        result = rows.map(function, features=features, new_fingerprint=name, **options)
    result._fingerprint = name  # a result from the cache has another one, and what is mapped from it would be anew
    return result


@contextmanager
def interrupted_as_one() -> Iterator[None]:
    """Lets Ctrl-C, which reaches the workers that are started meanwhile too, be the business of this process alone.

    `datasets` then waits a moment for its workers, and raises that it waited in vain.
    """
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield  # nothing interrupts here, or somebody else sees to it
        return
    process = os.getpid()

    def handler(number: int, frame: Any) -> None:
        if os.getpid() == process:
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, handler)
    try:
        yield
    except Exception as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            raise error.__context__ from None
        raise
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _plain_row(
    row: Mapping[str, Any], index: int, columns: Mapping[str, str], source: str, think: tuple[str, str]
) -> dict[str, Any]:
    found = {role: row[name] for role, name in columns.items()}
    trace, messages = found.get("trace"), found.get("messages")
    if "messages" in columns:
        read = [_message(message, f"{source}, row {index}") for message in messages or []]
        role, reasoning, content = read[-1] if read else ("", "", None)
        trace = _with_reasoning(reasoning, content, think) if role == "assistant" else None
        messages = [{"role": role, "content": content} for role, _, content in read[:-1]]
        if role != "assistant" and "answer" in columns and read:  # a problem, which nobody has answered
            messages.append({"role": role, "content": content})
    else:
        found["question"], trace = (_text(text, source) for text in (found["question"], trace))
    return {
        "question": found.get("question"),
        "messages": messages,
        "trace": trace,
        "answer": _answer(found.get("answer"), f"{source}, row {index}"),
        "source": source,
        "row": index,
    }


def _answer(answer: Any, place: str) -> str | None:
    """An expected answer as text; what is no number, or infinite, is none."""
    if isinstance(answer, Mapping) or (isinstance(answer, list) and len(answer) != 1):
        raise ValueError(f"{place}: the expected answer is {answer!r:.100}; name a column of texts or numbers")
    try:
        return read_answer(answer)
    except ValueError as error:
        if isinstance(answer, float) and math.isfinite(answer):  # `datasets` reads a whole number of 20 digits so
            raise ValueError(f"{place}: the expected answer {error}") from None
        return None


def _message(message: Any, place: str) -> tuple[str, str, str | None]:
    """Returns role, reasoning and content of a message; no content where a part of it is no text."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str) or "content" not in message:
        raise ValueError(f"{place}: a message has the keys role and content; this one is {message!r:.100}")
    if not isinstance(message["content"], (str, list, NoneType)):
        raise ValueError(f"{place}: a text or a list of parts was expected, not {message['content']!r:.100}")
    try:
        return message["role"], *read_message(message)
    except ValueError:
        return message["role"], "", None


def _text(value: Any, place: str) -> str | None:
    """A question or a trace: a text, a list of parts, or a number as it is written."""
    if isinstance(value, Mapping):
        raise ValueError(f"{place}: a text or a list of parts was expected, not {value!r:.100}")
    try:
        return read_content(value).text if isinstance(value, list) or value is None else str(value)
    except ValueError:
        return None


def _with_reasoning(reasoning: str, content: str | None, think: tuple[str, str]) -> str | None:
    """The whole response; a content that has a thinking section of its own repeats the reasoning."""
    begin, end = think
    if not reasoning.strip() or end in (content or ""):
        return content
    inner = reasoning.removeprefix(begin).removesuffix(end)
    answer = (content or "").lstrip()
    return f"{begin}{inner}{end}" + (f"\n\n{answer}" if answer else "")


def _open(source: SourceConfig, markup: str) -> Dataset:
    """The source as it is, all its columns."""
    if source.path.startswith(SYNTHETIC):
        return _synthetic(source, markup)
    if source.options:
        raise ValueError(f"options mean nothing for {source.path}; they belong to {SYNTHETIC} sources")
    files = _files(source.path)
    if files:
        _refuse_hub_settings(source)
        builder = BUILDERS[Path(files[0]).suffix]
        return _reading(source.path, load_dataset, builder, data_files=files, split="train")
    options = {"name": source.name, "split": source.split, "revision": source.revision}
    return _reading(source.path, load_dataset, source.path, **options)


def _files(path: str) -> list[str]:
    """The files that `path` names, ascending; none for a directory or a data set on the hub.

    Raises:
        FileNotFoundError: it looks like a file or a pattern, and nothing is there.
        ValueError: the files are empty, or of kinds that are not read, or of several.
    """
    if Path(path).is_dir():
        return []
    found = sorted(name for name in glob.glob(path, recursive=True) if Path(name).is_file())
    if not found and (Path(path).suffix in BUILDERS or glob.has_magic(path) or path.startswith(("/", "."))):
        raise FileNotFoundError(f"no file matches {path!r} (from the directory {Path.cwd()})")
    suffixes = {Path(name).suffix for name in found}
    if found and (suffixes - BUILDERS.keys() or len({BUILDERS[suffix] for suffix in suffixes}) > 1):
        raise ValueError(f"{path} names {', '.join(sorted(suffixes))} files; read are {', '.join(BUILDERS)}, one kind")
    if found and not any(Path(name).stat().st_size for name in found):
        raise ValueError(f"{path} has no rows: nothing is in {'it' if len(found) == 1 else 'these files'}")
    return found


def _refuse_hub_settings(source: SourceConfig) -> None:
    set_ = [key for key in ("name", "split", "revision") if key in source.model_fields_set]
    if set_:
        raise ValueError(f"{source.path} is a file: {', '.join(set_)} belong to directories and data sets on the hub")


def _reading(path: str, read: Any, *args: Any, **kwargs: Any) -> Any:
    """Calls `read` and says which source was at fault."""
    try:
        return read(*args, **kwargs)
    except DatasetNotFoundError as error:
        raise FileNotFoundError(f"{path!r} is no file here and no data set on the hub: {error}") from error
    except ConnectionError as error:
        raise FileNotFoundError(f"{path!r} is no file here, and the hub cannot be reached: {error}") from error
    except DatasetGenerationError as error:
        cause = error.__cause__ or error
        broken = next((name for file in _files(path) if (name := _broken_line(file))), None)
        raise ValueError(broken or f"{path} cannot be read: {type(cause).__name__}: {cause}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    except OSError as error:
        if error.errno not in NO_PLACE:
            raise
        raise OSError(
            f"{path} cannot be read: the cache of `datasets` cannot be written to ({error.strerror}: "
            f"{error.filename}); set HF_HOME to a directory that can"
        ) from error


def _broken_line(file: str) -> str | None:
    """What is wrong with the first line of a file that is no JSON object; None if there is none."""
    if not file.endswith(".jsonl"):
        return None
    try:
        broken = next((each for each in Input(file, Path(file)).records() if each.data is None), None)
    except ValueError as error:
        return str(error)
    return broken and f"{broken.where} is no JSON object, or has a key twice: {broken.line!r:.100}"


def _synthetic(source: SourceConfig, markup: str) -> Dataset:
    task = source.path.removeprefix(SYNTHETIC)
    if task not in synthetic.TASKS:
        known = ", ".join(SYNTHETIC + name for name in synthetic.TASKS)
        raise ValueError(f"path={source.path!r} is unknown; choose one of {known}")
    if source.name or source.revision or source.columns:
        raise ValueError(f"{source.path} is made on the spot: name, revision and columns mean nothing for it")
    options = {"markup": markup} | source.options
    arguments = {"task": task, "split": source.split, "options": options}
    _reading(source.path, _problems, **arguments)  # the options are checked at once, and the error is a plain one
    code = files_digest(sorted(Path(synthetic.__file__).parent.rglob("*.py")))
    return _reading(source.path, Dataset.from_generator, _problem_rows, gen_kwargs=arguments | {"code": code})


def _problems(task: str, split: Any, options: dict[str, Any]) -> Iterator[dict[str, str]]:
    return synthetic.training_rows(task, split, **options)


def _problem_rows(code: str, **arguments: Any) -> Iterator[dict[str, str]]:
    """`code` makes the cache forget what another version of the generators made."""
    yield from _problems(**arguments)
