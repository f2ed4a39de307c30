"""The oldest version of each package that pyproject.toml allows. `python -m
tests.helpers.lower_bounds` prints them as constraints for pip; it needs no package."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"


def requirements(pyproject: dict[str, Any]) -> list[str]:
    """Every dependency, those of the extras too."""
    project = pyproject["project"]
    extras = project.get("optional-dependencies", {}).values()
    return [*project["dependencies"], *(one for extra in extras for one in extra)]


def lower_bounds(pyproject: dict[str, Any]) -> dict[str, str]:
    """Version by package.

    Raises:
        ValueError: a dependency has no lower bound, or two different ones.
    """
    found: dict[str, str] = {}
    for requirement in requirements(pyproject):
        match = re.fullmatch(r"([\w.-]+)(\[[\w,-]+\])?>=([\d.]+)(,<[\d.]+)?", requirement)
        if match is None:
            raise ValueError(f"{requirement!r} has no lower bound; write NAME>=VERSION")
        name, version = match[1].lower(), match[3]
        if found.setdefault(name, version) != version:
            raise ValueError(f"{name} has the lower bounds {found[name]} and {version}; write one")
    return found


if __name__ == "__main__":
    for name, version in lower_bounds(tomllib.loads(PYPROJECT.read_text())).items():
        print(f"{name}=={version}")
