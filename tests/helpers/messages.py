"""Every message that the packages can show a user who made a mistake: errors, warnings, findings of
the doctor. Read from the source, without running it.

`python -m tests.helpers.messages` lists them, one a line: file:line, kind and text with `{...}` for
what is filled in. Parts of messages that come from a function or an argument are listed at the
place where they are written. Left out: errors of our own code (assert, TypeError, KeyError ...).
"""

from __future__ import annotations

import ast
import builtins
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from itertools import chain
from pathlib import Path

from tests.helpers.architecture import FILES, ROOT

INTERNAL = {
    "AssertionError",
    "AttributeError",
    "IndexError",
    "KeyError",
    "KeyboardInterrupt",
    "NotImplementedError",
    "RuntimeError",
    "StopIteration",
    "SystemExit",
    "TypeError",
}
"""Errors of our own code, or of Python's protocols."""

WARNINGS = {"warn", "warn_user", "warning", "Finding"}
"""Functions whose last string argument is shown as it is."""

TABLES = {"problems", "findings_that_apply"}
"""Functions of (condition, ..., text) rows."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, order=True)
class Message:
    """A message, or a part of one.

    Attributes:
        path: of the file, below the repository.
        line: where the text starts.
        kind: the error's class, `warning`, `finding`, `problem`, or `part`.
        text: with what is filled in as `{expression}`.
    """

    path: str
    line: int
    kind: str
    text: str


@dataclass
class Scope:
    """A function, or a module outside of its functions."""

    path: Path
    parents: list[Function] = field(default_factory=list)
    assigned: dict[str, list[ast.expr]] = field(default_factory=lambda: defaultdict(list))
    added: dict[str, list[ast.expr]] = field(default_factory=lambda: defaultdict(list))
    """What is put behind a variable by `+=`."""

    def lookup(self, name: str) -> list[ast.expr]:
        own = constants().get((str(self.path), name))
        return self.assigned.get(name) or own or constants().get(("", name), [])


def messages() -> list[Message]:
    """All messages, by file and line."""
    found: set[Message] = set()
    seen: set[int] = set()
    for scope, node in _calls():
        for kind, text in _shown(scope, node):
            found |= _collect(scope, kind, text, seen)
    return sorted(found)


def _shown(scope: Scope, call: ast.Call) -> Iterator[tuple[str, ast.expr]]:
    """The texts that a call shows, with their kinds."""
    name = _called(call)
    if name in exception_classes() and call.args:
        yield name, next((one for one in call.args if _is_text(scope, one)), call.args[0])
    elif name in WARNINGS and call.args:
        kind = "finding" if name == "Finding" else "warning"
        yield kind, call.args[1 if name == "Finding" else 0]
    elif name in TABLES:
        for row in call.args:
            if isinstance(row, ast.Tuple):
                yield "problem", row.elts[-1]
    elif name == "append" and _of_problems(call.func):
        yield "problem", call.args[0]


def _of_problems(function: ast.expr) -> bool:
    """Whether this is a method of a list called `problems`."""
    return (
        isinstance(function, ast.Attribute)
        and isinstance(function.value, ast.Name)
        and function.value.id == "problems"
    )


def _collect(scope: Scope, kind: str, text: ast.expr, seen: set[int]) -> set[Message]:
    """A text as messages, one for each branch, and the parts that other places give to it."""
    if id(text) in seen:
        return set()
    seen.add(id(text))
    path = str(scope.path.relative_to(ROOT))
    found = {Message(path, text.lineno, kind, one) for one in _texts(scope, text) if " " in one}
    for node in _expressions(scope, text):
        if isinstance(node, ast.Call):
            for function in functions().get(_called(node), []):
                for inner, part in function:
                    found |= _collect(inner, "part", part, seen)
        if isinstance(node, ast.Name):
            behind = [(scope, part) for part in scope.added[node.id] if _is_text(scope, part)]
            for inner, part in chain(behind, _arguments(scope, node.id)):
                found |= _collect(inner, "part", part, seen)
    return found


def _expressions(scope: Scope, text: ast.expr) -> Iterator[ast.AST]:
    """The nodes of an expression, and of what the variables in it were assigned."""
    waiting: list[ast.expr] = [text]
    seen: set[str] = set()
    while waiting:
        for node in ast.walk(waiting.pop()):
            yield node
            if isinstance(node, ast.Name) and node.id not in seen:
                seen.add(node.id)
                waiting += scope.lookup(node.id)


def _arguments(scope: Scope, name: str) -> Iterator[tuple[Scope, ast.expr]]:
    """What callers give to a parameter of the scope's function, where it is text."""
    for function in scope.parents[-1:]:
        parameters = [one.arg for one in function.args.posonlyargs + function.args.args]
        both = parameters + [one.arg for one in function.args.kwonlyargs]
        if name not in both:
            continue
        yield from ((scope, one) for one in function.args.defaults if _is_text(scope, one))
        offset = 1 if parameters[:1] in (["self"], ["cls"]) else 0
        for other, call in _calls_by_name().get(function.name, []):
            given = {word.arg: word.value for word in call.keywords}
            given |= dict(zip(parameters[offset:], call.args, strict=False))
            if (value := given.get(name)) is not None and _is_text(other, value):
                yield other, value


def _texts(scope: Scope, node: ast.expr, depth: int = 0) -> list[str]:
    """The texts that an expression may have; `{...}` for what is no text in the source."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [node.value]
    if isinstance(node, ast.JoinedStr):
        parts = [_texts(scope, one, depth) for one in node.values]
        return _joined(parts)
    if isinstance(node, ast.FormattedValue):
        return _texts(scope, node.value, depth)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _joined([_texts(scope, node.left, depth), _texts(scope, node.right, depth)])
    if isinstance(node, ast.IfExp):
        return _texts(scope, node.body, depth) + _texts(scope, node.orelse, depth)
    if isinstance(node, ast.BoolOp):
        return [text for one in node.values for text in _texts(scope, one, depth)]
    if isinstance(node, ast.Name) and depth < 4:
        values = [one for one in scope.lookup(node.id) if _is_text(scope, one)]
        if values:
            return [text for one in values for text in _texts(scope, one, depth + 1)]
    return [f"{{{ast.unparse(node)}}}"]


def _joined(parts: list[list[str]]) -> list[str]:
    texts = [""]
    for options in parts:
        texts = [before + after for before in texts for after in options][:16]
    return texts


def _is_text(scope: Scope, node: ast.expr, depth: int = 0) -> bool:
    """Whether an expression is text of the source, in a branch at least."""
    if isinstance(node, ast.Constant):
        return isinstance(node.value, str)
    if isinstance(node, ast.IfExp):
        return _is_text(scope, node.body, depth) or _is_text(scope, node.orelse, depth)
    if isinstance(node, ast.BinOp):
        return _is_text(scope, node.left, depth) or _is_text(scope, node.right, depth)
    if isinstance(node, ast.BoolOp):
        return any(_is_text(scope, one, depth) for one in node.values)
    if isinstance(node, ast.Name) and depth < 4:
        return any(_is_text(scope, one, depth + 1) for one in scope.lookup(node.id))
    return isinstance(node, ast.JoinedStr)


def _called(call: ast.Call) -> str:
    if isinstance(call.func, ast.Attribute):
        return call.func.attr
    return call.func.id if isinstance(call.func, ast.Name) else ""


@cache
def _trees() -> list[tuple[Path, ast.Module]]:
    return [(path, ast.parse(path.read_text())) for path in FILES]


@cache
def exception_classes() -> set[str]:
    """Names of the errors that are for a user: Python's, and those of the packages."""
    names = {
        name
        for name, value in vars(builtins).items()
        if isinstance(value, type) and issubclass(value, Exception)
    }
    classes = [
        node for _, tree in _trees() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)
    ]
    for _ in range(4):  # classes of classes
        names |= {node.name for node in classes if names & {ast.unparse(one) for one in node.bases}}
    names |= {"ArgumentTypeError", "UnidentifiedImageError"}
    return names - INTERNAL


@cache
def constants() -> dict[tuple[str, str], list[ast.expr]]:
    """Texts that modules assign, by file and name; under file "" those that others may import."""
    found: dict[tuple[str, str], list[ast.expr]] = defaultdict(list)
    for path, tree in _trees():
        for node in tree.body:
            if not isinstance(node, ast.Assign) or not isinstance(node.targets[0], ast.Name):
                continue
            if isinstance(node.value, ast.Constant | ast.JoinedStr):
                name = node.targets[0].id
                found[str(path), name].append(node.value)
                if not name.startswith("_"):
                    found["", name].append(node.value)
    return found


@cache
def _scopes() -> list[tuple[Scope, ast.AST]]:
    """Every node with the function that it is in."""
    found: list[tuple[Scope, ast.AST]] = []

    def visit(node: ast.AST, scope: Scope) -> None:
        for child in ast.iter_child_nodes(node):
            inner = scope
            if isinstance(child, Function):
                outer = scope.assigned if scope.parents else {}
                inner = Scope(scope.path, [*scope.parents, child])
                inner.assigned.update(outer)
            _note_assignment(inner, child)
            found.append((inner, child))
            visit(child, inner)

    for path, tree in _trees():
        visit(tree, Scope(path))
    return found


def _note_assignment(scope: Scope, node: ast.AST) -> None:
    if not scope.parents:
        return
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
        scope.assigned[node.targets[0].id].append(node.value)
    if isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name):
        scope.added[node.target.id].append(node.value)
    if not isinstance(node, ast.AnnAssign | ast.NamedExpr):
        return
    if node.value is not None and isinstance(node.target, ast.Name):
        scope.assigned[node.target.id].append(node.value)


@cache
def _calls() -> list[tuple[Scope, ast.Call]]:
    return [(scope, node) for scope, node in _scopes() if isinstance(node, ast.Call)]


@cache
def _calls_by_name() -> dict[str, list[tuple[Scope, ast.Call]]]:
    found: dict[str, list[tuple[Scope, ast.Call]]] = defaultdict(list)
    for scope, call in _calls():
        found[_called(call)].append((scope, call))
    return found


@cache
def functions() -> dict[str, list[list[tuple[Scope, ast.expr]]]]:
    """What each function returns, yields or adds to a list, where it is text."""
    found: dict[str, list[list[tuple[Scope, ast.expr]]]] = defaultdict(list)
    by_function: dict[int, list[tuple[Scope, ast.expr]]] = defaultdict(list)
    for scope, node in _scopes():
        if not scope.parents:
            continue
        values: list[ast.expr | None] = []
        if isinstance(node, ast.Return | ast.Yield):
            values = [node.value]
        elif isinstance(node, ast.Call) and _called(node) == "append":
            values = list(node.args)
        elif isinstance(node, ast.AugAssign) and isinstance(node.value, ast.List):
            values = list(node.value.elts)
        for value in values:
            inner = value.elts if isinstance(value, ast.List | ast.Tuple) else [value]
            by_function[id(scope.parents[-1])] += [
                (scope, one) for one in inner if one is not None and _is_text(scope, one)
            ]
    for _, node in _scopes():
        if isinstance(node, Function) and by_function[id(node)]:
            found[node.name].append(by_function[id(node)])
    return found


def main() -> None:
    listed = messages()
    for one in listed:
        print(f"{one.path}:{one.line} [{one.kind}] {one.text!r}")
    print(f"{len(listed)} messages", file=sys.stderr)


if __name__ == "__main__":
    main()
