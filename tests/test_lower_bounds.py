"""Every dependency has one lower bound, and constraints.txt lies within all bounds."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib

import pytest
from packaging.requirements import Requirement

from tests.helpers.lower_bounds import PYPROJECT, lower_bounds, requirements

PROJECT = tomllib.loads(PYPROJECT.read_text())


def test_the_lower_bounds_printed_are_those_of_pyproject():
    command = [sys.executable, "-m", "tests.helpers.lower_bounds"]
    printed = subprocess.run(command, cwd=PYPROJECT.parent, capture_output=True, text=True)
    assert printed.returncode == 0, printed.stderr
    lines = printed.stdout.splitlines()
    bounds = dict(line.split("==") for line in lines)
    assert len(bounds) == len(lines)
    named = {Requirement(one).name.lower() for one in requirements(PROJECT)}
    assert set(bounds) == named
    for one in map(Requirement, requirements(PROJECT)):
        bound = bounds[one.name.lower()]
        assert f">={bound}" in str(one.specifier).split(",")
        assert one.specifier.contains(bound), f"{one} refuses its own lower bound"


def test_the_constrained_versions_lie_within_the_bounds():
    pinned = (PYPROJECT.parent / "constraints.txt").read_text().lower().replace("_", "-")
    versions = dict(re.findall(r"(?m)^([\w.-]+)==(\S+)$", pinned))
    for one in map(Requirement, requirements(PROJECT)):
        version = versions.get(one.name.lower())
        if version is None:
            assert one.name == "emoji", f"constraints.txt lacks {one.name}"
            continue
        assert one.specifier.contains(version), f"{one} refuses the constrained {version}"


@pytest.mark.parametrize(
    ("dependencies", "message"),
    [
        (["numpy"], "'numpy' has no lower bound"),
        (["numpy<3"], "has no lower bound"),
        (["numpy>=2", "numpy>=2.1"], "numpy has the lower bounds 2 and 2.1"),
    ],
)
def test_a_dependency_without_one_lower_bound_is_refused(dependencies, message):
    with pytest.raises(ValueError, match=message):
        lower_bounds({"project": {"dependencies": dependencies}})
