"""Imports point one way. The rules of the house, read off the source, so that they hold for files yet to be written."""

import ast
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "hcot_lmeval"
FILES = sorted(path for path in PACKAGE.rglob("*.py") if "tasks" not in path.relative_to(PACKAGE).parts)

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


def module_name(path: Path) -> str:
    """Dotted name below the package: `engine.slots`; a folder's `__init__` has the name of the folder."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


def part(path: Path) -> str:
    return module_name(path).split(".")[0]


def is_for_type_checkers(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imports(node: ast.AST, *, lazy: bool) -> Iterator[str]:
    """Yields the absolute names that are imported below `node`; those within functions only if `lazy`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"line {child.lineno}: a relative import; write it out"
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        elif isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) and not lazy:
            continue
        elif not is_for_type_checkers(child):
            yield from imports(child, lazy=lazy)


def imported(path: Path, *, lazy: bool = True) -> set[str]:
    return set(imports(ast.parse(path.read_text(encoding="utf-8")), lazy=lazy))


def ours(names: set[str]) -> set[str]:
    """The modules of the package among imported names, as `module_name` has them."""
    known = {module_name(path) for path in FILES}
    inner = (name.removeprefix("hcot_lmeval.") for name in names if name.startswith("hcot_lmeval."))
    return {module for name in inner for module in (name, name.rpartition(".")[0]) if module in known}


def libraries(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) - {"hcot_lmeval"}


def each(parts: set[str]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("path", [path for path in FILES if part(path) in parts], ids=module_name)


def test_the_reader_of_imports_sees_them():
    """Were it blind, every other test here would pass."""
    source = "import a.b\nif TYPE_CHECKING:\n    import c\ndef f():\n    from d import e\nclass G:\n    import h"
    tree = ast.parse(source)
    assert set(imports(tree, lazy=True)) == {"a.b", "d.e", "h"}
    assert set(imports(tree, lazy=False)) == {"a.b", "h"}
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


def test_imports_have_no_cycle():
    """Between modules, and between the folders and modules at the root taken as wholes."""
    graph = {module_name(path): ours(imported(path)) - {module_name(path)} for path in FILES}
    tuple(TopologicalSorter(graph).static_order())
    whole: dict[str, set[str]] = {}
    for path in FILES:
        used = {module.split(".")[0] for module in ours(imported(path))}
        whole.setdefault(part(path), set()).update(used - {part(path)})
    tuple(TopologicalSorter(whole).static_order())
