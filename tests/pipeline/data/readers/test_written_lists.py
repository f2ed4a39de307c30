"""Lists that were written as texts: by Python, JSON and numpy."""

from __future__ import annotations

import json

import numpy as np
import pytest

from pipeline.data.readers.written_lists import texts_of_list

ODD = [
    "a cat",
    "it's",
    'say "x"',
    "line\nend",
    "caf\u00e9 \U0001f431",
    "tab\t\\",
    "[x], (y)",
    "\x85",
]


@pytest.mark.parametrize(
    "text",
    [
        repr(ODD),
        repr(tuple(ODD)),
        json.dumps(ODD),
        json.dumps(ODD, ensure_ascii=False),
        str(np.array(ODD, object)),
        ascii(ODD),
        f" {ODD!r}\n",
        repr([*ODD, None, float("nan")]),
        json.dumps([*ODD, None]),
    ],
)
def test_every_spelling_of_a_list_gives_its_texts(text):
    assert texts_of_list(text) == ODD


def test_one_text_is_a_list_of_one():
    assert texts_of_list("['a cat']") == ["a cat"] and texts_of_list("('a cat',)") == ["a cat"]


@pytest.mark.parametrize(
    "text",
    [
        "a cat",
        "",
        "[a cat]",
        "(a cat)",
        "[1, 2]",
        "[['a'], ['b']]",
        '["a", 1]',
        "['a', open('x')]",
        "['a' + 'b']",
        "['a'",
        "'a', 'b'",
    ],
)
def test_other_texts_are_no_lists(text):
    assert texts_of_list(text) is None


@pytest.mark.parametrize("text", ["[]", "[ ]", "()", "[nan]", "[None]", "[null, NaN]", "(None,)"])
def test_a_list_of_missing_items_has_no_texts(text):
    assert texts_of_list(text) == []


@pytest.mark.parametrize(
    "text",
    [
        "[" * 50_000 + "]" * 50_000,
        "(" * 90_000 + ")",
        "['" + "\\" * 90_000 + "]",
        "['a'" + " " * 90_000 + "]x]",
        "[" + "'a' " * 20_000 + "x]",
        "[" + "9" * 50_000 + "]",
        "['a'," * 20_000 + "]",
    ],
)
def test_hostile_lists_are_left_as_they_are(text):
    """And in seconds: no pattern backtracks."""
    assert texts_of_list(text) is None
