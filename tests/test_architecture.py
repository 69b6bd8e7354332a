"""Imports point one way. The rules of the house, read off the source, so that they hold for files yet to be written."""

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from architecture import FILES, PACKAGE, PICTURE, ROOT, draw, graph_of_parts, imported_names, module_name, ours

RULE = {"markup", "trace", "grammar", "events", "store", "notes", "response"}
"""Modules that need nothing but the standard library and one another."""
LIGHT = RULE | {"__init__", "plugin", "answers", "synthetic", "record", "assets", "vocabulary", "provenance"}
"""Modules whose import pulls in nothing but the standard library; heavy parts come within functions, on first use."""
FORBIDDEN = {
    "engine": {"lm_eval", "trl", "datasets"},
    "masks": {"lm_eval", "trl", "datasets", "transformers"},
    "tokens": {"lm_eval", "trl", "datasets"},
    "answers": {"torch", "transformers", "lm_eval", "datasets"},
    "training": {"lm_eval"},
}
"""Part of the package -> libraries that it may import nowhere, not even within a function."""
LONGEST_FILE, LONGEST_FUNCTION, LONGEST_PAGE = 500, 60, 150
"""Lines."""


def part(path: Path) -> str:
    return module_name(path).split(".")[0]


def imported(path: Path, *, lazy: bool = True, typing: bool = False) -> set[str]:
    return set(imported_names(ast.parse(path.read_text(encoding="utf-8")), lazy=lazy, typing=typing))


def libraries(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) - {"hcot_lmeval"}


def each(parts: set[str]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("path", [path for path in FILES if part(path) in parts], ids=module_name)


def test_the_reader_of_imports_sees_them():
    """Were it blind, every other test here would pass."""
    source = "import a.b\nif TYPE_CHECKING:\n    import c\ndef f():\n    from d import e\nclass G:\n    import h"
    tree = ast.parse(source)
    assert set(imported_names(tree)) == {"a.b", "c", "d.e", "h"}
    assert set(imported_names(tree, typing=False)) == {"a.b", "d.e", "h"}
    assert set(imported_names(tree, lazy=False, typing=False)) == {"a.b", "h"}
    assert libraries(imported(PACKAGE / "masks.py")) == {"torch"}
    assert ours(imported(PACKAGE / "trace.py")) == {"markup"}


@each(RULE)
def test_rule_needs_the_standard_library_alone(path):
    assert libraries(imported(path)) == set()
    assert {module.split(".")[0] for module in ours(imported(path))} <= RULE


@pytest.mark.parametrize("name", sorted(LIGHT & {module_name(path) for path in FILES}))
def test_importing_a_light_module_pulls_in_nothing_heavy(name):
    eager = {module_name(path): imported(path, lazy=False) for path in FILES}
    reached, waiting = set(), {name}
    while waiting:
        module = waiting.pop()
        reached.add(module)
        waiting |= (ours(eager[module]) | {module.split(".")[0]}) - reached
    assert {module: found for module in reached if (found := libraries(eager[module]))} == {}


@each(set(FORBIDDEN))
def test_part_imports_no_forbidden_library(path):
    assert libraries(imported(path)) & FORBIDDEN[part(path)] == set()


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_nobody_imports_what_stands_on_top(path):
    """lm-eval and `plugin` ask for `lm` by its name, the start-up file for `plugin`."""
    used = {module.split(".")[0] for module in ours(imported(path))} - {part(path)}
    assert used & {"lm", "plugin"} == set()


@pytest.mark.parametrize("path", [path for path in FILES if module_name(path) != "__init__"], ids=module_name)
def test_nobody_goes_through_the_public_names(path):
    """`from hcot_lmeval import Engine` within the package would hide which module needs which."""
    names = imported(path)
    through = {name.removeprefix("hcot_lmeval.") for name in names if name.startswith("hcot_lmeval.")}
    assert "hcot_lmeval" not in names
    assert {name for name in through if name[0].isupper()} == set()


def test_imports_have_no_circle():
    """Between modules, imports for type checkers included, and between the parts of the package taken as wholes."""
    graph = {module_name(path): ours(imported(path, typing=True)) - {module_name(path)} for path in FILES}
    tuple(TopologicalSorter(graph).static_order())
    tuple(TopologicalSorter(graph_of_parts()).static_order())


def test_the_picture_shows_the_imports_as_they_are():
    assert PICTURE.read_text(encoding="utf-8") == draw(), "run python scripts/architecture.py"


# Sizes


def checked_in(*suffixes: str) -> list[Path]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("sizes are counted in a clone with git")
    names = [name for name in listed.stdout.splitlines() if name.endswith(suffixes) and not name.startswith("docs/")]
    return [ROOT / name for name in names if (ROOT / name).is_file()]


def test_no_file_is_long():
    lengths = {path: path.read_text(encoding="utf-8").count("\n") for path in checked_in(".py", ".cpp", ".hpp", ".js")}
    assert {str(path): lines for path, lines in lengths.items() if lines > LONGEST_FILE} == {}


def test_no_function_is_long():
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = ((path, node) for path in checked_in(".py") for node in ast.walk(ast.parse(path.read_text("utf-8"))))
    lengths = {
        f"{path}:{node.lineno} {node.name}": 1 + (node.end_lineno or 0) - node.lineno
        for path, node in nodes
        if isinstance(node, functions)
    }
    assert {name: lines for name, lines in lengths.items() if lines > LONGEST_FUNCTION} == {}


PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("tasks/**/*.md")])


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_pages_are_short_and_their_links_lead_to_files(page):
    text = page.read_text(encoding="utf-8")
    assert text.count("\n") <= LONGEST_PAGE
    targets = re.findall(r"\]\(([^)#\s]+)", text)
    assert [target for target in targets if "://" not in target and not (page.parent / target).exists()] == []
