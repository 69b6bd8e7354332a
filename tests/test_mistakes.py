"""Mistakes that people make, and how each of them ends: exit code, one line that helps, no traceback, how early.

The commands run in this process, as their `main` would: what leaves them is shown by the hook that lm-eval's command
line gets from us.
"""

from __future__ import annotations

import shlex
import sys
import traceback
from collections.abc import Callable, Iterator
from functools import partialmethod
from pathlib import Path
from typing import NamedTuple

import pytest
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from hcot_lmeval import errors
from hcot_lmeval.engine import Engine
from tests.mistakes import MISTAKES, Mistake, write_files

ROOT = Path(__file__).resolve().parents[1]
TASKS = ROOT / "tasks" / "synthetic"


class Seen(NamedTuple):
    """How a command ended."""

    code: int
    said: str
    stage: str


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints, tasks and data, right and wrong ones."""
    return write_files(tmp_path_factory.mktemp("files"))


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """How far a command came."""
    reached = ["arguments"]

    def watch(owner: type, name: str, stage: str) -> None:
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, **k: (reached.append(stage), original(*a, **k))[1])

    watch(HFLM, "_create_model", "loading")
    watch(Engine, "stream", "generation")
    yield reached


@pytest.fixture
def run(
    files: Path,
    stage: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> Callable[[str], Seen]:
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda *_: None)
    monkeypatch.setattr("lm_eval.__main__.setup_logging", lambda: None)  # its handler would outlive the captured stderr
    monkeypatch.setattr(TaskManager, "__init__", partialmethod(TaskManager.__init__, include_defaults=False))
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.chdir(files)

    def run(line: str) -> Seen:
        words = shlex.split(line.format(files=files, out=tmp_path / "out", root=ROOT))
        monkeypatch.setattr(sys, "argv", words)
        try:
            code = command(words[0])(words[1:])
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
            if isinstance(end.code, str):
                print(end.code, file=sys.stderr)
        except BaseException as error:
            code = 1
            hook = sys.excepthook if sys.excepthook is not sys.__excepthook__ else traceback.print_exception
            hook(type(error), error, error.__traceback__)
        told = capsys.readouterr()
        return Seen(code or 0, told.err + told.out, stage[-1])

    return run


def command(name: str) -> Callable[[list[str]], int | None]:
    """The command as a function of its arguments."""
    if name == "lm_eval":
        from lm_eval.__main__ import cli_evaluate

        def evaluate(arguments: list[str]) -> None:
            sys.argv += ["--include_path", str(TASKS)] if "--include_path" not in arguments else []
            cli_evaluate()

        return evaluate
    from hcot_lmeval.command import run

    return lambda arguments: run(name, arguments)


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.line[:70])
def test_a_mistake_ends_in_one_line_that_helps(mistake: Mistake, run: Callable[[str], Seen]) -> None:
    seen = run(mistake.line)
    assert "Traceback" not in seen.said
    assert (seen.code, seen.stage) == (mistake.code, mistake.stage), seen.said[-600:]
    last = seen.said.strip().splitlines()[-1] if mistake.code == 1 else seen.said
    for word in mistake.words:
        assert word in last, last


def test_the_table_is_long_enough_and_has_no_line_twice() -> None:
    assert len({mistake.line for mistake in MISTAKES}) == len(MISTAKES) >= 120


def test_a_traceback_can_be_asked_for(run: Callable[[str], Seen], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(errors.VARIABLE, "1")
    seen = run("lm_eval --model hcot --model_args pretrained=tiny-hcot,pruning=never --tasks hcot_arith --limit 1")
    assert "pruning='never' is not allowed" in seen.said and "split_model_args" in seen.said


def test_a_fault_of_ours_keeps_its_traceback() -> None:
    try:
        int("no number")
    except ValueError as error:
        assert errors.message_for_users(error) is None
