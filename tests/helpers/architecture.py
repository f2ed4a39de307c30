"""The imports between the project's packages, and the diagram of them in docs/architecture.md.

`python -m tests.helpers.architecture` draws the diagram.
"""

from __future__ import annotations

import ast
from functools import cache
from itertools import chain, pairwise
from pathlib import Path
from statistics import fmean

ROOT = Path(__file__).parents[2]
PACKAGES = ("stage1_tokenizer", "stage2_prior", "pipeline")
FILES = sorted(p for package in PACKAGES for p in (ROOT / package).rglob("*.py"))
DIAGRAM = ROOT / "docs" / "images" / "architecture.svg"

Graph = dict[str, set[str]]

BOX_WIDTH = 150
BOX_HEIGHT = 34
SLOT_WIDTH = 180
ROW_HEIGHT = 72
HEAD = """<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" \
viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="14" text-anchor="middle">
<marker id="arrow" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" markerHeight="8" \
orient="auto"><path d="M0 0L8 4L0 8z" fill="#667"/></marker>
<rect width="100%" height="100%" rx="8" fill="#fff"/>"""


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported_modules(path: Path) -> set[str]:
    """Our own modules that a file imports, anywhere in it: also within functions and for the type
    checker alone."""
    names = {module_of(file) for file in FILES}
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module in names:
            found |= {
                full if (full := f"{node.module}.{alias.name}") in names else node.module
                for alias in node.names
            }
    return found


def package_imports() -> Graph:
    """Package -> packages that its modules import. `pipeline` itself only lists the public API and
    is left out."""

    def package(module: str) -> str:
        return module.removeprefix("pipeline.").split(".")[0]

    graph: Graph = {}
    for path in FILES:
        own = package(module_of(path))
        imports = {package(module) for module in imported_modules(path)}
        graph.setdefault(own, set()).update(imports - {own})
    del graph["pipeline"]
    return graph


def direct_imports(graph: Graph) -> Graph:
    """The imports that no chain of other imports implies. The graph has no circles."""

    @cache
    def below(package: str) -> set[str]:
        return graph[package].union(*map(below, graph[package]))

    return {package: used.difference(*map(below, used)) for package, used in graph.items()}


def layout(graph: Graph) -> tuple[list[list[str]], list[list[str]]]:
    """Rows of packages, each above those that it imports, and the lines between them as names from
    row to row. A line past other rows has a slot of its own in each of them."""

    @cache
    def height(package: str) -> int:
        return 1 + max(map(height, graph[package]), default=-1)

    rows: list[list[str]] = [[] for _ in range(1 + max(map(height, graph)))]
    lines = []
    for package in sorted(graph):
        rows[height(package)].append(package)
        for used in sorted(graph[package]):
            line = [package]
            for row in range(height(package) - 1, height(used), -1):
                line.append(f"{package} to {used}, row {row}")
                rows[row].append(line[-1])
            lines.append([*line, used])
    return rows[::-1], lines


def svg(graph: Graph) -> str:
    """The graph as an image. In each row, names stand in the order of those that import them."""
    rows, lines = layout(graph)
    width = SLOT_WIDTH * max(map(len, rows))
    x: dict[str, float] = {}
    y: dict[str, float] = {}
    for number, row in enumerate(rows):
        above: dict[str, list[float]] = {name: [] for name in row}
        for upper, lower in chain.from_iterable(map(pairwise, lines)):
            if lower in above:
                above[lower].append(x[upper])
        row.sort(key=lambda name: (fmean(above[name] or [0]), name))
        for slot, name in enumerate(row):
            x[name] = width / 2 + SLOT_WIDTH * (slot - (len(row) - 1) / 2)
            y[name] = ROW_HEIGHT * (number + 0.5)

    drawn = [HEAD.format(width=width, height=ROW_HEIGHT * len(rows))]
    half = BOX_HEIGHT / 2
    for line in lines:
        path = f"M{x[line[0]]:g} {y[line[0]]:g}"
        for upper, lower in pairwise(line):
            middle = (y[upper] + y[lower]) / 2
            path += f"V{y[upper] + half:g}C{x[upper]:g} {middle:g} {x[lower]:g} {middle:g} "
            path += f"{x[lower]:g} {y[lower] - half:g}"
        drawn.append(f'<path d="{path}" fill="none" stroke="#667" marker-end="url(#arrow)"/>')
    for name in sorted(graph):
        drawn.append(
            f'<rect x="{x[name] - BOX_WIDTH / 2:g}" y="{y[name] - half:g}" width="{BOX_WIDTH}" '
            f'height="{BOX_HEIGHT}" rx="5" fill="#eef1fb" stroke="#445"/>'
            f'<text x="{x[name]:g}" y="{y[name] + 5:g}">{name}</text>'
        )
    return "\n".join([*drawn, "</svg>\n"])


if __name__ == "__main__":
    DIAGRAM.write_text(svg(direct_imports(package_imports())))
