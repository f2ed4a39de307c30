"""Hostile configurations: YAML of wrong types, bombs, tags, and what is no YAML."""

from __future__ import annotations

import copy
import io
from collections.abc import Sequence
from contextlib import redirect_stderr
from functools import partial
from pathlib import Path
from random import Random

import yaml

from benchmarks.attack.parts import NAMES, damaged, encoded_text, misplace, nested, text, value
from benchmarks.attack.trial import MODULE, Input
from benchmarks.attack_bundles import VALUES, places

_SHIPPED = Path(__file__).parents[2] / "configs"
_BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 30)
)
_MAPS = "a0: &a0 {x: 1, y: 2}\n" + "".join(
    f"a{n}: &a{n} {{x: *a{n - 1}, y: *a{n - 1}}}\n" for n in range(1, 40)
)
_DOCUMENTS = (
    _BOMB,
    _MAPS,
    _BOMB + "data: {source: *a29}\n",
    _MAPS + "data: *a39\n",
    "data: &d {source: *d}\n",
    "&d data: *d\n",
    "a: &a [*a]\n",
    "data: !!python/object/apply:os.system ['echo FORGED']\n",
    "data: !!python/name:os.system\n",
    "!!python/object/new:os.system [x]\n",
    "data: !evil {source: x}\n",
    "name: !!binary AAAA\n",
    "data: !!set {source}\n",
    "data: !!omap [source: x]\n",
    "name: 2001-01-01\n",
    "name: 2001-99-99\n",
    "name: 2001-01-01T00:00:00+99:99\n",
    "data: {image_size: 1:60:60}\n",
    "data: {image_size: 0x" + "f" * 5000 + "}\n",
    "data: {image_size: " + "9" * 5000 + "}\n",
    "data: {val_fraction: .nan}\n",
    "data: {val_fraction: -.inf}\n",
    "1: 2\n",
    "null: 1\n",
    "? [a, b]\n: 1\n",
    "? {a: b}\n: 1\n",
    "data:\n  1: 2\n",
    "data:\n  ? [1]\n  : 2\n",
    "<<: [1]\n",
    "<<: {name: x}\ndata: {<<: *x}\n",
    "data: ../outside/secret.csv\n",
    "data: /etc/passwd\n",
    "prior: {train: /dev/zero}\n",
    "config: ../outside/secret.csv\n",
    "tokenizer: {init_from: ../outside}\n",
    "name: ../../outside/run\n",
    "name: a\\nFORGED\n",
    'name: "a\\nFORGED: x"\n"b\\nFORGED": 1\n',
    'data: {"a\\nFORGED": "\\e[2J\\nFORGED"}\n',
    f"data: {{mix: [{MODULE}.s]}}\n",
    f"data: {{mix: [{{class_path: {MODULE}.s}}]}}\n",
    f"prior: {{train: {{class_path: {MODULE}.s}}}}\n",
    f"name: !!python/name:{MODULE}.s\n",
    "data: {source: shapes, source: emoji}\n",
    "---\nname: a\n---\nname: b\n",
    "%YAML 9.9\n---\nname: a\n",
    "- name\n",
    "x\n",
    "",
    "\0",
    "name: \0\n",
    "\t\n",
    "name: 'a\n",
    "{" * 10_000,
    "a: " * 2_000,
    "- " * 5_000,
    "? " * 2_000,
    "!" * 1_000,
    "&a " * 100,
    "name: |99999999999\n x\n",
    "x" * 1_000_000,
    "\n".join(f"k{n}: {n}" for n in range(2_000)),
)


def make(chance: Random, folder: Path) -> Input:
    """A file of settings, perhaps with options."""
    path = folder / "experiment.yaml"
    what = chance.choice(("document", "values", "values", "damaged", "other", "options"))
    content = chance.choice(_DOCUMENTS)
    options: list[str] = []
    shipped = sorted(_SHIPPED.glob("*.yaml"))
    if what == "values":
        settings = yaml.safe_load(chance.choice(shipped).read_text())
        for _ in range(chance.choice((1, 1, 3))):
            inside, key = chance.choice(places(settings))
            inside[key] = copy.deepcopy(
                value(chance) if chance.random() < 0.5 else chance.choice(VALUES)
            )
            if isinstance(inside, dict) and chance.random() < 0.2:
                inside[text(chance)] = inside.pop(key)
        content = yaml.safe_dump(settings, allow_unicode=True)
    elif what == "other":
        content = nested(chance) if chance.random() < 0.5 else text(chance)
    elif what == "options":
        content = "data: {source: shapes}\n"
        keys = (
            "data.source",
            "data",
            "prior",
            "prior.train.steps",
            "name",
            "x",
            "data.image_size",
            "config",
        )
        given = chance.choice(
            (
                text(chance),
                nested(chance)[:20_000],
                "{a: &a *a}",
                chance.choice(NAMES),
                "{x: !!python/name:os.x }",
            )
        )
        options = [f"--{chance.choice(keys)}", given]
    elif chance.random() < 0.5:
        content = chance.choice(shipped).read_text() + content
    path.write_bytes(encoded_text(chance, content))
    if what == "damaged":
        path.write_bytes(damaged(chance, path.read_bytes()))
    if chance.random() < 0.03:
        what += f", {misplace(chance, path, named=True)}"
    return Input(f"{what} {content!r:.60} {options}", partial(_loaded, path, options))


def _loaded(path: Path, options: Sequence[str]) -> Sequence[str]:
    from pipeline.config.load import load_experiment

    with redirect_stderr(io.StringIO()):
        load_experiment(["--config", str(path), *options])
    return []
