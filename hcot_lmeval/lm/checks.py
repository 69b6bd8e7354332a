"""What lm-eval was asked for, looked at before weights are loaded and while it builds its requests.

lm-eval hands generation kwargs to the model with the first requests, and writes results at the very end, where a
failure is no more than a warning. Both are known at the start.
"""

from __future__ import annotations

import functools
import json
import logging
import sys
from collections.abc import Callable, Mapping
from inspect import signature
from pathlib import Path
from typing import Any

from lm_eval.api.task import Task
from lm_eval.utils import sanitize_model_name, simple_parse_args_string

from hcot_lmeval.errors import did_you_mean
from hcot_lmeval.lm.requests import GenerationSettings
from hcot_lmeval.scoring.task import BoxedTask, check_task
from hcot_lmeval.store import check_folder

logger = logging.getLogger(__name__)

LONGEST_NAME = 255
"""Bytes of a file's name, on the usual file systems."""
NO_CACHE = (
    "use_cache is not supported by hcot: lm-eval's cache tells neither models nor their settings nor seeds apart; "
    "leave it out, for every finished request is kept in the journal, which does (journal=DIR)"
)
METADATA = ("repeats", "hcot_data", "hcot_instructions", "size", "sizes", "depths", "problem_seed")
"""What our tasks read of ``--metadata``."""


def check_run(evaluate: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Looks at the arguments of a call of `lm_eval.simple_evaluate`.

    Raises:
        ValueError: a value is not allowed.
        OSError: the results could not be written.
        TypeError: the call is none.
    """
    asked = signature(evaluate).bind(*args, **kwargs).arguments
    given = asked.get("gen_kwargs") or {}
    given = simple_parse_args_string(given) if isinstance(given, str) else given
    GenerationSettings(sys.maxsize).params({"temperature": 1.0, **given})  # the task's limit is not known yet
    if asked.get("use_cache"):
        raise ValueError(NO_CACHE)
    _check_metadata(asked.get("metadata") or {})
    # lm-eval knows of no other template than that of --apply_chat_template; the model says which prompts get one
    logging.getLogger("lm_eval.evaluator").addFilter(_tells_of_no_missing_template)
    _check_documents(asked)
    output = getattr(asked.get("evaluation_tracker"), "output_path", None)
    if output:
        check_output(Path(output), asked.get("model_args") or {})


def _tells_of_no_missing_template(record: logging.LogRecord) -> bool:
    return "chat template is not applied" not in " ".join(record.getMessage().split())  # lm-eval wraps its lines


def _check_metadata(metadata: Mapping[str, Any]) -> None:
    for name in metadata:
        if name not in METADATA and (near := did_you_mean(name, METADATA, cutoff=0.8)):
            raise ValueError(f"metadata: {name!r} is read by no task of ours{near}")


def _check_documents(asked: Mapping[str, Any]) -> None:
    """Looks at what chooses the documents, of which lm-eval evaluates all where it knows no better."""
    limit, samples = asked.get("limit"), asked.get("samples") or {}
    if limit is not None and not limit > 0:
        raise ValueError(f"limit={limit} leaves no documents; give a number of them, or a share of them up to 1")
    samples = json.loads(samples) if isinstance(samples, str) else samples
    tasks = [task for task in asked.get("tasks") or () if isinstance(task, str)]
    for name, chosen in samples.items():
        if name not in tasks and (near := did_you_mean(name, tasks, cutoff=0.8)):
            raise ValueError(f"samples: no task is called {name!r}{near}")
        if not chosen or not all(type(number) is int and number >= 0 for number in chosen):
            raise ValueError(f"samples: {name}={chosen!r} is no list of documents, counted from 0")


def check_output(output: Path, model_args: str | Mapping[str, Any]) -> None:
    """Tries to write where lm-eval will write the results.

    Raises:
        ValueError: the model's path makes a file name that is too long.
        OSError: nothing can be written there.
    """
    given = simple_parse_args_string(model_args) if isinstance(model_args, str) else model_args
    name = sanitize_model_name(str(given.get("pretrained", "")))
    if (length := len(name.encode())) > LONGEST_NAME:
        raise ValueError(
            f"pretrained={given['pretrained']}: lm-eval makes a file name of {length} bytes of it, and {LONGEST_NAME} "
            "are allowed, so no results could be saved; name the checkpoint by a shorter path, such as a link"
        )
    folder = output.parent if output.suffix == ".json" else output
    advice = "no results could be saved; name another directory with --output_path DIR"
    check_folder(folder, f"output_path={output}", advice)


def watch_building() -> None:
    """Wraps `Task.build_all_requests` of lm-eval for this process; idempotent.

    lm-eval's cache of requests (``--cache_requests``) is keyed by the name of the task: its entries hold the generation
    kwargs, documents and rendered prompts of the run that wrote them, whatever this one asks for. Building takes a
    moment, so it is done anew. A request says whether its prompt was rendered, for no text tells that by itself.
    """
    build = Task.build_all_requests
    if hasattr(build, "_hcot_lmeval"):
        return

    @functools.wraps(build)
    def build_all_requests(self: Any, **options: Any) -> None:
        wanted = (self.config.metadata or {}).get("repeats", self.config.repeats)
        if wanted != self.config.repeats:
            raise ValueError(
                f"repeats={wanted} of the metadata does nothing in {self.config.task}, which asks a question "
                f"{self.config.repeats}x; leave it out, or run that task apart from those it is meant for (..._avg)"
            )
        if not isinstance(self, BoxedTask):  # which looks at itself, for every model
            check_task(self)
        if options.get("cache_requests"):
            logger.warning(
                "cache_requests: the requests of %s are built anew, for lm-eval's cache of them keeps the generation "
                "kwargs and prompts of the run that wrote it",
                self.config.task,
            )
        build(self, **{**options, "cache_requests": False})
        for instance in self.instances:
            instance.chat_rendered = bool(options.get("apply_chat_template"))

    build_all_requests._hcot_lmeval = True  # type: ignore[attr-defined]
    Task.build_all_requests = build_all_requests
