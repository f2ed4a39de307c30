"""Warnings name the line of the user's call."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest

LIBRARY = """
import torch
from stage1_tokenizer.caller import warn_user

@torch.no_grad()
def sample():
    draw()

def draw():
    warn_user("look here")
"""


def of_module(name: str) -> Callable[[], None]:
    """A function of a module of this name, which warns below a decorator of torch."""
    space = {"__name__": name}
    exec(compile(LIBRARY, f"{name}.py", "exec"), space)
    return space["sample"]  # type: ignore[return-value]


@pytest.mark.parametrize("package", ["pipeline.inference.some", "stage1_tokenizer", "stage2_prior"])
def test_warning_points_at_the_call_from_outside_of_our_packages(package):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        of_module(package)()
    line = test_warning_points_at_the_call_from_outside_of_our_packages.__code__.co_firstlineno
    assert [(one.filename, one.lineno - line) for one in caught] == [(__file__, 4)]


@pytest.mark.parametrize("module", ["pipeline.cli", "pipeline.cli.generate", "pipelines", "mine"])
def test_commands_and_other_modules_are_users(module):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        of_module(module)()
    assert [one.filename for one in caught] == [f"{module}.py"]
