"""The package as it is installed: what is in it, what an import costs, what its public names are."""

import ast
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import hcot_lmeval
import hcot_lmeval.plugin
from tests.installs import KINDS, ROOT, Install, install

HEAVY = ("torch", "transformers", "datasets", "lm_eval", "sympy", "math_verify", "numpy")


@pytest.fixture(scope="module", params=KINDS)
def installed(request, tmp_path_factory) -> Install:
    return install(request.param, tmp_path_factory.getbasetemp())


def test_startup_files_lie_at_the_root_of_site_packages(installed):
    assert {"hcot_lmeval.pth", "hcot_lmeval.start"} <= installed.files
    assert (installed.site_packages / "hcot_lmeval.pth").is_file()


def test_both_startup_files_call_the_same_function(installed):
    """From Python 3.15 on the second counts, read by `pkgutil.resolve_name`; the first one's line is then ignored."""
    entry = (installed.site_packages / "hcot_lmeval.start").read_text().strip()
    assert pkgutil.resolve_name(entry) is hcot_lmeval.plugin.start
    (line,) = (installed.site_packages / "hcot_lmeval.pth").read_text().splitlines()
    assert line.startswith("import sys; exec(")
    assert entry.replace(":", " import ") in line and "start()" in line


def test_wheel_ships_the_tasks_and_the_type_marker(tmp_path_factory):
    files = install("wheel", tmp_path_factory.getbasetemp()).files
    tasks = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tasks").rglob("*") if path.is_file()}
    assert tasks
    assert {name.removeprefix("hcot_lmeval/") for name in files if name.startswith("hcot_lmeval/tasks/")} == tasks
    assert "hcot_lmeval/py.typed" in files


def test_editable_install_copies_no_code_and_no_task(tmp_path_factory):
    """A copied task would be read in place of the one being edited."""
    files = install("editable", tmp_path_factory.getbasetemp()).files
    assert {name for name in files if ".dist-info/" not in name} == {
        "_hcot_lmeval.pth",
        "hcot_lmeval.pth",
        "hcot_lmeval.start",
    }


def test_tasks_folder_is_found(installed):
    found = Path(installed.python_says("from hcot_lmeval.plugin import tasks_path; print(tasks_path())"))
    wheel = installed.site_packages / "hcot_lmeval" / "tasks"
    assert found == (wheel if installed.folder.name == "wheel" else ROOT / "tasks")
    assert found.is_dir()


def test_hcot_eval_is_lm_evals_own(installed):
    done = installed.run("hcot", "eval", "--help", HCOT_LMEVAL_AUTOLOAD="0")
    assert done.returncode == 0, done.stderr
    assert "--model_args" in done.stdout


def test_entry_points(installed):
    code = (
        "from importlib.metadata import distribution as d\n"
        "print(sorted(f'{e.group} {e.name} = {e.value}' for e in d('hcot_lmeval').entry_points))"
    )
    assert ast.literal_eval(installed.python_says(code)) == [
        "console_scripts hcot = hcot_lmeval.command:main",
        "lm_eval.models hcot = hcot_lmeval.lm:HcotLM",
        "lm_eval.tasks hcot_lmeval = hcot_lmeval.tasks",
    ]


def test_start_of_the_interpreter_loads_two_small_modules(installed):
    code = "import sys; print(sorted(name for name in sys.modules if name.startswith({!r})))"
    names = ("hcot_lmeval", "lm_eval", "typing", "importlib.metadata", "logging", "inspect", "re", *HEAVY)
    assert installed.python_says(code.format(names)) == "['hcot_lmeval', 'hcot_lmeval.plugin']"


def test_cost_of_the_start_is_printed(installed, capsys):
    """A sanity figure for the reader; a limit would fail on a busy machine."""
    done = installed.run("python", "-X", "importtime", "-c", "pass")
    lines = [line for line in done.stderr.splitlines() if "hcot_lmeval" in line]
    assert len(lines) == 2
    microseconds = sum(int(line.split(":")[1].split("|")[0]) for line in lines)
    with capsys.disabled():
        print(f"\n  {installed.folder.name}: the start-up file imports for {microseconds / 1000:.2f} ms")


def test_import_is_light():
    code = f"import sys, hcot_lmeval; print([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


@pytest.mark.parametrize("name", hcot_lmeval.__all__)
def test_public_name_is_what_its_module_defines(name):
    value = getattr(hcot_lmeval, name)
    if name in hcot_lmeval._HOME:
        assert value is getattr(importlib.import_module(f"hcot_lmeval.{hcot_lmeval._HOME[name]}"), name)


def test_public_names_are_listed():
    assert set(hcot_lmeval.__all__) <= set(dir(hcot_lmeval))


def test_typo_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'hcot_lmeval' has no attribute 'Engin'"):
        _ = hcot_lmeval.Engin
    with pytest.raises(ImportError, match="cannot import name 'Engin'"):
        exec("from hcot_lmeval import Engin")


def test_type_checkers_see_the_same_names_in_the_same_modules():
    tree = ast.parse(Path(hcot_lmeval.__file__).read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module != "importlib"]
    seen = {alias.asname: node.module.removeprefix("hcot_lmeval.") for node in imports for alias in node.names}
    assert seen == hcot_lmeval._HOME


def test_installed_antlr_is_the_one_that_sympy_accepts():
    """With another version lm-eval's minerva tasks, and whatever else parses LaTeX by sympy, cannot be imported."""
    from sympy import Rational
    from sympy.parsing.latex import parse_latex

    assert parse_latex(r"\frac{1}{2}").doit() == Rational(1, 2)
