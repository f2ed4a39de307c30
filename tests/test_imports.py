"""The structure of the packages: layers, lazy imports, short files, complete pages."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.architecture import (
    DIAGRAM,
    FILES,
    PACKAGES,
    ROOT,
    direct_imports,
    imported_modules,
    module_of,
    package_imports,
    svg,
)

FORBIDDEN = {
    "stage1_tokenizer": {"stage2_prior", "pipeline"},
    "stage2_prior": {"stage1_tokenizer", "pipeline"},
    "pipeline": set(),
}


def imported(path: Path) -> set[str]:
    """Top-level packages that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            found.add((node.module or "").split(".")[0])
    return found


LAYERS = (
    ("cli",),
    ("serving", "evaluation"),
    ("stages",),
    ("doctor", "inference"),
    ("likelihood",),
    ("data",),
    ("training",),
    ("runtime",),
    ("config",),
)
"""Packages of pipeline/, top to bottom. A module imports from its own package or from one in a
lower row."""
PLANNED: set[str] = set()
"""Packages that have a row before they are there."""


def upward_imports(path: Path) -> list[str]:
    """Modules of pipeline/ that a file may not import."""
    row = {package: number for number, packages in enumerate(LAYERS) for package in packages}
    own = path.relative_to(ROOT).parts[1]
    theirs = {
        module: module.split(".")[1]
        for module in imported_modules(path)
        if module.startswith("pipeline.")
    }
    return [
        module for module, package in theirs.items() if package != own and row[package] <= row[own]
    ]


@pytest.mark.parametrize(
    "path",
    [
        p
        for p in FILES
        if len(p.relative_to(ROOT).parts) > 2 and p.is_relative_to(ROOT / "pipeline")
    ],
    ids=module_of,
)
def test_imports_go_down_the_layers(path):
    assert upward_imports(path) == []


def test_every_package_has_a_layer():
    packages = {p.parent.name for p in (ROOT / "pipeline").glob("*/__init__.py")}
    assert packages | PLANNED == {package for row in LAYERS for package in row}


def circles(graph: dict[str, set[str]]) -> list[str]:
    """Modules that reach themselves."""
    reached = {module: set(uses) for module, uses in graph.items()}
    for middle in graph:
        for uses in reached.values():
            if middle in uses:
                uses |= reached[middle]
    return sorted(module for module, uses in reached.items() if module in uses)


def test_there_are_no_import_circles():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == ["a", "b", "c"]
    assert circles({module_of(path): imported_modules(path) for path in FILES}) == []


def test_generate_imports_no_readers_of_data_and_no_trackers():
    """What costs seconds before the first image, and sampling does not need."""
    unneeded = ("datasets", "tensorboard", "pyarrow", "pandas", "matplotlib", "jsonargparse")
    code = (
        "import sys, pipeline.cli.main, pipeline.inference.generate, pipeline.inference.prompt_file"
        f"; print([m for m in {unneeded} if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.strip() == "[]"


def test_an_image_of_the_package_is_drawn_without_transformers_and_the_compiler(tmp_path):
    """Each of these takes a quarter of a second to three seconds to import."""
    unneeded = ("transformers", "huggingface_hub", "torch._dynamo", "sympy", "datasets")
    code = (
        "import sys; from pipeline.cli import main; "
        f"main(['generate', 'a red heart', '--num-images', '1', '--out', {str(tmp_path)!r}]); "
        f"print([m for m in {unneeded} if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.splitlines()[-1] == "[]" and (tmp_path / "samples.jsonl").exists()


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_stages_do_not_know_each_other_or_the_pipeline(path):
    package = path.relative_to(ROOT).parts[0]
    assert not imported(path) & (FORBIDDEN[package] | {"tests", "benchmarks", "pickle"})


def test_pixel_units_and_text_offsets_are_in_one_file_each():
    """Text offsets are added in sequence.py only; pixel units are converted in pixels.py only."""
    for path in (ROOT / "stage1_tokenizer").rglob("*.py"):
        assert path.name == "pixels.py" or "127.5" not in path.read_text(), path
    for path in (ROOT / "stage2_prior").rglob("*.py"):
        offsets = re.findall(r"[-+] [a-z.]*text_vocab_size", path.read_text())
        assert path.name == "sequence.py" or not offsets, path


@pytest.mark.parametrize(
    "module", ["pipeline", "pipeline.cli", "pipeline.data.load", "pipeline.data.builtin.shapes"]
)
def test_light_modules_import_nothing_heavy(module):
    code = (
        f"import sys, {module}; print([m for m in ('torch', 'transformers', 'datasets', "
        "'accelerate') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.strip() == "[]"


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from pipeline.cli import main; main(['--help']); assert 'torch' not "
        "in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "train-tokenizer" in done.stdout


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_are_short_and_say_what_they_are(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 500 and path.name != "utils.py"
    assert ast.get_docstring(ast.parse(text)), f"{path} has no docstring"


@pytest.mark.parametrize("package", PACKAGES)
def test_the_public_api_is_what_init_lists(package):
    module = __import__(package)
    assert sorted(module.__all__) == module.__all__
    for name in module.__all__:
        assert getattr(module, name) is not None
    with pytest.raises(AttributeError):
        module.no_such_name  # noqa: B018


def test_the_packages_are_listed():
    import tomllib

    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted({".".join(p.parent.relative_to(ROOT).parts) for p in FILES})


def test_files_beside_the_code_are_installed():
    """Templates and type markers are package data, so that an installed wheel has them."""
    import tomllib

    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    installed = {
        path
        for package, patterns in settings["package-data"].items()
        for pattern in patterns
        for path in (ROOT / package.replace(".", "/")).glob(pattern)
        if path.is_file()
    }
    beside = {
        path
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and path.suffix != ".py" and "__pycache__" not in path.parts
    }
    assert installed == beside


def test_the_architecture_page_names_every_file_and_no_other():
    page = (ROOT / "docs" / "architecture.md").read_text()
    folders: list[str] = []
    listed = set()
    for line in re.search(r"## Files\n+```\n(.*?)```", page, re.DOTALL)[1].splitlines():  # type: ignore[index]
        depth, name = (len(line) - len(line.lstrip())) // 2, line.split()[0]
        assert len(line.split()) > 3, f"{name} has no word of what it does"
        folders = folders[:depth]
        if name.endswith("/"):
            folders.append(name.rstrip("/"))
        else:
            listed.add("/".join([*folders, name]))
    assert listed == {str(path.relative_to(ROOT)) for path in FILES if path.name != "__init__.py"}


def test_the_architecture_diagram_shows_the_imports():
    assert DIAGRAM.read_text() == svg(direct_imports(package_imports())), (
        "the imports of packages changed; run: python -m tests.helpers.architecture"
    )


def test_diagram_leaves_out_imports_that_others_imply():
    graph = {"a": {"b", "c"}, "b": {"c"}, "c": set()}
    assert direct_imports(graph) == {"a": {"b"}, "b": {"c"}, "c": set()}


def test_the_architecture_page_names_what_its_files_have():
    page = (ROOT / "docs" / "architecture.md").read_text()
    rows = re.search(r"\| question \| file \|\n(.*?)\n\n", page, re.DOTALL)[1].splitlines()[1:]  # type: ignore[index]
    for row in rows:
        named = re.findall(r"`([^`]+)`", row.split("|")[2])
        files = [ROOT / name for name in named if "/" in name]
        code = "\n".join(
            inner.read_text()
            for file in files
            for inner in (file.rglob("*.py") if file.is_dir() else [file])
        )
        for name in re.findall(
            r"\w+", " ".join(name for name in named if re.fullmatch(r"[\w.]+", name))
        ):
            assert re.search(rf"\b{name}\b", code), f"{name} is not in the files of: {row}"
