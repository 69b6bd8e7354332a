"""The command ``hcot``: its subcommands, and how it ends when something is wrong."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType

import pytest

from hcot_lmeval import command
from hcot_lmeval.command import PARTS, Part
from hcot_lmeval.errors import run_command
from hcot_lmeval.training.sft import Terminated


@pytest.fixture
def part(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A subcommand `stand-in`, whose `main` a test writes."""
    module = ModuleType("stand_in")
    monkeypatch.setitem(sys.modules, "stand_in", module)
    monkeypatch.setitem(command.PARTS, "stand-in", Part("stand_in", "nothing"))
    monkeypatch.setattr(sys, "argv", ["hcot", "stand-in", "a", "--b"])
    return module


def raising(error: BaseException):
    def action():
        raise error

    return lambda argv: run_command(action, extra="report")


@pytest.mark.parametrize(
    ("error", "status", "told"),
    [
        (KeyboardInterrupt(), 130, "stopped; the same command goes on from here"),
        (KeyboardInterrupt("stopped at step 3"), 130, "stopped at step 3"),
        (Terminated("stopped at step 4"), 143, "stopped at step 4"),
        (BrokenPipeError(), 0, ""),
        (ModuleNotFoundError("No module named 'scipy'", name="scipy"), 1, "pip install 'hcot_lmeval[report]'"),
        (ValueError("x"), 1, "error: ValueError: x (HCOT_LMEVAL_TRACEBACK=1 tells more)"),
        (FileNotFoundError(2, "No such file", "y"), 1, "error: FileNotFoundError: [Errno 2] No such file: 'y'"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_each_end_has_its_status_and_its_line(part, capfd, error, status, told):
    part.main = raising(error)
    assert command.main() == status
    said = capfd.readouterr().err
    assert told in said and "Traceback" not in said and len(said.strip().splitlines()) <= 1


def test_a_closed_output_is_no_fault():
    script = "from hcot_lmeval.errors import run_command; exit(run_command(lambda: print('said') or 3))"
    done = subprocess.run(
        ["sh", "-c", 'exec "$0" -c "$1" >&-', sys.executable, script], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (3, "")


def test_our_own_message_stands_alone(part, capsys):
    from hcot_lmeval.markup import get_markup

    part.main = lambda argv: run_command(lambda: get_markup("xml"))
    assert command.main() == 1
    assert capsys.readouterr().err.startswith("error: markup='xml' is unknown")


def test_a_traceback_can_be_asked_for(part, monkeypatch):
    monkeypatch.setenv("HCOT_LMEVAL_TRACEBACK", "1")
    part.main = raising(ValueError("x"))
    with pytest.raises(ValueError, match="x"):
        command.main()


def test_what_is_no_mistake_of_users_is_left_alone(part):
    part.main = raising(TypeError("a fault"))
    with pytest.raises(TypeError, match="a fault"):
        command.main(["stand-in"])
    part.main = raising(ModuleNotFoundError("No module named 'hcot_lmeval.x'", name="hcot_lmeval.x"))
    with pytest.raises(ModuleNotFoundError):
        command.main(["stand-in"])


def test_the_subcommand_gets_the_rest_of_the_line_and_its_name(part):
    seen = []
    part.main = lambda argv: seen.append((list(argv), sys.argv[0])) or 7
    assert command.main() == 7
    assert seen == [(["a", "--b"], "hcot stand-in")]


@pytest.mark.parametrize(("line", "status"), [([], 2), (["trian"], 2), (["--help"], 0), (["-h"], 0)])
def test_usage_names_every_subcommand(line, status, capsys):
    assert command.main(line) == status
    said = "".join(capsys.readouterr())
    assert all(f"  {name} " in said for name in PARTS)
    assert ("no command 'trian'" in said) == ("trian" in line)


def test_as_a_module():
    done = subprocess.run([sys.executable, "-m", "hcot_lmeval"], capture_output=True, text=True, timeout=900)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.startswith("usage: hcot COMMAND")
