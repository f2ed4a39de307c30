"""Every setting of an experiment with its description, read from the source of the classes. Imports
none of them, so that help comes at once."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

_ROOT = Path(__file__).resolve().parents[2]
_FOLDERS = ("pipeline/config", "stage1_tokenizer", "stage2_prior", "stage2_prior/flows")


class Setting(NamedTuple):
    """A setting as its class declares it."""

    name: str
    """Dotted name, as in `prior.train.steps`."""
    kind: str
    """Type, as in `int`, or `'adamw' | 'muon'`."""
    default: str
    """Empty where there is none, or nothing to show."""
    description: str


def all_settings() -> list[Setting]:
    """The settings of `Experiment`, in the order of its sections."""
    known: dict[str, ast.stmt] = {}
    for folder in _FOLDERS:
        for path in sorted((_ROOT / folder).glob("*.py")):
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.ClassDef):
                    known[node.name] = node
                elif isinstance(node, ast.Assign):
                    known[ast.unparse(node.targets[0])] = node
    return list(_fields(known, "Experiment", ""))


def _fields(known: Mapping[str, ast.stmt], name: str, path: str) -> Iterator[Setting]:
    """The fields of a class and of the classes that it inherits from or holds."""
    section = known[name]
    assert isinstance(section, ast.ClassDef)
    for base in section.bases:
        yield from _fields(known, ast.unparse(base), path)
    for field, text in pairwise(section.body):
        if not isinstance(field, ast.AnnAssign) or not isinstance(text, ast.Expr):
            continue
        key = path + ast.unparse(field.target)
        kind = ast.unparse(field.annotation)
        declared = known.get(kind)
        if isinstance(declared, ast.ClassDef):
            yield from _fields(known, kind, f"{key}.")
            continue
        if isinstance(declared, ast.Assign):  # a name for several choices
            kind = ast.unparse(declared.value)
        kind = re.sub(r"Literal\[(.*?)\]", lambda found: found[1].replace(",", " |"), kind)
        default = ""
        if field.value is not None and not isinstance(field.value, ast.Call):
            default = ast.unparse(field.value).strip("'")
        yield Setting(key, kind, default, " ".join(ast.literal_eval(text.value).split()))
