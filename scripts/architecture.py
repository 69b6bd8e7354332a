"""Draws docs/architecture.svg: the parts of the package, each above those that it imports.

    python scripts/architecture.py            writes the picture; a test fails where it is out of date

A part is a folder of the package, or a module beside them. A line goes to what is imported directly and reached in no
other way, so that what stands below a part, with lines between, is what one has to know to read it.
"""

from __future__ import annotations

import argparse
import ast
from collections.abc import Iterator, Mapping
from graphlib import TopologicalSorter
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "hcot_lmeval"
PICTURE = ROOT / "docs" / "architecture.svg"
FILES = sorted(path for path in PACKAGE.rglob("*.py") if "tasks" not in path.relative_to(PACKAGE).parts)

WIDTH, HEIGHT, GAP, MARGIN = 104, 30, 64, 20
"""Of a box, between layers, and around everything; pixels."""


def module_name(path: Path) -> str:
    """Dotted name below the package: `engine.slots`; a folder's `__init__` has the name of the folder."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


def imported_names(node: ast.AST, *, lazy: bool = True, typing: bool = True) -> Iterator[str]:
    """Yields the absolute names that are imported below a node of a syntax tree.

    Args:
        node: a module, for example.
        lazy: those within functions too.
        typing: those for type checkers too.

    Raises:
        ValueError: an import is relative.
    """
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            if child.level:
                raise ValueError(f"line {child.lineno}: a relative import; write it out")
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        elif isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) and not lazy:
            continue
        elif typing or not (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)):
            yield from imported_names(child, lazy=lazy, typing=typing)


def ours(names: set[str]) -> set[str]:
    """Returns the modules of the package among imported names, as `module_name` has them."""
    known = {module_name(path) for path in FILES}
    inner = (name.removeprefix("hcot_lmeval.") for name in names if name.startswith("hcot_lmeval."))
    return {module for name in inner for module in (name, name.rpartition(".")[0]) if module in known}


def graph_of_parts() -> dict[str, set[str]]:
    """Returns each part of the package with the parts that it imports."""
    graph: dict[str, set[str]] = {}
    for path in FILES:
        part = module_name(path).split(".")[0]
        tree = ast.parse(path.read_text(encoding="utf-8"))
        used = {module.split(".")[0] for module in ours(set(imported_names(tree)))}
        graph.setdefault(part, set()).update(used - {part})
    return {part: used for part, used in graph.items() if not part.startswith("__")}


def layers_of(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Returns the parts in layers, lowest first: each stands right above the highest that it imports.

    Within a layer they are ordered by where the parts that they import stand, so that few lines cross.
    """
    level: dict[str, int] = {}
    for part in TopologicalSorter(graph).static_order():
        level[part] = 1 + max((level[used] for used in graph[part]), default=-1)
    layers: list[list[str]] = [[] for _ in range(1 + max(level.values()))]
    place: dict[str, float] = {}
    for number, layer in enumerate(layers):
        here = sorted(part for part in level if level[part] == number)
        here.sort(key=lambda part: sum(place[used] for used in graph[part]) / max(1, len(graph[part])))
        layer.extend(here)
        place |= {part: (index + 0.5) / len(here) for index, part in enumerate(here)}
    return layers


def reduced(graph: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """Returns the graph without the edges that a longer way makes superfluous."""
    reach: dict[str, set[str]] = {}
    for part in TopologicalSorter(graph).static_order():
        reach[part] = graph[part].union(*(reach[used] for used in graph[part]))
    return {part: {u for u in used if not any(u in reach[v] for v in used)} for part, used in graph.items()}


def draw() -> str:
    """Returns the picture as SVG."""
    graph = graph_of_parts()
    layers = layers_of(graph)
    width = 2 * MARGIN + max(map(len, layers)) * (WIDTH + 16)
    height = 2 * MARGIN + len(layers) * HEIGHT + (len(layers) - 1) * GAP
    centre: dict[str, tuple[float, float]] = {}
    for number, layer in enumerate(layers):
        y = height - MARGIN - HEIGHT / 2 - number * (HEIGHT + GAP)
        for index, part in enumerate(layer):
            centre[part] = (width * (index + 0.5) / len(layer), y)
    lines = [
        f'<line x1="{centre[part][0]:.0f}" y1="{centre[part][1] + HEIGHT / 2:.0f}" x2="{centre[used][0]:.0f}" '
        f'y2="{centre[used][1] - HEIGHT / 2:.0f}"/>'
        for part, every in sorted(reduced(graph).items())
        for used in sorted(every)
    ]
    boxes = [
        f'<rect x="{x - WIDTH / 2:.0f}" y="{y - HEIGHT / 2:.0f}" width="{WIDTH}" height="{HEIGHT}" rx="5"'
        f"{' class=' + chr(34) + 'folder' + chr(34) if (PACKAGE / part).is_dir() else ''}/>"
        f'<text x="{x:.0f}" y="{y + 4:.0f}">{escape(part)}</text>'
        for part, (x, y) in sorted(centre.items())
    ]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif">',
            "<title>Parts of hcot_lmeval, each above those that it imports; folders are darker</title>",
            "<style>rect{fill:#f4f6fa;stroke:#7a869a}.folder{fill:#d6e2f5;stroke:#3b5b92}"
            "text{font-size:13px;text-anchor:middle}line{stroke:#b3bccb}</style>",
            f'<rect width="{width}" height="{height}" style="fill:white;stroke:none"/>',
            *lines,
            *boxes,
            "</svg>\n",
        ]
    )


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    PICTURE.write_text(draw(), encoding="utf-8")
    print(f"wrote {PICTURE.relative_to(ROOT)}")
