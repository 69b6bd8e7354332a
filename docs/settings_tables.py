"""Writes the pages of the reference that come from the code: what every command says of itself, and every setting."""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
from importlib import import_module
from pathlib import Path

from hcot_lmeval.command import PARTS
from hcot_lmeval.report.grid import GridConfig
from hcot_lmeval.settings import describe_settings
from hcot_lmeval.training.config import GrpoConfig, SftConfig

SETTINGS = {
    "Training (`hcot train sft CONFIG.yaml`)": SftConfig,
    "Reinforcement learning (`hcot train grpo CONFIG.yaml`)": GrpoConfig,
    "Grids (`hcot compare run CONFIG.yaml`)": GridConfig,
}


def write(folder: Path) -> None:
    """Writes commands.md and settings.md."""
    commands = [f"## hcot {name}\n\n" + "\n\n".join(helps(name)) for name in PARTS if name != "eval"]
    page(
        folder / "commands.md",
        "# Commands\n\n`hcot eval` is `lm_eval --model hcot` ([arguments.md](arguments.md)); the others:\n\n",
        "\n\n".join(commands),
    )
    tables = [
        f"## {title}\n\n```text\n" + "\n".join(describe_settings(kind)) + "\n```" for title, kind in SETTINGS.items()
    ]
    page(
        folder / "settings.md",
        "# Settings\n\nEvery key of the YAML files; `KEY=VALUE` on the command line comes last.\n\n",
        "\n\n".join(tables),
    )


def page(path: Path, head: str, body: str) -> None:
    """Writes a page if it has changed, so that Sphinx does not read it again."""
    text = head + body + "\n"
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def helps(command: str) -> list[str]:
    """Returns the help of a command and of its subcommands, as blocks of text."""
    whole = help_of(command)
    found = re.search(r"^usage:[^\n]*\{([a-z,-]+)\}", whole)
    names = found[1].split(",") if found else []
    return [f"```text\n{text.rstrip()}\n```" for text in [whole, *(help_of(command, name) for name in names)]]


def help_of(*words: str) -> str:
    """Returns what ``hcot WORDS --help`` prints."""
    told = io.StringIO()
    before, sys.argv = sys.argv, ["hcot " + words[0]]
    os.environ["COLUMNS"] = "110"
    try:
        with contextlib.redirect_stdout(told), contextlib.suppress(SystemExit):
            import_module(PARTS[words[0]].module).main([*words[1:], "--help"])
    finally:
        sys.argv = before
    return told.getvalue()
