"""Pages of docs/theory/: each equation leads to a function and to a test, and both exist."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from tests.helpers.architecture import ROOT

FOLDER = ROOT / "docs" / "theory"
PAGES = sorted(FOLDER.glob("[0-9]*.md"))
EVERY_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
CODE_FOLDERS = ("stage1_tokenizer", "stage2_prior", "pipeline", "examples", "benchmarks", "tests")
LINK = re.compile(r"(!?)\[([^\]\n]*)\]\(([^)#\s]+)[^)]*\)")
EQUATION = re.compile(r"^(?:> )?\((\d+\.\d+)\) ", re.MULTILINE)
WITHOUT_PLOT = {"18-beyond"}


def links(text: str) -> list[tuple[str, Path]]:
    """Label and file of every link to code."""
    return [
        (label.strip("`"), (FOLDER / target).resolve())
        for _, label, target in LINK.findall(text)
        if target.endswith(".py")
    ]


@cache
def all_code() -> str:
    files = [path for folder in CODE_FOLDERS for path in (ROOT / folder).rglob("*.py")]
    return "\n".join(path.read_text() for path in files)


@cache
def definitions(path: Path) -> set[str]:
    """Functions, classes and constants of a file, and what its classes have as `Class.name`."""

    def named(body: list[ast.stmt], prefix: str) -> set[str]:
        found = set()
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(prefix + node.name)
            if isinstance(node, ast.ClassDef):
                found |= named(node.body, f"{prefix}{node.name}.")
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", 0)]
            found |= {prefix + target.id for target in targets if isinstance(target, ast.Name)}
        return found

    return named(ast.parse(path.read_text()).body, "")


def test_definitions_are_those_of_modules_and_classes():
    own = definitions(Path(__file__))
    assert {"LINK", "links", "definitions"} <= own and "named" not in own
    assert "LatentPriorConfig.kind" in definitions(ROOT / "stage2_prior" / "flows" / "config.py")


@EVERY_PAGE
def test_every_name_exists(page):
    for named in re.findall(r"`([^`\n]+)`", page.read_text()):
        for name in re.findall(r"\w+", named.removesuffix(".py").rpartition("/")[2]):
            assert re.search(rf"\b{name}\b", all_code()) or (ROOT / named).exists(), (
                f"{page.name} names {named}"
            )


@EVERY_PAGE
def test_links_to_code_name_what_the_file_has(page):
    found = links(page.read_text())
    assert found
    for label, path in found:
        assert label == path.name or label in definitions(path), f"{label} is not in {path}"


@EVERY_PAGE
def test_every_equation_has_a_function_and_a_test(page):
    text = page.read_text()
    numbers = EQUATION.findall(text)
    assert numbers == [f"{int(page.stem[:2])}.{i}" for i in range(1, len(numbers) + 1)] != []
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
    for number in numbers:
        own = [row for row in rows if re.search(rf"\b{number}\b(?!\.)", row[0])]
        functions = [path for row in own for _, path in links(row[1])]
        tests = [label for row in own for label, _ in links(row[2])]
        assert functions and not any((ROOT / "tests") in path.parents for path in functions), number
        assert tests and all(label.startswith("test_") for label in tests), number


@EVERY_PAGE
def test_every_page_has_a_plot_and_names_its_script(page):
    text = page.read_text()
    plots = re.findall(r"^!\[", text, re.MULTILINE)
    assert len(plots) == (page.stem not in WITHOUT_PLOT)
    if plots:
        caption = text[text.index("![") :].partition("\n\n")[2].partition("\n\n")[0]
        scripts = [path for label, path in links(caption) if label == path.name]
        assert caption.startswith("*") and caption.rstrip().endswith("*") and scripts


def test_the_index_lists_every_page_in_order():
    listed = re.findall(
        r"^(\d+)\. \[[^\]]+\]\(([^)]+)\): ", (FOLDER / "index.md").read_text(), re.M
    )
    assert [name for _, name in listed] == [page.name for page in PAGES]
    assert [int(number) for number, _ in listed] == [int(page.name[:2]) for page in PAGES]
    assert [page.read_text().split(".")[0] for page in PAGES] == [f"# {n}" for n, _ in listed]


def test_the_site_lists_every_page():
    assert re.findall(r"theory/(\d\d-[\w-]+\.md)", (ROOT / "mkdocs.yml").read_text()) == [
        page.name for page in PAGES
    ]
