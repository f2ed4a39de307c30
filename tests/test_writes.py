"""Every file is written under a temporary name, then renamed: where the packages open a file for
writing, it is one of `pipeline/runtime/atomic_io.py`, or it is named here with a reason."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.architecture import PACKAGES, ROOT

ALLOWED = {
    "pipeline/config/load.py:_as_file": "a temporary file, which nothing reads later",
    "pipeline/cli/streams.py:lasting_streams": "the null device",
    "pipeline/data/codes/export.py:_write_parquet": "into a folder of atomic_write_dir",
    "pipeline/data/codes/export.py:_write_tar": "into a folder of atomic_write_dir",
    "pipeline/data/codes/export.py:write": "a path in a folder of atomic_write_dir",
    "pipeline/inference/generate.py:_write": "WrittenImages.save, which is atomic",
    "pipeline/inference/generate.py:reconstruct": "WrittenImages.save, which is atomic",
    "pipeline/inference/likelihood_report.py:_write": "WrittenImages.save, which is atomic",
    "pipeline/evaluation/evaluate.py:evaluate": "Report.save, which is atomic",
    "pipeline/stages/run.py:assemble_bundle": "calls write_bundle, which is atomic",
    "pipeline/stages/run_lock.py:_write_holder": "the lock's own content, which decides nothing",
    "pipeline/training/checkpoint.py:_save": "into a folder of atomic_write_dir",
    "pipeline/runtime/atomic_io.py:_sync": "opened to be synced",
    "pipeline/cli/streams.py:_drop": "the null device",
    "pipeline/inference/base.py:push_to_hub": "a temporary folder, which is uploaded",
    "stage1_tokenizer/saving.py:push_to_hub": "a temporary folder, which is uploaded",
    "stage2_prior/saving.py:push_to_hub": "a temporary folder, which is uploaded",
    "stage1_tokenizer/saving.py:save_pretrained": "into a folder of the caller",
    "stage1_tokenizer/transformers_saving.py:save_pretrained": "into a folder of the caller",
    "stage2_prior/saving.py:save_pretrained": "into a folder of the caller",
    "stage2_prior/transformers_saving.py:save_pretrained": "into a folder of the caller",
    "stage2_prior/text.py:save": "into a folder of the caller, as save_pretrained of models",
}
"""By file and function: why a call that looks like a write is none, or writes whole files."""

_METHODS = {
    *("write_text", "write_bytes", "save", "savez", "savez_compressed", "savefig", "tofile"),
    *("save_file", "save_pretrained", "save_to_disk", "to_parquet", "to_csv", "imwrite"),
    *("copyfile", "copy2", "copytree", "symlink_to", "pwrite", "ParquetWriter"),
    *("NamedTemporaryFile", "SummaryWriter"),
}
_OPENERS = {"open", "OSFile", "fdopen", "ZipFile"}


def writes(call: ast.Call) -> bool:
    """Whether a call opens a file for writing, or writes one."""
    function = call.func
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    if name in _METHODS:
        return True
    if name in ("dump", "safe_dump"):  # without a file they return text
        return len(call.args) > 1
    if name not in _OPENERS:
        return False
    texts = [
        node.value
        for given in (*call.args, *call.keywords)
        for node in ast.walk(given)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    flags = {node.attr for node in ast.walk(call) if isinstance(node, ast.Attribute)}
    modes = [text for text in texts if len(text) <= 4 and set(text) <= set("rwaxbt+:|gz")]
    return any(set(mode) & set("wax+") for mode in modes) or bool(
        flags & {"O_WRONLY", "O_RDWR", "O_CREAT"}
    )


def names(node: ast.AST) -> set[str]:
    return {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)}


def called(node: ast.AST) -> str:
    if not isinstance(node, ast.Call):
        return ""
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def temporary(tree: ast.AST) -> set[str]:
    """Names of what is renamed later, or in memory."""
    found = set()
    for node in ast.walk(tree):
        if called(node) in ("atomic_write_dir", "atomic_write_files"):
            passed = names(node.args[1])
            found |= {
                inner.args.args[0].arg
                for inner in ast.walk(tree)
                if isinstance(inner, ast.FunctionDef) and inner.name in passed and inner.args.args
            }
        if isinstance(node, ast.Assign) and called(node.value) == "BytesIO":
            found |= names(node.targets[0])
        if isinstance(node, ast.With):
            for item in node.items:
                if item.optional_vars is not None and (
                    called(item.context_expr) == "atomic_write" or names(item.context_expr) & found
                ):
                    found |= names(item.optional_vars)
    return found


def unsafe_writes(path: Path) -> Iterator[tuple[str, int]]:
    """FILE:FUNCTION and line of every write that is not to a temporary file."""

    def visit(node: ast.AST, function: str) -> Iterator[tuple[str, int]]:
        if isinstance(node, ast.FunctionDef):
            function = node.name
        if isinstance(node, ast.Call) and writes(node) and not names(node) & renamed:
            yield f"{path.relative_to(ROOT)}:{function}", node.lineno
        for child in ast.iter_child_nodes(node):
            yield from visit(child, function)

    tree = ast.parse(path.read_text())
    renamed = temporary(tree)
    yield from visit(tree, "")


def test_every_file_is_written_under_a_temporary_name():
    found = {
        where: line
        for package in PACKAGES
        for path in sorted((ROOT / package).rglob("*.py"))
        for where, line in unsafe_writes(path)
    }
    new = [f"{where}, line {line}" for where, line in found.items() if where not in ALLOWED]
    assert not new, (
        f"{new} write files under their final names; use pipeline/runtime/atomic_io.py, or name "
        "them in ALLOWED with a reason"
    )
    assert not set(ALLOWED) - set(found), "ALLOWED names what is not there"


@pytest.mark.parametrize(
    "line",
    [
        "path.write_text('a')",
        "open(path, 'w')",
        "open(path, mode='ab')",
        "path.open('x')",
        "np.save(path, rows)",
        "image.save(path)",
        "json.dump(values, file)",
        "tarfile.open(path, 'w:gz')",
        "os.open(path, os.O_WRONLY | os.O_CREAT)",
        "shutil.copyfile(a, b)",
        "drawing.savefig(path)",
    ],
)
def test_a_write_is_seen(line):
    assert writes(ast.parse(line).body[0].value)


@pytest.mark.parametrize(
    "line", ["open(path)", "path.open('rb')", "Image.open(path)", "yaml.safe_dump(values)"]
)
def test_a_read_is_no_write(line):
    assert not writes(ast.parse(line).body[0].value)
