"""The documentation: it builds without a warning, and its commands are ones that the programs take, and run."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from lm_eval._cli.harness import HarnessCLI
from lm_eval.utils import simple_parse_args_string

from hcot_lmeval.command import PARTS
from hcot_lmeval.lm.options import known_names, split_model_args

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "tasks" / "README.md"])
PROGRAMS = ("hcot", "lm_eval", "python", "torchrun", "make")


def commands() -> list[tuple[str, str]]:
    """Every command line in a block of bash, with its page."""
    found = []
    for page in PAGES:
        for block in re.findall(r"^```bash\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words and words[0] in PROGRAMS:
                    found.append((page.relative_to(ROOT).as_posix(), line.strip()))
    return found


COMMANDS = commands()
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def parse(words: list[str]) -> None:
    """Has the program read its command line, and do nothing."""
    program, *rest = words
    if program == "lm_eval":
        args = HarnessCLI().parse_args() if not rest else _lm_eval(rest)
        given = (
            args.model_args if isinstance(args.model_args, dict) else simple_parse_args_string(args.model_args or "")
        )
        assert set(split_model_args(given)[1]) <= known_names()
    elif program == "hcot" and rest[0] == "eval":
        parse(["lm_eval", "--model", "hcot", *rest[1:]])
    elif program == "hcot":
        module = import_module(PARTS[rest[0]].module)
        reads = next(getattr(module, name) for name in ("parser", "make_parser", "parse_args") if hasattr(module, name))
        reads(rest[1:]) if reads.__name__ == "parse_args" else reads().parse_args(rest[1:])
    elif program == "make":
        target = next(word for word in rest if "=" not in word)
        made = target == ".venv/.ready" or re.search(rf"^{re.escape(target)}:", MAKEFILE, re.MULTILINE)
        assert made, f"the Makefile has no {target}"
    else:
        script = next((word for word in rest if word.endswith(".py")), None)
        assert script is None or (ROOT / script).is_file()


def _lm_eval(rest: list[str]):
    before, sys.argv = sys.argv, ["lm_eval", *rest]
    try:
        return HarnessCLI().parse_args()
    finally:
        sys.argv = before


@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_every_command_is_one_that_its_program_takes(page, line):
    parse(shlex.split(line, comments=True))


def test_a_command_with_an_unknown_option_fails():
    assert len(COMMANDS) > 40
    for line in (
        "hcot view notes --broad",
        "lm_eval --model hcot --model_args pruned=yes",
        "make tests",
        "hcot prepare cut",
    ):
        with pytest.raises((SystemExit, ValueError, AssertionError)):
            parse(shlex.split(line))


LOCALE = {**os.environ, "LC_ALL": "C.UTF-8"}
"""Sphinx asks for the locale of the environment, which need not be installed."""


def run(*words: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, capture_output=True, text=True, check=False, **options)


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("sphinx", reason="not installed; pip install 'hcot_lmeval[docs]'")
    done = run(
        sys.executable,
        "-m",
        "sphinx",
        "-b",
        "html",
        "-W",
        "--keep-going",
        "-q",
        "docs",
        str(tmp_path),
        cwd=ROOT,
        env=LOCALE,
    )
    assert (done.returncode, done.stderr) == (0, "")
    start = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "quickstart.html" in start and "pruning.svg" in start
    assert "max_context" in (tmp_path / "reference" / "arguments.html").read_text(encoding="utf-8")
    assert "--samples" in (tmp_path / "reference" / "commands.html").read_text(encoding="utf-8")


def test_the_page_of_speed_is_that_of_its_data(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    import speed_charts

    tables = json.loads(speed_charts.DATA.read_text(encoding="utf-8"))
    page = speed_charts.PAGE.read_text(encoding="utf-8")
    assert page == speed_charts.page(tables), "run python docs/speed_charts.py"
    for chart in re.findall(r"results/speed-\d+\.svg", page):
        assert (ROOT / "docs" / chart).is_file()
    for table in tables:
        assert {"question", "commands", "machine", "versions", "measured"} <= table.keys()


@pytest.fixture
def environment(tmp_path):
    """Where `hcot` and `lm_eval` are those of this interpreter and of this clone."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}


def test_the_readme_evaluates_and_compares_as_it_says(tmp_path, environment):
    blocks = re.findall(
        r"^```bash\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
    [block] = [block for block in blocks if "pretrained=tiny-hcot" in block]
    done = run("bash", "-e", "-c", block.replace("--limit 30", "--limit 8"), cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.search(r"tiny-hcot, recompute, 256 +tiny-hcot, off, 256 +8 +0 +\+100\.0", done.stdout), done.stdout
